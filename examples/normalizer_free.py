"""A deep network without normalization: the learning rates at which it trains.

    python -m examples.normalizer_free

Normalization keeps a step small against the weights. Without it a bound on the gradient
is to do that (Brock et al., 2021, arXiv 2102.06171): AGC bounds the gradient of each
unit by a share of the unit's weights. 12 residual blocks learn the digits by SGD with
Nesterov momentum, with no clip, a bound on the global norm, and AGC of all layers but
the head.

With three seeds all find a rate with 96.6% to 98.0% of held-out digits right. Rates
that come within 0.03 of the best are 0.01 to 0.1 without a clip, whose accuracy at 0.3
is 0.41 +- 0.31; 0.01 to 0.3 with AGC at 0.04 and with the global norm at 1, 0.97 both
at 0.3. So each clip makes the largest rate 3 times as large, and AGC does no more than
the plain bound. Tighter bounds move the range rather than widen it: AGC at 0.0025
trains from 0.1 to 1, the global norm at 0.1 from 0.1 to 3 and at 0.03 from 0.3 to 10,
and all three learn too slowly at 0.03. The paper has convolutions, and batches of up to
4096; here they are of 64. On two busy CPU cores a step takes 0.4 ms without a clip, 1.0
to 1.1 times as long with the global norm, and 1.1 to 1.3 times with AGC.
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
from examples._grid import History, Variant

CLIPS = ("none", "global", "agc")
CHUNK = 50  # steps between two looks
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs have in common; each is a flag of the same name."""

    clip: tuple[str, ...] = _run.flag(CLIPS, "Methods to compare.", among=CLIPS)
    max_norm: tuple[float, ...] = _run.flag(
        (1.0, 0.1, 0.03), "Thresholds of the global norm.", above=0
    )
    max_ratio: tuple[float, ...] = _run.flag(
        (0.04, 0.01, 0.0025), "Ratios of AGC.", above=0
    )
    rates: tuple[float, ...] = _run.flag(
        (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), "Learning rates.", above=0
    )
    within: float = _run.flag(
        0.03, "Accuracy that a usable rate may lack of the best.", above=0, below=1
    )
    steps: int = _run.flag(300, "Training steps of each run.", least=CHUNK)
    blocks: int = _run.flag(12, "Residual blocks.", least=1)
    width: int = _run.flag(32, "Units of a layer.", least=1)
    batch: int = _run.flag(64, "Batch size.", least=1)
    runs: int = _run.flag(3, "Random seeds of each variant.", least=1)
    seed: int = _run.flag(0, "First random seed.", least=0)


class Numbers(NamedTuple):
    """What differs between runs, as arguments of the compiled step; None: no clip."""

    seed: Any
    rate: Any
    max_norm: Any
    max_ratio: Any


def numbers_of(variant: Variant) -> Numbers:
    only = lambda clip: variant.bound if variant.clip == clip else math.inf
    return Numbers(variant.seed, variant.rate, only("global"), only("agc"))


Params = dict[str, Any]


def make_network(key: jax.Array, blocks: int, width: int) -> Params:
    """Kernels `[in, out]` of enter and head, of blocks with an axis of blocks first."""
    keys = jax.random.split(key, 4)

    def dense(key, *shape):
        kernel = jax.random.normal(key, shape) * math.sqrt(2 / shape[-2])
        return {"kernel": kernel, "bias": jnp.zeros((*shape[:-2], shape[-1]))}

    return {
        "enter": dense(keys[0], 64, width),
        "first": dense(keys[1], blocks, width, width),
        "second": dense(keys[2], blocks, width, width),
        "head": dense(keys[3], width, CLASSES),
    }


def apply(params: Params, digits: jax.Array) -> jax.Array:
    """Logits `[n, 10]` of digits `[n, 64]`."""
    dense = lambda layer, x: x @ layer["kernel"] + layer["bias"]
    blocks = len(params["first"]["bias"])

    def block(x, layers):
        first, second = layers
        inner = jax.nn.relu(dense(first, jax.nn.relu(x)))
        return x + dense(second, inner) / math.sqrt(blocks), None

    x = dense(params["enter"], digits)
    x, _ = jax.lax.scan(block, x, (params["first"], params["second"]))
    return dense(params["head"], jax.nn.relu(x))


def make_transform(numbers: Numbers) -> optax.GradientTransformation:
    """The clips, of which one at most has a finite bound, before SGD with momentum."""
    not_head = lambda params: {name: name != "head" for name in params}
    # A unit runs over the inputs of one block.
    axis = {name: {"kernel": 1, "bias": 1} for name in ("first", "second")}
    clips = []
    if numbers.max_norm is not None:
        clips.append(clipfx.clip_by_global_norm(numbers.max_norm))
    if numbers.max_ratio is not None:
        clips.append(optax.masked(clipfx.agc(numbers.max_ratio, axis=axis), not_head))
    return optax.chain(*clips, optax.sgd(numbers.rate, momentum=0.9, nesterov=True))


def loss_of(params: Params, digits: jax.Array, labels: jax.Array) -> jax.Array:
    logits = apply(params, digits)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.cache
def programs(settings: Settings) -> tuple[Any, Any]:
    """From numbers to parameters and states, and `CHUNK` steps; of many runs."""

    def init(numbers):
        key = jax.random.key(numbers.seed)
        params = make_network(key, settings.blocks, settings.width)
        return params, make_transform(numbers).init(params)

    def advance(numbers, learner, data, held_out, start):
        def step(learner, k):
            params, state = learner
            key = jax.random.fold_in(jax.random.key(numbers.seed), k)
            rows = jax.random.randint(key, (settings.batch,), 0, len(data[1]))
            loss, grads = jax.value_and_grad(loss_of)(
                params, data[0][rows], data[1][rows]
            )
            updates, state = make_transform(numbers).update(grads, state, params)
            seen = loss, clipfx.global_norm(grads)
            return (optax.apply_updates(params, updates), state), seen

        steps = start + jnp.arange(CHUNK)
        learner, (losses, norms) = jax.lax.scan(step, learner, steps)
        right = apply(learner[0], held_out[0]).argmax(-1) == held_out[1]
        seen = {"loss": losses.mean(), "accuracy": right.mean()}
        return learner, seen | {"weights": clipfx.global_norm(learner[0])}, norms

    advance = jax.vmap(advance, (0, 0, None, None, None))
    return jax.jit(jax.vmap(init)), jax.jit(advance)


@functools.cache
def load_data() -> tuple[Any, Any]:
    """Digits and labels to train on, and a fifth to test."""
    digits, labels = _common.load_digits()
    order = np.random.default_rng(0).permutation(len(digits))
    held_out, rest = np.split(order, [len(order) // 5])
    return (digits[rest], labels[rest]), (digits[held_out], labels[held_out])


def train(variants: Sequence[Variant], settings: Settings) -> list[History]:
    """Trains all runs side by side."""
    data, held_out = load_data()
    init, advance = programs(settings)
    numbers = _grid.stack([*map(numbers_of, variants)])
    learners = init(numbers)
    rows: list[list[dict[str, Any]]] = [[] for _ in variants]
    norms = []
    progress = tqdm(range(0, settings.steps, CHUNK), f"{len(variants)} runs")
    for start in progress:
        learners, *seen = advance(numbers, learners, data, held_out, start)
        seen, chunk = jax.device_get(seen)
        norms.append(chunk)
        for k, variant in enumerate(variants):
            now = {name: float(x[k]) for name, x in seen.items()}
            rows[k].append(variant._asdict() | {"step": start + CHUNK} | now)
        best = np.nanmax(seen["accuracy"])
        progress.set_postfix_str(f"best accuracy {best:.3f}", refresh=False)
    by_run = np.concatenate(norms, 1)
    return [History(*each) for each in zip(variants, rows, by_run, strict=True)]


def measure_times(settings: Settings) -> dict[str, float]:
    """Milliseconds of a step by clip."""
    numbers = {
        "none": Numbers(settings.seed, 0.01, None, None),
        "global": Numbers(settings.seed, 0.01, 1.0, None),
        "agc": Numbers(settings.seed, 0.01, None, 0.01),
    }
    given = (*load_data(), 0)
    return _grid.ms_per_step(programs(settings), numbers, CHUNK, *given)


def variants_of(settings: Settings) -> list[Variant]:
    bounds = {
        "none": (math.inf,),
        "global": settings.max_norm,
        "agc": settings.max_ratio,
    }
    bounds = {clip: bounds[clip] for clip in settings.clip}
    seeds = range(settings.seed, settings.seed + settings.runs)
    return _grid.variants(bounds, settings.rates, seeds)


def scores(history: History) -> dict[str, Any]:
    """What a run was, and its accuracy in the end."""
    return history.variant._asdict() | {"accuracy": history.rows[-1]["accuracy"]}


def usable(rows: Sequence[dict[str, Any]], least: float) -> list[float]:
    """Of one clip: rates around its best whose mean accuracy is at least this."""
    best = _sweep.best(rows, ("rate",), "accuracy")[0]["rate"]
    found: list[float] = []
    for rate, accuracy in zip(*_grid.curve(rows, "rate", "accuracy"), strict=True):
        if accuracy.mean() >= least:
            found.append(rate)
        elif rate <= best:
            found = []
        else:
            break
    return found


def compare(rows: Sequence[dict[str, Any]], within: float) -> list[dict[str, Any]]:
    """Rows of the table: each clip at its best rate, and at which rates it trains."""
    best = _sweep.best(rows, ("clip", "bound", "rate"), "accuracy")
    least = float(np.mean([row["accuracy"] for row in best])) - within
    clips = ("clip", "bound")
    table = []
    lines = _sweep.compared(rows, clips, ("rate",), "accuracy", ("accuracy",))
    for line, runs in zip(lines, _sweep.groups(rows, clips).values(), strict=True):
        rates = usable(runs, least) or [math.nan]
        smallest, largest = rates[0], rates[-1]
        ends = {"smallest": smallest, "largest": largest}
        table.append(line | ends | {"largest/smallest": largest / smallest})
    return table


def plot(rows: Sequence[dict[str, Any]], table: Sequence[dict[str, Any]]) -> Figure:
    """Draws accuracy over rates, and which of these are usable."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    names, seen = [], dict.fromkeys(CLIPS, 0)
    groups = _sweep.groups(rows, ("clip", "bound")).items()
    for k, (((clip, bound), runs), line) in enumerate(zip(groups, table, strict=True)):
        names.append(_grid.title(clip, bound))
        points = _grid.curve(runs, "rate", "accuracy")
        color, dash = f"C{CLIPS.index(clip)}", ("-", "--", ":")[seen[clip] % 3]
        seen[clip] += 1
        _sweep.draw_band(curves, *points, names[-1], color, ls=dash, marker=".")
        ends = [line["smallest"], line["largest"]]
        bars.plot(ends, [k, k], color=color, ls=dash, lw=2, marker=".")
    curves.set(xlabel="learning rate", ylabel="held-out accuracy", xscale="log")
    bars.set(xlabel="usable learning rates", xscale="log", xlim=curves.get_xlim())
    bars.set_yticks(range(len(names)), names)
    bars.set_ylim(len(names) - 0.5, -0.5)
    return figure


def run(settings: Settings, out: _run.Out) -> None:
    """Trains every variant; prints and writes what came of them."""
    histories = train(variants_of(settings), settings)
    rows = [*map(scores, histories)]
    table = compare(rows, settings.within)
    print("\n" + _common.format_table(table))
    print(
        "accuracy: on held-out digits, mean +- standard deviation over seeds, at the "
        "best rate; smallest,\nlargest: of the rates around it whose mean accuracy is "
        f"within {settings.within:g} of the best of all.\n"
        + _sweep.told(measure_times(settings))
    )
    out.jsonl(_grid.lines(histories, rows, "accuracy"))
    out.figure(plot(rows, table), "normalizer_free.png")


if __name__ == "__main__":
    _run.main(run, Settings)
