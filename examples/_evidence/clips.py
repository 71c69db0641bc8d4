"""What a clip does to one gradient."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipfx
from examples._evidence.claims import (
    Row,
    at_least,
    at_most,
    clipped,
    judge,
    near,
    single,
)

TITLE = "What a clip does to one gradient"
NOTE = """\
Clipping by norm multiplies the gradient by min(1, c/‖g‖), clipping by value cuts every
entry at ±v. How far a clip by value turns the gradient depends on v more than on the
dimension: cut far below its entries it leaves their signs, cut above most of them
nearly everything. Hard clipping has a kink at the threshold and no jump. A threshold is
in units of the gradient: a sum of losses needs another than their mean."""

PASCANU = "[Pascanu et al., 2013](https://arxiv.org/abs/1211.5063)"
SPAMP = "[You and Liu, 2025](https://arxiv.org/abs/2510.01578)"


def norm_clip() -> Row:
    """A gradient of norm 113.13, from a small recurrent net, at a threshold of 10."""
    rng = np.random.default_rng(0)
    g = {"w": rng.normal(size=(4, 4)), "u": rng.normal(size=4)}
    size = math.hypot(*(np.linalg.norm(x) for x in g.values()))
    g = {k: jnp.asarray(113.13 / size * x, jnp.float32) for k, x in g.items()}
    _, effect = clipped(clipfx.clip_by_global_norm(10.0), g)
    return judge(
        "Clipping by norm shortens a gradient to the threshold and keeps its "
        "direction.",
        "Norm 113.13, c = 10: factor, and cosine before and after.",
        [near(effect.ratio, 10 / 113.13, label="factor"),
         near(effect.cosine, 1.0, 1e-5, label="cosine")],
        source=PASCANU,
    )  # fmt: skip


def value_turns() -> Row:
    """Two entries, of which one is cut."""
    g = jnp.array([10.0, 0.1])
    new, effect = clipped(clipfx.clip_by_value(1.0), g)
    angle = math.degrees(math.acos(float(effect.cosine[0])))
    return judge(
        "Clipping by value changes how entries compare, and with it the direction.",
        "(10, 0.1) at v = 1: ratio of the entries, 100 before; angle turned, in "
        "degrees.",
        [near(new[0] / new[1], 10.0, label="ratio"),
         near(angle, 5.14, 0.01, label="angle")],
    )  # fmt: skip


DIMENSIONS = (10, 100, 1000, 10_000, 100_000)
KINDS = {
    "by norm": lambda size: clipfx.clip_by_norm(0.01, groups="leaf"),
    "by value, v = 3σ": lambda size: clipfx.clip_by_value(3.0),
    "by value, v = σ": lambda size: clipfx.clip_by_value(1.0),
    "by value, to norm 0.01": lambda size: clipfx.clip_by_value(0.01 / math.sqrt(size)),
}


@functools.cache
def turning(kind: str, size: int, heavy: bool = False) -> list[float]:
    """Cosines between random gradients, of three seeds, and what a clip makes of them.

    Args:
      kind: One of `KINDS`.
      size: The number of entries.
      heavy: Whether they are of a Cauchy distribution, not of a normal one.
    """
    rows = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        rows.append((rng.standard_cauchy if heavy else rng.standard_normal)(size))
    rows = {str(k): jnp.asarray(row, jnp.float32) for k, row in enumerate(rows)}
    return clipped(KINDS[kind](size), rows, "leaf").effect.cosine.tolist()


def dimension() -> Row:
    """Cosines in few and in many dimensions."""
    low = "by value, to norm 0.01"
    return judge(
        "In many dimensions clipping by norm keeps the direction, clipping by value "
        "turns it far.",
        "100,000 normal entries; cosine for a clip by norm, one by value to the same "
        "norm, and one by value at three deviations.",
        [near(turning("by norm", 100_000), 1.0, 1e-5, label="norm"),
         at_most(turning(low, 100_000), 0.9, label="value")],
        [at_most(turning("by value, v = 3σ", 100_000), 0.9, label="value, 3σ")],
    )  # fmt: skip


def tails() -> Row:
    """Entries without a variance: here the clip by value turns more with dimension."""
    few, many = (turning("by value, v = σ", d, heavy=True) for d in (10, 100_000))
    return judge(
        "The more dimensions, the more clipping by value turns the gradient.",
        "Entries of a Cauchy distribution, v = 1; cosine in 10 and in 100,000 "
        "dimensions, and how much less it is for normal entries.",
        [at_least(np.mean(few) - np.mean(many), 0.1, label="less, Cauchy")],
        [at_least(
            np.mean(turning("by value, v = σ", 10))
            - np.mean(turning("by value, v = σ", 100_000)), 0.1, label="less, normal"
        )],
    )  # fmt: skip


def norms() -> Row:
    """Many small entries."""
    g = jnp.full(100, 0.1)
    by = lambda ord: clipfx.clip_by_global_norm(0.2, ord=ord)
    factor = lambda ord: clipped(by(ord), g).effect.ratio
    return judge(
        "The 2-norm adds up many small entries, the ∞-norm sees only the largest.",
        "100 entries of 0.1 at c = 0.2: factor by either norm.",
        [near(factor(2), 0.2, label="2-norm"), near(factor(math.inf), 1.0, label="∞")],
    )


def apart() -> Row:
    """Pairs of gradients, before and after."""
    first, every = np.eye(50)[0], np.ones(50)
    ways = np.stack([*np.random.default_rng(0).normal(size=(200, 50)), first, every,
                     every - first])  # fmt: skip
    pairs = [[at + 0 * ways, at + 1e-3 * ways] for at in (first, every)]
    pairs = single(np.concatenate(pairs, axis=1))

    def widest(tx):
        """Distances after over those before, the largest."""
        cut = jax.vmap(jax.vmap(lambda g: tx.update(g, tx.init(g))[0]))
        apart = lambda x: np.linalg.norm(x[0] - x[1], axis=-1)
        return (apart(np.asarray(jax.jit(cut)(pairs))) / apart(pairs)).max()

    by = lambda ord: widest(clipfx.clip_by_global_norm(1.0, ord=ord))
    return judge(
        "Clipping moves no two gradients further apart.",
        "Pairs near (1, …, 1) and (1, 0, …, 0) in 50 dimensions, c = 1: largest "
        "distance after over that before, clipped by norm and by value; and if it is "
        "the 1-norm or the ∞-norm that is kept to c.",
        [at_most(by(2), 1.001, label="norm"),
         at_most(widest(clipfx.clip_by_value(1.0)), 1.001, label="value")],
        [at_most(by(1), 1.001, label="1-norm"),
         at_most(by(math.inf), 1.001, label="∞-norm")],
    )  # fmt: skip


def cost() -> Row:
    """What the norm costs, beside the gradient that it is of."""
    rng = np.random.default_rng(0)
    w = single(rng.normal(size=(64, 64)))
    clip = clipfx.clip_by_global_norm(1.0)

    def share(batch):
        """Operations of clip and gradient over those of the gradient, less 1."""
        loss = lambda w, x: jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w) ** 2)
        plain = jax.grad(loss)
        with_clip = lambda w, x: clip.update(plain(w, x), clip.init(w))[0]
        x = jax.ShapeDtypeStruct((batch, 64), jnp.float32)

        def count(fun):
            cost: Any = jax.jit(fun).lower(w, x).compile().cost_analysis()
            return cost["flops"]

        return count(with_clip) / count(plain) - 1

    return judge(
        "Beside its gradient a clip costs next to nothing.",
        "Two layers of 64 units, operations as compiled: those of a clip by norm over "
        "those of the gradient, for batches of 128, and of one example.",
        [at_most(share(128), 0.01, label="128")],
        [at_most(share(1), 0.01, label="1")],
    )


def one_layer() -> Row:
    """One layer a thousand times as large."""
    g = {f"layer_{k}": {"w": jnp.full(100, 0.1)} for k in range(5)}
    g["layer_0"] = {"w": jnp.full(100, 100.0)}
    others = lambda tx: clipped(tx, g, "layer").effect.ratio[1]
    return judge(
        "One layer that explodes dominates the global norm, and all others are "
        "shortened with it; a clip by layer leaves them.",
        "Five layers of norm 1, one times 1,000, c = 1: factor of the others.",
        [at_most(others(clipfx.clip_by_global_norm(1.0)), 0.0011, label="global"),
         near(others(clipfx.clip_per_layer(1.0)), 1.0, 1e-5, label="by layer")],
    )  # fmt: skip


def lost_sizes() -> Row:
    """All layers above their thresholds."""
    g = {"first": {"w": jnp.full(4, 50.0)}, "last": {"w": jnp.full(4, 1.0)}}
    sizes = lambda tx: clipped(tx, g, "layer").effect.clipped
    layer, both = sizes(clipfx.clip_per_layer(1.0)), sizes(clipfx.clip_by_norm(1.0))
    return judge(
        "A clip by layer loses how the layers compare, a global one keeps it.",
        "Two layers of norm 100 and 2, c = 1: their ratio afterwards.",
        [near(layer[0] / layer[1], 1.0, label="by layer"),
         near(both[0] / both[1], 50.0, label="global")],
    )  # fmt: skip


def any_size() -> Row:
    """Gradients whose square is no number."""
    tx = optax.chain(clipfx.clip_by_global_norm(1.0), optax.sgd(0.1))
    step = lambda x: clipped(tx, jnp.full(4, x, jnp.float32)).effect.clipped
    return judge(
        "However large the gradient, a step of SGD is at most the learning rate η "
        "times c.",
        "Entries of 1e30, whose squares overflow, η = 0.1, c = 1; and infinite "
        "entries.",
        [at_most(step(1e30), 0.1, label="1e30")],
        [at_most(step(math.inf), 0.1, label="infinite")],
    )  # fmt: skip


def units() -> Row:
    """The same training, with the loss summed or averaged."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 128, 8)), rng.normal(size=(50, 128))
    w = np.zeros(8)
    grads = np.einsum("tbi,tb->tbi", x, np.einsum("tbi,i->tb", x, w) - y)
    rates = [
        float(np.mean(np.linalg.norm(reduce(grads, axis=1), axis=-1) > 1.0))
        for reduce in (np.mean, np.sum)
    ]
    return judge(
        "A threshold from 1 to 10 suits models in general.",
        "Linear regression, batches of 128, c = 1: share of steps clipped if the loss "
        "is summed, less that if it is averaged.",
        [at_most(rates[1] - rates[0], 0.1)],
    )


def jumps() -> Row:
    """The map at its threshold."""
    clip = lambda x: clipfx.tree_clip(x, 1.0)[0]
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(clip)))(
        jnp.array([1 - 1e-4, 1 + 1e-4])
    )
    return judge(
        "Hard clipping adds discontinuities to the step.",
        "One entry, c = 1, at 0.9999 and 1.0001: steepness between them, which at a "
        "jump has no bound, and how far the derivative falls.",
        [at_least((value[1] - value[0]) / 2e-4, 10.0, label="steepness"),
         at_least(slope[0] - slope[1], 0.9, label="derivative")],
    )  # fmt: skip


def smooth() -> Row:
    """Smooth responses to the norm, and powers of the entries."""
    rng = np.random.default_rng(0)
    g = jnp.asarray(10 * rng.normal(size=1000), jnp.float32)
    effect = lambda tx: clipped(tx, g).effect
    soft = effect(clipfx.smooth_norm(1.0, 1.0))
    return judge(
        "Smooth rules in place of a threshold bound the size and keep the direction.",
        "1,000 entries of deviation 10: g/(1 + ‖g‖), and a power of each entry, 0.7.",
        [at_most(soft.clipped, 1.0, label="size"),
         near(soft.cosine, 1.0, 1e-5, label="cosine")],
        [near(effect(clipfx.grad_power(0.7)).cosine, 1.0, 1e-3, label="power, cosine")],
        source=SPAMP,
    )  # fmt: skip


def powers() -> Row:
    """Powers of entries on either side of 1."""
    draw = np.random.default_rng(0).normal(size=1000)
    tx = clipfx.grad_power(0.7)
    ratio = lambda size: clipped(tx, single(size * draw)).effect.ratio
    return judge(
        "A power below 1 of each entry compresses gradients.",
        "1,000 entries of deviation 100, and of 10⁻⁴, to the power 0.7: norm after "
        "over before.",
        [at_most(ratio(100.0), 1.0, label="100")],
        [at_most(ratio(1e-4), 1.0, label="10⁻⁴")],
        source=SPAMP,
    )


CLAIMS = [norm_clip, value_turns, dimension, tails, norms, one_layer, lost_sizes,
          any_size, units, apart, jumps, smooth, powers, cost]  # fmt: skip
