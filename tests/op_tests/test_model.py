"""Compares a training step of a whole EfficientNet on Triton with PyTorch's operators; compiles and exports it."""

import pytest
import torch
from op_cases import DEVICE, relative_rms

from effnet_fast.model import Architecture, EfficientNet, create_model
from effnet_fast.model.blocks import MBConv, Style


def narrow(kernels: str, **settings) -> EfficientNet:
    """An EfficientNet of seven blocks with at most 80 channels; its last map is 4 x 4 for a 16 x 16 image."""
    torch.manual_seed(0)
    settings = {"width": 0.25, "depth": 0.3, "drop_path": 0.0, "dropout": 0.0, "output_stride": 4} | settings
    return EfficientNet(Architecture(**settings), kernels).to(DEVICE)


def step(model: EfficientNet, x: torch.Tensor, autocast: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Logits, gradients and buffers after one training step, by name."""
    with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
        logits = model(x.to(next(model.parameters()).dtype))
    torch.manual_seed(1)
    labels = torch.randint(0, logits.shape[1], logits.shape[:1]).to(DEVICE)
    torch.nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach()} | gradients | dict(model.named_buffers())


def assert_as_good(actual: dict, baseline: dict, exact: dict, least: int = 1, zero: float = 1e-3) -> None:
    """Check that no tensor of `actual` has more than three times the relative RMS error of `baseline`.

    Args:
        actual: results of the kernels, by name.
        baseline: results of PyTorch's operators in the same dtype.
        exact: results of PyTorch's operators in float64.
        least: tensors with fewer values are skipped, since their error varies too much.
        zero: largest absolute value where the exact one is 0.
    """
    assert actual.keys() == baseline.keys()
    for name, value in exact.items():
        if value.numel() < least:
            continue
        if value.abs().max() < 1e-9:  # truly 0, as a later BatchNorm cancels it: only rounding is left
            assert actual[name].abs().max() < zero, name
            continue
        limit = 3 * relative_rms(baseline[name], value) + 1e-6
        assert relative_rms(actual[name], value) <= limit, name


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, device=DEVICE).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("padding", ["symmetric", pytest.param("same", marks=pytest.mark.slow)])
def test_a_step_of_a_narrow_model(padding):
    models = [narrow(kernels, padding=padding) for kernels in ("triton", "torch", "torch")]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    x = images(4)
    assert_as_good(step(models[0], x), step(models[1], x), step(models[2].double(), x))


def check_zeroed_block(kernels: str) -> None:
    """Train a residual block whose last BatchNorm weight is 0: it is its shortcut, and only that weight learns."""
    results = []
    for block_kernels in (kernels, "torch"):
        torch.manual_seed(0)
        block = MBConv(8, 8, 3, 1, 4, style=Style(kernels=block_kernels)).to(DEVICE)
        torch.nn.init.zeros_(block.project.norm.weight)
        x = torch.randn(3, 8, 6, 5, device=DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = block(x)
        slope = torch.randn_like(y)
        y.backward(slope)
        assert torch.equal(y, x)
        assert torch.equal(x.grad, slope)
        gradients = {name: p.grad for name, p in block.named_parameters()}
        results.append({name: gradients.pop(f"project.norm.{name}") for name in ("weight", "bias")})
        assert not any(gradient.any() for gradient in gradients.values())  # NaN is true
    for name, gradient in results[1].items():
        assert relative_rms(results[0][name], gradient) <= 1e-4


def test_a_block_that_starts_as_its_shortcut():
    check_zeroed_block("triton")


@pytest.mark.slow
def test_a_step_of_b0():
    models, x = [], images(4)
    for kernels in ("triton", "torch", "torch"):
        torch.manual_seed(0)
        models.append(create_model("efficientnet-b0", drop_path=0.0, dropout=0.0, kernels=kernels).to(DEVICE))
    assert_as_good(step(models[0], x), step(models[1], x), step(models[2].double(), x))


@pytest.mark.slow
def test_a_step_under_autocast():
    models, x = [narrow(kernels) for kernels in ("triton", "torch", "torch")], images(8)
    actual, baseline = (step(model, x, torch.bfloat16) for model in models[:2])
    assert_as_good(actual, baseline, step(models[2].double(), x), least=8)
    assert all(p.grad.dtype == torch.float32 for p in models[0].parameters())


@pytest.mark.slow
def test_stochastic_depth_drops_the_same_samples():
    x, results = images(6), []
    for kernels in ("triton", "torch"):
        model = narrow(kernels, drop_path=0.5, depth=0.6)
        torch.manual_seed(1)
        results.append(step(model, x)["logits"])
    assert relative_rms(*results) <= 1e-4


def test_evaluation():
    x, models = images(2), [narrow(kernels, output_stride=16).eval() for kernels in ("triton", "torch")]
    with torch.no_grad():
        assert relative_rms(*(model(x) for model in models)) <= 1e-5


@pytest.mark.slow
def test_model_in_bfloat16():
    models = [narrow(kernels, output_stride=16).to(torch.bfloat16) for kernels in ("triton", "torch", "torch")]
    x = images(8).to(torch.bfloat16)
    assert_as_good(step(models[0], x), step(models[1], x), step(models[2].double(), x), zero=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["triton", "triton-block", "torch"])
def test_compiles_without_a_graph_break(kernels):
    eager, model = narrow(kernels, output_stride=16), narrow(kernels, output_stride=16)
    x = images(8)
    compiled = step(torch.compile(model, fullgraph=True), x)
    for name, value in step(eager, x).items():
        other = compiled[f"_orig_mod.{name}" if name != "logits" else name]
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4, msg=name)


def test_exports_through_the_reference():
    model = narrow("auto", output_stride=16).cpu().eval()
    x = torch.randn(2, 3, 16, 16)
    program = torch.export.export(model, (x,))
    assert not any("effnet_kernels" in str(node.target) for node in program.graph.nodes)
    assert relative_rms(program.module()(x), model(x)) <= 1e-5
