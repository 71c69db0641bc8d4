"""When a series rises, and which rises first."""

import numpy as np

WINDOW, DEVIATIONS = 100, 10  # steps and deviations: what is usual
APART = 30  # steps between two spikes, and from a warning to its spike, at most


def raised(series: np.ndarray) -> np.ndarray:
    """Steps `[T]` 10 deviations above the mean of the 100 before them; NaN counts."""
    series = np.asarray(series, np.float64)
    past = np.lib.stride_tricks.sliding_window_view(series[:-1], WINDOW)
    usual = past.mean(axis=1) + DEVIATIONS * past.std(axis=1)
    return np.append(np.zeros(WINDOW, bool), ~(series[WINDOW:] <= usual))


def beginnings(up: np.ndarray) -> np.ndarray:
    """The steps that are up, of bool `[T]`, where none of the 30 before is."""
    new = [t for t in np.flatnonzero(up) if not up[max(0, t - APART) : t].any()]
    return np.array(new, int)


def leads(series: np.ndarray, spikes: np.ndarray) -> tuple[list[int], int]:
    """How early a series warns of spikes of the loss.

    A series precedes a spike by n steps if the first of the spike's own step and the 30
    before at which it is raised comes n steps before the spike.

    Args:
      series: `[T]`, of the same run.
      spikes: The steps at which the loss begins to be raised.

    Returns:
      For each spike n, 0 in the same step, -1 if the series is not raised until then;
      and how often it begins to be raised without a spike in the 30 steps before or
      after.
    """
    up = raised(series)
    early = []
    for spike in spikes:
        first = max(0, spike - APART)
        places = np.flatnonzero(up[first : spike + 1])
        early.append(int(spike - first - places[0]) if len(places) else -1)
    false = [t for t in beginnings(up) if not (abs(spikes - t) <= APART).any()]
    return early, len(false)
