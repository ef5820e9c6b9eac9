"""The automatic step: found for any shape of the rise, whatever the data set's size, and reported."""

import math

import pytest

from attrib_jax.jobs.step_size import FIRST_STEP, find_step


@pytest.mark.parametrize(
    "rise",
    [
        lambda step: step**2,
        lambda step: 1e7 * step**2 + 30 * step,
        lambda step: 1e-6 * step**2 - 1e-9 * step,
        lambda step: step**0.7,
        lambda step: math.expm1(1e4 * step) if step < 0.05 else math.nan,
        lambda step: min(1e9 * step**2, 0.019) + max(0.0, step - 0.3),
    ],
    ids=["square", "steep", "falls first", "slow", "overflows", "shelf"],
)
def test_the_step_is_found_for_rises_of_any_shape(rise):
    step = find_step(rise, 0.02, 0.02)
    # Rounded down to two digits.
    assert rise(step) <= 0.0202 < rise(step * 1.13) + 0.0003
    assert float(f"{step:.1e}") == step


def test_the_step_does_not_depend_on_small_errors_of_the_rise():
    steps = {find_step(lambda step, e=error: 3.7 * step**2.2 * (1 + e), 0.02, 0.02) for error in (-1e-6, 0.0, 1e-6)}
    assert len(steps) == 1


@pytest.mark.parametrize("rise", [lambda step: 0.0, lambda step: math.nan])
def test_a_rise_that_no_step_reaches_is_refused(rise):
    with pytest.raises(ValueError, match="loss_rise is 0.02, and no step size was found.*Give a step_size"):
        find_step(rise, 0.02, 0.02)


def test_the_search_takes_few_trials_for_a_power_law():
    trials = []
    find_step(lambda step: trials.append(step) or 250 * step**2, 0.02, 0.02)
    assert trials[0] == FIRST_STEP and len(trials) <= 3
