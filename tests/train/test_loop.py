"""The order in which the loop steps, reports, evaluates and saves."""

from types import SimpleNamespace

import pytest

from effnet_fast.train.loop import Hooks, Progress, fit

STEPS_PER_EPOCH = 4


class Recorded:
    """Runs the loop with hooks that note what they were called for."""

    def __init__(self, log_every=100, eval_every=1, save_due=lambda step: False, stop_at=None, out_of_time=False):
        self.calls = []
        self.progress = Progress()
        note = self.calls.append
        self.hooks = Hooks(
            log_every,
            eval_every,
            save_due,
            report=lambda: note(f"report {self.progress.step}"),
            save=lambda: note(f"save {self.progress.step}"),
            evaluate=lambda: note(f"evaluate {self.progress.step}"),
        )
        self.stop = SimpleNamespace(requested=lambda step: step == stop_at, out_of_time=out_of_time)

    def epoch(self, epoch, start=0):
        return [(epoch, batch) for batch in range(start, STEPS_PER_EPOCH)]

    def fit(self, num_epochs):
        self.batches = []

        def step(images, labels, number):
            self.batches.append((images, labels, number))

        fit(step, self, lambda batches: batches, self.progress, num_epochs, self.hooks, self.stop)
        return self.calls


def test_every_batch_of_every_epoch_is_one_step():
    run = Recorded()
    run.fit(2)
    assert run.batches == [(epoch, batch, 4 * epoch + batch) for epoch in range(2) for batch in range(4)]
    assert run.progress == Progress(epoch=2, batch=0, step=8, reported=8, finished=True)


def test_an_epoch_ends_with_report_evaluate_save():
    assert Recorded().fit(2) == ["report 4", "evaluate 4", "save 4", "report 8", "evaluate 8", "save 8"]


def test_reports_are_not_repeated_at_the_end_of_an_epoch():
    reports = [call for call in Recorded(log_every=2).fit(1) if call.startswith("report")]
    assert reports == ["report 2", "report 4"]


def test_evaluates_every_few_epochs_and_after_the_last():
    evaluations = [call for call in Recorded(eval_every=2).fit(5) if call.startswith("evaluate")]
    assert evaluations == ["evaluate 8", "evaluate 16", "evaluate 20"]


def test_saves_within_an_epoch_when_due():
    calls = Recorded(save_due=lambda step: step == 3).fit(1)
    assert calls == ["save 3", "report 4", "evaluate 4", "save 4"]


@pytest.mark.parametrize(
    ("out_of_time", "expected"),
    [(False, ["report 3", "save 3"]), (True, ["report 3", "evaluate 3", "save 3"])],
)
def test_a_stop_reports_saves_and_evaluates_only_when_out_of_time(out_of_time, expected):
    run = Recorded(stop_at=3, out_of_time=out_of_time)
    assert run.fit(2) == expected
    assert run.progress == Progress(epoch=0, batch=3, step=3, reported=3)


def test_a_report_is_not_repeated_by_a_stop_or_after_it():
    run = Recorded(log_every=2, stop_at=4)
    run.fit(1)
    assert run.calls == ["report 2", "report 4", "save 4"]
    run.stop.requested = lambda step: False
    run.calls.clear()
    assert run.fit(1) == ["evaluate 4", "save 4"]


def test_a_run_killed_after_a_save_at_the_end_of_an_epoch_reports_its_steps():
    run = Recorded()
    run.progress = Progress(epoch=0, batch=4, step=4, reported=2)
    assert run.fit(1) == ["report 4", "evaluate 4", "save 4"]


def test_continues_in_the_middle_of_an_epoch():
    run = Recorded()
    run.progress = Progress(epoch=1, batch=2, step=6)
    run.fit(2)
    assert run.batches == [(1, 2, 6), (1, 3, 7)]
