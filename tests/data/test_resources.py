"""Memory and shared memory: large pictures, small /dev/shm, no workers."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_fast.data import torch_loader
from effnet_fast.data.dataset import ArraySplit, FileSplit, ImageFile
from effnet_fast.data.torch_loader import TorchLoader
from plain_spec import PLAIN

SPEC = dataclasses.replace(PLAIN, num_workers=1)
SPLIT = ArraySplit(np.zeros((16, 32, 32, 3), np.uint8), np.zeros(16, np.int64))

PEAK = """
import resource, sys
from pathlib import Path
import effnet_fast.data.decode, effnet_fast.data.examine
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
{}
print(peak() - before)
"""


def peak_mib(code: str, path: Path) -> int:
    """MiB that a fresh process needs for some code beyond its imports."""
    command = [sys.executable, "-c", PEAK.format(code), str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan of 90 megapixels with one bit each."""
    path = tmp_path_factory.mktemp("scan") / "scan.png"
    Image.new("1", (9000, 10000), 1).save(path)
    return path


@pytest.mark.parametrize(
    "code",
    [
        "effnet_fast.data.decode.read_image(Path(sys.argv[1]), 224)",
        "assert not effnet_fast.data.examine.examine_file(Path(sys.argv[1])).error",
    ],
)
def test_a_large_scan_needs_little_memory(scan: Path, code: str) -> None:
    assert peak_mib(code, scan) < 300  # 90 MiB are the decoded bits; RGB in float64 would be 2,000


def test_large_jpegs_are_decoded_at_a_reduced_size(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    Image.new("RGB", (8000, 6000), (90, 120, 200)).save(path)
    code = "pixels = effnet_fast.data.decode.read_image(Path(sys.argv[1]), 32)"
    code += "; assert abs(pixels - [90, 120, 200.]).max() < 3"
    assert peak_mib(code, path) < 100  # 183 MiB at full size


@pytest.mark.parametrize("workers", [1, 2])
def test_too_little_shared_memory_is_refused(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    usage = namedtuple("usage", "total used free")
    batch = 8 * (3 * 32 * 32 + 8)
    spec = dataclasses.replace(SPEC, num_workers=workers)
    monkeypatch.setattr(torch_loader, "_SHARED_MEMORY", Path("/"))
    monkeypatch.setattr(torch_loader.shutil, "disk_usage", lambda _: usage(0, 0, batch * (2 * workers + 2) - 1))
    with pytest.raises(ValueError, match=r"--shm-size.*--num_workers 0") as caught:
        next(TorchLoader(SPLIT, spec).epoch(0))
    assert "\n" not in str(caught.value)
    next(TorchLoader(SPLIT, dataclasses.replace(spec, num_workers=0)).epoch(0))
    monkeypatch.setattr(torch_loader.shutil, "disk_usage", lambda _: usage(0, 0, batch * (2 * workers + 2)))
    loader = TorchLoader(SPLIT, spec)
    assert len(list(loader.epoch(0))) == 2
    loader.close()


def test_workers_ship_uint8(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    files = FileSplit((ImageFile(tmp_path / "0.png"),) * 8, np.zeros(8, np.int64))
    for split in (SPLIT, files):
        images, labels, errors = TorchLoader(split, SPEC)._loader.dataset[0, 0]
        assert (images.dtype, labels.dtype, errors) == (torch.uint8, torch.int64, [])


def test_no_workers_start_no_process() -> None:
    loader = TorchLoader(SPLIT, dataclasses.replace(SPEC, num_workers=0))
    before = multiprocessing.active_children()
    next(loader.epoch(0))
    assert multiprocessing.active_children() == before


def test_shared_memory_that_fills_up_later_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers report it; torch alone would drop the batch and wait for ever."""

    def full(_tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory: No space left on device")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(ValueError, match=r"No space left.*--shm-size.*--num_workers 0") as caught:
        next(TorchLoader(SPLIT, SPEC).epoch(0))
    assert "\n" not in str(caught.value)


INTERRUPTED = """
import dataclasses, signal, sys
sys.path[:0] = sys.argv[1:]
from test_resources import SPEC, SPLIT, TorchLoader
signal.signal(signal.SIGINT, signal.default_int_handler)
batches = TorchLoader(SPLIT, SPEC).epoch(0)
next(batches)
print("ready", flush=True)
signal.pause()
"""


def test_ctrl_c_ends_a_process_with_workers() -> None:
    """The signal goes to the whole process group, as from a terminal."""
    folder = Path(__file__).parent
    command = [sys.executable, "-c", INTERRUPTED, str(folder), str(folder.parent / "shared")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert "KeyboardInterrupt" in errors
