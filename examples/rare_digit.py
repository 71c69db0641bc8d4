"""A rare digit under differential privacy: which clip, and at what learning rate.

    python -m examples.rare_digit
    python -m examples.rare_digit --noise_multiplier=2
    python -m examples.rare_digit --data=images.npz

Of digit 8 the training set has 8 examples, of every other about 90. `none` is ordinary
training; `fixed` is DP-SGD; the others have adaptive thresholds of `clipfx.privacy`:
`quantile` by the median norm, `bounded` the same but not below where it starts,
`dpsgd_f` by digit, `global` and `adapt` scale all gradients alike up to a second
threshold. All private ones have the same epsilon: with noised counts the gradient gets
more noise. The rates are the same for all; seeds share splits, weights and batches.

By default epsilon is 20.5, which is little privacy. With --noise_multiplier=2 it is 6.9
and no bounded variant has more than an eighth of digit 8 right at any rate: with 822
examples there is nothing to compare. All numbers are means over ten seeds, held out.

Privacy costs the rare digit most. `none` has 0.93 of all digits right, 0.99 of digit 2
and 0.51 of digit 8 (deviation 0.08); `fixed` at its best rate, of 2, has 0.89, 0.99 and
0.15 (0.11). Without noise (--noise_multiplier=0) `fixed` does as well as `none`, at a
rate of 8: here the noise costs, the bound does not.

The rate says more than the rule. `fixed` has 0.00 of digit 8 right at 0.3, 0.01 at 1,
0.15 at 2 and 0.21 at 4; `adapt` 0.00, 0.02, 0.17 and 0.21, so with `fixed` at 0.3 and
`adapt` at 4 the rule would seem to matter most. At equal rates of 2 to 8 these two and
`bounded` are within 0.03, a third of a deviation.

The other rules are worse. `quantile` follows the digits that fit, down to a threshold
of 0.03: nothing of digit 8. In `dpsgd_f` the digits with the largest threshold set the
noise for all, and it learns best at 0.3; 0.12 of digit 8 at a rate of 1, for 0.83 of
all. A batch has one 8, and counts have noise of 6. `global` drops what exceeds 20 and
takes a twentieth of the rest: less signal for the same noise.

No norms are written: those of private examples are private, and may choose a threshold
only as the adaptive variants do, within epsilon.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from tqdm import tqdm

from clipfx import privacy
from examples import _common, _run, _sampling

CLASSES = 10
RARE, USUAL = 8, 2  # the digits compared
DELTA = 1e-5
MULTIPLE = 32  # sizes of padded batches


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all variants have in common; each is a flag of the same name."""

    data: str | None = _run.flag(
        None, "An .npz file of images [N, ...] and labels [N] from 0 to 9."
    )
    kept: float = _run.flag(
        0.09, "Fraction of the rare digit's examples to keep.", least=0, most=1
    )
    rates: tuple[float, ...] = _run.flag(
        (0.1, 0.3, 1.0, 2.0, 4.0, 8.0), "Learning rates.", above=0
    )
    max_norm: float = _run.flag(
        1.0, "Clipping threshold, initial if adaptive.", above=0
    )
    noise_multiplier: float = _run.flag(1.0, "Joint noise multiplier.", least=0)
    count_stddev: float = _run.flag(
        6.0, "Standard deviation of the noise on counts.", above=0
    )
    upper: float = _run.flag(20.0, "Upper threshold of global and adapt.", above=0)
    steps: int = _run.flag(300, "Training steps of each run.", least=1)
    batch: int = _run.flag(128, "Expected batch size.", least=1)
    runs: int = _run.flag(10, "Random seeds of each variant and rate.", least=1)
    seed: int = _run.flag(0, "First random seed.", least=0)


class MLP(nn.Module):
    """One hidden layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits `[..., 10]` of digits `[..., P]`."""
        return nn.Dense(CLASSES)(nn.tanh(nn.Dense(32)(x)))


MODEL = MLP()


class Data(NamedTuple):
    """Digits `[N, P]` and their labels `[N]`, to train on and held out.

    With seeds, all have one more axis in front.
    """

    images: Any
    labels: Any
    test_images: Any
    test_labels: Any


def split_digits(kept: float, seed: int, path: str | None = None) -> Data:
    """Half of each digit held out, and of the rare one a share of the other half."""
    images, labels = _common.load_digits(path)
    if np.bincount(labels, minlength=CLASSES).min() < 2:
        raise ValueError(f"{path!r} must have two images or more of each label.")
    rng, train, test = np.random.default_rng((seed, 0)), [], []
    for digit in range(CLASSES):
        places = rng.permutation(np.flatnonzero(labels == digit))
        half = len(places) // 2
        count = len(places) - half
        if digit == RARE:
            count = max(1, round(kept * count))
        test.append(places[:half])
        train.append(places[half : half + count])
    one, other = np.concatenate(train), np.concatenate(test)
    return Data(images[one], labels[one], images[other], labels[other])


def draw_batches(count: int, settings: Settings, seed: int) -> np.ndarray:
    """Places `[steps, size]` of Poisson-sampled batches, -1 for padding."""
    rng = np.random.default_rng((seed, 1))
    batches = list(
        _sampling.draw_indices(count, settings.batch, settings.steps, MULTIPLE, rng)
    )
    longest = max(map(len, batches))  # compiled once
    return np.stack(
        [np.pad(x, (0, longest - len(x)), constant_values=-1) for x in batches]
    ).astype(np.int32)


def loss(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Cross entropy of one digit."""
    image, label = example
    logits: Any = MODEL.apply(params, image)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


# From the settings to the threshold, or the rule that sets it.
VARIANTS: dict[str, Callable[[Settings], Any]] = {
    "none": lambda s: math.inf,
    "fixed": lambda s: s.max_norm,
    "quantile": lambda s: privacy.quantile(s.max_norm, count_stddev=s.count_stddev),
    "bounded": lambda s: privacy.quantile(
        s.max_norm, count_stddev=s.count_stddev, min_norm=s.max_norm
    ),
    "dpsgd_f": lambda s: privacy.dpsgd_f(
        s.max_norm, CLASSES, count_stddev=s.count_stddev
    ),
    "global": lambda s: privacy.dpsgd_global(s.max_norm, s.upper),
    "adapt": lambda s: privacy.dpsgd_global_adapt(
        s.max_norm, s.upper, count_stddev=s.count_stddev
    ),
}


def noise_of(variant: str, settings: Settings) -> float:
    """The joint noise multiplier."""
    return 0.0 if variant == "none" else settings.noise_multiplier


def make_grad(variant: str, settings: Settings, key: jax.Array) -> privacy.DPGrad:
    """The gradient of a step; `none` has neither a bound nor noise."""
    return privacy.dp_grad(
        loss,
        max_norm=VARIANTS[variant](settings),
        noise_multiplier=noise_of(variant, settings),
        expected_batch_size=settings.batch,
        key=key,
    )


class Learner(NamedTuple):
    """Parameters, and the state of the gradient."""

    params: Any
    state: privacy.DPState


@functools.partial(jax.jit, static_argnums=1)
def init(seeds: jax.Array, pixels: int = 64) -> Any:
    """Weights for each seed, the same for every variant."""
    key = lambda seed: jax.random.split(jax.random.key(seed))[0]
    return jax.vmap(lambda seed: MODEL.init(key(seed), jnp.zeros(pixels)))(seeds)


def start(
    variant: str, settings: Settings, params: Any, seed: Any
) -> tuple[privacy.DPGrad, Learner]:
    """What a run begins with."""
    key = jax.random.split(jax.random.key(seed))[1]
    grad = make_grad(variant, settings, key)
    return grad, Learner(params, grad.init(params))


def advance(
    grad: privacy.DPGrad, learner: Learner, data: Data, index: jax.Array, rate: Any
) -> Learner:
    """One step of gradient descent, with the examples at places `[B]`."""
    batch = data.images[index], data.labels[index]
    extra = {"population_ids": batch[1]} if grad.rule.num_populations else {}
    grads, state, _ = grad(
        learner.state, learner.params, batch, where=index >= 0, **extra
    )
    params = jax.tree.map(lambda x, g: x - rate * g, learner.params, grads)
    return Learner(params, state)


def limit_of(state: privacy.DPState) -> jax.Array:
    """The largest threshold, for `adapt` the upper one."""
    rule = jax.tree.leaves(state.rule)
    return (rule[0] if rule else state.threshold).max()


@functools.cache  # compiles once
def make_run(variant: str, settings: Settings) -> Callable[..., Any]:
    """From rates, and seeds with all they need, to classes and thresholds.

    Classes `[rates, seeds, N]` are of the held-out digits, thresholds
    `[rates, seeds, steps]`.
    """

    def run(rate, seed, params, data, batches):
        grad, learner = start(variant, settings, params, seed)

        def step(learner, index):
            learner = advance(grad, learner, data, index, rate)
            return learner, limit_of(learner.state)

        learner, limits = jax.lax.scan(step, learner, batches)
        logits: Any = MODEL.apply(learner.params, data.test_images)
        return logits.argmax(-1), limits

    over_seeds = jax.vmap(run, (None, 0, 0, 0, 0))
    return jax.jit(jax.vmap(over_seeds, (0, None, None, None, None)))


@dataclasses.dataclass(frozen=True)
class Result:
    """All runs of a variant: accuracies `[rates, seeds]`, thresholds with steps.

    `usual` and `rare` are the accuracies on the two digits.
    """

    rates: tuple[float, ...]
    overall: np.ndarray
    usual: np.ndarray
    rare: np.ndarray
    limits: np.ndarray
    epsilon: float

    def best(self) -> int:
        """The place of the rate with the highest accuracy, mean over seeds."""
        return int(self.overall.mean(1).argmax())


def score(said: np.ndarray, labels: np.ndarray, digit: int | None = None) -> np.ndarray:
    """Accuracy `[rates, seeds]` of classes `[rates, seeds, N]`, on one digit or all."""
    counted = labels == digit if digit is not None else np.ones_like(labels, bool)
    return ((said == labels) & counted).sum(-1) / counted.sum(-1)


def collect(settings: Settings) -> tuple[Data, np.ndarray]:
    """Data and batches of all seeds, batches padded to the longest."""
    seeds = range(settings.seed, settings.seed + settings.runs)
    every = [split_digits(settings.kept, seed, settings.data) for seed in seeds]
    count = len(every[0].labels)
    batches = [draw_batches(count, settings, seed) for seed in seeds]
    longest = max(x.shape[1] for x in batches)
    widen = lambda x: ((0, 0), (0, longest - x.shape[1]))
    batches = [np.pad(x, widen(x), constant_values=-1) for x in batches]
    return jax.tree.map(lambda *x: np.stack(x), *every), np.stack(batches)


@functools.cache
def cost(settings: Settings, count: int) -> float:
    """Epsilon of a run over so many examples, for all variants but `none`."""
    event = privacy.event(
        settings.noise_multiplier,
        settings.steps,
        sampling_probability=settings.batch / count,
    )
    return privacy.epsilon(event, DELTA)


def train(variant: str, settings: Settings, data: Data, batches: np.ndarray) -> Result:
    """Trains a model for each rate and seed, all at once."""
    seeds = jnp.arange(settings.seed, settings.seed + settings.runs, dtype=jnp.uint32)
    rates = jnp.array(settings.rates, jnp.float32)
    run = make_run(variant, settings)
    said, limits = run(rates, seeds, init(seeds, data.images.shape[-1]), data, batches)
    said, labels = np.asarray(said), data.test_labels
    return Result(
        settings.rates,
        score(said, labels),
        score(said, labels, USUAL),
        score(said, labels, RARE),
        np.asarray(limits),
        math.inf if variant == "none" else cost(settings, data.labels.shape[1]),
    )


def show(values: np.ndarray) -> str:
    """Mean and standard deviation."""
    return f"{values.mean():.3f} ({values.std():.3f})"


def tabulate(results: dict[str, Result], name: str) -> list[dict[str, Any]]:
    """A row for each rate: an accuracy of each variant."""
    rates = next(iter(results.values())).rates
    return [
        {"rate": rate} | {k: show(getattr(x, name)[i]) for k, x in results.items()}
        for i, rate in enumerate(rates)
    ]


def summarize(results: dict[str, Result]) -> list[dict[str, Any]]:
    """A row for each variant, at its best rate."""
    rows = []
    for variant, result in results.items():
        k = result.best()
        rows.append(
            {
                "variant": variant,
                "epsilon": result.epsilon,
                "rate": result.rates[k],
                "overall": show(result.overall[k]),
                f"digit {USUAL}": show(result.usual[k]),
                f"digit {RARE}": show(result.rare[k]),
                "threshold": float(result.limits[k, :, -1].mean()),
            }
        )
    return rows


def list_lines(
    results: dict[str, Result], settings: Settings
) -> Iterator[dict[str, Any]]:
    """What is written: a row for each run."""
    for variant, result in results.items():
        for (i, j), overall in np.ndenumerate(result.overall):
            yield {
                "variant": variant,
                "rate": result.rates[i],
                "seed": settings.seed + j,
                "epsilon": result.epsilon,
                "noise_multiplier": noise_of(variant, settings),
                "overall": float(overall),
                f"digit_{USUAL}": float(result.usual[i, j]),
                f"digit_{RARE}": float(result.rare[i, j]),
                "threshold": float(result.limits[i, j, -1]),
            }


COLORS = dict(zip(VARIANTS, ("k", "C0", "C1", "C4", "C2", "C5", "C3"), strict=True))


def plot(results: dict[str, Result]) -> Figure:
    """Draws accuracies by learning rate and against each other."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    (overall, rare), (trade, limits) = figure.subplots(2, 2)
    band = functools.partial(_common.plot_band, spread="deviation")
    for variant, result in results.items():
        color, k = COLORS[variant], result.best()
        for axes, y in ((overall, result.overall), (rare, result.rare)):
            band(axes, result.rates, y, color, marker=".", label=variant)
        trade.errorbar(
            result.overall[k].mean(), result.rare[k].mean(), result.rare[k].std(),
            result.overall[k].std(), "o", color=color, capsize=3,
        )  # fmt: skip
        means = result.overall.mean(1), result.rare.mean(1)
        trade.plot(*means, ":", color=color, marker=".", lw=1)
        if np.isfinite(result.limits[k]).all():
            steps = range(1, 1 + result.limits.shape[2])
            band(limits, steps, result.limits[k].T, color)
    overall.set(title="All digits", ylabel="held-out accuracy")
    rare.set(title=f"Digit {RARE}, the rare one", ylabel="held-out accuracy")
    rates = next(iter(results.values())).rates
    for axes in (overall, rare):
        axes.set(xscale="log", xlabel="learning rate")
        axes.set_xticks(rates, [f"{x:g}" for x in rates])
        axes.minorticks_off()
    trade.set(title="By rate; with a cross the best one", ylabel=f"digit {RARE}")
    # What diverged is left out.
    bests = [x.overall.mean(1).max() for x in results.values()]
    trade.set(xlabel="all digits", xlim=(min(bests) - 0.2, max(bests) + 0.03))
    limits.set(title="Threshold at the best rate; of adapt, the upper", yscale="log")
    limits.set(xlabel="step")
    names = overall.get_legend_handles_labels()
    figure.legend(*names, loc="outside upper center", ncols=len(results))
    return figure


def run(settings: Settings, out: _run.Out) -> None:
    """Runs every variant at every rate; prints and writes what came of it."""
    settings = dataclasses.replace(settings, rates=tuple(sorted(settings.rates)))
    count = len(split_digits(settings.kept, 0, settings.data).labels)
    if settings.batch > count:
        raise ValueError(f"--batch must be at most {count}, all there is to train on.")
    for variant in VARIANTS:
        make_grad(variant, settings, jax.random.key(0))
    data, batches = collect(settings)
    results = {}
    for variant in (bar := tqdm(VARIANTS, "variants")):
        results[variant] = train(variant, settings, data, batches)
        best = results[variant].overall.mean(1).max()
        bar.set_postfix_str(f"{variant} at best {best:.3f}")
    number = int((data.labels[0] == RARE).sum())
    print(f"\nTrained on {count} digits, {number} of them {RARE}.")
    print("Held-out accuracy, mean (deviation) over seeds, of all digits by rate:\n")
    print(_common.format_table(tabulate(results, "overall")))
    print(f"\nOf digit {RARE}:\n")
    print(_common.format_table(tabulate(results, "rare")))
    print("\nEach at its best rate, by the accuracy of all digits:\n")
    print(_common.format_table(summarize(results)))
    print(
        f"\nepsilon: of one run, with delta={DELTA:g}; choosing a rate is not counted."
        "\nthreshold: at the end, the largest of all populations; of adapt, the upper."
    )
    out.jsonl(list_lines(results, settings))
    out.figure(plot(results), "rare_digit.png")


if __name__ == "__main__":
    _run.main(run, Settings)
