"""Dtypes of `--mixed_precision` and of matrix products."""

import pytest
import torch

from effnet_fast.precision import fastest_dtype


@pytest.mark.parametrize("feature", ["amx_bf16", "avx512_bf16", "avx512_f"])
def test_fastest_dtype(monkeypatch, feature):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {feature: True}, raising=False)
    assert fastest_dtype(torch.device("cpu")) == (torch.float32 if feature == "avx512_f" else torch.bfloat16)
    assert fastest_dtype(torch.device("cuda")) == torch.bfloat16
