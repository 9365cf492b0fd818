"""Optimizers compared with torch's and the paper's equations; gradient scale and skipped steps on the device."""

import copy

import pytest
import torch
from torch import nn

from effnet_fast import create_model
from effnet_fast.train import optim

NAMES = ["sgd", "adamw", "rmsprop", "muon"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 6, 1),
        nn.Conv2d(6, 4, 1),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )


def make(name, model, weight_decay=0.1):
    optimizer = optim.make_optimizer(name, model, momentum=0.9, weight_decay=weight_decay)
    optim.set_rate(optimizer, 0.05)
    return optimizer


def step(model, optimizer, *, scale=1.0, skip=0.0, seed=0, contract=True):
    optimizer.zero_grad()
    torch.manual_seed(seed)
    model(torch.randn(8, 3, 8, 8)).square().mean().backward()
    for p in model.parameters():
        p.grad.mul_(scale)
    if contract:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(skip)
    optimizer.step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_only_weights_decay():
    decayed, kept = optim.parameter_groups(network(), 0.1)
    assert [p.ndim for p in decayed["params"]] == [4, 4, 4, 2]
    assert {p.ndim for p in kept["params"]} == {1}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_divided_by_the_scale(name):
    plain, scaled = network(), network()
    for model, scale in ((plain, 1.0), (scaled, 1024.0)):
        optimizer = make(name, model)
        for i in range(3):
            step(model, optimizer, scale=scale, seed=i)
    torch.testing.assert_close(weights(plain), weights(scaled), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("when", [0, 2])
def test_skipped_step_changes_nothing(name, when):
    model, twin = network(), network()
    optimizer, reference = make(name, model), make(name, twin)
    for i in range(4):
        before = weights(model)
        if i == when:
            step(model, optimizer, scale=float("nan"), skip=1.0, seed=99)
            assert torch.equal(weights(model), before)
        step(model, optimizer, seed=i)
        step(twin, reference, seed=i)
    torch.testing.assert_close(weights(model), weights(twin))


def test_sgd_is_torchs_nesterov():
    model, twin = network(), network()
    optimizer = make("sgd", model)
    reference = torch.optim.SGD(
        [{**g, "lr": 0.05} for g in optim.parameter_groups(twin, 0.1)], lr=0.05, momentum=0.9, nesterov=True
    )
    for i in range(4):
        step(model, optimizer, seed=i)
        step(twin, reference, seed=i, contract=False)
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-5, atol=1e-6)


def test_rmsprop_is_the_papers():
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = optim.RMSprop([w], lr=torch.tensor(0.1), momentum=0.9, decay=0.9, eps=1e-3)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)
    expected, square, momentum = w.detach().clone(), torch.ones(2), torch.zeros(2)
    for i in range(5):
        g = torch.tensor([0.5, -1.0]) * (i + 1)
        square = 0.9 * square + 0.1 * g**2
        momentum = 0.9 * momentum + 0.1 * g / (square + 1e-3).sqrt()
        expected -= momentum
        w.grad = g
        optimizer.step()
    torch.testing.assert_close(w.detach(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_layers_before_the_classifier_learn_slower(name):
    model = create_model("efficientnet-b0", 5, 32, width=0.25, depth=0.3, output_stride=32)
    optimizer = optim.make_optimizer(name, model, momentum=0.9, weight_decay=0.1, layer_decay=0.5)
    optim.set_rate(optimizer, 0.08)
    rates = {
        id(p): (group["lr"].item(), group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert len(rates) == len(list(model.parameters()))
    for i, modules in enumerate(reversed(model.layers().values())):
        for p in modules[0].parameters():
            assert rates[id(p)] == (pytest.approx(0.08 * 0.5**i), 0.1 if p.ndim > 1 else 0.0)
    again = optim.make_optimizer(name, model, momentum=0.9, weight_decay=0.1, layer_decay=0.5)
    optim.load_state(again, copy.deepcopy(optimizer.state_dict()))
    optim.set_rate(again, 0.16)
    assert again.param_groups[0]["lr"].item() == pytest.approx(0.16 * 0.5**9)
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.08 * 0.5**9)


def test_frozen_parameters_are_left_out():
    model = create_model("efficientnet-b0", 5, 32, width=0.25, depth=0.3)
    model.freeze("backbone")
    optimizer = optim.make_optimizer("sgd", model, momentum=0.9, weight_decay=0.1, layer_decay=0.5)
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [(5, 320), (5,)]


@pytest.mark.parametrize("name", NAMES)
def test_load_state_keeps_the_rate_tensor(name):
    model = network()
    optimizer = make(name, model)
    step(model, optimizer)
    twin = copy.deepcopy(model)
    restored = make(name, twin)
    optim.load_state(restored, copy.deepcopy(optimizer.state_dict()))
    assert restored.param_groups[0]["lr"] is restored.param_groups[1]["lr"]
    for m, o in ((model, optimizer), (twin, restored)):
        optim.set_rate(o, 0.01)
        step(m, o, seed=5)
    assert torch.equal(weights(model), weights(twin))


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown optimizer 'lion'"):
        optim.make_optimizer("lion", network(), momentum=0.9, weight_decay=0)
