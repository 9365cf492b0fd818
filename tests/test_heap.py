"""Freed memory stays in the process: the kernel does not map a large tensor anew at each allocation."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from effnet_fast import heap

FAULTS = """
import resource, sys
import torch
from effnet_fast import heap

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    assert heap.keep_freed_memory({})
for step in range(24):
    if step == 16:  # the heap has its final size
        before = faults()
    torch.ones(16 << 20)  # 64 MiB
print(faults() - before)
"""


def page_faults(mode):
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
def test_large_tensors_reuse_memory():
    pages = 8 * (64 << 20) // 4096
    assert page_faults("return") > pages / 600  # at least one for each huge page of 2 MiB
    assert page_faults("keep") < pages / 6000


@pytest.mark.parametrize(
    "environment", [{"MALLOC_TOP_PAD_": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_settings_of_the_user_stay(environment):
    assert not heap.keep_freed_memory(environment)


def test_other_systems_are_left_alone(monkeypatch):
    """Windows has no CDLL(None)."""
    monkeypatch.setattr(heap, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: pytest.fail("opened a library"))
    assert not heap.keep_freed_memory({})
