"""Several ranks compute the same as one: under torchrun with gloo, and one DDP rank with nccl."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from command_line import mistake, run_ranks
from effnet_fast import distributed
from effnet_fast.model import Architecture, EfficientNet, batch_norms
from effnet_fast.run.build import data_parallel
from marks import on_gpu

WORKER = Path(__file__).parent / "workers" / "ddp_gradients.py"
TOLERANCE = {"torch torch.float64": 1e-9}  # 1e-3 for the others


@pytest.mark.parametrize("kernels", [("torch", "cpp"), pytest.param(("triton",), marks=pytest.mark.slow)], ids="-".join)
def test_two_ranks_give_the_gradients_and_statistics_of_one(tmp_path, kernels):
    """In training mode, with BatchNorm statistics of the whole batch. float64 excludes rounding."""
    if kernels == ("triton",):
        pytest.importorskip("triton")
    for ranks in (1, 2):
        # The ranks run on the CPU; conftest.py leaves the interpreter off if there is a GPU.
        interpreted = "1" if kernels == ("triton",) else "0"
        run_ranks([sys.executable, WORKER, tmp_path / f"{ranks}.pt", *kernels], ranks, TRITON_INTERPRET=interpreted)
    results = [torch.load(tmp_path / f"{ranks}.pt", weights_only=True) for ranks in (1, 2)]
    assert results[0].keys() == results[1].keys()
    for case, one in results[0].items():
        two = results[1][case]
        assert one.keys() == two.keys()
        # The common scale is for gradients that are truly 0, such as of a shift that the next BatchNorm cancels.
        scale = torch.stack([torch.linalg.norm(v) for v in one.values()]).median()
        for name, expected in one.items():
            error = torch.linalg.norm(two[name] - expected) / (torch.linalg.norm(expected) + 0.1 * scale)
            assert error < TOLERANCE.get(case, 1e-3), (case, name, error)


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), pytest.param("cuda", "nccl", marks=on_gpu)])
def test_one_rank_of_ddp_gives_the_plain_gradients(device, backend, monkeypatch):
    """As `train` wraps the model, with BatchNorm synchronised."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(0)
    architecture = Architecture(width=0.25, depth=0.3, num_classes=10, output_stride=16, dropout=0.0, drop_path=0.0)
    model = EfficientNet(architecture, "torch").to(device)
    for norm in batch_norms(model):
        norm.synchronised = True
    images = torch.randn(8, 3, 32, 32, device=device)

    def gradients(called):
        model.zero_grad()
        called(images).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients(model)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = gradients(data_parallel(model, static_graph=True))
    finally:
        dist.destroy_process_group()
    for one, other in zip(plain, wrapped, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "left"), [(1, ["left"]), (2, [])])
def test_a_failed_rank_does_not_wait_for_the_others(monkeypatch, size, left):
    """It leaves the process group after an error only if it is the only rank."""
    seen = []
    monkeypatch.setattr(distributed, "init", lambda *_: distributed.World(0, size, torch.device("cpu")))
    monkeypatch.setattr(distributed, "shutdown", lambda: seen.append("left"))
    with pytest.raises(ValueError, match="disk"), distributed.group():
        raise ValueError("disk")
    assert seen == left
    seen.clear()
    with distributed.group() as world:
        assert world.size == size
    assert seen == ["left"]


def test_failure_of_rank_0_is_raised_on_all_ranks(monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: ["cannot write", mine])
    with pytest.raises(OSError, match=r"^cannot write$"):
        distributed.on_main(lambda: pytest.fail("only rank 0 does it"))


def test_failure_of_rank_0_is_raised_there():
    def work():
        raise PermissionError(13, "Permission denied")

    with pytest.raises(PermissionError, match="Permission denied"):
        distributed.on_main(work)
    distributed.on_main(lambda: None)


def test_name_of_the_launch(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.launch() is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert distributed.launch() == "7.batch"
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert distributed.launch() == "7.1"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun without --rdzv-id
    assert distributed.launch() == "7.1"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert distributed.launch() == "mine"


def test_what_may_be_a_restart(monkeypatch):
    """In one Slurm allocation many commands can follow each other; none is a restart until the job is requeued."""
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not distributed.may_be_restart()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert distributed.may_be_restart()
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert distributed.may_be_restart()


@pytest.mark.parametrize(
    ("changed", "words"),
    [({}, "WORLD_SIZE=2"), ({"MASTER_ADDR": "no.such.host.invalid", "RANK": "1"}, "MASTER_ADDR=no.such.host.invalid"),
     ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many")],
)  # fmt: skip
def test_ranks_that_do_not_connect(tmp_path, monkeypatch, capsys, changed, words):
    meeting = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"} | changed
    for name, value in meeting.items():
        monkeypatch.setenv(name, value)
    line = f"train --dataset synthetic --limit_train 16 --hang_timeout 1 --device cpu --save_dir {tmp_path}"
    message = mistake(capsys, line)
    assert message.startswith("error: the ranks cannot connect")
    assert words in message
