"""Precise BN compared with torch's update_bn: the statistics, whole runs, when it happens."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from command_line import mistake, run
from effnet_fast import checkpoint, cli
from effnet_fast.config import TrainConfig
from effnet_fast.distributed import World
from effnet_fast.model import from_description
from effnet_fast.model.blocks import BatchNorm
from effnet_fast.run import training
from effnet_fast.run.build import build
from effnet_fast.run.plan import make_plan
from effnet_fast.train.precise_bn import precise_bn

CPU = World(0, 1, torch.device("cpu"))
RUN = (
    "train --dataset synthetic --output_stride 16 --width 0.25 --depth 0.3 --dropout 0 --drop_path 0 --image_size 24 "
    "--limit_train 96 --limit_eval 16 --batch_size 16 --num_epochs 2 --cutmix 1 --ema_decay 0.9 --kernels torch "
    "--resize_schedule 16:0.5,24 --precise_bn_images 60 --save_every_steps 12 --loader resident --num_workers 1 "
    "--device cpu"
)


def with_torch_norms(model):
    """The same network with torch's BatchNorm, which `update_bn` knows."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, BatchNorm):
                plain = nn.BatchNorm2d(norm.weight.numel(), norm.eps, norm.momentum)
                plain.load_state_dict(norm.state_dict(), strict=False)
                setattr(module, name, plain)
    return twin


def assert_equal_statistics(state, twin):
    expected = {name: value for name, value in twin.state_dict().items() if "running" in name}
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_statistics_are_those_of_update_bn():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), BatchNorm(4, momentum=0.01), nn.SiLU(), nn.Conv2d(4, 5, 3), BatchNorm(5)]
    model = nn.Sequential(*layers, nn.Dropout(0.5)).train()
    twin = with_torch_norms(model)
    batches = [(torch.randn(16, 3, 6, 6) * (i + 1) + i, None) for i in range(5)]
    precise_bn(model, batches[:4], precision="no", device=CPU.device)
    update_bn([images for images, _ in batches[:4]], twin)
    assert_equal_statistics(model.state_dict(), twin)
    assert model[1].momentum == 0.01
    assert model.training


@pytest.fixture
def long_runs(monkeypatch):
    """No run counts as short."""
    monkeypatch.setattr("effnet_fast.run.plan.STALE_TIME_CONSTANTS", 0)


def test_a_run_killed_during_it_ends_with_the_same_statistics(tmp_path, capsys, monkeypatch, long_runs):
    line = f"{RUN} --save_dir {tmp_path}"
    run(f"{line} --run_name whole")
    assert "\nBatchNorm statistics are re-estimated on 4 training batches before the last evaluation" in (
        capsys.readouterr().out
    )

    def killed(*arguments, **options):
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(training, "precise_bn", killed)
        run(f"{line} --run_name killed", expected=137)
    run(f"{line} --run_name killed")
    whole, killed_run = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "killed"))
    for part in ("model", "ema"):
        assert all(torch.equal(value, killed_run[part][name]) for name, value in whole[part].items())
    assert whole["result"] | {"seconds": 0} == killed_run["result"] | {"seconds": 0}

    # 4 batches of 24 px, without CutMix, of the epoch after the last.
    config = cli.parse(cli.VERBS["train"], "train", line.split()[1:])
    parts = build(make_plan(config, CPU, None))
    batches = [images for images, _ in parts.loader.epoch(2)][:4]
    for part in ("model", "ema"):
        model = from_description(whole["architecture"], "torch")
        model.load_state_dict(whole[part])
        twin = with_torch_norms(model)
        update_bn(batches, twin)
        assert_equal_statistics(whole[part], twin)


@pytest.mark.parametrize(
    ("flags", "short", "before_each", "before_last"),
    [
        ({}, True, 20, 20),
        ({}, False, 0, 0),
        ({"cutmix": 1.0}, False, 0, 20),
        ({"mixup": 0.2}, False, 0, 20),
        ({"resize_schedule": "20:0.5,32"}, False, 0, 20),
        ({"precise_bn_images": 17}, False, 0, 2),
        ({"precise_bn_images": 17}, True, 2, 2),
        ({"precise_bn_images": 10_000}, False, 0, 20),
        ({"precise_bn_images": 0, "mixup": 0.2}, True, 0, 0),
    ],
)
def test_when_and_on_how_many_batches(flags, short, before_each, before_last):
    """Of 16 images; an epoch has 20."""
    epochs = 10 if short else 100
    config = TrainConfig(dataset="synthetic", limit_train=320, batch_size=16, num_epochs=epochs, device="cpu", **flags)
    plan = make_plan(config, CPU, None)
    assert plan.precise_bn_batches(0.01, last=False) == before_each
    assert plan.precise_bn_batches(0.01, last=True) == before_last


@pytest.mark.parametrize("value", ["-1", "some", "0.5"])
def test_bad_numbers_are_one_line(capsys, value):
    assert "precise_bn_images" in mistake(capsys, f"train --precise_bn_images {value}")
