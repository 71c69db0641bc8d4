"""Where a clip helps a training, and where something else does."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipfx
from clipfx import diagnose
from examples import _common, boosting_loss, boxes
from examples._evidence.adaptive import lessons
from examples._evidence.claims import Row, at_least, at_most, judge, near, single, stack
from examples._evidence.training import RATES, descend, potential, recalling, swept

TITLE = "What clipping does for training, and what else would do"
NOTE = """\
A clip keeps one step from going too far. That helps where some batches are unlike the
others, and where a loss is steep without limit; where neither is so, GIoU and the
exponential loss do as well without, and Adam does with some seeds. It does not make a
deep net train whose weights are too large; layer normalization leaves it less to do,
and not nothing. A recurrent net that learned chaos has gradients that explode where it
runs free, and vanish where it is told the truth, as in most trainings. One threshold
does what one for each layer does, a warm-up gains no more with a clip than without, and
at the same training loss nets that were clipped do not generalize better."""

MIKHAEIL = "[Mikhaeil et al., 2022](https://arxiv.org/abs/2110.07238)"
UNITBOX = "[Yu et al., 2016](https://arxiv.org/abs/1608.01471)"


@functools.cache
def digits() -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and labels: 1,200 to learn from, and the others."""
    images, labels = _common.load_digits()
    order = np.random.default_rng(0).permutation(len(labels))
    return [(images[some], labels[some]) for some in np.split(order, [1200])]


def start(key, layers, gain=1.0, width=24):
    """Weights of a ReLU net with so many equal layers, `gain` times those of He."""
    middle = layers, width, width
    shapes = {"first": (64, width), "middle": middle, "last": (width, 10)}
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    parts = jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1])  # compiles once
    return {
        name: gain * math.sqrt(2 / shape[-2]) * part.reshape(shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def scores(params, x, normalized=False):
    """Of images `[n, 64]` those of each digit, `[n, 10]`."""
    norm = jax.nn.standardize if normalized else lambda h: h
    layer = lambda h, w: (jax.nn.relu(norm(h @ w)), None)
    h, _ = layer(x, params["first"])
    return jax.lax.scan(layer, h, params["middle"])[0] @ params["last"]


def entropy(said, labels):
    return optax.softmax_cross_entropy_with_integer_labels(said, labels).mean()


def batch_loss(params, data, key, normalized=False):
    """The entropy on 16 random ones of the data."""
    at = jax.random.randint(key, (16,), 0, len(data[1]))
    images, labels = (jnp.asarray(x)[at] for x in data)
    return entropy(scores(params, images, normalized), labels)


def mistakes(gain, max_norm, rate, key, layers, normalized=False):
    """Share of the other digits that a net gets wrong after 500 steps."""
    learn, (x, y) = digits()
    loss = lambda params, key: batch_loss(params, learn, key, normalized)
    init, draw = jax.random.split(key)
    params, keys = start(init, layers, gain=gain), jax.random.split(draw, 500)
    params = descend(loss, params, keys, max_norm, optax.sgd(rate, 0.9))
    return jnp.mean(scores(params, x, normalized).argmax(-1) != y)


def deep_nets() -> Row:
    """Nets whose gradients explode, by their weights alone."""
    train = lambda gain, rate, key: mistakes(gain, 1.0, rate, key, layers=10)
    sweep = swept(train, (1e-3, 3e-3, 1e-2, 3e-2, 0.1), (1.0, 1.5, 2.0), 4)
    more = lambda gain: sweep.best(gain) - sweep.best(1.0)
    return judge(
        "A clip makes deep nets whose gradients explode train stably.",
        "A ReLU net of 12 layers on digits, weights of He, and 1.5 and 2 times as "
        "large, momentum 0.9, c = 1, each at its best rate of 10⁻³ to 0.1: share of "
        "other digits that is wrong, and by how much that is more with the larger.",
        [at_most(sweep.best(1.0), 0.3, label="He"),
         at_most(more(1.5), 0.1, label="1.5 times"),
         at_most(more(2.0), 0.1, label="twice")],
    )  # fmt: skip


def normalized_rates() -> Row:
    """How much larger a rate may be with a clip, with and without layer norm."""
    sweeps = swept(
        lambda limit, rate, key: [
            mistakes(1.4, limit, rate, key, 8, norm) for norm in (False, True)
        ],
        [2.0**power for power in range(-9, -1)], (1.0, math.inf), 5,
    )  # fmt: skip
    most = lambda sweep, limit: sweep.largest(limit, 0.5, np.median)
    plain, normalized = (most(s, 1.0) / most(s, math.inf) for s in sweeps)
    return judge(
        "Layer normalization reduces the need for a clip.",
        "A ReLU net of 10 layers on digits, weights 1.4 times those of He: largest "
        "rate at which the median of five seeds gets half of other digits right, with "
        "c = 1 over that without; this without normalization over with; and with it.",
        [at_least(plain / normalized, 2.0, label="without over with")],
        [at_most(normalized, 1.0, label="with")],
    )


def taught():
    """Log growth a step of the gradients of a net that learned the logistic map.

    `[seeds]`, with its own outputs as inputs, and with the true ones.
    """
    units, length = 16, 30

    def series(x, length):
        return jax.lax.scan(lambda x, _: (1 - 2 * x * x,) * 2, x, None, length)[1]

    def cell(params, h, x):
        return jnp.tanh(h @ params["w"] + x * params["u"] + params["b"])

    def follow(params, xs):
        step = lambda h, x: (cell(params, h, x),) * 2
        return jax.lax.scan(step, jnp.zeros(units), xs)[1]

    def loss(params, key):
        def one(x):
            xs = series(x, length + 1)
            said = follow(params, xs[:-1]) @ params["v"]
            return jnp.mean((said - xs[1:])[5:] ** 2)

        starts = jax.random.uniform(key, (16,), minval=-1.0)
        return jax.vmap(one)(starts).mean()

    def growths(params, x):
        xs = series(x, 3 * length)
        h = follow(params, xs[:length])[-1]
        out = lambda h: h @ params["v"]

        def growth(step):
            flow = diagnose.recurrent_flow(step, lambda h: out(h[-1]), h, xs[length:])
            return flow.growth

        own = growth(lambda h, _: cell(params, h, out(h)))
        return own, growth(lambda h, x: cell(params, h, x))

    def run(key):
        w, u, v, draw = jax.random.split(key, 4)
        params = {
            "w": jax.random.normal(w, (units, units)) / units**0.5,
            "u": jax.random.normal(u, (units,)), "b": jnp.zeros(units),
            "v": jax.random.normal(v, (units,)) / units**0.5,
        }  # fmt: skip
        rule = optax.adam(optax.cosine_decay_schedule(3e-3, 1500))
        params = descend(loss, params, jax.random.split(draw, 1500), 1.0, rule)
        found = jax.vmap(growths, (None, 0))(params, jnp.linspace(-0.9, 0.9, 16))
        return jax.tree.map(jnp.mean, found)

    return jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 5))


def taught_chaos() -> Row:
    """The logistic map, by a net that runs free, and by one that is told the truth."""
    own, true = taught()
    return judge(
        "To teach a recurrent net a chaotic process makes it chaotic, and the "
        "gradients of its training explode.",
        "16 tanh units that learn to continue x ← 1 − 2x², whose Lyapunov exponent is "
        "log 2; log growth a step of gradients over 60 steps: of the net running free "
        "on its own outputs, where it is its exponent; and as it was trained, with the "
        "true inputs.",
        [near(own, math.log(2), 0.35, label="own outputs")],
        [at_least(true, 0.1, label="true inputs")],
        source=MIKHAEIL,
    )


def together() -> Row:
    """A clip and a warm-up of Adam, on the LSTM that reads text."""
    seeds = 5
    bits, params, passages, test = lessons(seeds)

    def run(max_norm, steps, rate, passages, params):
        rule = optax.adam(lambda k: rate * jnp.minimum(1.0, (k + 1) / steps))
        return bits(descend(bits, params, passages, max_norm, rule), test)

    over = [(None,) * 3 + (0, 0), (None, None, 0, None, None),
            (None, 0) + (None,) * 3, (0,) + (None,) * 4]  # fmt: skip
    every = jax.jit(functools.reduce(jax.vmap, over, run))
    cases = single((math.inf, 0.3)), single((1, 20)), single((0.01, 0.03, 0.1))
    loss = np.asarray(every(*cases, passages[0], params), np.float64)
    none, warm, clip, both = (min(rows, key=np.mean)
                              for rows in loss.reshape(4, 3, seeds))  # fmt: skip
    return judge(
        "A clip and a warm-up of the learning rate help each other.",
        "An LSTM of 24 units reads text, Adam, 200 steps, c = 0.3, a warm-up of 20, "
        "each case at its best rate of 0.01 to 0.1: bits per character by which both "
        "gain more than the sum of what each gains alone.",
        [at_least(warm + clip - both - none, 0.0)],
    )


def spoil(weights, key):
    """The same, but for gradients 100 times as large in one case of 20."""
    fixed = jax.lax.stop_gradient(weights)
    times = jnp.where(jax.random.bernoulli(key, 0.05), 100.0, 1.0)
    return fixed + times * (weights - fixed)


def by_layer():
    """Loss of other digits `[seeds]` with a global clip, over that with one a layer.

    Either at its best rate and threshold; where gradients are spoiled, and not.
    """
    learn, (x, y) = digits()

    def loss(spoiled, params, key):
        if spoiled:
            wrong = spoil(params["first"], jax.random.fold_in(key, 1))
            params = params | {"first": wrong}
        return batch_loss(params, learn, key)

    def train(limit, rate, key):
        init, draw = jax.random.split(key)
        params, keys = start(init, 1), jax.random.split(draw, 200)

        def left(spoiled, groups):
            clip = clipfx.clip_per_layer(limit, groups=groups)
            rule = optax.chain(clip, optax.sgd(rate, 0.9))
            own = functools.partial(loss, spoiled)
            end = descend(own, params, keys, math.inf, rule)
            return entropy(scores(end, x), y)

        return [left(spoiled, g) for spoiled in (1, 0) for g in ("global", "leaf")]

    sweeps = swept(train, (0.03, 0.1, 0.3), (0.1, 0.3, 1.0), 6)
    spoiled, spoiled_each, clean, clean_each = map(least, sweeps)
    return spoiled / spoiled_each, clean / clean_each


def least(sweep):
    """`[seeds]`, at the rate and the finite threshold whose mean is least."""
    return min(map(sweep.best, filter(math.isfinite, sweep.limits)), key=np.mean)


def per_layer() -> Row:
    """One bound for all layers, and one for each."""
    spoiled, clean = by_layer()
    return judge(
        "One threshold for the whole gradient is not enough, each layer must have its "
        "own.",
        "A ReLU net of three layers on digits, momentum 0.9, the gradient of the first "
        "100 times as large in one batch of 20: loss of other digits with one clip "
        "over that with one for each layer, both at their best rate and threshold; and "
        "the same where nothing is spoiled.",
        [at_least(spoiled, 1.2, label="spoiled")],
        [at_least(clean, 1.2, label="clean")],
    )


def adam_clip() -> Row:
    """Adam on the recurrent net of `rnn`."""
    trains = [recalling(optax.adam, spoiled) for spoiled in (0.05, 0.0)]
    every = lambda *run: [train(*run) for train in trains]
    sweeps = swept(every, RATES, (1e-2, 1.0, math.inf), 6)
    spoiled, clean = (sweep.best(math.inf) / least(sweep) for sweep in sweeps)
    return judge(
        "With Adam a clip is not redundant.",
        "The net that recalls the first of 25 inputs, rates 10⁻⁴ to 1, c = 0.01 and "
        "1; best loss without a clip over best with: one batch in 20 asks for 100 "
        "times the input; and none does.",
        [at_least(spoiled, 1.5, label="spoiled")],
        [at_least(clean, 1.5, label="clean")],
    )


def gained(score, kinds, rates, each):
    """What a clip adds to `score(kind, method, rate, seed)`, `[seeds]` for each kind.

    Either at the rate whose worst seed is best.
    """

    def run(rate, own):
        return [[score(kind, method, rate, own) for method in ("none", "global")]
                for kind in kinds]  # fmt: skip

    every = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))
    found = np.asarray(every(single(rates), each), np.float64)
    best = [[rows[rows.min(1).argmax()] for rows in pair] for pair in found]
    return [clipped - free for free, clipped in best]


def box_loss() -> Row:
    """Boxes around digits."""
    settings = boxes.Settings(width=24, steps=250, batch=16, images=900)
    data = boxes.make_data(settings, 0)

    def overlap(loss, method, rate, key):
        kind = {"loss": loss, "method": method, "settings": settings}
        return boxes.train(data, rate, key, **kind)["iou"].mean()

    rates, keys = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), jax.random.split(jax.random.key(0), 4)
    log, giou = gained(overlap, ("log", "giou"), rates, keys)
    return judge(
        "With losses of the overlap of boxes a clip is essential.",
        "A small net frames digits, 250 steps: mean IoU of other images with c = 1 "
        "less that without, each at the rate whose worst seed is best, with −log IoU; "
        "and with GIoU.",
        [at_least(log, 0.05, label="−log IoU")],
        [at_least(giou, 0.05, label="GIoU")],
        source=UNITBOX,
    )


def exponential() -> Row:
    """Tumours, with and without wrong labels."""
    table = boosting_loss.load_table(None, None)
    usual = boosting_loss.Settings(steps=500)
    kinds = usual, dataclasses.replace(usual, wrong=0.0, spoiled=0.0)

    def accuracy(kind, method, rate, own):
        data, key = own
        how = {"loss": "exponential", "method": method, "settings": usual}
        return boosting_loss.train(data[kind], rate, key, **how)["accuracy"]

    rows = [[boosting_loss.split(*table, kind, seed) for kind in kinds]
            for seed in range(5)]  # fmt: skip
    each = stack(rows), jax.random.split(jax.random.key(0), 5)
    rates = 1e-5, 1e-4, 1e-3, 1e-2, 0.1
    spoiled, clean = gained(accuracy, (0, 1), rates, each)
    return judge(
        "A clip is valuable with the exponential loss.",
        "A small net on tumours, one label in ten wrong and one row in fifty in a "
        "wrong unit: accuracy on clean others with c = 1 less that without, each at "
        "the rate whose worst seed is best; and the same with clean rows.",
        [at_least(spoiled, 0.02, label="spoiled")],
        [at_least(clean, 0.02, label="clean")],
    )


def close_contacts() -> Row:
    """The wall of the potential of `repulsion`, which that leaves out."""
    sweeps = [potential(adam)["near"] for adam in (False, True)]
    momentum, adam = (sweep.best(1.0) for sweep in sweeps)
    return judge(
        "With a clip a net learns the forces of close pairs too, however steep.",
        "The Lennard-Jones net with c = 1 and momentum 0.9: squared error at distances "
        "0.8 to 0.95, over that of guessing 0, at the rate that is best there; and "
        "with Adam.",
        [at_most(momentum, 0.5, label="momentum")],
        [at_most(adam, 0.5, label="Adam")],
    )


def overfit():
    """By how much other digits' loss is above that of 100, once that is 0.1."""
    learn, (x, y) = digits()

    def train(limit, rate, key):
        init, draw, choose = jax.random.split(key, 3)
        mine = jax.random.permutation(choose, len(learn[1]))[:100]
        own = tuple(jnp.asarray(x)[mine] for x in learn)
        loss = lambda params, key: batch_loss(params, own, key)

        def ten_steps(params, keys):
            params = descend(loss, params, keys, limit, optax.sgd(rate))
            said = lambda x, y: entropy(scores(params, x), y)
            return params, (said(*own), said(x, y))

        keys = jax.random.split(draw, (60, 10))
        trained, other = jax.lax.scan(ten_steps, start(init, 1), keys)[1]
        at = jnp.argmax(trained < 0.1)
        return jnp.where(trained[at] < 0.1, other[at] - trained[at], jnp.inf)

    return swept(train, (0.1, 0.3, 1.0), (0.1, math.inf), 6)


def generalizes() -> Row:
    """As well learned, with and without a clip."""
    sweep = overfit()
    return judge(
        "A clip of the gradient makes nets generalize better.",
        "A ReLU net of three layers on 100 digits, until their loss is 0.1: by how "
        "much the loss of other digits is higher, with c = 0.1 over without, each at "
        "its best rate of 0.1 to 1.",
        [at_most(sweep.best(0.1) / sweep.best(math.inf), 0.9)],
    )


CLAIMS = [deep_nets, normalized_rates, taught_chaos, together, per_layer, adam_clip,
          box_loss, exponential, close_contacts, generalizes]  # fmt: skip
