"""Methods compared, each at its best settings: tables and curves of many short runs.

A run is a dict: what it was (method, rate, seed, ...) and what it scored.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes

Row = dict[str, Any]


def every(**choices: Iterable[Any]) -> list[Row]:
    """A run for each combination, the last key changing first."""
    combined = itertools.product(*choices.values())
    return [dict(zip(choices, values, strict=True)) for values in combined]


def timed(
    train: Callable[..., Any], known: set[Any], *args: Any, **static: Any
) -> tuple[Any, float]:
    """What a compiled training returns, and the seconds that it takes.

    The first of a program compiles, and is not what is timed.

    Args:
      train: The training.
      known: Programs that have run before; this one is added.
      *args: Its arguments.
      **static: Those that have a program of their own.
    """
    if (program := tuple(static.items())) not in known:
        jax.block_until_ready(train(*args, **static))
        known.add(program)
    start = time.perf_counter()
    found = jax.block_until_ready(train(*args, **static))
    return found, time.perf_counter() - start


def in_turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int = 50
) -> dict[str, float]:
    """The least milliseconds of each call, taken in turns; the first compiles.

    That is what a call takes while nothing else does; medians are of the load, too.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name in [*calls] * (rounds + 1):
        begin = time.perf_counter()
        jax.block_until_ready(calls[name]())
        times[name].append(1000 * (time.perf_counter() - begin))
    return {name: min(x[1:]) for name, x in times.items()}


def told(times: Mapping[str, float], what: str = "step") -> str:
    """What a clip costs, in a sentence: of milliseconds by clip, of `none` too."""
    plain = times["none"]
    more = [
        f"{ms / plain:.2f} times as long with {name}"
        for name, ms in times.items()
        if name != "none"
    ]
    return ", ".join([f"A {what} takes {plain:.3g} ms without a clip", *more]) + "."


def groups(
    rows: Iterable[Row], keys: Sequence[str]
) -> dict[tuple[Any, ...], list[Row]]:
    """Runs by what they have under these keys, in order of appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def best(rows: Iterable[Row], at: Sequence[str], score: str) -> list[Row]:
    """The runs, one for each seed, of the settings with the largest mean score.

    A score starting with `-` is one that should be small. What is not finite is worst.

    Args:
      rows: Runs of one method.
      at: Keys of what is to be chosen, such as the rate.
      score: Key of a number.
    """
    sign, key = (-1, score[1:]) if score.startswith("-") else (1, score)

    def value(runs: list[Row]) -> float:
        mean = float(np.mean([row[key] for row in runs]))
        return sign * mean if math.isfinite(mean) else -math.inf

    return max(groups(rows, at).values(), key=value)


def compared(
    rows: Iterable[Row],
    by: Sequence[str],
    at: Sequence[str],
    score: str,
    shown: Sequence[str],
) -> Iterator[Row]:
    """Rows of a table: each method with its best settings, and scores over seeds.

    Args:
      rows: Runs.
      by: Keys that name a line of the table.
      at: Keys of the settings of which the best is chosen.
      score: As for `best`.
      shown: Keys of the scores to show, as mean and standard deviation over seeds.
    """
    for names, runs in groups(rows, by).items():
        chosen = best(runs, at, score)
        line = dict(zip(by, names, strict=True)) | {key: chosen[0][key] for key in at}
        yield line | {key: mean_and_deviation(chosen, key) for key in shown}


def norms_by_step(
    rows: Iterable[Row],
    norms: Iterable[Any],
    by: Sequence[str],
    score: str,
    at: Sequence[str] = ("rate",),
) -> Iterator[Row]:
    """Norms of runs without a clip, for `python -m clipfx.calibrate`: a row each step.

    Of the runs named `none` at their best settings that with the first seed.

    Args:
      rows: Runs.
      norms: Of each of them `[steps]`, of the gradient before any clip.
      by: As for `compared`.
      score: As for `best`.
      at: As for `compared`.
    """
    runs = [row | {"norms": x} for row, x in zip(rows, norms, strict=True)]
    for names, own in groups(runs, by).items():
        if "none" in names:
            first = best(own, at, score)[0]
            told = {key: first[key] for key in (*by, *at, "seed")}
            yield from each_step(told, first["norms"])


def each_step(run: Row, norms: Any) -> Iterator[Row]:
    """Norms `[steps]` of one run, in digits that a threshold needs."""
    for step, norm in enumerate(np.asarray(norms).tolist()):
        yield run | {"step": step, "norm": float(f"{norm:.6g}")}


def mean_and_deviation(rows: Iterable[Row], key: str) -> str:
    """As `0.931 +- 0.012`, the deviation that of the seeds."""
    values = np.array([row[key] for row in rows], float)
    if not np.isfinite(values).all():
        return f"{np.isfinite(values).sum()} of {len(values)} finite"
    return f"{values.mean():.3g} +- {values.std():.1g}"


def draw_over(
    axes: Axes,
    rows: Iterable[Row],
    x: str,
    y: str,
    colors: dict[str, str],
    **style: Any,
) -> None:
    """A line for each method, through means over seeds, and a band from least to most.

    Args:
      axes: Where.
      rows: Runs; where several have the same `x`, of several seeds.
      x: Key of the abscissa, such as the rate.
      y: Key of a score.
      colors: Of each method.
      style: As for `Axes.plot`.
    """
    for (method,), runs in groups(rows, ("method",)).items():
        points = sorted(groups(runs, (x,)).items())
        places = [at for (at,), _ in points]
        values = [np.array([row[y] for row in those], float) for _, those in points]
        draw_band(axes, places, values, method, colors[method], **style)


def draw_band(
    axes: Axes,
    places: Sequence[float],
    values: Sequence[np.ndarray],
    label: str,
    color: str,
    **style: Any,
) -> None:
    """A line through means, and a band from the least to the most."""
    means = [v.mean() if np.isfinite(v).all() else math.nan for v in values]
    axes.plot(places, means, color=color, label=label, **style)
    low, high = [v.min() for v in values], [v.max() for v in values]
    axes.fill_between(places, low, high, color=color, alpha=0.15, lw=0)
