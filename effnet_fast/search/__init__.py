"""Plan scaled models, assign them to workers, and choose the best by accuracy."""

import sys

from effnet_fast import CallableRoom

# Make this package callable: `effnet_fast.search(config)` runs the command of the same name.
sys.modules[__name__].__class__ = CallableRoom
