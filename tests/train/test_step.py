"""The training step: its result, bad gradients, and no wait for the device."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effnet_fast.config import TrainConfig
from effnet_fast.distributed import World
from effnet_fast.model.blocks import BatchNorm
from effnet_fast.train import optim
from effnet_fast.train.mixing import mix_images
from effnet_fast.train.step import Step, StepOptions

CPU = World(0, 1, torch.device("cpu"))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), BatchNorm(8), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def make_step(model, **options):
    optimizer = optim.make_optimizer(options.pop("optimizer", "sgd"), model, momentum=0.9, weight_decay=1e-3)
    settings = StepOptions(**({"clip_grad": 0.0, "ema_decay": 0.9} | options))
    return Step(model, model, optimizer, lambda step: 1.0, settings, CPU)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 10, (8,), generator=generator)


def snapshot(step):
    return {k: v.clone() for k, v in step.module.state_dict().items()} | {
        f"ema.{k}": v.clone() for k, v in step.ema.state_dict().items()
    }


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_step_is_plain_sgd():
    model, twin = network(), network()
    step = make_step(model)
    reference = torch.optim.SGD(
        [{**g, "lr": 0.1} for g in optim.parameter_groups(twin, 1e-3)], lr=0.1, momentum=0.9, nesterov=True
    )
    for i in range(3):
        images, labels = batch(i)
        step(images, labels, i)
        reference.zero_grad()
        loss = F.cross_entropy(twin(images), labels, label_smoothing=0.1)
        loss.backward()
        reference.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_update():
    model = network()
    step = make_step(model, clip_grad=0.01)
    step(*batch(), 0)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert norm == pytest.approx(0.01, rel=1e-3)  # the fused update writes the scaled gradients back
    assert step.meters.read().grad_norm > 0.01


def test_mixed_targets_weigh_both_labels():
    model = network().eval()
    images, labels = batch()
    step = make_step(model, cutmix=1.0, label_smoothing=0.0)
    numbers = torch.tensor(step.mixing.draw(4, 8))
    logits = model(mix_images(images, numbers))
    expected = numbers[1] * F.cross_entropy(logits, labels) + (1 - numbers[1]) * F.cross_entropy(logits, labels.flip(0))
    step(images, labels, 4)
    assert step.meters.read().loss == pytest.approx(expected.item(), rel=1e-5)


def test_a_batch_that_is_not_mixed_trains_as_without_mixing():
    models = network(), network()
    mixing = make_step(models[0], mixup=0.5, cutmix=1.0, mixup_prob=0.5)
    number = next(step for step in range(50) if mixing.mixing.draw(step, 8)[1] == 1)
    for step in (mixing, make_step(models[1])):
        step(*batch(), number)
    assert_equal(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize("smoothing", [0.0, 0.4, 0.99])
def test_label_smoothing_spreads_its_share_over_all_classes(smoothing):
    """Szegedy et al. 2016, section 7."""
    model = network()
    images, labels = batch()
    target = (1 - smoothing) * F.one_hot(labels, 10) + smoothing / 10
    expected = -(target * model(images).log_softmax(1)).sum(1).mean()
    step = make_step(model, label_smoothing=smoothing)
    step(images, labels, 0)
    assert step.meters.read().loss == pytest.approx(expected.item(), rel=1e-5)


def test_a_class_weight_repeats_images():
    """Weights 1, 2, 3, ... give the loss of a data set that has the images of each class that many times."""
    model = network().eval()
    images, labels = batch()
    weights = tuple(float(label + 1) for label in range(10))
    copies = torch.arange(8).repeat_interleave(labels + 1)
    logits = model(images)
    expected = F.cross_entropy(logits[copies], labels[copies], label_smoothing=0.1, reduction="sum") / 8
    step = make_step(model, class_weights=weights)
    step(images, labels, 0)
    assert step.meters.read().loss == pytest.approx(expected.item(), rel=1e-5)


def test_class_weights_of_mixed_targets():
    """Each of the two labels has its own weight; without smoothing this is PyTorch's weighted cross-entropy."""
    model = network().eval()
    images, labels = batch()
    weights = torch.linspace(0.2, 3, 10)
    step = make_step(model, cutmix=1.0, label_smoothing=0.0, class_weights=tuple(weights.tolist()))
    numbers = torch.tensor(step.mixing.draw(4, 8)).float()
    target = numbers[1] * F.one_hot(labels, 10) + (1 - numbers[1]) * F.one_hot(labels.flip(0), 10)
    expected = F.cross_entropy(model(mix_images(images, numbers)), target, weight=weights)
    step(images, labels, 4)
    assert step.meters.read().loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("class_weights", [None, (1.0, 0.5) * 5])
def test_accumulated_passes_add_up(class_weights):
    whole, pieces = network(), network()
    for model in (whole, pieces):
        for module in model:
            if isinstance(module, BatchNorm):
                module.eval()  # pieces have statistics of their own
    make_step(whole, class_weights=class_weights)(*batch(), 0)
    make_step(pieces, class_weights=class_weights, accumulation=4)(*batch(), 0)
    for a, b in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop", "muon"])
@pytest.mark.parametrize("bad_at", [0, 2])
def test_bad_step_changes_nothing(optimizer, bad_at):
    model = network()
    step = make_step(model, optimizer=optimizer)
    for i in range(bad_at):
        step(*batch(i), i)
    before = snapshot(step)
    images, labels = batch(9)
    images[3, 0, 0, 0] = float("nan")
    step(images, labels, bad_at)
    assert_equal(snapshot(step), before)
    # What follows is held back too, so that the state kept is the one that broke.
    step(*batch(10), bad_at + 1)
    assert_equal(snapshot(step), before)
    assert step.meters.read().bad_step == bad_at


def test_fp16_overflow():
    model = network()
    step = make_step(model, precision="fp16")
    step.options = dataclasses.replace(step.options, precision="no")  # tests the scale alone
    images, labels = batch()
    step.scale.scale.fill_(3e38)
    before = snapshot(step)
    step(images * 1e3, labels, 0)
    assert_equal(snapshot(step), before)
    assert step.scale.scale.item() == pytest.approx(1.5e38)
    reading = step.meters.read()
    assert (reading.skipped, reading.bad_step) == (1, None)
    step.scale.scale.fill_(1024.0)
    step(images, labels, 1)
    twin = network()
    make_step(twin)(images, labels, 1)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_the_step_never_waits_for_the_device(precision, monkeypatch):
    step = make_step(
        network(), precision=precision, clip_grad=1.0, accumulation=2, mixup=0.5, cutmix=0.5, mixup_prob=0.5
    )
    step(*batch(), 0)

    def refuse(self, *args, **kwargs):
        raise AssertionError("the step read a value from the device")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for i in range(1, 4):
        step(*batch(i), i)


def test_state_round_trip():
    first, second = make_step(network()), make_step(network())
    for i in range(3):
        first(*batch(i), i)
    second.load_state(copy.deepcopy(first.state()))
    for step in (first, second):
        for i in range(3, 6):
            step(*batch(i), i)
    assert_equal(snapshot(first), snapshot(second))


def test_defaults_are_those_of_the_command():
    """But for the precision, which the device decides, and the classes' weights, which the data decide."""
    step, command = StepOptions(), TrainConfig()
    shared = {field.name for field in dataclasses.fields(step)} & {field.name for field in dataclasses.fields(command)}
    assert {"learning_rate", "clip_grad", "label_smoothing", "mixup", "ema_decay", "seed"} <= shared
    for name in shared - {"class_weights"}:
        assert getattr(step, name) == getattr(command, name), name
