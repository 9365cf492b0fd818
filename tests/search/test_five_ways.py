"""Four ways to scale at equal cost."""

import re
from importlib import resources
from pathlib import Path

import pytest
import yaml

from effnet_fast.search import five_ways
from effnet_fast.search.family import Family, Scale

FAMILY = Family(num_classes=100, base_size=32, output_stride=16)


def test_paper_factors():
    assert {model.name: model.scale for model in five_ways.TABLE_7} == {
        "baseline": Scale(),
        "deeper": Scale(depth=4),
        "wider": Scale(width=2),
        "higher-resolution": Scale(resolution=2),
        "compound": Scale(1.4, 1.2, 1.3),
    }
    assert five_ways.TABLE_7[-1].label == "compound (d = 1.4, w = 1.2, r = 1.3)"


@pytest.mark.parametrize("target", [1e8, 1.3e8, 5e8, 2e9])
def test_four_models_of_equal_cost(target):
    models = five_ways.solve(FAMILY, target)
    assert [model.name for model in models] == ["deeper", "wider", "higher-resolution", "compound"]
    macs = [FAMILY.counts(model.scale).macs for model in models]
    assert max(macs) / min(macs) <= 1.05
    assert all(0.9 < cost / target < 1.1 for cost in macs)
    deeper, wider, higher, compound = (model.scale for model in models)
    assert (deeper.width, deeper.resolution, wider.depth, wider.resolution) == (1, 1, 1, 1)
    assert (higher.depth, higher.width) == (1, 1)
    assert min(compound.depth, compound.width, compound.resolution) > 1


@pytest.mark.parametrize(("recipe", "classes"), [("cifar100-study", 100), ("quick-study", 10)])
def test_target_of_a_recipe(recipe, classes):
    settings = yaml.safe_load((resources.files("effnet_fast.recipes") / f"{recipe}.yaml").read_text())
    family = Family(classes, settings["image_size"], settings["output_stride"])
    assert len(five_ways.solve(family, settings["target_flops"])) == 4


def test_targets_in_the_readme():
    """They are for CIFAR-100 with the default output stride."""
    text = (Path(__file__).parents[2] / "effnet_fast" / "search" / "README.md").read_text()
    targets = {float(target) for target in re.findall(r"\b\d\.?\d*e\d+\b", text.partition("## The scaling study")[2])}
    assert targets
    for target in targets:
        assert len(five_ways.solve(Family(100, 32, 8), target)) == 4


def test_target_below_baseline():
    with pytest.raises(ValueError, match="below the baseline's 32,094,592 MACs"):
        five_ways.solve(FAMILY, 1e7)


def test_target_without_models_advises_one_that_works():
    """At output stride 32 the final map of 32 px is one pixel; with one more input pixel it is four."""
    family = Family(100, 32, 32)
    with pytest.raises(ValueError, match="compound costs 12,820,000 or 31,559,824 and nothing between") as error:
        five_ways.solve(family, 2.5e7)
    (nearest,) = re.findall(r"use --target_flops (\S+),", str(error.value))
    assert len(five_ways.solve(family, float(nearest))) == 4
