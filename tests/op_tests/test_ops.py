"""Compares every op on Triton with its float64 reference: outputs, all gradients, running statistics."""

import pytest
import torch
from op_cases import (
    CASES,
    DEVICE,
    ODD_CASES,
    OPS,
    QUICK_CASES,
    TOLERANCE,
    Case,
    compare,
    make_inputs,
    relative_rms,
    run,
)

from effnet_fast.model.blocks import BatchNorm
from effnet_kernels.batch_norm import batch_norm
from effnet_kernels.launch import vector

CASE = Case(2, 24, 7, 5, 3, 1)
WITH_NORM = [op for op in OPS.values() if op.norms]


def _table():
    """All (op, case, dtype). Odd sizes get every dtype, B0's one in rotation. Quick: `QUICK_CASES`, one dtype each."""
    types = list(TOLERANCE)
    for i, (name, op) in enumerate(OPS.items()):
        for j, case in enumerate(CASES):
            if op.shapes(case)[:1] == op.shapes(case)[1:2] and case.n * case.h * case.w < 2:
                continue  # BatchNorm needs more than one value per channel
            for k, dtype in enumerate(types):
                turn = (i + j) % 3 == k
                if not turn and case not in ODD_CASES:
                    continue
                quick = turn and case in QUICK_CASES
                marks = () if quick else pytest.mark.slow
                yield pytest.param(name, case, dtype, id=f"{name}-{case.id}-{str(dtype)[6:]}", marks=marks)


@pytest.mark.parametrize(("name", "case", "dtype"), list(_table()))
def test_against_float64(name, case, dtype):
    compare(OPS[name], case, dtype)


@pytest.mark.parametrize("name", OPS)
def test_same_bits_in_other_layouts_and_when_repeated(name):
    """Channels-first and strided inputs, and a second run, give the same bits as channels-last input."""
    op = OPS[name]
    inputs = make_inputs(op, CASE, torch.float32)
    wide = torch.zeros(*inputs.x.shape[:3], 2 * CASE.w, device=DEVICE)[..., ::2]
    runs = []
    for x in (inputs.x, inputs.x, inputs.x.contiguous(), wide.copy_(inputs.x)):
        again = inputs.fresh()
        again.x = x.detach()
        runs.append(run(op, CASE, again, "triton")[0])
    for other in runs[1:]:
        for key, value in runs[0].items():
            assert torch.equal(other[key], value), key


@pytest.mark.parametrize("op", WITH_NORM, ids=lambda op: op.name)
def test_zeros(op):
    """A constant input has no variance; errors are absolute, since many results are 0."""
    inputs = make_inputs(op, CASE, torch.float32)
    inputs.x.zero_()
    got, dy = run(op, CASE, inputs.fresh(), "triton")
    want, _ = run(op, CASE, inputs.double(), "torch", dy)
    for key, value in want.items():
        torch.testing.assert_close(got[key].double(), value, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["bn_silu", "bn_residual", "bn_silu_squeeze", "se_gate", "mbconv"])
def test_mean_of_1000_standard_deviations(name):
    """A mean of 1000 standard deviations costs no accuracy: error at most 1e-3, or twice that of torch's batch_norm.

    dx is compared with torch's only.
    """
    op = OPS[name]
    inputs = make_inputs(op, CASE, torch.float32, mean=1000.0)
    got, dy = run(op, CASE, inputs.fresh(), "triton")
    baseline, _ = run(op, CASE, inputs.fresh(), "torch", dy)
    want, _ = run(op, CASE, inputs.double(), "torch", dy)
    for key, value in want.items():
        error = relative_rms(got[key], value)
        assert error <= max(1e-3 if key != "dx" else 0.0, 2 * relative_rms(baseline[key], value)), (key, error)


@pytest.mark.parametrize("name", OPS)
def test_nan_in_gives_nan_out(name):
    op = OPS[name]
    inputs = make_inputs(op, CASE, torch.float32)
    inputs.x[1, 3, 2, 2] = float("nan")
    got, _ = run(op, CASE, inputs, "triton")
    channel = got["y"].select(1, 3)
    assert channel.isnan().any()
    linear = name == "depthwise_conv"  # only its dw depends on x
    assert (got["dparameter0"][3] if linear else got["dx"].select(1, 3)).isnan().any()
    if op.norms == 1 and name.startswith("bn"):
        assert channel.isnan().all()
        assert not got["y"].select(1, 4).isnan().any()


@pytest.mark.parametrize("op", WITH_NORM, ids=lambda op: op.name)
@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_one_value_per_channel_is_refused(op, kernels):
    case = Case(1, 24, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        run(op, case, make_inputs(op, case, torch.float32), kernels)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_parameters(name, dtype):
    """Parameters in 16 bits too: their gradients have the parameters' dtype, the buffers stay float32."""
    op = OPS[name]
    inputs = make_inputs(op, CASE, dtype)
    inputs.parameters = [p.to(dtype) for p in inputs.parameters]
    got, dy = run(op, CASE, inputs.fresh(), "triton")
    want, _ = run(op, CASE, inputs.double(), "torch", dy)
    for key, value in want.items():
        assert relative_rms(got[key], value) <= 2 * op.slack * TOLERANCE[dtype], key
        assert got[key].dtype == (torch.float32 if key.startswith("buffer") else dtype)


@pytest.mark.parametrize("name", ["bn_silu", "bn_silu_squeeze", "se_gate", "mbconv", "mbconv_unexpanded"])
def test_evaluation_uses_running_statistics(name, monkeypatch):
    import op_cases

    op = OPS[name]
    for function in ("batch_norm", "bn_silu_squeeze", "se_gate", "mbconv"):
        original = getattr(op_cases, function)
        monkeypatch.setattr(op_cases, function, lambda *a, f=original, **k: f(*a, training=False, **k))
    inputs = make_inputs(op, CASE, torch.float32)
    inputs.buffers = [b + 0.3 for b in inputs.buffers]
    before = inputs.fresh()
    with torch.no_grad():
        got = op.run(inputs.x, inputs.parameters, inputs.buffers, CASE, "triton")
        double = inputs.double()
        want = op.run(double.x, double.parameters, double.buffers, CASE, "torch")
    assert relative_rms(got, want) <= TOLERANCE[torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(inputs.buffers, before.buffers, strict=True))
    with_grad, _ = run(op, CASE, inputs, "triton")  # runs the reference
    assert relative_rms(with_grad["y"], want) <= TOLERANCE[torch.float32]
    assert with_grad["dx"].isfinite().all()


@pytest.mark.parametrize("name", OPS)
def test_gradcheck_of_the_reference(name):
    op = OPS[name]
    case = Case(2, 3, 3, 3)
    inputs = make_inputs(op, case, torch.float64).double()
    leaves = [inputs.x, *inputs.parameters]
    for leaf in leaves:
        leaf.requires_grad_()

    def function(x, *parameters):
        return op.run(x, list(parameters), [b.clone() for b in inputs.buffers], case, "torch")

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("channels", [1, 13, 20, 24, 40, 96, 144, 1152])
def test_vector_divides_the_channels(channels):
    assert channels % vector(channels) == 0
    assert vector(channels) == 16 or channels % (2 * vector(channels))


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("wrong", [{"sample_scale": (1,)}, {"residual": (2, 8, 1, 1)}], ids=str)
def test_shapes_that_do_not_fit_are_refused(kernels, wrong):
    """The kernels would read beyond the tensor's end."""
    x, norm = torch.randn(2, 8, 4, 4, device=DEVICE), BatchNorm(8).to(DEVICE).fused()
    ((name, shape),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be"):
        batch_norm(x, norm, kernels=kernels, **{name: torch.ones(shape, device=DEVICE)})


@torch.no_grad()
def test_evaluation_takes_a_scale_of_samples():
    x, norm = torch.randn(2, 8, 4, 4, device=DEVICE), BatchNorm(8).to(DEVICE).fused()
    scale = torch.tensor([0.0, 2.0], device=DEVICE)
    ours, theirs = (
        batch_norm(x, norm, training=False, sample_scale=scale, kernels=kernels) for kernels in ("triton", "torch")
    )
    assert theirs[1].any()
    torch.testing.assert_close(ours, theirs)
