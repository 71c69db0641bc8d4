"""What a bound on single examples, groups or timesteps is worth."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import clipfx
from clipfx import per_example
from examples import diffusion_digits
from examples import outliers as wrong_labels
from examples._evidence.claims import Row, at_least, at_most, judge, near, single, stack

TITLE = "Examples, groups and timesteps"
NOTE = """\
A clip of the mean gradient bounds how far a step goes, and leaves its direction to the
largest example. A clip of each example's gradient (`per_example.clipped_grad`) bounds
what one example can contribute, which is what robustness and privacy need. The
sensitivity of a mean is how far it moves if one example is replaced by another."""

HARDT = "[Hardt et al., 2016](https://arxiv.org/abs/1509.01240)"
HANG = "[Hang et al., 2023](https://arxiv.org/abs/2303.09556)"
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


def memorized() -> Row:
    """Digits of which one label in ten is wrong, learned by a network."""
    settings = wrong_labels.Settings(steps=1500)

    def end(variant, rate):
        runs = [wrong_labels.train(variant, rate, seed, settings) for seed in range(3)]
        return (np.array([run.last(name) for run in runs])
                for name in ("test", "repeated"))  # fmt: skip

    right, repeated = end("per_example", 0.1)
    free, memorized = end("none", 0.1)
    slow, _ = end("none", 0.003)
    return judge(
        "A clip of each example keeps a network from memorising wrong labels, and so "
        "it is right more often.",
        "899 digits, one label in ten wrong, 1,500 steps at rate 0.1, each example "
        "clipped at 1: share of the wrong labels that the network repeats, and without "
        "a clip; held-out digits in a hundred that are right, beyond those without a "
        "clip, and beyond those without one at its best rate, 0.003.",
        [at_most(repeated, 0.2, label="repeated"),
         at_least(memorized, 0.8, label="without"),
         at_least(100 * (right - free), 1.0, label="right")],
        [at_least(100 * (right - slow), 1.0, label="right, best rate")],
    )  # fmt: skip


def not_a_number() -> Row:
    """A batch with an example whose gradient is no number."""
    x, y, _ = _data(0)
    w = np.zeros(8, np.float32)
    grad = per_example.clipped_grad(_loss, 1.0)

    @jax.jit
    def steps(y):
        """Lengths of the sums of this library and of Optax."""
        each = jax.vmap(jax.grad(_loss), (None, 0))(w, (x, y))
        theirs, _ = optax.per_example_global_norm_clip([each], 1.0)
        return clipfx.global_norm(grad(w, (x, y))[0]), clipfx.global_norm(theirs)

    large, _ = steps(single([1e6, *y[1:]]))
    ours, theirs = steps(single([math.nan, *y[1:]]))
    return judge(
        "With each example clipped at c no example can spoil a step.",
        "64 examples, c = 1, one with an error of 10⁶, or not a number: length of the "
        "sum; and that of `optax.per_example_global_norm_clip`.",
        [at_most(large, 64.0, label="10⁶")],
        [at_most(ours, 64.0, label="not a number"),
         at_most(theirs, 64.0, label="not a number, Optax")],
    )  # fmt: skip


def sensitivity() -> Row:
    """Two batches that differ in one example, of opposite gradients."""
    x, y, _ = _data(0)
    far, other = y.copy(), y.copy()
    far[0], other[0] = 1e6, -1e6
    w = np.zeros(8, np.float32)

    def gap(max_norm, ord=None):
        grad = per_example.clipped_grad(_loss, max_norm, ord=ord)
        both = jax.jit(jax.vmap(lambda labels: grad(w, (x, labels))[0]))
        sums = both(np.stack([far, other]))
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
        source=HANG,
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


# The weight of the loss is at most gamma, and its gradient clipped at c.
CASES = {"none": (math.inf, math.inf), "clip": (math.inf, 0.1),
         "Min-SNR": (5.0, math.inf)}  # fmt: skip


class Denoised(NamedTuple):
    """Of diffusion models, by seed: how far their samples are from digits, and norms.

    Attributes:
      distance: `[seeds]`, of 120 samples to as many held-out digits.
      spread: `[seeds]`, mean norms of the gradient that Adam is given: the largest of
        ten groups of timesteps over the least.
    """

    distance: np.ndarray
    spread: np.ndarray


@functools.cache
def denoise(seeds: int = 3) -> dict[str, Denoised]:
    """Small diffusion models of digits, by what bounds their SNR-weighted gradient."""
    settings = diffusion_digits.Settings(
        steps=500, hidden=64, batch=64, learning_rate=3e-3
    )
    digits, held_out = diffusion_digits.load_data()
    held_out, graphs, params, batches = held_out[:120], [], [], []
    for seed in range(seeds):
        model = diffusion_digits.Denoiser(settings.hidden, nnx.Rngs(seed))
        graph, start = nnx.split(model)
        own = dataclasses.replace(settings, seed=seed)
        parts = [*diffusion_digits.draw_batches(digits, own)]
        graphs.append(graph)
        params.append(start)
        batches.append(jax.tree.map(lambda *x: jnp.concatenate([*map(jnp.asarray, x)]),
                                    *parts))  # fmt: skip
    rate = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)

    def train(gamma, max_norm, params, batches):
        weight = diffusion_digits.weigh(lambda snr: jnp.minimum(snr, gamma))
        front = optax.chain(weight, clipfx.clip_by_global_norm(max_norm))
        adam = optax.adam(rate)

        def step(carry, batch):
            params, states = carry
            loss = lambda params: diffusion_digits.x0_error(
                nnx.merge(graphs[0], params), batch
            )
            g, first = front.update(jax.grad(loss)(params), states[0], snr=batch.snr)
            update, second = adam.update(g, states[1])
            params = optax.apply_updates(params, update)
            return (params, (first, second)), clipfx.global_norm(g)

        states = front.init(params), adam.init(params)
        (params, _), norms = jax.lax.scan(step, (params, states), batches)
        model = nnx.merge(graphs[0], params)
        drawn = diffusion_digits.sample(model, jax.random.key(1), len(held_out))
        return drawn, norms

    every = jax.vmap(jax.vmap(train, (None, None, 0, 0)), (0, 0, None, None))
    limits = map(single, zip(*CASES.values(), strict=True))
    batches = stack(batches)
    drawn, norms = jax.jit(every)(*limits, stack(params), batches)
    tenth = np.asarray(batches.t) * 10 // diffusion_digits.TIMESTEPS

    def spread(norms):
        means = [[n[t == k].mean() for k in range(10)]
                 for n, t in zip(norms, tenth, strict=True)]  # fmt: skip
        return np.max(means, 1) / np.min(means, 1)

    far = lambda x: diffusion_digits.sliced_wasserstein(x, held_out)
    return {name: Denoised(np.array([*map(far, samples)]), spread(norms))
            for name, samples, norms in zip(CASES, *map(np.asarray, (drawn, norms)),
                                            strict=True)}  # fmt: skip


def snr_samples() -> Row:
    """What an SNR-weighted model draws, with and without bounds."""
    none, clip, capped = (denoise()[name] for name in CASES)
    return judge(
        "A diffusion model whose loss is weighted by the SNR learns better if "
        "timesteps of little noise are kept from dominating, by a cap on the weight or "
        "by a clip.",
        "8×8 digits, 500 steps with Adam, loss times the SNR, the weight capped at 5, "
        "or the gradient clipped at 0.1; distance of samples from held-out digits, "
        "over that without a bound; and so how uneven gradients are, mean norms by "
        "tenths of the timesteps, largest over least.",
        [at_most(capped.distance / none.distance, 0.8, label="capped"),
         at_most(clip.distance / none.distance, 0.8, label="clipped"),
         at_most(capped.spread / none.spread, 0.1, label="uneven, capped"),
         at_most(clip.spread / none.spread, 0.1, label="uneven, clipped")],
        source=HANG,
    )  # fmt: skip


CLAIMS = [step_bound, one_example, influence, outliers, memorized, not_a_number,
          sensitivity, fair_bound, snr_spread, snr_clip, snr_samples]  # fmt: skip
