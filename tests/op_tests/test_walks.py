"""The second pass over a map walks back from where the first one ended; its results do not depend on the walk."""

from unittest import mock

import numpy as np
import pytest
import torch

from effnet_kernels import launch

if not launch.INTERPRETED:
    pytest.skip("loads are recorded in Triton's interpreter", allow_module_level=True)

from triton.runtime.interpreter import InterpreterBuilder

from effnet_kernels.launch import RowLaunch, launches_go_to, launches_used
from effnet_kernels.se_gate import ImageLaunch
from effnet_kernels.tuning import PARTS, Inputs, Layer

LAYER = Layer(3, 24, 5, 3, 1, 4)
ROWS, IMAGES = RowLaunch(16, 32, 80, 1), ImageLaunch(8, 32, 1)  # several tiles for each program
ONE_TILE = {ROWS: RowLaunch(128, 32, 128, 1), IMAGES: ImageLaunch(32, 32, 1)}
SECOND = {"normalize": ROWS, "grad apply": ROWS, "excite": IMAGES, "apply sums": IMAGES}


def walk(name, way):
    """Where the tiles of x start that a part loads, in order."""
    part, tiles = PARTS[name], []
    load = InterpreterBuilder.create_masked_load

    def start(op, kernel, grid, *args, **options):
        x = dict(zip(kernel.arg_names, args, strict=False)).get("x_ptr")

        def noted(self, pointers, mask, *rest):
            addresses = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)].astype(np.int64)
            if x is not None and 0 <= addresses.min() - x.data_ptr() < x.numel() * x.element_size():
                tiles.append(int(addresses.min()) - x.data_ptr())
            return load(self, pointers, mask, *rest)

        with mock.patch.object(InterpreterBuilder, "create_masked_load", noted):
            kernel[grid](*args, **options)

    with launches_used({(name, part.sizes(LAYER)): way}), launches_go_to(start):
        part.make(Inputs(LAYER, torch.float32, torch.device("cpu")))()
    return tiles


@pytest.mark.parametrize(
    ("first", "second"),
    [("statistics", "normalize"), ("grad sums", "grad apply"), ("squeeze", "excite"), ("five sums", "apply sums")],
)
def test_the_second_pass_walks_back(first, second):
    forth, back = (walk(name, SECOND[second]) for name in (first, second))
    assert len(forth) > 4
    assert forth == sorted(forth)
    assert back == forth[::-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", SECOND)
def test_the_walk_does_not_change_a_bit(name, dtype):
    """A program with one tile has no order."""
    part = PARTS[name]
    call = part.make(Inputs(LAYER, dtype, torch.device("cpu")))
    results = []
    for way in (SECOND[name], ONE_TILE[SECOND[name]]):
        with launches_used({(name, part.sizes(LAYER)): way}):
            results.append(call())
    assert torch.equal(*results)
