"""Ways to scale at equal cost."""

import re

import pytest

from effnet_fast.search import five_ways
from effnet_fast.search.family import Family, Scale

FAMILY = Family(num_classes=100, base_size=32, output_stride=16)


def test_the_paper_s_factors():
    assert {member.name: member.scale for member in five_ways.TABLE_7} == {
        "baseline": Scale(),
        "deeper": Scale(depth=4),
        "wider": Scale(width=2),
        "higher-resolution": Scale(resolution=2),
        "compound": Scale(1.4, 1.2, 1.3),
    }
    assert five_ways.TABLE_7[-1].label == "compound (d = 1.4, w = 1.2, r = 1.3)"


@pytest.mark.parametrize("target", [1e8, 1.3e8, 5e8, 2e9])
def test_four_models_of_one_cost(target):
    members = five_ways.solve(FAMILY, target)
    assert [member.name for member in members] == ["deeper", "wider", "higher-resolution", "compound"]
    macs = [FAMILY.counts(member.scale).macs for member in members]
    assert max(macs) / min(macs) <= 1.05
    assert all(0.9 < cost / target < 1.1 for cost in macs)
    deeper, wider, higher, compound = (member.scale for member in members)
    assert (deeper.width, deeper.resolution, wider.depth, wider.resolution) == (1, 1, 1, 1)
    assert (higher.depth, higher.width) == (1, 1)
    assert min(compound.depth, compound.width, compound.resolution) > 1


def test_a_target_below_the_baseline_is_refused():
    with pytest.raises(ValueError, match="below the baseline's 32,094,592 MACs"):
        five_ways.solve(FAMILY, 1e7)


def test_a_target_that_pixels_cannot_meet_is_refused_with_one_that_they_can():
    """At stride 32 the final map of 32 px is one pixel, and one more pixel of the input makes it four."""
    family = Family(100, 32, 32)
    with pytest.raises(ValueError, match="compound can cost 12,820,000 or 31,559,824 and nothing between") as refused:
        five_ways.solve(family, 2.5e7)
    (near,) = re.findall(r"try --target_flops (\S+),", str(refused.value))
    assert len(five_ways.solve(family, float(near))) == 4
