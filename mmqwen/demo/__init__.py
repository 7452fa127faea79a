"""`mmqwen demo`: a small multimodal model, trained here and served by vLLM, on handwritten digits.

`mmqwen.demo.digits` is the data, `mmqwen.demo.train` makes the checkpoint, `mmqwen.demo.run` is
the whole demonstration. (Nothing is re-exported: the functions `train` and `run` would hide the
modules of the same name.)
"""
