"""Spikes, and bounds that follow the norms or the weights."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import clipfx
from examples import _common, char_rnn, normalizer_free
from examples._evidence.claims import Row, at_least, at_most, judge, near, single, stack
from examples._evidence.training import descend

TITLE = "Spikes, and thresholds that adapt"
NOTE = """\
What a rule does at a spike, and how often it acts where there is none, are two
questions. A rule that learns the norms as they are follows a spike upward; one that
learns them clipped, with little room above, follows its own clips downward. An LSTM
that reads clean text needs no clip, on passages of 100 characters neither (`python -m
examples.char_rnn --cell=lstm`). What outlying batches cost it depends on whether there
is a bound, not on which: 1, above its usual norms, does what ZClip does. Nor is one
rule smoother than another there beyond what seeds differ by."""

AGC = "[Brock et al., 2021](https://arxiv.org/abs/2102.06171)"
SPAMP = "[You and Liu, 2025](https://arxiv.org/abs/2510.01578)"
ZCLIP = "[Kumar et al., 2025](https://arxiv.org/abs/2504.02507)"
CLIPPY = "[Tang et al., 2023](https://arxiv.org/abs/2302.09178)"


def exceptional() -> Row:
    """How often adaptive thresholds act on norms without any spike."""
    norms = single(np.random.default_rng(0).lognormal(sigma=0.3, size=(5, 2000)))

    def share(tx):
        def step(state, norm):
            update, state = tx.update(jnp.stack([norm]), state)
            return state, update[0] < 0.9999 * norm

        run = lambda norms: jax.lax.scan(step, tx.init(jnp.ones(1)), norms)[1].mean()
        return jax.jit(jax.vmap(run))(norms)

    methods = {
        "ZClip": clipfx.zclip(),
        "AutoClip, 10%": clipfx.autoclip(10.0),
        "AdaGC, 1.04": clipfx.adagc(),
        "SPAMP": clipfx.spamp(),
    }
    return judge(
        "Thresholds that adapt to the norms clip exceptional steps alone.",
        "2,000 lognormal norms of deviation 0.3, methods as their papers have them: "
        "share of steps clipped.",
        [at_most(share(tx), 0.1, label=name) for name, tx in methods.items()],
    )


def spike() -> Row:
    """One gradient that is far longer than those before."""
    usual = np.random.default_rng(0).normal(size=16)
    usual = single(usual / np.linalg.norm(usual))

    def last(tx, times=2.0, scale=1.0):
        """The length of the step after 50 usual ones, in units of these."""

        @jax.jit
        def run(g, times):
            step = lambda state, _: (tx.update(g, state)[1], None)
            state, _ = jax.lax.scan(step, tx.init(g), None, length=50)
            return clipfx.global_norm(tx.update(times * g, state)[0])

        return float(run(single(scale * usual), single(times))) / scale

    spamp = clipfx.spamp()
    return judge(
        "A threshold that follows the mean norm keeps a spike to the usual size, in "
        "whatever unit the loss is.",
        "50 gradients of norm 1 and one of 10⁶: what is left of it with SPAMP, which "
        "learns norms as they are, and with AdaGC, which learns them clipped; and with "
        "SPAMP of one of 2, in a unit 10⁴ times as small, over that in this one.",
        [at_most(last(spamp, 1e6), 2.0, label="SPAMP"),
         at_most(last(clipfx.adagc(warmup_steps=10), 1e6), 2.0, label="AdaGC"),
         near(last(spamp, scale=1e4) / last(spamp), 1.0, 0.05, label="unit")],
    )  # fmt: skip


# Thresholds of the norm, and of ZClip in deviations.
CASES = {"none": (math.inf, math.inf), "c = 1": (1.0, math.inf),
         "ZClip": (math.inf, 2.5)}  # fmt: skip


class Lessons(NamedTuple):
    """What LSTMs read, and how they start.

    Attributes:
      bits: Of parameters and passages, the loss.
      params: Of all seeds, `[seeds, ...]`.
      passages: `[2, seeds, steps, batch, length]`: clean, and with one batch in 20
        whose sequences are one character, over and over.
      test: Other passages, `[200, length]`.
    """

    bits: Callable
    params: Any
    passages: np.ndarray
    test: np.ndarray


@functools.cache
def lessons(seeds: int = 3) -> Lessons:
    """Passages of a text for an LSTM of 24 units."""
    characters, ids = char_rnn.encode(_common.load_text()[:60_000])
    settings = char_rnn.Settings(cell="lstm", hidden=24, length=16, batch=8, steps=200)
    window = np.arange(settings.length + 1)
    train, test = np.split(ids, [50_000])
    test = test[: 200 * len(window)].reshape(-1, len(window))

    rng = np.random.default_rng(0)
    shape = seeds, settings.steps, settings.batch, 1
    clean = train[rng.integers(50_000 - len(window), size=shape) + window]
    one = rng.integers(len(characters), size=(seeds, settings.steps, 1, 1))
    bad = np.arange(settings.steps) % 20 == 19
    spoiled = np.where(bad[None, :, None, None], one, clean)
    passages = np.stack([clean, spoiled]).astype(np.int32)

    def start(seed):
        model = char_rnn.CharRNN(
            len(characters), settings.hidden, settings.init_scale, settings.cell,
            rngs=nnx.Rngs(seed),
        )  # fmt: skip
        return nnx.split(model)

    graphs, params = zip(*map(start, range(seeds)), strict=True)

    def bits(params, passages):
        return char_rnn.bits_per_character(nnx.merge(graphs[0], params), passages)

    return Lessons(bits, stack(params), passages, test)


@functools.cache
def read_text() -> dict[tuple[str, str], np.ndarray]:
    """Bits per character `[seeds]`, by case and text, each at its better rate."""
    bits, params, passages, test = lessons()
    rates = 0.5, 1.0

    def run(max_norm, deviations, rate, passages, params):
        rule = optax.chain(clipfx.zclip(deviations), optax.sgd(rate, 0.9))
        return bits(descend(bits, params, passages, max_norm, rule), test)

    over = [(None,) * 3 + (0, 0), (None,) * 3 + (0, None), (None, None, 0, None, None),
            (0, 0) + (None,) * 3]  # fmt: skip
    every = jax.jit(functools.reduce(jax.vmap, over, run))
    limits = map(single, zip(*CASES.values(), strict=True))
    loss = np.asarray(every(*limits, single(rates), passages, params))
    kinds = itertools.product(CASES, ("clean", "spoiled"))
    by_rate = loss.swapaxes(1, 2).reshape(-1, len(rates), loss.shape[-1])
    return {kind: min(rows, key=np.mean)
            for kind, rows in zip(kinds, by_rate, strict=True)}  # fmt: skip


def gated() -> Row:
    """LSTMs, each at its best rate."""
    gain = lambda kind: read_text()["none", kind] - read_text()["c = 1", kind]
    return judge(
        "Gated recurrent nets need a clip too.",
        "LSTM of 24 units, 200 steps on passages of 16 characters, rates ½ and 1: bits "
        "per character by which it is worse without a clip than with c = 1, each at "
        "its best rate; and if one batch in 20 repeats a single character.",
        [at_least(gain("clean"), 0.1, label="clean")],
        [at_least(gain("spoiled"), 0.1, label="spoiled")],
    )


def outlying() -> Row:
    """What spoiled batches cost with either threshold."""
    bits = read_text()
    cost = {name: bits[name, "spoiled"] - bits[name, "clean"] for name in CASES}
    return judge(
        "ZClip survives spikes at which a fixed threshold of 1 fails.",
        "The same; bits per character that the spoiled batches cost, each at its best "
        "rate: without a clip, with c = 1, with ZClip.",
        [at_least(cost["c = 1"], 0.2, label="c = 1"),
         at_most(cost["ZClip"], 0.2, label="ZClip")],
        [at_least(cost["none"], 0.2, label="none")],
        source=ZCLIP,
    )  # fmt: skip


def smoothest() -> Row:
    """The loss of other passages on the way, of four methods as their papers have them.

    What it climbs is the sum of all its rises, of a step each.
    """
    bits, params, passages, test = lessons()

    def read(tx):
        """Where it ends, and what it climbs, `[seeds]`."""
        rule = optax.chain(tx, optax.sgd(1.0, 0.9))

        def step(carry, passages):
            params, state = carry
            update, state = rule.update(jax.grad(bits)(params, passages), state, params)
            params = optax.apply_updates(params, update)
            return (params, state), bits(params, test[:32])

        def run(params, passages):
            return jax.lax.scan(step, (params, rule.init(params)), passages)[1]

        loss = np.asarray(jax.jit(jax.vmap(run))(params, passages[0]), np.float64)
        return loss[:, -1], np.diff(loss).clip(min=0).sum(-1)

    others = [clipfx.clip_by_global_norm(1.0), clipfx.agc(0.04), clipfx.zclip()]
    end, climbs = read(clipfx.spamp())
    ends, climbed = zip(*map(read, others), strict=True)
    return judge(
        "Of methods to bound gradients SPAMP has the smoothest loss, and learns "
        "fastest.",
        "The same LSTM and clean text, rate 1, of ¼ to 2 the best but for c = 1, which "
        "is 0.01 bits better at ½: what the loss of other passages climbs on the way "
        "with SPAMP, over the least of c = 1, AGC at 0.04 and ZClip; and the bits per "
        "character that it ends above the best of them.",
        [at_most(climbs / np.min(climbed, 0), 1.0, label="climbs"),
         at_most(end - np.min(ends, 0), 0.0, label="bits")],
        source=SPAMP,
    )  # fmt: skip


def largest_rates() -> dict[str, float]:
    """The largest rate at which a network without normalization learns, by clip."""
    settings = normalizer_free.Settings(
        clip=("none", "global", "agc"), max_norm=(1.0,), max_ratio=(0.04,),
        rates=(0.03, 0.1, 0.3, 1.0), steps=200, blocks=8,
    )  # fmt: skip
    variants = normalizer_free.variants_of(settings)
    rows = [*map(normalizer_free.scores, normalizer_free.train(variants, settings))]
    table = normalizer_free.compare(rows, settings.within)
    return {line["clip"]: line["largest"] for line in table}


def unnormalized() -> Row:
    """AGC where no layer is normalized."""
    rates = largest_rates()
    return judge(
        "Bounds of each unit by its weights let a network without normalization train "
        "at larger rates.",
        "8 residual blocks, 200 steps on digits, three seeds: largest rate whose mean "
        "accuracy is within 0.03 of the best, with AGC at 0.04 over that without a "
        "clip; and over that with a plain clip at 1.",
        [at_least(rates["agc"] / rates["none"], 2.0, label="none")],
        [at_least(rates["agc"] / rates["global"], 2.0, label="c = 1")],
        source=AGC,
    )


def zero_weight() -> Row:
    """Steps within a tenth of each weight, where one weight is zero."""
    start = np.linspace(0.5, 2, 8, dtype=np.float32)

    @jax.jit
    def left(start, least):
        """The loss after 100 steps of gradient descent, over that before."""
        goal = start + 0.5
        tx = optax.chain(optax.sgd(0.1), clipfx.clip_by_params(0.1, least))

        def step(carry, _):
            w, state = carry
            update, state = tx.update(w - goal, state, w)
            return (w + update, state), None

        (w, _), _ = jax.lax.scan(step, (start, tx.init(start)), None, length=100)
        return jnp.sum((w - goal) ** 2) / jnp.sum((start - goal) ** 2)

    none, one = start, start * (np.arange(8) > 0)
    return judge(
        "A bound of steps by a tenth of each weight, and 10⁻⁷, does not keep a net "
        "from learning.",
        "A quadratic of eight weights, half a unit from its minimum, the step scaled "
        "until all of it fits: loss after 100 steps, over that before; with one weight "
        "of zero; and that with 10⁻² in place of 10⁻⁷.",
        [at_most(left(none, 1e-7), 0.01, label="no zero")],
        [at_most(left(one, 1e-7), 0.01, label="one zero"),
         at_most(left(one, 1e-2), 0.01, label="one zero, 10⁻²")],
        source=CLIPPY,
    )  # fmt: skip


CLAIMS = [exceptional, spike, gated, outlying, smoothest, unnormalized, zero_weight]
