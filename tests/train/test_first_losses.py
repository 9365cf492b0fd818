"""The first twenty losses of a run, exactly repeated and kept in the tree: nothing in the chain may drift unnoticed.

To renew the file after a change that means to move them:
PYTHONPATH=tests/shared TRITON_INTERPRET=1 python tests/train/test_first_losses.py
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from command_line import run

GOLDEN = Path(__file__).with_name("golden_first_losses.json")
RUN = (
    "train --dataset synthetic --limit_train 320 --limit_eval 16 --batch_size 16 --num_epochs 1 --output_stride 16 "
    "--width 0.5 --learning_rate 0.0005 --warmup_epochs 0 --mixup 0.2 --cutmix 1 --rotation 15 --color_jitter 0.2 "
    "--random_erasing 0.25 --loader resident --device cpu --log_every_steps 1"
)


def losses(folder, *names):
    """First losses of a run under each name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = []
    try:
        for name in names:
            run(f"{RUN} --save_dir {folder} --run_name {name}")
            rows = [json.loads(line) for line in (Path(folder) / name / "metrics.jsonl").read_text().splitlines()]
            found.append([row["loss"] for row in rows if row["kind"] == "train"])
    finally:
        torch.set_num_threads(threads)
    return found


def test_first_losses_repeat_and_equal_the_golden_ones(tmp_path):
    first, second = losses(tmp_path, "a", "b")
    assert first == second
    # The rounding of other processors' instructions moves the first six by 2e-5, and the later ones by up to 3e-3.
    golden = json.loads(GOLDEN.read_text())
    assert first[:6] == pytest.approx(golden[:6], abs=1e-4)
    assert first == pytest.approx(golden, abs=1e-2)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(losses(folder, "golden")[0], indent=1) + "\n")
