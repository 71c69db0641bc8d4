"""First settings for the norms of a run, and what they would have done on it."""

import functools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax

from clipfx._core.checks import helpful
from clipfx.calibrate.replay import Replay, as_groups, replay_all
from clipfx.calibrate.statistics import NormStats, describe, round_up, threshold_for
from clipfx.methods.adagc import adagc
from clipfx.methods.autoclip import autoclip
from clipfx.methods.band_by_history import band_by_history
from clipfx.methods.clip_by_global_norm import clip_by_global_norm
from clipfx.methods.clip_per_layer import clip_per_layer
from clipfx.methods.limit_norm_growth import limit_norm_growth
from clipfx.methods.norm_stabilizer import norm_stabilizer
from clipfx.methods.normalize_by_norm import normalize_by_norm
from clipfx.methods.quantile_clip import quantile_clip
from clipfx.methods.smooth_norm import smooth_norm
from clipfx.methods.zclip import zclip
from clipfx.wrappers.skip_spikes import skip_spikes

_Make: TypeAlias = Callable[[dict[str, Any], int], optax.GradientTransformation]

_ALL = "together"
_FEW = 100  # steps, fewer than which hold no rare event


class Setting(NamedTuple):
    """A method with a first setting, and what it does on the history.

    Attributes:
      method: As it is written, without `clipfx.`: `"zclip()"`.
      clip_rate: Share of steps, and of groups, whose norm was above the threshold; of
        `skip_spikes` of steps skipped.
      mean_factor: Mean of what finite norms were multiplied by.
      advice: What it is for.
      warning: What to know before trusting it on these norms, or an empty string.

    Reference: none.
    """

    method: str
    clip_rate: float
    mean_factor: float
    advice: str
    warning: str


class Suggestion(NamedTuple):
    """What a history says; `str` of it is a table.

    Attributes:
      stats: `NormStats` of each group; of several, then of all `together`.
      thresholds: From groups, as in `stats`, to the thresholds for `rates`.
      rates: The clip rates asked for, as shares.
      settings: One `Setting` for each method and rate.
      advice: One sentence: where to begin.
      warnings: Sentences on the history itself.

    Reference: none.
    """

    stats: tuple[NormStats, ...]
    thresholds: dict[str, tuple[float, ...]]
    rates: tuple[float, ...]
    settings: tuple[Setting, ...]
    advice: str
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        stats = [
            (s.group, f"{s.steps}", f"{s.median:.4g}", f"{s.spread:.2f}",
             f"{s.tail_index:.1f}", f"{s.drift:.2f}", f"{len(s.spikes)}",
             f"{s.nonfinite}", *(f"{c:.4g}" for c in self.thresholds[s.group]))
            for s in self.stats
        ]  # fmt: skip
        head = ("norm of", "steps", "median", "spread", "tail", "drift", "spikes",
                "not finite", *(f"clips {100 * r:g}%" for r in self.rates))  # fmt: skip
        settings = [
            (s.method, f"{s.clip_rate:.1%}", f"{s.mean_factor:.2f}", s.advice)
            for s in self.settings
        ]
        lines = [
            _table(head, stats),
            "",
            "spread: deviation of log norms; tail: below 2 the variance is infinite;",
            "drift: last quarter over first; clips 5%: the threshold that 5% exceed;",
            "mean factor: what norms are multiplied by, 1 where nothing is clipped.",
            "",
            _table(("on these norms", "clips", "mean factor", "for"), settings),
            "",
            _sentence(f"Begin with {self.advice}"),
            *(_sentence(f"- {x}") for x in (*self.warnings, *self._doubts())),
        ]
        return "\n".join(lines)

    def _doubts(self) -> list[str]:
        """Each warning once, behind the methods that it is of."""
        methods = dict[str, list[str]]()
        for setting in self.settings:
            if setting.warning:
                methods.setdefault(setting.warning, []).append(setting.method)
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
      A `Suggestion`. Its thresholds are exact quantiles, those in `settings` rounded to
      four digits as they are written there.

    Raises:
      TypeError: If `norms` are no numbers.
      ValueError: If `norms` are of another shape, negative, or fewer than 20 of a group
        are finite and not 0; if a rate is no share.

    Example:
      >>> norms = np.random.default_rng(0).lognormal(0.0, 0.3, 200)
      >>> found = clipfx.calibrate.suggest(norms)
      >>> [(s.method, s.clip_rate) for s in found.settings][1]
      ('clip_by_global_norm(1.604)', 0.05)

    Reference: Pascanu et al., `On the difficulty of training recurrent neural networks
    <https://arxiv.org/abs/1211.5063>`_, 2013: choose by the norms of many updates.
    """
    rates = _check_rates(rates)
    columns = as_groups(norms)
    still = [name for name, column in columns.items() if (column == 0).all()]
    if len(still) < len(columns):  # the rest has something to say
        columns = {name: x for name, x in columns.items() if name not in still}
    stats = [describe(name, column) for name, column in columns.items()]
    rows = np.stack([*columns.values()], axis=1)
    # In float64, whose squares of float32 do not overflow.
    joint = np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1))
    if len(columns) > 1:
        columns, stats = {**columns, _ALL: joint}, [*stats, describe(_ALL, joint)]
    thresholds = {
        name: tuple(threshold_for(column, rate) for rate in rates)
        for name, column in columns.items()
    }
    numbers = _numbers(joint, rows, rates, stats[-1])
    done = jax.tree.map(np.asarray, _replayed(rows, numbers, rates))
    settings = tuple(
        _judge(name.format(**numbers), advice, done[name], rows, stats)
        for name, (_, advice) in _methods(rates, rows.shape[1]).items()
    )
    by_rate = zip(thresholds[stats[-1].group], rates, strict=True)
    return Suggestion(
        stats=tuple(stats),
        thresholds=thresholds,
        rates=rates,
        settings=settings,
        advice=_advise(stats, sorted(by_rate, reverse=True)),
        warnings=_warn(stats, still),
    )


def _check_rates(rates: Any) -> tuple[float, ...]:
    for rate in rates or [math.nan]:
        if not 0 < rate < 1:
            raise ValueError(
                f"rates must be shares in (0, 1), got {rate!r}; for five percent write "
                "0.05."
            )
    return tuple(map(float, rates))


def _numbers(
    joint: np.ndarray, rows: np.ndarray, rates: tuple[float, ...], whole: NormStats
) -> dict[str, Any]:
    """What first settings take from the history, as it is printed."""
    at = lambda rate, norms: round_up(threshold_for(norms, rate))
    finite = joint[np.isfinite(joint) & (joint > 0)]
    return {
        # Of a run that exploded the large norms are no measure.
        "bound": round_up(whole.first) if whole.explodes else at(0.05, joint),
        "each": np.array([at(0.05, column) for column in rows.T], np.float32),
        "inverse": round_up(1 / finite.mean()),
        "median": round_up(np.median(finite)),
        **{f"rate{k}": at(rate, joint) for k, rate in enumerate(rates)},
    }


def _methods(rates: tuple[float, ...], groups: int) -> dict[str, tuple[_Make, str]]:
    """Each method as it is written, how it is made, and what it is for."""
    fixed = {
        f"clip_by_global_norm({{rate{k}:g}})": (
            lambda n, _, k=k: clip_by_global_norm(n[f"rate{k}"]),
            f"the usual choice: at most {100 * rate:g}% of the steps clipped",
        )
        for k, rate in enumerate(rates)
    }
    return fixed | (_PER_GROUP if groups > 1 else {}) | _METHODS


_PER_GROUP: dict[str, tuple[_Make, str]] = {
    "clip_per_layer({{...}})": (
        lambda n, _: clip_per_layer(n["each"], groups="leaf"),
        "one layer explodes: each at its own 5%",
    ),
}
# From the numbers above, and the length of a window that holds as much as 1,000 steps.
_METHODS: dict[str, tuple[_Make, str]] = {
    "quantile_clip(0.9)": (
        lambda n, _: quantile_clip(0.9),
        "no threshold to choose: nine steps in ten pass",
    ),
    "autoclip(90.0)": (
        lambda n, window: autoclip(90.0, window=window),
        "the same, exact, over 1,000 steps",
    ),
    "autoclip()": (
        lambda n, window: autoclip(window=window),
        "nearly normalised steps, as in the paper",
    ),
    "zclip()": (lambda n, _: zclip(), "rare spikes while the norm drifts"),
    "zclip(max_norm={bound:g})": (
        lambda n, _: zclip(max_norm=n["bound"]),
        "the same, its warm-up protected",
    ),
    "adagc(1.5, max_norm={bound:g})": (
        lambda n, _: adagc(1.5, max_norm=n["bound"]),
        "spikes by tensor, each on its own scale",
    ),
    "adagc(max_norm={bound:g})": (
        lambda n, _: adagc(max_norm=n["bound"]),
        "the paper's ratio of 1.04: smooth norms only",
    ),
    "skip_spikes(optimizer)": (
        lambda n, _: skip_spikes(optax.identity()),
        "corrupted batches",
    ),
    "band_by_history()": (
        lambda n, _: band_by_history(groups="leaf"),
        "both ends: small norms are lifted too",
    ),
    "limit_norm_growth()": (
        lambda n, _: limit_norm_growth(),
        "behind Fira or APOLLO",
    ),
    "smooth_norm(1.0, {inverse:g})": (
        lambda n, _: smooth_norm(1.0, n["inverse"]),
        "a step size that is too large later",
    ),
    "norm_stabilizer()": (
        lambda n, _: norm_stabilizer(),
        "low precision: every norm near 1",
    ),
    "normalize_by_norm({median:g})": (
        lambda n, _: normalize_by_norm(n["median"]),
        "the same norm every step",
    ),
}


@functools.partial(jax.jit, static_argnames="rates")
def _replayed(
    rows: jax.Array, numbers: dict[str, Any], rates: tuple[float, ...]
) -> dict[str, Replay]:
    """Compiled once for histories of one shape."""
    methods = _methods(rates, rows.shape[1])
    window = min(1000, len(rows))
    made = {name: make(numbers, window) for name, (make, _) in methods.items()}
    return replay_all(made, rows)


def _judge(
    name: str, advice: str, done: Replay, rows: np.ndarray, stats: Sequence[NormStats]
) -> Setting:
    usable = np.isfinite(rows) & (rows > 0)
    if done.factor.shape[1] < rows.shape[1]:
        usable = usable.any(axis=1, keepdims=True) & np.isfinite(rows).all(
            axis=1, keepdims=True
        )
    rate = float(done.clipped.mean())
    warning = _doubt(name, rate, done, stats)
    return Setting(name, rate, float(done.factor[usable].mean()), advice, warning)


def _doubt(name: str, rate: float, done: Replay, stats: Sequence[NormStats]) -> str:
    """What to know of a method on these norms."""
    method, whole = name.partition("(")[0], stats[-1]
    warm_up = {"zclip": 25, "adagc": 100, "skip_spikes": 64}.get(method, 0)
    if name == "zclip()" and whole.explodes:
        return (
            f"norms grow to {whole.peak / whole.first:.0f} times the first within the "
            "25 steps from which it learns, and nothing clips them there."
        )
    if whole.steps < 2 * warm_up:
        return (
            f"its first {warm_up} steps are a warm-up, and {whole.steps} were recorded;"
            " record more to judge it."
        )
    if method == "zclip" and whole.tail_index < 2:
        return (
            f"with a tail index of {whole.tail_index:.1f} the deviation it goes by is "
            "that of the largest norms; a quantile is steadier."
        )
    if method == "adagc" and rate > 0.3:
        usual = np.array([s.median for s in stats[: done.threshold.shape[1]]])
        end = float(np.median(done.threshold[-1] / usual))
        return (
            f"its threshold ends at {end:.2f} times the median norm, as it learns from "
            "clipped norms; a larger ratio clips less."
        )
    if method == "autoclip" and rate > 0.5:
        return (
            "the percentile is the share of steps that pass: 10 clips some nine in "
            "ten; 90.0 clips one."
        )
    if method == "limit_norm_growth":
        return "it holds the norm near the smallest so far, which is no general clip."
    if method in ("smooth_norm", "norm_stabilizer", "normalize_by_norm"):
        return "it changes every step's length: choose the learning rate anew."
    if rate > 0.3:
        return "most steps that it clips are ordinary: it acts as a smaller step size."
    return ""


def _advise(stats: Sequence[NormStats], at: Sequence[tuple[float, float]]) -> str:
    """Where to begin, in one sentence; `at` has thresholds with their rates."""
    whole, each = stats[-1], stats[:-1]
    if whole.explodes or whole.nonfinite:
        why = (
            f"norms grow to {whole.peak / whole.first:.0f} times the first within 25 "
            "steps"
            if whole.explodes
            else f"{whole.nonfinite} steps were not finite"
        )
        usual = whole.first if whole.explodes else whole.median
        return (
            f"clip_by_global_norm({round_up(usual):g}), "
            f"{'the median of the first 5 steps' if whole.explodes else 'the median'}, "
            f"and record again: {why}, so this is hardly the run that you want."
        )
    alone = [s for s in each if len(s.spikes) > len(whole.spikes)]
    if alone:
        return (
            f"adagc(1.5, max_norm={round_up(at[-1][0]):g}): "
            f"{alone[0].group} spikes where the whole does not."
        )
    if whole.spikes and not 0.5 < whole.drift < 2:
        return (
            f"zclip(max_norm={round_up(at[0][0]):g}): {len(whole.spikes)} "
            f"spikes, while the norm drifts to {whole.drift:.2g} times what it was."
        )
    if whole.spikes:
        share = len(whole.spikes) / whole.steps
        enough = [c for c, rate in at if rate >= share] or [at[-1][0]]
        return (
            f"clip_by_global_norm({round_up(enough[0]):g}): {share:.1%} of the steps "
            "are spikes, and the norm stays where it is."
        )
    return (
        f"clip_by_global_norm({round_up(at[0][0]):g}), which here does next "
        "to nothing: no step stands out, so a clip is insurance only."
    )


def _warn(stats: Sequence[NormStats], still: Sequence[str]) -> tuple[str, ...]:
    whole = stats[-1]
    found = [f"{name} has a norm of 0 on every step and is left out." for name in still]
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
