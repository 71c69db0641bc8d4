"""First settings for the norms of a run, and what they would have done on it."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from clipfx._core.checks import helpful
from clipfx.calibrate.replay import Replay, as_groups
from clipfx.calibrate.settings import Setting, try_all
from clipfx.calibrate.statistics import (
    NormStats,
    describe,
    deviation,
    round_up,
    threshold_for,
)

_ALL = "together"
_FEW = 100  # steps, fewer than which hold no rare event


class Suggestion(NamedTuple):
    """What a history says; `str` of it is a table.

    Attributes:
      stats: `NormStats` of each group; of several, then of all `together`.
      thresholds: From groups, as in `stats`, to the thresholds for `rates`.
      rates: The clip rates asked for, as shares.
      settings: One `Setting` for each method and rate.
      begin: The `method` of the setting to begin with.
      advice: That, and why.
      warnings: Sentences on the history itself.

    Reference: none.
    """

    stats: tuple[NormStats, ...]
    thresholds: dict[str, tuple[float, ...]]
    rates: tuple[float, ...]
    settings: tuple[Setting, ...]
    begin: str
    advice: str
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        stats = [
            (s.group, f"{s.steps}", f"{s.median:.4g}", f"{s.spread:.2f}",
             f"{s.tail_index:.1f}", f"{s.drift:.2g}", f"{len(s.spikes)}",
             f"{s.nonfinite}", *(f"{c:.4g}" for c in self.thresholds[s.group]))
            for s in self.stats
        ]  # fmt: skip
        head = ("norm of", "steps", "median", "spread", "tail", "drift", "spikes",
                "not finite", *(f"clips {100 * r:g}%" for r in self.rates))  # fmt: skip
        settings = [
            (s.name, f"{s.clip_rate:.1%}", f"{s.mean_factor:.2f}", s.advice)
            for s in self.settings
        ]
        each = self.per_layer()
        lines = [
            _table(head, stats),
            "",
            "spread: deviation of log norms from their recent median, 0.1 quiet and 1",
            "wild; drift: last quarter over first; tail: below 2 the variance is",
            "infinite; clips 5%: the threshold that 5% exceed.",
            "",
            _table(("on these norms", "clips", "mean factor", "for"), settings),
            "",
            "mean factor: what norms are multiplied by, 1 where nothing is clipped.",
            *(["", each] if each else []),
            "",
            _sentence(f"Begin with {self.advice}"),
            *(_sentence(f"- {x}") for x in (*self.warnings, *self._doubts())),
        ]
        return "\n".join(lines)

    def per_layer(self) -> str:
        """The clip with a threshold for each group, to paste, or an empty string.

        Where groups were not recorded with `groups="layer"`, it needs theirs.
        """
        methods = (s.method for s in self.settings if s.method != s.name)
        return next(methods, "")

    def _doubts(self) -> list[str]:
        """Each warning once, behind the methods that it is of."""
        methods = dict[str, list[str]]()
        for setting in self.settings:
            if setting.warning:
                methods.setdefault(setting.warning, []).append(setting.name)
        return [f"{', '.join(names)}: {text}" for text, names in methods.items()]


@helpful
def suggest(
    norms: np.ndarray | Mapping[str, Any],
    *,
    rates: Sequence[float] = (0.01, 0.05, 0.1),
) -> Suggestion:
    r"""Says what norms are like, and what each method would have done on them.

    The methods themselves run over the norms, as in `replay`. Of several groups
    :math:`n = (\sum_k n_k^2)^{1/2}` is the norm of all together. A first setting is a
    beginning, not the best one: that, only training tells.

    Args:
      norms: Of one unclipped run: float `[T]`, `[T, G]`, or a dict from groups to
        `[T]`, as `history` gives. What is infinite, NaN or the largest float32 is a
        step that was not finite. Groups of nothing but 0, as of frozen layers, are
        left out.
      rates: Shares of steps in (0, 1) to give thresholds for.

    Returns:
      A `Suggestion`. Its thresholds are exact quantiles of norms above 0, those in
      `settings` rounded to four digits as they are written there.

    Raises:
      TypeError: If `norms` are no numbers.
      ValueError: If `norms` are of another shape, negative, or fewer than 20 of a group
        are finite and not 0; if a rate is no share.

    Example:
      >>> norms = np.random.default_rng(0).lognormal(0.0, 0.3, 200)
      >>> found = clipfx.calibrate.suggest(norms)
      >>> [(s.method, s.clip_rate) for s in found.settings][2]
      ('clip_by_global_norm(1.604)', 0.05)

    Reference: Pascanu et al., `On the difficulty of training recurrent neural networks
    <https://arxiv.org/abs/1211.5063>`_, 2013: choose by the norms of many updates.
    """
    return study(norms, rates)[0]


def study(norms: Any, rates: Any) -> tuple[Suggestion, dict[str, Replay]]:
    """As `suggest`, and what each of its methods did step by step."""
    rates = _check_rates(rates)
    columns = as_groups(norms)
    still = [name for name, column in columns.items() if (column == 0).all()]
    if len(still) < len(columns):  # the rest has something to say
        columns = {name: x for name, x in columns.items() if name not in still}
    stats = [describe(name, column) for name, column in columns.items()]
    # In float64, whose squares of float32 do not overflow.
    joint = np.sqrt(sum(x.astype(np.float64) ** 2 for x in columns.values()))
    whole = {**columns, _ALL: joint} if len(columns) > 1 else columns
    if len(columns) > 1:
        stats.append(describe(_ALL, joint))
    thresholds = {
        name: tuple(threshold_for(column, rate) for rate in rates)
        for name, column in whole.items()
    }
    form, bound, why = _advise(stats, joint)
    begin = form.format(bound)
    settings, replays = try_all(joint, columns, stats, rates, bound)
    found = Suggestion(
        stats=tuple(stats),
        thresholds=thresholds,
        rates=rates,
        settings=settings,
        begin=begin,
        advice=f"{begin}: {why}",
        warnings=_warn(stats, still),
    )
    return found, replays


def _check_rates(rates: Any) -> tuple[float, ...]:
    for rate in rates or [math.nan]:
        if not 0 < rate < 1:
            raise ValueError(
                f"rates must be shares in (0, 1), got {rate!r}; for five percent write "
                "0.05."
            )
    return tuple(map(float, rates))


_GLOBAL, _ZCLIP = "clip_by_global_norm({:g})", "zclip(max_norm={:g})"
_ADAGC = "adagc(1.5, max_norm={:g})"


def _above_usual(norms: np.ndarray) -> float:
    """What 5% exceed, or would exceed without spikes and the large norms after them.

    Those make the upper quantiles of an unclipped run, hardly its median and spread.
    """
    logs = np.log(norms)
    usual = np.exp(np.median(logs) + 1.645 * deviation(logs))
    return float(min(threshold_for(norms, 0.05), usual))


def _at_a_premium(norms: np.ndarray, premium: float) -> float:
    """The smallest norm that, as a bound, takes at most this share of their sum."""
    ordered = np.sort(norms.astype(np.float64))
    above = np.arange(len(ordered))[::-1]
    kept = np.cumsum(ordered) + above * ordered
    return float(ordered[np.argmax(kept >= (1 - premium) * kept[-1])])


def _advise(stats: Sequence[NormStats], joint: np.ndarray) -> tuple[str, float, str]:
    """Where to begin, the threshold of it, and why, in one sentence."""
    whole, each = stats[-1], stats[:-1]
    # What the first steps exceed would protect none of those that come.
    known = joint[np.isfinite(joint) & (joint > 0)]
    usual = known[len(known) // 2 :]
    if whole.wild and not whole.nonfinite:
        low = threshold_for(usual, 0.95)
        return (
            _GLOBAL,
            round_up(min(low, whole.first) if whole.explodes else low),
            "what 19 in 20 steps of the second half exceed, so that hardly one is not "
            f"normalised: norms scatter so far (spread {whole.spread:.1f}) that they "
            "say nothing of how far to go. With SGD choose the learning rate anew.",
        )
    if whole.explodes or whole.grows:
        growth = (
            f"{whole.peak / whole.first:.0f} times that within 25"
            if whole.explodes
            else f"{whole.settled / whole.first:.1f} times that and stay there"
        )
        return (
            _GLOBAL,
            round_up(whole.first),
            f"the median of the first 5 steps, since norms grow to {growth}. This is "
            "hardly the run that you want: record again, with it.",
        )
    middle = round_up(whole.settled)
    if whole.nonfinite:
        return (
            _GLOBAL,
            middle,
            f"the median, since {whole.nonfinite} steps were not finite. This is "
            "hardly the run that you want: record again, with it.",
        )
    above = round_up(_above_usual(usual))
    alone = [s for s in each if len(s.spikes) > len(whole.spikes)]
    if alone:
        return _ADAGC, above, f"{alone[0].group} spikes where the whole does not."
    spikes = f"{len(whole.spikes)} of {whole.steps} steps are spikes"
    if whole.spikes and not 0.5 < whole.drift < 2:
        return (
            _ZCLIP,
            above,
            f"{spikes}, while the norm drifts to {whole.drift:.2g} times what it was.",
        )
    if whole.spikes:
        return (
            _GLOBAL,
            above,
            "what 5% of the second half exceed, spikes and their aftermath aside. "
            f"{spikes}, and the norm stays where it is.",
        )
    # Long steps that do not stand out may be what is learned from.
    dear = round_up(_at_a_premium(usual, 0.01))
    what = "what 5% of the second half exceed"
    if dear > above:
        what = (
            "which takes 1% of the sum of the second half, and spares seldom long steps"
        )
    return (
        _GLOBAL,
        max(above, dear),
        f"{what}. No step stands out, so that it bounds the first steps, and is "
        "insurance later.",
    )


def _warn(stats: Sequence[NormStats], still: Sequence[str]) -> tuple[str, ...]:
    whole = stats[-1]
    found = [f"{name} has a norm of 0 on every step and is left out." for name in still]
    for s in stats[:-1] or stats:
        if s.zeros:
            of = f" in {s.group}" * (len(stats) > 1)
            found.append(
                f"{s.zeros} of {s.steps} steps had a norm of 0{of}, which count in no "
                "threshold: nothing was learned there."
            )
    if whole.steps < _FEW:
        found.append(
            f"{whole.steps} steps hold few rare events; record some hundred before "
            "trusting a threshold for 1%."
        )
    if whole.nonfinite:
        found.append(
            f"{whole.nonfinite} of {whole.steps} steps were infinite or NaN, which no "
            'threshold mends; pass nonfinite="zero" or find their cause.'
        )
    if not 0.25 < whole.drift < 4:
        found.append(
            f"the norm drifts to {whole.drift:.2g} times what it was: a fixed threshold"
            " fits the beginning or the end; prefer one that adapts, or a schedule."
        )
    return tuple(found)


def _sentence(text: str) -> str:
    return textwrap.fill(text, 88, subsequent_indent="  ", break_long_words=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side: text to the left, numbers to the right."""
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
    last = len(head) - 1
    text = {0} | ({last} if not rows[0][last][:1].isdigit() else set())
    line = lambda row: "  ".join(
        cell.ljust(w) if k in text else cell.rjust(w)
        for k, (cell, w) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    return "\n".join([line(head), "  ".join("-" * w for w in widths), *map(line, rows)])
