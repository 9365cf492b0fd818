"""The second pass over a map walks back from where the first one ended; its results do not depend on the walk."""

from unittest import mock

import numpy as np
import pytest
import torch

from effnet_kernels import launch

if not launch.INTERPRETED:
    pytest.skip("loads are recorded in Triton's interpreter", allow_module_level=True)

from triton.runtime.interpreter import InterpreterBuilder

from effnet_kernels.depthwise_conv import ForwardLaunch
from effnet_kernels.launch import RowLaunch, launches_go_to, launches_used
from effnet_kernels.se_gate import ImageLaunch
from effnet_kernels.tuning import PARTS, Inputs, Layer

LAYER = Layer(3, 24, 5, 3, 1, 4)
ROWS, IMAGES = RowLaunch(16, 32, 80, 1), ImageLaunch(8, 32, 1)  # several tiles for each program
SPANS = ImageLaunch(4, 32, 1, 2)  # of 16 and 9 pixels
ONE_TILE = {ROWS: RowLaunch(128, 32, 128, 1), IMAGES: ImageLaunch(32, 32, 1), SPANS: ImageLaunch(32, 32, 1)}
SECOND = {"normalize": [ROWS], "grad apply": [ROWS], "excite": [IMAGES, SPANS], "apply sums": [IMAGES, SPANS]}
WAYS = [(name, way) for name, ways in SECOND.items() for way in ways]


def walk(name, way):
    """Where the tiles of x start that a part loads, in order."""
    part, tiles = PARTS[name], []
    load = InterpreterBuilder.create_masked_load

    def start(op, kernel, grid, *args, **options):
        x = dict(zip(kernel.arg_names, args, strict=False)).get("x_ptr")

        def noted(self, pointers, mask, *rest):
            addresses = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)].astype(np.int64)
            if x is not None and addresses.size and 0 <= addresses.min() - x.data_ptr() < x.numel() * x.element_size():
                tiles.append(int(addresses.min()) - x.data_ptr())
            return load(self, pointers, mask, *rest)

        with mock.patch.object(InterpreterBuilder, "create_masked_load", noted):
            kernel[grid](*args, **options)

    with launches_used({(name, part.sizes(LAYER)): way}), launches_go_to(start):
        part.make(Inputs(LAYER, torch.float32, torch.device("cpu")))()
    return tiles


FIRST = {"normalize": "statistics", "grad apply": "grad sums", "excite": "squeeze", "apply sums": "five sums"}


@pytest.mark.parametrize(("second", "way"), WAYS)
def test_the_second_pass_walks_back(second, way):
    forth, back = (walk(name, way) for name in (FIRST[second], second))
    assert len(forth) > 4
    assert way is SPANS or forth == sorted(forth)  # all images' first spans come first
    assert back == forth[::-1]


def test_the_depthwise_convolution_starts_with_the_last_image():
    """Where the statistics' pass ended."""
    image = LAYER.c * LAYER.size**2 * 4  # bytes
    one_image_a_program = ForwardLaunch(strip=LAYER.size, block_p=1, block_c=32, band=LAYER.size, num_warps=1)
    images = [tile // image for tile in walk("depthwise forward", one_image_a_program)]
    assert set(images) == set(range(LAYER.n))
    assert images == sorted(images, reverse=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_the_walk_does_not_change_a_bit(name, way, dtype):
    """A program with one tile has no order."""
    part = PARTS[name]
    call = part.make(Inputs(LAYER, dtype, torch.device("cpu")))
    results = []
    for each in (way, ONE_TILE[way]):
        with launches_used({(name, part.sizes(LAYER)): each}):
            results.append(call())
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["squeeze", "five sums"])
def test_spans_add_up(name):
    part = PARTS[name]
    call = part.make(Inputs(LAYER, torch.float32, torch.device("cpu")))
    results = []
    for each in (SPANS, ONE_TILE[SPANS]):
        with launches_used({(name, part.sizes(LAYER)): each}):
            results.append(call())
    assert results[0].shape == results[1].shape
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
