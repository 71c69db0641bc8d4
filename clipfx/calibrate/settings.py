"""Each method of the table with a first setting, and what that does on a history."""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax

from clipfx.calibrate.replay import Replay, replay_all
from clipfx.calibrate.statistics import NormStats, round_up, threshold_for
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

    @property
    def name(self) -> str:
        """The method, without thresholds by group, which are many."""
        return _EACH if self.method.startswith("clip_per_layer(") else self.method


def try_all(
    joint: np.ndarray,
    columns: Mapping[str, np.ndarray],
    stats: Sequence[NormStats],
    rates: tuple[float, ...],
    bound: float,
) -> tuple[tuple[Setting, ...], dict[str, Replay]]:
    """What every method does on norms `[T]` by group, and step by step by its name."""
    rows = np.stack([*columns.values()], axis=1)
    numbers = _numbers(joint, rows, rates, bound)
    done = jax.tree.map(np.asarray, _replayed(rows, numbers, rates))
    plain = [float(f"{limit:.4g}") for limit in numbers["each"]]
    each = dict(zip(columns, plain, strict=True))
    settings, replays = [], {}
    for key, (_, advice) in _methods(rates, rows.shape[1]).items():
        name = written(each) if key == _EACH else key.format(**numbers)
        if name not in replays:  # where two thresholds are the same
            replays[name] = done[key]
            settings.append(_judge(name, advice, done[key], rows, stats))
    return tuple(settings), replays


def written(each: Mapping[str, float]) -> str:
    """A clip with thresholds by group, as one writes it, on one line where it fits."""
    short = {re.sub(r"^clip\d+/", "", name): limit for name, limit in each.items()}
    pairs = [f"{json.dumps(name)}: {limit:g}" for name, limit in short.items()]
    line = f"clip_per_layer({{{', '.join(pairs)}}})"
    if len(line) <= 80:
        return line
    return "\n    ".join(["clip_per_layer({", *(f"{x}," for x in pairs)]) + "\n})"


def _numbers(
    joint: np.ndarray, rows: np.ndarray, rates: tuple[float, ...], bound: float
) -> dict[str, Any]:
    """What first settings take from the history, as it is printed."""
    at = lambda rate, norms: round_up(threshold_for(norms, rate))
    finite = joint[np.isfinite(joint) & (joint > 0)]
    return {
        "bound": bound,
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
    return _BEGIN | fixed | (_PER_GROUP if groups > 1 else {}) | _METHODS


_EACH = "clip_per_layer({...})"
_BEGIN: dict[str, tuple[_Make, str]] = {
    "clip_by_global_norm({bound:g})": (
        lambda n, _: clip_by_global_norm(n["bound"]),
        "a fixed threshold, the first to try",
    ),
}
_PER_GROUP: dict[str, tuple[_Make, str]] = {
    _EACH: (
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
    if rate > 0.3 and not whole.explodes:
        return "most steps that it clips are ordinary: it acts as a smaller step size."
    return ""
