"""Clips beside Adam, weight decay and warm-up."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipfx
from clipfx import diagnose
from examples._evidence.claims import (
    Row,
    at_least,
    at_most,
    clipped,
    judge,
    near,
    single,
)

TITLE = "Beside optimizers"
NOTE = """\
Adam divides by the root of the mean square of gradients, its second moment: a clip in
front of it protects that moment from spikes, and bounds no step. To bound Adam's
step, clip behind it. Under SGD a threshold and a learning rate are the same knob as
long as every step is clipped, and only then."""


def adam_moment() -> Row:
    """A spike, with and without a clip, in Adam's second moment."""
    adam = optax.scale_by_adam(b2=0.99)
    usual, spike = jnp.ones(4), jnp.full(4, 100.0)
    state: Any = adam.init(usual)
    state = state._replace(count=jnp.int32(1000), nu=jnp.ones(4))  # after many such
    cut, _ = clipped(clipfx.clip_by_global_norm(2.0), spike)
    lag = diagnose.second_moment_lag(spike, cut, state, b2=0.99)
    return judge(
        "A clip keeps a spike out of Adam's second moment, so that the steps that "
        "follow stay long.",
        "Entries of 1, then 100, β₂ = 0.99: root of the moment after the spike, raw "
        "and clipped to the usual norm, of 1 before.",
        [near(lag.raw_moment, math.sqrt(0.99 + 100), label="raw"),
         near(lag.clipped_moment, 1.0, label="clipped")],
    )  # fmt: skip


def _steps(tx: optax.GradientTransformation, grads: Any) -> Any:
    """What an optimizer makes of one gradient after the other."""
    step = lambda state, g: tx.update(g, state)[::-1]
    return jax.lax.scan(step, tx.init(grads[0]), grads)[1]


def adam_cap() -> Row:
    """Adam's steps for gradients of any length."""
    rng = np.random.default_rng(0)
    grads = single(rng.normal(size=(20, 16)))

    def path(max_norm):
        clip = clipfx.clip_by_global_norm(max_norm)
        return _steps(optax.chain(clip, optax.adam(0.1, eps=1e-30)), grads)

    large, small = map(np.asarray, jax.vmap(path)(single([1.0, 1e-3])))
    return judge(
        "A clip in front of Adam caps the length of its step.",
        "20 random gradients of norm 4, learning rate 0.1: longest step, in units of "
        "the learning rate times c = 0.001; how far it differs from that at c = 1.",
        [at_most(np.linalg.norm(small, axis=1).max() / 1e-4, 1.0, label="longest"),
         at_least(np.abs(small - large).max(), 1e-3, label="difference")],
    )  # fmt: skip


def adam_steps() -> Row:
    """Gradients that are always large, and gradients that hardly ever agree."""

    @jax.jit
    def last(grads):
        """The length of the mean of the last 400 of 500 steps."""
        return jnp.abs(_steps(optax.adam(1.0), grads)[100:].mean())

    one = np.ones(500, np.float32)
    noisy = [1 + 10 * np.random.default_rng(k).normal(size=500) for k in range(5)]
    return judge(
        "Adam takes shorter steps for parameters whose gradients are large, or noisy.",
        "500 gradients of 1, of 1,000, and of 1 with noise of deviation 10: mean of "
        "the last 400 steps, over that of the first.",
        [at_most(last(1000 * one) / last(one), 0.5, label="1,000"),
         at_most([last(single(g)) / last(one) for g in noisy], 0.5, label="noise")],
    )  # fmt: skip


def kept_direction() -> Row:
    """The update of a spike, behind momentum and behind Adam."""
    grads = np.random.default_rng(0).normal(size=(20, 16))
    grads[-1] *= 100

    def cosine(optimizer):
        def update(max_norm):
            tx = optax.chain(clipfx.clip_by_global_norm(max_norm), optimizer)
            return _steps(tx, single(grads))[-1]

        free, clipped = jax.vmap(update)(single([math.inf, 4.0]))
        return optax.losses.cosine_similarity(free, clipped)

    return judge(
        "A clip of the gradient's norm keeps the direction of the step.",
        "20 random gradients, the last 100 times as long, c = 4: cosine between the "
        "last step with a clip and without; SGD, with momentum 0.9, and Adam.",
        [near(cosine(optax.sgd(0.1)), 1.0, label="SGD")],
        [near(cosine(optax.sgd(0.1, 0.9)), 1.0, label="momentum"),
         near(cosine(optax.adam(0.1)), 1.0, label="Adam")],
    )  # fmt: skip


def decay_cancels() -> Row:
    """The two thresholds of `weight_decay_balance`, and when there is none."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=20), jnp.float32)
    rate, decay = 0.1, 0.05
    outward = -w + 0.5 * jnp.asarray(
        rng.normal(size=20), jnp.float32
    )  # a step is minus
    balance = lambda g: clipfx.weight_decay_balance(
        g, w, weight_decay=decay, learning_rate=rate
    )

    def moved(threshold):
        g, _ = clipped(clipfx.clip_by_global_norm(threshold), outward)
        new = (1 - rate * decay) * w - rate * g
        along = jnp.vdot(new - w, w) / jnp.vdot(w, w)
        return along, clipfx.global_norm(new) / clipfx.global_norm(w) - 1

    found = balance(outward)
    along, _ = moved(found.radial[0])
    _, length = moved(found.exact[0])
    inward = balance(-outward).radial
    return judge(
        "There is a threshold at which a clipped step cancels decoupled weight decay.",
        "Step of SGD away from the origin: change along w, and of ‖w‖, relative, at "
        "the threshold of each; and the threshold for a step towards the origin.",
        [near(along, 0.0, 1e-6, label="along w"), near(length, 0.0, 1e-6, label="‖w‖")],
        [at_most(inward, 1e6, label="inward")],
        source="[Kosson et al., 2024](https://arxiv.org/abs/2305.17212)",
    )


def penalty() -> Row:
    """λ‖w‖²/2 in the loss, and what becomes of it on the way."""
    w, g = single([1.0, 0.0]), single([0.0, 100.0])  # the data pull elsewhere

    def shrinkage(optimizer):
        """By how much the first weight shrinks in a step, over ηλ."""
        tx = optax.chain(optax.add_decayed_weights(0.1), optimizer)
        update: Any = tx.update(g, tx.init(w), w)[0]
        return -update[0] / 0.01

    clip = optax.chain(clipfx.clip_by_global_norm(1.0), optax.sgd(0.1))
    return judge(
        "A penalty λ‖w‖²/2 is weight decay: it shrinks the weights by 1 − ηλ a step.",
        "η = λ = 0.1, a gradient of norm 100 across the weights: by how much these "
        "shrink over ηλ; SGD, behind a clip at 1, and Adam.",
        [near(shrinkage(optax.sgd(0.1)), 1.0, label="SGD")],
        [near(shrinkage(clip), 1.0, label="clip"),
         near(shrinkage(optax.adam(0.1)), 1.0, label="Adam")],
    )  # fmt: skip


def decay_radius() -> Row:
    """Weight decay alone, and against data that need growth."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(8, 8))
    w = single((w + w.T) * (1.5 / np.abs(np.linalg.eigvalsh(w + w.T)).max()))
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1))
    target = single(1.2)  # the sequence that a scalar RNN is to follow grows so

    def train(grad, start):
        def step(carry, _):
            w, state = carry
            update, state = tx.update(grad(w), state, w)
            return (w + update, state), None

        return jax.lax.scan(step, (start, tx.init(start)), None, length=100)[0][0]

    alone = jax.jit(lambda w: train(jnp.zeros_like, w))(w)
    powers = jnp.arange(1, 6, dtype=jnp.float32)
    loss = lambda w: jnp.sum((w**powers - target**powers) ** 2) / 200
    against = jax.jit(lambda w: train(jax.grad(loss), w))(target)
    radius = float(np.abs(np.linalg.eigvalsh(np.asarray(alone, np.float64))).max())
    return judge(
        "Weight decay shrinks the spectral radius of a symmetric recurrent matrix by "
        "1 − ηλ a step, from above 1 to below.",
        "ηλ = 0.01, 100 steps from radius 1.5, without gradients; and where data grow "
        "by 1.2 a step, from 1.2.",
        [near(radius, 1.5 * 0.99**100, label="alone")],
        [at_most(against, 1.0, label="with data")],
    )


def warm_up() -> Row:
    """A ramp of the learning rate, and the same ramp of the threshold."""
    rng = np.random.default_rng(0)
    curvature = single(rng.uniform(1, 2, size=8))
    ramp = optax.linear_schedule(0.0, 1.0, 20)

    @jax.jit
    def gap(scale, size, is_adam):
        def path(rate, threshold):
            front = clipfx.clip_by_global_norm(threshold)
            sgd: Any = optax.identity()
            adam: Any = optax.scale_by_adam()

            def step(carry, k):
                x, state, count = carry
                g, front_state = front.update(size * curvature * x, state[0])
                plain, _ = sgd.update(g, state[1])
                adapted, adam_state = adam.update(g, state[2])
                u = jnp.where(is_adam, adapted, plain)
                x = x - 0.01 * rate(count) * u
                return (x, (front_state, state[1], adam_state), count + 1), x

            x = jnp.ones(8)
            start = (x, (front.init(x), sgd.init(x), adam.init(x)), jnp.int32(0))
            return jax.lax.scan(step, start, None, length=40)[1]

        c = lambda count: scale * ramp(count)
        by_rate = path(ramp, scale)
        by_threshold = path(lambda count: jnp.float32(1), c)
        return jnp.max(jnp.abs(by_rate - by_threshold)) / jnp.max(jnp.abs(1 - by_rate))

    f = lambda scale, size, adam: gap(single(scale), single(size), adam)
    return judge(
        "A warm-up of the learning rate and a clip are one schedule: a ramp of the "
        "threshold does the same.",
        "A quadratic, ramp over 20 of 40 steps; largest gap of the two paths over the "
        "way gone: SGD with every step clipped, with few clipped, Adam.",
        [at_most(f(1, 100, False), 1e-4, label="SGD")],
        [at_most(f(1, 0.05, False), 1e-4, label="few clipped"),
         at_most(f(1, 100, True), 1e-4, label="Adam")],
    )  # fmt: skip


def _path(gradient: Any, start: float, rule: Any, steps: int) -> jax.Array:
    """Where descent of a number goes."""
    state = rule.init(jnp.zeros(()))

    def step(carry, _):
        x, state = carry
        update, state = rule.update(gradient(x), state)
        return (x + update, state), x

    return jax.lax.scan(step, (jnp.float32(start), state), None, length=steps)[1]


def steep_walls() -> Row:
    """Steps to the minimum of cosh, at the best of many rates."""
    rates = single(10.0 ** np.arange(-5, 0.01, 0.05))

    def fewest(max_norm, start):
        clip = clipfx.clip_by_global_norm(max_norm)
        way = lambda rate: _path(
            jnp.sinh, start, optax.chain(clip, optax.sgd(rate)), 20_000
        )
        there = np.abs(np.asarray(jax.jit(jax.vmap(way))(rates))) < 0.01
        return there.argmax(1)[there.any(1)].min()

    free, clip = ([fewest(c, start) for start in (4.0, 8.0)] for c in (math.inf, 1.0))
    return judge(
        "Where curvature grows with the gradient, descent takes as many steps as its "
        "start is steep; with a clip, as many as it is far.",
        "cosh(x), c = 1, each at the best of 101 rates: steps to the minimum from "
        "x = 8, e⁴ times as steep, over those from 4.",
        [at_least(free[1] / free[0], math.exp(4) / 2, label="without"),
         at_most(clip[1] / clip[0], 3.0, label="with")],
        source="[Zhang et al., 2020](https://arxiv.org/abs/1905.11881)",
    )  # fmt: skip


def heavy_ball() -> Row:
    """Momentum on a parabola, at a rate beyond 2 (1 + beta)."""
    rate, decay = 4.0, 0.5

    def last(max_norm):
        clip = clipfx.clip_by_global_norm(max_norm)
        rule = optax.chain(clip, optax.sgd(rate, decay))
        return np.asarray(_path(lambda x: x, 0.5, rule, 60)[-2:], np.float64)

    cycle = abs(np.diff(last(1.0))[0]) / 2
    return judge(
        "A clip in front of momentum keeps rates from diverging that are too large.",
        "x²/2, η = 4 where 2(1 + β) = 3 is the limit, c = 1: distance after 60 steps "
        "without a clip; half the way of a step with it, that of a cycle of two steps, "
        "ηc / (2(1 + β)); and whether it settles.",
        [at_least(abs(last(math.inf)[1]), 1e6, label="without"),
         near(cycle, rate / (2 * (1 + decay)), label="with")],
        [at_most(cycle, 0.01, label="settles")],
    )  # fmt: skip


CLAIMS = [
    adam_moment, adam_cap, adam_steps, kept_direction, decay_cancels, penalty,
    decay_radius, warm_up, steep_walls, heavy_ball,
]  # fmt: skip
