import math

import numpy as np

from benchmarks._raised import WINDOW, beginnings, leads, raised


def wave(**steps):
    """A mean of 10 and a deviation of 1, but at the steps given."""
    series = 10 + np.resize([1.0, -1.0], 400)
    for step, value in steps.items():
        series[int(step[1:])] = value
    return series


def test_raised_is_ten_deviations_above_the_hundred_steps_before():
    up = raised(wave(t150=19.9, t300=20.1, t20=1e6))
    assert np.flatnonzero(up).tolist() == [300]
    assert np.flatnonzero(raised(wave(t150=math.nan))).min() == 150
    assert not raised(np.full(400, 0.1)).any()
    assert not raised(wave()[: WINDOW + 1]).any()


def test_beginnings_have_thirty_quiet_steps_before():
    up = np.zeros(400, bool)
    up[[5, 6, 36, 67, 97, 200]] = True
    assert beginnings(up).tolist() == [5, 67, 200]


def test_a_series_precedes_a_spike_by_the_steps_since_it_was_first_raised():
    spikes = np.array([150, 290])
    # Raised 7 steps before the first, again 2 before, in the step of the second.
    series = wave(t143=30.0, t148=90.0, t290=90.0)
    assert leads(series, spikes) == ([7, 0], 0)
    # Too early for the first is a false alarm; after the second is late, not false.
    series = wave(t150=10.0, t119=30.0, t293=90.0)
    assert leads(series, spikes) == ([-1, -1], 1)
    assert leads(wave(), spikes[:0]) == ([], 0)
