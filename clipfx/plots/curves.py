"""Curves: over the steps, of methods beside each other, of responses."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from clipfx.plots.arguments import as_array, as_curves, as_dots, as_limits, as_steps
from clipfx.plots.drawing import (
    choose_scale,
    draw,
    draw_factors,
    draw_limits,
    drawable,
    get_axes,
    has_something,
    label_steps,
    mark,
    mark_alone,
    thinned,
    with_legend,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def lines(
    values: Any,
    *,
    step: Any = None,
    ylabel: str = "",
    log: bool | None = None,
    legend: bool = True,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws any numbers over the steps, such as losses or clip rates.

    Args:
      values: `[T]`, `[T, G]`, or a dict from names to `[T]`.
      step: `[T]`, 0, 1, 2, ... by default.
      ylabel: Of the axis.
      log: Whether the axis of numbers is logarithmic; None for where they span two
        decades.
      legend: Whether to name the curves, beside the Axes, which are made narrower
        in a figure without a layout engine.
      ax: Where to draw.

    Returns:
      The Axes.

    Raises:
      ImportError: Without Matplotlib.
      ValueError: If shapes or names do not fit.

    Example:
      >>> lines({"loss": [4.0, 3.0]}, ylabel="bits").get_ylabel()
      'bits'

    Reference: none.
    """
    ax = get_axes(ax)
    curves = as_curves("values", values)
    step = as_steps(step, curves)
    label_steps(ax, ylabel)
    if has_something(ax, curves.values(), "steps"):
        choose_scale(ax, log, curves)
        draw(ax, step, curves)
        mark(ax, step, curves)
    return with_legend(ax) if legend else ax


def norms(
    norm: Any,
    threshold: Any = None,
    *,
    factor: Any = None,
    clipped: Any = None,
    step: Any = None,
    log: bool | None = None,
    legend: bool = True,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws norms over the steps, with thresholds, clipped and non-finite steps.

    A threshold is wide and pale, in the colour of its norm. Clipped steps have a dot,
    those whose norm is not finite a cross at the upper edge.

    Args:
      norm: `[T]`, `[T, G]` for G groups, or a dict from names of groups or methods to
        `[T]`.
      threshold: A number or `[T]` for all; `[T, G]`; or a dict from names to numbers,
        `[T]`, or `[T, K]` where K thresholds belong to one norm. A name may be left
        out.
      factor: What the norm was multiplied by, shaped as `norm`: a strip below the
        norms, linear.
      clipped: Of bool, shaped as `norm`; or the count of clipped steps so far, as
        `clipfx.metrics.read` has it. By default where a norm exceeds its threshold;
        `{}` for no dots.
      step: `[T]`, 0, 1, 2, ... by default.
      log: Whether the axis of norms is logarithmic; None for where they span two
        decades.
      legend: Whether to name the curves, beside the Axes, which are made narrower
        in a figure without a layout engine.
      ax: Where to draw.

    Returns:
      The Axes of the norms.

    Raises:
      ImportError: Without Matplotlib.
      ValueError: If shapes or names do not fit.

    Example:
      >>> ax = norms({"zclip": [1.0, 500.0], "global": [1.0, 2.0]}, {"global": 1.0})
      >>> ax.get_yscale()
      'log'

    Reference: none.
    """
    ax = get_axes(ax)
    curves = as_curves("norm", norm)
    step = as_steps(step, curves)
    limits, shared = as_limits(threshold, curves)
    dots = as_dots(clipped, curves, limits)
    factors = {} if factor is None else as_curves("factor", factor, curves)
    label_steps(ax, "norm")
    if has_something(ax, [*curves.values(), *limits.values()], "steps"):
        choose_scale(ax, log, curves, limits)
        draw(ax, step, curves)
        draw_limits(ax, step, limits, curves, shared)
        mark(ax, step, curves, dots, floor=0.26 if factors else 0.0)
        if factors:
            draw_factors(ax, step, {name: factors.get(name) for name in curves})
    return with_legend(ax, 1.08 if factors else 1.02) if legend else ax


def compare(
    norm: Any,
    thresholds: Mapping[str, Any],
    after: Mapping[str, Any] | None = None,
    *,
    step: Any = None,
    log: bool | None = None,
    legend: bool = True,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""Compares what methods make of one history of norms.

    The norm before is grey, each method has a colour: wide and pale for its threshold,
    thin for the norm after it.

    Args:
      norm: `[T]`, before clipping.
      thresholds: From names of methods to numbers or `[T]`.
      after: From names to norms `[T]` after clipping; :math:`\min(n, c)` for those
        that are not there.
      step: `[T]`, 0, 1, 2, ... by default.
      log: Whether the axis of norms is logarithmic; None for where they span two
        decades.
      legend: Whether to name the curves, beside the Axes, which are made narrower
        in a figure without a layout engine.
      ax: Where to draw.

    Returns:
      The Axes.

    Raises:
      ImportError: Without Matplotlib.
      ValueError: If shapes or names do not fit.

    Example:
      >>> ax = compare([1.0, 9.0, 1.0], {"global": 1.0, "zclip": [2.0, 2.0, 3.0]})
      >>> [text.get_text() for text in ax.get_legend().get_texts()]
      ['before', 'global', 'zclip', 'threshold']

    Reference: none.
    """
    ax = get_axes(ax)
    before = as_array("norm", norm, np.ndim(norm) == 1)
    step = as_steps(step, {"norm": before})
    if not isinstance(thresholds, Mapping):
        raise ValueError(
            "thresholds must be a dict from names of methods to thresholds, got a "
            f"{type(thresholds).__name__}; {{'global': 1.0}} is one."
        )
    methods = dict.fromkeys(thresholds, before)
    limits, _ = as_limits(thresholds, methods)
    least = {name: np.fmin(before, np.fmin.reduce(limits[name], 1)) for name in methods}
    least = {n: np.where(np.isnan(before), np.nan, x) for n, x in least.items()}
    given = as_curves("after", after or {}, methods)
    label_steps(ax, "norm")
    if has_something(ax, [before, *limits.values()], "steps"):
        after = least | given
        choose_scale(ax, log, {"norm": before}, after, limits)
        ax.plot(*thinned(step, drawable(ax, before)), color="0.75", lw=0.8, zorder=1,
                label="before")  # fmt: skip
        draw(ax, step, after)
        draw_limits(ax, step, limits, methods, False)
        mark(ax, step, {"norm": before}, color="0.3")
        mark_alone(ax, step, after)
    return with_legend(ax) if legend else ax


def response_curves(
    responses: Mapping[str, Callable] | None = None,
    threshold: float = 1.0,
    *,
    legend: bool = True,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""Draws what norms become, for norms up to four thresholds.

    Args:
      responses: From names to responses; all of `clipfx.responses` by default, with
        0.5 for the arguments that have no default.
      threshold: c > 0, finite.
      legend: Whether to name the curves, beside the Axes, which are made narrower
        in a figure without a layout engine.
      ax: Where to draw.

    Returns:
      The Axes.

    Raises:
      ImportError: Without Matplotlib.
      ValueError: If the threshold is not a finite number > 0.

    Example:
      >>> ax = response_curves({"hard": clipfx.responses.hard}, 2.0)
      >>> float(ax.get_xlim()[1])
      8.0

    Reference: none.
    """
    if not 0 < threshold < math.inf:
        raise ValueError(
            f"threshold must be a finite number > 0, got {threshold!r}; 1.0 shows "
            "norms in units of the threshold."
        )
    ax = get_axes(ax)
    responses = _all_responses() if responses is None else responses
    norm = np.linspace(0, 4 * threshold, 801, dtype=np.float32)
    limit = np.full_like(norm, threshold)
    curves = {name: np.asarray(f(norm, limit)) for name, f in responses.items()}
    ax.plot(norm, norm, color="0.75", lw=0.8)
    ax.axvline(threshold, color="0.75", lw=0.8)
    draw(ax, norm.astype(float), curves, lw=1.6, noisy=False)
    top = max((curve.max() for curve in curves.values()), default=threshold)
    ax.set(xlabel="norm", ylabel="norm after", xlim=(0, 4 * threshold),
           ylim=(0, 1.05 * max(top, threshold)))  # fmt: skip
    return with_legend(ax) if legend else ax


def _all_responses() -> dict[str, Callable]:
    from clipfx import responses

    found = {}
    for name in responses.__all__:
        make = getattr(responses, name)
        if name == "Response":
            continue
        parameters = inspect.signature(make).parameters
        if "norm" in parameters:
            found[name] = make
        else:
            given = [0.5 if p.default is p.empty else p.default
                     for p in parameters.values()]  # fmt: skip
            found[f"{name}({', '.join(f'{x:g}' for x in given)})"] = make(*given)
    # On top, dashed: it lies on others nearly everywhere.
    return found | {"hard": found.pop("hard")}
