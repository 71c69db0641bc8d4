"""A GAN of 8x8 digits whose generator is clipped: which classes it still draws.

    python -m examples.gan_digits
    python -m examples.gan_digits --optimizer=adam --clip=none,generator

Momentum of 0.9 makes the two networks overshoot each other (Radford et al., 2015, arXiv
1511.06434). Compared are no clip, a bound on the norm of the generator's gradient
(`generator`), one on the gradient that the critic gives each sample (`samples`, by
`clip_cotangent`), and, as a control, a generator whose learning rate is a share of the
critic's (`slower`). Every method has its best of four rates and three bounds.

With three seeds, of ten classes: 0.6 +- 0.5 without a clip, 8.5 +- 0.7 with the
generator clipped at 0.3, 9.1 +- 0.7 with its samples clipped at 0.3. The clip tames the
oscillation: in 100 steps a sample moves 2.3 and 2.6, and 4.4 without. But a generator
at 3% of the critic's rate, not clipped, draws 9.2 +- 0.5: at the best rate a clip does
no more than that. At rate 0.03 thresholds of 0.1 and 0.3 keep 8 classes and more, and
shares of 10% and 30% none.

A threshold can be too small: at rate 0.003, 1 and 0.3 give 5.6 and 6.6 classes, 0.1
gives 0.3, for the critic runs away from a generator that hardly moves. And where
nothing oscillates there is nothing to gain: without momentum (`--optimizer=sgd
--rates=0.03,0.1,0.3`), as with Adam, all ten classes are drawn with no clip.

No step stands out, but norms rise to five times the first ones and stay there: `python
-m clipfx.calibrate out/gan_digits` begins with those, 1.05. On two busy CPU cores a
step of both networks takes 0.16 to 0.2 ms without a clip, and up to 1.1 times as long
with either.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import clipfx
from examples import _common, _grid, _run, _sweep
from examples._grid import History, Params, Variant, make_mlp, mlp

CLIPS = ("none", "generator", "samples", "slower")
OPTIMIZERS = {
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "sgd": optax.sgd,
    "adam": functools.partial(optax.adam, b1=0.5),
}
LATENTS = 16
PIXELS = 64
DRAWN = 500  # samples that are looked at
CHUNK = 100  # steps between two looks
LEAST = 0.01  # share of the samples that a class has to have


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs have in common; each is a flag of the same name."""

    clip: tuple[str, ...] = _run.flag(CLIPS, "What to compare.", among=CLIPS)
    max_norm: tuple[float, ...] = _run.flag(
        (1.0, 0.3, 0.1), "Thresholds of the generator and of samples.", above=0
    )
    share: tuple[float, ...] = _run.flag(
        (0.3, 0.1, 0.03), "Of the rate, for a slower generator.", above=0
    )
    rates: tuple[float, ...] = _run.flag(
        (0.001, 0.003, 0.01, 0.03), "Learning rates of both networks.", above=0
    )
    optimizer: str = _run.flag("momentum", "Of both networks.", among=OPTIMIZERS)
    steps: int = _run.flag(1500, "Training steps of each run.", least=2 * CHUNK)
    hidden: int = _run.flag(64, "Hidden units per layer, of two.", least=1)
    batch: int = _run.flag(32, "Batch size.", least=1)
    runs: int = _run.flag(3, "Random seeds of each variant.", least=1)
    seed: int = _run.flag(0, "First random seed.", least=0)


class Numbers(NamedTuple):
    """What differs between runs, as arguments of the compiled step; None: no clip.

    Attributes:
      seed: Of weights and batches.
      rate: Learning rate of the critic.
      share: What the generator's is of it.
      max_norm: Threshold of the generator's gradient.
      max_cotangent: Threshold of what the critic tells each sample.
    """

    seed: Any
    rate: Any
    share: Any
    max_norm: Any
    max_cotangent: Any


def numbers_of(variant: Variant, batch: int) -> Numbers:
    """A bound on the samples is one on the sum of what they are told."""
    only = lambda clip, other: variant.bound if variant.clip == clip else other
    return Numbers(
        variant.seed,
        variant.rate,
        only("slower", 1.0),
        only("generator", math.inf),
        only("samples", math.inf) / batch,
    )


def generate(params: Params, latents: jax.Array) -> jax.Array:
    """Digits `[n, 64]` in [-1, 1] from latents `[n, 16]`."""
    return jnp.tanh(mlp(params, latents))


def critic_loss(params: Params, real: jax.Array, fake: jax.Array) -> jax.Array:
    """Cross entropy; the critic returns the logit of being real."""
    wrong = jax.nn.softplus(-mlp(params, real)), jax.nn.softplus(mlp(params, fake))
    return wrong[0].mean() + wrong[1].mean()


def generator_loss(
    params: Params, critic: Params, latents: jax.Array, max_cotangent: Any
) -> jax.Array:
    """The loss that does not saturate, by way of samples whose gradient is bounded."""
    samples = generate(params, latents)
    if max_cotangent is not None:
        samples = clipfx.clip_cotangent(samples, max_cotangent, axis=-1)
    return jax.nn.softplus(-mlp(critic, samples)).mean()


class Learner(NamedTuple):
    """Both networks and the states of their optimizers."""

    generator: Any
    critic: Any
    states: tuple[Any, Any]


def make_transforms(optimizer: str, numbers: Numbers) -> tuple[Any, Any]:
    """For the generator and for the critic."""
    make = OPTIMIZERS[optimizer]
    first = make(numbers.rate * numbers.share)
    if numbers.max_norm is not None:
        first = optax.chain(clipfx.clip_by_global_norm(numbers.max_norm), first)
    return first, make(numbers.rate)


def make_learner(settings: Settings, numbers: Numbers) -> Learner:
    keys = jax.random.split(jax.random.key(numbers.seed))
    inner = (settings.hidden, settings.hidden)
    generator = make_mlp(keys[0], (LATENTS, *inner, PIXELS))
    critic = make_mlp(keys[1], (PIXELS, *inner, 1))
    first, second = make_transforms(settings.optimizer, numbers)
    return Learner(generator, critic, (first.init(generator), second.init(critic)))


def update(
    settings: Settings,
    numbers: Numbers,
    digits: jax.Array,
    learner: Learner,
    step: jax.Array,
) -> tuple[Learner, dict[str, jax.Array]]:
    """A step of the critic, and one of the generator."""
    generator, critic, states = learner
    key = jax.random.fold_in(jax.random.key(numbers.seed), step)
    keys = jax.random.split(key, 3)
    latents = jax.random.normal(keys[0], (2, settings.batch, LATENTS))
    rows = jax.random.randint(keys[1], (settings.batch,), 0, len(digits))
    first, second = make_transforms(settings.optimizer, numbers)

    fake = generate(generator, latents[0])
    loss, grads = jax.value_and_grad(critic_loss)(critic, digits[rows], fake)
    updates, after = second.update(grads, states[1], critic)
    critic = optax.apply_updates(critic, updates)

    grad = jax.value_and_grad(generator_loss)
    fooled, grads = grad(generator, critic, latents[1], numbers.max_cotangent)
    norm = clipfx.global_norm(grads)
    updates, before = first.update(grads, states[0], generator)
    generator = optax.apply_updates(generator, updates)
    seen = {"critic loss": loss, "generator loss": fooled, "norm": norm}
    return Learner(generator, critic, (before, after)), seen


@functools.cache
def programs(settings: Settings) -> tuple[Any, Any]:
    """From numbers to learners, and `CHUNK` steps of them; of many runs at once."""

    def advance(numbers, learner, digits, start):
        steps = start + jnp.arange(CHUNK)
        step = functools.partial(update, settings, numbers, digits)
        learner, seen = jax.lax.scan(step, learner, steps)
        latents = jax.random.normal(jax.random.key(0), (DRAWN, LATENTS))
        return learner, seen, generate(learner.generator, latents)

    init = jax.jit(jax.vmap(functools.partial(make_learner, settings)))
    return init, jax.jit(jax.vmap(advance, (0, 0, None, None)))


class Judge(NamedTuple):
    """A nearest neighbour among the digits, and how near a sample has to be to one."""

    digits: np.ndarray
    labels: np.ndarray
    limit: float

    def nearest(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances `[n]` to the nearest digits, and the labels of these."""
        half = np.square(self.digits).sum(1) / 2 - samples @ self.digits.T
        rows = half.argmin(1)
        squares = np.square(samples - self.digits[rows]).sum(1)
        return np.sqrt(squares), self.labels[rows]

    def shares(self, samples: np.ndarray) -> np.ndarray:
        """The shares `[10]` of realistic samples of each class."""
        samples = np.nan_to_num(samples)
        distances, labels = self.nearest(samples)
        counts = np.bincount(labels[distances <= self.limit], minlength=10)
        return counts / len(samples)


@functools.cache
def load_data() -> tuple[np.ndarray, Judge, float]:
    """Digits `[1437, 64]` to train on, a judge of samples, and how often it is right.

    A sample is realistic that is as near to a digit as 99% of held-out digits are.
    """
    digits, labels = _common.load_digits()
    order = np.random.default_rng(0).permutation(len(digits))
    digits, labels, cut = digits[order], labels[order], len(digits) // 5
    judge = Judge(digits[cut:], labels[cut:], math.inf)
    distances, told = judge.nearest(digits[:cut])
    judge = judge._replace(limit=float(np.quantile(distances, 0.99)))
    return digits[cut:], judge, float((told == labels[:cut]).mean())


def look(shares: np.ndarray) -> dict[str, float]:
    """How many of the classes there are."""
    realistic = shares.sum()
    p = shares[shares > 0] / max(realistic, 1e-9)
    return {
        "classes": int((shares >= LEAST).sum()),
        "entropy": float(-(p * np.log2(p)).sum()),
        "realistic": float(realistic),
    }


def train(variants: Sequence[Variant], settings: Settings) -> list[History]:
    """Trains all runs side by side."""
    digits, judge, _ = load_data()
    init, advance = programs(settings)
    each = [numbers_of(variant, settings.batch) for variant in variants]
    numbers = _grid.stack(each)
    learners = init(numbers)
    rows: list[list[dict[str, Any]]] = [[] for _ in variants]
    norms = []
    samples: Any = None
    progress = tqdm(range(0, settings.steps, CHUNK), f"{len(variants)} runs")
    for start in progress:
        before = samples
        learners, *seen = advance(numbers, learners, digits, start)
        seen, samples = jax.device_get(seen)
        norms.append(seen.pop("norm"))
        for k, variant in enumerate(variants):
            moved = math.nan
            if before is not None:
                moved = np.sqrt(np.square(samples[k] - before[k]).sum(-1)).mean()
            mean = {name: float(x[k].mean()) for name, x in seen.items()}
            row = variant._asdict() | {"step": start + CHUNK} | mean
            row |= {"mean norm": float(norms[-1][k].mean()), "moved": float(moved)}
            row |= {"peak norm": float(norms[-1][k].max())}
            rows[k].append(row | look(judge.shares(samples[k])))
        now = np.mean([row[-1]["classes"] for row in rows])
        progress.set_postfix_str(f"{now:.1f} classes on average", refresh=False)
    by_run = np.concatenate(norms, 1)
    whole = zip(variants, rows, by_run, samples, strict=True)
    return [History(*each) for each in whole]


def measure_times(settings: Settings) -> dict[str, float]:
    """Milliseconds of a step of both networks by clip."""
    numbers = {"none": (None, None), "generator": (0.3, None), "samples": (None, 0.3)}
    numbers = {k: Numbers(settings.seed, 1e-3, 1.0, *x) for k, x in numbers.items()}
    given = load_data()[0], 0
    return _grid.ms_per_step(programs(settings), numbers, CHUNK, *given)


def variants_of(settings: Settings) -> list[Variant]:
    bounds = dict.fromkeys(settings.clip, settings.max_norm)
    bounds |= {"none": (math.inf,)} if "none" in bounds else {}
    bounds |= {"slower": settings.share} if "slower" in bounds else {}
    seeds = range(settings.seed, settings.seed + settings.runs)
    return _grid.variants(bounds, settings.rates, seeds)


SHOWN = ("classes", "entropy", "realistic", "moved", "mean norm")


def scores(history: History) -> dict[str, Any]:
    """Means over the last quarter of a run; what decides is the number of classes."""
    late = history.rows[len(history.rows) * 3 // 4 :]
    means = {name: float(np.mean([row[name] for row in late])) for name in SHOWN}
    total = means["classes"] + means["realistic"]  # of as many classes the better drawn
    return history.variant._asdict() | means | {"score": total}


def plot(histories: Sequence[History]) -> Figure:
    """Draws classes over rates and over thresholds, motion over steps, and samples."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    over_rates, over_bounds, over_steps, images = figure.subplots(2, 2).flat
    by = {history.variant: history for history in histories}
    rows = [*map(scores, histories)]
    names, tiles = [], []
    for k, ((clip,), runs) in enumerate(_sweep.groups(rows, ("clip",)).items()):
        best = _sweep.best(runs, ("bound", "rate"), "score")
        bound, rate = best[0]["bound"], best[0]["rate"]
        points = _grid.curve(
            (row for row in runs if row["bound"] == bound), "rate", "classes"
        )
        label = _grid.title(clip, bound)
        _sweep.draw_band(over_rates, *points, label, f"C{k}", marker="o")
        those = [by[Variant(clip, bound, rate, row["seed"])] for row in best]
        moved = [[row["moved"] for row in run.rows] for run in those]
        steps = [row["step"] for row in those[0].rows]
        label = f"{label}, rate {rate:g}"
        _sweep.draw_band(over_steps, steps, [*np.transpose(moved)], label, f"C{k}")
        names.append(clip)
        tiles.append(those[0].last[:12].reshape(-1, 8, 8))
    of_generator = [row for row in rows if row["clip"] == "generator"]
    for k, ((rate,), runs) in enumerate(_sweep.groups(of_generator, ("rate",)).items()):
        points = _grid.curve(runs, "bound", "classes")
        label = f"generator, rate {rate:g}"
        _sweep.draw_band(over_bounds, *points, label, f"C{k + 4}", marker="o")
    for axes in over_rates, over_bounds:
        axes.set(ylabel="classes drawn", ylim=(-0.5, 10.5), xscale="log")
    over_rates.set(xlabel="learning rate")
    over_bounds.set(xlabel="threshold")
    over_steps.set(xlabel="step", ylabel=f"distance a sample moves in {CHUNK} steps")
    over_steps.set_ylim(0)
    for axes in over_rates, over_bounds, over_steps:
        if axes.get_lines():
            axes.legend(fontsize="small")
    framed = [
        np.concatenate(np.pad(t, ((0, 0), (1, 1), (1, 1))), axis=1) for t in tiles
    ]
    images.imshow(np.concatenate(framed), cmap="gray", vmin=-1, vmax=1)
    images.set_yticks([10 * k + 4.5 for k in range(len(names))], names)
    images.set_xticks([])
    return figure


def run(settings: Settings, out: _run.Out) -> None:
    """Trains every variant; prints and writes what came of them."""
    histories = train(variants_of(settings), settings)
    rows = [*map(scores, histories)]
    table = _sweep.compared(rows, ("clip", "bound"), ("rate",), "score", SHOWN)
    print("\n" + _common.format_table([*table]))
    print(
        "Each at its best rate: mean +- standard deviation over seeds, in the last "
        "quarter of the steps.\nclasses: those that 1% of the samples or more belong "
        "to and look like; entropy: of the classes,\nin bits, 3.32 at most; realistic: "
        "samples as near to a digit as 99% of held-out digits are;\nmoved: how far a "
        f"sample is from what its latents gave {CHUNK} steps before; mean norm: of "
        "the\ngenerator's gradient before the clip. The nearest digit tells the class: "
        f"right for {load_data()[2]:.1%}\nof held-out digits. "
        + _sweep.told(measure_times(settings))
    )
    out.jsonl(_grid.lines(histories, rows, "score"))
    out.figure(plot(histories), "gan_digits.png")


if __name__ == "__main__":
    _run.main(run, Settings)
