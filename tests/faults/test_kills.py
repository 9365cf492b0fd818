"""A run that is killed or stopped at any moment, and resumed, ends with the same bits as an undisturbed one."""

import os
import random
import signal
import sys
import time
from functools import cache

import pytest

from command_line import at_step, run
from effnet_fast import checkpoint
from marks import on_gpu

FLAGS = "--ema_decay 0.9 --mixup 0.2 --cutmix 1 --rotation 15 --dropout 0.3 --drop_path 0.3 --num_epochs 6"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Checkpoints of undisturbed runs by loader, made once."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @cache
    def make(small, flags):
        name = f"run{len(list(folder.iterdir()))}"
        run(f"{small} {flags} --save_dir {folder} --run_name {name}")
        return checkpoint.load(folder / name / "last.pt")

    return make


def kill_again_and_again(runs, flags, seed, kills):
    """Kill -9 a run at random moments, each time a few steps later."""
    chance = random.Random(seed)
    for kill in range(kills):
        step = chance.randint(1 + 10 * kill, 10 + 10 * kill)
        # It holds five steps on, so that on any machine the kill comes before its end.
        started = runs.train("killed", flags, **at_step(step + 5, "hold"))
        # A random step of those left, and a random moment within it, a write or an evaluation.
        started.wait_for(f"step {step}/")
        time.sleep(chance.random() * 0.1)
        assert started.process.poll() is None
        started.kill()


@pytest.fixture
def check(runs, undisturbed, small, assert_same_state, capsys):
    """Kills a run, resumes it in this process to its end, and compares it with an undisturbed one."""

    def check(flags, seed, kills):
        kill_again_and_again(runs, f"{flags} --save_every_steps 1", seed, kills)
        run(f"{small} {flags} --save_every_steps 1 --save_dir {runs.folder} --run_name killed")
        assert "resuming at step" in capsys.readouterr().out
        assert_same_state(runs.saved("killed"), undisturbed(small, flags))
        rows = runs.rows("killed")
        assert [row["step"] for row in rows] == list(range(1, 37))
        assert {row["images"] for row in rows} == {16}

    return check


SLOW = [(loader, 3, seed) for loader in ("resident", "dali") for seed in range(1, 8)]


@pytest.mark.parametrize(
    ("loader", "kills", "seed"),
    [("resident", 1, 0), ("dali", 1, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_killed_run_has_the_same_bits(check, loader, kills, seed):
    """44 kills in all."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    operations = {"dali": "rand", "resident": "trivial"}[loader]
    check(f"{FLAGS} --loader {loader} --auto_augment {operations} --alternating_flip true", seed, kills)


@pytest.mark.slow
@on_gpu
@pytest.mark.parametrize("step", ["eager", "compile", "graph"])
def test_killed_deterministic_gpu_run_has_the_same_bits(check, step):
    flags = f"{FLAGS} --device cuda --deterministic true --mixed_precision bf16 --step {step} --hang_timeout 300"
    check(flags, seed=0, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop", "muon"])
def test_other_optimizers_and_fp16(check, optimizer):
    flags = f"{FLAGS} --optimizer {optimizer} --learning_rate 0.003 --mixed_precision fp16 --grad_accumulation 2"
    check(flags, seed=0, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("seed", range(3))
def test_signal_loses_no_step(runs, undisturbed, small, assert_same_state, number, seed):
    step = random.Random(seed).randint(1, 20)
    run = runs.train("stopped", FLAGS, **at_step(step, number))
    assert run.end() == 128 + number
    assert runs.saved("stopped")["progress"]["step"] >= step
    again = runs.train("stopped", FLAGS)
    assert again.end() == 0
    assert_same_state(runs.saved("stopped"), undisturbed(small, FLAGS))


@pytest.mark.slow  # tests/train/test_stop.py has a quick test of the same
def test_nohup_outlives_its_terminal(runs, small):
    line = f"{small} --save_dir {runs.folder} --run_name nohup --num_epochs 3"
    run = runs.start(["nohup", sys.executable, "-m", "effnet_fast", *line.split()])
    run.wait_for("step 2/")
    run.process.send_signal(signal.SIGHUP)
    assert run.end() == 0, run.printed
    assert runs.saved("nohup")["progress"]["finished"]


def test_signal_to_the_process_group(runs):
    """A service manager signals the whole group. The run still needs its loader's processes, and says how to resume."""
    run = runs.train("group", "--num_epochs 100000 --loader torch --num_workers 1 --resume no")
    run.wait_for("step 3/")
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM, run.printed
    assert "the same command without --resume resumes" in run.printed
    assert runs.saved("group")["progress"]["step"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["true", "false"])
def test_two_killed_ranks_have_the_same_bits(runs, assert_same_state, sync):
    """Without synchronised BatchNorm, the statistics of each rank are saved too."""
    flags = f"{FLAGS} --sync_batchnorm {sync}"
    whole = runs.train("whole", flags, ranks=2)
    assert whole.end() == 0, whole.printed
    run = runs.train("killed", f"{flags} --save_every_steps 1", ranks=2, **at_step(12, "hold"))
    run.wait_for("step 9/")
    run.kill()
    again = runs.train("killed", flags, ranks=2)
    assert again.end() == 0, again.printed
    assert "resuming at step" in again.printed
    assert_same_state(runs.saved("killed"), runs.saved("whole"))


@pytest.mark.slow
def test_signal_to_torchrun(runs):
    run = runs.train("stopped", "--num_epochs 100000", ranks=2)
    run.wait_for("step 3/")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() != 0
    assert "the same command resumes from there" in run.printed
    assert runs.saved("stopped")["progress"]["step"] >= 3
