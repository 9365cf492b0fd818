"""The grid, its candidates and the limits."""

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_fast.config import SearchConfig, span
from effnet_fast.model.scaling import PAPER_FACTORS
from effnet_fast.search.family import Family, Scale
from effnet_fast.search.grid import Grid, product
from effnet_fast.search.plan import Limits, SearchPlan, Workload, largest_phi, plan_search

FAMILY = Family(num_classes=100, base_size=32, output_stride=32)
WORKLOAD = Workload(batch_size=64, element_bytes=4, baseline_ms=100.0)
PAPER = [PAPER_FACTORS]


def grid(alpha=(1.0, 1.5), beta=(1.0, 1.3), gamma=(1.0, 1.3), step=0.05, within=(1.9, 2.1)):
    return Grid(alpha, beta, gamma, step, within)


def plan(points, **limits):
    return plan_search(FAMILY, points, Limits(**limits), WORKLOAD)


def test_default_grid():
    config = SearchConfig()
    spans = {name: span(name, getattr(config, name)) for name in ("alpha", "beta", "gamma", "product")}
    points = Grid(step=config.grid_step, **spans).feasible()
    assert PAPER_FACTORS in points
    assert all(1.9 <= product(point) <= 2.1 and min(point) >= 1 for point in points)
    assert len(points) == len(set(points)) > 50


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (
            {"alpha": (1, 1.1), "beta": (1, 1.1), "gamma": (1, 1.1)},
            "the upper bounds are too low.* use --alpha 1..1.3$",
        ),
        ({"alpha": (2, 2.5), "beta": (1.2, 1.3)}, "the lower bounds are too high.* --product 1.9..2.88$"),
        (
            {"alpha": (1, 1.9), "beta": (1, 1.4), "step": 0.4, "within": (1.97, 2.05)},
            "nearest product is .*use --grid_step 0.2$",
        ),
    ],
)
def test_empty_grid_names_the_bound_and_a_remedy(bounds, message):
    with pytest.raises(ValueError, match=message):
        grid(**bounds).feasible()


def test_advised_grids_are_not_empty():
    assert grid(alpha=(1, 1.3), beta=(1, 1.1), gamma=(1, 1.1)).feasible()
    assert grid(alpha=(2, 2.5), beta=(1.2, 1.3), within=(1.9, 2.88)).feasible()


@pytest.mark.parametrize("flags", [{"alpha": "0.8..1.5"}, {"beta": "1.3..1"}, {"gamma": "wide"}, {"grid_step": 0.0}])
def test_impossible_range_is_one_line(flags):
    (name,) = flags
    with pytest.raises(ValueError, match=f"--{name}") as error:
        SearchConfig(**flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("phi", "expected"), [("1..7", list(range(1, 8))), ("3", [3]), ("2..4", [2, 3, 4])])
def test_phi_is_a_range_or_a_number(phi, expected):
    assert SearchConfig(phi=phi).phis == expected


@pytest.mark.parametrize("phi", ["0..3", "1..8", "1.5", "a"])
def test_impossible_phi(phi):
    with pytest.raises(ValueError, match="--phi"):
        SearchConfig(phi=phi)


def test_factors_of_one_model_are_one_candidate():
    points = [(1.25, 1.1, 1.15), PAPER_FACTORS]
    assert FAMILY.shape(Scale(*points[0])) == FAMILY.shape(Scale(*PAPER_FACTORS))
    result = plan(points)
    (only,) = result.candidates
    assert (only.alpha, only.beta, only.gamma) == PAPER_FACTORS
    assert only.same_as == [(1.25, 1.1, 1.15)]
    assert not result.dropped


def test_candidate_has_the_cost_of_the_built_model():
    (only,) = plan(PAPER).candidates
    cost = FAMILY.cost(Scale(*PAPER_FACTORS))
    assert (only.parameters, only.macs, only.activations) == (cost.parameters, cost.macs, cost.activations)
    assert only.image_size == 37
    assert only.repeats == [2, 3, 3, 4, 4, 5, 2]
    assert only.cost_ratio == pytest.approx(cost.macs / 8590048 / 2)
    assert only.largest_phi == 7
    assert only.estimated_step_ms > 100
    assert only.estimated_memory_mib * 2**20 == 64 * cost.training_bytes_per_image(4) + cost.state_bytes


@pytest.mark.parametrize("flag", ["macs", "parameters", "activations"])
def test_largest_phi(flag):
    scale = Scale(*PAPER_FACTORS)
    third, fourth = (getattr(FAMILY.counts(scale.to_the(phi)), flag) for phi in (3, 4))
    assert largest_phi(FAMILY, scale, Limits(**{flag: third}))[0] == 3
    phi, exceeded = largest_phi(FAMILY, scale, Limits(**{flag: fourth - 1}))
    assert (phi, list(exceeded.values())) == (3, [(fourth, fourth - 1)])
    assert largest_phi(FAMILY, scale, Limits(**{flag: fourth}))[0] == 4


def test_latency_limit():
    measured = []

    def latency(scale):
        measured.append(scale)
        return 10.0 * scale.depth

    scale = Scale(2.0, 1.0, 1.0)
    assert largest_phi(FAMILY, scale, Limits(latency_ms=45, latency=latency)) == (2, {"--max_latency_ms": (80.0, 45)})
    assert measured == [scale.to_the(phi) for phi in (1, 2, 3)]


def test_candidate_over_a_limit_is_dropped():
    small, large = PAPER_FACTORS, (1.3, 1.1, 1.15)
    limit = FAMILY.counts(Scale(*small)).macs
    result = plan([small, large], macs=limit)
    (dropped,) = result.dropped
    assert [candidate.largest_phi for candidate in result.candidates] == [1]
    assert (dropped.alpha, dropped.beta, dropped.gamma) == large
    assert "exceeds --max_flops" in dropped.reason


def test_notes_say_where_a_limit_excludes_larger_models():
    fourth = FAMILY.counts(Scale(*PAPER_FACTORS).to_the(4)).macs
    result = plan(PAPER, macs=fourth - 1)
    assert result.notes() == [
        "1 candidates; 0 more round to one of them; 0 dropped",
        f"a1.2-b1.1-g1.15: recipes up to phi = 3; at phi = 4, {fourth:,.6g} MACs exceeds --max_flops {fourth - 1:g}",
    ]
    assert SearchPlan.from_dict(result.to_dict()) == result


def test_limit_that_excludes_every_candidate():
    with pytest.raises(ValueError, match=r"--max_params 5e\+06 excludes the nearest, .* needs --max_params 7841894"):
        plan(PAPER, parameters=5e6)
    assert plan(PAPER, parameters=7841894).candidates


def test_limit_below_the_baseline():
    with pytest.raises(
        ValueError, match=r"not even the unscaled model fits at 32 px .*--max_flops 1e\+06 is below its 8"
    ):
        plan(PAPER, macs=1e6)


@pytest.mark.parametrize("name", ["alpha", "product"])
@pytest.mark.parametrize("text", ["1..inf", "nan", "-inf..2"])
def test_range_must_be_finite(name, text):
    with pytest.raises(ValueError, match="must be finite"):
        span(name, text)


def test_huge_grid_is_refused():
    with pytest.raises(ValueError, match=r"--grid_step 1e-08 makes [\d,]+ points, more than 1,000,000"):
        grid(step=1e-8).feasible()


FACTOR = st.tuples(st.floats(1, 2), st.floats(0, 0.5)).map(lambda pair: (pair[0], sum(pair)))


@settings(deadline=None)
@given(FACTOR, FACTOR, FACTOR, st.sampled_from([0.02, 0.05, 0.1]), st.floats(1, 6), st.floats(0, 0.2))
def test_advice_for_an_empty_grid_works(alpha, beta, gamma, step, low, width):
    empty = Grid(alpha, beta, gamma, step, (low, low + width))
    try:
        empty.feasible()
    except ValueError as error:
        message = str(error)
    else:
        return
    if match := re.search(r"use --alpha (\S+)$", message):
        changed = dataclasses.replace(empty, alpha=span("alpha", match[1]))
    elif match := re.search(r"use --grid_step (\S+)$", message):
        changed = dataclasses.replace(empty, step=float(match[1]))
    else:
        changed = dataclasses.replace(empty, product=span("product", re.search(r"--product (\S+)$", message)[1]))
    assert changed.feasible()
