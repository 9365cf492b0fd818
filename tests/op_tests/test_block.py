"""The MBConv block as one op, on Triton: against float64, in all storage types; registration, races, a model step."""

import pytest
import torch
from op_cases import DEVICE, relative_rms
from op_races import shuffled_programs
from test_model import assert_as_good, images, narrow, step

from effnet_fast.model.blocks import MBConv, Style
from effnet_fast.run import self_check
from effnet_kernels import launch
from effnet_kernels.block import supports

TRITON = "triton-block"
# inputs, outputs, kernel, stride, expand, batch, height, width, padding
BLOCKS = [
    (16, 24, 3, 1, 6, 3, 9, 7, "symmetric"),
    (24, 24, 5, 1, 6, 20, 8, 8, "symmetric"),
    (13, 13, 3, 1, 4, 2, 11, 5, "same"),
    (16, 40, 5, 2, 6, 4, 9, 10, "same"),
    (16, 16, 3, 2, 1, 2, 8, 8, "same"),
    (8, 8, 3, 1, 1, 5, 4, 4, "symmetric"),
    (80, 112, 5, 2, 6, 70, 2, 2, "symmetric"),
    (24, 24, 3, 1, 6, 3, 40, 41, "symmetric"),
    (112, 112, 5, 1, 6, 40, 1, 1, "symmetric"),
]


def block_step(settings, kernels, dtype=torch.float32, threads=1, drop_path=0.0):
    """Output, gradients and buffers of one training step of an MBConv block, by name."""
    inputs, outputs, kernel, stride, expand, n, h, w, padding = settings
    torch.manual_seed(0)
    style = Style(padding=padding, kernels=kernels, bn_momentum=0.1)
    block = MBConv(inputs, outputs, kernel, stride, expand, style=style, drop_path=drop_path).to(DEVICE, dtype)
    for p in block.parameters():
        p.data = torch.randn_like(p) * 0.3 + (1 if p.dim() == 1 else 0)
    x = (torch.randn(n, inputs, h, w) + 0.5).to(DEVICE, dtype).requires_grad_()
    torch.manual_seed(1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = block(x)
        y.backward(torch.linspace(-1, 1, y.numel(), device=DEVICE, dtype=dtype).view_as(y))
    finally:
        torch.set_num_threads(before)
    gradients = {name: p.grad for name, p in block.named_parameters()}
    return {"y": y.detach(), "x": x.grad} | gradients | dict(block.named_buffers())


def compare_block(settings, kernels):
    """Compare a training step in float32 with float64."""
    actual, baseline = (block_step(settings, k) for k in (kernels, "torch"))
    exact = block_step(settings, "torch", torch.float64)
    for name, value in exact.items():
        if value.abs().max() < 1e-7:  # truly 0, as a BatchNorm cancels it: only rounding is left
            continue
        # PyTorch's operators set the limit where terms of a sum cancel.
        limit = max(2e-5, 3 * relative_rms(baseline[name], value))
        assert relative_rms(actual[name], value) <= limit, (name, relative_rms(actual[name], value))


NORMS = ("expand", "depthwise", "project")


def check_one_norm_evaluates(kernels, name):
    """A user may freeze one BatchNorm of a block while the others train."""
    results = []
    for choice in (kernels, "torch"):
        torch.manual_seed(0)
        block = MBConv(8, 8, 3, 1, 4, style=Style(kernels=choice), drop_path=0.5).to(DEVICE)
        getattr(block, name).norm.eval()
        y = block(torch.randn(4, 8, 5, 5, device=DEVICE).contiguous(memory_format=torch.channels_last))
        y.square().sum().backward()
        results.append({"y": y, **{n: p.grad for n, p in block.named_parameters()}, **dict(block.named_buffers())})
    for key, value in results[1].items():
        torch.testing.assert_close(results[0][key], value, rtol=1e-3, atol=1e-4, msg=key)


def check_dropped_samples(kernels):
    """Stochastic depth drops the same samples as in PyTorch's block."""
    settings = (8, 8, 3, 1, 6, 12, 4, 4, "symmetric")
    actual, baseline = (block_step(settings, k, drop_path=0.5) for k in (kernels, "torch"))
    assert relative_rms(actual["y"], baseline["y"]) <= 1e-5
    assert relative_rms(actual["x"], baseline["x"]) <= 1e-4
    assert relative_rms(block_step(settings, "torch")["y"], baseline["y"]) > 0.1


def check_recomputation(kernels):
    """Recomputing the block in the backward pass gives the same bits."""
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        block = MBConv(8, 8, 3, 1, 6, style=Style(kernels=kernels), drop_path=0.3).to(DEVICE)
        block.recompute = recompute
        x = torch.randn(4, 8, 6, 6, device=DEVICE, requires_grad=True)
        block(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in block.parameters()), *block.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def opcheck_block(expand):
    """Check the registration of the op on the implementation that handles CPU tensors now."""
    torch.use_deterministic_algorithms(False)  # opcheck also compares torch.empty of fakes: no NaN there
    c = 4 * expand

    def leaf(*shape):
        return torch.randn(shape, requires_grad=True)

    layer = [[leaf(c, 4, 1, 1), leaf(c), leaf(c)] if expand > 1 else [], [leaf(c, 1, 3, 3), leaf(c), leaf(c)]]
    layer += [[leaf(2, c, 1, 1), leaf(2), leaf(c, 2, 1, 1), leaf(c)], [leaf(4, c, 1, 1), leaf(4), leaf(4)]]
    x = torch.randn(3, 4, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    args = (x, *layer, torch.rand(3), True, 1, [1, 1, 1, 1], 1e-3, False)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    results = torch.library.opcheck(torch.ops.effnet_kernels.block.default, args, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}


SMALL = [*(BLOCKS[i] for i in (0, 2, 3, 4)), (16, 16, 5, 1, 6, 20, 1, 1, "symmetric")]


@pytest.mark.parametrize("settings", [*SMALL, pytest.param(BLOCKS[8], marks=pytest.mark.slow)], ids=str)
def test_block_against_float64(settings):
    compare_block(settings, TRITON)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_is_as_good_as_torch(dtype):
    """Parameters and maps in 16 bits; the separate ops round the same maps, and PyTorch's operators more."""
    for settings in (BLOCKS[0], BLOCKS[3]):
        actual, baseline = (block_step(settings, kernels, dtype) for kernels in (TRITON, "torch"))
        exact = block_step(settings, "torch", torch.float64)
        for name, value in exact.items():
            assert actual[name].dtype == baseline[name].dtype, name
            limit = max(0.03, 1.5 * relative_rms(baseline[name], value))
            assert relative_rms(actual[name], value) <= limit, (name, relative_rms(actual[name], value))


def test_the_same_bits_again():
    first, again = (block_step(BLOCKS[0], TRITON) for _ in range(2))
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_runs_the_products(monkeypatch):
    """triton-block starts the products; triton leaves the 1x1 convolutions to the library."""
    started = []
    original = launch.launch
    for module in ("pointwise", "se_gate"):
        monkeypatch.setattr(
            f"effnet_kernels.{module}.launch",
            lambda op, kernel, *a, **k: (started.append(kernel.__name__), original(op, kernel, *a, **k)),
        )
    block_step(BLOCKS[0], "triton")
    assert "_product_kernel" not in started
    assert "_excite_kernel" in started
    started.clear()
    block_step(BLOCKS[0], TRITON)
    assert started.count("_product_kernel") == 2
    assert "_excite_kernel" not in started


def test_who_uses_the_products(monkeypatch):
    """`triton-block`, in the setting or in EFFNET_KERNELS; `auto` and `triton` do not."""
    x = torch.zeros(1, 8, 2, 2, device=DEVICE)
    used = [kernels for kernels in ("auto", "triton", TRITON) if supports(kernels, x, x)]
    assert used == [TRITON]
    monkeypatch.setattr(launch, "_ENVIRONMENT", TRITON)
    assert supports("auto", x, x)
    assert not supports("triton", x, x)


def test_the_self_check_of_the_blocks():
    error = self_check.block_error(torch.device(DEVICE), TRITON, *self_check.BLOCKS[0])
    assert error <= self_check.TOLERANCE


@pytest.mark.parametrize("kernels", ["triton", TRITON])
def test_the_self_check_of_the_layers(kernels):
    assert (
        self_check.layers_error(torch.device(DEVICE), kernels)
        <= self_check.LAYERS_TOLERANCE["bf16" if DEVICE == "cuda" else "no"]
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kernels", ["triton", TRITON])
def test_one_norm_evaluates(kernels, norm):
    check_one_norm_evaluates(kernels, norm)


def test_drops_the_same_samples():
    check_dropped_samples(TRITON)


def test_recomputation_gives_the_same_bits():
    check_recomputation(TRITON)


@pytest.mark.skipif(not launch.INTERPRETED, reason="the check's tensors are on the CPU")
@pytest.mark.parametrize("expand", [1, 6])
def test_opcheck(expand):
    opcheck_block(expand)


@pytest.mark.parametrize("expand", [1, 6])
def test_one_value_per_channel_is_refused(expand):
    block = MBConv(8, 8, 3, 1, expand, style=Style(kernels=TRITON)).to(DEVICE)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block(torch.randn(1, 8, 1, 1, device=DEVICE))


@pytest.mark.slow
def test_a_step_of_a_narrow_model_under_autocast():
    models, x = [narrow(kernels) for kernels in (TRITON, "torch", "torch")], images(8)
    actual, baseline = (step(model, x, torch.bfloat16) for model in models[:2])
    assert_as_good(actual, baseline, step(models[2].double(), x), least=128)
    assert all(p.grad.dtype == torch.float32 for p in models[0].parameters())


def test_evaluation():
    x, models = images(2), [narrow(kernels).eval() for kernels in (TRITON, "torch")]
    with torch.no_grad():
        assert relative_rms(*(model(x) for model in models)) <= 1e-5


@pytest.mark.skipif(not launch.INTERPRETED, reason="programs are shuffled in Triton's interpreter")
def test_no_races():
    for seed, settings in enumerate((BLOCKS[0], BLOCKS[3])):
        ordered = block_step(settings, TRITON, torch.bfloat16)
        with shuffled_programs(seed) as races:
            shuffled = block_step(settings, TRITON, torch.bfloat16)
        assert not races, (settings, races)
        assert all(torch.equal(shuffled[name], value) for name, value in ordered.items())
