"""Train a model: the loop, the step, optimizers, schedules, meters, checkpoints.

The package is also a function, `effnet_fast.run.training.train`, which the command line calls too.

>>> import effnet_fast
>>> config = effnet_fast.TrainConfig(
...     dataset="synthetic", image_size=16, width=0.25, depth=0.3, limit_train=64, limit_eval=32, batch_size=32,
...     num_epochs=1, device="cpu", kernels="torch", run_name="tiny",
... )
>>> result = effnet_fast.train(config, on_evaluation=lambda epoch, row: print("top-1:", row["top1"]))
efficientnet-b0 at 16 px...top-1: ...
>>> result.folder, result.finished, result.top1 <= result.top5
(PosixPath('results/tiny'), True, True)
>>> [row["epoch"] for row in result.history.eval]
[1.0]
>>> result.model().image_size
16
"""

from effnet_fast import make_callable

make_callable(__name__)
