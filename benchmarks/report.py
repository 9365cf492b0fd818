"""Render the tables of benchmarks/results into the READMEs: `python benchmarks/report.py`.

A table stands in benchmarks/README.md between `<!-- report.py: NAME -->` and `<!-- end -->`, the short table of results
in README.md between `<!-- results -->` and `<!-- end -->`. `--check` only compares, with status 1 where a file is
out of date. `--merge OUT FILE...` joins the result files of a suite.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from effnet_fast.outcome import metric

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PROVENANCE = "machine, versions, commit"
FOLDERS = ("--data_dir", "--save_dir", "--run_name")
Result = dict[str, Any]


def results(kind: str, folder: Path = RESULTS) -> list[Result]:
    """Results of one benchmark, from single files and from suites, oldest first; suites run on a CPU are left out."""
    matches = []
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        if content["benchmark"] != "suite":
            matches.append(content)
        elif content["provenance"]["gpu"]:
            matches += content["parts"]
    return sorted((r for r in matches if r["benchmark"] == kind), key=lambda r: r["provenance"]["date"])


def machine(provenance: dict[str, Any]) -> str:
    """The GPU, or the CPU and its cores."""
    cores = provenance["cores"]
    return provenance["gpu"] or f"{cores} {'core' if cores == 1 else 'cores'} of an {provenance['cpu']}"


def origin(provenance: dict[str, Any], commits: Iterable[str | None] = ()) -> str:
    """Machine, driver, versions and commit of a result; `commits` where its parts ran at several."""
    parts = [machine(provenance)]
    if provenance["driver"]:
        parts.append(f"driver {provenance['driver']}")
    parts.append(f"torch {provenance['torch'].split('+')[0]}")
    if dali := provenance["nvidia-dali-cuda120"] or provenance.get("nvidia-dali-cuda130"):
        parts.append(f"DALI {dali}")
    names = dict.fromkeys(map(_short, commits)) or [_short(provenance["commit"])]
    return ", ".join([*parts, " and ".join(names)])


def _short(commit: str | None) -> str:
    """7 digits of a commit, with a plus if files had changed since."""
    return "?" if commit is None else commit[:7] + ("+" if commit.endswith("+") else "")


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, or "Not measured yet."."""
    if not rows:
        return "Not measured yet."
    head, *body = (f"| {' | '.join(cells)} |" for cells in [columns, *rows])
    return "\n".join([head, "|" + "---|" * len(columns), *body])


# -- training runs


def runs(folder: Path) -> list[dict[str, Any]]:
    """The kept training runs: recipe, settings, epochs, accuracy, seconds, provenance."""
    entries = []
    for path in sorted(folder.glob("*/metrics.jsonl")):
        provenance = json.loads((path.parent / "environment.json").read_text())
        arguments = shlex.split(provenance["command"])
        named = (arguments[arguments.index(flag) + 1] for flag in ("--config", "--recipe") if flag in arguments)
        recipe = next(named, path.parent.name)
        config = path.parent / "config.yaml"
        settings = yaml.safe_load((config if config.exists() else ROOT / recipe).read_text())
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        last = [line for line in lines if line["kind"] == "eval"][-1]
        until = [line for line in lines if line["step"] <= last["step"]]  # a stopped run has trained further
        entries.append(
            {
                "recipe": recipe,
                "command": _command(arguments),
                "settings": settings,
                "epoch": last["epoch"],
                **_accuracy(path.parent, last),
                "seconds": seconds_of(until, settings["batch_size"]),
                "provenance": provenance,
            }
        )
    return entries


def _command(arguments: list[str]) -> str:
    """The command without the folders of the machine that ran it."""
    if "train" not in arguments:  # a benchmark trained it
        return shlex.join(arguments)
    return shlex.join(["effnet-fast", "train", *_without_folders(arguments[arguments.index("train") + 1 :])])


def _without_folders(words: list[str]) -> Iterator[str]:
    """Leave out the flags in FOLDERS and their values, as `--flag value` or `--flag=value`."""
    remaining = iter(words)
    for word in remaining:
        flag, equals, _ = word.partition("=")
        if flag not in FOLDERS:
            yield word
        elif not equals:
            next(remaining, None)


def _accuracy(folder: Path, last: dict[str, float]) -> dict[str, float]:
    """top1 and top5: of `effnet-fast eval` if the run held out validation images, else of the last evaluation."""
    path = folder / "test-evaluation.json"
    if path.exists():
        last = json.loads(path.read_text())
    return {name: metric(last, name) for name in ("top1", "top5")}


def seconds_of(lines: list[dict], batch_size: int) -> float:
    """Seconds of training, waiting for data included, and of evaluation."""
    total, before = 0.0, 0
    for line in lines:
        if "seconds" in line:
            total += line["seconds"]
        else:  # rows of older runs have no seconds
            total += (line["step"] - before) * batch_size / line["img_per_s"]
        if line["kind"] == "train":
            before = line["step"]
    return total


def duration(seconds: float) -> str:
    """As `1 min 49 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def summary(folder: Path = RESULTS) -> str:
    """The README's short table: recipe, epochs, accuracy, time, machine."""
    rows = [
        [
            Path(run["recipe"]).stem,
            f"{run['settings'].get('model', 'efficientnet-b0')} on {run['settings']['dataset']}",
            _epochs(run["epoch"], run["settings"]["num_epochs"]),
            f"{run['top1']:.2f} %",
            duration(run["seconds"]),
            machine(run["provenance"]),
        ]
        for run in runs(folder)
    ]
    return table(["recipe", "what", "epochs", "top-1", "time", "machine"], rows)


def training(folder: Path = RESULTS) -> str:
    """The kept runs in full."""
    rows = []
    for run in runs(folder):
        settings = run["settings"]
        model = f"{settings.get('model', 'efficientnet-b0')}, output stride {settings['output_stride']}"
        rows.append(
            [
                f"{settings['dataset']}, {model}",
                f"`{run['command']}`",
                _epochs(run["epoch"], settings["num_epochs"]),
                f"{run['top1']:.2f} %",
                f"{run['top5']:.2f} %",
                duration(run["seconds"]),
                origin(run["provenance"]),
            ]
        )
    return table(["run, test images", "command", "epochs", "top-1", "top-5", "time", PROVENANCE], rows)


def _epochs(done: float, planned: int) -> str:
    """Epochs of a run, and of how many if it was stopped before."""
    return f"{done:g} of {planned}" if done < planned else f"{done:g}"


def csv_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a table that effnet-fast wrote."""
    with path.open() as file:
        return list(csv.DictReader(file))


def study(folder: Path = RESULTS) -> str:
    """The scaling studies: cost and test top-1 of each model, and the paired test against compound scaling."""
    rows = []
    for path in sorted(folder.glob("*/study.csv")):
        models = [row for row in csv_rows(path) if row["top1_mean"]]
        environment = json.loads(path.with_name("study.json").read_text())["environment"]
        for row in models:
            folders = path.parent.glob(f"runs/{row['model']}-*")
            commits = [json.loads((run / "environment.json").read_text())["commit"] for run in sorted(folders)]
            spread = f" +- {float(row['top1_std']):.2f}" if row["top1_std"] else ""
            cost = [row["image_size"], f"{int(row['parameters']) / 1e6:.2f} M", f"{int(row['macs']) / 1e6:.1f} M"]
            p_value = f"{float(row['p_compound']):.3f}" if row["p_compound"] else ""
            scale = f"{float(row['depth']):.4g}, {float(row['width']):.4g}" if row["depth"] else ""
            top1 = f"{float(row['top1_mean']):.2f}{spread} %"
            minutes = f"{float(row['seconds_mean']) / 60:.0f}"
            rows.append(
                [row["model"], scale, *cost, top1, row["seeds"], p_value, minutes, origin(environment, commits)]
            )
    columns = ["model", "depth, width", "px", "parameters", "MACs", "test top-1", "seeds", "p against compound", "min"]
    return table([*columns, PROVENANCE], rows)


def maps(folder: Path = RESULTS) -> str:
    """Mean scores of the class activation maps of a study's models."""
    scores = {
        "top 10 % of pixels hold": "energy_top10",
        "entropy": "entropy",
        "deletion": "deletion",
        "deletion, random": "deletion_random",
        "insertion": "insertion",
        "insertion, random": "insertion_random",
        "agreement with the others": "agreement",
    }
    rows = []
    for path in sorted(folder.glob("*/maps/summary.csv")):
        for row in csv_rows(path):
            means = [f"{float(row[f'{score}_mean']):.3f}" for score in scores.values()]
            rows.append([row["model"], row["images"], f"{float(row['top1_mean']):.0f} %", *means])
    return table(["model", "images", "right", *scores], rows)


# -- results of the scripts


def throughput(folder: Path = RESULTS) -> str:
    """Rates and ratios of every throughput result."""
    rows = []
    for content in results("throughput", folder):
        s = content["settings"]
        case = f"{s['model']} {s['image_size']} px, stride {s['output_stride']}, batch {s['batch_size']}, {s['dtype']}"
        if content["device"] == "cpu":
            case += f", {content['threads']} CPU threads"
        for row in content["rows"]:
            version = s["peers"].get(row["library"])
            library = f"{row['library']} {version}" if version else row["library"]
            low, middle, high = row["time over ours"]
            rows.append(
                [
                    case,
                    row["direction"],
                    f"{library}, {row['step']}",
                    f"{row['img/s'][1]:,.0f}",
                    f"{middle:.2f} ({low:.2f} to {high:.2f})",
                    f"{row['kernel ms']:.1f}" if "kernel ms" in row else "",
                    f"{row['memory']['MiB']:.0f}" if "memory" in row else "",
                    origin(content["provenance"]),
                ]
            )
    ratio = "its time over ours, p50 (p20 to p80)"
    names = ["case", "direction", "library, step", "img/s", ratio, "its GPU kernels, ms", "peak MiB", PROVENANCE]
    return table(names, rows)


def loader(folder: Path = RESULTS) -> str:
    """Rates of the loaders, and their share of the training step."""
    rows = []
    for content in results("loader", folder):
        s = content["settings"]
        for row in content["rows"]:
            share = f"{row['share of step']:.1%} of {s['step_rate']:,.0f} img/s"
            case = f"batch {s['batch_size']}, output stride {s['output_stride']}"
            rows.append([row["loader"], f"{row['img/s'][1]:,.0f}", share, case, origin(content["provenance"])])
    return table(["loader", "img/s", "share of the step", "case", PROVENANCE], rows)


def time_to_accuracy(folder: Path = RESULTS) -> str:
    """Mean and standard deviation of the seconds to a top-1."""
    rows = []
    for content in results("time_to_accuracy", folder):
        s = content["settings"]
        compiling = max(row["compile s"] for row in content["rows"])
        recipe = " ".join([s["recipe"], *([f"as {s['candidate']}"] if s["candidate"] else []), *s["changes"]])
        for goal in s["summary"]:
            seconds = f"reached by {goal['reached']}"
            if "mean s" in goal:
                spread = f" +- {goal['standard deviation s']:.1f}" if goal["seeds"] > 1 else ""
                seconds = f"{goal['mean s']:.1f}{spread}"
            cells = [recipe, f"{goal['target']:g} %", seconds, f"{compiling:.1f}", str(goal["seeds"])]
            rows.append([*cells, origin(content["provenance"], (row.get("commit") for row in content["rows"]))])
    return table(["recipe", "top-1", "seconds", "compiling, s", "seeds", PROVENANCE], rows)


def choose_recipe(folder: Path = RESULTS) -> str:
    """Training options at equal time: mean and standard deviation of top-1 over the seeds, and the paired test."""
    rows = []
    for content in results("choose_recipe", folder):
        settings = content["settings"]
        recipe = " ".join([settings["recipe"], *settings["changes"]])
        for row in content["rows"]:
            if len(row["scores"]) < 2:
                continue
            top1 = f"{statistics.mean(row['scores']):.2f} +- {statistics.stdev(row['scores']):.2f} %"
            test = ["", "", ""] if row["p"] is None else [row["against"], f"{row['gain']:+.2f}", f"{row['p']:.3f}"]
            seconds = f"{statistics.mean(row['seconds']):.0f}"
            cells = [row["candidate"], top1, str(len(row["scores"])), str(row["epochs"]), seconds, *test]
            rows.append([recipe, *cells, origin(content["provenance"], row.get("commits", ()))])
    columns = ["recipe", "candidate", "val top-1", "seeds", "epochs", "s", "against", "gain", "p", PROVENANCE]
    return table(columns, rows)


def scaling(folder: Path = RESULTS) -> str:
    """Efficiency over ranks."""
    rows = [
        [
            row["scaling"],
            f"{row['ranks']} x {row['batch a rank']}",
            f"{row['img/s']:,.0f}",
            f"{row['efficiency']:.1%}",
            f"{row['communication']:.1%}",
            origin(content["provenance"]),
        ]
        for content in results("scaling", folder)
        for row in content["rows"]
    ]
    return table(["scaling", "ranks x batch", "img/s", "efficiency", "communication", PROVENANCE], rows)


def step_profile(folder: Path = RESULTS) -> str:
    """Where the time of a profiled step goes."""
    rows = []
    for content in results("step_profile", folder):
        s = content["settings"]
        case = f"{s['model']} {s['image_size']} px, stride {s['output_stride']}, batch {s['batch_size']}, {s['step']}"
        shares = ", ".join(f"{row['category']} {row['share']:.0%}" for row in content["rows"])
        rows.append([case, shares, origin(content["provenance"])])
    return table(["step", "share of the time, profiled", PROVENANCE], rows)


def step_cost(folder: Path = RESULTS) -> str:
    """A step's milliseconds along batch, resolution, width and threads, beside the floor."""
    rows = []
    for content in results("step_cost", folder):
        for row in content["rows"]:
            times = f"{row['ms p50']:.0f} ({row['ms p20']:.0f} to {row['ms p80']:.0f})"
            over = f"{row['ms p50'] / row['floor ms']:.1f}"
            cells = [f"{row['axis']} {row['value']:g}", times, f"{row['floor ms']:.0f}", over]
            rows.append([*cells, origin(content["provenance"])])
    return table(["case", "ms, p50 (p20 to p80)", "floor, ms", "over the floor", PROVENANCE], rows)


def crowd(folder: Path = RESULTS) -> str:
    """Two trainings at once, by waiting policy."""
    rows = [[*row.values(), origin(content["provenance"])] for content in results("crowd", folder)
            for row in content["rows"]]  # fmt: skip
    columns = ["policy", "alone, img/s", "together, img/s each", "alone over libgomp's", "together over 1 thread's"]
    return table([*columns, PROVENANCE], rows)


def pointwise(folder: Path = RESULTS) -> str:
    """Per 1x1 convolution, the convolution's time over the matrix product's."""
    rows = []
    for content in results("pointwise", folder):
        ms = {(row["layer"], row["result"], row["way"]): row["ms"][1] for row in content["rows"] if "ms" in row}
        for layer in dict.fromkeys(layer for layer, _, _ in ms):
            ratios = [
                f"{ms[layer, what, 'convolution'] / ms[layer, what, 'product']:.2f}"
                if (layer, what, "product") in ms
                else ""
                for what in ("y", "dx", "dw")
            ]
            rows.append([layer, *ratios, content["settings"]["dtype"], origin(content["provenance"])])
    return table(["layer", "y", "dx", "dw", "type", PROVENANCE], rows)


def ops(folder: Path = RESULTS) -> str:
    """The Triton kernels beside PyTorch's operators; results of Triton's interpreter are left out."""
    rows = []
    for content in results("ops", folder):
        paths: dict[tuple[str, str, str], dict[str, Any]] = {}
        for row in content["rows"]:
            if content["device"] == "cuda" and "wrong by" not in row:
                paths.setdefault((row["op"], row["shape"], row["direction"]), {})[row["path"]] = row
        for names, by_path in paths.items():
            ms = [
                f"{by_path[path]['ms p20/p50/p80'][1]:.3f}" if path in by_path else ""
                for path in ("triton", "eager", "compiled")
            ]
            share = f"{by_path['triton']['share of copy']:.0%}" if "triton" in by_path else ""
            rows.append([*names, *ms, share, content["settings"]["dtype"], origin(content["provenance"])])
    times = ["Triton, ms", "eager, ms", "compiled, ms", "share of copy bandwidth"]
    return table(["op", "shape", "direction", *times, "type", PROVENANCE], rows)


TABLES = {
    "training": training,
    "study": study,
    "maps": maps,
    "throughput": throughput,
    "loader": loader,
    "scaling": scaling,
    "time_to_accuracy": time_to_accuracy,
    "choose_recipe": choose_recipe,
    "step_profile": step_profile,
    "step_cost": step_cost,
    "crowd": crowd,
    "pointwise": pointwise,
    "ops": ops,
}


# -- files


def with_tables(text: str, folder: Path = RESULTS) -> str:
    """The text with every `<!-- report.py: NAME -->` table rendered.

    Raises:
        ValueError: a marker names no table, or has no end.
    """
    if text.count("<!-- report.py: ") != text.count("<!-- end -->"):
        raise ValueError("each `<!-- report.py: NAME -->` needs its own `<!-- end -->`")

    def fill(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"there is no table {match[2]!r}; the tables are {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[match[2]](folder)}\n<!-- end -->"

    return re.sub(r"(<!-- report\.py: (\w+) -->)\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def with_summary(text: str, folder: Path = RESULTS) -> str:
    """The text with the short table rendered after `<!-- results -->`, if it has that marker.

    Raises:
        ValueError: the marker has no end.
    """
    before, marker, rest = text.partition("<!-- results -->\n")
    if not marker:
        return text
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        raise ValueError("`<!-- results -->` needs its `<!-- end -->`")
    return f"{before}{marker}{summary(folder)}\n{end}{after}"


READMES: dict[Path, Callable[[str], str]] = {
    ROOT / "benchmarks" / "README.md": with_tables,
    ROOT / "README.md": with_summary,
}


def merge(out: Path, files: list[Path]) -> None:
    """Join result files into one suite, which lists the missing ones.

    Raises:
        ValueError: no file exists.
    """
    parts = [json.loads(path.read_text()) for path in files if path.exists()]
    if not parts:
        raise ValueError("no benchmark of the suite left a result")
    missing = [path.stem for path in files if not path.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    suite = {"benchmark": "suite", "provenance": parts[0]["provenance"], "missing": missing, "parts": parts}
    whole = out.with_name(f"{out.name}.part")
    whole.write_text(json.dumps(suite, indent=1) + "\n")
    whole.replace(out)
    print(f"written: {out}" + (f"; missing: {', '.join(missing)}" if missing else ""))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a file is out of date")
    parser.add_argument("--merge", type=Path, nargs="+", metavar=("OUT", "FILE"), help="join result files")
    args = parser.parse_args(argv)
    if args.merge:
        merge(args.merge[0], args.merge[1:])
        return 0
    status = 0
    for path, render in READMES.items():
        before = path.read_text()
        after = render(before)
        if after == before:
            continue
        if args.check:
            print(f"{path} is out of date: run python benchmarks/report.py")
            status = 1
        else:
            path.write_text(after)
            print(f"written: {path}")
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
