"""What a single example can do to what is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipfx
from clipfx import per_example
from examples._evidence.claims import Row, at_least, at_most, judge, single

TITLE = "Influence and stability"
NOTE = """\
What training did with an example shows in the weights, not in its gradient: a net that
fits an outlier has no gradient left there. That one changed example moves the weights
by little follows from the length of the steps; the other usual argument, that no step
moves two nets apart, a clip takes away, since it shortens the far one's steps along
some directions and not along others."""

HARDT = "[Hardt et al., 2016](https://arxiv.org/abs/1509.01240)"
KOH = "[Koh and Liang, 2017](https://arxiv.org/abs/1703.04730)"


def leverage() -> Row:
    """Least squares, where leaving one example out is solved exactly."""
    slopes, moves = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = np.append(rng.normal(size=(64, 8)), np.zeros((64, 1)), 1)
        y = x[:, 0] + 0.1 * rng.normal(size=64)
        x[0, 8], y[0] = 1.0, 30.0  # the outlier, the only one with this feature
        fit = lambda rows, x=x, y=y: np.linalg.lstsq(x[rows], y[rows], rcond=None)[0]
        every = np.arange(64)
        w = fit(every)
        slopes.append(np.abs(x @ w - y) * np.linalg.norm(x, axis=1))
        moves.append([np.linalg.norm(fit(every != k) - w) for k in every])
    of_outlier = lambda rows: [row[0] / np.median(row[1:]) for row in rows]
    return judge(
        "How much an example moved the weights is in proportion to its gradient, which "
        "is large for an outlier.",
        "Least squares of 64 examples, one off by 30, with a feature that no other "
        "has: norm of its gradient at the solution, over the median of the others; and "
        "how far the solution moves without it, likewise, in proportion if less.",
        [at_least(of_outlier(slopes), 1.0, label="gradient"),
         at_most(of_outlier(moves), 1.0, label="moved")],
        source=KOH,
    )  # fmt: skip


def expands() -> Row:
    """A step of descent, as a map of the weights."""
    curvature = jnp.array([1.0, 100.0])

    @jax.jit
    def longest(max_norm, points):
        """The largest singular value of the map's Jacobian."""

        def step(w):
            return w - 0.019 * clipfx.tree_clip(curvature * w, max_norm)[0]

        stretch = lambda w: jnp.linalg.norm(jax.jacobian(step)(w), 2)
        return jax.vmap(stretch)(points).max()

    draw = np.random.default_rng(0).normal
    points = [single(draw(size=(2000, 2)) * size) for size in (0.01, 0.1, 1.0)]
    most = lambda max_norm: max(longest(single(max_norm), x) for x in points)
    return judge(
        "A clip makes training stable: no step moves two vectors of weights apart, if "
        "none does without it.",
        "w² + 100v² over 2, steps of 0.019, where descent moves none apart, 6,000 "
        "points: most by which a step moves close ones apart, without a clip and at "
        "c = 1.",
        [at_most(most(np.inf), 1.0, label="without"),
         at_most(most(1.0), 1.0, label="c = 1")],
        source=HARDT,
    )  # fmt: skip


def prerequisite() -> Row:
    """Losses whose gradients are bounded, and others."""
    size, width = 64, 8
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 2, width))
    x = single(x / np.linalg.norm(x, axis=-1, keepdims=True))
    y = single(rng.choice([-1.0, 1.0], size=(2000, 2)))
    w = single(rng.normal(size=(2000, width)) * 10.0 ** rng.uniform(-2, 4, (2000, 1)))

    def moved(loss):
        """How far replacing one example moves a mean, times the number of them."""
        grad = per_example.clipped_grad(loss, jnp.inf)

        def pair(w, x, y):
            one = lambda k: grad(w, (x[k : k + 1], y[k : k + 1]))[0]
            return jnp.linalg.norm(one(0) - one(1))

        return float(jax.jit(jax.vmap(pair))(w, x, y).max())

    squared = lambda w, e: (jnp.vdot(w, e[0]) - e[1]) ** 2 / 2
    logistic = lambda w, e: optax.losses.sigmoid_binary_cross_entropy(
        e[1] * jnp.vdot(w, e[0]), jnp.ones(())
    )
    return judge(
        "Privacy by noise takes a clip: without one nothing bounds what replacing an "
        "example does to the mean gradient.",
        f"2,000 pairs of examples with features of norm 1, weights of any size: most "
        f"that replacing one moves the mean of {size}, over 2/{size}; with the squared "
        "and the logistic loss.",
        [at_least(moved(squared) / 2, 100.0, label="squared")],
        [at_least(moved(logistic) / 2, 100.0, label="logistic")],
    )


CLAIMS = [leverage, expands, prerequisite]
