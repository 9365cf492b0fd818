"""Marks of tests."""

import pytest

from effnet_fast import provenance

on_gpu = pytest.mark.gpu  # `-m gpu` selects these; without a GPU they are skipped
# `torchrun --rdzv-backend bound` finds ours by the entry point, which files on PYTHONPATH do not have.
needs_installation = pytest.mark.skipif(
    provenance.version("effnet-fast") is None, reason="needs the project installed: pip install --no-deps ."
)
