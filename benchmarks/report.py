"""Render the README's tables from benchmarks/results: `python benchmarks/report.py` writes them, `--check` compares.

Each stands between `<!-- report.py: NAME -->` and `<!-- end -->`, so no figure is typed by hand. `--merge OUT FILE...`
joins result files into one suite.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Result = dict[str, Any]


def results(kind: str, folder: Path = RESULTS) -> list[Result]:
    """Results of a kind, each file's and each suite's parts, oldest first; a suite's smoke form shows nothing."""
    found = []
    for path in folder.glob("*.json"):
        made = json.loads(path.read_text())
        if made["benchmark"] != "suite":
            found.append(made)
        elif made["provenance"]["gpu"]:
            found += made["parts"]
    return sorted((r for r in found if r["benchmark"] == kind), key=lambda r: r["provenance"]["date"])


def machine(provenance: dict[str, Any]) -> str:
    """Where and with what a result was measured."""
    where = provenance["gpu"] or f"{provenance['cores']} cores of an {provenance['cpu']}"
    driver = f", driver {provenance['driver']}" if provenance["driver"] else ""
    dali = f", DALI {provenance['nvidia-dali-cuda120']}" if provenance["nvidia-dali-cuda120"] else ""
    return f"{where}{driver}, torch {provenance['torch'].split('+')[0]}{dali}, {(provenance['commit'] or '?')[:7]}"


def table(head: str, rows: list[str]) -> str:
    """A Markdown table, or a line that says that nothing was measured."""
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *rows]) if rows else "Not measured yet."


def training(folder: Path = RESULTS) -> str:
    """The runs whose rows and environment are kept, with the figures of their last evaluation."""
    rows = []
    for path in sorted(folder.glob("*/metrics.jsonl")):
        about = json.loads((path.parent / "environment.json").read_text())
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        last = [line for line in lines if line["kind"] == "eval"][-1]
        settings = yaml.safe_load((ROOT / _recipe(about["command"])).read_text())
        minutes, seconds = divmod(round(_seconds(lines, settings["batch_size"])), 60)
        what = f"{settings['dataset']}, {settings.get('model', 'efficientnet-b0')}, output stride"
        rows.append(
            f"| {what} {settings['output_stride']} | `effnet-fast train --config {_recipe(about['command'])}` "
            f"| {last['epoch']:g} | {last['top1']:.2f} % | {last['top5']:.2f} % | {minutes} min {seconds} s "
            f"| {machine(about)} |"
        )
    return table("| run, test images | command | epochs | top-1 | top-5 | time | machine, versions, commit |", rows)


def _recipe(command: str) -> str:
    words = shlex.split(command)
    return words[words.index("--config") + 1]


def _seconds(lines: list[dict], batch_size: int) -> float:
    """Of training, with its waiting for data, and of evaluations."""
    total, before = 0.0, 0
    for line in lines:
        if line["kind"] == "eval":
            total += line["seconds"]
        else:
            total += (line["step"] - before) * batch_size / line["img_per_s"]
            before = line["step"]
    return total


def throughput(folder: Path = RESULTS) -> str:
    """Rates and ratios of every throughput result."""
    rows = []
    for made in results("throughput", folder):
        s = made["settings"]
        case = f"{s['model']} {s['image_size']} px, stride {s['output_stride']}, batch {s['batch_size']}, {s['dtype']}"
        for row in made["rows"]:
            version = s["peers"].get(row["library"])
            library = f"{row['library']} {version}" if version else row["library"]
            low, middle, high = row["time over ours"]
            memory = f"{row['memory']['MiB']:.0f}" if "memory" in row else ""
            rows.append(
                f"| {case} | {row['direction']} | {library}, {row['step']} | {row['img/s'][1]:,.0f} "
                f"| {middle:.2f} ({low:.2f} to {high:.2f}) | {memory} | {machine(made['provenance'])} |"
            )
    ratio = "its time over ours, p50 (p20 to p80)"
    return table(f"| case | | library, step | img/s | {ratio} | peak MiB | machine, versions, commit |", rows)


def loader(folder: Path = RESULTS) -> str:
    """Rates of the loaders, and their share of the training step."""
    rows = []
    for made in results("loader", folder):
        s = made["settings"]
        for row in made["rows"]:
            rows.append(
                f"| {row['loader']} | {row['img/s'][1]:,.0f} "
                f"| {row['share of step']:.1%} of {s['step_rate']:,.0f} img/s "
                f"| batch {s['batch_size']}, output stride {s['output_stride']} | {machine(made['provenance'])} |"
            )
    return table("| loader | img/s | share of the step | case | machine, versions, commit |", rows)


def time_to_accuracy(folder: Path = RESULTS) -> str:
    """Mean and spread of the seconds to a top-1."""
    rows = []
    for made in results("time_to_accuracy", folder):
        s = made["settings"]
        compiling = max(row["compile s"] for row in made["rows"])
        recipe = " ".join([s["recipe"], *s["changes"]])
        for goal in s["summary"]:
            seconds = f"reached by {goal['reached']}"
            if "mean s" in goal:
                seconds = f"{goal['mean s']:.1f} +- {goal['standard deviation s']:.1f}"
            rows.append(
                f"| {recipe} | {goal['target']:g} % | {seconds} | {compiling:.1f} | {goal['seeds']} "
                f"| {machine(made['provenance'])} |"
            )
    return table("| recipe | top-1 | seconds | compiling, s | seeds | machine, versions, commit |", rows)


def scaling(folder: Path = RESULTS) -> str:
    """Efficiency over ranks."""
    rows = [
        f"| {row['scaling']} | {row['ranks']} x {row['batch a rank']} | {row['img/s']:,.0f} | {row['efficiency']:.1%} "
        f"| {row['communication']:.1%} | {machine(made['provenance'])} |"
        for made in results("scaling", folder)
        for row in made["rows"]
    ]
    return table("| scaling | ranks x batch | img/s | efficiency | communication | machine, versions, commit |", rows)


def step_profile(folder: Path = RESULTS) -> str:
    """Where the time of a profiled step goes."""
    rows = []
    for made in results("step_profile", folder):
        s = made["settings"]
        shares = ", ".join(f"{row['category']} {row['share']:.0%}" for row in made["rows"])
        what = f"{s['model']} {s['image_size']} px, stride {s['output_stride']}, batch {s['batch_size']}, {s['step']}"
        rows.append(f"| {what} | {shares} | {machine(made['provenance'])} |")
    return table("| step | share of the time, profiled | machine, versions, commit |", rows)


def ops(folder: Path = RESULTS) -> str:
    """The Triton kernels beside PyTorch; on the CPU they run in an interpreter, whose times say nothing."""
    rows = []
    for made in results("ops", folder):
        paths: dict[tuple[str, str, str], dict[str, Any]] = {}
        for row in made["rows"]:
            if made["device"] == "cuda" and "wrong by" not in row:
                paths.setdefault((row["op"], row["shape"], row["direction"]), {})[row["path"]] = row
        for names, found in paths.items():
            ms = [f"{found[p]['ms p20/p50/p80'][1]:.3f}" if p in found else "" for p in ("triton", "eager", "compiled")]
            share = f"{found['triton']['share of copy']:.0%}" if "triton" in found else ""
            cells = [*names, *ms, share, made["settings"]["dtype"], machine(made["provenance"])]
            rows.append(f"| {' | '.join(cells)} |")
    times = "Triton, ms | eager, ms | compiled, ms | share of copy bandwidth"
    return table(f"| op | shape | | {times} | type | machine, versions, commit |", rows)


TABLES = {
    "training": training,
    "throughput": throughput,
    "loader": loader,
    "scaling": scaling,
    "time_to_accuracy": time_to_accuracy,
    "step_profile": step_profile,
    "ops": ops,
}


def rendered(text: str, folder: Path = RESULTS) -> str:
    """The text with every table written anew.

    Raises:
        ValueError: a marker names no table, or lacks its end.
    """
    if text.count("<!-- report.py: ") != text.count("<!-- end -->"):
        raise ValueError("a `<!-- report.py: NAME -->` lacks its `<!-- end -->`")

    def fill(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"no table is called {match[2]!r}; there are {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[match[2]](folder)}\n<!-- end -->"

    return re.sub(r"(<!-- report\.py: (\w+) -->)\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def merge(out: Path, files: list[Path]) -> None:
    """Join results into one suite; what a part that failed left out is named."""
    parts = [json.loads(path.read_text()) for path in files if path.exists()]
    if not parts:
        raise ValueError("no benchmark of the suite left a result")
    missing = [path.stem for path in files if not path.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    suite = {"benchmark": "suite", "provenance": parts[0]["provenance"], "missing": missing, "parts": parts}
    out.write_text(json.dumps(suite, indent=1) + "\n")
    print(f"written: {out}" + (f"; missing: {', '.join(missing)}" if missing else ""))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="say whether it is up to date, and write nothing")
    parser.add_argument("--merge", type=Path, nargs="+", metavar=("OUT", "FILE"), help="join result files")
    args = parser.parse_args(argv)
    if args.merge:
        merge(args.merge[0], args.merge[1:])
        return 0
    before = args.readme.read_text()
    after = rendered(before)
    if args.check:
        print("up to date" if after == before else f"{args.readme} differs: run python benchmarks/report.py")
        return int(after != before)
    args.readme.write_text(after)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
