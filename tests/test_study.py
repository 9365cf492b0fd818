"""A study from end to end on a few images, and its failures."""

import csv
import gc
import json
import weakref

import pytest
from scipy.stats import ttest_rel

import effnet_fast
from command_line import mistake, run
from effnet_fast import checkpoint, cli
from effnet_fast.run import study as studying
from effnet_fast.run.training import Outcome
from examples import run_examples

TINY = (
    "study --dataset synthetic --output_stride 32 --limit_train 16 --limit_eval 20 --batch_size 8 --num_epochs 1 "
    "--loader resident --num_workers 1 --device cpu --resize_schedule 75%:0.5,100%"
)
NAMES = ["baseline", "deeper", "wider", "higher-resolution", "compound"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    run(f"{TINY} --save_dir {folder} --run_name done")
    return folder / "done"


def test_files_of_a_study(finished):
    with (finished / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == NAMES
    assert all(row["top1_mean"] for row in rows)
    for name in ("study.png", "study.svg", "curves.png", "curves.svg", "study.html"):
        assert (finished / name).stat().st_size > 1000


def test_index_points_to_checkpoints_of_the_paper_models(finished):
    models = json.loads((finished / "study.json").read_text())["models"]
    assert [model["name"] for model in models] == NAMES
    assert models[-1]["label"] == "compound (d = 1.4, w = 1.2, r = 1.3)"
    factors = []
    for model in models:
        assert model["checkpoint"] == f"{model['run']}/last.pt" == f"runs/{model['name']}-0/last.pt"
        trained_model = checkpoint.load(finished / model["checkpoint"])
        assert trained_model["config"]["resize_schedule"] == "75%:0.5,100%"
        architecture = trained_model["architecture"]
        factors.append([architecture[name] for name in ("depth", "width", "image_size", "output_stride")])
    assert factors == [[1, 1, 32, 32], [4, 1, 32, 32], [1, 2, 32, 32], [1, 1, 64, 32], [1.4, 1.2, 42, 32]]


def test_example_of_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples("study")


def test_study_from_python(finished):
    config = cli.parse(cli.VERBS["study"], "study", f"{TINY} --save_dir {finished.parent} --run_name done".split()[1:])
    result = effnet_fast.study(config)
    assert (result.status, result.folder) == (0, finished)
    assert [row["model"] for row in result.models] == NAMES
    assert all(row["top1_mean"] is not None for row in result.models)
    assert {run.result["split"] for run in result.runs} == {"test"}


def test_changed_settings_are_refused(finished, capsys):
    run(f"{TINY} --save_dir {finished.parent} --run_name done --learning_rate 0.2", expected=2)
    assert "learning_rate was 0.1, now 0.2" in capsys.readouterr().err


def fake_training(monkeypatch, behave):
    configs = []

    def train_in(world, config):
        configs.append(config)
        return behave(config)

    monkeypatch.setattr(studying, "train_in", train_in)
    monkeypatch.setattr(studying, "training_seconds", lambda *a: 1.0)
    return configs


def test_paired_test_against_compound_scaling(tmp_path, monkeypatch):
    """Accuracies by seed; the p-values are those of SciPy, times Holm's factors."""
    scores = {"deeper": (10.0, 15.0), "wider": (20.0, 20.5), "compound": (30.0, 31.0)}

    def behave(config):
        name, seed = config.run_name.rsplit("-", 1)
        return Outcome(0, True, {"split": "test", "loss": 1.0, "top1": scores.get(name, (5.0, 6.0))[int(seed)]})

    monkeypatch.setattr(studying, "_draw", lambda *a: None)
    fake_training(monkeypatch, behave)
    run(f"{TINY} --save_dir {tmp_path} --run_name tested --seeds 2")
    with (tmp_path / "tested" / "study.csv").open() as file:
        p_values = {row["model"]: row["p_compound"] for row in csv.DictReader(file)}
    assert p_values["baseline"] == p_values["compound"] == ""
    assert p_values["higher-resolution"] == "1.0", "equal differences say nothing"
    wider, deeper = (ttest_rel(scores["compound"], scores[name]).pvalue for name in ("wider", "deeper"))
    assert wider < deeper
    assert float(p_values["wider"]) == pytest.approx(3 * wider)
    assert float(p_values["deeper"]) == pytest.approx(2 * deeper)


def trained(config):
    return Outcome(0, True, {"split": "test", "loss": 1.0, "top1": 10.0, "top5": 20.0})


def test_equal_cost_with_two_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(studying, "_draw", lambda *a: None)
    configs = fake_training(monkeypatch, trained)
    run(f"{TINY} --output_stride 16 --save_dir {tmp_path} --run_name equal --target_flops 1e8 --seeds 2")
    models = json.loads((tmp_path / "equal" / "study.json").read_text())["models"]
    assert [(model["name"], model["seed"]) for model in models] == [(name, seed) for seed in (0, 1) for name in NAMES]
    costs = [model["macs"] for model in models if model["name"] != "baseline"]
    assert max(costs) / min(costs) <= 1.05
    assert all(0.95 < model["times_target"] < 1.05 for model in models if model["name"] != "baseline")
    assert {config.output_stride for config in configs} == {16}


def test_model_out_of_memory_is_recorded_and_the_rest_trained(tmp_path, monkeypatch):
    def behave(config):
        if config.depth == 4:
            raise MemoryError
        return trained(config)

    monkeypatch.setattr(studying, "_draw", lambda *a: None)
    fake_training(monkeypatch, behave)
    run(f"{TINY} --save_dir {tmp_path} --run_name full")
    with (tmp_path / "full" / "study.csv").open() as file:
        assert [row["failed"] for row in csv.DictReader(file)] == ["", "out of memory", "", "", ""]


def test_resume_after_a_signal(tmp_path, monkeypatch):
    monkeypatch.setattr(studying, "_draw", lambda *a: None)
    configs = fake_training(monkeypatch, lambda c: Outcome(130, False, {}) if c.width == 2 else trained(c))
    run(f"{TINY} --save_dir {tmp_path} --run_name stopped", expected=130)
    assert [config.run_name for config in configs] == ["baseline-0", "deeper-0", "wider-0"]
    resumed = fake_training(monkeypatch, trained)
    run(f"{TINY} --save_dir {tmp_path} --run_name stopped")
    assert [config.run_name for config in resumed] == ["wider-0", "higher-resolution-0", "compound-0"]
    index = (tmp_path / "stopped" / "study.json").read_bytes()
    run(f"{TINY} --save_dir {tmp_path} --run_name stopped")
    assert len(resumed) == 3
    assert (tmp_path / "stopped" / "study.json").read_bytes() == index, "nothing was trained"
    assert all("top1" in model for model in json.loads((tmp_path / "stopped" / "study.json").read_text())["models"])


def test_impossible_target_is_one_line(tmp_path, capsys):
    assert "below the baseline's 8,590,048 MACs" in mistake(capsys, f"{TINY} --save_dir {tmp_path} --target_flops 1e6")


def test_reference_models_are_trained_and_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(studying, "_draw", lambda *a: None)
    configs = fake_training(monkeypatch, trained)
    line = (
        f"{TINY} --save_dir {tmp_path} --run_name more --drop_path 0.1 --depthwise_init identity "
        "--references resnet50 --references DenseNet-201"
    )
    run(line)
    assert [(c.model, c.width, c.drop_path, c.image_size, c.depthwise_init) for c in configs[-3:]] == [
        ("efficientnet-b0", configs[-3].width, 0.1, configs[-3].image_size, "identity"),
        ("resnet50", None, None, 32, "default"),
        ("densenet201", None, None, 32, "default"),
    ]
    with (tmp_path / "more" / "study.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows) == [*NAMES, "resnet50", "densenet201"]
    assert rows["resnet50"]["parameters"] == "23705252"
    assert rows["densenet201"]["depth"] == ""


def test_unknown_reference_model(tmp_path, capsys):
    run(f"{TINY} --save_dir {tmp_path} --references resnet51", expected=2)
    assert "did you mean resnet50" in capsys.readouterr().err


def test_the_memory_of_a_run_is_free_before_the_next(monkeypatch, tmp_path):
    """Models are parts of reference cycles."""

    class Model:
        pass

    left = []

    def train(world, config, on_evaluation=None):
        model = Model()
        model.itself = model
        assert all(earlier() is None for earlier in left)
        left.append(weakref.ref(model))
        return Outcome(0, True, {"split": "test", "top1": 1.0, "loss": 1.0})

    monkeypatch.setattr(studying, "train_in", train)
    monkeypatch.setattr(studying, "training_seconds", lambda folder: 1.0)
    monkeypatch.setattr(studying, "_report", lambda *_: None)
    gc.disable()
    try:
        run(f"study --dataset synthetic --output_stride 32 --device cpu --save_dir {tmp_path}")
    finally:
        gc.enable()
    assert len(left) == 5
