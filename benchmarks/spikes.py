"""Spikes in the training of a small transformer, and what clips make of them.

    python -m benchmarks.spikes
    python -m benchmarks.spikes --scenario=rate

A character transformer learns Python's manual with AdamW, or with Muon for the matrices
of its blocks and AdamW for the rest. All methods see the same weights and batches, at
every learning rate of a grid, for each seed. The scenarios:

outliers: now and then a batch is an outlier, as of a corrupted shard: random characters
instead of text, and its loss multiplied by 20. What counts is what the *other* steps
suffer from it.

rate: every step has the same batch, without outliers. The loss has no noise then, and
its spikes are the optimizer's own: Adam, with b2 0.999, divides by the gradients of
long ago. What counts is how many there are, and how many steps before the loss the
norms of gradient and update show them.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import clipfx
from benchmarks._raised import (
    APART,
    DEVIATIONS,
    WINDOW,
    beginnings,
    leads,
    raised,
)
from examples import _common

LAYERS, WIDTH, HEADS, LENGTH, BATCH = 2, 48, 4, 48, 8
DECAY = 0.01  # of weights, beside every method
SERIES = ("norm", "update", "measured", "loss")
AFTER, CALM = 20, 100  # steps: of the damage, without outliers at the start

_SCENARIO = flags.DEFINE_enum("scenario", "outliers", ["outliers", "rate"], "Which.")
_STEPS = flags.DEFINE_integer("steps", None, "By default 400, for rate 600.", 200)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each method and rate.", 1)
_SCALE = flags.DEFINE_float("outlier_scale", 20.0, "Of the loss of an outlier.")
_METHODS = flags.DEFINE_list("methods", None, "Names; by default the scenario's.")
_OUT = flags.DEFINE_string("out", None, "By default out/spikes_ and the scenario.")

Transform = optax.GradientTransformation


class Scenario(NamedTuple):
    """What differs between the two.

    Attributes:
      steps: Of each run.
      rates: Learning rates.
      b2: Of Adam.
      methods: Names, space between.
    """

    steps: int
    rates: list[float]
    b2: float
    methods: str


SCENARIOS = {
    "outliers": Scenario(
        400,
        [2e-3 * 2.0**k for k in range(5)],
        0.95,
        "none global autoclip zclip adagc spamp skip_spikes clip_spectrum "
        "clip_update_rms limit_norm_growth "
        "muon muon_global muon_recipe muon_behind muon_gate",
    ),
    "rate": Scenario(
        600,
        [8e-3 * 2.0**k for k in range(3)],
        0.999,
        "none b2_0.95 global zclip adagc skip_spikes clip_update_rms "
        "limit_norm_growth zclip_behind muon muon_global muon_gate",
    ),
}


def axes(path: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Rows and columns of a kernel of the blocks, None of any other leaf.

    Those of attention are `[WIDTH, HEADS, size]`, of its output `[HEADS, size, WIDTH]`.
    """
    names = [str(getattr(key, "key", key)) for key in path]
    if names[0] != "blocks" or names[-1] != "kernel":
        return None
    if "attend" not in names:
        return (0,), (1,)
    return ((0, 1), (2,)) if "out" in names else ((0,), (1, 2))


def labels(tree: Any) -> Any:
    """Who trains what."""
    label = lambda path, _: "muon" if axes(path) else "adamw"
    return jax.tree_util.tree_map_with_path(label, tree)


def dimensions(tree: Any) -> Any:
    """The same as Muon wants it."""
    numbers = lambda pair: pair and optax.contrib.MuonDimensionNumbers(*pair)
    return jax.tree_util.tree_map_with_path(lambda path, _: numbers(axes(path)), tree)


def adam(b2: float) -> Transform:
    return optax.scale_by_adam(b2=b2)


def stable(b2: float, max_rms: float = 1.0) -> Transform:
    return clipfx.clip_update_rms(adam(b2), max_rms, b2=b2)


# Its steps have a root mean square of 0.2, so that one learning rate fits both parts.
# At a rate of -1 it gives the direction, of the gradient's own sign.
muon = functools.partial(
    optax.contrib.muon,
    -1.0,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=dimensions,
)


def gated(b2: float) -> Transform:
    """Muon's direction behind its momentum, gated, beside Adam's."""
    gate = clipfx.dual_norm_gate(muon(beta=0.0, nesterov=False), RHO)
    parts: dict[Hashable, Transform] = {
        "muon": optax.chain(optax.ema(0.95, debias=False), gate),
        "adamw": adam(b2),
    }
    return optax.partition(parts, labels)


def before(clip: Transform) -> Callable[[float], Transform]:
    """A clip in front of AdamW."""
    return lambda b2: optax.chain(clip, adam(b2))


def before_muon(clip: Transform) -> Callable[[float], Transform]:
    """A clip in front of Muon beside AdamW."""
    return lambda b2: optax.chain(clip, muon(adam_b2=b2))


def behind(
    clip: Transform, optimizer: Callable[..., Transform] = adam
) -> Callable[[float], Transform]:
    """A clip behind the optimizer, in front of weight decay and learning rate."""
    return lambda b2: optax.chain(optimizer(b2), clip)


RECIPE = clipfx.clip_by_norm({"adamw": 1.0, "muon": math.inf}, groups=labels)
RHO = 8.0  # the norm in the metrics of 200 steps with outliers
# From b2 to a step's direction; one setting each, as one would take it without a
# search. Those that clip nothing measure Adam's squared gradient by its second moment.
METHODS: dict[str, Callable[[float], Transform]] = {
    "none": lambda b2: stable(b2, math.inf),
    "b2_0.95": lambda _: stable(0.95, math.inf),
    "global": before(clipfx.clip_by_global_norm(1.0)),
    "autoclip": before(clipfx.autoclip(10.0)),
    "zclip": before(clipfx.zclip()),
    "zclip_behind": behind(clipfx.zclip()),
    "adagc": before(clipfx.adagc(warmup_steps=50)),
    "spamp": before(clipfx.spamp()),
    "skip_spikes": lambda b2: clipfx.skip_spikes(adam(b2)),
    "clip_spectrum": before(clipfx.clip_spectrum(0.1, axes=axes)),
    "clip_spectrum_behind": behind(clipfx.clip_spectrum(5.0, axes=axes)),
    "clip_update_rms": stable,
    "limit_norm_growth": before(clipfx.limit_norm_growth()),
    "muon": lambda b2: clipfx.clip_update_rms(muon(adam_b2=b2), math.inf, b2=b2),
    "muon_global": before_muon(clipfx.clip_by_global_norm(1.0)),
    "muon_recipe": before_muon(RECIPE),
    "muon_behind": behind(
        clipfx.clip_by_global_norm(25.0), lambda b2: muon(adam_b2=b2)
    ),
    "muon_gate": gated,
}


class Block(nnx.Module):
    """Attention and a perceptron, each behind a norm."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.second = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """From `[B, T, WIDTH]` to the same."""
        x = x + self.attend(self.first(x), mask=mask)
        return x + self.down(jax.nn.gelu(self.up(self.second(x))))


class Transformer(nnx.Module):
    """Two blocks between an embedding and a readout."""

    def __init__(self, characters: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(characters, WIDTH, rngs=rngs)
        self.place = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.readout = nnx.Linear(WIDTH, characters, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Logits `[B, T, characters]` of what follows `[B, T]`."""
        x = self.embed(ids) + self.place(jnp.arange(LENGTH))[None]
        mask = nnx.make_causal_mask(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.readout(self.norm(x))


class Batches(NamedTuple):
    """What all methods train on.

    Attributes:
      ids: int32 `[steps, seeds, BATCH, LENGTH + 1]`.
      outlier: bool `[steps, seeds]`.
      held_out: int32 `[128, LENGTH + 1]`, from the last tenth of the text.
      characters: The size of the alphabet.
    """

    ids: np.ndarray
    outlier: np.ndarray
    held_out: np.ndarray
    characters: int


def make_batches(scenario: str, steps: int, seeds: int) -> Batches:
    """Passages, after 100 steps with an outlier about every 60; or always the same."""
    alphabet, text = _common.encode(_common.load_text())
    split = len(text) * 9 // 10
    cut = lambda starts: text[starts[..., None] + np.arange(LENGTH + 1)]
    rng = np.random.default_rng(0)
    held_out = cut(rng.integers(split, len(text) - LENGTH, 128))
    ids = cut(rng.integers(split - LENGTH, size=(steps, seeds, BATCH)))
    outlier = rng.random((steps, seeds)) < 1 / 60
    outlier[:CALM] = False
    if scenario == "rate":
        same = np.broadcast_to(ids[:1], ids.shape)
        return Batches(same, np.zeros_like(outlier), held_out, len(alphabet))
    # Far enough from each other to tell their damages apart.
    for step in range(1, steps):
        outlier[step] &= ~outlier[max(0, step - 2 * AFTER) : step].any(axis=0)
    noise = rng.integers(len(alphabet), size=ids.shape, dtype=np.int32)
    ids = np.where(outlier[..., None, None], noise, ids)
    return Batches(ids, outlier, held_out, len(alphabet))


@dataclasses.dataclass(frozen=True)
class Runs:
    """One method at all rates, for all seeds.

    Attributes:
      loss, norm, update: `[steps, rates, seeds]`; the loss in bits per character and
        not multiplied, the norms of the gradient and of the step, before weight
        decay and learning rate.
      measured: The same shape: of the clip's own norms, all together; where nothing is
        clipped, the root of Adam's squared gradient by its second moment, of the
        tensor where it is largest.
      threshold: The same shape, NaN where groups have their own.
      held_out: `[rates, seeds]`, bits per character at the end.
      clip_rate: `[rates, seeds]`, of the groups' steps.
    """

    loss: np.ndarray
    norm: np.ndarray
    update: np.ndarray
    measured: np.ndarray
    threshold: np.ndarray
    held_out: np.ndarray
    clip_rate: np.ndarray


def train(
    tx: Transform, rates: list[float], batches: Batches, scale: float, progress: tqdm
) -> Runs:
    """Trains at every rate for every seed, all at once."""
    steps, seeds = batches.outlier.shape
    models = [Transformer(batches.characters, nnx.Rngs(seed)) for seed in range(seeds)]
    graph, _, rest = nnx.split(models[0], nnx.Param, ...)
    tx = optax.with_extra_args_support(tx)

    def bits(params, ids):
        logits = nnx.merge(graph, params, rest)(ids[:, :-1])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return loss.mean() / math.log(2)

    def step(rate, carry, batch):
        (params, state), (count, ids, outlier) = carry, batch
        weighted = lambda params: bits(params, ids) * jnp.where(outlier, scale, 1.0)
        loss, grads = jax.value_and_grad(weighted)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        rate = rate * jnp.minimum(1.0, (count + 1) / 50)
        move = lambda p, u: p - rate * (u + DECAY * p)
        params = jax.tree.map(move, params, updates)
        metrics = optax.tree.get(state, "metrics")
        limit = metrics.threshold[0] if "global" in metrics.groups else jnp.nan
        loss = loss / jnp.where(outlier, scale, 1.0)
        norms = clipfx.global_norm(grads), clipfx.global_norm(updates)
        return (params, state), (loss, *norms, metrics.total, limit)

    def several(rate, carry, chunk):
        return jax.lax.scan(functools.partial(step, rate), carry, chunk)

    over_seeds = jax.vmap(several, in_axes=(None, 0, (None, 1, 1)))
    run = jax.jit(jax.vmap(over_seeds, in_axes=(0, 0, None)), donate_argnums=1)
    params = [nnx.to_pure_dict(nnx.state(model, nnx.Param)) for model in models]
    params = jax.tree.map(lambda *xs: jnp.stack([jnp.stack(xs)] * len(rates)), *params)
    carry = params, jax.vmap(jax.vmap(tx.init))(params)
    rows = []
    for first in range(0, steps, 50):
        part = slice(first, first + 50)
        count = jnp.arange(steps)[part]
        chunk = count, batches.ids[part], batches.outlier[part]
        carry, seen = run(jnp.array(rates), carry, chunk)
        rows.append([np.asarray(x) for x in seen])
        progress.update(len(count))
    # From [rates, seeds, steps] to [steps, rates, seeds].
    seen = (np.moveaxis(np.concatenate(x, axis=-1), -1, 0)
            for x in zip(*rows, strict=True))  # fmt: skip
    evaluate = jax.jit(
        jax.vmap(jax.vmap(lambda params: bits(params, batches.held_out)))
    )
    metrics = optax.tree.get(carry[1], "metrics")
    rate = (metrics.clipped / metrics.steps).mean(axis=-1)
    series = dict(
        zip(("loss", "norm", "update", "measured", "threshold"), seen, strict=True)
    )
    return Runs(
        **series, held_out=np.asarray(evaluate(carry[0])), clip_rate=np.asarray(rate)
    )


def damage(loss: np.ndarray, outlier: np.ndarray) -> float:
    """Mean loss of the clean steps after an outlier beyond that of those before."""
    gaps = [
        loss[at + 1 : at + 1 + AFTER].mean() - loss[at - AFTER : at].mean()
        for at in np.flatnonzero(outlier[: len(outlier) - AFTER])
    ]
    return float(np.mean(gaps)) if gaps else math.nan


def spread(row: Any, digits: int = 3) -> str:
    """Mean, least and most."""
    low, mean, high = np.min(row), np.mean(row), np.max(row)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def best_rate(runs: Runs) -> int:
    """The place of the rate with the best mean on held-out text."""
    return int(np.nanargmin(runs.held_out.mean(axis=1)))


def summarize_outliers(
    found: dict[str, Runs], batches: Batches, rates: list[float]
) -> list[dict[str, str]]:
    """A row for each method, at the rate where it ends best."""
    least = min(float(np.nanmin(runs.held_out.mean(axis=1))) for runs in found.values())
    rows = []
    for name, runs in found.items():
        best, seeds = best_rate(runs), range(runs.held_out.shape[1])
        clean = [runs.loss[~batches.outlier[:, s], best, s] for s in seeds]
        harm = [damage(runs.loss[:, best, s], batches.outlier[:, s]) for s in seeds]
        good = (runs.held_out <= 1.2 * least).all(axis=1)
        stable = max(np.compress(good, rates), default=math.nan)
        rows.append({
            "method": name,
            "best rate": f"{rates[best]:.3g}",
            "held out": spread(runs.held_out[best]),
            "damage": spread(harm),
            "raised": str(sum(int(raised(loss).sum()) for loss in clean)),
            "clip rate": f"{runs.clip_rate[best].mean():.2f}",
            "largest stable": f"{stable:.3g}".replace("nan", "-"),
        })  # fmt: skip
    return rows


def around(series: np.ndarray, spike: int, offsets: Any) -> np.ndarray:
    """A series around a spike by its median in the 100 steps before."""
    return series[spike + np.asarray(offsets)] / np.median(
        series[spike - WINDOW : spike]
    )


def summarize_rate(
    found: dict[str, Runs], rates: list[float]
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """A row for each method; and for those that clip nothing one for each series."""
    rows, warnings = [], []
    short = lambda x: f"{float(f'{x:.2g}'):g}"
    each_rate = lambda row: ", ".join(map(short, row))
    for name, runs in found.items():
        grid = [*np.ndindex(runs.held_out.shape)]
        spikes = {at: beginnings(raised(runs.loss[:, *at])) for at in grid}
        count = [sum(len(spikes[k, s]) for s in range(runs.held_out.shape[1]))
                 for k in range(len(rates))]  # fmt: skip
        settled = runs.loss[2 * WINDOW :]
        ratio = (settled.max(axis=0) / settled.min(axis=0)).max(axis=1)
        rows.append({
            "method": name,
            "spikes": ", ".join(map(str, count)),
            "largest / least": each_rate(ratio),
            "last loss": each_rate(runs.loss[-50:].mean(axis=(0, 2))),
            "clip rate": f"{runs.clip_rate.mean():.2f}",
        })  # fmt: skip
        if name not in ("none", "b2_0.95", "muon") or not sum(count):
            continue
        for series in SERIES:
            values = getattr(runs, series)
            each = [leads(values[:, *at], spikes[at]) for at in grid]
            early = np.array([x for found, _ in each for x in found])
            then = [
                around(values[:, *at], t, [0])[0] for at in grid for t in spikes[at]
            ]
            peaks = [
                values[t : t + APART, *at].max() for at in grid for t in spikes[at]
            ]
            ahead = early[early > 0]
            warnings.append({
                "method": name,
                "series": series,
                "before": f"{len(ahead)} of {len(early)}",
                "same step": str((early == 0).sum()),
                "steps": f"{np.median(ahead):.0f} ({ahead.min()} to {ahead.max()})"
                if len(ahead) else "-",
                "false": str(sum(false for _, false in each)),
                "then": short(np.median(then)),
                "peaks": f"{short(np.median(peaks))} "
                f"({short(np.min(peaks))} to {short(np.max(peaks))})",
            })  # fmt: skip
    return rows, warnings


def look(name: str, names: list[str]) -> dict[str, Any]:
    """The same colour and line for a method in every picture; Muon's are dashed."""
    place = names.index(name)
    dashed = name.startswith("muon")
    plain = {"none": "black", "muon": "black"}
    return {
        "color": plain.get(name, f"C{place % 10}"),
        "ls": "--" if dashed else "-" if place < 10 else "-.",
        "marker": "osD^vP*X"[place % 8],
        "ms": 4,
        "lw": 1.2,
        "label": name,
    }


def plot_outliers(
    found: dict[str, Runs], batches: Batches, rates: list[float], path: Any
) -> None:
    """Draws losses around outliers, each method at its best rate, and the grid."""
    figure = Figure(figsize=(10, 9), layout="constrained")
    around, grid = figure.subplots(2)
    offsets = np.arange(-10, AFTER + 1)
    for name, runs in found.items():
        style, best = look(name, [*found]), best_rate(runs)
        curves = [
            runs.loss[at + offsets, best, seed]
            - runs.loss[at - AFTER : at, best, seed].mean()
            for seed in range(batches.outlier.shape[1])
            for at in np.flatnonzero(batches.outlier[:-AFTER, seed])
        ]
        curve = np.mean(curves, axis=0)
        curve[offsets == 0] = np.nan  # the outlier's own loss is high for everyone
        around.plot(offsets, curve, **style, markevery=4)
        grid.plot(rates, runs.held_out.mean(axis=1), **style)
    around.set(xlabel="steps after an outlier", ylabel="loss beyond that before, bits")
    grid.set(xscale="log", xlabel="learning rate", ylabel="held out, bits/char")
    grid.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
    grid.set_xticks([], minor=True)
    lowest = min(np.nanmin(runs.held_out) for runs in found.values())
    grid.set_ylim(lowest - 0.1, lowest + 1.5)
    handles, names = grid.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper")
    figure.savefig(path, dpi=120)


def plot_rate(found: dict[str, Runs], rates: list[float], path: Any) -> None:
    """Draws the loss of one run of each method, and all series around spikes."""
    rows = math.ceil(len(found) / 2)
    figure = Figure(figsize=(10, 4 + 1.3 * rows), layout="constrained")
    layout = figure.add_gridspec(rows + 3, 2)
    for place, (name, runs) in enumerate(found.items()):
        axes = figure.add_subplot(layout[place // 2, place % 2])
        loss = runs.loss[CALM:, -1, 0]
        axes.semilogy(np.arange(CALM, CALM + len(loss)), loss, "k", lw=0.8)
        axes.set_title(name, fontsize="small", loc="left")
        least = np.nanmin(loss)
        axes.set_ylim(0.9 * least, max(1.5 * least, 1.2 * np.nanmax(loss)))
        axes.set_ylabel("bits")
        if place >= len(found) - 2:
            axes.set_xlabel(f"step of one run at a learning rate of {rates[-1]:g}")
    axes, (name, runs) = figure.add_subplot(layout[rows:, :]), next(iter(found.items()))
    offsets = np.arange(-APART, APART)
    places = [(*at, t) for at in np.ndindex(runs.held_out.shape)
              for t in beginnings(raised(runs.loss[:, *at]))
              if t + APART <= len(runs.loss)]  # fmt: skip
    for series in SERIES if places else ():
        values = getattr(runs, series)
        curves = [around(values[:, k, s], t, offsets) for k, s, t in places]
        axes.plot(offsets, np.median(curves, axis=0), label=series)
    axes.axvline(0, color="gray", lw=0.8)
    axes.set(yscale="log", xlabel="steps after the loss is raised",
             ylabel=f"by the median of {WINDOW} steps before")  # fmt: skip
    axes.set_title(f"median of {len(places)} spikes of {name}", fontsize="small")
    axes.legend(*axes.get_legend_handles_labels())
    figure.savefig(path, dpi=120)


def show(rows: list[dict[str, str]]) -> None:
    """Prints a table."""
    print("\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


def main(argv: list[str]) -> None:
    """Trains with every method; prints tables and writes them, and a picture."""
    del argv
    scenario = SCENARIOS[_SCENARIO.value]
    names = _METHODS.value or scenario.methods.split()
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise SystemExit(
            f"spikes: unknown method {unknown[0]!r}: known are {', '.join(METHODS)}."
        )
    steps, rates = _STEPS.value or scenario.steps, scenario.rates
    out = _common.make_dir(_OUT.value or f"out/spikes_{_SCENARIO.value}")
    batches = make_batches(_SCENARIO.value, steps, _SEEDS.value)
    found = {}
    with tqdm(total=len(names) * steps, unit="step") as progress:
        for name in names:
            progress.set_description(name)
            tx = METHODS[name](scenario.b2)
            found[name] = train(tx, rates, batches, _SCALE.value, progress)
    if _SCENARIO.value == "outliers":
        tables = [summarize_outliers(found, batches, rates)]
        notes = f"""
{steps} steps, {_SEEDS.value} seeds: mean (least to most), bits per character, at the
rate of the method that ends best.
damage: loss of the {AFTER} steps after an outlier less that of the {AFTER} before.
raised: clean steps with a loss {DEVIATIONS} deviations above the {WINDOW} before.
largest stable: the rate at which every seed ends within 20% of the best of all."""
        plot_outliers(found, batches, rates, out / "spikes.png")
    else:
        tables = [table for table in summarize_rate(found, rates) if table]
        notes = f"""
{steps} steps, {_SEEDS.value} seeds, learning rates of {rates}.
spikes: begin where the loss is raised, {DEVIATIONS} deviations above the mean of the
{WINDOW} steps before, as it has not been for {APART} steps; of each rate.
largest / least: loss of a run from step {2 * WINDOW} on, the largest of the seeds.
last loss: the mean of the last 50 steps.
before: spikes before which the series was raised, within {APART} steps. steps: by how
many, median (least to most). false: times it was, and no spike came.
then: its ratio to its median of the {WINDOW} steps before, when the loss is raised.
peaks: the largest of a spike, median (least to most)."""
        plot_rate(found, rates, out / "spikes.png")
    for table in tables:
        show(table)
    print(notes)
    data = {
        name: {k: v.tolist() for k, v in dataclasses.asdict(runs).items()}
        for name, runs in found.items()
    }
    text = json.dumps({"rates": rates, "tables": tables, "runs": data})
    (out / "spikes.json").write_text(text, encoding="utf-8")
    print(f"Wrote {out / 'spikes.json'} and {out / 'spikes.png'}.")


if __name__ == "__main__":
    app.run(main)
