"""The table of candidates, its Pareto fronts, and the choice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_fast.search.choose import choose, holm, paired_p
from effnet_fast.search.collect import collect, pareto
from effnet_fast.search.plan import Candidate
from effnet_fast.search.trials import State


def candidate(name, macs=10):
    return Candidate(name, 1.2, 1.1, 1.15, [16], [1], 37, 100, macs, 50, 1.0, 7, 10.0, 20.0, [])


def state(run, top1, kind="COMPLETE", **attrs):
    return State(run, kind, 2, top1, 5.0, attrs)


def rows(scores, **macs):
    states = [state(f"{name}-s{seed}", top1) for name, values in scores.items() for seed, top1 in enumerate(values)]
    return collect([candidate(name, macs.get(name, 10)) for name in scores], states, range(3))


def test_row_has_mean_spread_and_measurements():
    states = [
        state(f"a-s{seed}", top1, latency_ms=ms, training_seconds=7.0)
        for seed, (top1, ms) in enumerate([(10.0, 1.0), (20.0, 2.0), (30.0, 3.0)])
    ]
    (row,) = collect([candidate("a")], states, range(3))
    assert (row["status"], row["seeds"], row["top1_mean"], row["top1_std"]) == ("complete", 3, 20.0, 10.0)
    assert (row["latency_ms"], row["seconds_mean"], row["peak_memory_mib"]) == (2.0, 7.0, None)
    assert {"alpha", "beta", "gamma", "channels", "repeats", "image_size", "parameters", "macs"} <= row.keys()


@pytest.mark.parametrize(
    ("last", "status"),
    [
        (state("a-s2", 1.0, "PRUNED"), "pruned"),
        (state("a-s2", None, "FAIL", reason="out of memory"), "failed"),
        (state("a-s2", 1.0, "RUNNING"), "open"),
    ],
)
def test_candidate_is_complete_only_with_every_seed(last, status):
    (row,) = collect([candidate("a")], [state("a-s0", 10.0), state("a-s1", 20.0), last], range(3))
    assert (row["status"], row["seeds"], row["top1_mean"]) == (status, 2, 15.0)
    assert row["reason"] == last.attrs.get("reason")
    message = "run `effnet-fast search run` first" if status == "open" else "search again with --pruner none"
    with pytest.raises(ValueError, match=message):
        choose([row])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_pareto_front_against_its_definition(points):
    def beaten(point):
        cost, gain = point
        return any(c <= cost and g >= gain and (c, g) != point for c, g in points)

    assert pareto(points) == {i for i, point in enumerate(points) if not beaten(point)}


def test_incomplete_candidates_are_off_the_front():
    """The mean of the lucky seeds is no mean."""
    lucky = [state("a-s0", 90.0), state("a-s1", 0.0, "RUNNING"), state("a-s2", 0.0, "WAITING")]
    states = [*lucky, *(state(f"b-s{seed}", 10.0) for seed in range(3))]
    table = collect([candidate("a", 5), candidate("b", 10)], states, range(3))
    assert [row["pareto_macs"] for row in table] == [False, True]


def test_unknown_costs_are_off_the_front():
    assert pareto([(None, 5.0), (1.0, None), (2.0, 3.0)]) == {2}


# Two-sided critical values of Student's t at 5 % and 1 %, from the usual tables.
@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [(12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.776, 4, 0.05), (2.262, 9, 0.05), (3.355, 8, 0.01)],
)
def test_paired_p_against_tables(t, freedom, p):
    """Differences with t = mean / (spread / sqrt(n)): ones of alternating sign, shifted."""
    n = freedom + 1
    noise = [(-1.0) ** i for i in range(n)]
    center = sum(noise) / n
    spread = (sum((x - center) ** 2 for x in noise) / freedom) ** 0.5
    differences = [x - center + t * spread / n**0.5 for x in noise]
    assert paired_p(differences, [0.0] * n) == pytest.approx(p, rel=2e-3)
    assert paired_p([0.0] * n, differences) == pytest.approx(p, rel=2e-3)


def test_seeds_are_paired():
    """A difference shows although the seeds move both runs together."""
    assert paired_p([10, 20, 30.1], [9, 19, 29]) < 0.01
    assert paired_p([10, 20, 30], [10, 20, 30]) == paired_p([10, 20], [9, 19]) == 1


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {"a": 0.03, "b": 0.06, "c": 0.06}


def test_one_seed_does_not_separate():
    (row,) = collect([candidate("a")], [state("a-s0", 10.0)], range(1))
    choice = choose([row, {**row, "name": "b", "top1_mean": 90.0}])
    assert choice.name == "b"
    assert choice.confidence.startswith("no test is possible with one seed")


def test_similar_candidates_are_listed():
    choice = choose(rows({"good": [30, 31.1, 32], "near": [31, 29, 31], "bad": [10, 11, 12]}))
    assert choice.name == "good"
    assert choice.similar == ["near"]
    assert "not significantly better than 1 of 2 others (n = 3, " in choice.confidence
    assert "better than each of the 1 others" in choose(rows({"good": [30, 31.1, 32], "bad": [10, 11, 12]})).confidence


def test_cheaper_of_equals_is_chosen():
    assert choose(rows({"dear": [5, 5, 5], "cheap": [5, 5, 5]}, dear=20, cheap=10)).name == "cheap"


def test_equal_differences_are_no_evidence():
    assert paired_p([30.2, 41.8], [30.1, 41.7]) == 1.0
    assert paired_p([13.8, 20.6], [13.7, 20.5]) == 1.0
