"""Find the checkpoint to resume, and check that it fits the run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from effnet_fast import checkpoint, distributed
from effnet_fast.checkpoint import Checkpoint
from effnet_fast.config import TrainConfig
from effnet_fast.faults import is_out_of_memory
from effnet_fast.run.restore import config_of, differences

# Settings that may change when a run is extended under another name.
_SCHEDULE_SETTINGS = {"num_epochs", "learning_rate", "schedule", "warmup_epochs", "resize_schedule"}


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run resumes.

    Attributes:
        path: the file.
        checkpoint: its content.
        from_path: whether it comes from `--resume PATH`; if not, it is the run's own.
    """

    path: Path
    checkpoint: Checkpoint
    from_path: bool

    @property
    def restarts(self) -> bool:
        """Whether the same torchrun or Slurm job wrote the checkpoint before a restart."""
        return distributed.may_be_restart() and self.checkpoint.launch == distributed.launch()

    def followed(self, path: str) -> bool:
        """Whether the run has begun from the checkpoint at `path`, by `--resume`."""
        before = str(config_of(self.checkpoint).resume)
        return before not in ("auto", "no") and Path(before).absolute() == Path(path).absolute()

    def extends(self, config: TrainConfig) -> bool:
        """Whether the run changes the number of epochs, and so starts a new schedule over the remaining ones.

        Raises:
            ValueError: those epochs are done already.
        """
        before = config_of(self.checkpoint)
        if not self.from_path or before.num_epochs == config.num_epochs:
            return False
        done = self.checkpoint.progress["epoch"]
        if config.num_epochs <= done:
            raise ValueError(
                f"--num_epochs {config.num_epochs}: {self.path} has trained {done} epochs already; give a larger number"
            )
        return True

    def check(self, config: TrainConfig, fingerprint: str) -> None:
        """Compare the checkpoint's config and data with this run's.

        Raises:
            ValueError: they differ in more than `extends` allows; the message lists the differences.
        """
        before, extends = config_of(self.checkpoint), self.extends(config)
        ignored = _SCHEDULE_SETTINGS if extends else set()
        changes = differences(before, config, self.checkpoint.fingerprint, fingerprint, ignored)
        if not changes:
            return
        start_over = "" if self.restarts else ", or --resume no to start over"
        advice = f"choose another --run_name{start_over}"
        changed_schedule = not differences(before, config, self.checkpoint.fingerprint, fingerprint, _SCHEDULE_SETTINGS)
        if changed_schedule and before.num_epochs != config.num_epochs:
            advice += f"; to train it for {config.num_epochs} epochs, --resume {self.path} with another --run_name"
        raise ValueError(f"{self.path} is of a run with another config ({changes}): {advice}")


def find_checkpoint(setting: str, folder: Path) -> Resumed | None:
    """The checkpoint to resume, or None to start over.

    If last.pt is damaged, print a warning and use the one before it. A run that torchrun or Slurm has restarted
    resumes its own last.pt whatever `--resume` says, and so does a run that has begun from the same PATH; both say so.

    Args:
        setting: `--resume`: auto, no, or a path.
        folder: the run folder.

    Raises:
        FileNotFoundError, ValueError: there is no checkpoint at the path, or none is readable.
    """
    if setting == "auto":
        return _newest(folder)
    if own := _own(folder, setting):
        if distributed.is_main():
            reason = (
                f"this job has written it, and follows --resume {setting} only once"
                if own.restarts
                else f"this run has followed --resume {setting} already; another --run_name starts from there anew"
            )
            print(f"resuming {own.path}: {reason}", flush=True)
        return own
    if setting == "no":
        return None
    if Path(setting).resolve().parent != folder.resolve() and checkpoint.generations(folder / checkpoint.LAST):
        raise ValueError(f"--resume {setting}: {folder} holds another run; choose another --run_name")
    return Resumed(Path(setting), Checkpoint.read(Path(setting), resumable=True), from_path=True)


def _own(folder: Path, setting: str) -> Resumed | None:
    """The run's newest checkpoint, if a restarted job or the run itself has followed `--resume SETTING`; else None."""
    if setting == "no" and not distributed.may_be_restart():
        return None
    with contextlib.suppress(ValueError):
        newest = _newest(folder)
        if newest is not None and (newest.restarts or newest.followed(setting)):
            return newest
    return None


def _newest(folder: Path) -> Resumed | None:
    """The newest readable checkpoint of a run."""
    damage: list[ValueError] = []
    for path in checkpoint.generations(folder / checkpoint.LAST):
        try:
            state = checkpoint.load(path)
        except ValueError as error:
            damage.append(error)
            continue
        for reason in damage if distributed.is_main() else []:
            print(f"warning: {reason}; resuming from {path}", file=sys.stderr)
        return Resumed(path, Checkpoint.from_dict(state, path, resumable=True), from_path=False)
    if damage:
        raise ValueError(f"{damage[0]} (--resume no starts over)")
    return None


@contextlib.contextmanager
def explain_checkpoint_errors(path: Path | None) -> Iterator[None]:
    """Turn errors from unexpected content of a checkpoint into one line; with `path` None they pass unchanged."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if path is None or is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{path} is of another version or incomplete ({reason})") from error
