"""NVIDIA apex's optimizers through the adapter, with stand-ins of apex's interface: its source needs a GPU to build.

The stand-ins have the signatures and the arithmetic of apex/optimizers/fused_sgd.py and fused_lamb.py, in PyTorch.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from effnet_fast.train import optim


class FusedSGD(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"nesterov": nesterov})

    def step(self, closure=None):
        for group in self.param_groups:
            assert type(group["lr"]) is float, "apex takes a number of the host"
            for p in group["params"]:
                state = self.state[p]
                first = "momentum_buffer" not in state
                gradient = p.grad + group["weight_decay"] * p.data
                if first:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                p.data -= group["lr"] * (gradient + group["momentum"] * buffer if group["nesterov"] else buffer)


class FusedLAMB(torch.optim.Optimizer):
    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
        amsgrad=False, adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0, use_nvlamb=False,
    ):  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm}
        super().__init__(params, defaults)

    def zero_grad(self):
        raise AssertionError("apex's own takes no argument, so the step clears the gradients itself")

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        clip = torch.where(norm > self.defaults["max_grad_norm"], norm / self.defaults["max_grad_norm"], 1.0)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            a, b = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if len(state) == 0:
                    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                gradient = p.grad / clip
                mean = state["exp_avg"].mul_(a).add_(gradient, alpha=1 - a) / (1 - a ** group["step"])
                square = state["exp_avg_sq"].mul_(b).add_(gradient**2, alpha=1 - b) / (1 - b ** group["step"])
                update = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * p.data
                ratio = p.data.norm() / update.norm() if group["weight_decay"] else 1.0
                p.data -= group["lr"] * ratio * update


STAND_INS = {"apex-sgd": FusedSGD, "apex-lamb": FusedLAMB}


@pytest.fixture
def apex(monkeypatch):
    optimizers = ModuleType("apex.optimizers")
    optimizers.FusedSGD, optimizers.FusedLAMB = FusedSGD, FusedLAMB
    for name, module in {
        "amp_C": ModuleType("amp_C"),
        "apex": ModuleType("apex"),
        "apex.optimizers": optimizers,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))


def make(name, model):
    return optim.make_optimizer(name, model, momentum=0.9, weight_decay=0.1)


def step(model, optimizer, *, rate=0.05, scale=1.0, skip=0.0, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    model(torch.randn(8, 3, 8, 8)).square().mean().backward()
    for p in model.parameters():
        p.grad.mul_(scale)
    optim.set_rate(optimizer, rate)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(skip)
    optimizer.step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", STAND_INS)
def test_plain_step_is_unchanged(apex, name):
    model, twin = network(), network()
    ours = make(name, model)
    options = {"momentum": 0.9, "nesterov": True} if name == "apex-sgd" else {"max_grad_norm": float("inf")}
    theirs = STAND_INS[name](optim.parameter_groups(twin, 0.1), lr=0.05, **options)
    for i in range(4):
        step(model, ours, seed=i)
        step(twin, theirs, seed=i)
    torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=0)


def test_apex_sgd_is_torchs(apex):
    model, twin = network(), network()
    ours, torchs = make("apex-sgd", model), make("sgd", twin)
    for i in range(4):
        step(model, ours, seed=i)
        step(twin, torchs, seed=i)
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STAND_INS)
def test_gradients_are_divided_by_the_scale(apex, name):
    plain, scaled = network(), network()
    for model, scale in ((plain, 1.0), (scaled, 1024.0)):
        optimizer = make(name, model)
        for i in range(3):
            step(model, optimizer, scale=scale, seed=i)
    torch.testing.assert_close(weights(plain), weights(scaled), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("when", [0, 2])
def test_skipped_step(apex, name, when):
    model = network()
    optimizer = make(name, model)
    for i in range(when):
        step(model, optimizer, seed=i)
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    before = weights(model), [t.clone() for t in tensors]
    step(model, optimizer, scale=float("nan"), skip=1.0, seed=99)
    assert torch.equal(weights(model), before[0])
    assert all(torch.equal(a, b) for a, b in zip(tensors, before[1], strict=True))
    step(model, optimizer, seed=5)
    assert torch.isfinite(weights(model)).all()
    assert not torch.equal(weights(model), before[0])


@pytest.mark.parametrize("name", STAND_INS)
def test_restored_optimizer(apex, name):
    model = network()
    optimizer = make(name, model)
    step(model, optimizer)
    twin = network()
    twin.load_state_dict(model.state_dict())
    restored = make(name, twin)
    saved = optimizer.state_dict()
    optim.load_state(
        restored, {**saved, "state": {k: {n: t.clone() for n, t in s.items()} for k, s in saved["state"].items()}}
    )
    for m, o in ((model, optimizer), (twin, restored)):
        step(m, o, rate=0.01, seed=5)
    assert torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize("name", STAND_INS)
def test_apex_is_not_installed(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "amp_C", None)
    monkeypatch.setitem(sys.modules, "apex", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r"it is not installed: build it .* https://github.com/NVIDIA/apex") as refused:
        make(name, network())
    assert "\n" not in str(refused.value)


def test_unrelated_apex_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('a stranger was run')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="the installed `apex` is another project or lacks its CUDA extensions"):
        make("apex-sgd", network())
