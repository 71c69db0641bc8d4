"""Why gradients explode or vanish."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import clipfx
from clipfx import diagnose
from examples._evidence.claims import Row, at_least, at_most, judge, near, single

TITLE = "Why gradients explode"
NOTE = """\
The gradient at an early step is a product of Jacobians, one for each later step. What
decides is the product: the singular values of its factors bound it, but do not tell it.
`diagnose.recurrent_flow` measures the product itself."""

PASCANU = "[Pascanu et al., 2013](https://arxiv.org/abs/1211.5063)"
MIKHAEIL = "[Mikhaeil et al., 2022](https://arxiv.org/abs/2110.07238)"
HE = "[He et al., 2015](https://arxiv.org/abs/1502.01852)"


STEPS = 100


@jax.jit
def _flow(matrix, end):
    """Gradients of <end, h> of the last of `STEPS` states of h <- A h, by each."""
    return diagnose.recurrent_flow(
        lambda h, _: matrix @ h, lambda h: h[-1] @ end, end, jnp.zeros(STEPS)
    )


def _linear(matrix, end=(1.0, 1.0)):
    return _flow(jnp.asarray(matrix, jnp.float32), jnp.asarray(end, jnp.float32))


def depth() -> Row:
    """L layers that multiply by a number."""
    grown = {a: _linear(a * np.eye(2)).norm for a in (1.2, -1.2, 0.5)}
    ratio = {a: float(norm[-51] / norm[-1]) for a, norm in grown.items()}
    return judge(
        "In a deep linear net of weight α the gradient changes by |α|^L over L layers.",
        "50 layers αI of width 2; gradient at the input over that at the output.",
        [near(ratio[a], abs(a) ** 50, label=f"α = {a}") for a in ratio],
        source=PASCANU,
    )


def recurrence() -> Row:
    """The same through time."""
    norms = {w: float(_linear(w * np.eye(2), (1, 0)).norm[0]) for w in (1.1, 0.9)}
    return judge(
        "Back through T steps of a scalar RNN of weight w the gradient is w^(T−1).",
        "T = 100; gradient of the last state by the first.",
        [near(norms[w], w**99, label=f"w = {w}") for w in norms],
        source=PASCANU,
    )


def chaos() -> Row:
    """The logistic map, whose Lyapunov exponent is known."""
    step = lambda h, _: 4 * h * (1 - h)
    growth = jax.jit(
        lambda start: (
            diagnose.recurrent_flow(
                step, lambda h: h[-1], start, jnp.zeros(STEPS)
            ).growth
        )
    )
    starts = np.random.default_rng(0).uniform(0.1, 0.9, 5).astype(np.float32)
    return judge(
        "In a chaotic recurrence gradients grow at the rate of its Lyapunov exponent, "
        "that at which neighbouring states part.",
        "Logistic map h ← 4h(1−h), 100 steps; log growth a step, expected log 2.",
        [near([growth(start) for start in starts], math.log(2), 0.1)],
        source=MIKHAEIL,
    )


def singular_values() -> Row:
    """Large singular values whose product vanishes."""
    shear = np.array([[0.5, 5.0], [0.0, 0.5]])
    norm = _linear(shear).norm
    return judge(
        "Gradients explode where the largest singular values of the Jacobians exceed 1 "
        "in their geometric mean.",
        "99 steps with the matrix (0.5, 5; 0, 0.5), whose largest singular value is "
        f"{np.linalg.norm(shear, 2):.1f}; growth of the gradient over all.",
        [at_least(float(norm[0] / norm[-1]), 1.0)],
    )


@jax.jit
def _tanh(w, xs, end):
    """States of a recurrence from 0, and the size of the gradients of <end, h_T>."""
    step = lambda h, x: jnp.tanh(w @ h + x)
    start = jnp.zeros(len(w))
    flow = diagnose.recurrent_flow(step, lambda h: h[-1] @ end, start, xs)
    _, states = jax.lax.scan(lambda h, x: (step(h, x),) * 2, start, xs)
    return states, flow.norm


def _networks(number):
    """Weights of spectral norm 1, inputs and the end of recurrences of 8 units."""
    for seed in range(number):
        rng = np.random.default_rng(seed)
        w, xs, end = (rng.normal(size=s) for s in ((8, 8), (50, 8), (8,)))
        yield tuple(map(single, (w / np.linalg.norm(w, 2), xs, end)))


def contraction() -> Row:
    """No singular value above 1: the direction that does hold."""
    norms = [np.asarray(_tanh(*network)[1]) for network in _networks(5)]
    return judge(
        "Gradients cannot explode if no singular value of any Jacobian exceeds 1.",
        "RNN of 8 tanh units, W of spectral norm 1, 50 steps; largest growth.",
        [at_most([norm.max() / norm[-1] for norm in norms], 1.0)],
        source=PASCANU,
    )


def conditioning() -> Row:
    """The condition number to the power of the steps."""
    matrix = np.diag([1.5, 0.5])
    first, second = (_linear(matrix, end).norm[-21] for end in ([1, 0], [0, 1]))
    return judge(
        "An ill-conditioned Jacobian amplifies gradients by their direction.",
        "20 steps with diag(1.5, 0.5); ratio of the growth of two directions.",
        [near(float(first / second), 3.0**20)],
    )


def sensitive() -> Row:
    """The same of gradients that nobody chose."""

    @jax.jit
    def growth(factors, start):
        back, _ = jax.lax.scan(lambda g, _: (factors * g, None), start, length=20)
        return jnp.linalg.norm(back, axis=-1) / jnp.linalg.norm(start, axis=-1)

    spreads = []
    for seed in range(3):
        start = single(np.random.default_rng(seed).normal(size=(1000, 16)))
        found = growth(np.linspace(0.5, 1.5, 16, dtype=np.float32), start)
        low, high = np.quantile(found, [0.05, 0.95])
        spreads.append(high / low)
    return judge(
        "If Jacobians are ill-conditioned, how far a gradient grows depends on the "
        "data to the extreme.",
        "20 steps with a diagonal matrix from 0.5 to 1.5, whose condition number is "
        "3.5e9 over all, 1,000 random gradients of 16 entries: 95th percentile of the "
        "growth over the 5th.",
        [at_least(spreads, 1000.0)],
    )


def early_layers() -> Row:
    """By the parameters of the first layer, over those of the last."""

    def slopes(layer, weights, x, end):
        def loss(params):
            step = lambda h, p: (layer(p[0] @ h + p[1]), None)
            return jax.lax.scan(step, x, params)[0] @ end

        w, b = jax.grad(loss)((weights, jnp.zeros(weights.shape[:2])))
        length = lambda g: jnp.linalg.norm(g.reshape(len(g), -1), axis=1)
        return length(w), length(b)

    linear, deep = (
        jax.jit(lambda w, x, end, layer=layer: slopes(layer, w, x, end))
        for layer in (lambda h: h, jax.nn.relu)
    )
    same, _ = linear(jnp.stack([1.2 * jnp.eye(2)] * 50), jnp.ones(2), jnp.ones(2))
    twice = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        weights = 2 * rng.normal(size=(30, 256, 256), scale=math.sqrt(2 / 256))
        x, end = rng.normal(size=(2, 256))
        twice.append(deep(*map(single, (weights, x, end))))
    first = lambda g: g[0] / g[-1]
    return judge(
        "Where gradients explode, those by the parameters of early layers are the "
        "largest.",
        "First layer over last: the weights of 50 layers 1.2·I; of 30 ReLU layers of "
        "width 256, twice √(2/n), the weights, and the biases.",
        [at_least(first(same), 10.0, label="1.2·I, weights"),
         at_least([first(w) for w, _ in twice], 10.0, label="ReLU, weights"),
         at_least([first(b) for _, b in twice], 10.0, label="ReLU, biases")],
    )  # fmt: skip


def costate() -> Row:
    """The adjoint recursion by hand, against automatic differentiation."""
    gaps = []
    for w, xs, end in _networks(3):
        states, norms = map(np.asarray, _tanh(2 * w, xs, end))
        costate, by_hand = end, []
        for h in states[::-1]:
            by_hand.append(np.linalg.norm(costate))
            costate = 2 * w.T @ ((1 - h**2) * costate)
        gaps.append(np.max(np.abs(by_hand[::-1] / norms - 1)))
    return judge(
        "Back-propagation is the backward recursion of optimal control for the "
        "costate, the multiplier of the dynamics.",
        "λ ← Jᵀλ by hand against automatic differentiation, 50 tanh steps; relative "
        "gap.",
        [at_most(gaps, 1e-3)],
    )


def euler() -> Row:
    """A stable differential equation, and steps that are too long for it."""
    field = np.array([[-1.0, -3.0], [3.0, -1.0]])  # eigenvalues -1 +- 3i
    growth = {h: _linear(np.eye(2) + h * field).growth for h in (0.1, 0.3)}
    want = {h: math.log(abs(1 + h * (-1 + 3j))) for h in growth}
    return judge(
        "As Euler steps of a stable equation diverge if they are too long, gradients "
        "of an RNN of that form explode.",
        "x′ = Ax with eigenvalues −1 ± 3i, stable up to h = 0.2; log growth a step.",
        [near(float(growth[h]), want[h], label=f"h = {h}") for h in growth],
        source="[Chang et al., 2019](https://arxiv.org/abs/1902.09689)",
    )


def init() -> Row:
    """ReLU nets at their start."""
    layer = lambda h, w: jax.nn.relu(w @ h)
    growth = jax.jit(
        lambda end, weights: (
            diagnose.recurrent_flow(
                layer, lambda h: h[-1] @ end, jnp.ones(256), weights
            ).growth
        )
    )
    he, twice = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        weights = rng.normal(size=(30, 256, 256), scale=math.sqrt(2 / 256))
        end = single(rng.normal(size=256))
        he.append(growth(end, single(weights)))
        twice.append(growth(end, single(2 * weights)))
    return judge(
        "A proper scale of the initial weights keeps gradients from exploding.",
        "30 ReLU layers of width 256, weights of deviation √(2/n), and twice that; log "
        "growth a layer.",
        [near(he, 0.0, 0.05, label="√(2/n)"),
         near(twice, math.log(2), 0.1, label="twice")],
        source=HE,
    )  # fmt: skip


def steep_loss() -> Row:
    """A shallow model with a loss that is exponential."""
    slope = lambda loss: abs(float(jax.grad(loss)(jnp.float32(-10.0))))
    return judge(
        "Gradients explode without any depth if the loss is exponential.",
        "One weight, an example at margin −10: slope of exp(−m), and of the logistic "
        "loss.",
        [near(slope(lambda m: jnp.exp(-m)), math.exp(10), label="exponential"),
         near(slope(lambda m: jnp.log1p(jnp.exp(-m))), 1.0, label="logistic")],
    )  # fmt: skip


def plateau() -> Row:
    """Where gradients vanish the loss is flat, and a longer step may help."""
    loss = lambda w: (w**19 - 1) ** 2 / 2
    rate = 0.004

    @jax.jit
    def final(decay, max_factor):
        tx: Any = clipfx.clip_by_curvature(rate, max_factor=max_factor, decay=decay)

        def step(carry, _):
            w, state = carry
            update, state = tx.update(jax.grad(loss)(w), state, w)
            return (w - rate * update, state), None

        start = jnp.float32(0.6)
        (w, _), _ = jax.lax.scan(step, (start, tx.init(start)), None, length=500)
        return loss(w)

    return judge(
        "Gradients that vanish over many steps leave plateaus of the loss, which steps "
        "that follow the curvature leave sooner.",
        "The last state w^19 to be 1, from w = 0.6; loss after 500 steps: plain, as "
        "long as the last secant allows, or the mean of the last ten.",
        [at_least(final(0.0, 1.0), 0.45, label="plain"),
         at_most(final(0.0, 100.0), 0.01, label="last")],
        [at_most(final(0.9, 100.0), 0.01, label="mean")],
    )  # fmt: skip


def small_boxes() -> Row:
    """Intersection over union, of two intervals in each dimension."""

    def iou(box, other):
        low, high = jnp.maximum(box[0], other[0]), jnp.minimum(box[1], other[1])
        area = lambda low, high: jnp.prod(jnp.maximum(high - low, 0))
        common = area(low, high)
        return common / (area(*box) + area(*other) - common)

    def slope(size, shift):
        box = jnp.array([[0.0, 0.0], [size, size]])
        return float(clipfx.global_norm(jax.grad(iou)(box + shift, box)))

    large, small = slope(1.0, 0.1), slope(0.01, 0.001)
    return judge(
        "The loss of object detectors, 1 − intersection over union, has very large "
        "gradients for some boxes.",
        "Boxes that overlap by the same share, of side 1 and 0.01, and far apart; norm "
        "of the gradient by the corners.",
        [near(small / large, 100.0, label="small over large")],
        [at_least(slope(1.0, 2.0), 1e-3, label="apart")],
        source="[Yu et al., 2016](https://arxiv.org/abs/1608.01471)",
    )


CLAIMS = [depth, early_layers, recurrence, chaos, singular_values, contraction,
          conditioning, sensitive, costate, euler, init, steep_loss, small_boxes,
          plateau]  # fmt: skip
