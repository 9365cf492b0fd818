"""Plan scaled models, assign them to workers, and choose the best by accuracy.

The package is also a function, `effnet_fast.run.search.search`, which the command line calls too.

>>> import effnet_fast
>>> config = effnet_fast.SearchConfig(
...     dataset="synthetic", alpha="1.2", beta="1.1", gamma="1.15", output_stride=32, stage="plan", device="cpu"
... )
>>> result = effnet_fast.search(config)
name ...
>>> [candidate.image_size for candidate in result.plan.candidates]
[37]
"""

from effnet_fast import make_callable

make_callable(__name__)
