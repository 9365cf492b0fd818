"""Learning rates over a run of 100 steps, 10 an epoch."""

import pytest

from effnet_fast.train.schedule import make_schedule


def curve(name, warmup_epochs=1.0):
    schedule = make_schedule(name, steps=100, steps_per_epoch=10, warmup_epochs=warmup_epochs)
    return [schedule(step) for step in range(100)]


@pytest.mark.parametrize("name", ["cosine", "step", "exponential", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(name):
    rates = curve(name)
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert max(rates) == pytest.approx(rates[10]) == 1.0


def test_cosine_ends_near_zero_and_halves_in_the_middle():
    rates = curve("cosine")
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_step_divides_by_five_three_times():
    rates = curve("step")
    assert [rates[i] for i in (29, 30, 60, 80)] == pytest.approx([1, 0.2, 0.04, 0.008])


def test_exponential_is_the_papers():
    assert curve("exponential")[10 + 24] == pytest.approx(0.97)


def test_one_cycle_rises_for_three_tenths():
    rates = curve("one-cycle")
    assert rates[0] == pytest.approx(1 / 25)
    assert max(rates) == rates[30] == 1.0
    assert rates[99] < 1e-2


def test_warm_up_is_capped():
    assert curve("constant", warmup_epochs=50).index(1.0) == 25


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown schedule 'linear'"):
        make_schedule("linear", 1, 1, 0)
