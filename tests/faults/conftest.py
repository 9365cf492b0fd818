"""Small training runs in separate processes, for tests that kill and stop them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from effnet_fast import checkpoint

SMALL = (
    "train --dataset synthetic --limit_train 100 --limit_eval 16 --batch_size 16 --num_epochs 3 --learning_rate 0.05 "
    "--output_stride 32 --image_size 16 --width 0.25 --depth 0.3 --loader resident --num_workers 1 --log_every_steps 1 "
    "--device cpu --hang_timeout 60"
)
STEPS_PER_EPOCH = 6  # and four images left over


class Started:
    """A process in its own process group; its lines on stdout and stderr are collected while it runs."""

    def __init__(self, command, **environment):
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
        )
        self.lines = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self._reader.start()

    @property
    def printed(self):
        return "".join(self.lines)

    def wait_for(self, words, count=1):
        """Wait until `count` lines hold `words`, and return the last of them."""
        while True:
            found = [line for line in list(self.lines) if words in line]
            if len(found) >= count:
                return found[-1]
            if self.process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.01)
        raise AssertionError(f"{words!r} was not printed:\n{self.printed[-5000:]}")

    def end(self):
        """The exit status, once it has ended."""
        status = self.process.wait()
        self._reader.join()
        return status

    def kill(self):
        """kill -9 of the process and all below it; torchrun's ranks are sessions of their own."""
        for pid in [*descendants(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()


def descendants(pid):
    """All processes below one, the lowest first."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [found for child in children for found in (*descendants(int(child)), int(child))]


class Runs:
    """Starts runs under one folder."""

    def __init__(self, folder):
        self.folder = folder
        self.started = []

    def start(self, command, **environment):
        self.started.append(Started(command, **environment))
        return self.started[-1]

    def train(self, name, flags="", ranks=1, options="", **environment):
        """`effnet-fast train` of a small model; under torchrun with several ranks."""
        python = [sys.executable, "-m"]
        if ranks > 1:
            python += f"torch.distributed.run --standalone --nproc-per-node {ranks} {options} -m".split()
        line = f"{SMALL} --save_dir {self.folder} --run_name {name} {flags}"
        return self.start([*python, "effnet_fast", *line.split()], **environment)

    def agent(self, name, flags, *, ranks, endpoint, is_host, prefix=(), **environment):
        """One of two agents of torchrun, as train_multinode.sh starts them; run by the command `prefix`."""
        torchrun = (
            f"-m torch.distributed.run --nnodes 1:2 --nproc-per-node {ranks} --rdzv-backend bound --rdzv-id test "
            f"--max-restarts 9 --rdzv-endpoint {endpoint} --rdzv-conf is_host={is_host},last_call_timeout=5"
        )
        if "LOCAL_ADDR" in environment:
            torchrun += f" --local-addr {environment['LOCAL_ADDR']}"
        line = f"{SMALL} --save_dir {self.folder} --run_name {name} {flags}"
        command = [*prefix, sys.executable, *torchrun.split(), "-m", "effnet_fast", *line.split()]
        return self.start(command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", **environment)

    def wait_for_step(self, name, step):
        """Wait until the newest row of a run is of this step or a later one; fail if every process has ended before."""
        while True:
            ended = all(started.process.poll() is not None for started in self.started)
            with contextlib.suppress(OSError, ValueError, IndexError):
                if self.rows(name)[-1]["step"] >= step:
                    return
            assert not ended, f"no process is left, and {name} has not reached step {step}"
            time.sleep(0.1)

    def saved(self, name):
        return checkpoint.load(self.folder / name / "last.pt")

    def rows(self, name, kind="train"):
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["kind"] == kind]


@pytest.fixture
def runs(tmp_path):
    runs = Runs(tmp_path)
    yield runs
    for started in runs.started:
        started.kill()


@pytest.fixture
def small():
    return SMALL


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def flatten(value, path=""):
    """{path: leaf} of nested dicts and lists."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in flatten(item, f"{path}/{i}").items()}
    return {path: value}


# Of a checkpoint, what the wall clock or the run's name decides.
WALL_CLOCK = (
    "/config/run_name",
    "/config/save_dir",
    "/result/seconds",
    "/config/save_every",
    "/launch",
    "/config/num_workers",
)


@pytest.fixture
def assert_same_state():
    """Compare two checkpoints bit for bit: weights, averages, optimizer, scaler, meters, loader, progress."""
    import torch

    def compare(one, two):
        one, two = flatten(one), flatten(two)
        assert one.keys() == two.keys()
        for path, value in one.items():
            if path.startswith(WALL_CLOCK):
                continue
            same = torch.equal(value, two[path]) if isinstance(value, torch.Tensor) else value == two[path]
            assert same, path

    return compare


@pytest.fixture
def tmpfs(tmp_path):
    """Mounts small file systems: `tmpfs(megabytes)` returns the folder."""
    mounted = []

    def mount(megabytes, options=""):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m{options}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("needs mount")
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def fill():
    """Fills the file system of a folder up to so many bytes; returns the file to remove."""

    def fill(folder: Path, leave: int):
        filler = folder / "filler"
        with filler.open("wb") as file:
            free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            os.posix_fallocate(file.fileno(), 0, max(1, free - leave))
        return filler

    return fill
