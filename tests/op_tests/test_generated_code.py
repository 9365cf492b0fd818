"""Inductor's code around the ops must not copy or cast a map, or change its layout (pytorch #189239)."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import effnet_fast
from effnet_fast.model.blocks import MBConv
from effnet_fast.model.network import batch_norms

SCRIPT = Path(__file__).with_name("generated_code.py")


@pytest.mark.skipif(torch.version.cuda is not None, reason="replaces CUDA queries of a CPU build of PyTorch")
@pytest.mark.parametrize(
    ("name", "image_size", "output_stride", "depth"),
    [("efficientnet_b0", 32, 8, 0.3), pytest.param("efficientnet_b1", 224, 32, 1.1, marks=pytest.mark.slow)],
)
def test_inductor_writes_no_map_between_the_ops(name, image_size, output_stride, depth):
    model = effnet_fast.create_model(name, depth=depth)
    blocks = [m for m in model.modules() if isinstance(m, MBConv)]
    residuals = sum(block.residual for block in blocks)
    assert residuals
    command = [sys.executable, str(SCRIPT), name, *map(str, (image_size, output_stride, depth))]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    counts = json.loads(process.stdout)
    forward, backward = (Counter(name for name, _ in counts[part]["inductor"]) for part in ("forward", "backward"))
    calls = {op.rpartition(".")[2]: count for part in counts.values() for op, count in part["extern"].items()}
    assert calls["mbconv"] == calls["mbconv_backward"] == len(blocks)
    assert calls["convolution"] == calls["convolution_backward"]

    # Forward casts only weights and images: one weight per convolution, and three for the classifier and the images.
    casts = "triton_poi_fused__to_copy"
    assert forward == {casts: calls["convolution"] + 3, "triton_for_fused": len(batch_norms(model))}
    weights = sum(p.numel() for p in model.parameters())
    assert sum(size for kernel, size in counts["forward"]["inductor"] if kernel == casts) < weights
    # Backward casts each weight's gradient to float32, and adds the two gradients of each residual block's input.
    assert backward.pop(casts) == calls["convolution"] + 1
    sums = {kernel: count for kernel, count in backward.items() if kernel.startswith("triton_poi_fused_add")}
    assert sum(sums.values()) == residuals
    assert sum(backward.values()) == residuals + 1, "besides the sums, only the gradient of the classifier's bias"
