"""Which scaled models to train, which worker trains which, and what follows from their accuracy."""

import sys

from effnet_fast import CallableRoom

# `effnet_fast.search(config)` runs the verb, although this room has its name.
sys.modules[__name__].__class__ = CallableRoom
