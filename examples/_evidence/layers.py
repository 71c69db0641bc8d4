"""What layers do to gradients that pass them."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from clipfx import diagnose
from examples._evidence.claims import Row, at_least, at_most, judge, near, single

TITLE = "Layers that keep gradients in bounds"
NOTE = """\
The norm of a layer's Jacobian, by `diagnose.jacobian_norm`, is the most by which it can
lengthen a gradient. Normalisation divides by √(σ² + ε), σ the deviation of its input,
ε a small constant: large inputs shorten the gradient, and inputs that hardly vary
lengthen it, up to 1/√ε. What bounds one layer need not bound a stack: random layers
with batch normalisation obey their bound one by one, and the gradient grows. A
separable convolution has √2 times the mean gain of a full one where weights have the
variance 2 over the fan-in; of the largest gain no such constant holds."""

BATCH_NORM = "[Ioffe and Szegedy, 2015](https://arxiv.org/abs/1502.03167)"
LAYER_NORM = "[Ba et al., 2016](https://arxiv.org/abs/1607.06450)"
SANTURKAR = "[Santurkar et al., 2018](https://arxiv.org/abs/1805.11604)"
MEAN_FIELD = "[Yang et al., 2019](https://arxiv.org/abs/1902.08129)"
RESNET = "[He et al., 2016](https://arxiv.org/abs/1512.03385)"
GRU = "[Cho et al., 2014](https://arxiv.org/abs/1406.1078)"
EPS = 1e-5


def _norm(fun, rounds=30):
    """Compiled: from arguments to the norm of the Jacobian by the first."""

    def of(x, *rest):
        return diagnose.jacobian_norm(lambda x: fun(x, *rest), x, rounds=rounds).value

    return jax.jit(of)


def _normalize(x, axis):
    x = x - jnp.mean(x, axis, keepdims=True)
    return x / jnp.sqrt(jnp.mean(x * x, axis, keepdims=True) + EPS)


_layer_norm = _norm(lambda x, gain: gain * _normalize(x, -1))
_batch_norm = _norm(lambda x: _normalize(x, 0))


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def layer_norm() -> Row:
    """Inputs of any size, gains of any size."""
    x = _normal(0, 64)
    norms = [_layer_norm(s * x, np.ones(64, np.float32)) for s in (1, 100, 1e4)]
    gain = np.full(64, 50, np.float32)
    return judge(
        "The gradient through layer normalisation has a bound of its gain γ and ε "
        "alone, max|γ|/√ε, and does not grow with the input's variance.",
        "64 features of deviation 1, 100, 10⁴, γ = 1: largest norm; γ = 50 and "
        "deviation 1: norm over γ.",
        [at_most(max(norms), 1 / math.sqrt(EPS), label="bound"),
         at_most(norms[-1] / norms[0], 1.0, label="10⁴ over 1"),
         near(_layer_norm(x, gain) / norms[0], 50.0, label="γ = 50")],
    )  # fmt: skip


def layer_norm_small() -> Row:
    """Inputs that hardly vary."""
    norm = _layer_norm(1e-4 * _normal(0, 64), np.ones(64, np.float32))
    return judge(
        "Layer normalisation keeps the gradient from exploding especially where its "
        "input hardly varies.",
        "64 features of deviation 10⁻⁴, γ = 1, ε = 10⁻⁵; at most 1 if it never "
        "lengthens a gradient.",
        [at_most(norm, 1.0)],
    )


def batch_norm() -> Row:
    """The bound of one layer."""
    ratios = []
    for seed in range(3):
        x = _normal(seed, 32, 8) * np.geomspace(0.1, 10, 8, dtype=np.float32)
        ratios.append(_batch_norm(x) * np.sqrt(x.var(0) + EPS).min())
    return judge(
        "The Jacobian of batch normalisation, without its gain, has no singular value "
        "above the inverse of the batch's deviation.",
        "32 examples, 8 features of deviation 0.1 to 10; norm times the least "
        "deviation √(σ² + ε).",
        [at_most(ratios, 1.0)],
        source=SANTURKAR,
    )


def batch_norm_depth() -> Row:
    """The bound of many layers."""

    @jax.jit
    def growth(x, weights, end):
        layer = lambda h, w: jax.nn.relu(_normalize(h @ w, 0))
        loss = lambda h: jnp.vdot(h[-1], end)
        return diagnose.recurrent_flow(layer, loss, x, weights).growth

    rates = []
    for seed in range(3):
        weights = _normal(seed, 30, 128, 128) / math.sqrt(128)
        rates.append(math.exp(growth(_normal(10 + seed, 64, 128), weights,
                                     _normal(20 + seed, 64, 128))))  # fmt: skip
    return judge(
        "Batch normalisation keeps the gradient from growing through a deep net.",
        "30 random ReLU layers of width 128, 64 examples; growth of the gradient a "
        "layer.",
        [at_most(rates, 1.05)],
        source=f"{BATCH_NORM}; refuted by {MEAN_FIELD}",
    )


def layer_norm_depth() -> Row:
    """The same with layer normalisation, and weights of any scale."""

    @jax.jit
    def growth(x, weights, end):
        layer = lambda h, w: jax.nn.relu(_normalize(h @ w, -1))
        loss = lambda h: jnp.vdot(h[-1], end)
        return diagnose.recurrent_flow(layer, loss, x, weights).growth

    def rates(scale):
        for seed in range(3):
            weights = scale * _normal(seed, 30, 128, 128) * math.sqrt(2 / 128)
            x, end = _normal(10 + seed, 64, 128), _normal(20 + seed, 64, 128)
            yield math.exp(growth(x, weights, end))

    return judge(
        "Layer normalisation keeps the gradient from growing through a deep net.",
        "30 random ReLU layers of width 128, weights of half, once and twice √(2/n); "
        "growth of the gradient a layer.",
        [at_most([*rates(s)], 1.05, label=name)
         for s, name in ((0.5, "half"), (1.0, "once"), (2.0, "twice"))],
        source=LAYER_NORM,
    )  # fmt: skip


def local_response() -> Row:
    """Normalisation by the squares of neighbouring channels."""

    def layer(x):
        padded = jnp.pad(x * x, 2)
        near_by = sum(padded[k : k + 64] for k in range(5))
        return x / (2 + 1e-4 * near_by) ** 0.75

    norm = _norm(layer)
    found = [norm(s * _normal(0, 64)) for s in (1, 100, 1e4)]
    return judge(
        "Local response normalisation, which divides channels by the squares of their "
        "neighbours, bounds gradients too.",
        "64 channels of deviation 1, 100, 10⁴ with the constants of AlexNet, 2, 10⁻⁴, "
        "0.75; at most 2^−0.75, at 0.",
        [at_most(max(found), 2**-0.75)],
        source="Krizhevsky et al., 2012",
    )


def _stack(layer, depth=50):
    """The norm of the Jacobian of many layers `layer(x, w)`."""

    def fun(x, weights):
        return jax.lax.scan(lambda h, w: (layer(h, w), None), x, weights)[0]

    return _norm(fun)


def _unit(seed, depth=50, width=16):
    """Random matrices of spectral norm 1."""
    w = _normal(seed, depth, width, width)
    return w / np.linalg.norm(w, 2, axis=(1, 2), keepdims=True)


_residual = _stack(lambda h, w: h + jnp.tanh(w @ h))
_scaled = _stack(lambda h, w: 0.8 * h + 0.2 * jnp.tanh(w @ h))


def residual() -> Row:
    """The identity carries gradients, but does not bound them."""
    x = _normal(0, 16)
    plain = _stack(lambda h, w: jnp.tanh(w @ h))(x, 1e-3 * _unit(0))
    grows = _residual(x * 1e-3, np.broadcast_to(0.1 * np.eye(16, dtype=np.float32),
                                                (50, 16, 16)))  # fmt: skip
    return judge(
        "Residual connections carry gradients past layers that hardly respond, but do "
        "not keep them from exploding.",
        "50 layers h + tanh(Wh), norm of all: W of norm 0.001; without the "
        "connection; W = 0.1 I.",
        [near(_residual(x, 1e-3 * _unit(0)), 1.0, 0.1, label="small W"),
         at_most(plain, 1e-30, label="without"),
         at_least(grows, 50.0, label="0.1 I")],
        source=RESNET,
    )  # fmt: skip


def scaled_residual() -> Row:
    """Weights of the two paths that add up to 1."""
    norms = [_scaled(_normal(seed, 16), _unit(seed)) for seed in range(3)]
    free = [_residual(_normal(seed, 16), _unit(seed)) for seed in range(3)]
    return judge(
        "Scaled as (1 − β)h + αf(h), with α‖f′‖ ≤ β, residual connections provably "
        "keep gradients from exploding.",
        "50 layers, f = tanh(Wh), W of norm 1, α = β = 0.2; norm of all, and with "
        "h + f(h).",
        [at_most(norms, 1.0, label="scaled"), at_least(free, 1.0, label="not scaled")],
    )


def long_skip() -> Row:
    """An encoder and a decoder, with and without what leads from one to the other."""
    down = 0.5 * _unit(0, 20)

    def net(x, weights, share):
        half = len(weights) // 2
        pass_on = lambda h, w: (w @ h, None)
        first = weights[0] @ x
        deep, _ = jax.lax.scan(pass_on, first, weights[1:half])
        up, _ = jax.lax.scan(pass_on, deep, weights[half:])
        return up + share * first

    norm = _norm(net)
    x = _normal(0, 16)
    return judge(
        "A connection from early encoder layers to late decoder layers carries "
        "gradients past all that lies between.",
        "20 linear layers of norm ½, norm by the input: with the first layer added at "
        "the end, and without.",
        [near(norm(x, down, single(1)), 0.5, 0.01, label="with"),
         at_most(norm(x, down, single(0)), 1e-5, label="without")],
        source="[Ronneberger et al., 2015](https://arxiv.org/abs/1505.04597)",
    )  # fmt: skip


def concatenation() -> Row:
    """Features that are added or put side by side."""
    total, beside = _norm(lambda x: x.sum(0)), _norm(lambda x: x.reshape(-1))
    by_one = _norm(lambda x, rest: x + rest.sum(0))
    x, rest = _normal(0, 16, 16), _normal(1, 15, 16)
    ratio, alone = total(x) / beside(x), by_one(x[0], rest)
    return judge(
        "Adding up k features has a Jacobian √k times as large as concatenating them.",
        "k = 16 features of 16 entries: ratio of the norms by all features, and by a "
        "single one.",
        [near(ratio, 4.0, label="by all")],
        [near(alone, 4.0, label="by one")],
    )


def _convolution_norm(kernels):
    """The largest singular value of circular convolutions in a row, 16 x 16 places.

    Each is `[3, 3, in, out]`, or `[3, 3, channels]` by channel: at every frequency a
    matrix, so that no large operator is made.
    """
    whole = np.ones((1, 1, 1, 1))
    for kernel in kernels:
        at = np.fft.fft2(kernel, (16, 16), axes=(0, 1))
        if kernel.ndim == 3:
            at = at[..., None] * np.eye(kernel.shape[-1])
        whole = at if whole.size == 1 else whole @ at
    gains = np.linalg.svd(whole, compute_uv=False)
    return gains.max(), math.sqrt(np.mean(gains**2))


def separable() -> Row:
    """A full convolution, and one by channel with a mixing of channels behind it."""
    ratios = {}
    for seed in range(3):
        for n in (8, 32):
            rng = np.random.default_rng(seed)
            full, each, mix = (
                rng.normal(size=shape) / math.sqrt(fan) for shape, fan in
                [((3, 3, n, n), 9 * n), ((3, 3, n), 9), ((1, 1, n, n), n)]
            )  # fmt: skip
            for gain in (1, 2):
                root = math.sqrt(gain)
                whole = _convolution_norm([root * full])
                parts = _convolution_norm([root * each, root * mix])
                found = (p / w for p, w in zip(parts, whole, strict=True))
                for kind, value in zip(("norm", "mean gain"), found, strict=True):
                    ratios.setdefault((kind, n, gain), []).append(value)
    check = lambda kind, n, gain: near(
        ratios[kind, n, gain], math.sqrt(2), 0.15, label=f"{kind}, {n}, {gain}/n"
    )
    return judge(
        "With usual initial weights a depthwise separable convolution has about √2 "
        "times the norm of a full one.",
        "3×3 kernels of 8 and 32 channels, variance 1 or 2 over the fan-in n: ratio of "
        "the largest singular values; and of the root mean squares of all.",
        [check("norm", 8, 1), check("norm", 32, 1), check("norm", 32, 2)],
        [check("mean gain", 32, 2)],
    )


def attention_scale() -> Row:
    """Variances and gradients of the scores."""
    values = {}
    for width in (16, 256):
        q, k = _normal(0, 2, 20_000, width)
        scores, slopes = np.sum(q * k, -1), np.linalg.norm(k, axis=-1)
        values[width] = scores.var(), slopes.mean(), (scores / math.sqrt(width)).var()
    return judge(
        "Scores of random queries and keys of width d have variance d and gradients of "
        "size √d; divided by √d, variance 1.",
        "20,000 pairs of unit normal entries.",
        [c for d, (var, slope, scaled) in values.items() for c in (
            near(var, d, 0.05, label=f"variance, d = {d}"),
            near(slope, math.sqrt(d), 0.05, label=f"gradient, d = {d}"),
            near(scaled, 1.0, 0.05, label=f"scaled, d = {d}"))],
        source="[Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)",
    )  # fmt: skip


_softmax = _norm(jax.nn.softmax)


def attention_saturates() -> Row:
    """The gradient that softmax lets through."""
    width, raw, scaled = 1024, [], []
    for seed in range(20):
        scores = _normal(seed, 8, width) @ _normal(100 + seed, width)
        raw.append(_softmax(scores))
        scaled.append(_softmax(scores / single(math.sqrt(width))))
    return judge(
        "Scores that are not scaled saturate the softmax, whose gradient vanishes; "
        "scaled ones do not.",
        "8 keys of width 1,024, 20 queries: norm of its Jacobian, median.",
        [at_most(np.median(raw), 0.01, label="not scaled"),
         at_least(np.median(scaled), 0.1, label="scaled")],
        source="[Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)",
    )  # fmt: skip


def sharp_softmax() -> Row:
    """Attention that is sure of one key, and attention at the edge between two."""
    keys, values = _normal(0, 2, 16), single([1.0, -1.0])
    apart = keys[0] - keys[1]
    edge = keys.sum(0) - apart * (keys.sum(0) @ apart) / (apart @ apart)
    attend = _norm(lambda q, s: values @ jax.nn.softmax(s * (keys @ q)), rounds=1)
    by = lambda q, s: float(attend(q, single(s)))
    sure = edge + apart / (apart @ apart)  # scores that differ by s
    return judge(
        "Sharp attention makes a cliff of the loss, where the gradient can be "
        "enormous.",
        "Two keys, scores times 100, gradient by the query over that of scores times "
        "1: half-way between the keys, and where it is sure of one.",
        [at_least(by(edge, 100) / by(edge, 1), 10.0, label="half-way")],
        [at_least(by(sure, 100) / by(sure, 1), 10.0, label="sure")],
    )


def gru() -> Row:
    """A gated recurrent unit whose update gate is held open or shut."""
    w = 1.5 * _unit(0, 3, 16)

    def cell(h, bias):
        gate = jax.nn.sigmoid(w[0] @ h + bias)
        reset = jax.nn.sigmoid(w[1] @ h + 20)
        return gate * h + (1 - gate) * jnp.tanh(w[2] @ (reset * h))

    far = _norm(lambda h, bias: cell(h, bias) - h)
    whole, h = _norm(cell), 1e-3 * _normal(0, 16)
    return judge(
        "Where a GRU's update gate keeps the state, the Jacobian is the identity; "
        "where it replaces the state, the recurrent matrix, and gradients can "
        "explode.",
        "16 units, W of norm 1.5, gate's bias ±20: distance from the identity, and "
        "norm.",
        [at_most(far(h, single(20)), 1e-3, label="keeps"),
         near(whole(h, single(-20)), 1.5, 0.01, label="replaces")],
        source=GRU,
    )  # fmt: skip


def flow() -> Row:
    """Invertible layers, bounded in their largest singular value, or determinant."""
    layers = _unit(0, 50, 4)
    contract = np.linalg.norm(np.linalg.multi_dot([*layers]), 2)
    squeeze = np.diag([2.0, 0.5])
    return judge(
        "In a normalizing flow gradients do not explode if no layer has a singular "
        "value above 1; a determinant of 1 does not suffice.",
        "50 layers, norm of all: random ones of norm 1; diag(2, ½), of determinant 1.",
        [at_most(contract, 1.0, label="norm 1"),
         at_least(np.linalg.norm(np.linalg.matrix_power(squeeze, 50), 2), 1e15,
                  label="determinant 1")],
    )  # fmt: skip


CLAIMS = [layer_norm, layer_norm_small, batch_norm, batch_norm_depth, layer_norm_depth,
          local_response, residual, scaled_residual, long_skip, concatenation,
          separable, attention_scale, attention_saturates, sharp_softmax, gru,
          flow]  # fmt: skip
