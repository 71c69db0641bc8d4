"""Digits, learned with differential privacy: accuracy against epsilon.

    python -m examples.private_digits
    python -m examples.private_digits --epsilons=0.5,3 --delta=1e-4 --runs=10
    python -m examples.private_digits --optimizer=private_adam --runs=3
    python -m examples.private_digits --mnist=DIR --runs=1

jax_privacy draws Poisson samples, `dp_grad` clips, sums and noises gradients,
dp-accounting computes epsilon. A small network compares five weightings of gradients by
their norm, and two adaptive thresholds; logistic regression compares Gaussian with
Laplace noise. Each uses its best learning rate, chosen on the held-out digits that it
is judged by; epsilon does not count that choice.

By default `hard`, `psac`, `auto_s` and `quantile` are within 0.017 of each other at
epsilon 1, at 0.89 to 0.91, and within 0.004 beyond, at 0.96 for 8; without privacy it
is 0.98. `normalize` and `reject` are 0.02 to 0.07 behind `hard`, and `reject` needs a
threshold of its own, 10. Logistic regression is level with the network. Laplace noise
costs it 0.7 at epsilon 1 and 0.2 at 8: the 1-norm of its gradients starts at 14 times
their 2-norm, and noise is as large as that. Private steps take 1.5 to 1.9 times as long
as plain ones; noise alone, 0.5 times.

`histogram` needs no threshold, and is no better than one that fits: 0.906 at epsilon 1
and 0.945 at 4, where `hard` has 0.910 and 0.958, and `quantile` 0.900 and 0.957.

`--optimizer=private_adam` clips and adds noise in coordinates of Adam's second moment.
With `--runs=3 --epsilons=1,4` it is no better than `--optimizer=adam`: `hard` has 0.908
and 0.957, and there 0.901 and 0.956; `quantile` 0.879 and 0.955, and 0.892 and 0.955;
`auto_s` 0.888 and 0.954, and 0.901 and 0.958. `reject` would need a larger threshold.

Norms of private examples are private as well: none are written, and none may choose a
threshold. `quantile` and `histogram` do so within epsilon.

Another choice of 359 held-out digits would change accuracies by more than 0.01. Seeds
here are small numbers, to repeat a run; to protect anyone, take them from `secrets`.
"""

import dataclasses
import functools
import gzip
import math
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from tqdm import tqdm

from clipfx import plots, privacy, responses
from examples import _common, _run, _sampling, _sweep

CLASSES = 10
# And the scale that gradients are clipped and noised in, by what was released before.
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "sgd": (optax.sgd(1.0, momentum=0.9), None),
    "adam": (optax.adam(0.1), None),
    "private_adam": (optax.adam(0.1), privacy.second_moment(eps_root=1e-4)),
}
SCALED = 10  # times as large are thresholds for scaled gradients
ROUNDS = 100  # of timing, each with one step of every variant
MECHANISMS = {1: "laplace", 2: "gaussian"}  # by the norm that bounds an example


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all variants have in common; each is a flag of the same name."""

    data: str | None = _run.flag(
        None, "An .npz file of images [N, ...] and labels [N] from 0 to 9."
    )
    mnist: str | None = _run.flag(
        None, "Folder of the four MNIST IDX files; runs the MNIST recipes."
    )
    epsilons: tuple[float, ...] = _run.flag(
        (1.0, 2.0, 4.0, 8.0), "Target epsilons.", above=0
    )
    delta: float = _run.flag(1e-5, "Target delta.", above=0, below=1)
    rates: tuple[float, ...] = _run.flag(
        (0.03, 0.1, 0.3, 1.0, 3.0), "Learning rates.", above=0
    )
    optimizer: str = _run.flag("sgd", "Optimizer.", among=OPTIMIZERS)
    batch: int = _run.flag(256, "Expected batch size.", least=1)
    steps: int | None = _run.flag(
        None, "Training steps of each run: 100; with --mnist its epochs.", least=1
    )
    runs: int = _run.flag(5, "Random seeds of each variant and epsilon.", least=1)
    seed: int = _run.flag(
        0, "First random seed, of weights, batches and noise.", least=0
    )


class MLP(nn.Module):
    """One hidden layer, or none: logistic regression."""

    hidden: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits `[..., 10]` of digits `[..., P]`."""
        if not self.hidden:
            return nn.Dense(CLASSES, kernel_init=nn.initializers.zeros)(x)
        return nn.Dense(CLASSES)(nn.tanh(nn.Dense(self.hidden)(x)))


class CNN(nn.Module):
    """The network of the MNIST recipes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits `[..., 10]` of digits `[..., 28, 28]`."""
        x = x[..., None]
        for features, size, padding in ((16, 8, "SAME"), (32, 4, "VALID")):
            x = nn.relu(nn.Conv(features, (size, size), 2, padding)(x))
            x = nn.max_pool(x, (2, 2))
        x = nn.Dense(32)(x.reshape(*x.shape[:-3], -1))
        return nn.Dense(CLASSES)(nn.relu(x))


class Data(NamedTuple):
    """Digits `[count, ...]` to train on, others to test on, and their labels."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_data(path: str | None = None) -> Data:
    """Digits in [-1, 1], a fifth of them to test on."""
    images, labels = _common.load_digits(path)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order], labels[order]
    test = len(labels) // 5
    return Data(images[test:], labels[test:], images[:test], labels[:test])


def read_idx(folder: str, name: str, ndim: int) -> np.ndarray:
    """The bytes of an IDX file, or of name.gz, as an array of `ndim` dimensions."""
    path = pathlib.Path(folder, name)
    path = path if path.exists() else path.with_name(f"{name}.gz")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {name} or {path}: {why}.") from None
    start = 4 + 4 * ndim
    if len(content) >= start and content[:4] == bytes([0, 0, 8, ndim]):
        shape = np.frombuffer(content[4:start], ">u4").tolist()
        if len(content) == start + math.prod(shape):
            return np.frombuffer(content[start:], np.uint8).reshape(shape)
    raise ValueError(f"{path} is no whole IDX file of bytes in {ndim} dimension(s).")


def load_mnist(folder: str) -> Data:
    """MNIST, or what has its format, in [0, 1]."""
    parts = []
    for kind in ("train", "t10k"):
        images = read_idx(folder, f"{kind}-images-idx3-ubyte", 3)
        labels = read_idx(folder, f"{kind}-labels-idx1-ubyte", 1)
        if images.shape != (len(labels), 28, 28) or labels.max(initial=0) > 9:
            raise ValueError(
                f"{folder!r} should have 28x28 {kind} images and a label from 0 to 9 "
                f"for each, got {images.shape} and {len(labels)} labels."
            )
        parts += [images.astype(np.float32) / 255, labels.astype(np.int32)]
    return Data(*parts)


class Variant(NamedTuple):
    """A model, and how the part of one digit is bounded; None: not at all."""

    model: nn.Module
    response: responses.Response | None = responses.hard
    max_norm: float = 1.0
    ord: int = 2
    adapts: str | None = None

    def loss(self, params: Any, image: jax.Array, label: jax.Array) -> jax.Array:
        """Cross entropy of one digit."""
        logits: Any = self.model.apply(params, image)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)


VARIANTS = {
    "none": Variant(MLP(), None),
    "hard": Variant(MLP()),  # Abadi
    "normalize": Variant(MLP(), responses.normalize),  # AUTO-V
    "auto_s": Variant(MLP(), responses.auto_s()),
    "psac": Variant(MLP(), responses.psac()),
    "reject": Variant(MLP(), responses.reject, 10.0),  # global; 1 would drop all
    "quantile": Variant(MLP(), adapts="quantile"),
    "histogram": Variant(MLP(), adapts="histogram"),
    "linear none": Variant(MLP(0), None),
    "linear": Variant(MLP(0)),
    "laplace": Variant(MLP(0), ord=1),
}


class Plan(NamedTuple):
    """A training, but for its seed; `target` is the epsilon aimed at."""

    name: str
    variant: Variant
    target: float
    noise_multiplier: float
    batch: int
    steps: int
    rates: tuple[float, ...]
    tx: Any = OPTIMIZERS["sgd"][0]
    scale: privacy.PrivateScale | None = None

    def grad(self, key: jax.Array, z: Any = None) -> privacy.DPGrad:
        """The private gradient, with the noise of a key, or another multiplier."""
        variant, z = self.variant, self.noise_multiplier if z is None else z
        max_norm: Any = variant.max_norm * (SCALED if self.scale else 1)
        stddev = max(self.batch / 20, self.noise_multiplier)
        if variant.adapts == "quantile":
            low = max_norm / 10
            max_norm = privacy.quantile(max_norm, count_stddev=stddev, min_norm=low)
        elif variant.adapts == "histogram":
            edges = max_norm * np.geomspace(0.01, 100, 41)
            max_norm = privacy.histogram_threshold(
                max_norm, edges=edges, count_stddev=2 * stddev
            )
        return privacy.dp_grad(
            variant.loss,
            max_norm=max_norm,
            noise_multiplier=z,
            expected_batch_size=self.batch,
            key=key,
            ord=variant.ord,
            batch_argnums=(1, 2),
            response=variant.response or responses.hard,
            scale=self.scale,
        )


def list_plans(settings: Settings, count: int) -> list[Plan]:
    """Every variant at every epsilon, for `count` digits."""
    steps, q = settings.steps or 100, settings.batch / count
    find = functools.partial(
        privacy.noise_multiplier_for, steps=steps, sampling_probability=q
    )
    noise = {(math.inf, 2): 0.0}
    for ord, mechanism in MECHANISMS.items():
        for x in settings.epsilons:
            noise[x, ord] = find(x, settings.delta, mechanism=mechanism)
    run = settings.batch, steps, settings.rates
    tx, scale = OPTIMIZERS[settings.optimizer]
    return [
        Plan(name, variant, target, noise[target, variant.ord], *run, tx, scale)
        for name, variant in VARIANTS.items()
        for target in (settings.epsilons if variant.response else [math.inf])
    ]


# By what TF-Privacy reports: learning rate, noise multiplier, threshold, epochs.
RECIPES = {
    0.950: (0.25, 1.3, 1.5, 15),
    0.966: (0.15, 1.1, 1.0, 60),
    0.970: (0.25, 0.7, 1.5, 45),
    0.990: (0.1, 0.0, 1.0, 20),
}


def list_recipes(settings: Settings, count: int) -> list[Plan]:
    """The published runs with MNIST; what they cost follows from their noise."""
    plans = []
    for published, (rate, z, max_norm, epochs) in RECIPES.items():
        variant = Variant(CNN(), responses.hard if z else None, max_norm)
        steps = max(1, round(epochs * count / settings.batch))
        run = settings.batch, min(steps, settings.steps or steps), (rate * max_norm,)
        plans.append(Plan(f"{published:g}", variant, math.nan, z, *run, optax.sgd(1.0)))
    return plans


def draw_batches(data: Data, plan: Plan, seed: int) -> Iterator[tuple]:
    """Poisson samples: each digit is in each batch with the same probability.

    Gives images, labels, and False for padding. Batches differ in size; padded to one
    that hardly any exceeds, they need one compiled step, and twice that size another.
    """
    count, rng = len(data.labels), np.random.default_rng((seed, 1))
    size = _sampling.size_for(count, plan.batch)
    for index in _sampling.draw_indices(count, plan.batch, plan.steps, size, rng):
        yield data.images[index], data.labels[index], index >= 0


def start(plan: Plan, data: Data, seed: int) -> tuple[tuple, jax.Array]:
    """What all plans of a model begin with, and the key of their noise."""
    weights, key = jax.random.split(jax.random.key(seed))
    params = plan.variant.model.init(weights, jnp.asarray(data.images[0]))
    return (params, plan.tx.init(params), plan.grad(key).init(params)), key


def make_step(plan: Plan) -> Callable:
    """A step from learner to learner at a learning rate, with the noise of a key.

    Steps are in units of the threshold, which is public, so that one learning rate
    suits many thresholds. Losses and norms of a batch are not private, and not used.
    """

    def mean(params, images, labels, where):
        losses = jax.vmap(plan.variant.loss, (None, 0, 0))(params, images, labels)
        count = jnp.maximum(where.sum(dtype=jnp.float32), 1)
        return jnp.where(where, losses, 0).sum() / count

    def step(learner, rate, key, batch, z=None):
        params, state, private = learner
        images, labels, where = batch
        if plan.variant.response is None:
            grads = jax.grad(mean)(params, images, labels, where)
        else:
            grad = plan.grad(key, z)
            grads, private, _ = grad(private, params, images, labels, where=where)
            grads = optax.tree.scale(1 / private.threshold[0], grads)
        updates, state = plan.tx.update(grads, state, params)
        params = optax.apply_updates(params, optax.tree.scale(rate, updates))
        return params, state, private

    return step


@functools.lru_cache(maxsize=1)
def compiled(plan: Plan) -> Callable:
    """A step of all rates; one program for all targets, which differ in the noise."""
    return jax.jit(jax.vmap(make_step(plan), (0, 0, None, None, None)))


@functools.partial(jax.jit, static_argnums=0)
def score(model: nn.Module, params: Any, images: Any, labels: Any) -> jax.Array:
    """The share of right classes, for each of a stack of parameters."""
    logits: Any = jax.vmap(model.apply, (0, None))(params, images)
    return (logits.argmax(-1) == labels[None]).mean(-1, dtype=jnp.float32)


def train(plan: Plan, data: Data, seed: int, step: Callable) -> list[float]:
    """Held-out accuracies, by learning rate; all else is the same for all rates."""
    learner, key = start(plan, data, seed)
    rates = jnp.array(plan.rates, jnp.float32)
    learners = jax.tree.map(lambda x: jnp.stack([x] * len(rates)), learner)
    for batch in draw_batches(data, plan, seed):
        learners = step(learners, rates, key, batch)
    return score(plan.variant.model, learners[0], *data[2:]).tolist()


def repeat(plan: Plan, data: Data, settings: Settings) -> list[dict[str, Any]]:
    """A row for each seed, at the learning rate with the best mean over seeds."""
    z = plan.noise_multiplier
    least = max(z, plan.batch / 20)  # of the counts' noise
    several = compiled(plan._replace(target=0.0, noise_multiplier=least))
    step = lambda *args: several(*args, z)
    seeds = range(settings.seed, settings.seed + settings.runs)
    tests = [train(plan, data, seed, step) for seed in seeds]
    best = int(np.mean(tests, 0).argmax())
    event = privacy.event(
        plan.noise_multiplier,
        plan.steps,
        sampling_probability=plan.batch / len(data.labels),
        mechanism=MECHANISMS[plan.variant.ord],
    )
    cost = {"target": plan.target, "epsilon": privacy.epsilon(event, settings.delta)}
    cost |= {"noise_multiplier": plan.noise_multiplier, "steps": plan.steps}
    same = {"variant": plan.name, **cost, "rate": plan.rates[best]}
    return [
        same | {"seed": seed, "test": row[best], "by_rate": row}
        for seed, row in zip(seeds, tests, strict=True)
    ]


def measure_times(plans: Sequence[Plan], data: Data, seed: int) -> dict[str, float]:
    """The least milliseconds of a step of each variant and of noise, in turns."""
    calls = {}
    for plan in {plan.name: plan for plan in plans}.values():
        learner, key = start(plan, data, seed)
        batch = jax.tree.map(jnp.asarray, next(draw_batches(data, plan, seed)))
        given = learner, jnp.float32(0), key, batch
        calls[plan.name] = functools.partial(jax.jit(make_step(plan)), *given)
    tx = privacy.add_gaussian_noise(1.0, jax.random.key(seed))
    params = start(plans[0], data, seed)[0][0]
    calls["noise"] = functools.partial(jax.jit(tx.update), params, tx.init(params))
    return _sweep.in_turns(calls, ROUNDS)


def select(rows: Sequence[dict], name: str, target: float, key: str) -> np.ndarray:
    """A number of each seed, of a variant at an epsilon."""
    cell = name, target
    return np.array([x[key] for x in rows if (x["variant"], x["target"]) == cell])


def plot(rows: Sequence[dict], settings: Settings) -> Figure:
    """Accuracy against epsilon, mean and range over seeds, for the two models."""
    figure = Figure((13, 4.5), layout="constrained")
    *panels, curves = figure.subplots(1, 3)
    kinds = {k: v.response for k, v in VARIANTS.items() if v.response and not v.adapts}
    kinds = {k: kinds[k] for k in kinds if VARIANTS[k].model == MLP()}
    plots.response_curves(kinds, legend=False, ax=curves)
    curves.set(title="Weightings, in the same colors", xlabel="norm in thresholds")
    colors = {line.get_label(): line.get_color() for line in curves.get_lines()}
    targets = np.array(sorted(settings.epsilons))
    for axes, hidden in zip(panels, (MLP.hidden, 0), strict=True):
        none, *names = [k for k, v in VARIANTS.items() if v.model == MLP(hidden)]
        tests = select(rows, none, math.inf, "test")
        axes.axhline(tests.mean(), color="k", lw=1, ls="--", label="not private")
        axes.axhspan(tests.min(), tests.max(), color="k", alpha=0.1, lw=0)
        for place, name in enumerate(names):
            x = targets * 1.03 ** (place - (len(names) - 1) / 2)  # side by side
            tests = np.array([select(rows, name, each, "test") for each in targets])
            y = tests.mean(1)
            ends = y - tests.min(1), tests.max(1) - y
            color = colors.get(name, {"histogram": "0.6"}.get(name, f"C{place}"))
            style = {"marker": "o", "ms": 4, "lw": 1, "capsize": 2, "color": color}
            axes.errorbar(x, y, ends, label=name, **style)
        axes.set(xlabel=f"epsilon, delta {settings.delta:g}", xscale="log")
        axes.set_title(f"{hidden} hidden units" if hidden else "Logistic regression")
        axes.set_xticks(targets, [f"{x:g}" for x in targets])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    panels[0].set_ylabel("held-out accuracy")
    return figure


def report(rows: Sequence[dict], times: dict[str, float], targets: Sequence) -> None:
    """Prints what was spent, accuracies, rates and times."""

    def show(title, key, see, names=(*VARIANTS,)):
        print(f"\n{title}, by epsilon:\n")
        columns = {f"{x:g}": x for x in (*targets, math.inf)}
        table = []
        for name in names:
            cells = {k: select(rows, name, x, key) for k, x in columns.items()}
            cells = {k: see(x) if len(x) else "" for k, x in cells.items()}
            table.append({"variant": name} | cells)
        print(_common.format_table(table))

    first = lambda x: float(x[0])
    spread = lambda x: f"{x.mean():.3f} ({x.min():.3f}-{x.max():.3f})"
    show("Noise multiplier", "noise_multiplier", first, ("hard", "laplace"))
    show("Epsilon spent", "epsilon", first, ("hard", "laplace"))
    show("Held-out accuracy, mean and range over seeds", "test", spread)
    show("Learning rate with the highest mean", "rate", first)
    print("\nMilliseconds of a step, the least, in turns; over that without privacy:\n")
    linear = [name for name, v in VARIANTS.items() if v.model == MLP(0)]
    ratio = lambda name: times[name] / times[linear[0] if name in linear else "none"]
    table = [{"variant": x, "ms": times[x], "ratio": ratio(x)} for x in times]
    print(_common.format_table(table))
    print("\nThe choice of learning rates, by held-out digits, is not accounted for.")


def run(settings: Settings, out: _run.Out) -> None:
    """Runs every variant at every epsilon, or the recipes; prints and writes."""
    if settings.mnist and settings.data:
        raise ValueError("give one of --mnist and --data.")
    published = bool(settings.mnist)
    data = load_mnist(settings.mnist) if settings.mnist else load_data(settings.data)
    count = len(data.labels)
    if not settings.batch <= count < 1 / settings.delta:
        limits = f"--batch must be at most {count}, --delta less than 1/{count}"
        raise ValueError(f"{limits}, got {settings.batch} and {settings.delta:g}.")
    plans = (list_recipes if published else list_plans)(settings, count)
    next(draw_batches(data, plans[0], settings.seed))

    times = {} if published else measure_times(plans, data, settings.seed)
    rows = []
    for plan in (bar := tqdm(plans)):
        bar.set_postfix_str(f"{plan.name}, epsilon {plan.target:g}")
        rows += repeat(plan, data, settings)
    if published:
        keys = "variant", "noise_multiplier", "steps", "epsilon", "seed", "test"
        print("\nTest accuracy, of runs named by that published by TF-Privacy:\n")
        print(_common.format_table([{key: row[key] for key in keys} for row in rows]))
    else:
        report(rows, times, settings.epsilons)
        out.figure(plot(rows, settings), "private_digits.png")
    out.jsonl(rows)


if __name__ == "__main__":
    _run.main(run, Settings)
