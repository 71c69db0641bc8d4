"""How norms spread: over groups as colours, over sizes as counts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clipfx.plots.arguments import as_curves, as_limits, as_steps
from clipfx.plots.drawing import (
    get_axes,
    has_something,
    is_wide,
    label_steps,
    labels_of,
    make_room,
    plain_ticks,
    style_of,
    with_legend,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CURVES = 8  # of a histogram; more would hide each other
_CELLS = 400  # of a heat map: fewer than pixels, or else some are not drawn


def heat_map(
    norm: Any,
    *,
    groups: Iterable[str] | None = None,
    step: Any = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws norms of many groups over the steps as colours, logarithmic.

    Where there are more than 400 steps, a cell has the largest norm of its steps, and
    is marked as not finite if one of them is.

    Args:
      norm: `[T, G]`, `[T]`, or a dict from names to `[T]`.
      groups: Names for the G columns of an array, from top to bottom.
      step: `[T]`, increasing; 0, 1, 2, ... by default.
      ax: Where to draw, and beside it the scale.

    Returns:
      The Axes of the map.

    Raises:
      ImportError: Without Matplotlib.
      ValueError: If shapes or names do not fit.

    Example:
      >>> ax = heat_map([[1.0, 100.0], [2.0, 0.0]], groups=["embed", "readout"])
      >>> [label.get_text() for label in ax.get_yticklabels()]
      ['embed', 'readout']

    Reference: none.
    """
    curves = as_curves("norm", norm)
    names = [*curves] if groups is None else [str(name) for name in groups]
    if len(names) != len(curves):
        raise ValueError(
            f"groups must name the {len(curves)} groups of norm, got {len(names)} "
            "names; clipfx.metrics.read has them in order."
        )
    step = as_steps(step, curves)
    ax = get_axes(ax, height=1.5 + 0.15 * max(len(names), 16))
    label_steps(ax)
    if not has_something(ax, curves.values(), "steps"):
        return ax
    from matplotlib import colormaps, ticker
    from matplotlib.patches import Patch

    starts = np.unique(np.linspace(0, len(step), _CELLS + 1).astype(int)[:-1])
    table = np.stack([*curves.values()])
    worst = np.maximum.reduceat(table, starts, axis=1)  # NaN stays
    positive = np.log10(worst, where=worst > 0, out=np.full(worst.shape, np.nan))
    low, high = np.nanmin(positive, initial=1e9), np.nanmax(positive, initial=-1e9)
    low, high = (
        (low, high) if low < high else (0, 1) if low > high else (low - 0.5, low + 0.5)
    )
    colors = colormaps["viridis"].with_extremes(under="#FFFFFF", bad="#D55E00")
    shown = np.where(worst == 0, low - 1, positive)
    pace = step[-1] - step[-2] if len(step) > 1 else 1
    edges = [*step[starts], step[-1] + (pace if pace > 0 else 1)]
    mesh = ax.pcolormesh(edges, np.arange(len(names) + 1) - 0.5,
        np.ma.masked_invalid(shown), cmap=colors, vmin=low, vmax=high, rasterized=True,
    )  # fmt: skip
    room = ax.get_window_extent().height / ax.figure.dpi * 72 / len(names)  # in points
    every = math.ceil(4 / room)
    ax.set_yticks(range(0, len(names), every), labels_of(names)[::every],
                  fontsize=min(9, max(4, room * every)))  # fmt: skip
    ax.invert_yaxis()
    scale = ax.figure.colorbar(mesh, ax=ax, label="norm")
    scale.ax.yaxis.set_major_locator(ticker.MaxNLocator(6, integer=high - low > 2))
    scale.ax.yaxis.set_major_formatter(lambda x, _: f"{10.0**x:.3g}")
    marks = [
        ("zero", "#FFFFFF", worst == 0),
        ("not finite", "#D55E00", np.isnan(worst)),
    ]
    marks = [
        Patch(fc=c, ec="0.5", label=name) for name, c, is_so in marks if is_so.any()
    ]
    if marks:
        ax.legend(handles=marks, loc="lower left", bbox_to_anchor=(0, 1), ncols=2,
                  fontsize=8, frameon=False)  # fmt: skip
    return ax


def histogram(
    norm: Any,
    threshold: Any = None,
    *,
    bins: int = 60,
    log: bool | None = None,
    legend: bool = True,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws how often norms have which size, and how many exceed their threshold.

    Counts are logarithmic where they span two decades, so that a single outlier is
    seen; the largest norms have a stroke at the lower edge besides. A threshold
    that moves is drawn at its median, from its 5th to its 95th percentile pale.

    More than eight have a row each, counts as colours, with a stroke at the threshold
    and behind the name the share above it.

    Args:
      norm: `[T]`, `[T, G]`, or a dict from names to numbers, `[T]` or as many as there
        are of each: steps, or examples of a kind.
      threshold: As for `norms`.
      bins: How many, of equal width, on a logarithmic axis in the logarithm.
      log: Whether the axis of norms is logarithmic; None for where they span two
        decades.
      legend: Whether to name what is drawn, beside the Axes, which are made narrower
        in a figure without a layout engine.
      ax: Where to draw.

    Returns:
      The Axes.

    Raises:
      ImportError: Without Matplotlib.
      ValueError: If shapes or names do not fit.

    Example:
      >>> ax = histogram([1.0, 2.0, 3.0, 9.0], 2.5)
      >>> [text.get_text() for text in ax.get_legend().get_texts()]
      ['norm', 'threshold: 50% above']

    Reference: none.
    """
    ax = get_axes(ax)
    curves = as_curves("norm", norm, share_steps=False)
    limits, shared = as_limits(threshold, curves)
    ax.set(xlabel="norm", ylabel="steps")
    if not has_something(ax, curves.values(), "steps"):
        return ax
    together = np.concatenate([*curves.values()])
    together = together[np.isfinite(together)]
    wide = is_wide(together) if log is None else log and bool((together > 0).any())
    seen = {n: y[np.isfinite(y) & ((y > 0) | (not wide))] for n, y in curves.items()}
    kept = np.concatenate([*seen.values()])
    low, high = (kept.min(), kept.max()) if kept.size else (0.0, 1.0)
    if low == high:
        bins |= 1  # one in the middle
        low, high = (0.9 * low, 1.1 * low) if low else (-0.5, 0.5)
    edges = (np.geomspace if wide else np.linspace)(low, high, bins + 1)
    ax.set_xscale("log" if wide else "linear")
    if wide:
        plain_ticks(ax.xaxis, edges)
    counts = {name: np.histogram(y, edges)[0] for name, y in seen.items()}
    labels = dict(zip(counts, labels_of(counts), strict=True))
    lost = sum(int((~np.isfinite(y)).sum()) for y in curves.values())
    zero = sum(int((y == 0).sum()) for y in curves.values()) if wide else 0
    told = [f"{n} {what}" for n, what in ((lost, "not finite"), (zero, "zero")) if n]
    if told:
        ax.set_title(f"Not shown: {', '.join(told)}.", fontsize=9, loc="left")
    if len(counts) > _CURVES:
        return _draw_rows(ax, edges, counts, labels, curves, limits)
    for number, (name, count) in enumerate(counts.items()):
        style = style_of(number)
        kind: dict[str, Any] = (
            {"fill": True, "alpha": 0.5} if len(counts) == 1 else {"lw": 1.2}
        )
        ax.stairs(count, edges, color=style["color"], ls=style["ls"],
                  label=labels[name], **kind)  # fmt: skip
        largest = np.sort(seen[name])[-max(10 // len(counts), 3) :]
        ax.plot(largest, np.zeros(len(largest)), "|", ms=9, color=style["color"],
                transform=ax.get_xaxis_transform(), clip_on=False)  # fmt: skip
    for number, name in enumerate(limits):
        if shared and number:
            break
        pairs = [(curves[k], limits[k]) for k in (limits if shared else [name])]
        label = (
            "threshold" if shared or len(curves) == 1 else f"{labels[name]} threshold"
        )
        color = "0.3" if shared else style_of([*curves].index(name))["color"]
        _draw_limit(ax, pairs, label, color)
    if max(count.max() for count in counts.values()) > 100:
        ax.set_yscale("log")
        ax.set_ylim(0.6)
    return with_legend(ax) if legend else ax


def _draw_rows(
    ax: "Axes",
    edges: np.ndarray,
    counts: Mapping[str, np.ndarray],
    labels: Mapping[str, str],
    curves: Mapping[str, np.ndarray],
    limits: Mapping[str, np.ndarray],
) -> "Axes":
    """A row of colours for each, where outlines would hide each other."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    table = np.stack([*counts.values()])
    places = np.arange(len(table) + 1) - 0.5
    mesh = ax.pcolormesh(edges, places, np.ma.masked_equal(table, 0), rasterized=True,
        cmap=colormaps["Blues"], norm=LogNorm(0.3, max(table.max(), 1)))  # fmt: skip
    for row, name in enumerate(counts):
        limit = limits.get(name, np.empty(0))
        finite = limit[np.isfinite(limit)]
        if finite.size:
            ax.vlines(np.median(finite), row - 0.4, row + 0.4, color="#D55E00", lw=2)
    shares = {k: f": {_above([(curves[k], x)])}" for k, x in limits.items()}
    names = [labels[name] + shares.get(name, "") for name in counts]
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylabel("")
    ax.invert_yaxis()
    ax.figure.colorbar(mesh, ax=ax, label="steps")
    if ax.figure.get_layout_engine() is None:
        make_room(ax, left=max(map(len, names)))
    return ax


def _above(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    """How many of norms `[T]` exceed their thresholds `[T, K]`."""
    pairs = [(y, column) for y, limit in curves for column in limit.T]
    above = sum(int((y > column).sum()) for y, column in pairs)
    number = sum(int(np.isfinite(y).sum()) for y, _ in pairs)
    share = 100 * above / max(number, 1)
    return f"{float(f'{share:.2g}'):g}% above"  # 100, not 1e+02


def _draw_limit(
    ax: "Axes",
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
    label: str,
    color: str,
) -> None:
    """A threshold across a histogram, of norms `[T]` with thresholds `[T, K]` each."""
    limit = curves[0][1]
    finite = limit[np.isfinite(limit)]
    if finite.size:
        low, middle, high = np.quantile(finite, [0.05, 0.5, 0.95])
        share = f"{label}: {_above(curves)}"
        ax.axvline(middle, color=color, ls="--", lw=1.2, label=share)
        if low < high:
            ax.axvspan(low, high, color=color, alpha=0.12, lw=0)
