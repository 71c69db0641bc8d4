"""Digits in two tasks, one after the other: what a clip keeps of the first.

    python -m examples.continual
    python -m examples.continual --tasks=classes

A network learns the digits, and then the digits with their pixels permuted, or the
classes 0 to 4 and then 5 to 9; what comes first is forgotten. Gradients of a new task
are large, so that a clip keeps more of the first. So does a smaller learning rate,
which is the control: `slower` multiplies the rate in the second task by a share.

With five seeds 97.2% of held-out digits are right before the second task. After it
76.9% +- 3% are without a clip, and 97.3% of the second. Thresholds of 0.3, 0.1 and 0.03
keep 85.0%, 91.0% and 95.0% of the first and reach 96.3%, 93.2% and 60.3% of the second:
what learns nothing forgets nothing. A smaller rate does the same: 5% of it keeps 91.4%
and reaches 91.3%. Compared at the same accuracy on the second task, the threshold of
0.1 keeps 0.7% +- 0.3% more of the first, and that of 0.3 1.7% +- 1% less.

The five classes that come first are lost to 2.6% without a clip. A threshold of 0.1
keeps 17.9%, less than a rate that learns as much; 0.03 keeps 77% +- 10% but reaches 70%
+- 20%, 4% +- 2% beyond the control, whose curve is steep there. No clip keeps both.

`python -m clipfx.calibrate out/continual` begins with 1.4, to train the second task; to
keep the first takes less. On two busy CPU cores a step takes 0.06 ms without a clip and
1.2 times as long with one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import clipfx
from examples import _common, _grid, _run, _sweep
from examples._grid import History, Variant, make_mlp, mlp

CLIPS = ("none", "global", "slower")
TASKS = ("permuted", "classes")
CHUNK = 25  # steps between two looks
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs have in common; each is a flag of the same name."""

    tasks: str = _run.flag("permuted", "What differs between them.", among=TASKS)
    clip: tuple[str, ...] = _run.flag(CLIPS, "Methods to compare.", among=CLIPS)
    max_norm: tuple[float, ...] = _run.flag(
        (1.0, 0.3, 0.1, 0.03), "Thresholds in the second task.", above=0
    )
    share: tuple[float, ...] = _run.flag(
        (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005),
        "Of the rate, in the second task.",
        above=0,
    )
    rate: float = _run.flag(0.2, "Learning rate, in the first task of all.", above=0)
    steps: int = _run.flag(300, "Training steps of each task.", least=CHUNK)
    hidden: int = _run.flag(64, "Hidden units per layer, of two.", least=1)
    batch: int = _run.flag(64, "Batch size.", least=1)
    runs: int = _run.flag(5, "Random seeds of each variant.", least=1)
    seed: int = _run.flag(0, "First random seed.", least=0)


class Numbers(NamedTuple):
    """What differs between runs, as arguments of the compiled step; None: no clip."""

    seed: Any
    rate: Any
    max_norm: Any


def numbers_of(variant: Variant) -> Numbers:
    """Of the second task."""
    is_slower = variant.clip == "slower"
    share, max_norm = (variant.bound, math.inf) if is_slower else (1.0, variant.bound)
    return Numbers(variant.seed, share * variant.rate, max_norm)


class Task(NamedTuple):
    """Digits `[n, 64]` and their labels."""

    digits: Any
    labels: Any


@functools.cache
def load_tasks(kind: str) -> list[tuple[Task, Task]]:
    """Of each of two tasks what to train on, and a fifth to test."""
    digits, labels = _common.load_digits()
    rng = np.random.default_rng(0)
    order, pixels = rng.permutation(len(digits)), rng.permutation(64)
    held_out, rest = np.split(order, [len(order) // 5])
    both = []
    for task in range(2):
        seen = digits[:, pixels] if kind == "permuted" and task else digits
        of = labels // 5 == task if kind == "classes" else labels >= 0
        cut = lambda rows, seen=seen: Task(seen[rows], labels[rows])
        both.append((cut(rest[of[rest]]), cut(held_out[of[held_out]])))
    return both


def loss_of(params: Any, digits: jax.Array, labels: jax.Array) -> jax.Array:
    logits = mlp(params, digits)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


Clip = Callable[..., optax.GradientTransformation]


@functools.cache
def programs(
    settings: Settings, clip: Clip = clipfx.clip_by_global_norm
) -> tuple[Any, Any]:
    """From numbers to parameters, and `CHUNK` steps of a task; of many runs at once."""
    inner = (settings.hidden, settings.hidden)

    def transform(numbers):
        sgd = optax.sgd(numbers.rate)
        if numbers.max_norm is None:
            return sgd
        return optax.chain(clip(max_norm=numbers.max_norm), sgd)

    def init(numbers):
        params = make_mlp(jax.random.key(numbers.seed), (64, *inner, CLASSES))
        return params, transform(numbers).init(params)

    def advance(numbers, learner, task, tests, start):
        def step(learner, k):
            params, state = learner
            key = jax.random.fold_in(jax.random.key(numbers.seed), k)
            rows = jax.random.randint(key, (settings.batch,), 0, len(task.labels))
            loss, grads = jax.value_and_grad(loss_of)(
                params, task.digits[rows], task.labels[rows]
            )
            updates, state = transform(numbers).update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (loss, clipfx.global_norm(grads))

        learner, (loss, norms) = jax.lax.scan(step, learner, start + jnp.arange(CHUNK))
        right = lambda t: (mlp(learner[0], t.digits).argmax(-1) == t.labels).mean()
        first, second = map(right, tests)
        seen = {"loss": loss.mean(), "mean norm": norms.mean()}
        seen |= {"peak norm": norms.max(), "first": first, "second": second}
        return learner, seen, norms

    advance = jax.vmap(advance, (0, 0, None, None, None))
    return jax.jit(jax.vmap(init)), jax.jit(advance)


def train(
    variants: Sequence[Variant],
    settings: Settings,
    clip: Clip = clipfx.clip_by_global_norm,
) -> list[History]:
    """Trains all runs side by side."""
    (one, test_one), (two, test_two) = load_tasks(settings.tasks)
    init, advance = programs(settings, clip)
    numbers = _grid.stack([*map(numbers_of, variants)])
    plain = Numbers(
        numbers.seed,
        np.full_like(numbers.rate, settings.rate),
        np.full_like(numbers.max_norm, math.inf),
    )
    learners = init(plain)
    rows: list[list[dict[str, Any]]] = [[] for _ in variants]
    norms = []
    looks = range(0, 2 * settings.steps, CHUNK)
    progress = tqdm(looks, f"{len(variants)} runs")
    for start in progress:
        task, now = (one, plain) if start < settings.steps else (two, numbers)
        learners, *seen = advance(now, learners, task, (test_one, test_two), start)
        seen, chunk = jax.device_get(seen)
        norms.append(chunk)
        for k, variant in enumerate(variants):
            row = {name: float(x[k]) for name, x in seen.items()}
            rows[k].append(variant._asdict() | {"step": start + CHUNK} | row)
        text = f"accuracy {seen['first'].mean():.2f}, {seen['second'].mean():.2f}"
        progress.set_postfix_str(text, refresh=False)
    by_run = np.concatenate(norms, 1)
    return [History(*each) for each in zip(variants, rows, by_run, strict=True)]


def measure_times(settings: Settings) -> dict[str, float]:
    """Milliseconds of a step, with a clip and without."""
    (task, test), (_, other) = load_tasks(settings.tasks)
    numbers = {"none": None, "global": 0.1}
    numbers = {k: Numbers(settings.seed, 0.1, x) for k, x in numbers.items()}
    given = task, (test, other), 0
    return _grid.ms_per_step(programs(settings), numbers, CHUNK, *given)


def variants_of(settings: Settings) -> list[Variant]:
    bounds = {
        "none": (math.inf,),
        "global": settings.max_norm,
        "slower": settings.share,
    }
    bounds = {clip: bounds[clip] for clip in settings.clip}
    seeds = range(settings.seed, settings.seed + settings.runs)
    return _grid.variants(bounds, (settings.rate,), seeds)


def scores(history: History, steps: int) -> dict[str, Any]:
    """Accuracies after the second task, and of the first before it."""
    before = next(row for row in history.rows if row["step"] >= steps)
    now = history.rows[-1]
    return history.variant._asdict() | {
        "before": before["first"],
        "first": now["first"],
        "second": now["second"],
        "both": (now["first"] + now["second"]) / 2,
    }


def beyond_slower(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float:
    """How much more of the first task is kept than by a smaller rate.

    Compared is the best rate after which the same seed does at least as well on the
    second task, interpolated between those there are; NaN where none learns so little.
    """
    control = sorted(
        (other["second"], other["first"])
        for other in rows
        if other["clip"] in ("none", "slower") and other["seed"] == row["seed"]
    )
    second, first = np.array(control or [(math.nan, math.nan)]).T
    first = np.maximum.accumulate(first[::-1])[::-1]
    kept = np.interp(row["second"], second, first, left=math.nan)
    return float(row["first"] - kept)


def plot(histories: Sequence[History], rows: Sequence[dict[str, Any]]) -> Figure:
    """Draws one accuracy over the other, and both over the steps at the best bounds."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    trade, over_steps = figure.subplots(1, 2)
    by = {history.variant: history for history in histories}
    for k, ((clip,), runs) in enumerate(_sweep.groups(rows, ("clip",)).items()):
        color = f"C{CLIPS.index(clip)}"
        each = _sweep.groups(runs, ("bound",))
        points = {
            bound: [np.mean([row[of] for row in those]) for of in ("second", "first")]
            for (bound,), those in each.items()
        }
        trade.plot(
            *np.transpose([*points.values()]), color=color, marker="o", label=clip
        )
        for bound, place in points.items():
            text = "" if bound == math.inf else f"{bound:g}"
            trade.annotate(text, place, (4, 4 if k % 2 else -12), color=color,
                           textcoords="offset points", fontsize="small")  # fmt: skip
        best = _sweep.best(runs, ("bound",), "both")
        label = _grid.title(clip, best[0]["bound"])
        those = [by[Variant(*(row[of] for of in Variant._fields))] for row in best]
        steps = [row["step"] for row in those[0].rows]
        for of, style in ("first", "-"), ("second", "--"):
            values = [*np.transpose([[row[of] for row in run.rows] for run in those])]
            name = f"{label}, {of} task"
            _sweep.draw_band(over_steps, steps, values, name, color, ls=style)
    trade.set(xlabel="accuracy on the second task", ylabel="on the first, after it")
    trade.legend()
    over_steps.set(xlabel="step", ylabel="held-out accuracy", ylim=(0, 1.02))
    over_steps.legend(fontsize="small")
    return figure


def run(settings: Settings, out: _run.Out) -> None:
    """Trains every variant; prints and writes what came of them."""
    histories = train(variants_of(settings), settings)
    rows = [scores(history, settings.steps) for history in histories]
    gain = "beyond slower"
    rows = [row | {gain: beyond_slower(row, rows)} for row in rows]
    shown = ("first", "second", "both", gain)
    table = _sweep.compared(rows, ("clip", "bound"), ("rate",), "both", shown)
    print("\n" + _common.format_table([*table]))
    print(
        "first, second: accuracy on held-out digits of each task after both, mean +- "
        "standard deviation over\nseeds; both: their mean; beyond slower: first, less "
        "that of a smaller rate, not clipped, with the\nsame second. Before the second "
        f"task the first had {_sweep.mean_and_deviation(rows, 'before')}.\n"
        + _sweep.told(measure_times(settings))
    )
    out.jsonl(_grid.lines(histories, rows, "both"))
    out.figure(plot(histories, rows), "continual.png")


if __name__ == "__main__":
    _run.main(run, Settings)
