"""Every benchmark runs in its smallest form on the CPU and marks its figures as a CPU's."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SMALL = ("--batch-size", "4", "--output-stride", "32")

sys.path.insert(0, str(BENCHMARKS))

import crowd  # noqa: E402
import harness  # noqa: E402
import loader  # noqa: E402
import pointwise  # noqa: E402
import report  # noqa: E402
import roofline  # noqa: E402
import scaling  # noqa: E402
import step_cost  # noqa: E402
import step_profile  # noqa: E402
import throughput  # noqa: E402
import time_to_accuracy  # noqa: E402

from effnet_fast import create_model  # noqa: E402
from effnet_fast.data import choose_loader  # noqa: E402
from effnet_fast.data.synthetic import load_synthetic  # noqa: E402
from effnet_fast.explain.tables import SCORES  # noqa: E402
from effnet_fast.model.complexity import complexity  # noqa: E402
from effnet_fast.report.table import as_csv  # noqa: E402


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(harness, "DEVICE", "cpu")
    monkeypatch.setattr(harness, "INNER", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for other processes


def script(name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, BENCHMARKS / name, *words], capture_output=True, text=True, check=False)


def read(path: Path) -> dict:
    made = json.loads(path.read_text())
    assert made["device"] == "cpu"
    assert made["note"].startswith("CPU figures")
    assert {"gpu", "driver", "torch", "triton", "commit", "date"} <= made["provenance"].keys()
    return made


def test_scripts_do_not_shadow_standard_modules():
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert not names & sys.stdlib_module_names


def test_pointwise(tmp_path, monkeypatch):
    found = pointwise.layers(2, 32)
    assert len(found) == len(set(found)) == 19
    assert (found[0], found[-1]) == (pointwise.Layer(2, 32, 16, 32), pointwise.Layer(2, 320, 1280, 4))
    out = tmp_path / "p.json"
    pointwise.main(["--limit", "1", "--out", str(out)])
    rows = read(out)["rows"]
    assert [(row["result"], row["way"]) for row in rows] == [
        (result, way) for result in ("y", "dx", "dw") for way in ("convolution", "product")
    ]
    assert all(row["ms"][1] > 0 and row["error"] < 1e-5 for row in rows)
    # A result that disagrees is reported and not timed.
    monkeypatch.setitem(pointwise.WAYS["y"], "product", lambda buffers: pointwise.rows(buffers.dy) * 2)
    rows = list(pointwise.rows_of(found[0], torch.float32, 1.0))
    assert ["ms" in row for row in rows] == [False, False, True, True, True, True]


def test_throughput_beside_a_peer(tmp_path, capsys):
    pytest.importorskip("efficientnet_pytorch")
    out = tmp_path / "t.json"
    throughput.main(["--peers", "--no-compile", "--rounds", "3", "--warm-up", "1", "--out", str(out), *SMALL])
    rows = {(row["direction"], row["library"]): row for row in read(out)["rows"]}
    for direction in ("train", "inference"):
        ours, theirs = rows[direction, "effnet_fast"], rows[direction, "efficientnet-pytorch"]
        assert ours["time over ours"] == [1, 1, 1]
        low, middle, high = theirs["time over ours"]
        assert 0 < low <= middle <= high
        # A rate is the batch over a time, turn by turn: the slowest turn has the lowest rate.
        assert theirs["img/s"] == pytest.approx([4 / ms * 1e3 for ms in reversed(theirs["ms"])])
    assert "CPU figures" in capsys.readouterr().out


@pytest.mark.slow
def test_throughput_of_the_compiled_step(tmp_path):
    out = tmp_path / "t.json"
    modes = ["--step", "eager", "--step", "compile"]
    throughput.main([*modes, "--direction", "train", "--rounds", "2", "--warm-up", "1", "--out", str(out), *SMALL])
    rows = {row["step"]: row for row in read(out)["rows"]}
    assert rows.keys() == {"eager", "compile"}
    assert rows["eager"]["time over ours"] == [1, 1, 1]
    assert rows["compile"]["ms"][1] > 0


@pytest.mark.parametrize(
    ("mode", "compiled", "graph"), [("eager", False, False), ("compile", True, False), ("graph", True, True)]
)
def test_modes_are_those_of_train(monkeypatch, mode, compiled, graph):
    monkeypatch.setattr(harness, "DEVICE", "cuda")
    assert harness.check_mode(mode) == (compiled, graph)


def test_throughput_from_a_loader(tmp_path):
    out = tmp_path / "t.json"
    words = ["--loader", "resident", "--direction", "train", "--rounds", "1", "--warm-up", "0", "--out", str(out)]
    throughput.main([*words, *SMALL])
    assert read(out)["settings"]["loader"] == "resident"


def test_throughput_reports_failed_and_late_candidates(tmp_path, monkeypatch, capsys):
    def call(who, mode, case):
        def broken():
            raise RuntimeError("no graph today\nat all")

        return broken if who == "broken" else lambda: None

    out = tmp_path / "t.json"
    monkeypatch.setattr(throughput, "PEERS", {"broken": None, "late": None})
    monkeypatch.setattr(throughput, "peers", lambda case, required: ["broken", "late"])
    monkeypatch.setattr(throughput, "train_call", call)
    clock = iter([0.0, 1.0, 2.0, 11.0])
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(harness, "wall_ms", lambda call: 5.0)
    words = ["--peers", "--no-compile", "--direction", "train", "--seconds", "10", "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        throughput.main([*words, *SMALL])
    assert ended.value.code == 1
    made = read(out)
    assert [row["library"] for row in made["rows"]] == ["effnet_fast"]
    assert [(row["library"], row["why"]) for row in made["settings"]["left_out"]] == [
        ("broken", "no graph today"),
        ("late", "10 s were over"),
    ]
    assert "left out: no graph today" in capsys.readouterr().out


def test_host_time_on_a_gpu(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(harness, "DEVICE", "cuda")
    monkeypatch.setattr(harness, "synchronise", lambda: waits.append(0))
    monkeypatch.setattr(harness, "wall_ms", lambda call: 5.0)
    monkeypatch.setattr(throughput, "train_call", lambda who, mode, case: lambda: None)
    throughput.main(["--direction", "train", "--rounds", "3", *SMALL])
    assert len(waits) == 3 + 1  # before each of the host's times, and after the profiled steps
    assert re.search(r" issued in \d+\.\d\d ms, kernels \d+\.\d\d ms", capsys.readouterr().out)


def test_named_candidates(tmp_path):
    out = tmp_path / "t.json"
    options = f"--direction train --rounds 1 --warm-up 1 --turn {tmp_path / 'turn'} --out {out}"
    words = options.split()
    throughput.main([*words, "--candidate", "effnet_fast:eager", *SMALL])
    assert [(row["library"], row["step"]) for row in read(out)["rows"]] == [("effnet_fast", "eager")]
    assert (tmp_path / "turn.waiting").read_text() == "."
    for wrong in ("timm", "keras:eager", "timm:graph"):
        with pytest.raises(ValueError, match=f"--candidate {wrong} must be LIBRARY:STEP"):
            throughput.main([*words, "--candidate", wrong, *SMALL])


@pytest.mark.parametrize(("killed_at", "rounds"), [(3, {"eager": 1}), (10, {"eager": 2, "compile": 2})])
def test_a_killed_throughput_keeps_its_rows(tmp_path, monkeypatch, killed_at, rounds):
    """Killed while the second candidate warms up, and in the third round."""
    calls = iter(range(1, 100))

    def call():
        if next(calls) == killed_at:
            raise KeyboardInterrupt

    out = tmp_path / "t.json"
    monkeypatch.setattr(throughput, "train_call", lambda who, mode, case: call)
    words = ["--step", "eager", "--step", "compile", "--direction", "train", "--warm-up", "1", "--rounds", "3"]
    with pytest.raises(KeyboardInterrupt):
        throughput.main([*words, "--out", str(out), *SMALL])
    assert {row["step"]: row["rounds"] for row in read(out)["rows"]} == rounds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "graph"], "graph is a CUDA graph, and this runs on the CPU"),
        (["--model", "resnet50", "--peers", "--output-stride", "8"], "stock strides only"),
        (["--model", "efficientnet-b9"], "unknown model"),
        (["--batch-size", "0"], "at least 1"),
    ],
)
def test_impossible_cases_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        throughput.main(words)


@pytest.mark.parametrize("output_stride", [4, 8, 16, 32])
def test_peer_strides(tmp_path, output_stride):
    """Its logits are those of our model with its weights."""
    pytest.importorskip("efficientnet_pytorch")
    torch.manual_seed(0)
    case = harness.Case(output_stride=output_stride)
    peer = throughput.make_peer("efficientnet-pytorch", case).eval()
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    ours = create_model(case.model, case.num_classes, 32, output_stride, pretrained=tmp_path / "peer.pth").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(peer(images), ours(images), rtol=1e-4, atol=1e-5)


def test_missing_peer_is_an_error_if_required(monkeypatch, capsys):
    def absent(case):
        raise ImportError("No module named 'absent'")

    monkeypatch.setattr(throughput, "PEERS", {"absent": absent})
    case = harness.Case(output_stride=32)
    assert throughput.peers(case, required=False) == []
    assert "absent is left out" in capsys.readouterr().out
    with pytest.raises(ImportError, match="pip install absent"):
        throughput.main(["--require-peers", *SMALL])


def test_missing_required_peer_is_one_line():
    if all(importlib.util.find_spec(name) for name in ("timm", "torchvision", "efficientnet_pytorch")):
        pytest.skip("all peers are installed")
    done = script("throughput.py", "--require-peers", *SMALL)
    assert done.returncode == 2
    assert re.fullmatch(r"error: --require-peers: \S+ cannot be imported .*: pip install \S+\n", done.stderr)


def test_roofline_counts_what_the_model_computes(tmp_path):
    case = harness.Case(output_stride=8, batch_size=32)
    model = create_model(case.model, case.num_classes, case.image_size, case.output_stride)
    macs = complexity(model, case.image_size).macs
    flops = sum(layer.flops for layer in roofline.layers(model, case))
    # Three passes of two operations each; the stem has no input gradient, and the gates' layers are left out.
    assert 0.98 < flops / (6 * macs * case.batch_size) <= 1


def test_roofline_of_a_block():
    """10 E + 13 D and the narrow ends, as tests/op_tests/op_traffic.py has it."""
    batch, side, inputs = 32, 32, 24
    case = harness.Case(batch_size=batch, output_stride=8)
    model = create_model(case.model, case.num_classes, case.image_size, case.output_stride)
    block = next(layer for layer in roofline.layers(model, case) if layer.name == "stage 2.2")
    weights = sum(p.numel() for p in model.stages[1][1].parameters()) * roofline.WEIGHT_BYTES
    wide = batch * side**2 * 6 * inputs * 2
    narrow = (3 + 3 + 8 + 1) * batch * side**2 * inputs * 2
    assert block.bytes - weights == (10 + 13) * wide + narrow


def test_short_calls_are_timed_together_on_a_gpu(monkeypatch):
    """A copy takes 0.2 ms, to which a launch and a synchronisation would add a tenth."""
    calls, timed = [], []

    def wall(call):
        call()
        timed.append(len(calls))
        return 40.0

    monkeypatch.setattr(harness, "DEVICE", "cuda")
    monkeypatch.setattr(harness, "wall_ms", wall)
    assert harness._least_ms(lambda: calls.append(0)) == 2.0
    assert timed == [21, 41, 61, 81, 101]


def test_roofline_of_a_named_chip_needs_no_gpu(tmp_path, capsys):
    out, picture = tmp_path / "r.json", tmp_path / "r.png"
    roofline.main(["--chip", "h100", "--step-ms", "1000", "--picture", str(picture), "--out", str(out), *SMALL])
    made = read(out)
    assert made["settings"]["rates"] == "h100, data sheet"
    assert made["settings"]["reached"] == pytest.approx(made["settings"]["least_ms"] / 1000)
    assert picture.stat().st_size > 5000
    slow = roofline.bound([roofline.Layer("a", 1e9, 1e9)], 100, 1e12)
    assert slow == pytest.approx(0.01)
    with pytest.raises(ValueError, match="leave --chip out"):
        roofline.main(["--chip", "h100", "--measure"])
    with pytest.raises(ValueError, match="EfficientNet's blocks"):
        roofline.main(["--chip", "h100", "--model", "resnet50"])


def test_loader_measures_and_records(tmp_path, monkeypatch):
    out, speeds = tmp_path / "l.json", tmp_path / "speeds.json"
    speeds.write_text('{"another GPU": {"dali": 1}}')
    words = ["--images", "64", "--rounds", "1", "--num-workers", "1", "--step-rate", "1000", "--record"]
    loader.main([*words, "--speeds", str(speeds), "--out", str(out), *SMALL])
    measured = {row["loader"]: round(row["img/s"][1]) for row in read(out)["rows"]}
    assert {"resident", "torch"} <= measured.keys()
    recorded = json.loads(speeds.read_text())
    assert recorded["another GPU"] == {"dali": 1}
    here = recorded["cpu"]
    assert {kind: here.pop(kind) for kind in measured} == measured
    assert here.keys() == {"commit", "date", "torch_version", "dali_version", "machine"}  # as choose_loader.py has it


@pytest.mark.parametrize(("dali", "resident", "faster"), [(10, 20, "resident"), (20, 10, "dali")])
def test_auto_follows_the_recorded_speeds(tmp_path, monkeypatch, dali, resident, faster):
    pytest.importorskip("nvidia.dali")
    speeds = tmp_path / "speeds.json"
    rows = [{"loader": "dali", "img/s": (1, dali, 99)}, {"loader": "resident", "img/s": (1, resident, 99)}]
    loader.record(speeds, rows)
    monkeypatch.setattr(choose_loader, "SPEEDS", speeds)
    kind, reason = choose_loader.choose_loader("auto", load_synthetic(8, 8).train, torch.device("cpu"))
    assert kind == faster
    assert reason.startswith(f"loader {faster}: 20 img/s recorded on cpu")


def test_step_profile(tmp_path, capsys):
    out, trace = tmp_path / "p.json", tmp_path / "trace.json"
    step_profile.main(["--steps", "1", "--trace", str(trace), "--out", str(out), *SMALL])
    made = read(out)
    shares = {row["category"]: row["share"] for row in made["rows"]}
    assert {"convolution", "depthwise", "normalisation", "gate", "optimizer", "loader", "idle"} <= shares.keys()
    assert sum(shares.values()) == pytest.approx(1, abs=0.02)
    assert made["gaps"] is None
    assert re.search(r'"name": "stages.3"', trace.read_text())


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("_squeeze_kernel", "gate"),
        ("_parameters_backward_kernel", "gate"),
        ("_forward_kernel", "depthwise"),
        ("dgrad2d_c1_k1_nhwc_specialized", "depthwise"),
        ("void cublasLt::splitKreduce_kernel<32>", "convolution"),
        ("_moments_kernel", "normalisation"),
        ("void multi_tensor_apply_kernel<FusedSgdMath>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "loader"),
        ("sm90_xmma_gemm_bf16", "convolution"),
        ("something else", "other"),
    ],
)
def test_category_of_a_kernel(name, label):
    assert step_profile.category(name) == label


def test_profiler_ranges_are_not_kernels(monkeypatch):
    """The profiler repeats the host's ranges on the device's time line."""

    def event(name, start, us, device=DeviceType.CUDA, annotation=False):
        span = SimpleNamespace(start=start, elapsed_us=lambda: us)
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation, time_range=span)

    events = [
        event("step", 0.0, 9.0, annotation=True),
        event("step", 0.0, 9.0, DeviceType.CPU, annotation=True),
        event("cudaLaunchKernel", 0.0, 1.0, DeviceType.CPU),
        event("sm90_xmma_gemm_bf16", 1.0, 3.0),
        event("_moments_kernel", 5.0, 2.0),
    ]
    monkeypatch.setattr(harness, "DEVICE", "cuda")
    prof = SimpleNamespace(events=lambda: events)
    kernels = step_profile.kernels_of(prof)
    assert [name for name, *_ in kernels] == ["sm90_xmma_gemm_bf16", "_moments_kernel"]
    assert step_profile.gaps(kernels)["in all us"] == 1.0
    monkeypatch.setattr(harness, "profile", lambda activities: nullcontext(prof))
    monkeypatch.setattr(harness, "synchronise", lambda: None)
    assert harness.kernel_ms(lambda: None, calls=5) == pytest.approx(1e-3)  # 5 us over 5 calls


def test_gaps_between_launches():
    kernels = [("a", "x", 0.0, 5.0), ("b", "x", 7.0, 1.0), ("c", "x", 7.5, 2.0), ("d", "x", 10.5, 1.0)]
    assert step_profile.gaps(kernels) == {"gaps": 2, "in all us": 3.0, "p50 us": 1.0, "p80 us": 2.0, "longest us": 2.0}


def test_scaling_over_one_rank(tmp_path):
    out = tmp_path / "s.json"
    scaling.main(["--ranks", "1", "--kind", "strong", "--rounds", "1", "--out", str(out), *SMALL])
    (row,) = read(out)["rows"]
    assert (row["efficiency"], row["communication"]) == (1, 0)
    with pytest.raises(ValueError, match="divide the batch"):
        scaling.main(["--ranks", "3", *SMALL])


def test_weak_and_strong_scaling_share_a_baseline(monkeypatch):
    measured = []

    def launch(ranks, case, args):
        measured.append((ranks, case.batch_size))
        return {"ms": 2.0, "ms apart": 1.5}

    monkeypatch.setattr(scaling, "launch", launch)
    scaling.main(["--ranks", "1", "2", *SMALL])
    assert measured == [(1, 4), (2, 4), (2, 2)]


def test_calls_take_turns():
    made = []
    calls = {name: lambda name=name: made.append(name) for name in "ab"}
    samples = harness.alternating(calls, 2, warm_up=1, inner=2, first=1)
    assert "".join(made) == "ab" + 2 * "aaabbb"
    assert [len(times) for times in samples.values()] == [2, 2]


def test_no_rounds():
    with pytest.raises(ValueError, match="--rounds must be at least 1"):
        harness.quantiles([])


@pytest.mark.slow
def test_scaling_over_two_ranks(tmp_path):
    out = tmp_path / "s.json"
    scaling.main(["--ranks", "1", "2", "--rounds", "2", "--out", str(out), *SMALL])
    rows = {(row["scaling"], row["ranks"]): row for row in read(out)["rows"]}
    assert {key: row["batch a rank"] for key, row in rows.items()} == {
        ("weak", 1): 4,
        ("weak", 2): 4,
        ("strong", 1): 4,
        ("strong", 2): 2,
    }
    for (_, ranks), row in rows.items():
        assert row["img/s"] == pytest.approx(ranks * row["batch a rank"] / row["ms"] * 1e3)
        assert 0 <= row["communication"] < 1
    assert rows["weak", 2]["efficiency"] == pytest.approx(rows["weak", 2]["img/s"] / (2 * rows["weak", 1]["img/s"]))


def test_step_cost(tmp_path, monkeypatch):
    out, picture = tmp_path / "cost.json", tmp_path / "cost.png"
    monkeypatch.setattr(step_cost, "FACTORS", {"batch size": (0.5, 1), "resolution": (0.5, 1), "width": (0.5, 1)})
    monkeypatch.setattr(step_cost.provenance, "cores", lambda: 1)
    monkeypatch.setattr(harness, "copy_bandwidth", lambda: 10.0)
    monkeypatch.setattr(harness, "matrix_rate", lambda dtype: 1e11)
    step_cost.rates.cache_clear()
    step_cost.main([*SMALL, "--rounds", "2", "--out", str(out), "--picture", str(picture)])
    rows = {(row["axis"], row["value"]): row for row in read(out)["rows"]}
    assert list(rows) == [("batch size", 2), ("batch size", 4), ("resolution", 16), ("resolution", 32), ("width", 0.5),
                          ("width", 1.0)]  # fmt: skip
    assert all(0 < row["ms p20"] <= row["ms p50"] <= row["ms p80"] for row in rows.values())
    for axis, small, large in (("batch size", 2, 4), ("resolution", 16, 32), ("width", 0.5, 1.0)):
        assert rows[axis, small]["floor ms"] < rows[axis, large]["floor ms"]
    assert picture.stat().st_size > 5000
    step_cost.rates.cache_clear()
    with pytest.raises(ValueError, match="EfficientNet's blocks"):
        step_cost.main(["--model", "resnet50"])


def test_crowd(tmp_path, monkeypatch):
    out = tmp_path / "crowd.json"
    words = [
        "--image-size",
        "16",
        "--batch-size",
        "4",
        "--settle",
        "0",
        "--seconds",
        "0.1",
        "--rounds",
        "2",
        "--out",
        str(out),
    ]
    crowd.main([*words, "--policies", "1 thread"])
    (row,) = read(out)["rows"]
    monkeypatch.setattr(harness, "DEVICE", "cuda")
    with pytest.raises(ValueError, match="hide the GPU"):
        crowd.main(words)
    assert row["policy"] == "1 thread"
    assert min(float(rate) for rate in row["alone img/s p20 p50 p80"].split()) > 0
    assert row["together / 1 thread p20 p50 p80"] == "1.00 1.00 1.00"


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("effnet-fast train --config a.yaml --data_dir d --deterministic", "train --config a.yaml --deterministic"),
        ("python -m effnet_fast train --save_dir=s --deterministic --seed 1", "train --deterministic --seed 1"),
        ("x train --compile --run_name r", "train --compile"),
    ],
)
def test_commands_without_the_machines_folders(words, command):
    assert report._command(words.split()) == f"effnet-fast {command}"


def test_time_to_accuracy(tmp_path, capsys, monkeypatch):
    out, recipe = tmp_path / "a.json", time_to_accuracy.recipe
    changes = {
        "limit_train": 64,
        "limit_eval": 20,
        "batch_size": 32,
        "num_epochs": 2,
        "num_workers": 1,
        "device": "cpu",
    }
    words = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    words += ["--recipe", "quickstart", "--seeds", "1", "--out", str(out)]
    time_to_accuracy.main([*words, "--target", "0"])
    (row,) = read(out)["rows"]
    (moment,) = row["history"]  # it stopped there
    assert moment["epoch"] == 1
    assert moment["s"] > moment["s without evaluation"] > 0
    with pytest.raises(ValueError, match="not a measurement on this machine with these settings: choose another --out"):
        time_to_accuracy.main([*words, "--target", "101", "0"])
    monkeypatch.setattr(time_to_accuracy, "recipe", lambda *_: dataclasses.replace(recipe(*_), warmup_epochs=0.5))
    with pytest.raises(ValueError, match="not a measurement on this machine with these settings"):
        time_to_accuracy.main([*words, "--target", "0"])  # the recipe has changed
    monkeypatch.setattr(time_to_accuracy, "recipe", recipe)
    out.unlink()
    time_to_accuracy.main([*words, "--target", "0", "--keep", str(tmp_path / "kept")])
    assert len(read(out)["rows"][0]["history"]) == 2  # to its end
    kept = tmp_path / "kept" / "a" / "seed0"
    assert (kept / "efficientnet-b0-synthetic-0" / "last.pt").exists()
    environment = kept / "efficientnet-b0-synthetic-0" / "environment.json"
    command = {"command": "time_to_accuracy.py --recipe quickstart --keep K"}
    environment.write_text(json.dumps(json.loads(environment.read_text()) | command))
    (entry,) = report.runs(kept)
    assert (entry["recipe"], entry["epoch"]) == ("quickstart", 2)
    assert "| `time_to_accuracy.py --recipe quickstart --keep K` | 2 |" in report.training(kept)
    out.unlink()
    time_to_accuracy.main([*words, "--target", "101", "0"])
    made = read(out)
    assert len(made["rows"][0]["history"]) == 2
    low, high = made["settings"]["summary"]
    assert low == {"target": 0, "seeds": 1, "reached": 1, "mean s": low["mean s"], "standard deviation s": 0}
    assert high == {"target": 101, "seeds": 1, "reached": 0}
    said = capsys.readouterr().out
    assert "target 0 % and 101 %" in said
    assert "101 % NOT reached" in said


def test_several_targets_of_one_run():
    rows = [
        {"history": [{"top1": top1, "s": s} for top1, s in ((70, 10.0), (76, 20.0), (74, 30.0), (last, 40.0))]}
        for last in (81, 79)
    ]
    assert time_to_accuracy.summary(rows, 75) == {
        "target": 75,
        "seeds": 2,
        "reached": 2,
        "mean s": 20,
        "standard deviation s": 0,
    }
    assert time_to_accuracy.summary(rows, 80) == {"target": 80, "seeds": 2, "reached": 1}


def test_a_failed_seed_keeps_the_others_and_is_run_again(tmp_path, monkeypatch):
    out, seeds = tmp_path / "a.json", []

    def run(config, target, candidate):
        seeds.append(config.seed)
        if seeds == [0, 1]:
            raise ValueError("cut off")
        return {
            "seed": config.seed,
            "commit": f"{config.seed}abcdef0",
            "compile s": 1.0,
            "history": [{"epoch": 1, "top1": 9.0, "s": 2.0, "s without evaluation": 1}],
        }

    monkeypatch.setattr(time_to_accuracy, "one_run", run)
    words = ["--recipe", "quickstart", "--target", "9", "12", "--seeds", "2", "--out", str(out)]
    with pytest.raises(ValueError, match="cut off"):
        time_to_accuracy.main(words)
    assert [goal["reached"] for goal in read(out)["settings"]["summary"]] == [1, 0]
    shown = report.time_to_accuracy(tmp_path)
    assert "| quickstart | 9 % | 2.0 | 1.0 | 1 |" in shown
    assert "| quickstart | 12 % | reached by 0 | 1.0 | 1 |" in shown
    for _ in range(2):  # the second time, there is nothing to do
        time_to_accuracy.main(words)
    assert seeds == [0, 1, 1]
    assert [row["seed"] for row in read(out)["rows"]] == [0, 1]
    shown = report.time_to_accuracy(tmp_path)
    assert "| quickstart | 9 % | 2.0 +- 0.0 | 1.0 | 2 |" in shown
    assert "0abcdef and 1abcdef |" in shown


@pytest.mark.parametrize(("field", "value"), [("threads", 99), ("provenance", {"cpu": "another"})])
def test_seconds_of_another_machine_are_not_continued(tmp_path, field, value):
    out = tmp_path / "a.json"
    row = {"seed": 0, "commit": None, "compile s": 1.0, "history": [{"epoch": 1, "top1": 9.0, "s": 2.0}]}
    settings = {"recipe": "quickstart", "changes": [], "candidate": None, "targets": [9.0]}
    made = harness.result("time_to_accuracy", settings, [row])
    made[field] = made[field] | value if isinstance(value, dict) else value
    out.write_text(json.dumps(made))
    with pytest.raises(ValueError, match="not a measurement on this machine"):
        time_to_accuracy.main(["--recipe", "quickstart", "--target", "9", "--out", str(out)])


def test_time_to_accuracy_of_a_candidate(tmp_path, monkeypatch):
    """Its changes, then those of `--set`; its library's model."""
    asked = []

    def run(config, target, candidate):
        asked.append((config.optimizer, config.num_epochs, candidate.peer))
        history = [{"epoch": 1, "top1": 50.0, "s": 2.0, "s without evaluation": 1}]
        return {"seed": config.seed, "commit": "abcdef0", "compile s": 1.0, "history": history}

    monkeypatch.setattr(time_to_accuracy, "one_run", run)
    words = ["--target", "40", "--candidate", "timm", "--set", "num_epochs=7", "--seeds", "1"]
    time_to_accuracy.main([*words, "--out", str(tmp_path / "a.json")])
    assert asked == [("sgd", 7, "timm")]
    assert "| cifar100-cpu as timm num_epochs=7 | 40 % | 2.0 | 1.0 | 1 |" in report.time_to_accuracy(tmp_path)


def test_compilation_before_the_clock_is_undone():
    """It runs a step of each image size and an evaluation, and restores the state."""
    seen = []

    class Run:
        def _evaluate_weights(self):
            seen.append("evaluated")
            weight.fill_(2.0)

    class Step:
        sizes = SimpleNamespace(starts=(0, 5))

        def __call__(self, images, labels, number):
            seen.append(number)
            weight.fill_(1.0)

        def tensors(self):
            return [weight]

    weight = torch.zeros(1)
    loader = SimpleNamespace(epoch=lambda epoch: iter([(None, None)]))
    time_to_accuracy.Clock(1.0)._compile(Step(), loader, Run())
    assert seen == [0, 5, "evaluated"]
    assert weight == 0


@pytest.mark.parametrize("words", [["--recipe", "nothing"], ["--set", "no_such=1"], ["--seeds", "0"]])
def test_time_to_accuracy_refuses(words):
    with pytest.raises(ValueError, match=r"no recipe|no_such|at least 1"):
        time_to_accuracy.main(["--target", "1", *words])


def test_readmes_show_the_results():
    assert (BENCHMARKS / "README.md").read_text().count("<!-- report.py: ") == len(report.TABLES)
    assert report.main(["--check"]) == 0, "run python benchmarks/report.py"


def test_summary_of_results(tmp_path, monkeypatch, capsys):
    """The top README's table has a row a measured run; it is written between its markers, and only there."""
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(report, "READMES", {readme: report.with_summary})
    assert report.main(["--check"]) == 1
    assert "old" in readme.read_text()
    assert report.main([]) == 0
    before, *table, after = readme.read_text().splitlines()
    assert (before, table[0], table[-1], after) == ("before", "<!-- results -->", "<!-- end -->", "after")
    quickstart = next(line for line in table if "quickstart" in line)
    assert [cell.strip() for cell in quickstart.split("|")[2:-1]] == [
        "efficientnet-b0 on synthetic",
        "4",
        "93.35 %",
        "2 min 32 s",
        "2 cores of an Intel(R) Xeon(R) Processor",
    ]
    assert len(table) == 4 + len(list(report.RESULTS.glob("*/metrics.jsonl")))
    assert report.main(["--check"]) == 0
    readme.write_text("<!-- results -->\n")
    with pytest.raises(ValueError, match="needs its `<!-- end -->`"):
        report.main([])


def test_epochs_of_a_stopped_run():
    assert [report._epochs(66.0, 66), report._epochs(80.0, 110)] == ["66", "80 of 110"]


def test_seconds_of_a_run():
    rows = [
        {"kind": "train", "step": 10, "img_per_s": 20.0},
        {"kind": "eval", "step": 10, "seconds": 3.0},
        {"kind": "train", "step": 20, "img_per_s": 1.0, "seconds": 4.0},
    ]
    assert report.seconds_of(rows, batch_size=8) == 10 * 8 / 20.0 + 3.0 + 4.0


@pytest.mark.parametrize(("seconds", "text"), [(59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7260, "2 h 1 min")])
def test_durations(seconds, text):
    assert report.duration(seconds) == text


def test_accuracy_of_a_run_with_validation_images_is_that_of_eval(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "environment.json").write_text(
        json.dumps({"command": "python x train --config effnet_fast/recipes/quickstart.yaml --data_dir data --seed 1"})
    )
    row = {"kind": "eval", "epoch": 2, "step": 4, "top1": 10.0, "top5": 20.0, "loss": 3.0, "seconds": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    entry = report.runs(tmp_path)[0]
    assert (entry["epoch"], entry["top1"], entry["top5"]) == (2, 10.0, 20.0)
    average = row | {"ema_top1": 10.5, "ema_top5": 20.5}
    (run / "metrics.jsonl").write_text(json.dumps(average) + "\n")
    assert report.runs(tmp_path)[0]["top1"] == 10.5
    assert entry["command"] == "effnet-fast train --config effnet_fast/recipes/quickstart.yaml --seed 1"
    (run / "test-evaluation.json").write_text(json.dumps({"top1": 11.0, "top5": 21.0, "loss": 2.0}))
    entry = report.runs(tmp_path)[0]
    assert (entry["top1"], entry["top5"]) == (11.0, 21.0)


def test_report_renders_a_study(tmp_path):
    common = {"image_size": 32, "parameters": 4_100_000, "macs": 31_200_000, "seconds_mean": 600.0}
    none = {"depth": None, "width": None, "top1_std": None, "p_compound": None}
    rows = [
        {
            "model": "wider",
            "depth": 1,
            "width": 1.25,
            "seeds": 2,
            "top1_mean": 51.0,
            "top1_std": 0.5,
            "p_compound": 0.25,
        },
        {"model": "resnet50", "seeds": 1, "top1_mean": 40.0, **none},
        {"model": "densenet201", "seeds": 0, "top1_mean": None, **none},
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "study.csv").write_text(as_csv([row | common for row in rows]))
    (tmp_path / "run" / "study.json").write_text(json.dumps({"environment": harness.result("x", {}, [])["provenance"]}))
    _, _, wider, resnet = report.study(tmp_path).splitlines()
    assert wider.startswith("| wider | 1, 1.25 | 32 | 4.10 M | 31.2 M | 51.00 +- 0.50 % | 2 | 0.250 | 10 |")
    assert resnet.startswith("| resnet50 |  | 32 | 4.10 M | 31.2 M | 40.00 % | 1 |  | 10 |")


def test_report_renders_the_scores_of_maps(tmp_path):
    scores = ("top1", *SCORES[1:], "agreement")
    row = {"model": "wider", "images": 12} | {f"{name}_mean": 50 / 2**i for i, name in enumerate(scores)}
    (tmp_path / "run" / "maps").mkdir(parents=True)
    (tmp_path / "run" / "maps" / "summary.csv").write_text(as_csv([row]))
    values = "25.000 | 12.500 | 6.250 | 3.125 | 1.562 | 0.781 | 0.391"
    assert report.maps(tmp_path).splitlines()[-1] == f"| wider | 12 | 50 % | {values} |"


def test_report_renders_a_suite(tmp_path):
    scaled, kernels = harness.result("scaling", {}, []), harness.result("ops", {"dtype": "bfloat16"}, [])
    scaled["rows"] = [
        {"scaling": "weak", "ranks": 2, "batch a rank": 8, "img/s": 1234.5, "efficiency": 0.75, "communication": 0.25}
    ]
    about = {"op": "silu", "shape": "1x2", "direction": "forward", "share of copy": 0.8}
    kernels["rows"] = [
        about | {"path": path, "ms p20/p50/p80": [1, ms, 9]} for path, ms in (("triton", 2), ("eager", 3))
    ]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    suite, markers = tmp_path / "r" / "suite.json", "<!-- report.py: scaling -->\nold\n<!-- end -->\n"
    for gpu, expected in (("a GPU", "| weak | 2 x 8 | 1,234 | 75.0% | 25.0% | a GPU"), (None, "Not measured yet.")):
        for path, part in zip(files, (scaled, kernels), strict=True):
            part["provenance"]["gpu"] = gpu
            path.write_text(json.dumps(part | {"device": "cuda" if gpu else "cpu"}))
        report.main(["--merge", *map(str, [suite, *files, tmp_path / "gone.json"])])
        assert json.loads(suite.read_text())["missing"] == ["gone"]
        text = report.with_tables(markers, suite.parent)
        assert expected in text
        assert "old" not in text
        assert ("| silu | 1x2 | forward | 2.000 | 3.000 |  | 80% |" in report.ops(suite.parent)) == bool(gpu)
    with pytest.raises(ValueError, match="no table"):
        report.with_tables("<!-- report.py: nothing -->\n<!-- end -->")
