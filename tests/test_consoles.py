"""Progress bars on terminals and in notebooks, and lines elsewhere."""

import io

import pytest
from rich.console import Console
from rich.progress import BarColumn, TextColumn

from effnet_fast.consoles import line_console, progress_bar
from notebooks import run_cells

WIDGET = "application/vnd.jupyter.widget-view+json"

CELLS = [
    """
import contextlib, sys
from effnet_fast.consoles import line_console, progress_bar
from rich.progress import BarColumn
from effnet_fast.report.progress import Board
""",
    """
lines = line_console()
bar = progress_bar(lines, BarColumn())
with bar:
    task = bar.add_task("", total=2)
    bar.update(task, advance=1, refresh=True)
    lines.print("a line")
""",
    """
with open("log.txt", "w") as log, contextlib.redirect_stdout(log):
    lines = line_console()
    print(progress_bar(lines, BarColumn()))
    lines.print("a line of the log")
""",
    """
with Board(lambda: [], epochs=3) as board:
    board.say("a trial started")
""",
]


def test_a_file_gets_lines():
    assert progress_bar(line_console(io.StringIO()), BarColumn()) is None


def test_a_terminal_gets_a_bar_above_which_lines_are_printed():
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    with progress_bar(console, BarColumn(), TextColumn("{task.description}")) as bar:
        bar.update(bar.add_task("half", total=2), advance=1, refresh=True)
        console.print("a line")
    printed = console.file.getvalue()
    assert "half" in printed
    assert "a line" in printed


def execute(cells, folder):
    """Run cells in a kernel; returns the text and the number of widgets that each printed."""
    pytest.importorskip("ipywidgets")
    printed = run_cells(cells, folder)
    texts = ["".join(output.get("text", "") for output in outputs) for outputs in printed]
    return texts, [sum(WIDGET in output.get("data", {}) for output in outputs) for outputs in printed]


def test_a_notebook_gets_a_widget(tmp_path):
    """Beside lines in the cell's plain output; a log file gets its lines."""
    texts, widgets = execute(CELLS, tmp_path)
    assert widgets == [0, 1, 0, 1]
    assert texts == ["", "a line\n", "", ""]
    assert (tmp_path / "log.txt").read_text() == "None\na line of the log\n"


def test_a_notebook_without_ipywidgets_gets_lines(tmp_path):
    hidden = "import sys; sys.modules['ipywidgets'] = None"
    texts, widgets = execute([hidden, CELLS[0], "print(progress_bar(line_console(), BarColumn()))"], tmp_path)
    assert (texts, widgets) == (["", "", "None\n"], [0, 0, 0])


@pytest.mark.slow  # trains in a kernel
def test_training_in_a_notebook(tmp_path):
    train = """
import effnet_fast
result = effnet_fast.train(effnet_fast.TrainConfig(
    dataset="synthetic", image_size=16, width=0.25, depth=0.3, limit_train=64, limit_eval=32, batch_size=32,
    num_epochs=2, device="cpu", kernels="torch", log_every_steps=1, run_name="tiny",
))
"""
    mistake = """
try:
    effnet_fast.train(effnet_fast.TrainConfig(model="efficientnet-b8"))
except ValueError as error:
    print(error)
"""
    (first, second), widgets = execute([train, mistake], tmp_path)
    assert widgets == [1, 0]
    assert "epoch 2  test loss" in first
    assert "step 1/4" not in first, "the bar shows the steps"
    assert "did you mean efficientnet-b" in second


def test_names_are_printed_as_they_are():
    file = io.StringIO()
    line_console(file).print("photos[v2] :100: [/b]")
    assert file.getvalue() == "photos[v2] :100: [/b]\n"
