"""A decoder whose attention logits explode, with and without QK-Clip.

    python -m examples.sharp_attention
    python -m examples.sharp_attention --optimizer=adamw --rates=0.003,0.01,0.03,0.1

Attention logits are products of two weights that both grow, and behind a softmax that
has saturated nothing pulls them back. Muon makes every singular value of a step alike,
so that its weights grow fastest. A clip of the gradient bounds no weights; `qk_clip`,
behind the optimizer, rescales those of a head whose logits exceed tau. Every method
trains at every learning rate, from the same weights on the same passages.

With the settings here the best rate of each method gives nearly the same: 2.83 bits per
byte without a clip, 2.75 and 2.74 with the gradient or the logits clipped, and 2.71
with the gradient clipped at `--max_norm=0.3`, which was searched for. What
`qk_clip` changes is what happens beyond: at the largest rate, ten times the best one
without it, logits reach 20,000 and the loss 3.78 or more; with it that is 2.93. Its tau
is small since the model is: 10, where large models take 100.
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
from optax.contrib import MuonDimensionNumbers, muon
from tqdm import tqdm

import clipfx
from examples import _common, _run
from examples._decoder import Attention, Decoder

CLIPS = ("none", "global", "qk_clip", "both")
WARM_UP = 20  # steps
ADAM_SHARE = 0.15  # of Muon's rate: for what are no hidden matrices


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs have in common; each is a flag of the same name."""

    text: str | None = _run.flag(None, "UTF-8 text file; by default Python's manual.")
    clip: tuple[str, ...] = _run.flag(CLIPS[:3], "Methods to compare.", among=CLIPS)
    rates: tuple[float, ...] = _run.flag(
        (0.01, 0.03, 0.1, 0.3), "Learning rates.", above=0
    )
    optimizer: str = _run.flag("muon", "Optimizer.", among=("muon", "adamw"))
    steps: int = _run.flag(250, "Training steps of each run.", least=1)
    tau: float = _run.flag(10.0, "Largest attention logit.", above=0)
    max_norm: float = _run.flag(1.0, "Threshold of the global norm.", above=0)
    width: int = _run.flag(64, "Model width.", least=1)
    layers: int = _run.flag(2, "Transformer blocks.", least=1)
    heads: int = _run.flag(4, "Attention heads.", least=1)
    length: int = _run.flag(64, "Sequence length, in bytes.", least=2)
    batch: int = _run.flag(16, "Batch size, in sequences.", least=1)
    seed: int = _run.flag(0, "Random seed of weights and batches.", least=0)


class MaxLogits(nnx.Variable):
    """The largest attention logit of each head in the last call."""


class WatchedAttention(Attention):
    """Attention that knows its largest logits."""

    def __init__(self, width: int, heads: int, linear: Any):
        super().__init__(width, heads, linear)
        self.seen = MaxLogits(jnp.zeros(heads))

    def mix(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """As before, and keeps the largest logits."""
        seen = clipfx.max_attention_logits(query, key, is_causal=True)
        self.seen[...] = seen
        return super().mix(query, key, value)


def hidden(params: Any) -> Any:
    """Matrices of blocks are Muon's, all else Adam's."""

    def kind(path, leaf):
        words = [str(getattr(key, "key", key)) for key in path]
        is_hidden = "blocks" in words and leaf.ndim == 2
        return MuonDimensionNumbers() if is_hidden else None

    return jax.tree_util.tree_map_with_path(kind, params)


class Numbers(NamedTuple):
    """What differs between runs, and is an argument of the compiled step.

    Attributes:
      rate: The learning rate.
      max_norm: Threshold of the gradient's norm, infinite for no clip.
      tau: The largest attention logit, infinite for no clip.
    """

    rate: Any
    max_norm: Any
    tau: Any


def numbers_of(settings: Settings, clip: str, rate: float) -> Numbers:
    return Numbers(
        rate,
        settings.max_norm if clip in ("global", "both") else math.inf,
        settings.tau if clip in ("qk_clip", "both") else math.inf,
    )


def make_transform(
    settings: Settings, numbers: Numbers
) -> optax.GradientTransformationExtraArgs:
    """Clips where they belong: in front of the optimizer, and behind it."""
    if settings.optimizer == "muon":
        optimizer = muon(
            numbers.rate,
            adam_learning_rate=ADAM_SHARE * numbers.rate,
            muon_weight_dimension_numbers=hidden,
        )
    else:
        optimizer = optax.adamw(numbers.rate, b2=0.99)
    return optax.named_chain(
        ("gradient", clipfx.clip_by_global_norm(numbers.max_norm)),
        ("optimizer", optimizer),
        ("logits", clipfx.qk_clip(numbers.tau)),
    )


class Programs(NamedTuple):
    """What a run calls, compiled once for all of them.

    Attributes:
      params: To start from.
      init: From parameters to the state of the optimizer.
      step: From parameters, state, passages and `Numbers` to the next two, and metrics.
      evaluate: Bits per byte of parameters on passages.
    """

    params: Any
    init: Any
    step: Any
    evaluate: Any


@functools.cache
def programs(settings: Settings) -> Programs:
    """Builds the model and its training step."""
    model = Decoder(
        settings.width,
        settings.layers,
        settings.heads,
        settings.length,
        dropout=0.0,
        dtype=jnp.float32,
        rngs=nnx.Rngs(settings.seed),
        attention=WatchedAttention,
    )
    graph, *parts = nnx.split(model, nnx.Param, ...)
    params, others = map(nnx.to_pure_dict, parts)

    def loss_of(params, passages):
        model = nnx.merge(graph, nnx.State(params), nnx.State(others))
        logits, ids = model(passages[:, :-1]), passages[:, 1:]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
        seen = nnx.to_pure_dict(nnx.state(model, MaxLogits))
        return loss.mean() / math.log(2), seen

    @jax.jit
    def step(params, state, passages, numbers):
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, seen), grads = gradient(params, passages)
        tx = make_transform(settings, numbers)
        updates, state = tx.update(grads, state, params, max_logits=seen)
        metrics = {"loss": loss} | clipfx.metrics.read(state)
        return optax.apply_updates(params, updates), state, metrics

    init = jax.jit(make_transform(settings, Numbers(1.0, 1.0, 1.0)).init)
    evaluate = jax.jit(lambda params, passages: loss_of(params, passages)[0])
    return Programs(params, init, step, evaluate)


@dataclasses.dataclass(frozen=True)
class History:
    """A run: its lines for `metrics.jsonl`, and bits per byte on held-out text."""

    clip: str
    rate: float
    rows: list[dict[str, Any]]
    held_out: float

    def column(self, name: str) -> np.ndarray:
        """One number for each step."""
        return np.array([row[name] for row in self.rows])

    def top(self) -> np.ndarray:
        """The largest logit of all layers and heads, at each step."""
        return self.column("largest logit")


def cut_text(text: str, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on, and passages `[n, length + 1]` of the last tenth."""
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    window = settings.length + 1
    if len(ids) < 2 * window:
        raise ValueError(
            f"the text has {len(ids)} bytes, and at length {settings.length} it takes "
            f"{2 * window}: give a longer text or a smaller length."
        )
    split = len(ids) - max(len(ids) // 10, window)
    held_out = ids[split:][: (len(ids) - split) // window * window]
    return ids[:split], held_out.reshape(-1, window)[:500]


def train(text: str, clip: str, rate: float, settings: Settings) -> History:
    """Trains one model."""
    ids, held_out = cut_text(text, settings)
    params, init, step, evaluate = programs(settings)
    state = init(params)
    order = np.random.default_rng(settings.seed)
    window = np.arange(settings.length + 1)
    rows = []
    progress = tqdm(range(settings.steps), desc=f"{clip:>8} {rate:<6g}")
    for k in progress:
        starts = order.integers(len(ids) - settings.length, size=(settings.batch, 1))
        now = numbers_of(settings, clip, rate * min(1, (k + 1) / WARM_UP))
        now = Numbers(*map(np.float32, now))
        params, state, seen = step(params, state, ids[starts + window], now)
        seen = {key: value.item() for key, value in jax.device_get(seen).items()}
        tops = [x for key, x in seen.items() if key.startswith("logits/norm/")]
        row = {"clip": clip, "rate": rate, "step": k, "largest logit": max(tops)}
        rows.append(row | seen)
        note = f"loss {seen['loss']:.2f}, logit {max(tops):.3g}"
        progress.set_postfix_str(note, refresh=False)
    return History(clip, rate, rows, float(evaluate(params, held_out)))


def summarize(history: History) -> dict[str, Any]:
    """A row of the table."""
    last = history.rows[-1]
    rates = [x for key, x in last.items() if key.startswith("logits/clip_rate/")]
    return {
        "clip": history.clip,
        "rate": history.rate,
        "bits/byte": history.held_out,
        "largest logit": float(history.top().max()),
        "last": float(history.top()[-1]),
        "gradients clipped": last["gradient/clip_rate/global"],
        "layers rescaled": sum(rates) / len(rates),
    }


def best(histories: Sequence[History]) -> dict[str, History]:
    """The run of each method with the fewest bits per byte."""
    finite = [h for h in histories if math.isfinite(h.held_out)]
    ranked = sorted(finite, key=lambda h: -h.held_out)
    return {h.clip: h for h in ranked}


def plot(histories: Sequence[History], tau: float) -> Figure:
    """Draws bits per byte over rates, and logits over steps at the best and largest."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    bits, logits = figure.subplots(1, 2)
    clips = [*dict.fromkeys(h.clip for h in histories)]
    styles = dict(zip(CLIPS, ("-", "--", "-", "--"), strict=True))
    largest = max(h.rate for h in histories)
    for clip in clips:
        runs = sorted((h for h in histories if h.clip == clip), key=lambda h: h.rate)
        color = f"C{CLIPS.index(clip)}"
        rates, held_out = [h.rate for h in runs], [h.held_out for h in runs]
        bits.plot(rates, held_out, styles[clip], marker="o", color=color, label=clip)
        for run in runs:
            faint = 1.0 if run.rate == largest else 0.35
            logits.plot(
                run.column("step"), run.top(), styles[clip], color=color, alpha=faint
            )
    logits.axhline(tau, color="k", lw=1, ls=":")
    beside = ("axes fraction", "data")
    logits.annotate("tau", (1, tau), (3, -3), beside, textcoords="offset points")
    bits.set(xlabel="learning rate", ylabel="bits per byte, held out", xscale="log")
    bits.set_xticks(sorted({h.rate for h in histories}), minor=False)
    bits.xaxis.set_major_formatter("{x:g}")
    bits.minorticks_off()
    logits.set(
        xlabel=f"step (rate {largest:g}; faint: smaller rates)",
        ylabel="largest attention logit",
        yscale="log",
    )
    figure.legend(
        *bits.get_legend_handles_labels(), loc="outside upper center", ncols=len(clips)
    )
    return figure


def run(settings: Settings, out: _run.Out) -> None:
    """Runs every method at every rate; prints and writes what they did."""
    if settings.width % settings.heads:
        raise ValueError(
            f"--width={settings.width} must be a multiple of --heads={settings.heads}."
        )
    text = _common.load_text(settings.text)
    cut_text(text, settings)
    histories = [
        train(text, clip, rate, settings)
        for clip in settings.clip
        for rate in settings.rates
    ]
    print("\n" + _common.format_table([summarize(history) for history in histories]))
    for clip, run in best(histories).items():
        print(f"Best of {clip}: {run.held_out:.3f} bits/byte, at rate {run.rate:g}.")
    print(
        "Logits are of training batches before each step. gradients clipped, layers "
        "rescaled: share\nof steps. A logit exceeds tau by what one step adds to it."
    )
    out.jsonl(row for history in histories for row in history.rows)
    out.figure(plot(histories, settings.tau), "sharp_attention.png")


if __name__ == "__main__":
    _run.main(run, Settings)
