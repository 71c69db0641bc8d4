"""A small diffusion model of 8x8 digits: eight ways to bound its weighted gradient.

    python -m examples.diffusion_digits
    python -m examples.diffusion_digits --data=images.npz --variants=none,global

The loss is the squared error of the predicted digits times SNR(t), which is 24,000 at
the first timestep and 2e-9 at the last. A batch has one timestep, and so one weight and
one threshold; in the variants called mixed each example has a timestep of its own, a
weight and a threshold. All runs share initial weights and digits, and all but the mixed
ones timesteps and noise.

What to use: with one timestep in a batch, the plain clip of the weighted gradient or
`clip_by_snr` in front of the weight; with a timestep for each example, a clip of each
example by the same rule. By default, as distances from samples to held-out digits, of
which training digits have 0.06: `none` 0.41, blurred and alike; `global` 0.089, and
exactly so the inverse rule before the weight; `min_snr` 0.096, where the Min-SNR
weighting that it is named after (Hang et al., 2023, arXiv 2303.09556) has 0.166. The
inverse rule after the weight suppresses early timesteps twice: 0.221, the worst bound.

Mixing helps without a clip, 0.213, but does not replace one. `mixed_min_snr` clips
every example: 0.094, with the lowest held-out error of all, 0.090 where `global` has
0.097.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import clipfx
from clipfx import per_example
from examples import _common, _run

TIMESTEPS = 1000  # of the cosine schedule
CHUNK = 250  # steps in one call; a call for each step would take twice the time
WINDOW = 50  # losses that a spike is compared with


def weigh(weight: Callable = lambda snr: snr) -> optax.GradientTransformationExtraArgs:
    """Multiplies a gradient by the weight of the loss, a function of its one SNR."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return optax.tree.scale(weight(extra["snr"]), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


# No clamps: at SNR 24,000 the default `low` would bind, and not undo the weight.
_clip_by_snr = functools.partial(clipfx.clip_by_snr, low=0.0, high=math.inf)
_inverse = functools.partial(_clip_by_snr, weight=clipfx.snr.inverse)

# From max_norm and gamma to what is done to the gradient of the unweighted loss.
VARIANTS: dict[str, Callable[[float, float], optax.GradientTransformation]] = {
    "none": lambda c, gamma: weigh(),
    "global": lambda c, gamma: optax.chain(weigh(), clipfx.clip_by_global_norm(c)),
    "inverse_unweighted": lambda c, gamma: optax.chain(_inverse(c), weigh()),
    "inverse_weighted": lambda c, gamma: optax.chain(weigh(), _inverse(c)),
    "min_snr": lambda c, gamma: optax.chain(_clip_by_snr(c, gamma=gamma), weigh()),
    "min_snr_weighting": lambda c, gamma: weigh(lambda snr: jnp.minimum(snr, gamma)),
}

# With a timestep per example: from max_norm, gamma and SNR `[batch]` to thresholds of
# the weighted gradients. One of SNR * clip(g, c) is one of clip(SNR * g, SNR * c).
MIXED: dict[str, Callable[[float, float, jax.Array], jax.Array]] = {
    "mixed_none": lambda c, gamma, snr: jnp.full_like(snr, math.inf),
    "mixed_min_snr": lambda c, gamma, snr: c * snr * clipfx.snr.min_snr(snr, gamma),
}
NAMES = (*VARIANTS, *MIXED)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all variants have in common; each is a flag of the same name."""

    data: str | None = _run.flag(
        None, "An .npz file of square images [N, ...] and labels [N] from 0 to 9."
    )
    variants: tuple[str, ...] = _run.flag(NAMES, "Methods to compare.", among=NAMES)
    steps: int = _run.flag(4000, "Training steps of each run.", least=1)
    batch: int = _run.flag(128, "Batch size.", least=1)
    hidden: int = _run.flag(256, "Hidden units per layer.", least=1)
    learning_rate: float = _run.flag(
        1e-3, "Initial learning rate; decays to 0.", above=0
    )
    max_norm: float = _run.flag(0.1, "Clipping threshold.", above=0)
    gamma: float = _run.flag(5.0, "Gamma of min_snr and min_snr_weighting.", above=0)
    seed: int = _run.flag(0, "Random seed.", least=0)


class Denoiser(nnx.Module):
    """Two residual layers, which predict the digits behind the noise."""

    def __init__(self, hidden: int, rngs: nnx.Rngs, pixels: int = 64):
        self.time = nnx.Linear(64, hidden, rngs=rngs)
        self.enter = nnx.Linear(pixels, hidden, rngs=rngs)
        self.first = nnx.Linear(hidden, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, rngs=rngs)
        self.leave = nnx.Linear(hidden, pixels, rngs=rngs)

    def __call__(self, noisy: jax.Array, t: jax.Array) -> jax.Array:
        """Digits `[batch, P]` from noisy ones that share the timestep t, `[]`."""
        angles = t.astype(jnp.float32) * np.geomspace(1, 1e-4, 32, dtype=np.float32)
        time = self.time(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])[None])
        x = self.enter(noisy) + time
        x += self.first(nnx.silu(x + time))
        x += self.second(nnx.silu(x + time))
        return self.leave(nnx.silu(x))


class Batch(NamedTuple):
    """Digits `[batch, P]`, their one timestep, its SNR, and the key of their noise.

    Mixed, all of these have an axis of examples.
    """

    digits: Any
    t: Any
    snr: Any
    key: Any


@dataclasses.dataclass(frozen=True)
class History:
    """A run: a dict for each step, and what came of it.

    `loss` is the unweighted one, `norm` that of the gradient times SNR, and `applied`
    that of what Adam was given. Of a mixed batch they are those of its first example,
    before and after its own clip.
    """

    variant: str
    rows: list[dict[str, Any]]
    held_out: float  # see `evaluate`
    samples: np.ndarray  # `[count, P]`
    distance: float  # from the samples to held-out digits

    def column(self, name: str) -> np.ndarray:
        """One number for each step."""
        return np.array([row[name] for row in self.rows])

    def by_timestep(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Means of t and of a column in bins of t; of what is finite."""
        t, values = self.column("t"), self.column(name)
        t, values = t[np.isfinite(values)], values[np.isfinite(values)]
        bins = np.digitize(t, np.geomspace(1, TIMESTEPS + 1, 11) - 1)
        means = lambda x: np.array([x[bins == i].mean() for i in np.unique(bins)])
        return means(t), means(values)


def load_data(path: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Digits `[count, P]` in [-1, 1], four fifths to train on and one to test."""
    digits = np.random.default_rng(0).permutation(_common.load_digits(path)[0])
    pixels = digits.shape[1]
    if math.isqrt(pixels) ** 2 != pixels:
        raise ValueError(f"images must be square, and these have {pixels} pixels.")
    return digits[len(digits) // 5 :], digits[: len(digits) // 5]


def draw_batches(digits: np.ndarray, settings: Settings) -> Iterator[Batch]:
    """The batches of a run, a stack of them at a time; the same for every variant."""
    rng = np.random.default_rng(settings.seed)
    key = jax.random.fold_in(jax.random.key(settings.seed), 0)
    for start in range(0, settings.steps, CHUNK):
        steps = np.arange(start, min(start + CHUNK, settings.steps), dtype=np.int32)
        rows = rng.integers(len(digits), size=(len(steps), settings.batch))
        t = rng.integers(TIMESTEPS, size=len(steps), dtype=np.int32)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(steps)
        yield Batch(digits[rows], t, clipfx.snr.cosine(TIMESTEPS)[t], keys)


def mix(batch: Batch) -> Batch:
    """The same digits with a timestep each; the first keeps the one they shared."""
    count = len(batch.digits)
    keys = jax.random.split(batch.key, count + 1)
    t = jax.random.randint(keys[0], (count,), 0, TIMESTEPS).at[0].set(batch.t)
    return Batch(batch.digits, t, clipfx.snr.cosine(TIMESTEPS)[t], keys[1:])


def x0_error(model: Denoiser, batch: Batch) -> jax.Array:
    """Mean squared error of the digits predicted: the unweighted loss."""
    drawn = jax.random.normal(batch.key, batch.digits.shape)
    noisy = (jnp.sqrt(batch.snr) * batch.digits + drawn) / jnp.sqrt(1 + batch.snr)
    return jnp.square(model(noisy, batch.t) - batch.digits).mean()


Learner = tuple[Denoiser, nnx.Optimizer]


def update(learner: Learner, batch: Batch) -> tuple[Learner, dict[str, jax.Array]]:
    """One step at one timestep; gives its numbers."""
    model, optimizer = learner
    loss, grads = nnx.value_and_grad(x0_error)(model, batch)
    optimizer.update(model, grads, snr=batch.snr)
    seen = clipfx.metrics.read(optimizer.opt_state)
    # The first and the last clip of the chain only measure.
    norms = [value for key, value in seen.items() if "/norm/" in key]
    numbers = {"t": batch.t, "snr": batch.snr, "loss": loss}
    return learner, numbers | {"norm": batch.snr * norms[0], "applied": norms[-1]}


def update_mixed(
    limit: Callable[[jax.Array], jax.Array], learner: Learner, batch: Batch
) -> tuple[Learner, dict[str, jax.Array]]:
    """One step with a timestep per example and a threshold for each by its SNR."""
    model, optimizer = learner
    graph, params = nnx.split(model)

    def weighted(params, example):
        one = example._replace(digits=example.digits[None])
        loss = x0_error(nnx.merge(graph, params), one)
        return example.snr * loss, loss

    mixed = mix(batch)
    grad = per_example.clipped_grad(weighted, math.inf, has_aux=True)
    sums, seen = grad(params, mixed, max_norm=limit(mixed.snr)[:, None])
    grads = jax.tree.map(lambda x: x / len(batch.digits), sums)
    optimizer.update(model, grads, snr=batch.snr)
    norm, factor = seen.norm[0, 0], seen.factor[0, 0]
    numbers = {"t": batch.t, "snr": batch.snr, "loss": seen.aux[0]}
    return learner, numbers | {"norm": norm, "applied": norm * factor}


@nnx.jit
def evaluate(model: Denoiser, digits: jax.Array) -> jax.Array:
    """Geometric mean of `x0_error` over 50 timesteps: loss weights do not matter."""
    t = np.linspace(0, TIMESTEPS - 1, 50).astype(np.int32)
    keys = jax.random.split(jax.random.key(0), len(t))
    error = lambda args: x0_error(model, Batch(digits, *args))
    errors = jax.lax.map(error, (t, clipfx.snr.cosine(TIMESTEPS)[t], keys))
    return jnp.exp(jnp.log(errors).mean())


@functools.partial(nnx.jit, static_argnames="count")
def sample(model: Denoiser, key: jax.Array, count: int) -> jax.Array:
    """Digits `[count, P]` from noise, by all timesteps, the noisiest first."""

    def step(x, inputs):  # x: digits + noise / sqrt(SNR)
        t, snr, cleaner, key = inputs  # cleaner: the SNR to come
        digits = jnp.clip(model(x * jnp.sqrt(snr / (1 + snr)), t), -1, 1)
        stay = snr / cleaner
        drawn = jnp.sqrt((1 - stay) / cleaner) * jax.random.normal(key, x.shape)
        return digits + stay * (x - digits) + drawn, None

    ratios = clipfx.snr.cosine(TIMESTEPS)
    cleaner = jnp.concatenate([jnp.full(1, jnp.inf), ratios[:-1]])
    keys = jax.random.split(key, TIMESTEPS + 1)  # the last one for the start
    inputs = jnp.arange(TIMESTEPS), ratios, cleaner, keys[:-1]
    shape = count, model.leave.out_features
    x = jax.random.normal(keys[-1], shape) / jnp.sqrt(ratios[-1])
    return jax.lax.scan(step, x, inputs, reverse=True)[0]


def sliced_wasserstein(one: np.ndarray, other: np.ndarray) -> float:
    """Wasserstein-2 distance of as many digits, along 256 fixed random directions."""
    directions = np.random.default_rng(0).normal(size=(one.shape[1], 256))
    directions /= np.linalg.norm(directions, axis=0)
    gaps = np.sort(one @ directions, axis=0) - np.sort(other @ directions, axis=0)
    return float(np.sqrt(np.square(gaps).mean()))


def choose(
    variant: str, settings: Settings, tx: optax.GradientTransformation
) -> tuple[Callable, optax.GradientTransformation]:
    """What a variant does in a step, and with what optimizer."""
    bounds = settings.max_norm, settings.gamma
    if variant in MIXED:
        limit = functools.partial(MIXED[variant], *bounds)
        return functools.partial(update_mixed, limit), tx
    measure = clipfx.clip_by_global_norm(math.inf)  # changes nothing, keeps the norm
    return update, optax.chain(measure, VARIANTS[variant](*bounds), measure, tx)


def train(variant: str, settings: Settings = Settings()) -> History:
    """Trains one model, and samples from it."""
    digits, held_out = load_data(settings.data)
    model = Denoiser(settings.hidden, nnx.Rngs(settings.seed), digits.shape[1])
    rate = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
    step, tx = choose(variant, settings, optax.adam(rate))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    train_steps = nnx.jit(
        nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    )
    rows = []
    stacks = draw_batches(digits, settings)
    bar = tqdm(stacks, f"{variant:>18}", math.ceil(settings.steps / CHUNK))
    for batches in bar:
        _, seen = train_steps((model, optimizer), batches)
        for values in zip(*(x.tolist() for x in seen.values()), strict=True):
            numbers = dict(zip(seen, values, strict=True))
            rows.append({"variant": variant, "step": len(rows), **numbers})
        bar.set_postfix_str(f"loss {seen['loss'].mean():.3f}", refresh=False)

    error = float(evaluate(model, jnp.asarray(held_out)))
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    samples = np.asarray(sample(model, key, len(held_out)))
    return History(variant, rows, error, samples, sliced_wasserstein(samples, held_out))


def count_spikes(history: History) -> int:
    """Losses 10 deviations above the last 50 in the same tenth of the timesteps."""
    tenths, spikes = history.column("t") * 10 // TIMESTEPS, 0
    for tenth in range(10):
        losses = history.column("loss")[tenths == tenth]
        if len(losses) > WINDOW:
            before = np.lib.stride_tricks.sliding_window_view(losses[:-1], WINDOW)
            usual = before.mean(axis=1) + 10 * before.std(axis=1)
            spikes += int((~(losses[WINDOW:] < usual)).sum())  # NaN counts
    return spikes


@np.errstate(all="ignore")  # a run may diverge
def summarize(history: History) -> dict[str, Any]:
    """A row of the table."""
    norms = [history.by_timestep(name)[1] for name in ("norm", "applied")]
    before, applied = (float(x.max() / x.min()) for x in norms)
    return {
        "variant": history.variant,
        "spread before": before,
        "spread applied": applied,
        "spikes": count_spikes(history),
        "held-out": history.held_out,
        "distance": history.distance,
    }


def plot_norms(histories: Sequence[History]) -> Figure:
    """Draws gradient norms over timesteps, one panel for each variant."""
    columns = min(len(histories), 3)
    rows = math.ceil(len(histories) / columns)
    figure = Figure(figsize=(3 * columns + 0.5, 2.6 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, history in zip(grid.flat, histories, strict=False):
        t, before = history.by_timestep("norm")
        _, applied = history.by_timestep("applied")
        axes.plot(t + 1, before, "o--C7", ms=3, label="times SNR, before the clip")
        axes.plot(t + 1, applied, "o-C0", ms=3, label="after clip and weight")
        axes.set(title=history.variant, xscale="log", yscale="log", xlim=(0.7, 1400))
    for axes in grid.flat[len(histories) :]:
        axes.remove()
    figure.supxlabel("timestep + 1")
    figure.supylabel("gradient norm, mean over the run")
    names = grid[0, 0].get_legend_handles_labels()
    figure.legend(*names, loc="outside upper center", ncols=2)
    return figure


def plot_samples(rows: dict[str, np.ndarray]) -> Figure:
    """Draws 16 or 32 digits for each name."""
    figure = Figure(figsize=(8, 1.05 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), squeeze=False)
    border = ((0, 0), (0, 0), (1, 1), (1, 1))
    for axes, (name, digits) in zip(grid.flat, rows.items(), strict=True):
        side, lines = math.isqrt(digits.shape[1]), min(len(digits) // 16, 2)
        tiles = digits[: 16 * lines].reshape(lines, 16, side, side)
        tiles = np.pad(tiles, border, constant_values=-1).swapaxes(1, 2)
        picture = tiles.reshape(lines * (side + 2), 16 * (side + 2))
        axes.imshow(picture, "gray_r", vmin=-1, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def run(settings: Settings, out: _run.Out) -> None:
    """Runs every variant asked for; prints and writes what came of it."""
    digits, held_out = load_data(settings.data)
    histories = [train(name, settings) for name in settings.variants]
    print("\n" + _common.format_table([summarize(history) for history in histories]))
    real = sliced_wasserstein(digits[: len(held_out)], held_out)
    print(
        "\nspread: of gradient norms over timesteps. spikes: losses 10 deviations above"
        "\nothers. held-out: error, geometric mean over timesteps. distance: from the"
        f"\nsamples to held-out digits, sliced Wasserstein; training digits {real:.3f}."
        "\nSpreads and spikes of a mixed variant: of the first example of each batch."
    )
    out.jsonl(row for history in histories for row in history.rows)
    out.figure(plot_norms(histories), "norms.png")
    samples = {history.variant: history.samples for history in histories}
    out.figure(plot_samples({"held-out digits": held_out} | samples), "samples.png")


if __name__ == "__main__":
    _run.main(run, Settings)
