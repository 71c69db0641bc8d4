"""What norms are like: where they lie, how they scatter, drift and spike."""

from typing import NamedTuple

import numpy as np

LEAST = 20  # finite norms, fewer than which say nothing
_SPAN = 50  # steps that the usual norm is the median of
_BEGIN = 25  # steps of a warm-up
_FIRST = 5  # and those to compare it with


class NormStats(NamedTuple):
    """The norms of one group.

    Attributes:
      group: Its name.
      steps: Norms recorded.
      nonfinite: Of those, how many are infinite or NaN.
      zeros: And how many are 0; both are left out of what follows.
      median: Of the norms.
      spread: Of norms over the median of the 50 before, as far as there are so many:
        the deviation of natural logarithms, 1.4826 times the median distance from the
        median: 0.1 is quiet, 1 wild.
      tail_index: Of the same, Hill's estimate from the largest tenth: below 2 the
        variance is infinite, and z-scores mean little; infinite where those are all
        alike.
      drift: Median of the last quarter over that of the first.
      spikes: Steps, from 0, of norms at least twice, and 5 deviations above, that
        median.
      first: Median of the first 5.
      peak: The largest of the first 25.
      settled: Median of the second half.

    Reference: Hill, `A simple general approach to inference about the tail of a
    distribution <https://doi.org/10.1214/aos/1176343247>`_, 1975.
    """

    group: str
    steps: int
    nonfinite: int
    zeros: int
    median: float
    spread: float
    tail_index: float
    drift: float
    spikes: tuple[int, ...]
    first: float
    peak: float
    settled: float

    @property
    def explodes(self) -> bool:
        """Whether norms grow fivefold within 25 steps, and beyond their noise."""
        return self.peak > self.first * max(5, np.exp(5 * min(self.spread, 50)))

    @property
    def grows(self) -> bool:
        """Whether they end at twice what they began with, and beyond their noise.

        Where a run learns they mostly fall. Less than one median of 5 in a thousand is
        2 deviations too small.
        """
        return self.settled > self.first * max(2, np.exp(2 * min(self.spread, 50)))

    @property
    def wild(self) -> bool:
        """Whether norms scatter so far that none of them is the usual one.

        What 5% exceed is then over ten times the median.
        """
        return 1.645 * self.spread > np.log(10)


def describe(group: str, norms: np.ndarray) -> NormStats:
    """Statistics of norms `[T]`.

    Raises:
      ValueError: If fewer than 20 are finite and not 0.
    """
    usable = np.isfinite(norms) & (norms > 0)
    norms64 = norms.astype(np.float64)
    x = norms64[usable]
    if len(x) < LEAST:
        raise ValueError(
            f"norms must have at least {LEAST} finite steps that are not 0, got "
            f"{len(x)} of {len(norms)} in {group!r}; train longer before choosing."
        )
    gaps = _above_usual(np.log(x))
    quarter = len(x) // 4
    return NormStats(
        group=group,
        steps=len(norms),
        nonfinite=int((~np.isfinite(norms)).sum()),
        zeros=int((norms == 0).sum()),
        median=float(np.median(x)),
        spread=deviation(gaps),
        tail_index=hill(np.exp(gaps)),
        drift=float(np.median(x[-quarter:]) / np.median(x[:quarter])),
        spikes=tuple(np.flatnonzero(usable)[_FIRST:][_spikes(gaps)].tolist()),
        first=float(np.median(x[:_FIRST])),
        peak=float(x[:_BEGIN].max()),
        settled=float(np.median(x[len(x) // 2 :])),
    )


def hill(x: np.ndarray) -> float:
    """One over the mean logarithm of the largest tenth over the largest below."""
    ordered = np.sort(x)[::-1]
    k = max(len(x) // 10, 2)
    mean = np.mean(np.log(ordered[:k] / ordered[k]))
    return float(1 / mean) if mean > 0 else np.inf


def threshold_for(norms: np.ndarray, rate: float) -> float:
    """The smallest norm that at most a share `rate` of those above 0 exceeds."""
    usable = np.sort(norms[np.isfinite(norms) & (norms > 0)])
    return float(usable[len(usable) - 1 - int(rate * len(usable))])


def round_up(x: float) -> float:
    """To four digits, so that no norm exceeds what is printed but not what is meant."""
    near = float(f"{x:.4g}")
    if near >= x:
        return near
    return float(f"{near + 10.0 ** (np.floor(np.log10(x)) - 3):.4g}")


def deviation(x: np.ndarray) -> float:
    """That of normal numbers with this median distance from the median."""
    return float(1.4826 * np.median(np.abs(x - np.median(x))))


def _above_usual(logs: np.ndarray) -> np.ndarray:
    """Logarithms less the median of the 50 before, or as many; the first 5 left out."""
    few = min(_SPAN, len(logs))
    usual = [np.median(logs[:t]) for t in range(_FIRST, few)]
    if len(logs) > _SPAN:
        before = np.lib.stride_tricks.sliding_window_view(logs[:-1], _SPAN)
        usual = [*usual, *np.median(before, axis=1)]
    return logs[_FIRST:] - np.array(usual)


def _spikes(gaps: np.ndarray) -> np.ndarray:
    """Which stand out."""
    return np.flatnonzero(gaps > max(5 * deviation(gaps), np.log(2)))
