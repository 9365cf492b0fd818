"""Fixtures of the op tests; puts this folder on sys.path, so that tests can import its harness (`op_cases`, ...)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from effnet_kernels import launch
from interpreter import faithful_interpreter as faithful_interpreter

if not (launch.INTERPRETED or torch.cuda.is_available()):
    raise pytest.UsageError("effnet_kernels was imported before TRITON_INTERPRET=1: set that in tests/conftest.py")


@pytest.fixture(autouse=True)
def same_numbers():
    """Random inputs do not depend on the tests before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Fill torch.empty with NaN: a kernel that reads, or returns, memory it did not write then fails its test."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")  # full float32 references
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn
