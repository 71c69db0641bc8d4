"""What a bound on single examples, groups or timesteps is worth."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipfx
from clipfx import per_example
from examples._evidence.claims import Row, at_least, at_most, judge, near, single

TITLE = "Examples, groups and timesteps"
NOTE = """\
A clip of the mean gradient bounds how far a step goes, and leaves its direction to the
largest example. A clip of each example's gradient (`per_example.clipped_grad`) bounds
what one example can contribute, which is what robustness and privacy need. The
sensitivity of a mean is how far it moves if one example is replaced by another."""

HARDT = "[Hardt et al., 2016](https://arxiv.org/abs/1509.01240)"
ABADI = "[Abadi et al., 2016](https://arxiv.org/abs/1607.00133)"


def _loss(w, example):
    """Half the squared error of one example, whose gradient may be of any size."""
    x, y = example
    return (jnp.vdot(w, x) - y) ** 2 / 2


def _data(seed, number=64, width=8, corrupt=0.0):
    """Inputs, labels, some of them far off, and the true weights."""
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(number, width)), rng.normal(size=width)
    y = x @ w + 0.1 * rng.normal(size=number)
    y[: int(corrupt * number)] += 100.0
    return single(x), single(y), single(w)


@jax.jit
def _descend(x, y, max_norm, each_max, order):
    """Weights after every step of SGD, of batches `order` `[T, B]`.

    Clips the mean at `max_norm`, and the gradient of each example at `each_max`.
    """
    grad = per_example.clipped_grad(_loss, each_max, reduce="mean")
    tx = optax.chain(clipfx.clip_by_global_norm(max_norm), optax.sgd(RATE))

    def step(carry, rows):
        w, state = carry
        update, state = tx.update(grad(w, (x[rows], y[rows]))[0], state, w)
        return (w + update, state), w + update

    start = jnp.zeros(x.shape[1])
    return jax.lax.scan(step, (start, tx.init(start)), order)[1]


RATE, STEPS, BATCH = 0.05, 300, 16
_paths = lambda x, y, c, each, seed: np.asarray(_descend(
    x, y, single(c), single(each),
    np.random.default_rng(seed).integers(len(x), size=(STEPS, BATCH))
))  # fmt: skip


def step_bound() -> Row:
    """SGD, and SGD with momentum."""
    g = np.full(4, 50, np.float32)

    @jax.jit
    def longest(momentum):
        tx = optax.chain(clipfx.clip_by_global_norm(1.0), optax.trace(momentum))

        def step(state, _):
            update, state = tx.update(g, state)
            return state, clipfx.global_norm(update)

        return jnp.max(jax.lax.scan(step, tx.init(g), None, length=100)[1])

    return judge(
        "With the gradient clipped at c no step is longer than ηc.",
        "100 gradients of norm 100, c = 1: longest step over ηc, of SGD, and with "
        "momentum 0.9.",
        [at_most(longest(0.0), 1.0, label="SGD")],
        [at_most(longest(0.9), 1.0, label="momentum")],
    )


def one_example() -> Row:
    """The same training, one example replaced by one far away."""
    gaps, ends = [], {"clipped": [], "free": []}
    for seed in range(5):
        x, y, _ = _data(seed)
        other = y.copy()
        other[0] += 30.0
        for name, c in (("clipped", 1.0), ("free", math.inf)):
            paths = [_paths(x, labels, c, math.inf, seed) for labels in (y, other)]
            if c == 1.0:
                steps = [np.diff(path, axis=0, prepend=0) for path in paths]
                gaps.append(np.linalg.norm(steps[0] - steps[1], axis=1).max())
            ends[name].append(np.linalg.norm(paths[0][-1] - paths[1][-1]))
    return judge(
        "With the gradient clipped at c, one changed example changes a step by at most "
        "2ηc, and the trained weights by less.",
        "Linear regression of 64 examples, 300 steps, c = 1, one label moved by 30: "
        "largest change of a step over 2ηc; change of the weights, over that without "
        "a clip.",
        [at_most(np.array(gaps) / (2 * RATE), 1.0, label="step"),
         at_most(np.divide(ends["clipped"], ends["free"]), 1.0, label="weights")],
        source=HARDT,
    )  # fmt: skip


def influence() -> Row:
    """One example of a batch that is far longer than the others."""
    x, y, _ = _data(0)
    y[0] += 1e4
    w = np.zeros(8, np.float32)

    @jax.jit
    def shares(max_norm, each_max):
        """What the example contributes, along the step and in units of its length."""
        grad = per_example.clipped_grad(_loss, each_max, reduce="mean")
        mean, info = grad(w, (x, y))
        step, _ = clipfx.tree_clip(mean, max_norm)
        outlier = grad(w, (x, y), where=np.arange(64) == 0)[0] / 64
        size = clipfx.global_norm(step)
        return size, outlier @ mean / (mean @ mean), jnp.linalg.norm(outlier), info.norm

    size, share, _, norms = shares(1.0, jnp.inf)
    limit = np.median(norms)
    *_, own, _ = shares(single(np.inf), limit)
    return judge(
        "Clipping the gradient of a batch limits what one example does to the step.",
        "64 examples, one with an error of 10⁴, c = 1: length of the step over ηc; "
        "share of the example in it; and, if each is clipped, its own length over "
        "c/64.",
        [at_most(size, 1.0, label="length")],
        [at_most(share, 0.1, label="share"),
         at_most(own * 64 / limit, 1.0, label="each clipped")],
    )  # fmt: skip


def outliers() -> Row:
    """Labels that are wrong, with and without clips of each example."""
    errors = {"none": [], "mean": [], "each": []}
    for seed in range(5):
        x, y, w = _data(seed, corrupt=0.1)
        for name, c, each in (("none", math.inf, math.inf), ("mean", 1.0, math.inf),
                              ("each", math.inf, 1.0)):  # fmt: skip
            late = _paths(x, y, c, each, seed)[-100:].mean(0)
            errors[name].append(np.linalg.norm(late - w))
    ratio = lambda name: np.divide(errors[name], errors["none"])
    return judge(
        "Clipping each example's gradient makes training robust to wrong labels.",
        "Linear regression, six of 64 labels off by 100, mean of the last 100 steps: "
        "error of the weights, over that without a clip; if each example is clipped at "
        "1, and if the mean is.",
        [at_most(ratio("each"), 0.2, label="each")],
        [at_most(ratio("mean"), 0.2, label="mean")],
        source="Huber, 1964",
    )


def sensitivity() -> Row:
    """Two batches that differ in one example, of opposite gradients."""
    x, y, _ = _data(0)
    far, other = y.copy(), y.copy()
    far[0], other[0] = 1e6, -1e6
    w = np.zeros(8, np.float32)

    def gap(max_norm, ord=None):
        grad = per_example.clipped_grad(_loss, max_norm, ord=ord)
        sums = [grad(w, (x, labels))[0] for labels in (far, other)]
        return float(jnp.linalg.norm(sums[0] - sums[1], ord=ord or 2)) / 64, grad

    two, grad = gap(3.0)
    one, by_one = gap(3.0, 1)
    free, _ = gap(jnp.inf)
    return judge(
        "With each of m examples clipped at C, replacing one moves the mean by at most "
        "2C/m, by which noise is set; without a clip there is no bound.",
        "m = 64, C = 3, opposite examples with errors of 10⁶: distance over 2C/m in "
        "the 2-norm, in the 1-norm if clipped by that; and without a clip.",
        [at_most(two / (grad.sensitivity("replace_one") / 64), 1.0, label="2-norm"),
         at_least(two / (6 / 64), 0.99, label="attained"),
         at_most(one / (by_one.sensitivity("replace_one") / 64), 1.0, label="1-norm"),
         at_least(free / (6 / 64), 1e3, label="without")],
        source=ABADI,
    )  # fmt: skip


def fair_bound() -> Row:
    """Nine in ten examples of one group."""
    ratios = {"plain": [], "fair": []}
    group = np.int32(np.arange(200) >= 180)
    grad = jax.jit(per_example.fair_grad(_loss, 2, 2.0))
    for seed in range(5):
        x, y, _ = _data(seed, 200)
        y = np.where(group, -y, y)
        _, info = grad(np.zeros(8, np.float32), (x, y), population_ids=group)
        size = np.asarray(info.norm)
        ratios["plain"].append(size[0] / size[1])
        size = np.asarray(info.norm * info.factor)
        ratios["fair"].append(size[0] / size[1])
    return judge(
        "Fair clipping keeps a majority's contribution to the gradient to twice that "
        "of a minority.",
        "180 and 20 examples: ratio of the norms, before and after.",
        [at_least(ratios["plain"], 3.0, label="before"),
         at_most(ratios["fair"], 2.0, label="after")],
    )  # fmt: skip


_RATIOS = clipfx.snr.cosine(1000)


def _timesteps():
    """Unweighted gradients of one norm, at timesteps of every size of SNR above 1."""
    at = np.array([0, 9, 99, 249])
    g = np.random.default_rng(0).normal(size=(4, 16))
    return single(g / np.linalg.norm(g, axis=1, keepdims=True)), _RATIOS[at]


def _by_snr(rows, ratios):
    tx = clipfx.clip_by_snr(1.0, weight=clipfx.snr.inverse, low=0.0)
    cut = lambda g, ratio: tx.update(g, tx.init(g), snr=ratio)[0]
    return jax.jit(jax.vmap(cut))(rows, ratios)


def snr_spread() -> Row:
    """What the weight does without a clip."""
    rows, ratios = _timesteps()
    weighted = np.linalg.norm(np.asarray(rows) * np.asarray(ratios)[:, None], axis=1)
    return judge(
        "A loss of a diffusion model that is weighted by the signal-to-noise ratio "
        "(SNR) has exploding gradients at the early timesteps, of little noise.",
        "Cosine schedule, gradients of norm 1 at timesteps 0 and 249 of 1,000: their "
        "ratio once weighted.",
        [at_least(weighted[0] / weighted[-1], 1e3)],
        source="[Hang et al., 2023](https://arxiv.org/abs/2303.09556)",
    )


def snr_clip() -> Row:
    """The threshold c/SNR in front of the weight, and behind it."""
    rows, ratios = _timesteps()
    ratios = np.asarray(ratios)
    before = np.asarray(_by_snr(rows, ratios)) * ratios[:, None]
    after = np.asarray(_by_snr(rows * ratios[:, None], ratios))
    size = lambda x: np.linalg.norm(x, axis=1)
    return judge(
        "A threshold inverse to the SNR counteracts that weight exactly.",
        "The same gradients at timesteps 0, 9, 99, 249, threshold 1/SNR: largest over "
        "least norm, clipped before the weight; and clipped after it.",
        [near(size(before).max() / size(before).min(), 1.0, label="before")],
        [near(size(after).max() / size(after).min(), 1.0, label="after")],
    )


CLAIMS = [step_bound, one_example, influence, outliers, sensitivity, fair_bound,
          snr_spread, snr_clip]  # fmt: skip
