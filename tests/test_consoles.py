"""Progress bars on terminals and in notebooks, and lines elsewhere."""

import io

import pytest
from rich.console import Console
from rich.progress import BarColumn, TextColumn

from effnet_fast.consoles import line_console, progress_bar

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


@pytest.mark.parametrize("has_widgets", [True, False])
def test_a_notebook_gets_a_widget(tmp_path, monkeypatch, has_widgets):
    """Beside lines in the cell's plain output; a log file gets its lines."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipywidgets")
    cells = (
        CELLS
        if has_widgets
        else [
            "import sys; sys.modules['ipywidgets'] = None",
            CELLS[0],
            "print(progress_bar(line_console(), BarColumn()))",
        ]
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources).execute()
    texts = [[output["text"] for output in cell.outputs if output.output_type == "stream"] for cell in notebook.cells]
    widgets = [
        sum("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in cell.outputs)
        for cell in notebook.cells
    ]
    if not has_widgets:
        assert (texts, widgets) == ([[], [], ["None\n"]], [0, 0, 0])
        return
    assert widgets == [0, 1, 0, 1]
    assert texts == [[], ["a line\n"], [], []]
    assert (tmp_path / "log.txt").read_text() == "None\na line of the log\n"
