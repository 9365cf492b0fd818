"""The verb tune: its search, cache and choice with a stand-in clock, and what train makes of them."""

import json
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch

from command_line import run
from effnet_fast import create_model
from effnet_fast.config import TrainConfig, TuneConfig
from effnet_fast.distributed import World
from effnet_fast.model.blocks import MBConv, tuning, use_launches
from effnet_fast.model.launch_layers import launch_layers
from effnet_fast.run import plan, tune
from effnet_fast.run.build import build
from effnet_fast.run.forecast import opening_lines
from effnet_fast.run.tune import GpuClock, Question, search, unanswered
from effnet_fast.run.tuned import Timings, tuned_launches, winners
from effnet_kernels import launch as launches
from marks import on_gpu

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
PARTS = ("depthwise forward", "five sums", "grad apply", "mbconv")
ASKED = [Question(part, tuning.Layer(2, 96, 8, 3, 1, 4)) for part in PARTS]
TOTAL = sum(len(question.launches) for question in ASKED)


class Clock:
    """The last launch of a space is fastest, the heuristic's the slowest; calls `end` at call `stop`."""

    def __init__(self, stop=-1, end=None):
        self.calls, self.stop, self.end = [], stop, end

    def __call__(self, question, launch):
        if len(self.calls) == self.stop:
            self.end()
        self.calls.append((question.key, launch))
        return 1 / (1 + question.launches.index(launch))

    def now(self):
        """A launch takes a second."""
        return float(len(self.calls))


@pytest.fixture
def timings(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFNET_FAST_CACHE", str(tmp_path))
    yield Timings(GPU, "bf16")
    use_launches({})


@pytest.fixture
def stand_in(timings, monkeypatch):
    """Give the verb a GPU, three questions and a clock; returns a function that sets the clock."""

    def use(clock):
        @contextmanager
        def make_clock(*_):
            yield clock

        monkeypatch.setattr(tune, "make_clock", make_clock)
        return clock

    monkeypatch.setattr(tune, "gpu", lambda: GPU)
    monkeypatch.setattr(tune, "questions", lambda config: ASKED)
    return use


def test_no_gpu_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run("tune", expected=2)
    assert capsys.readouterr().err.splitlines() == [
        "error: tune times kernels on a GPU, and no CUDA GPU is visible: run it on the machine that trains"
    ]


def test_an_output_that_cannot_be_written_is_refused_first(capsys, tmp_path):
    run(f"tune --output {tmp_path}/missing/times.json", expected=2)
    assert f"{tmp_path}/missing" in capsys.readouterr().err


def test_a_choice_of_kernels_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(launches, "_ENVIRONMENT", "torch")
    run("tune", expected=2)
    assert "EFFNET_KERNELS=torch chooses some: unset it" in capsys.readouterr().err


def test_every_launch_is_timed_once(timings):
    """The time is up after 5 launches; the next search goes on; a third has nothing to do."""
    clock = Clock()
    for seconds, done in ((5, 5), (1000, TOTAL), (1000, TOTAL)):
        search(unanswered(ASKED, timings.read()), timings, clock, clock.now, seconds)
        assert len(clock.calls) == len(timings.read()) == done
    assert len(set(clock.calls)) == TOTAL
    assert winners(timings.read()) == {question.key: question.launches[-1] for question in ASKED}


def ctrl_c():
    raise KeyboardInterrupt


@pytest.mark.parametrize(("end", "status"), [(ctrl_c, 130), (lambda: signal.raise_signal(signal.SIGTERM), 143)])
def test_a_signal_keeps_the_times(stand_in, timings, tmp_path, capsys, end, status):
    stand_in(Clock(4, end))
    run(f"tune --mixed_precision bf16 --output {tmp_path}/times.json", expected=status)
    assert len(timings.read()) == len(json.loads((tmp_path / "times.json").read_text())["rows"]) == 4
    assert f"{TOTAL - 4} are left: the same command goes on" in capsys.readouterr().out
    clock = stand_in(Clock())
    run(f"tune --mixed_precision bf16 --output {tmp_path}/times.json")
    assert len(clock.calls) == TOTAL - 4
    assert "4 of 4 choices improved" in capsys.readouterr().out
    rows = json.loads((tmp_path / "times.json").read_text())["rows"]
    assert [len(rows), sum(row["wins"] for row in rows)] == [TOTAL, 4]


def test_outside_the_main_thread(stand_in, timings):
    stand_in(Clock())
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(tune.tune, TuneConfig()).result() == 0
    assert len(timings.read()) == TOTAL


def test_ops_are_timed_on_the_launches_that_won(timings):
    in_use = []

    class Watching(Clock):
        def __call__(self, question, launch):
            in_use.append(dict(launches._in_use))
            return super().__call__(question, launch)

    clock = Watching()
    search(unanswered(ASKED, []), timings, clock, clock.now, 1000)
    assert in_use[0] == {}
    assert in_use[-1] == {question.key: question.launches[-1] for question in ASKED[:-1]}


def test_torn_and_foreign_lines_are_ignored(timings):
    first, second = ASKED[0].launches[:2]
    timings.add(ASKED[0].timing(first, 1.0))
    whole = timings.path.read_bytes()
    foreign = [b"\xff\xfe", b"3", b'{"kernel": "statistics"}', b'{"kernel": 1, "sizes": 2, "launch": 3, "ms": 4}']
    timings.path.write_bytes(b"\n".join([whole, *foreign, whole[: len(whole) // 2]]))
    timings.add(ASKED[0].timing(second, 0.5))
    assert [timing.ms for timing in timings.read()] == [1.0, 0.5]
    timings.path.unlink()
    assert timings.read() == []


def test_what_wins(timings):
    """A launch of the space that is faster than the heuristic's by more than noise."""
    question = ASKED[0]
    heuristic, other = question.launches[:2]
    unknown = question.timing(other, 0.1)
    unknown.launch["strip"] = 999
    wrong_sizes = tune.Timing("depthwise forward", (1, 2), asdict(other), 0.1)
    gone = tune.Timing("of another version", (1, 2), {}, 0.1)
    base = [question.timing(heuristic, 1.0), unknown, wrong_sizes, gone, question.timing(other, None)]
    assert winners(base) == {}
    assert winners([*base, question.timing(other, 0.99)]) == {}
    assert winners([*base, question.timing(other, 0.9)]) == {question.key: other}
    assert winners([question.timing(heuristic, None), question.timing(other, 0.9)]) == {}


def test_which_trainings_use_them(timings):
    clock = Clock()
    search(unanswered(ASKED, []), timings, clock, clock.now, 1000)
    ways = {"compiled": True, "deterministic": False}
    assert tuned_launches(GPU, "bf16", "auto", **ways).keys() == {question.key for question in ASKED}
    assert tuned_launches(GPU, "no", "auto", **ways) == {}  # timed in another precision
    assert tuned_launches(GPU, "bf16", "torch", **ways) == {}
    assert tuned_launches(GPU, "bf16", "auto", compiled=True, deterministic=True) == {}
    assert tuned_launches(CPU, "bf16", "auto", **ways) == {}
    # PyTorch's operators were timed compiled, and `triton` asks for the kernels.
    for kernels, compiled in (("auto", False), ("triton", True)):
        launches = tuned_launches(GPU, "bf16", kernels, compiled=compiled, deterministic=False)
        assert launches.keys() == {question.key for question in ASKED[:-1]}


@pytest.mark.parametrize(
    ("fits", "scale", "advice"),
    [
        (True, (0.25, 0.3), "PyTorch's operators for 1 of "),
        (False, (0.25, 0.3), "does not time models of another --width or --depth"),
        (
            False,
            (None, None),
            "--image_size 32 --output_stride 32 --batch_size 8 --mixed_precision no times this run's",
        ),
    ],
)
def test_train_uses_them_and_says_so(monkeypatch, tmp_path, fits, scale, advice):
    config = TrainConfig(
        dataset="synthetic", output_stride=32, width=scale[0], depth=scale[1], limit_train=16, limit_eval=8,
        batch_size=8, num_workers=1, loader="resident", save_dir=str(tmp_path), device="cpu",
    )  # fmt: skip
    sizes = (8 * 16 * 16, 8) if fits else (3, 8)  # the stem's map
    head = (8, 320, 1, 1) if fits else (3, 320, 1, 1)
    chosen = {
        ("normalize", sizes): launches.row_launch_space(*sizes)[-1],
        ("bn_silu_squeeze", head): launches.Implementation("torch"),
    }
    monkeypatch.setattr(plan, "tuned_launches", lambda *_, **__: chosen)
    made = plan.make_plan(config, World(0, 1, CPU), None)
    parts = build(made)
    try:
        assert launches._in_use == chosen
        (line,) = [line for line in opening_lines(made, parts) if "tune" in line]
        assert ("1 of " in line) == fits
        assert advice in line
    finally:
        parts.close()
        use_launches({})


def test_layers_of_a_model():
    model = create_model("efficientnet-b0", output_stride=32, width=0.25, depth=0.3)
    layers = launch_layers(model, 64, 32)
    assert model.training
    assert next(model.parameters()).device == CPU
    convolutions = [layer for layer in layers if layer.kernel]
    assert convolutions[0].prologue  # of the largest map
    assert [layer.prologue for layer in layers].count(False) == 1  # the first block has no expansion
    assert tuning.Layer(64, model.stem.conv.out_channels, 16) in layers
    assert [layer.c for layer in layers if layer.pooled] == [model.head.conv.out_channels]
    assert {layer.n for layer in layers} == {64}
    assert [layer.rows * layer.c for layer in layers] == sorted(
        (layer.rows * layer.c for layer in layers), reverse=True
    )


def test_the_products_of_a_model():
    """Only for triton-block: each block's projection, and its expansion where it has one."""
    model = create_model("efficientnet-b0", output_stride=32, width=0.25, depth=0.3)
    plain, whole = (launch_layers(model, 64, 32, products=products) for products in (False, True))
    products = [layer for layer in whole if tuning.parts_of(layer) == ["product"]]
    assert [layer for layer in whole if layer not in products] == plain
    blocks = [block for block in model.modules() if isinstance(block, MBConv)]
    expansions = {(layer.c, layer.outputs) for layer in products if not layer.prologue}
    assert {(layer.c, layer.outputs) for layer in products if layer.prologue} == {
        (block.project.conv.in_channels, block.project.conv.out_channels) for block in blocks
    }
    assert expansions == {(conv.in_channels, conv.out_channels) for conv in (b.expand.conv for b in blocks[1:])}


class Here:
    """An executor that calls in this thread and compiles nothing."""

    def submit(self, function, *arguments):
        done = Future()
        done.set_result(None)
        return done


def test_the_clock_times_right_results_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = []
    monkeypatch.setattr(tune, "replayed_ms", lambda functions: calls.append(functions[0]()) or [3.0, 1.0, 2.0])
    question = Question("normalize", tuning.Layer(2, 24, 4))
    first, second = question.launches[:2]
    clock = GpuClock(torch.float32, CPU, Here(), [(question, question.launches)])
    assert clock(question, first) == clock(question, second) == 2.0
    clock._expected *= 1.01
    assert clock(question, second) is None
    assert len(calls) == 2

    def refuse(functions):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(tune, "replayed_ms", refuse)
    clock._expected /= 1.01
    assert clock(question, second) is None


@on_gpu
def test_a_gpu_times_launches(timings, capsys):
    run("tune --batch_size 8 --mixed_precision bf16 --seconds 20 --workers 4")
    known = Timings(torch.device("cuda"), "bf16").read()
    assert any(timing.ms for timing in known)
    assert f"{len(known)} candidates timed" in capsys.readouterr().out


def test_questions_about_products():
    asked = {kernels: tune.questions(TuneConfig(kernels=kernels)) for kernels in ("triton", "triton-block")}
    assert not [question for question in asked["triton"] if question.part == "product"]
    (first, *_) = products = [question for question in asked["triton-block"] if question.part == "product"]
    assert len(asked["triton-block"]) == len(asked["triton"]) + len(products)
    assert str(first.layer).endswith(f" to {first.layer.outputs}")


def test_settings():
    with pytest.raises(ValueError, match="--seconds must be above 0"):
        TuneConfig(seconds=0)
    with pytest.raises(ValueError, match="--batch_size must be at least 1"):
        TuneConfig(batch_size=0)
