"""A character RNN, trained without clipping and with any method.

    python -m examples.char_rnn
    python -m examples.char_rnn --text=book.txt --clip=global,zclip,agc --steps=2000
    python -m examples.char_rnn --cell=lstm --clip=none,global,cotangent

Back through many steps of a tanh recurrence the gradient may grow exponentially, and
one SGD step along such a gradient undoes what was learned (Pascanu et al., 2013). At
the learning rate here the run without clipping diverges within some 30 steps and does
not recover; a smaller learning rate would need no clipping, and learn more slowly. All
runs start from the same weights and see the same passages in the same order.

`cotangent` leaves the gradient alone, and clips what flows back through the state of
every sequence at each step, with `clipfx.clip_cotangent`.
"""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Sequence
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import clipfx
from clipfx import plots
from examples import _common
from examples._clippers import CLIPPERS, check_clippers
from examples._common import encode, load_text


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that all runs share; each is a flag of the same name."""

    steps: int = 500
    hidden: int = 256
    length: int = 100
    batch: int = 32
    learning_rate: float = 0.2
    max_norm: float = 1.0
    init_scale: float = 0.9
    cell: str = "vanilla"
    seed: int = 0


DEFAULT = ("none", "global", "layer")
# In the model, not in front of the optimizer, where it only records metrics.
CLIPS = CLIPPERS | {"cotangent": CLIPPERS["none"]}
CELLS = ("vanilla", "lstm", "gru")


FLAGS = flags.FLAGS
flags.DEFINE_string("text", None, "UTF-8 text file; by default Python's own manual.")
flags.DEFINE_list("clip", list(DEFAULT), f"Methods to compare: {', '.join(CLIPS)}.")
flags.DEFINE_integer("steps", Settings.steps, "Training steps per run.", 1)
flags.DEFINE_integer("hidden", Settings.hidden, "Hidden units.", 1)
flags.DEFINE_integer("length", Settings.length, "Sequence length, in characters.", 1)
flags.DEFINE_integer("batch", Settings.batch, "Batch size, in sequences.", 1)
flags.DEFINE_float("learning_rate", Settings.learning_rate, "Learning rate of SGD.")
flags.DEFINE_float("max_norm", Settings.max_norm, "Clipping threshold.")
flags.DEFINE_float(
    "init_scale", Settings.init_scale, "Initial singular values of the recurrence."
)
flags.DEFINE_enum("cell", Settings.cell, CELLS, "Kind of recurrence.")
flags.DEFINE_integer(
    "seed", Settings.seed, "Random seed of weights, batches and samples.", 0
)
flags.DEFINE_string("out", "out/char_rnn", "Output directory.")
for name in ("learning_rate", "max_norm", "init_scale"):
    flags.register_validator(name, lambda x: x > 0, "must be greater than 0")


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


@dataclasses.dataclass(frozen=True)
class History:
    """A run: its lines for `metrics.jsonl`, and what came of it.

    Attributes:
      clip: Name of the clipper.
      rows: One dict for each step. `loss` is in bits per character, `norm` that of the
        whole gradient before clipping, `ms` the time; the rest is
        `clipfx.metrics.read`.
      held_out: Bits per character on the tenth of the text that was kept apart.
      characters: The alphabet of the model.
      model: Trained.
    """

    clip: str
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


@nnx.jit
def train_step(
    model: CharRNN, optimizer: nnx.Optimizer, passages: Ids
) -> dict[str, jax.Array]:
    """Updates the model; gives the numbers of this step."""
    loss, grads = nnx.value_and_grad(bits_per_character)(model, passages)
    optimizer.update(model, grads, value=loss)
    seen = {"loss": loss, "norm": clipfx.global_norm(grads)}
    return seen | clipfx.metrics.read(optimizer.opt_state)


def train(text: str, clip: str, settings: Settings = Settings()) -> History:
    """Trains one model with one clipper; `ValueError` if that cannot be done."""
    check_clippers([clip], CLIPS)
    check_text(text, settings.length)
    characters, ids = encode(text)
    window = settings.length + 1
    split = len(ids) - max(len(ids) // 10, window)
    ids, held_out = ids[:split], ids[split:]

    # The loss is a mean: what flows back is a share of one character's gradient.
    share = settings.max_norm / (settings.batch * settings.length)
    model = CharRNN(
        len(characters), settings.hidden, settings.init_scale, settings.cell,
        share if clip == "cotangent" else None, rngs=nnx.Rngs(settings.seed),
    )  # fmt: skip
    sgd = optax.sgd(settings.learning_rate, momentum=0.9)
    tx = CLIPS[clip](settings.max_norm, settings.learning_rate, sgd)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    order = np.random.default_rng(settings.seed)
    rows = []
    progress = tqdm(range(settings.steps), desc=f"{clip:>8}")
    for step in progress:
        starts = order.integers(len(ids) - settings.length, size=(settings.batch, 1))
        begin = time.perf_counter()
        seen = train_step(model, optimizer, ids[starts + np.arange(window)])
        seen = {key: value.item() for key, value in jax.device_get(seen).items()}
        ms = 1000 * (time.perf_counter() - begin)
        rows.append({"clip": clip, "step": step, "ms": ms, **seen})
        note = f"loss {seen['loss']:.2f}, norm {seen['norm']:.2g}"
        progress.set_postfix_str(note, refresh=False)

    passages = held_out[: len(held_out) // window * window].reshape(-1, window)
    bits = float(evaluate(model, passages[:500]))
    return History(clip, rows, bits, characters, model)


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


def sample(history: History, count: int = 300, seed: int = 0) -> str:
    """Text that the model makes up, beginning with a new line where it can."""
    first = max(history.characters.find("\n"), 0)
    ids = _sample(history.model, first, jax.random.key(seed), count)
    return "".join(history.characters[i] for i in np.asarray(ids))


def summarize(history: History) -> dict[str, Any]:
    """A row of the table. The first step is left out of the time: it compiles."""
    loss, norm, ms = map(history.column, ("loss", "norm", "ms"))
    rates = [float(rate[-1]) for rate in history.groups("clip_rate").values()]
    return {
        "clip": history.clip,
        "bits/char": history.held_out,
        "largest norm": float(norm.max()),
        "clip rate": sum(rates) / len(rates) if rates else math.nan,
        "non-finite": int((~np.isfinite(loss) | ~np.isfinite(norm)).sum()),
        "ms/step": float(np.median(ms[1:] if len(ms) > 1 else ms)),
    }


def plot(histories: Sequence[History], file: str | pathlib.Path | IO[bytes]) -> None:
    """Draws loss, gradient norm and thresholds over the steps, as PNG."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, norms = figure.subplots(2, sharex=True)
    columns = lambda name: {h.clip: h.column(name) for h in histories}
    limits = {h.clip: [*h.groups("threshold").values()] for h in histories}
    limits = {clip: np.stack(x, 1) for clip, x in limits.items() if x}
    plots.lines(columns("loss"), legend=False, ax=losses)
    plots.norms(columns("norm"), limits, clipped={}, legend=False, ax=norms)
    losses.set(xlabel="", ylabel="bits per character", yscale="log")
    norms.set(ylabel="gradient norm before clipping", yscale="log")
    _common.plain_ticks(losses)
    figure.legend(*norms.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(file, format="png", dpi=120)


def main(argv: Sequence[str]) -> None:
    """Runs every clipper asked for; prints and writes what they did."""
    given = FLAGS.flag_values_dict()
    settings = Settings(**{f.name: given[f.name] for f in dataclasses.fields(Settings)})
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}: flags begin with --.")
        check_clippers(FLAGS.clip, CLIPS)
        text = load_text(FLAGS.text)
        check_text(text, settings.length)
        out = _common.make_dir(FLAGS.out)
    except ValueError as error:
        raise SystemExit(f"char_rnn: {error}") from None

    histories = [train(text, clip, settings) for clip in dict.fromkeys(FLAGS.clip)]
    for history in histories:
        if math.isfinite(history.held_out):
            text = sample(history, seed=settings.seed)
            print(f"\n--- {history.clip} writes:\n{text}")
    print("\n" + _common.format_table([summarize(history) for history in histories]))
    print("\nbits/char: on held-out text. clip rate: of the steps, mean over groups.")
    print(
        f"The threshold is {settings.max_norm:g} for fixed-threshold methods. It also "
        "bounds autoclip, quantile and\nband in the first 100 steps, and zclip always. "
        "A clip by global norm stands behind grad_power,\nspam and group_ratio, which "
        "bound no norm, and in front of params, whose momentum would keep\nan exploded "
        "gradient. Slow here, as expected: error_feedback, which replays exploded "
        "gradients,\nand curvature, which mistakes the noise of small batches for "
        "curvature.\ncotangent bounds what flows back through the state of a sequence, "
        "by the threshold\nfor the loss of one character, and no gradient of weights."
    )
    _common.write_jsonl(out / "metrics.jsonl", (r for h in histories for r in h.rows))
    plot(histories, out / "char_rnn.png")
    print(f"Wrote {out / 'metrics.jsonl'} and {out / 'char_rnn.png'}.")


if __name__ == "__main__":
    app.run(main)
