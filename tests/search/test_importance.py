"""Rows of trials, importances of the factors, and their figure."""

import itertools

import pytest

from effnet_fast.report.trial_plots import plot_trials
from effnet_fast.search.importance import importances, trial_rows
from effnet_fast.search.plan import Candidate
from effnet_fast.search.trials import State

GRID = list(itertools.product([1.0, 1.1, 1.2, 1.3], [1.0, 1.05, 1.1], [1.15]))


def rows(score, state="COMPLETE"):
    candidates = [
        Candidate(f"c{i}", *factors, [16], [1], 37, 100, 10, 50, 1.0, 7, 10.0, 20.0) for i, factors in enumerate(GRID)
    ]
    states = [
        State(f"c{i}-s0", state, 2, score(*factors), 5.0, {"candidate": f"c{i}"}) for i, factors in enumerate(GRID)
    ]
    return trial_rows(candidates, states)


def test_trial_rows():
    first, *_, last = rows(lambda a, b, g: 10 * a)
    assert (first["number"], first["run"], first["state"], first["top1"]) == (0, "c0-s0", "complete", 10.0)
    assert (last["alpha"], last["beta"], last["gamma"]) == GRID[-1]


@pytest.mark.parametrize(
    ("score", "factor"), [(lambda a, b, g: 10 * a, "alpha"), (lambda a, b, g: -abs(b - 1.05), "beta")]
)
def test_importance_of_the_factor_that_matters(score, factor):
    values = importances(rows(score))
    assert values.keys() == {"alpha", "beta"}  # gamma has one value
    assert values[factor] > 0.9
    assert sum(values.values()) == pytest.approx(1)


def test_importances_need_completed_trials():
    assert importances(rows(lambda a, b, g: a, state="PRUNED")) == {}
    assert importances(rows(lambda a, b, g: a)[:1]) == {}


def test_figure():
    trials = rows(lambda a, b, g: 10 * a)
    trials[1] |= {"state": "pruned", "top1": 3.0}
    trials[2] |= {"state": "failed", "top1": None}
    history, importance, alpha, *_ = plot_trials(trials, {"alpha": 0.9, "beta": 0.1}).axes
    assert [line.get_label() for line in history.lines] == ["complete", "pruned", "best so far"]
    assert list(history.lines[2].get_ydata()) == sorted(row["top1"] for row in trials if row["state"] == "complete")
    assert [bar.get_width() for bar in importance.patches] == [0.1, 0.9]
    assert alpha.get_xlabel().startswith(r"$\alpha$")
    assert len(alpha.collections[0].get_offsets()) == len(trials) - 2


def test_figure_without_completed_trials():
    plot_trials([], {}).canvas.draw()
