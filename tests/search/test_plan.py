"""Candidates: the grid, its bounds, rounding, limits."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effnet_fast.config import SearchConfig, span
from effnet_fast.model.scaling import PAPER_FACTORS
from effnet_fast.search.family import Family, Scale
from effnet_fast.search.plan import Grid, Limits, Workload, candidates, largest_phi, product

FAMILY = Family(num_classes=100, base_size=32, output_stride=32)
WORKLOAD = Workload(batch_size=64, element_bytes=4, baseline_ms=100.0)
PAPER = [PAPER_FACTORS]


def grid(alpha=(1.0, 1.5), beta=(1.0, 1.3), gamma=(1.0, 1.3), step=0.05, within=(1.9, 2.1)):
    return Grid(alpha, beta, gamma, step, within)


def plan(points, **limits):
    return candidates(FAMILY, points, Limits(**limits), WORKLOAD)


def test_the_default_grid_holds_the_paper_s_factors_and_the_constraint():
    config = SearchConfig()
    spans = {name: span(name, getattr(config, name)) for name in ("alpha", "beta", "gamma", "product")}
    points = Grid(step=config.grid_step, **spans).feasible()
    assert PAPER_FACTORS in points
    assert all(1.9 <= product(point) <= 2.1 and min(point) >= 1 for point in points)
    assert len(points) == len(set(points)) > 50


@pytest.mark.parametrize(
    ("bounds", "told"),
    [
        (
            {"alpha": (1, 1.1), "beta": (1, 1.1), "gamma": (1, 1.1)},
            "the upper ends bound it.* --alpha up to 1.3 it would",
        ),
        ({"alpha": (2, 2.5), "beta": (1.2, 1.3)}, "the lower ends bound it.* --product 1.9..2.88"),
        (
            {"alpha": (1, 1.9), "beta": (1, 1.4), "step": 0.4, "within": (1.97, 2.05)},
            "nearest is .*try --grid_step 0.2",
        ),
    ],
)
def test_an_empty_grid_says_which_bound_empties_it_and_what_would_not(bounds, told):
    with pytest.raises(ValueError, match=told):
        grid(**bounds).feasible()


def test_what_an_empty_grid_advises_is_not_empty():
    assert grid(alpha=(1, 1.3), beta=(1, 1.1), gamma=(1, 1.1)).feasible()
    assert grid(alpha=(2, 2.5), beta=(1.2, 1.3), within=(1.9, 2.88)).feasible()


@pytest.mark.parametrize("flags", [{"alpha": "0.8..1.5"}, {"beta": "1.3..1"}, {"gamma": "wide"}, {"grid_step": 0.0}])
def test_impossible_ranges_are_one_line(flags):
    (name,) = flags
    with pytest.raises(ValueError, match=f"--{name}") as refused:
        SearchConfig(**flags)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("phi", "expected"), [("1..7", list(range(1, 8))), ("3", [3]), ("2..4", [2, 3, 4])])
def test_phi_is_a_range_or_a_number(phi, expected):
    assert SearchConfig(phi=phi).phis == expected


@pytest.mark.parametrize("phi", ["0..3", "1..8", "1.5", "a"])
def test_other_phi_are_refused(phi):
    with pytest.raises(ValueError, match="--phi"):
        SearchConfig(phi=phi)


def test_factors_that_round_to_one_model_are_one_candidate_for_which_the_paper_s_stand():
    points = [(1.25, 1.1, 1.15), PAPER_FACTORS]
    assert FAMILY.shape(Scale(*points[0])) == FAMILY.shape(Scale(*PAPER_FACTORS))
    (only,), dropped = plan(points)
    assert (only.alpha, only.beta, only.gamma) == PAPER_FACTORS
    assert only.same_as == [(1.25, 1.1, 1.15)]
    assert not dropped


def test_a_candidate_tells_what_the_built_model_costs():
    (only,), _ = plan(PAPER)
    cost = FAMILY.cost(Scale(*PAPER_FACTORS))
    assert (only.parameters, only.macs, only.activations) == (cost.parameters, cost.macs, cost.activations)
    assert only.image_size == 37
    assert only.repeats == [2, 3, 3, 4, 4, 5, 2]
    assert only.cost_ratio == pytest.approx(cost.macs / 8590048 / 2)
    assert only.largest_phi == 7
    assert only.estimated_step_ms > 100
    assert only.estimated_memory_mib * 2**20 == 64 * cost.training_bytes_per_image(4) + cost.state_bytes


@pytest.mark.parametrize("flag", ["macs", "parameters", "activations"])
def test_the_largest_phi_is_the_last_that_keeps_a_limit(flag):
    scale = Scale(*PAPER_FACTORS)
    third, fourth = (getattr(FAMILY.counts(scale.to_the(phi)), flag) for phi in (3, 4))
    assert largest_phi(FAMILY, scale, Limits(**{flag: third})) == 3
    assert largest_phi(FAMILY, scale, Limits(**{flag: fourth - 1})) == 3
    assert largest_phi(FAMILY, scale, Limits(**{flag: fourth})) == 4


def test_a_limit_on_latency_is_measured():
    asked = []

    def latency(scale):
        asked.append(scale)
        return 10.0 * scale.depth

    scale = Scale(2.0, 1.0, 1.0)
    assert largest_phi(FAMILY, scale, Limits(latency_ms=45, latency=latency)) == 2
    assert asked == [scale.to_the(phi) for phi in (1, 2, 3)]


def test_what_fits_at_no_phi_is_dropped_with_its_reason():
    small, large = PAPER_FACTORS, (1.3, 1.1, 1.15)
    limit = FAMILY.counts(Scale(*small)).macs
    kept, (dropped,) = plan([small, large], macs=limit)
    assert [candidate.largest_phi for candidate in kept] == [1]
    assert (dropped.alpha, dropped.beta, dropped.gamma) == large
    assert "exceeds --max_flops" in dropped.reason


def test_limits_that_rule_out_all_name_themselves_and_what_would_do():
    with pytest.raises(ValueError, match=r"--max_params 5e\+06 rules out the nearest, .* needs --max_params 7841894"):
        plan(PAPER, parameters=5e6)
    kept, _ = plan(PAPER, parameters=7841894)
    assert kept


def test_a_budget_below_the_smallest_model_is_told_as_such():
    with pytest.raises(ValueError, match=r"not even the unscaled model fits, .*--max_flops 1e\+06 is below its 8"):
        plan(PAPER, macs=1e6)


@pytest.mark.parametrize("name", ["alpha", "product"])
@pytest.mark.parametrize("text", ["1..inf", "nan", "-inf..2"])
def test_a_range_must_be_finite(name, text):
    with pytest.raises(ValueError, match="must be finite"):
        span(name, text)


def test_a_grid_too_large_to_walk_is_refused_at_once():
    with pytest.raises(ValueError, match=r"--grid_step 1e-08 makes [\d,]+ points, more than 1,000,000"):
        grid(step=1e-8).feasible()


FACTOR = st.tuples(st.floats(1, 2), st.floats(0, 0.5)).map(lambda pair: (pair[0], sum(pair)))


@given(FACTOR, FACTOR, FACTOR, st.sampled_from([0.02, 0.05, 0.1]), st.floats(1, 6), st.floats(0, 0.2))
def test_the_advice_for_an_empty_grid_holds(alpha, beta, gamma, step, low, width):
    empty = Grid(alpha, beta, gamma, step, (low, low + width))
    try:
        empty.feasible()
    except ValueError as error:
        said = str(error)
    else:
        return
    if found := re.search(r"--alpha up to (\S+) it", said):
        mended = dataclasses.replace(empty, alpha=(alpha[0], float(found[1])))
    elif found := re.search(r"try --grid_step (\S+)$", said):
        mended = dataclasses.replace(empty, step=float(found[1]))
    else:
        mended = dataclasses.replace(empty, product=span("product", re.search(r"--product (\S+)$", said)[1]))
    assert mended.feasible()
