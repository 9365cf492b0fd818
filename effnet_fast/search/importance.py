"""Rows of the trial table, and the importance of each factor for the accuracy."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from effnet_fast.report.table import Row
from effnet_fast.search.plan import Candidate
from effnet_fast.search.trials import COMPLETE, State

FACTORS = ("alpha", "beta", "gamma")


def trial_rows(candidates: Sequence[Candidate], states: Sequence[State]) -> list[Row]:
    """Return one row per trial with its factors, state and accuracy, in the order in which trials were enqueued."""
    by_name = {candidate.name: candidate for candidate in candidates}
    rows = []
    for number, state in enumerate(states):
        candidate = by_name[state.attrs["candidate"]]
        rows.append(
            {
                "number": number,
                "run": state.run,
                **{factor: getattr(candidate, factor) for factor in FACTORS},
                "state": state.state.lower(),
                "epochs": state.epochs,
                "top1": state.top1,
                "seconds": state.seconds,
                "reason": state.attrs.get("reason"),
            }
        )
    return rows


def importances(rows: Sequence[Row]) -> dict[str, float]:
    """Compute each factor's importance over the completed trials with Optuna's PED-ANOVA: 0 to 1, summing to 1.

    Factors with a single value are omitted, so the result is empty for fewer than two trials. Source: Watanabe et al.,
    PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in Arbitrary Subspaces, IJCAI 2023.
    """
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    completed = [row for row in rows if row["state"] == COMPLETE.lower()]
    values = {factor: [row[factor] for row in completed] for factor in FACTORS}
    # Use a new study: the shared one has wider ranges than the trials, which would distort the importances.
    ranges = {
        factor: FloatDistribution(min(column), max(column)) for factor, column in values.items() if len(set(column)) > 1
    }
    if not ranges:
        return {}
    study = optuna.create_study(direction="maximize")
    for row in completed:
        params = {factor: row[factor] for factor in ranges}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=dict(ranges), value=row["top1"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluated = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return {factor: float(evaluated[factor]) for factor in ranges}
