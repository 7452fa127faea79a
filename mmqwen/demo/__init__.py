"""`mmqwen demo`: a small multimodal model, trained here and served by vLLM, on handwritten digits.

`mmqwen.demo.digits` is the data, `mmqwen.demo.train` makes the checkpoint, `mmqwen.demo.run` is
the whole demonstration. (Nothing is re-exported: the functions `train` and `run` would hide the
modules of the same name.)
"""

import os

# Before torch is loaded. By default OpenMP's threads spin while they wait for one another. The
# demo's matrices are small, so on two cores that other processes use too, a training step then
# takes 2.9 s; with threads that sleep it takes 0.26 s, as with one thread (0.22 s).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
