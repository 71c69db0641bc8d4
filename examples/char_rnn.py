"""A character RNN, trained without clipping and with any method, each at its best rate.

    python -m examples.char_rnn
    python -m examples.char_rnn --clip=none,zclip,adagc,autoclip,quantile,cotangent
    python -m examples.char_rnn --cell=gru --hidden=64 --rates=0.2,0.5,1,2

Back through many steps of a tanh recurrence the gradient may grow exponentially, and
one SGD step along such a gradient undoes what was learned (Pascanu et al., 2013). A
smaller learning rate needs no clip, and learns more slowly. So every method trains at
every rate, from the same weights on the same passages in the same order.

`cotangent` leaves the gradient alone, and clips what flows back through the state of
every sequence at each step, with `clipfx.clip_cotangent`.

With the settings here, in a minute on two CPU cores: without a clip the best rate is
0.05, with 3.19 bits per character on held-out text, and from 0.1 on runs diverge within
some 30 steps. With a clip by the global norm, or per layer, it is 0.2, with 2.83 and
2.81. At 0.5 all are worse than at 0.02. How far one gets without a clip is a matter of
luck: with --seed=1 a rate of 0.1 still trains, to 2.977, where the two clips reach
2.885 and 2.835 at 0.2. `autoclip`, `quantile`, `band` and `normalize` have 2.80 to
2.84, all at 0.2; `zclip` is `global` here, as its bound acts first. `adagc`, by tensor,
has 2.97, and `cotangent` 3.04 at a rate of 0.1, beyond which it diverges.

Gates leave less to clip. The GRU of the third command reaches 2.39 without a clip and
2.33 with, both at a rate of 1; at 2 it diverges without (32.5), and has 2.62 with. With
--cell=lstm no norm of the best run exceeds 0.8, and both reach 2.27, at a rate of 2.

On two busy CPU cores a step takes 5 ms without a clip, 1.02 to 1.06 times as long with
one of the global norm, and 1.06 to 1.12 times per layer.
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
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import clipfx
from clipfx import plots
from examples import _common, _run, _sweep
from examples._clippers import CLIPPERS, check_clippers
from examples._common import encode, load_text

# In the model, not in front of the optimizer, where it only records metrics.
CLIPS = CLIPPERS | {"cotangent": CLIPPERS["none"]}
CELLS = ("vanilla", "lstm", "gru")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Flags."""

    text: str | None = _run.flag(None, "UTF-8 text file; by default Python's manual.")
    clip: tuple[str, ...] = _run.flag(
        ("none", "global", "layer"), "Methods to compare.", among=tuple(CLIPS)
    )
    rates: tuple[float, ...] = _run.flag(
        (0.02, 0.05, 0.1, 0.2, 0.5), "Learning rates of SGD.", above=0
    )
    cell: str = _run.flag("vanilla", "Kind of recurrence.", among=CELLS)
    steps: int = _run.flag(300, "Training steps of each run.", least=1)
    hidden: int = _run.flag(128, "Hidden units.", least=1)
    length: int = _run.flag(100, "Sequence length, in characters.", least=1)
    batch: int = _run.flag(16, "Batch size, in sequences.", least=1)
    max_norm: float = _run.flag(1.0, "Clipping threshold.", above=0)
    init_scale: float = _run.flag(
        0.9, "Initial singular values of the recurrence.", above=0
    )
    seed: int = _run.flag(0, "Random seed of weights, batches, samples.", least=0)


Ids = jax.Array | np.ndarray  # places in the alphabet, int32
State = Any  # `[batch, hidden]`, of an LSTM two of them


class CharRNN(nnx.Module):
    """One recurrence between an embedding and a readout.

    Args:
      characters: Size of the alphabet.
      hidden: Units.
      init_scale: Singular values of the recurrence at the start.
      cell: One of `CELLS`.
      max_cotangent: Bound on the gradient that flows back through the state of one
        sequence at each step; None for none.
      rngs: For the weights.
    """

    def __init__(
        self,
        characters: int,
        hidden: int,
        init_scale: float,
        cell: str = "vanilla",
        max_cotangent: float | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.orthogonal(init_scale)
        self.embed = nnx.Embed(characters, hidden, rngs=rngs)
        if cell == "vanilla":
            self.recurrent = nnx.Linear(hidden, hidden, kernel_init=init, rngs=rngs)
        else:
            kind = nnx.OptimizedLSTMCell if cell == "lstm" else nnx.GRUCell
            self.recurrent = kind(hidden, hidden, recurrent_kernel_init=init, rngs=rngs)
        self.readout = nnx.Linear(hidden, characters, rngs=rngs)
        self.max_cotangent = max_cotangent

    def start(self, x: jax.Array) -> State:
        """The first state, for inputs `[batch, hidden]`."""
        zeros = jnp.zeros_like(x)
        is_lstm = isinstance(self.recurrent, nnx.OptimizedLSTMCell)
        return (zeros, zeros) if is_lstm else zeros

    def step(self, state: State, x: jax.Array) -> tuple[State, jax.Array]:
        """The next state, to carry, and what is kept of it, `[batch, hidden]`."""
        if self.max_cotangent is not None:  # both states of an LSTM share a norm
            state = clipfx.clip_cotangent(state, self.max_cotangent, axis=-1)
        if not isinstance(self.recurrent, nnx.Linear):
            return self.recurrent(state, x)
        state = jnp.tanh(x + self.recurrent(state))
        return state, state

    def __call__(self, ids: Ids) -> jax.Array:
        """Logits `[batch, length, characters]` of what follows `[batch, length]`."""
        x = self.embed(jnp.asarray(ids).T)
        _, states = jax.lax.scan(self.step, self.start(x[0]), x)
        return self.readout(states).swapaxes(0, 1)


def check_text(text: str, length: int) -> None:
    """A `ValueError` for a text without a passage to train on and one to test on."""
    if len(text) < 2 * (length + 1):
        raise ValueError(
            f"the text has {len(text)} characters, and at length {length} it takes "
            f"{2 * (length + 1)}: give a longer text or a smaller length."
        )
    if len(set(text)) == 1:
        raise ValueError(f"the text is nothing but {text[0]!r}: give another.")


def bits_per_character(model: CharRNN, passages: Ids) -> jax.Array:
    """Mean loss over passages `[batch, length + 1]`."""
    logits, ids = model(passages[:, :-1]), passages[:, 1:]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
    return loss.mean() / math.log(2)


evaluate = nnx.jit(bits_per_character)


class Programs(NamedTuple):
    """What all rates of one method share, compiled once.

    Attributes:
      graph: The model without its parameters.
      params: To start from.
      init: From parameters to the state of clip and optimizer.
      step: From parameters, that state, rate and passages to the next two, and numbers.
    """

    graph: nnx.GraphDef
    params: Any
    init: Any
    step: Any


@functools.cache
def programs(
    characters: int, clip: str, settings: Settings, bare: bool = False
) -> Programs:
    """Builds the model and its training step, for `bare` without what records norms."""
    # The loss is a mean: what flows back is a share of one character's gradient.
    share = settings.max_norm / (settings.batch * settings.length)
    model = CharRNN(
        characters, settings.hidden, settings.init_scale, settings.cell,
        share if clip == "cotangent" else None, rngs=nnx.Rngs(settings.seed),
    )  # fmt: skip
    graph, params = nnx.split(model, nnx.Param)

    def optimizer(rate):
        tx = optax.sgd(rate, momentum=0.9)
        tx = tx if bare else CLIPS[clip](settings.max_norm, rate, tx)
        return optax.with_extra_args_support(tx)

    def loss_of(params, passages):
        return bits_per_character(nnx.merge(graph, nnx.State(params)), passages)

    @jax.jit
    def step(params, state, rate, passages):
        loss, grads = jax.value_and_grad(loss_of)(params, passages)
        updates, state = optimizer(rate).update(grads, state, params, value=loss)
        seen = {"loss": loss, "norm": clipfx.global_norm(grads)}
        seen |= clipfx.metrics.read(state)
        return optax.apply_updates(params, updates), state, seen

    init = jax.jit(optimizer(1.0).init)
    return Programs(graph, nnx.to_pure_dict(params), init, step)


@dataclasses.dataclass(frozen=True)
class Run:
    """One method at one rate: its lines for `metrics.jsonl`, and what came of it.

    Attributes:
      clip: Name of the method.
      rate: Learning rate.
      rows: One dict for each step. `loss` is in bits per character, `norm` that of the
        whole gradient before clipping; the rest is `clipfx.metrics.read`.
      held_out: Bits per character on the tenth of the text that was kept apart.
      characters: The alphabet of the model.
      model: Trained.
    """

    clip: str
    rate: float
    rows: list[dict[str, Any]]
    held_out: float
    characters: str
    model: CharRNN

    def column(self, name: str) -> np.ndarray:
        """One number for each step."""
        return np.array([row[name] for row in self.rows])

    def groups(self, field: str) -> dict[str, np.ndarray]:
        """A field of the first clip's metrics for each group, over the steps."""
        return plots.by_clip(self.rows).get("clip0", {}).get(field, {})


def train(text: str, clip: str, rate: float, settings: Settings = Settings()) -> Run:
    """Trains one model with one method; `ValueError` if that cannot be done."""
    check_clippers([clip], CLIPS)
    check_text(text, settings.length)
    characters, ids = encode(text)
    window = settings.length + 1
    split = len(ids) - max(len(ids) // 10, window)
    ids, held_out = ids[:split], ids[split:]

    graph, params, init, step = programs(len(characters), clip, settings)
    state = init(params)
    order = np.random.default_rng(settings.seed)
    rows = []
    progress = tqdm(range(settings.steps), desc=f"{clip:>8} {rate:<4g}")
    for number in progress:
        starts = order.integers(len(ids) - settings.length, size=(settings.batch, 1))
        passages = ids[starts + np.arange(window)]
        params, state, seen = step(params, state, np.float32(rate), passages)
        seen = {key: value.item() for key, value in jax.device_get(seen).items()}
        rows.append({"clip": clip, "rate": rate, "step": number, **seen})
        note = f"loss {seen['loss']:.2f}, norm {seen['norm']:.2g}"
        progress.set_postfix_str(note, refresh=False)

    model = nnx.merge(graph, nnx.State(params))
    passages = held_out[: len(held_out) // window * window].reshape(-1, window)
    bits = float(evaluate(model, passages[:500]))
    return Run(clip, rate, rows, bits, characters, model)


def measure_times(text: str, settings: Settings) -> dict[str, float]:
    """Milliseconds of a step by method; `none` does not even record norms."""
    characters, ids = encode(text)
    starts = np.random.default_rng(0).integers(
        len(ids) - settings.length, size=(settings.batch, 1)
    )
    passages, calls = ids[starts + np.arange(settings.length + 1)], {}
    for clip in dict.fromkeys(("none", *settings.clip)):
        bare = clip in ("none", "cotangent")  # the latter clips in the model
        _, params, init, step = programs(len(characters), clip, settings, bare)
        given = params, init(params), np.float32(0.01), passages
        calls[clip] = functools.partial(step, *given)
    return _sweep.in_turns(calls)


@functools.partial(nnx.jit, static_argnames="count")
def _sample(model: CharRNN, first: int, key: jax.Array, count: int) -> jax.Array:
    def step(carry, key):
        state, last = carry
        state, kept = model.step(state, model.embed(last))
        following = jax.random.categorical(key, model.readout(kept))
        return (state, following), following

    last = jnp.full(1, first)
    start = model.start(model.embed(last)), last
    return jax.lax.scan(step, start, jax.random.split(key, count))[1][:, 0]


def sample(run: Run, count: int = 300, seed: int = 0) -> str:
    """Text that the model makes up, beginning with a new line where it can."""
    first = max(run.characters.find("\n"), 0)
    ids = _sample(run.model, first, jax.random.key(seed), count)
    return "".join(run.characters[i] for i in np.asarray(ids))


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each method, by rate."""
    ranked = sorted(runs, key=lambda run: run.rate)
    return {r.clip: [run for run in ranked if run.clip == r.clip] for r in runs}


def best(runs: Sequence[Run]) -> Run:
    """The run that predicts held-out text best; one that is not finite is the worst."""
    return min(runs, key=lambda run: (not math.isfinite(run.held_out), run.held_out))


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """A row of the table, of one method."""
    top = best(runs)
    shares = [float(x[-1]) for x in top.groups("clip_rate").values()]
    return {
        "clip": top.clip,
        **{f"rate {run.rate:g}": run.held_out for run in runs},
        "best": top.held_out,
        "at": top.rate,
        "largest norm": float(top.column("norm").max()),
        "clip rate": sum(shares) / len(shares) if shares else math.nan,
    }


def plot(runs: Sequence[Run]) -> Figure:
    """Draws what each rate came to; loss, norm and thresholds at the best of each."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplot_mosaic([["rates", "loss"], ["rates", "norm"]])
    methods = by_method(runs)
    # And what the best rate of all does to the control.
    rate = best(runs).rate
    control = [run for run in methods.get("none", ()) if run.rate == rate]
    shown = [*map(best, methods.values()), *control]
    shown = {f"{run.clip}, rate {run.rate:g}": run for run in shown}
    limits = {name: [*run.groups("threshold").values()] for name, run in shown.items()}
    limits = {name: np.stack(x, 1) for name, x in limits.items() if x}
    columns = lambda what: {name: run.column(what) for name, run in shown.items()}
    plots.lines(columns("loss"), legend=False, ax=axes["loss"])
    plots.norms(columns("norm"), limits, clipped={}, legend=False, ax=axes["norm"])
    held_out = {clip: [run.held_out for run in some] for clip, some in methods.items()}
    rates = sorted({run.rate for run in runs})
    plots.lines(held_out, step=rates, legend=False, ax=axes["rates"])
    for line in axes["rates"].lines:
        line.set(marker=".", markevery=1)
    axes["rates"].set(xlabel="learning rate", xscale="log", xticks=rates)
    axes["rates"].xaxis.set_major_formatter("{x:g}")
    axes["rates"].minorticks_off()
    axes["rates"].set(ylabel="bits per character, held out", yscale="log")
    axes["loss"].set(xlabel="", ylabel="bits per character", yscale="log")
    axes["norm"].set(ylabel="gradient norm before clipping", yscale="log")
    axes["norm"].sharex(axes["loss"])
    for name in ("rates", "loss"):
        _common.plain_ticks(axes[name])
    figure.legend(
        *axes["norm"].get_legend_handles_labels(), loc="outside right upper",
        fontsize=8, labelspacing=0.3,
    )  # fmt: skip
    return figure


def run(settings: Settings, out: _run.Out) -> None:
    """Runs every method at every rate; prints and writes what they did."""
    text = load_text(settings.text)
    check_text(text, settings.length)
    runs = [
        train(text, clip, rate, settings)
        for clip in settings.clip
        for rate in settings.rates
    ]
    methods = by_method(runs)
    for some in methods.values():
        top = best(some)
        if math.isfinite(top.held_out):
            print(f"\n--- {top.clip}, at rate {top.rate:g}, writes:")
            print(sample(top, seed=settings.seed))
    print("\n" + _common.format_table([*map(summarize, methods.values())]))
    print(
        "\nrate, best: bits per character on held-out text. largest norm, clip rate: "
        "of the best\nrun; the latter is the share of steps, mean over groups. The "
        f"threshold is {settings.max_norm:g} where a method\nhas one; the settings of "
        "others are in examples/_clippers.py.\n"
        + _sweep.told(measure_times(text, settings))
    )
    out.jsonl(row for run in runs for row in run.rows)
    out.figure(plot(runs), "char_rnn.png")


if __name__ == "__main__":
    _run.main(run, Settings)
