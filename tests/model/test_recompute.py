"""Recomputed activations: the same gradients, statistics and random draws with less memory."""

import pytest
import torch
from torch import nn

from effnet_fast.model import Architecture, EfficientNet, batch_norms, recompute_blocks
from effnet_fast.model.blocks import MBConv, Style
from effnet_fast.model.complexity import complexity
from marks import on_gpu

pytestmark = pytest.mark.interpreted

NARROW = Architecture(width=0.25, depth=0.3, num_classes=10, output_stride=16, dropout=0.2, drop_path=0.5)


def after_two_passes(kernels="torch", *, recompute, dtype=torch.float32):
    torch.manual_seed(0)
    model = EfficientNet(NARROW, kernels).to(dtype)
    if recompute:
        recompute_blocks(model)
    images = torch.randn(4, 3, 16, 16, dtype=dtype)
    for _ in range(2):
        model(images).square().mean().backward()
    assert {norm.momentum for norm in batch_norms(model)} == {0.01}
    return {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_and_statistics_are_bit_identical(dtype):
    assert_equal(after_two_passes(recompute=True, dtype=dtype), after_two_passes(recompute=False, dtype=dtype))


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter on the CPU")


@pytest.mark.slow
@interpreted
def test_whole_model_on_the_kernels():
    assert_equal(after_two_passes("triton", recompute=True), after_two_passes("triton", recompute=False))


def block_after_two_passes(kernels="torch", *, recompute, compiled=False, device="cpu"):
    torch.manual_seed(0)
    block = MBConv(4, 4, 3, 1, 2, style=Style(kernels=kernels)).to(device)
    block.recompute = recompute
    call = torch.compile(block, backend="aot_eager" if device == "cpu" else "inductor") if compiled else block
    for _ in range(2):
        call(torch.randn(2, 4, 6, 6, device=device)).square().mean().backward()
    return {name: p.grad for name, p in block.named_parameters()} | dict(block.named_buffers())


@interpreted
def test_block_on_the_kernels():
    recomputed = block_after_two_passes("triton", recompute=True)
    assert_equal(recomputed, block_after_two_passes("triton", recompute=False))


@on_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_block_on_a_gpu(compiled):
    recomputed = block_after_two_passes("auto", recompute=True, compiled=compiled, device="cuda")
    for name, value in block_after_two_passes("auto", recompute=False, device="cuda").items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_compiled_statistics_are_updated_once():
    """`aot_eager` splits forward and backward like Inductor, but runs PyTorch's operators."""
    compiled = block_after_two_passes(recompute=True, compiled=True)
    for name, value in block_after_two_passes(recompute=False).items():
        torch.testing.assert_close(compiled[name], value)


def test_recomputation_under_autocast():
    torch.manual_seed(0)
    model = EfficientNet(NARROW, "torch")
    recompute_blocks(model)
    seen = set()
    model.stages[2][0].project.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 3, 16, 16)).float().sum()
    loss.backward()
    assert seen == {torch.bfloat16}


def test_fewer_numbers_are_saved():
    model = EfficientNet(NARROW)
    before = complexity(model, 32).saved
    recompute_blocks(model)
    assert complexity(model, 32).saved < before / 3


def test_evaluation_is_unchanged():
    model = EfficientNet(NARROW).eval()
    images = torch.randn(2, 3, 16, 16)
    before = model(images)
    recompute_blocks(model)
    assert torch.equal(model(images), before)


def test_model_without_blocks():
    with pytest.raises(ValueError, match="--activation_checkpointing needs a model of MBConv blocks"):
        recompute_blocks(nn.Linear(2, 2))
