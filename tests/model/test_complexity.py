"""Costs of built models, compared with golden numbers, the paper and fvcore."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from effnet_fast.model import batch_norms, create_model
from effnet_fast.model.complexity import BF16, FP32, Complexity, complexity, costs_table, model_costs

pytest.importorskip("fvcore")

from fvcore.nn.jit_analysis import JitModelAnalysis
from fvcore.nn.jit_handles import conv_flop_jit, get_shape, linear_flop_jit

GOLDEN: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden_complexity.json").read_text())

# Tan and Le 2019, table 2 (MACs, which the paper calls FLOPS); parameters as the authors' code builds them.
PAPER = {
    "efficientnet-b0": (5_288_548, 0.39e9),
    "efficientnet-b1": (7_794_184, 0.70e9),
    "efficientnet-b2": (9_109_994, 1.0e9),
    "efficientnet-b3": (12_233_232, 1.8e9),
    "efficientnet-b4": (19_341_616, 4.2e9),
    "efficientnet-b5": (30_389_784, 9.9e9),
    "efficientnet-b6": (43_040_704, 19e9),
    "efficientnet-b7": (66_347_960, 37e9),
}

# MACs at 32 px and 100 classes by output stride, counted by hand to two or three digits.
SMALL_IMAGES = {
    "efficientnet-b0": {32: 8.5e6, 16: 32e6, 8: 116e6, 4: 407e6},
    "efficientnet-b4": {32: 34e6, 16: 126e6, 8: 471e6, 4: 1.69e9},
    "efficientnet-b7": {32: 117e6, 16: 433e6, 8: 1.65e9, 4: 5.9e9},
}


def row_id(row: dict[str, Any]) -> str:
    return f"{row['model'][-2:]}-{row['image_size']}px-stride{row['output_stride']}"


def counts_by_fvcore(model: nn.Module, image_size: int) -> Counter[str]:
    """MACs, elements read and elements written of one image, by fvcore, which traces the model on the CPU."""

    def counts(macs: float, inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        read, written = (math.prod(get_shape(value)) for value in (inputs[0], outputs[0]))
        return Counter(macs=int(macs), inputs_read=read, activations=written)

    def of_convolution(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        return counts(conv_flop_jit(inputs, outputs)["conv"], inputs, outputs)

    def of_linear(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        return counts(linear_flop_jit(inputs, outputs), inputs, outputs)

    analysis = JitModelAnalysis(model.eval(), torch.zeros(1, 3, image_size, image_size))
    analysis.set_op_handle("aten::_convolution", of_convolution, "aten::linear", of_linear)
    return analysis.unsupported_ops_warnings(False).by_operator()


def test_golden_covers_the_paper_and_small_images():
    covered = {(row["model"], row["image_size"], row["output_stride"]) for row in GOLDEN}
    sizes = dict(zip(PAPER, (224, 240, 260, 300, 380, 456, 528, 600), strict=True))
    assert covered == {(name, size, 32) for name, size in sizes.items()} | {
        (name, 32, stride) for name, strides in SMALL_IMAGES.items() for stride in strides
    }


@pytest.mark.parametrize("row", GOLDEN, ids=row_id)
def test_complexity_is_golden(row):
    described = model_costs(row["model"], row["num_classes"], row["image_size"], row["output_stride"])
    assert {key: described[key] for key in row} == row


@pytest.mark.parametrize("row", [row for row in GOLDEN if row["image_size"] > 32], ids=row_id)
def test_golden_agrees_with_the_paper(row):
    parameters, macs = PAPER[row["model"]]
    assert row["parameters"] == parameters
    assert row["macs"] == pytest.approx(macs, rel=0.06)


@pytest.mark.parametrize("row", [row for row in GOLDEN if row["image_size"] == 32], ids=row_id)
def test_golden_agrees_with_hand_counts_for_small_images(row):
    assert row["macs"] == pytest.approx(SMALL_IMAGES[row["model"]][row["output_stride"]], rel=0.02)
    assert row["final_map"][1:] == [32 // row["output_stride"]] * 2


@pytest.fixture(scope="module")
def b0() -> nn.Module:
    return create_model("efficientnet-b0", num_classes=100, image_size=32, kernels="torch")


@pytest.fixture(scope="module")
def b0_cost(b0) -> Complexity:
    return complexity(b0, 32)


@pytest.mark.parametrize(
    ("model", "settings"), [("efficientnet-b0", {"padding": "same"}), ("efficientnet-b0", {}), ("resnet50", {})]
)
def test_counts_equal_fvcores(model, settings):
    model = create_model(model, num_classes=10, image_size=33, **settings)
    cost = complexity(model, 33)
    counts = {"macs": cost.macs, "inputs_read": cost.inputs_read, "activations": cost.activations}
    assert counts == counts_by_fvcore(model, 33)


def test_saved_elements_equal_autograds(b0, b0_cost):
    """On CPU tensors: the difference between two batches leaves out what is saved once per batch."""

    def saved(batch_size: int) -> int:
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_floating_point():
                kept[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            b0.train()(torch.rand(batch_size, 3, 32, 32))
        return sum(tensor.numel() for tensor in kept.values())

    assert b0_cost.saved == saved(3) - saved(2)


def test_bytes_follow_the_documented_formulas(b0_cost):
    weights = 4 * b0_cost.parameters
    assert b0_cost.flops == 2 * b0_cost.macs
    assert b0_cost.state_bytes == 3 * weights
    assert (b0_cost.training_bytes_per_image(BF16), b0_cost.training_bytes_per_image(FP32)) == (
        2 * b0_cost.saved,
        4 * b0_cost.saved,
    )
    moved = 3 * b0_cost.inputs_read + 2 * b0_cost.activations
    assert b0_cost.minimum_step_bytes(64, BF16) == 64 * 2 * moved + 8 * weights


def test_complexity_does_not_change_the_model(b0):
    b0.train()
    before = {name: tensor.clone() for name, tensor in b0.state_dict().items()}
    complexity(b0, 32)
    assert b0.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in b0.state_dict().items())
    assert not any(module._forward_hooks for module in b0.modules())


def test_one_rank_can_count_alone(b0_cost, monkeypatch):
    model = create_model("efficientnet-b0")
    for norm in batch_norms(model):
        norm.synchronised = True
    monkeypatch.setattr("effnet_fast.distributed.world_size", lambda: 2)
    assert complexity(model, 32) == b0_cost


def test_complexity_is_silent(b0, caplog, capfd):
    complexity(b0, 32)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_same_padding_costs_the_same():
    symmetric = complexity(create_model("efficientnet-b0", output_stride=32), 33)
    same = complexity(create_model("efficientnet-b0", output_stride=32, padding="same"), 33)
    assert (same.parameters, same.macs, same.activations) == (
        symmetric.parameters,
        symmetric.macs,
        symmetric.activations,
    )


def test_model_costs_resolve_the_stride_and_fit_json():
    described = model_costs("efficientnet-b0", 10, 32, None)
    assert (described["output_stride"], described["final_map"]) == (8, [1280, 4, 4])
    assert json.loads(json.dumps(described)) == described


def test_unknown_model():
    with pytest.raises(ValueError, match="did you mean efficientnet-b1"):
        model_costs("efficientnet-b11", 100, 32, None)


@pytest.mark.parametrize("size", [32, 224])
def test_table_has_macs_and_flops_and_fits_80_columns(size):
    described = model_costs("efficientnet-b0", 100, size, None)
    lines = costs_table(described).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("MACs" in line and f"{described['macs']:,}" in line for line in lines)
    assert any("FLOPs" in line and f"{described['flops']:,}" in line for line in lines)


def test_table_of_the_largest_model_fits_80_columns():
    assert max(map(len, costs_table(model_costs("efficientnet-b7", 1000, 600, 32)).splitlines())) <= 80
