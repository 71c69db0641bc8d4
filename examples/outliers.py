"""Digits with wrong labels, learned with and without per-example clipping.

    python -m examples.outliers
    python -m examples.outliers --wrong=0.2 --max_norm=0.3 --rates=0.003,0.1,0.3
    python -m examples.outliers --data=images.npz

A tenth of the training labels are wrong. Once the rest is learned, the largest
gradients are those of the wrong labels, and a model that follows them memorises these.
`per_example` bounds the gradient of each example, `batch` that of the mean, with the
same threshold. All variants share initial weights, wrong labels and batches, and each
uses its best learning rate.

By default `per_example` is best at a rate of 0.1, and there, with each seed, ahead of
the others at their best, by half a held-out digit in a hundred on average: 0.958, and
0.954 with `batch`, 0.953 with `none`. At that rate the others are four to six in a
hundred behind, and repeat nearly all wrong labels; `batch` is no better than `none`
with a smaller rate. Norms find the wrong labels for as long as the model does not
repeat them, and losses do so as well.

Stopping early is the other remedy: with --steps=300 few wrong labels are repeated. Of
the rates up to 1, `per_example` is best at 1 there, and ahead by half as much or more.

`python -m clipfx.calibrate out/outliers` reads norms of batches without a clip, and
begins with 1.39 for these. Of single examples the columns right and wrong tell: a
threshold belongs between the two.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import clipfx
from clipfx import per_example
from examples import _common, _run, _sweep

CLASSES = 10
ROUNDS = 200  # of timing, each with one step of every variant


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all variants have in common; each is a flag of the same name."""

    data: str | None = _run.flag(
        None, "An .npz file of images [N, ...] and labels [N] from 0 to 9."
    )
    wrong: float = _run.flag(0.1, "Fraction of wrong labels.", least=0.01, most=0.99)
    rates: tuple[float, ...] = _run.flag(
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.3), "Learning rates.", above=0
    )
    max_norm: float = _run.flag(1.0, "Clipping threshold.", above=0)
    steps: int = _run.flag(3000, "Training steps of each run.", least=1)
    batch: int = _run.flag(64, "Batch size.", least=1)
    runs: int = _run.flag(3, "Random seeds of each variant and rate.", least=1)
    seed: int = _run.flag(
        0, "First random seed, of weights, batches and labels.", least=0
    )


class MLP(nn.Module):
    """Two hidden layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits `[..., 10]` of digits `[..., P]`."""
        for _ in range(2):
            x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(CLASSES)(x)


MODEL = MLP()


class Data(NamedTuple):
    """Digits `[count, P]` and what to say about them.

    `wrong` marks the labels to train on that are not what is seen; those held out are
    all right.
    """

    images: np.ndarray
    labels: np.ndarray
    wrong: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Batch(NamedTuple):
    """Digits `[batch, P]`, their labels, and False in `where` for padding."""

    images: Any
    labels: Any
    where: Any


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a dict for each epoch, and the examples as seen at the end.

    In `rows`, `loss` is the mean over the epoch, `test` the accuracy on held-out digits
    and `repeated` the share of the wrong labels that the model repeats. `steps` has the
    norm of the gradient of each step, as the optimizer gets it.
    """

    variant: str
    rate: float
    seed: int
    rows: list[dict[str, Any]]
    steps: np.ndarray
    norms: np.ndarray  # of the gradients of the training examples, as the rest
    losses: np.ndarray
    wrong: np.ndarray

    def column(self, name: str) -> np.ndarray:
        """One number for each epoch."""
        return np.array([row[name] for row in self.rows])

    def last(self, name: str) -> float:
        """The number of the last epoch."""
        return self.rows[-1][name]

    def found(self, score: np.ndarray) -> float:
        """Area under the ROC curve of a score that should be high for wrong labels."""
        from sklearn.metrics import roc_auc_score

        if not np.isfinite(score).all():
            return math.nan
        return float(roc_auc_score(self.wrong, score))


def load_data(share: float, seed: int, path: str | None = None) -> Data:
    """Digits in [-1, 1], half of them held out; some labels of the rest made wrong."""
    images, labels = _common.load_digits(path)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order], labels[order]
    test = len(labels) // 2
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
    """Cross entropy of one digit `[P]`."""
    logits: Any = MODEL.apply(params, image)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


Sum = Callable[[Any, Batch], tuple[Any, jax.Array]]


def plain_sum(params: Any, batch: Batch) -> tuple[Any, jax.Array]:
    """Sum of the gradients of a batch, and the losses `[batch]`."""

    def total(params):
        losses = jax.vmap(loss, (None, 0, 0))(params, batch.images, batch.labels)
        losses = jnp.where(batch.where, losses, 0)
        return losses.sum(), losses

    return jax.grad(total, has_aux=True)(params)


def bounded_sum(max_norm: float) -> Sum:
    """As `plain_sum`, with every gradient scaled down to `max_norm`."""
    grad = per_example.clipped_grad(loss, max_norm, batch_argnums=(1, 2))

    def summed(params, batch):
        sums, info = grad(params, batch.images, batch.labels, where=batch.where)
        return sums, info.value

    return summed


# From the threshold to the sum of a batch, and to what is done to its mean.
VARIANTS: dict[str, Callable[[float], tuple[Sum, Any]]] = {
    "none": lambda c: (plain_sum, optax.identity()),
    "batch": lambda c: (plain_sum, clipfx.clip_by_global_norm(c)),
    "per_example": lambda c: (bounded_sum(c), optax.identity()),
}


class Learner(NamedTuple):
    """Parameters, the state of the optimizer, and the learning rate at the start."""

    params: Any
    state: Any
    rate: Any


Step = Callable[[Learner, Batch], tuple[Learner, tuple[jax.Array, jax.Array]]]


def make_step(variant: str, settings: Settings) -> tuple[Any, Step]:
    """The optimizer, and a step, which gives the losses `[batch]` and the norm."""
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
        return Learner(params, state, rate), (losses, optax.tree.norm(grads))

    return tx, step


@functools.cache  # compiles once for all rates and seeds
def make_epoch(variant: str, settings: Settings) -> tuple[Any, Step]:
    """The optimizer, and all steps of a stack of batches."""
    tx, step = make_step(variant, settings)
    return tx, jax.jit(lambda learner, batches: jax.lax.scan(step, learner, batches))


def start(tx: Any, rate: float, seed: int, pixels: int = 64) -> Learner:
    """What a run begins with; the weights are the same for every variant."""
    params = MODEL.init(jax.random.key(seed), jnp.zeros(pixels))
    return Learner(params, tx.init(params), jnp.float32(rate))


@jax.jit
def predict(params: Any, images: jax.Array) -> jax.Array:
    """Classes `[batch]`."""
    logits: Any = MODEL.apply(params, images)
    return logits.argmax(-1)


# Of single examples, in one pass and without any gradient.
measure = jax.jit(per_example.norms(loss, batch_argnums=(1, 2)))


def train(variant: str, rate: float, seed: int, settings: Settings) -> Run:
    """Trains one model, and measures the gradients of all examples at the end."""
    data = load_data(settings.wrong, seed, settings.data)
    tx, epoch = make_epoch(variant, settings)
    learner = start(tx, rate, seed, data.images.shape[1])
    rows, step, steps = [], 0, []
    for batches in draw_batches(data, settings, seed):
        learner, (losses, norms) = epoch(learner, batches)
        step += len(losses)
        steps.append(np.asarray(norms))
        said = np.asarray(predict(learner.params, data.images))
        right = np.asarray(predict(learner.params, data.test_images))
        rows.append(
            {
                "variant": variant,
                "rate": rate,
                "seed": seed,
                "step": step,
                "loss": float(losses.sum() / batches.where.sum()),
                "test": float((right == data.test_labels).mean()),
                "repeated": float((said == data.labels)[data.wrong].mean()),
            }
        )
    seen = measure(learner.params, data.images, data.labels)
    norms, losses = np.asarray(seen.norm[:, 0]), np.asarray(seen.value)
    steps = np.concatenate(steps)
    return Run(variant, rate, seed, rows, steps, norms, losses, data.wrong)


def measure_times(settings: Settings) -> dict[str, float]:
    """The least milliseconds of a step of each variant, taken in turns."""
    data = load_data(settings.wrong, settings.seed, settings.data)
    batch = jax.tree.map(
        lambda x: jnp.asarray(x[0]), next(draw_batches(data, settings, settings.seed))
    )
    calls = {}
    for name in VARIANTS:
        tx, step = make_step(name, settings)
        pixels = data.images.shape[1]
        learner = start(tx, 0.0, settings.seed, pixels)
        alone = jax.jit(lambda *args, step=step: step(*args)[0])  # measures no norm
        calls[name] = functools.partial(alone, learner, batch)
    return _sweep.in_turns(calls, ROUNDS)


def select(runs: Sequence[Run], variant: str, rate: float) -> list[Run]:
    """The runs of one cell of the table, one for each seed."""
    return [run for run in runs if (run.variant, run.rate) == (variant, rate)]


def list_rates(runs: Sequence[Run]) -> list[float]:
    """All learning rates, from the smallest."""
    return sorted({run.rate for run in runs})


def best_rate(runs: Sequence[Run], variant: str) -> float:
    """The rate with the highest accuracy at the end, mean over seeds."""
    mean = lambda rate: np.mean([r.last("test") for r in select(runs, variant, rate)])
    return max(list_rates(runs), key=mean)


def tabulate(
    runs: Sequence[Run], number: Callable[[Run], float]
) -> list[dict[str, Any]]:
    """A row for each rate: mean and range over seeds, for each variant."""
    rows = []
    for rate in list_rates(runs):
        row: dict[str, Any] = {"rate": rate}
        for variant in VARIANTS:
            x = [number(run) for run in select(runs, variant, rate)]
            row[variant] = f"{np.mean(x):.3f} ({min(x):.3f}-{max(x):.3f})"
        rows.append(row)
    return rows


@np.errstate(all="ignore")  # a run may diverge
def summarize(runs: Sequence[Run], variant: str, ms: float) -> dict[str, Any]:
    """A row of the table of variants, each at its best rate; means over seeds."""
    rate = best_rate(runs, variant)
    chosen = select(runs, variant, rate)
    mean = lambda number: float(np.mean([number(run) for run in chosen]))
    return {
        "variant": variant,
        "rate": rate,
        "held-out": mean(lambda run: run.last("test")),
        "peak": mean(lambda run: run.column("test").max()),
        "repeated": mean(lambda run: run.last("repeated")),
        "right": mean(lambda run: np.median(run.norms[~run.wrong])),
        "wrong": mean(lambda run: np.median(run.norms[run.wrong])),
        "by norm": mean(lambda run: run.found(run.norms)),
        "by loss": mean(lambda run: run.found(run.losses)),
        "ms/step": ms,
    }


def stack(runs: Sequence[Run], name: str) -> np.ndarray:
    """A number of each epoch, `[epochs, runs]`."""
    return np.stack([run.column(name) for run in runs], 1)


def plot(runs: Sequence[Run], max_norm: float) -> Figure:
    """Draws accuracies, what is repeated of wrong labels, and norms."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    (by_rate, tests), (repeated, norms) = figure.subplots(2, 2)
    rates = list_rates(runs)
    rate = best_rate(runs, "per_example")
    for color, variant in zip(("C7", "C1", "C0"), VARIANTS, strict=True):
        ends = [[1 - r.last("test") for r in select(runs, variant, x)] for x in rates]
        band = functools.partial(_common.plot_band, color=color)
        band(by_rate, rates, np.array(ends), marker="o", label=variant)
        chosen = select(runs, variant, rate)
        steps = chosen[0].column("step")
        band(tests, steps, 1 - stack(chosen, "test"))
        band(repeated, steps, stack(chosen, "repeated"))
    by_rate.set(title="At the end", xscale="log", xlabel="learning rate")
    tests.set(title=f"On the way, learning rate {rate:g}", xlabel="step")
    for axes in (by_rate, tests):
        axes.set(ylabel="held-out error", yscale="log")
        _common.plain_ticks(axes)
    repeated.set(title=f"On the way, learning rate {rate:g}", xlabel="step")
    repeated.set(ylabel="share of wrong labels repeated", ylim=(-0.02, 1.02))
    plot_norms(norms, select(runs, "per_example", rate)[0], max_norm)
    names = by_rate.get_legend_handles_labels()
    figure.legend(*names, loc="outside upper center", ncols=len(VARIANTS))
    return figure


def plot_norms(axes: Axes, run: Run, max_norm: float) -> None:
    """Two histograms on one logarithmic axis, and the threshold."""
    axes.set_title(f"Examples at the end of {run.variant}, seed {run.seed}")
    shown = np.isfinite(run.norms) & (run.norms > 0)
    if not shown.any():  # diverged; a logarithmic axis takes something to show
        return
    ends = [*run.norms[shown], 0.9 * max_norm, 1.1 * max_norm]
    bins = np.geomspace(min(ends), max(ends), 50).tolist()
    for wrong, name, color in ((False, "right", "C2"), (True, "wrong", "C3")):
        norms = run.norms[shown & (run.wrong == wrong)]
        axes.hist(norms, bins, color=color, alpha=0.6, label=f"{name} labels")
    axes.axvline(max_norm, color="k", ls="--", lw=1, label="threshold")
    axes.set(xscale="log", yscale="log", xlabel="gradient norm", ylabel="examples")
    _common.plain_ticks(axes)
    axes.legend(loc="upper left")


def run(settings: Settings, out: _run.Out) -> None:
    """Runs every variant at every rate; prints and writes what came of it."""
    load_data(settings.wrong, settings.seed, settings.data)
    times = measure_times(settings)
    seeds = range(settings.seed, settings.seed + settings.runs)
    runs = []
    for variant in VARIANTS:
        pairs = tqdm([*itertools.product(settings.rates, seeds)], f"{variant:>11}")
        for rate, seed in pairs:
            runs.append(train(variant, rate, seed, settings))
            note = f"rate {rate:g}, held-out {runs[-1].last('test'):.3f}"
            pairs.set_postfix_str(note, refresh=False)
    rows = [summarize(runs, variant, times[variant]) for variant in VARIANTS]
    print("\nHeld-out accuracy at the end, mean and range over seeds, by rate:\n")
    print(_common.format_table(tabulate(runs, lambda run: run.last("test"))))
    print("\nArea under the ROC curve, norms to find the wrong labels at the end:\n")
    print(_common.format_table(tabulate(runs, lambda run: run.found(run.norms))))
    print("\nEach at its best rate, means over seeds:\n")
    print(_common.format_table(rows))
    print(
        "\nbest rate: by held-out accuracy at the end. peak: the highest on the way."
        "\nrepeated: share of the wrong labels that the model repeats. right, wrong:"
        "\nmedian gradient norms by kind of label. by norm, by loss: area under the ROC"
        "\ncurve of what should find the wrong labels. ms/step: the least, in turns."
    )
    ends = [run.rows[-1] for run in runs]
    norms = [run.steps for run in runs]
    by_step = _sweep.norms_by_step(ends, norms, ("variant",), "test")
    out.jsonl([*(row for run in runs for row in run.rows), *by_step])
    out.figure(plot(runs, settings.max_norm), "outliers.png")


if __name__ == "__main__":
    _run.main(run, Settings)
