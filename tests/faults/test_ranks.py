"""Changing numbers of ranks: the same batch, no image twice in an epoch. Ranks that differ are refused."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from command_line import at_step
from effnet_fast import provenance
from effnet_fast.config import StudyConfig, TrainConfig, identity
from effnet_fast.data.loader import Shard
from effnet_fast.data.rng import order
from effnet_fast.data.synthetic import load_synthetic
from effnet_fast.run import rank_check
from effnet_fast.run.plan import accumulation_steps
from marks import needs_installation


@given(
    images=st.integers(16, 200),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 5),
    worlds=st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=1, max_size=6),
    chance=st.randoms(use_true_random=False),
)
def test_no_image_twice_when_ranks_change(images, seed, epoch, worlds, chance):
    batch = 16
    steps = images // batch
    seen, position = [], 0
    for world in worlds:
        until = steps if world is worlds[-1] else chance.randint(position, steps)
        shards = [Shard(images, batch // world, rank, world, seed, training=True) for rank in range(world)]
        assert {shard.steps for shard in shards} == {steps}
        for step in range(position, until):
            seen += [index for shard in shards for index in shard.indices(epoch)[step]]
        position = max(position, until)
    assert seen == order(seed, epoch, images)[: len(seen)].tolist()
    assert len(set(seen)) == len(seen)
    if worlds[-1:] and position == steps:
        assert len(seen) == steps * batch


def test_dropped_images_change_every_epoch():
    shard = Shard(100, 16, 0, 1, seed=0, training=True)
    tails = [set(range(100)) - set(shard.indices(epoch).ravel().tolist()) for epoch in range(20)]
    assert {len(tail) for tail in tails} == {shard.dropped} == {4}
    assert len(set.union(*tails)) > 40
    assert len({frozenset(tail) for tail in tails}) == 20


@pytest.mark.parametrize(("ranks", "pieces"), [(1, 4), (2, 2), (4, 1), (8, 1), (16, 1)], ids=lambda value: str(value))
def test_fewer_ranks_take_more_passes(ranks, pieces):
    config = TrainConfig(batch_size=16)
    assert accumulation_steps(config, ranks, max_images=4) == pieces


def test_new_run_takes_the_configured_passes():
    assert accumulation_steps(TrainConfig(batch_size=16, grad_accumulation=4), 2, None) == 4
    with pytest.raises(ValueError, match="must divide evenly among 3 rank"):
        accumulation_steps(TrainConfig(batch_size=16), 3, 4)
    with pytest.raises(ValueError, match=r"2 rank\(s\) x 3 accumulation"):
        accumulation_steps(TrainConfig(batch_size=16, grad_accumulation=3), 2, None)


def test_different_settings_are_listed(monkeypatch):
    config = TrainConfig()
    values = rank_check.about_start(config)
    other = rank_check.about_start(TrainConfig(learning_rate=0.2, save_every_steps=5)) | {"torch's version": "1.0"}
    everyone = [("here", values), ("there", values), ("elsewhere", other)]
    monkeypatch.setattr(rank_check.distributed, "gather_objects", lambda mine: everyone)
    with pytest.raises(ValueError, match="the ranks disagree") as refused:
        rank_check.compare_ranks(values)
    printed = str(refused.value)
    assert "--learning_rate is 0.1 on rank 0 (here) but 0.2 on rank 2 (elsewhere)" in printed
    assert "--save_every_steps is 0 on rank 0 (here) but 5 on rank 2" in printed
    assert "torch's version" in printed
    assert "rank 1" not in printed


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "graph"},
        {"compile": "yes"},
        {"kernels": "torch"},
        {"loader": "torch"},
        {"activation_checkpointing": True},
    ],
    ids=str,
)
def test_settings_that_change_the_collectives_are_compared(changes):
    """Although they are not part of a run's identity."""
    config = TrainConfig(**changes)
    assert identity(config) == identity(TrainConfig())
    assert rank_check.about_start(config) != rank_check.about_start(TrainConfig())


def test_the_seeds_of_a_study_are_compared():
    assert rank_check.about_start(StudyConfig(seeds=2)) != rank_check.about_start(StudyConfig(seeds=3))


def test_different_data_models_and_checkpoints_are_listed(monkeypatch):
    from effnet_fast import create_model

    small, wide = (create_model("efficientnet-b0", output_stride=32, depth=0.3, width=width) for width in (0.25, 0.3))
    images = load_synthetic(train_size=100, test_size=100)
    others = dataclasses.replace(images, fingerprint="b" * 64, mean=(0.5, 0.5, 0.5))
    first = dataclasses.replace(images, fingerprint="a" * 64)
    cpu = torch.device("cpu")
    monkeypatch.setattr(rank_check, "kernels_in_use", lambda kernels, device: {"auto": "cpp"}.get(kernels, kernels))
    here = rank_check.about_data(first, None) | rank_check.about_model(small, "torch", cpu)
    there = rank_check.about_data(others, SimpleNamespace(progress={"step": 7}))
    there |= rank_check.about_model(wide, "auto", cpu)
    monkeypatch.setattr(rank_check.distributed, "gather_objects", lambda mine: [("here", here), ("there", there)])
    with pytest.raises(ValueError, match="the ranks disagree") as refused:
        rank_check.compare_ranks(here)
    printed = str(refused.value)
    for words in (
        "data's fingerprint is aaaaaaaaaaaaaaaa",
        "0.5",
        "model's digest",
        "what --kernels chooses is torch on rank 0",
        "none on rank 0",
        "of step 7 on rank 1",
    ):
        assert words in printed


def test_model_with_other_eps_differs():
    from effnet_fast import create_model

    models = [create_model("efficientnet-b0", output_stride=32, depth=0.3, bn_eps=eps) for eps in (1e-3, 1e-5)]
    one, other = (rank_check.about_model(model, "torch", torch.device("cpu")) for model in models)
    assert one != other


def test_changed_code_differs(monkeypatch, tmp_path):
    (tmp_path / "one.py").write_text("x = 1\n")
    monkeypatch.setattr(provenance, "_source_folders", lambda: [tmp_path])
    before = provenance.source_digest.__wrapped__()
    (tmp_path / "one.py").write_text("x = 2\n")
    assert provenance.source_digest.__wrapped__() != before


@pytest.mark.slow
def test_ranks_started_with_other_settings_are_refused(runs, small):
    line = f"{small} --save_dir {runs.folder} --run_name no"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    run = runs.start([*torchrun, "bash", "-c", f'exec {sys.executable} -m effnet_fast {line} --seed "$RANK"'])
    assert run.end() != 0
    assert "error: the ranks disagree: --seed is 0 on rank 0" in run.printed
    assert "but 1 on rank 1" in run.printed
    assert not (runs.folder / "no" / "last.pt").exists()


@pytest.mark.slow
@needs_installation
def test_four_ranks_two_ranks_four_ranks(runs, free_port):
    """Two agents of two ranks each, like machines: one dies with its ranks, and another one joins."""
    flags = "--num_epochs 60 --save_every_steps 3 --sync_batchnorm false --hang_timeout 30"

    def agent(is_host):
        # Two ranks alone go slowly, so that the others join before the end.
        slow = at_step(40, "crawl 2")
        return runs.agent("elastic", flags, ranks=2, endpoint=f"127.0.0.1:{free_port}", is_host=is_host, **slow)

    stays, goes = agent(is_host=True), agent(is_host=False)
    stays.wait_for("on 4 x cpu")
    stays.wait_for("step 10/")
    goes.kill()
    stays.wait_for("on 2 x cpu")
    stays.wait_for("2 accumulation step(s), which keeps the batch of 16")
    runs.wait_for_step("elastic", 40)
    comes = agent(is_host=False)
    stays.wait_for("on 4 x cpu", count=2)
    assert stays.end() == 0, stays.printed[-5000:]
    comes.end()
    assert runs.saved("elastic")["progress"]["step"] == 60 * 6
    rows = runs.rows("elastic")
    assert [row["step"] for row in rows] == list(range(1, 361))
    assert sum(row["images"] for row in rows) == 60 * 6 * 16
    assert stays.printed.count("the last 4 images of each shuffled epoch are dropped") >= 3
