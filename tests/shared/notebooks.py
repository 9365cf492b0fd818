"""Running a notebook's cells in a Jupyter kernel."""

import pytest

CELL_SECONDS = 1800


def run_cells(cells, folder):
    """Run sources in a kernel in `folder`; returns a list of outputs, {"text": ...} or {"data": ...}, for each.

    The client blocks. nbclient's, on asyncio, at times misses a reply that has come, and waits for ever.
    """
    pytest.importorskip("ipykernel")
    manager, client = pytest.importorskip("jupyter_client").manager.start_new_kernel(cwd=str(folder))
    try:
        return [_run_cell(client, cell) for cell in cells]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def _run_cell(client, cell):
    messages = []
    reply = client.execute_interactive(cell, timeout=CELL_SECONDS, output_hook=messages.append)
    assert reply["content"]["status"] == "ok", reply["content"]
    return [message["content"] for message in messages]
