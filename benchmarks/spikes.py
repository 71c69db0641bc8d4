"""Outlier batches in the training of a small transformer, clipped in eight ways.

    python -m benchmarks.spikes

A character transformer learns Python's manual with AdamW. Now and then a batch is an
outlier, as of a corrupted shard: random characters instead of text, and its loss
multiplied by 20. What counts is what the *other* steps suffer from it. All methods see
the same weights, batches and outliers, at every learning rate of a grid, for each seed.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
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
from examples import _common

LAYERS, WIDTH, HEADS, LENGTH, BATCH = 2, 48, 4, 48, 8
RATES = [1e-3 * 2.0**k for k in range(8)]
WINDOW, AFTER, CALM = 100, 20, 100  # of the spike score, of the damage, at the start

_STEPS = flags.DEFINE_integer("steps", 600, "Steps of each run.", 200)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each method and rate.", 1)
_SCALE = flags.DEFINE_float("outlier_scale", 20.0, "Of the loss of an outlier.")
_METHODS = flags.DEFINE_list("methods", None, "Names; by default all.")
_OUT = flags.DEFINE_string("out", "out/spikes", "The directory to write to.")

Make = Callable[[optax.GradientTransformation], optax.GradientTransformation]


def before(clip: optax.GradientTransformation) -> Make:
    """A clip in front of the optimizer."""
    return lambda tx: optax.chain(clip, tx)


# One setting each, as one would take it without a search.
METHODS: dict[str, Make] = {
    "none": before(clipfx.clip_by_global_norm(math.inf)),
    "global": before(clipfx.clip_by_global_norm(1.0)),
    # For all twenty layers together a bound of 1.05.
    "per-layer": before(clipfx.clip_per_layer(18**-0.5)),
    "autoclip": before(clipfx.autoclip(10.0)),
    "zclip": before(clipfx.zclip()),
    "adagc": before(clipfx.adagc(warmup_steps=50)),
    "spamp": before(clipfx.spamp()),
    "skip_spikes": clipfx.skip_spikes,
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


def make_batches(steps: int, seeds: int) -> Batches:
    """Passages of the text, after 100 steps with an outlier about every 60."""
    alphabet, text = _common.encode(_common.load_text())
    split = len(text) * 9 // 10
    cut = lambda starts: text[starts[..., None] + np.arange(LENGTH + 1)]
    rng = np.random.default_rng(0)
    held_out = cut(rng.integers(split, len(text) - LENGTH, 128))
    ids = cut(rng.integers(split - LENGTH, size=(steps, seeds, BATCH)))
    outlier = rng.random((steps, seeds)) < 1 / 60
    outlier[:CALM] = False
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
      loss, norm, threshold: `[steps, rates, seeds]`; the loss in bits per character
        and not multiplied, the threshold NaN where groups have their own.
      held_out: `[rates, seeds]`, bits per character at the end.
      clip_rate: `[rates, seeds]`, of the groups' steps.
    """

    loss: np.ndarray
    norm: np.ndarray
    threshold: np.ndarray
    held_out: np.ndarray
    clip_rate: np.ndarray


def train(make: Make, batches: Batches, scale: float, progress: tqdm) -> Runs:
    """Trains at every rate for every seed, all at once."""
    steps, seeds = batches.outlier.shape
    models = [Transformer(batches.characters, nnx.Rngs(seed)) for seed in range(seeds)]
    graph, _, rest = nnx.split(models[0], nnx.Param, ...)
    tx = make(
        optax.chain(optax.scale_by_adam(b2=0.95), optax.add_decayed_weights(0.01))
    )
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
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        metrics = optax.tree.get(state, "metrics")
        seen = loss / jnp.where(outlier, scale, 1.0), clipfx.global_norm(grads)
        limit = metrics.threshold[0] if "global" in metrics.groups else jnp.nan
        return (params, state), (*seen, limit)

    def several(rate, carry, chunk):
        return jax.lax.scan(functools.partial(step, rate), carry, chunk)

    over_seeds = jax.vmap(several, in_axes=(None, 0, (None, 1, 1)))
    run = jax.jit(jax.vmap(over_seeds, in_axes=(0, 0, None)), donate_argnums=1)
    rates = jnp.array(RATES)
    params = [nnx.state(model, nnx.Param) for model in models]
    params = jax.tree.map(lambda *xs: jnp.stack([jnp.stack(xs)] * len(RATES)), *params)
    carry = params, jax.vmap(jax.vmap(tx.init))(params)
    rows = []
    for first in range(0, steps, 50):
        part = slice(first, first + 50)
        count = jnp.arange(steps)[part]
        chunk = count, batches.ids[part], batches.outlier[part]
        carry, seen = run(rates, carry, chunk)
        rows.append([np.asarray(x) for x in seen])
        progress.update(len(count))
    # From [rates, seeds, steps] to [steps, rates, seeds].
    loss, norm, threshold = (np.moveaxis(np.concatenate(x, axis=-1), -1, 0)
                             for x in zip(*rows, strict=True))  # fmt: skip
    evaluate = jax.jit(
        jax.vmap(jax.vmap(lambda params: bits(params, batches.held_out)))
    )
    metrics = optax.tree.get(carry[1], "metrics")
    rate = (metrics.clipped / metrics.steps).mean(axis=-1)
    return Runs(loss, norm, threshold, np.asarray(evaluate(carry[0])), np.asarray(rate))


def spike_score(loss: np.ndarray, outlier: np.ndarray) -> float:
    """Percent of the clean steps 10 deviations above those of a window before."""
    clean, spikes = loss[~outlier], 0
    for at in range(WINDOW, len(clean)):
        past = clean[at - WINDOW : at]
        spikes += not clean[at] < past.mean() + 10 * past.std()
    return 100 * spikes / (len(clean) - WINDOW)


def damage(loss: np.ndarray, outlier: np.ndarray) -> float:
    """Mean loss of the clean steps after an outlier beyond that of those before."""
    gaps = [
        loss[at + 1 : at + 1 + AFTER].mean() - loss[at - AFTER : at].mean()
        for at in np.flatnonzero(outlier[: len(outlier) - AFTER])
    ]
    return float(np.mean(gaps)) if gaps else math.nan


def largest_stable(held_out: np.ndarray, best: float) -> float:
    """The largest rate whose every seed ends within 20% of the best of all methods."""
    good = [rate for rate, row in zip(RATES, held_out, strict=True)
            if (row <= 1.2 * best).all()]  # fmt: skip
    return max(good, default=math.nan)


def summarize(
    name: str, runs: Runs, batches: Batches, common: int, least: float
) -> dict[str, Any]:
    """A row of the table.

    Args:
      name: Of the method.
      runs: Its runs.
      batches: What it was trained on.
      common: Place of the rate that all methods share in the first columns.
      least: The best mean of all methods on held-out text.
    """
    seeds = range(runs.held_out.shape[1])
    each = lambda measure: [
        measure(runs.loss[:, common, s], batches.outlier[:, s]) for s in seeds
    ]
    means = np.where(np.isfinite(runs.held_out).all(axis=1), runs.held_out.mean(1), 1e9)
    best = int(np.argmin(means))
    spread = lambda row, digits=2: (
        f"{np.mean(row):.{digits}f} ({np.min(row):.{digits}f} to "
        f"{np.max(row):.{digits}f})"
    )
    return {
        "method": name,
        "spike score": spread(each(spike_score)),
        "damage": spread(each(damage), 3),
        "held out": spread(runs.held_out[common], 3),
        "clip rate": f"{runs.clip_rate[common].mean():.2f}",
        "best held out": spread(runs.held_out[best], 3),
        "best rate": f"{RATES[best]:.3g}",
        "largest stable": f"{largest_stable(runs.held_out, least):.3g}",
    }


def plot(found: dict[str, Runs], batches: Batches, common: int, path: Any) -> None:
    """Draws losses around outliers, norms of one run, and the grid of rates."""
    figure = Figure(figsize=(9, 10), layout="constrained")
    around, norms, grid = figure.subplots(3)
    offsets = np.arange(-10, AFTER + 1)
    for number, (name, runs) in enumerate(found.items()):
        color = f"C{number}"
        curves = [
            runs.loss[at + offsets, common, seed]
            - runs.loss[at - AFTER : at, common, seed].mean()
            for seed in range(batches.outlier.shape[1])
            for at in np.flatnonzero(batches.outlier[:-AFTER, seed])
        ]
        curve = np.mean(curves, axis=0)
        curve[offsets == 0] = np.nan  # the outlier's own loss is high for everyone
        around.plot(offsets, curve, color=color, label=name)
        limit = runs.threshold[:, common, 0]
        if np.isfinite(limit).any():
            norms.plot(limit, color=color, lw=1, label=name)
        mean = runs.held_out.mean(axis=1)
        grid.plot(RATES, mean, "o-", color=color, label=name, ms=3)
        low, high = runs.held_out.min(axis=1), runs.held_out.max(axis=1)
        grid.fill_between(RATES, low, high, color=color, alpha=0.1)
    first = next(iter(found.values()))
    norms.plot(
        first.norm[:, common, 0], "k", lw=0.6, label="norm, first method", zorder=0
    )
    around.set(xlabel="steps after an outlier", ylabel="loss beyond that before, bits")
    norms.set(yscale="log", xlabel="step", ylabel="norm, thresholds, one run")
    grid.set(xscale="log", xlabel="learning rate", ylabel="held out, bits/char")
    lowest = min(np.nanmin(runs.held_out) for runs in found.values())
    grid.set_ylim(lowest - 0.1, lowest + 2.5)
    for axes in (around, norms, grid):
        axes.legend(ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    """Trains with every method; prints a table and writes it, and a picture."""
    del argv
    names = _METHODS.value or list(METHODS)
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise SystemExit(
            f"spikes: unknown method {unknown[0]!r}: known are {', '.join(METHODS)}."
        )
    out = _common.make_dir(_OUT.value)
    batches = make_batches(_STEPS.value, _SEEDS.value)
    found = {}
    with tqdm(total=len(names) * _STEPS.value, unit="step") as progress:
        for name in names:
            progress.set_description(name)
            found[name] = train(METHODS[name], batches, _SCALE.value, progress)
    means = found[names[0]].held_out.mean(axis=1)
    common = int(np.nanargmin(means))
    least = min(float(np.nanmin(x.held_out.mean(axis=1))) for x in found.values())
    table = [summarize(name, x, batches, common, least) for name, x in found.items()]
    print("\n| " + " | ".join(table[0]) + " |\n|" + "---|" * len(table[0]))
    for row in table:
        print("| " + " | ".join(row.values()) + " |")
    print(f"""
{_STEPS.value} steps, {_SEEDS.value} seeds: mean (least to most), bits per character.
All but the last three columns are at {RATES[common]:.3g}, where {names[0]} ends best.
spike score: percent of clean steps 10 deviations above the {WINDOW} before them.
damage: loss of the {AFTER} steps after an outlier less that of the {AFTER} before.
largest stable: the rate at which every seed ends within 20% of the best of all.""")
    data = {
        name: {k: v.tolist() for k, v in dataclasses.asdict(runs).items()}
        for name, runs in found.items()
    }
    text = json.dumps({"rates": RATES, "table": table, "runs": data})
    (out / "spikes.json").write_text(text, encoding="utf-8")
    plot(found, batches, common, out / "spikes.png")
    print(f"Wrote {out / 'spikes.json'} and {out / 'spikes.png'}.")


if __name__ == "__main__":
    app.run(main)
