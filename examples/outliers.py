"""Digits with wrong labels, learned with and without a bound on every example.

    python -m examples.outliers
    python -m examples.outliers --wrong=0.3 --rates=0.03,0.1 --runs=1
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import linen as nn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import clipfx
from clipfx import per_example
from examples import _common

CLASSES = 10
ROUNDS = 200  # of timing, each with one step of every variant


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all variants have in common; each is a flag of the same name."""

    wrong: float = 0.1
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    max_norm: float = 1.0
    steps: int = 2300
    batch: int = 64
    hidden: int = 128
    runs: int = 3
    seed: int = 0


# See diffusion_digits: imported, an example keeps its flags to itself.
FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_integer = functools.partial(flags.DEFINE_integer, flag_values=FLAGS)
_float = functools.partial(flags.DEFINE_float, flag_values=FLAGS)
_float("wrong", Settings.wrong, "Share of the labels that are wrong.", 0, 1)
flags.DEFINE_list(
    "rates", [str(x) for x in Settings.rates], "Learning rates.", flag_values=FLAGS
)
_float("max_norm", Settings.max_norm, "The threshold of both clips.")
_integer("steps", Settings.steps, "Steps of each run.", 1)
_integer("batch", Settings.batch, "Digits in a step.", 1)
_integer("hidden", Settings.hidden, "Units of each layer.", 1)
_integer("runs", Settings.runs, "Seeds for each variant and rate.", 1)
_integer("seed", Settings.seed, "The first: of weights, order and wrong labels.", 0)
flags.DEFINE_string("out", "out/outliers", "Where to write.", flag_values=FLAGS)
flags.register_validator("max_norm", lambda x: x > 0, "must be greater than 0", FLAGS)


class MLP(nn.Module):
    """Logits `[..., 10]` of digits `[..., 64]`, by two hidden layers."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(CLASSES)(x)


class Data(NamedTuple):
    """Digits `[count, 64]` and what to say about them.

    `wrong` marks the labels to train on that are not what is seen; those held out are
    all right.
    """

    images: np.ndarray
    labels: np.ndarray
    wrong: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Batch(NamedTuple):
    """Digits `[batch, 64]`, their labels, and False in `where` for padding."""

    images: Any
    labels: Any
    where: Any


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a dict for each epoch, and the examples as seen at the end.

    In `rows`, `loss` is the mean over the epoch, `test` the accuracy on held-out digits
    and `learned` the share of the wrong labels that the model repeats.
    """

    variant: str
    rate: float
    seed: int
    rows: list[dict[str, Any]]
    norms: np.ndarray  # of the gradients of the training examples, as the rest
    losses: np.ndarray
    wrong: np.ndarray

    def column(self, name: str) -> np.ndarray:
        """One number for each epoch."""
        return np.array([row[name] for row in self.rows])

    def last(self, name: str) -> float:
        """The number of the last epoch."""
        return self.rows[-1][name]


def load_data(share: float, seed: int) -> Data:
    """Digits in [-1, 1], a fifth held out, and some of the other labels made wrong."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digits are missing: pip install scikit-learn.") from None
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = np.asarray(images, np.float32)[order] / 8 - 1
    labels = np.asarray(labels, np.int32)[order]
    test = len(labels) // 5
    noisy, wrong = spoil(labels[test:], share, np.random.default_rng((seed, 0)))
    return Data(images[test:], noisy, wrong, images[:test], labels[:test])


def spoil(
    labels: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Replaces a share of the labels by others; also says which."""
    wrong = rng.permutation(len(labels)) < round(share * len(labels))
    others = (labels + rng.integers(1, CLASSES, len(labels), np.int32)) % CLASSES
    return np.where(wrong, others, labels), wrong


def draw_batches(data: Data, settings: Settings, seed: int) -> Iterator[Batch]:
    """The batches of a run, those of an epoch at a time; the same for every variant."""
    rng = np.random.default_rng((seed, 1))
    count = len(data.labels)
    epoch = math.ceil(count / settings.batch)
    shape = epoch, settings.batch
    where = (np.arange(math.prod(shape)) < count).reshape(shape)
    for start in range(0, settings.steps, epoch):
        order = np.pad(rng.permutation(count), (0, math.prod(shape) - count))
        index = order.reshape(shape)
        batches = Batch(data.images[index], data.labels[index], where)
        yield Batch(*(x[: settings.steps - start] for x in batches))


def loss(params: Any, image: jax.Array, label: jax.Array) -> jax.Array:
    """Cross entropy of one digit `[64]`."""
    hidden = params["params"]["Dense_0"]["bias"].size
    logits = MLP(hidden).apply(params, image)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def plain_sum(params: Any, batch: Batch) -> tuple[Any, jax.Array]:
    """Sum of the gradients of a batch, and the losses `[batch]`."""

    def total(params):
        losses = jax.vmap(loss, (None, 0, 0))(params, batch.images, batch.labels)
        losses = jnp.where(batch.where, losses, 0)
        return losses.sum(), losses

    return jax.grad(total, has_aux=True)(params)


def bounded_sum(params: Any, batch: Batch, max_norm: float) -> tuple[Any, jax.Array]:
    """As `plain_sum`, with every gradient scaled down to `max_norm`."""
    grad = per_example.clipped_grad(loss, max_norm, batch_argnums=(1, 2))
    sums, info = grad(params, batch.images, batch.labels, where=batch.where)
    return sums, info.value


# From the threshold to the sum of a batch, and to what is done to its mean.
VARIANTS: dict[str, Callable[[float], tuple[Callable, Any]]] = {
    "none": lambda c: (plain_sum, optax.identity()),
    "batch": lambda c: (plain_sum, clipfx.clip_by_global_norm(c)),
    "per_example": lambda c: (
        functools.partial(bounded_sum, max_norm=c),
        optax.identity(),
    ),
}


class Learner(NamedTuple):
    """Parameters, the state of the optimizer, and the learning rate at the start."""

    params: Any
    state: Any
    rate: Any


Step = Callable[[Learner, Batch], tuple[Learner, jax.Array]]


def make_step(variant: str, settings: Settings) -> tuple[Any, Step]:
    """The optimizer, and a step, which gives the losses `[batch]`."""
    summed, bound = VARIANTS[variant](settings.max_norm)
    schedule = optax.cosine_decay_schedule(1.0, settings.steps)
    tx = optax.chain(bound, optax.sgd(schedule, momentum=0.9))

    def step(learner, batch):
        params, state, rate = learner
        sums, losses = summed(params, batch)
        count = batch.where.sum(dtype=jnp.float32)
        grads = jax.tree.map(lambda x: x / count, sums)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, optax.tree.scale(rate, updates))
        return Learner(params, state, rate), losses

    return tx, step


@functools.cache  # compiles once for all rates and seeds
def make_epoch(variant: str, settings: Settings) -> tuple[Any, Step]:
    """The optimizer, and all steps of a stack of batches."""
    tx, step = make_step(variant, settings)
    return tx, jax.jit(lambda learner, batches: jax.lax.scan(step, learner, batches))


def start(tx: Any, settings: Settings, rate: float, seed: int) -> Learner:
    """What a run begins with; the weights are the same for every variant."""
    params = MLP(settings.hidden).init(jax.random.key(seed), jnp.zeros(64))
    return Learner(params, tx.init(params), jnp.float32(rate))


@jax.jit
def predict(params: Any, images: jax.Array) -> jax.Array:
    """Classes `[batch]`."""
    hidden = params["params"]["Dense_0"]["bias"].size
    return MLP(hidden).apply(params, images).argmax(-1)


# Without the sum of the gradients, which costs about as much as the norms.
measure = jax.jit(per_example.norms(loss, batch_argnums=(1, 2)))


def train(variant: str, rate: float, seed: int, settings: Settings) -> Run:
    """Trains one model, and measures the gradients of all examples at the end."""
    data = load_data(settings.wrong, seed)
    tx, epoch = make_epoch(variant, settings)
    learner = start(tx, settings, rate, seed)
    rows, step = [], 0
    for batches in draw_batches(data, settings, seed):
        learner, losses = epoch(learner, batches)
        step += len(losses)
        said = np.asarray(predict(learner.params, data.images))
        right = np.asarray(predict(learner.params, data.test_images))
        rows.append({
            "variant": variant,
            "rate": rate,
            "seed": seed,
            "step": step,
            "loss": float(losses.sum() / batches.where.sum()),
            "test": float((right == data.test_labels).mean()),
            "learned": float((said == data.labels)[data.wrong].mean()),
        })
    seen = measure(learner.params, data.images, data.labels)
    norms, losses = np.asarray(seen.norm[:, 0]), np.asarray(seen.value)
    return Run(variant, rate, seed, rows, norms, losses, data.wrong)


def measure_times(settings: Settings) -> dict[str, float]:
    """Median milliseconds of a step of each variant, taken in turns."""
    data = load_data(settings.wrong, settings.seed)
    batch = jax.tree.map(
        lambda x: jnp.asarray(x[0]), next(draw_batches(data, settings, settings.seed))
    )
    ready = {}
    for name in VARIANTS:
        tx, step = make_step(name, settings)
        learner, step = start(tx, settings, 0.0, settings.seed), jax.jit(step)
        ready[name] = functools.partial(step, learner, batch)
        jax.block_until_ready(ready[name]())
    times = {name: [] for name in VARIANTS}
    for name in [*VARIANTS] * ROUNDS:
        begin = time.perf_counter()
        jax.block_until_ready(ready[name]())
        times[name].append(1000 * (time.perf_counter() - begin))
    return {name: float(np.median(x)) for name, x in times.items()}


def select(runs: Sequence[Run], variant: str, rate: float) -> list[Run]:
    """The runs of one cell of the table, one for each seed."""
    return [run for run in runs if (run.variant, run.rate) == (variant, rate)]


def best_rate(runs: Sequence[Run], variant: str) -> float:
    """The rate with the highest accuracy at the end, mean over seeds."""
    rates = dict.fromkeys(run.rate for run in runs)
    mean = lambda rate: np.mean([r.last("test") for r in select(runs, variant, rate)])
    return max(rates, key=mean)


def tabulate_rates(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each rate: accuracy at the end, mean and range over seeds."""
    rows = []
    for rate in dict.fromkeys(run.rate for run in runs):
        row: dict[str, Any] = {"rate": rate}
        for variant in VARIANTS:
            test = [run.last("test") for run in select(runs, variant, rate)]
            row[variant] = f"{np.mean(test):.3f} ({min(test):.3f}-{max(test):.3f})"
        rows.append(row)
    return rows


def find_wrong(wrong: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve of a score that should be large where labels are wrong.

    A diverged run has no order: 0.5, a guess.
    """
    from sklearn.metrics import roc_auc_score

    if not np.isfinite(score).all() or not 0 < wrong.sum() < len(wrong):
        return 0.5
    return float(roc_auc_score(wrong, score))


def summarize(runs: Sequence[Run], variant: str, ms: float) -> dict[str, Any]:
    """A row of the table of variants, each at its best rate; means over seeds."""
    rate = best_rate(runs, variant)
    chosen = select(runs, variant, rate)
    mean = lambda number: float(np.mean([number(run) for run in chosen]))
    return {
        "variant": variant,
        "rate": rate,
        "test": mean(lambda run: run.last("test")),
        "peak": mean(lambda run: run.column("test").max()),
        "learned": mean(lambda run: run.last("learned")),
        "norm, right": mean(lambda run: np.median(run.norms[~run.wrong])),
        "norm, wrong": mean(lambda run: np.median(run.norms[run.wrong])),
        "ROC, norm": mean(lambda run: find_wrong(run.wrong, run.norms)),
        "ROC, loss": mean(lambda run: find_wrong(run.wrong, run.losses)),
        "ms/step": ms,
    }


def plot(runs: Sequence[Run], path: pathlib.Path) -> None:
    """Draws accuracies, what is learned of wrong labels, and norms, as PNG."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    (by_rate, tests), (learned, norms) = figure.subplots(2, 2)
    rate = best_rate(runs, "per_example")
    for color, variant in zip(("C7", "C1", "C0"), VARIANTS, strict=True):
        plot_rates(by_rate, runs, variant, color)
        for axes, name in ((tests, "test"), (learned, "learned")):
            plot_band(axes, select(runs, variant, rate), name, color)
    by_rate.set(xscale="log", xlabel="learning rate", ylabel="held-out accuracy")
    by_rate.set(title="At the end", ylim=(0.85, 1))
    tests.set(xlabel="step", ylabel="held-out accuracy", ylim=(0.85, 1))
    tests.set(title=f"On the way, learning rate {rate:g}")
    learned.set(xlabel="step", ylabel="share of wrong labels repeated", ylim=(0, 1))
    plot_norms(norms, select(runs, "per_example", rate)[0])
    names = by_rate.get_legend_handles_labels()
    figure.legend(*names, loc="outside upper center", ncols=len(VARIANTS))
    figure.savefig(path, dpi=120)


def plot_rates(axes: Axes, runs: Sequence[Run], variant: str, color: str) -> None:
    """Accuracy at the end over rates, and its range over seeds."""
    rates = list(dict.fromkeys(run.rate for run in runs))
    ends = [[r.last("test") for r in select(runs, variant, rate)] for rate in rates]
    ends = np.array(ends)
    axes.plot(rates, ends.mean(1), "o-", color=color, ms=4, label=variant)
    axes.fill_between(rates, ends.min(1), ends.max(1), color=color, alpha=0.2, lw=0)


def plot_band(axes: Axes, runs: Sequence[Run], name: str, color: str) -> None:
    """A column over the steps: mean and range over seeds."""
    values = np.stack([run.column(name) for run in runs])
    steps = runs[0].column("step")
    axes.plot(steps, values.mean(0), color=color, lw=1.2)
    axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)


def plot_norms(axes: Axes, run: Run) -> None:
    """Two histograms on one logarithmic axis."""
    finite = run.norms[np.isfinite(run.norms) & (run.norms > 0)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.1, 1.0)
    bins = np.geomspace(low, high * 1.01, 50)
    for kind, color in ((~run.wrong, "C2"), (run.wrong, "C3")):
        label = "wrong labels" if color == "C3" else "right labels"
        axes.hist(run.norms[kind], bins, color=color, alpha=0.6, label=label)
    axes.set(xscale="log", yscale="log", xlabel="gradient norm", ylabel="examples")
    axes.set_title(f"Examples at the end of {run.variant}, seed {run.seed}")
    axes.legend()


def main(argv: Sequence[str]) -> None:
    """Runs every variant at every rate; prints and writes what came of it."""
    given = FLAGS.flag_values_dict() | {"rates": tuple(map(float, FLAGS.rates))}
    settings = Settings(**{f.name: given[f.name] for f in dataclasses.fields(Settings)})
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}: flags begin with --.")
        load_data(settings.wrong, settings.seed)
        out = _common.make_dir(FLAGS.out)
    except ValueError as error:
        raise SystemExit(f"outliers: {error}") from None

    times = measure_times(settings)
    seeds = range(settings.seed, settings.seed + settings.runs)
    runs = []
    for variant in VARIANTS:
        pairs = list(itertools.product(dict.fromkeys(settings.rates), seeds))
        for rate, seed in tqdm(pairs, f"{variant:>11}"):
            runs.append(train(variant, rate, seed, settings))
    rows = [summarize(runs, variant, times[variant]) for variant in VARIANTS]
    print("\nHeld-out accuracy at the end, mean and range over seeds:\n")
    print(_common.format_table(tabulate_rates(runs)))
    print("\nEach at its best rate:\n")
    print(_common.format_table(rows))
    _common.write_jsonl(out / "metrics.jsonl", (row for r in runs for row in r.rows))
    plot(runs, out / "outliers.png")
    print(f"Wrote metrics.jsonl and outliers.png to {out}.")


if __name__ == "__main__":
    app.run(main)
