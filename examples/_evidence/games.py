"""Two players, as in generative adversarial networks (GANs)."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipfx
from examples._evidence.claims import Row, at_least, at_most, judge, near

TITLE = "Two players: adversarial training"
NOTE = """\
In the game min over x, max over y of xy both players circle the solution, and each step
leads a little outward. A clip makes those steps small, but they still lead outward: the
orbit grows with the root of time in place of exponentially. A limit cycle needs
something that pulls inward, such as a little damping, and then its radius is known.
A discriminator that is sure sends back next to nothing with the loss of the game, and a
bounded slope with the usual one; what can be steep is the discriminator itself."""

GOODFELLOW = "[Goodfellow et al., 2014](https://arxiv.org/abs/1406.2661)"
RATE = 0.2


def easy_fakes() -> Row:
    """What comes back through a discriminator that is sure of a fake."""
    losses = {
        "log(1 − D)": lambda score: -jax.nn.softplus(score),
        "−log D": lambda score: jax.nn.softplus(-score),
    }
    slope = lambda loss, score: abs(float(jax.grad(loss)(score)))
    return judge(
        "A discriminator that tells fakes with ease sends the generator massive "
        "gradients.",
        "D = 1/(1 + exp(−s)): slope of the generator's loss where s = −20, over that "
        "where s = 0; with either loss.",
        [at_least(slope(loss, -20.0) / slope(loss, 0.0), 10.0, label=name)
         for name, loss in losses.items()],
        source=GOODFELLOW,
    )  # fmt: skip


@functools.cache
def radii(max_norm: float, damping: float, steps: int = 4000) -> np.ndarray:
    """Distances from the solution of min_x max_y xy + damping (x² − y²)/2.

    Both players step at once, from (1, 0); the gradient of either is clipped with that
    of the other.
    """

    @jax.jit
    def run():
        tx = optax.chain(clipfx.clip_by_global_norm(max_norm), optax.sgd(RATE))

        def step(carry, _):
            z, state = carry
            x, y = z
            grads = jnp.array([y + damping * x, -x + damping * y])
            update, state = tx.update(grads, state)
            return (z + update, state), jnp.linalg.norm(z)

        start = jnp.array([1.0, 0.0])
        return jax.lax.scan(step, (start, tx.init(start)), None, length=steps)[1]

    return np.asarray(run())


def spiral() -> Row:
    """The game without damping."""
    free, clipped = radii(math.inf, 0.0), radii(0.5, 0.0)
    return judge(
        "In a game whose players spiral outward a clip turns the spiral into a limit "
        "cycle.",
        f"min max xy, steps of {RATE} at once, c = ½: growth of the distance from step "
        "1,000 to 4,000 without a clip, and with it.",
        [at_least(free[-1] / free[1000], 1e6, label="without"),
         near(clipped[-1] / clipped[1000], 1.0, 0.05, label="with")],
    )  # fmt: skip


def damped() -> Row:
    """The same with damping too weak for the step."""
    damping, c = 0.025, 0.5
    free, clipped = radii(math.inf, damping), radii(c, damping)
    # There the damping undoes what a step of length RATE * c leads outward.
    radius = RATE * c * math.hypot(1, damping) / (2 * damping)
    return judge(
        "If the game is damped, but too little for the learning rate η, the clip does "
        "turn the spiral into a cycle.",
        "The same with damping δ = 0.025: growth without a clip; radius with it, "
        "expected ηc√(1 + δ²)/2δ.",
        [at_least(free[-1] / free[1000], 1e6, label="without"),
         near(clipped[-1], radius, 0.02, label="radius")],
    )  # fmt: skip


class Rings(NamedTuple):
    """What became of GANs, by threshold and seed.

    Attributes:
      modes: For each of `CASES` `[seeds]`: of eight, those that at least 2% of the
        samples are near.
      sway: The same: how far the mean sample moves in 50 steps, late on.
    """

    modes: dict[str, np.ndarray]
    sway: dict[str, np.ndarray]


# Threshold of the generator's gradient, and the learning rate of both.
CASES = {
    "none": (math.inf, 0.1), "none, rate 0.02": (math.inf, 0.02), "c = 1": (1.0, 0.1),
    "c = 0.1": (0.1, 0.1), "c = 0.01": (0.01, 0.1),
}  # fmt: skip
_ANGLES = np.arange(8) * (2 * math.pi / 8)
CENTRES = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1).astype(np.float32)


@functools.cache
def rings(steps: int = 2000, seeds: int = 3) -> Rings:
    """Trains GANs on eight points on a circle, the generator's gradient clipped."""
    width, batch, every = 32, 128, 50

    def init(key, sizes):
        keys = jax.random.split(key, len(sizes) - 1)
        shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
        return [(jax.random.normal(k, (a, b)) * math.sqrt(2 / a), jnp.zeros(b))
                for k, a, b in shapes]  # fmt: skip

    def net(layers, x):
        for w, b in layers[:-1]:
            x = jax.nn.relu(x @ w + b[None])
        w, b = layers[-1]
        return x @ w + b[None]

    def real(key):
        pick, noise = jax.random.split(key)
        centres = jnp.asarray(CENTRES)[jax.random.randint(pick, (batch,), 0, 8)]
        return centres + 0.05 * jax.random.normal(noise, (batch, 2))

    def run(max_norm, rate, key):
        critic = optax.sgd(rate)
        painter = optax.chain(clipfx.clip_by_global_norm(max_norm), optax.sgd(rate))
        start, key, eye = jax.random.split(key, 3)
        g, d = init(start, (4, width, width, 2)), init(key, (2, width, width, 1))
        eye = jax.random.normal(eye, (1000, 4))  # the same noise at every check

        def step(carry, key):
            g, d, state = carry
            first, second = jax.random.split(key)
            z = jax.random.normal(first, (batch, 4))

            def judged(d):
                right = jax.nn.softplus(-net(d, real(second))).mean()
                return right + jax.nn.softplus(net(d, net(g, z))).mean()

            fooled = lambda g: jax.nn.softplus(-net(d, net(g, z))).mean()
            by_g, by_d = jax.grad(fooled)(g), jax.grad(judged)(d)
            up, state = painter.update(by_g, state)
            down, _ = critic.update(by_d, critic.init(d))
            return (
                optax.apply_updates(g, up),
                optax.apply_updates(d, down),
                state,
            ), None

        def part(carry, key):
            carry, _ = jax.lax.scan(step, carry, jax.random.split(key, every))
            return carry, net(carry[0], eye)

        keys = jax.random.split(key, steps // every)
        return jax.lax.scan(part, (g, d, painter.init(g)), keys)[1]

    keys = jax.random.split(jax.random.key(0), seeds)
    each = jax.vmap(jax.vmap(run, (None, None, 0)), (0, 0, None))
    seen = jax.jit(each)(*map(jnp.array, zip(*CASES.values(), strict=True)), keys)
    seen = np.asarray(seen)[:, :, -20:]
    near_by = np.linalg.norm(seen[:, :, -1, :, None] - CENTRES, axis=-1) < 0.25
    modes = (near_by.mean(2) >= 0.02).sum(-1)
    sway = np.linalg.norm(np.diff(seen.mean(3), axis=2), axis=-1).mean(2)
    return Rings(
        dict(zip(CASES, modes, strict=True)), dict(zip(CASES, sway, strict=True))
    )


def gan() -> Row:
    """Oscillation against coverage."""
    modes, sway = rings()
    return judge(
        "Clipping the generator's gradient damps the oscillation of a GAN; clipped too "
        "tightly it covers fewer modes of the data.",
        "GAN on eight points of a circle, 2,000 steps at rate 0.1: sway of the mean "
        "sample at c = 1 over that without; modes covered at c = 0.1 less those at c "
        "= 1; sway over that without at rate 0.02; modes less those without.",
        [at_most(sway["c = 1"] / sway["none"], 1.0, label="sway"),
         at_most(modes["c = 0.1"] - modes["c = 1"], -1.0, label="modes, 0.1 to 1")],
        [at_most(sway["c = 1"] / sway["none, rate 0.02"], 1.0, label="sway, low rate"),
         at_most(modes["c = 0.1"] - modes["none"], -1.0, label="modes, 0.1 to none")],
    )  # fmt: skip


CLAIMS = [easy_fakes, spiral, damped, gan]
