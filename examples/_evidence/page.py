"""The page: rows of claims as tables, their pictures, and how to read it back."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples._evidence import (
    adaptive,
    bounds,
    clips,
    games,
    growth,
    layers,
    noise,
    optimizers,
    practice,
    private,
    sequences,
    stability,
    training,
)
from examples._evidence.claims import AGREES, FALSE, LIMITS, Row

THEMES = (growth, clips, noise, optimizers, layers, games, bounds, stability, private,
          training, practice, adaptive, sequences)  # fmt: skip
CLAIMS: dict[str, Callable[[], Row]] = {
    claim.__name__: claim for theme in THEMES for claim in theme.CLAIMS
}
# Of these the bulk is training, some ten seconds for those that share one.
TRAINED = (
    ("rnn", "rates", "zone"), ("gan",), ("repulsion", "close_contacts"), ("typical",),
    ("fair", "fair_ratio"), ("memorized",), ("snr_samples",), ("private", "automatic"),
    ("least_threshold", "direction"), ("deep_nets",), ("normalized_rates",),
    ("taught_chaos",), ("together",), ("per_layer",), ("adam_clip",), ("box_loss",),
    ("exponential",), ("generalizes",), ("gated", "outlying"), ("smoothest",),
    ("unnormalized",),
)  # fmt: skip


def rows_of(names: Sequence[str]) -> dict[str, Row]:
    """Rows by name, in one process, in which claims share what they train."""
    return {name: CLAIMS[name]() for name in names}


INTRO = """\
# Claims about clipping, measured

What is said about gradient clipping, and about the gradients it is for, is often right,
sometimes only where it was first said, and in places wrong. Each row here states a
claim, tries it in the smallest experiment that can refute it, and compares the numbers.
All of this page is made by `python -m examples.evidence`; `--only=` with the names in
front of claims repeats single ones.
"""
READING = f"""\
The verdict is computed from the numbers:

- **{FALSE}**: in the case that the claim speaks of one number is, for any seed, not
  where the claim puts it. The row is the counterexample.
- **{LIMITS}**: those are right, and one is not of a case that the words leave out, but
  where the claim is often used.
- **{AGREES}**: all are right.

In brackets behind each number stands what the claim says of it; bold ones refute it; a
spread is from the least to the largest of the seeds.

‖g‖ is the Euclidean norm of a gradient g, c the threshold of a clip by norm,
g · min(1, c/‖g‖), v that of a clip by value, which cuts every entry at ±v; η is the
learning rate, λ the weight decay. The norm of a matrix is its largest singular value.
"""


def render(rows: Mapping[str, Row]) -> str:
    """The page of all claims, in Markdown.

    Args:
      rows: By name, all of `CLAIMS`.
    """
    found = [row.verdict for row in rows.values()]
    parts = [
        INTRO,
        f"**{len(found)} claims: {found.count(AGREES)} agree, {found.count(LIMITS)} "
        f"hold with limits, {found.count(FALSE)} are false as stated.**\n",
        READING,
    ]
    for theme in THEMES:
        lines = [_line(claim.__name__, rows[claim.__name__]) for claim in theme.CLAIMS]
        table = [
            "| Claim, and experiment | Measured (expected) | Verdict |",
            "|---|---|---|",
        ]
        parts += [f"## {theme.TITLE}\n", "\n".join(table + lines) + "\n"]
        if theme in PICTURES:
            name, told, _ = PICTURES[theme]
            parts.append(f"![{told}](img/{name}.png)\n")
        parts.append(theme.NOTE + "\n")
    return "\n".join(parts)


def _line(name: str, row: Row) -> str:
    source = f" {row.source}." if row.source else ""
    numbers = zip(row.measured, row.expected, row.spread, strict=True)
    cells = []
    for measured, expected, spread in numbers:
        *label, want = expected.rsplit(": ", 1)
        told = f"; {spread}" if spread else ""
        cells.append(f"{''.join(f'{x}: ' for x in label)}{measured} ({want}){told}")
    claim = f"`{name}` {row.claim}{source}<br>*{row.experiment}*"
    both = (cell.replace("|", "\\|") for cell in (claim, "<br>".join(cells)))
    return f"| {' | '.join(both)} | {row.verdict} |"


def verdicts(page: str) -> dict[str, str]:
    """By name, in the page's order, the verdict of each row."""
    rows = re.findall(r"^\| `(\w+)` .*\| ([^|]+) \|$", page, re.M)
    return dict(rows)


# --------------------------------------------------------------------------- pictures


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    return figure, figure.subplots()


def draw_directions() -> Figure:
    """Cosines over the dimension, of normal and of Cauchy entries."""
    figure, axes = _axes()
    styles = {"k:o": 9, "C1-s": 6, "C2-D": 6, "C3-^": 6}  # two of them coincide
    for kind, (style, size) in zip(clips.KINDS, styles.items(), strict=True):
        cosines = [np.mean(clips.turning(kind, size)) for size in clips.DIMENSIONS]
        axes.plot(clips.DIMENSIONS, cosines, style, ms=size, label=kind)
    heavy = [np.mean(clips.turning("by value, v = σ", size, heavy=True))
             for size in clips.DIMENSIONS]  # fmt: skip
    axes.plot(
        clips.DIMENSIONS, heavy, "v--", color="C2", label="by value, v = 1, Cauchy"
    )
    axes.set(
        xlabel="entries of the gradient", ylabel="cosine", xscale="log", ylim=(0, 1.05)
    )
    axes.legend(loc="center right", fontsize="small")
    return figure


def draw_orbits() -> Figure:
    """Distances from the solution of a game, step by step."""
    figure, axes = _axes()
    runs = {
        "no clip": (math.inf, 0.0), "c = ½": (0.5, 0.0), "c = ½, damped": (0.5, 0.025),
    }  # fmt: skip
    for (label, case), style in zip(runs.items(), ("-", "--", "-."), strict=True):
        axes.plot(games.radii(*case), style, label=label)
    axes.set(
        xlabel="step", ylabel="distance from the solution", xscale="log", yscale="log"
    )
    axes.set(xlim=(1, None), ylim=(0.5, 100))
    axes.legend()
    return figure


def draw_thresholds() -> Figure:
    """Losses of a recurrent net over the threshold, at several rates."""
    figure, axes = _axes()
    sweep = training.recall()
    shown = [*training.LIMITS[:-1], 1000.0]  # infinite stands at the end
    for k, rate in enumerate(sweep.rates):
        loss = np.minimum(np.median(sweep.loss[:, k], axis=-1), 30.0)
        axes.plot(shown, loss, marker="osD^v"[k], label=f"rate {rate:g}")
    axes.set(xscale="log", yscale="log", ylim=(0.04, 15), xlabel="threshold c",
             ylabel="loss, of 1 for a guess")  # fmt: skip
    axes.set_xticks(shown, [*(f"{x:g}" for x in shown[:-1]), "no clip"])
    axes.minorticks_off()
    axes.axhline(1, color="k", lw=1, ls=":")
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    return figure


PICTURES: dict[ModuleType, tuple[str, str, Callable[[], Figure]]] = {
    clips: (
        "evidence_directions",
        "How far clips turn a gradient, over the number of its entries",
        draw_directions,
    ),
    games: (
        "evidence_orbits",
        "Distance from the solution of a game of two players, step by step",
        draw_orbits,
    ),
    training: (
        "evidence_thresholds",
        "Loss of a recurrent net over the threshold, for several learning rates",
        draw_thresholds,
    ),
}
