"""`mmqwen playground`: one page on localhost where a digit is drawn, sent as rows, and read.

`mmqwen.playground.drawing` makes rows of what was drawn, `mmqwen.playground.engine` asks a running
server, `mmqwen.playground.server` serves the page and `mmqwen.playground.run` joins them. (Nothing
is re-exported, as in `mmqwen.demo`.)
"""
