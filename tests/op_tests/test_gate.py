"""The gate's perceptron against float64, with its products in spans of channels and in the kernels that need them."""

import pytest
import torch
from op_cases import DEVICE
from torch.nn.functional import silu

from effnet_kernels import gate_mlp
from effnet_kernels.gate_mlp import DIRECT_CHANNELS, GateLaunch, SqueezeExcite
from effnet_kernels.launch import launches_used

N, C, R, HW = 19, 150, 6, 49
LAUNCHES = [GateLaunch(16, 32, 16, 4, turns) for turns in (1, 2, 8)] + [GateLaunch(16, 32, 16, 4, direct=True)]


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_against_float64(launch):
    pool, dgate = (torch.randn(N, C, device=DEVICE) for _ in range(2))
    se = SqueezeExcite(*(torch.randn(s, device=DEVICE) / 4 for s in ((R, C, 1, 1), (R,), (C, R, 1, 1), (C,))))
    sums = torch.cat((dgate[None], torch.zeros(4, N, C, device=DEVICE)))
    with launches_used({(name, (N, C, R)): launch for name in ("gate", "gate backward")}):
        gate, hidden = gate_mlp.gate_forward(pool, se)
        dpool, bn, grads = gate_mlp.gate_backward(sums, gate, pool, hidden, se, HW)

    exact = [t.double().requires_grad_() for t in (pool, *se)]
    x, w1, b1, w2, b2 = exact
    wanted_hidden = x @ w1.flatten(1).t() + b1
    wanted = torch.sigmoid(silu(wanted_hidden) @ w2.flatten(1).t() + b2)
    wanted.backward(dgate.double())
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(hidden, wanted_hidden, **close)
    torch.testing.assert_close(gate, wanted, **close)
    for value, leaf in zip((dpool, *grads), exact, strict=True):
        torch.testing.assert_close(value, leaf.grad, **close)
    assert not bn.any(), "without gradients at the map"


def test_few_channels_need_no_launch_of_their_own():
    assert [gate_mlp.gate_launch(c, 8).direct for c in (24, DIRECT_CHANNELS, DIRECT_CHANNELS + 1)] == [
        True,
        True,
        False,
    ]
