"""Lines, marks, scales and legends that stay legible when there are many."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's, with grey for their yellow, which is hard to see on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
           "#000000", "#8C8C8C")  # fmt: skip
_DASHES = (("-", ""), ("--", "o"), ("-.", "s"), (":", "^"))
_COLUMNS = 2000  # of a curve; more than pictures have pixels


def get_axes(ax: "Axes | None", height: float = 4.2) -> "Axes":
    """The Axes given, or those of a figure that no window and no pyplot knows."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "clipfx.plots must have Matplotlib, which is not installed; "
            'pip install "clipfx-jax[plots]" brings it.'
        ) from None
    if ax is None:
        return Figure(figsize=(8, height), layout="constrained").subplots()
    return ax


def label_steps(ax: "Axes", ylabel: str = "") -> None:
    """Names both axes; there is no step between two steps."""
    ax.set(xlabel="step", ylabel=ylabel)
    if ax.get_xscale() == "linear":
        from matplotlib.ticker import MaxNLocator

        ax.xaxis.set_major_locator(
            MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1)
        )


def style_of(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of the curve of that number, of 32."""
    dash, marker = _DASHES[number // len(_COLORS) % len(_DASHES)]
    return {"color": _COLORS[number % len(_COLORS)], "ls": dash, "marker": marker}


def is_wide(values: np.ndarray) -> bool:
    """Whether an axis of such finite numbers is logarithmic."""
    positive = values[values > 0]
    return bool(
        positive.size
        and not (values < 0).any()
        and positive.max() > 100 * positive.min()
    )


def _columns(y: np.ndarray, columns: int) -> np.ndarray:
    """`[columns, width]` or fewer rows, the last filled up with NaN."""
    width = math.ceil(len(y) / columns)
    return np.pad(y, (0, -len(y) % width), constant_values=np.nan).reshape(-1, width)


def thinned(
    x: np.ndarray, y: np.ndarray, columns: int = _COLUMNS
) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest value of each column, in their order."""
    if len(y) <= 2 * columns:
        return x, y
    table = _columns(y, columns)
    lowest = np.where(np.isnan(table), np.inf, table).argmin(1)
    highest = np.where(np.isnan(table), -np.inf, table).argmax(1)
    kept = np.sort(np.stack([lowest, highest], 1))
    kept = (kept + table.shape[1] * np.arange(len(table))[:, None]).ravel()
    kept = kept[kept < len(y)]
    return x[kept], y[kept]


def _medians(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The median of what is finite in each hundredth of the steps, or each ten."""
    table = np.sort(_columns(y, min(100, len(y) // 10)))  # NaN last
    middle = (np.isfinite(table).sum(1) - 1) // 2
    starts = table.shape[1] * np.arange(len(table))
    ends = np.minimum(starts + table.shape[1], len(y)) - 1
    return (x[starts] + x[ends]) / 2, table[np.arange(len(table)), middle]


def choose_scale(
    ax: "Axes", log: bool | None, *curves: Mapping[str, np.ndarray]
) -> None:
    """Before anything is drawn, from all that will be."""
    values = np.concatenate([y.ravel() for each in curves for y in each.values()])
    values = values[np.isfinite(values)]
    if is_wide(values) if log is None else log and (values > 0).any():
        ax.set_yscale("log")
        plain_ticks(ax.yaxis, values)


def plain_ticks(axis: Any, values: np.ndarray) -> None:
    """Labels a logarithmic axis that spans little with 2, 5, 10, 20."""
    from matplotlib.ticker import LogLocator, NullFormatter

    positive = values[values > 0]
    if positive.max() < 300 * positive.min():
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def drawable(ax: "Axes", y: np.ndarray) -> np.ndarray:
    """NaN in place of zero on a logarithmic axis: extremes are of what is seen."""
    return y if ax.get_yscale() == "linear" else np.where(y > 0, y, np.nan)


def draw(
    ax: "Axes",
    step: np.ndarray,
    curves: Mapping[str, np.ndarray],
    lw: float = 0.9,
    noisy: bool = True,
) -> None:
    """A line each; where there are many, pale, with a median that stands out."""
    noisy = noisy and len(step) > (100 if len(curves) > len(_COLORS) else _COLUMNS)
    pale = max(0.15, min(0.3, 1.2 / max(len(curves), 1)))
    for number, (label, y) in enumerate(
        zip(labels_of(curves), curves.values(), strict=True)
    ):
        style = style_of(number)
        y = drawable(ax, y)
        x, drawn = thinned(step, y)
        if noisy:
            ax.plot(x, drawn, lw=0.6, alpha=pale, color=style["color"], zorder=1.2)
            x, drawn = _medians(step, y)
        every = max(len(x) // 10, 1)
        first = (number * every) // max(len(curves), 1)
        ax.plot(x, drawn, lw=1.5 if noisy else lw, ms=4, markevery=(first, every),
                label=label, **style)  # fmt: skip


def draw_limits(
    ax: "Axes",
    step: np.ndarray,
    limits: Mapping[str, np.ndarray],
    names: Iterable[str],
    shared: bool,
) -> None:
    """Thresholds, wide and pale; one entry of the legend for all of them."""
    label: str | None = "threshold"
    for number, name in enumerate(names):
        if name not in limits or (shared and number):
            continue
        color = "0.3" if shared else None
        for limit in np.unique(limits[name], axis=1).T:
            if np.isfinite(limit).any():
                ax.plot(*thinned(step, drawable(ax, limit)), lw=2.6, alpha=0.45,
                        zorder=2.5, color=color or style_of(number)["color"],
                        marker="_" if len(step) == 1 else "", ms=14)  # fmt: skip
                ax.plot([], [], color=color or "0.3", lw=2.6, alpha=0.45, label=label)
                label = None


def mark(
    ax: "Axes",
    step: np.ndarray,
    curves: Mapping[str, np.ndarray],
    dots: Mapping[str, np.ndarray] | None = None,
    color: str | None = None,
    floor: float = 0.0,
) -> None:
    """Dots, zeros and what is not finite, the largest of each column."""
    wide = ax.get_yscale() != "linear"
    most = max(400 // max(len(curves), 1), 25) if len(curves) > 2 else 200
    mark_alone(ax, step, curves, color)
    said = set()
    for number, (name, y) in enumerate(curves.items()):
        ink = color or style_of(number)["color"]
        lanes = number % 16 / 16 * 0.06  # so that marks of several do not coincide
        edge = ax.get_xaxis_transform()
        for label, marker, at, height in (
            ("clipped", ".", (dots or {}).get(name, False) & np.isfinite(y), None),
            ("zero", "v", (y == 0) & wide, floor + 0.015 + lanes),
            ("not finite", "x", np.isnan(y), 0.985 - lanes),
        ):
            chosen = _chosen(np.flatnonzero(at), y, most)
            if len(chosen):
                where: dict[str, Any] = {} if height is None else {"transform": edge}
                ys = y[chosen] if height is None else np.full(len(chosen), height)
                ax.plot(step[chosen], ys, marker, ms=5 if height is None else 4,
                        color=ink, zorder=3, **where)  # fmt: skip
                if label not in said:
                    ax.plot([], [], marker, ms=5, color="0.3", label=label)
                said.add(label)


def mark_alone(
    ax: "Axes",
    step: np.ndarray,
    curves: Mapping[str, np.ndarray],
    color: str | None = None,
) -> None:
    """Dots for numbers to which no line leads."""
    for number, y in enumerate(curves.values()):
        here = np.pad(np.isfinite(drawable(ax, y)), 1)
        alone = np.flatnonzero(here[1:-1] & ~here[:-2] & ~here[2:])
        if len(alone):
            alone = _chosen(alone, y, _COLUMNS)
            ink = color or style_of(number)["color"]
            ax.plot(step[alone], y[alone], ".", ms=4, color=ink)


def _chosen(places: np.ndarray, y: np.ndarray, most: int) -> np.ndarray:
    """Of places to mark the one with the largest value in each column."""
    column = places * most // max(len(y), 1)
    order = np.lexsort((-np.nan_to_num(y[places]), column))
    first = np.unique(column[order], return_index=True)[1]
    return places[order][first]


def draw_factors(
    ax: "Axes", step: np.ndarray, factors: Mapping[str, np.ndarray | None]
) -> None:
    """The lower quarter of the Axes, with a scale of its own on the right."""
    strip = ax.twinx()
    top = 1.0
    for number, y in enumerate(factors.values()):
        if y is not None:
            strip.plot(*thinned(step, y), **style_of(number) | {"marker": ""}, lw=0.7)
            top = float(np.nanmax(y, initial=top))
    strip.set(ylim=(0, 4.4 * top), yticks=(0, top))
    strip.set_yticks((0, top), ("0", f"{top:.3g}"))
    strip.set_ylabel("factor", loc="bottom")
    strip.axhline(1.1 * top, color="0.7", lw=0.8)
    low, high = (ax.transScale.transform((1, y))[1] for y in ax.get_ylim())
    raised = ax.transScale.inverted().transform((0, low - 0.36 * (high - low)))[1]
    ax.set_ylim(bottom=raised)


def has_something(ax: "Axes", curves: Iterable[np.ndarray], what: str) -> bool:
    """Whether there is something to draw; a sentence in the Axes where not."""
    curves = [*curves]
    sizes = [len(y) for y in curves]
    sentence = ""
    if not sum(sizes):
        sentence = f"There are no {what}."
    elif not any(np.isfinite(y).any() for y in curves):
        sentence = "No number is finite."
    if sentence:
        ax.set(xticks=[], yticks=[])
        ax.text(0.5, 0.5, sentence, transform=ax.transAxes, ha="center", va="center")
    return not sentence


def labels_of(names: Iterable[str], most: int = 32) -> list[str]:
    """Names that leave room for the picture, without what paths have in common."""
    names = [*names]
    paths = [name.split("/") for name in names]
    shown = names
    if len(names) > 1 and max(map(len, names)) > most:
        first = _shared(paths)
        last = _shared([path[::-1] for path in paths])
        shown = ["/".join(["..."] * (first > 0) + path[first : len(path) - last]
                          + ["..."] * (last > 0)) for path in paths]  # fmt: skip
    cut = [x if len(x) <= most else f"{x[: most // 2 - 1]}...{x[1 - most // 2 :]}"
           for x in shown]  # fmt: skip
    cut = cut if len({*cut}) == len({*names}) else names
    # Matplotlib leaves out of a legend what begins with an underscore.
    return [f" {x}" if x.startswith("_") else x for x in cut]


def _shared(paths: list[list[str]]) -> int:
    """How many words all begin with."""
    same = [len({*words}) == 1 for words in zip(*paths, strict=False)]
    return same.index(False) if False in same else 0


def with_legend(ax: "Axes", beside: float = 1.02) -> "Axes":
    """Names the curves beside the Axes, for which these make room."""
    handles, names = ax.get_legend_handles_labels()
    if not handles:
        return ax
    height = ax.get_window_extent().height / ax.figure.dpi * 72  # in points
    columns = math.ceil(len(names) / max(int(height / 11), 1))
    ax.legend(handles, names, fontsize=8, labelspacing=0.3, handlelength=3,
              ncols=columns, loc="upper left", bbox_to_anchor=(beside, 1.0),
              borderaxespad=0.0)  # fmt: skip
    if ax.figure.get_layout_engine() is None:
        make_room(ax, right=columns * (max(map(len, names)) + 10), beside=beside)
    return ax


def make_room(ax: "Axes", left: int = 0, right: int = 0, beside: float = 1.02) -> None:
    """Narrows Axes for as many letters, of 8 points, some 5 wide."""
    letter = 5 / 72 / ax.figure.get_figwidth()
    box = ax.get_position()
    start = max(box.x0, letter * (left + 3)) if left else box.x0
    end = box.x1 if not right else min(box.x1, 0.99 - letter * right)
    width = (end - start) / (beside - 0.02)
    ax.set_position((start, box.y0, max(width, 0.3 * box.width), box.height))
