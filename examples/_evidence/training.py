"""Small trainings with and without a clip."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipfx
from clipfx import per_example
from examples._evidence.claims import Row, at_least, at_most, judge, single

TITLE = "Training"
NOTE = """\
With and without a clip these models train at every learning rate of a sweep. At its own
best rate the recurrent net trains without a clip too, and Adam needs none for the steep
forces: what a clip gives is a wide range of rates and thresholds that work. Fair
clipping with ratio 2 changes how two groups approach the optimum, not where it is:
there their contributions are equal and opposite, and no ratio binds. With ratio 1 both
always pull equally hard, and training ends where they cancel."""

PASCANU = "[Pascanu et al., 2013](https://arxiv.org/abs/1211.5063)"


class Sweep(NamedTuple):
    """Final losses, relative to that of a guess.

    Attributes:
      rates: `[R]`, learning rates.
      limits: `[C]`, thresholds.
      loss: `[C, R, seeds]`, infinite for a run that diverged.
    """

    rates: np.ndarray
    limits: np.ndarray
    loss: np.ndarray

    def best(self, limit: float) -> np.ndarray:
        """`[seeds]`, at the rate whose mean over seeds is least."""
        rows = self.loss[list(self.limits).index(limit)]
        return rows[rows.mean(1).argmin()]

    def largest(self, limit: float, below: float, of: Any = np.max) -> float:
        """The largest rate at which every seed, or what `of` says, is below a loss."""
        rows = self.loss[list(self.limits).index(limit)]
        return max((r for r, row in zip(self.rates, rows, strict=True)
                    if of(row) < below), default=0.0)  # fmt: skip


def swept(train, rates, limits, seeds):
    """Every rate with every threshold and seed, in one compiled program.

    Returns:
      A `Sweep` for each loss in the tree that `train(limit, rate, key)` returns.
    """
    grid = np.meshgrid(limits, rates, range(seeds), indexing="ij")
    each = [x.ravel() for x in grid]
    losses = jax.jit(jax.vmap(train))(
        *map(single, each[:2]), jax.vmap(jax.random.key)(each[2])
    )

    def sweep(loss):
        loss = np.asarray(loss, np.float64).reshape(grid[0].shape)
        loss = np.where(np.isfinite(loss), loss, np.inf)
        return Sweep(np.array(rates), np.array(limits), loss)

    return jax.tree.map(sweep, losses)


def descend(loss, params, keys, max_norm, rule):
    """Parameters after a training on `loss(params, key)`, a fresh batch each step."""
    tx = optax.chain(clipfx.clip_by_global_norm(max_norm), rule)

    def step(carry, key):
        params, state = carry
        update, state = tx.update(jax.grad(loss)(params, key), state, params)
        return (optax.apply_updates(params, update), state), None

    return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]


RATES = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
LIMITS = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, math.inf)


def recalling(rule, spoiled: float = 0.0, steps: int = 400):
    """A training of a recurrent net to give its first input after 25 steps of noise.

    Args:
      rule: From a rate to an optimizer.
      spoiled: Share of the batches that ask for 100 times that input.
      steps: Of training.

    Returns:
      From threshold, rate and key to the loss, of 1 for a guess, with none spoiled.
    """
    width, length, batch = 16, 25, 16

    def sample(key, spoiled):
        first, noise = jax.random.split(key)
        value = jax.random.uniform(first, (batch,), minval=-1.0)
        xs = 0.1 * jax.random.normal(noise, (length, batch))
        asked = value
        if spoiled:
            bad = jax.random.bernoulli(jax.random.fold_in(key, 2), spoiled)
            asked = jnp.where(bad, 100 * value, value)
        return xs.at[0].set(value), asked

    def loss(params, key, spoiled=spoiled):
        xs, value = sample(key, spoiled)

        def cell(h, x):
            return jnp.tanh(h @ params["w"] + x[:, None] * params["u"][None]), None

        h, _ = jax.lax.scan(cell, jnp.zeros((batch, width)), xs)
        return jnp.mean((h @ params["v"] - value) ** 2) * 3  # 1 for a guess of 0

    def train(max_norm, rate, key):
        w, u, v, draw = jax.random.split(key, 4)
        turn = jnp.linalg.qr(jax.random.normal(w, (width, width)))[0]
        params = {
            "w": 1.3 * turn,
            "u": jax.random.normal(u, (width,)),
            "v": 0.3 * jax.random.normal(v, (width,)),
        }
        keys = jax.random.split(draw, steps + 8)
        params = descend(loss, params, keys[:-8], max_norm, rule(rate))
        return jnp.mean(jax.vmap(lambda key: loss(params, key, 0.0))(keys[-8:]))

    return train


@functools.cache
def recall() -> Sweep:
    """Gradient descent on that."""
    return swept(recalling(optax.sgd), RATES, LIMITS, 3)


def rnn() -> Row:
    """The best rate of either, and how many rates there are."""
    sweep = recall()
    free, clipped = sweep.best(math.inf), sweep.best(0.1)
    at = sweep.loss[LIMITS.index(0.1)].mean(1).argmin()
    return judge(
        "Recurrent nets whose gradients explode train with a clip; without one some "
        "batches destroy what was learned.",
        "Give the first of 25 inputs, 16 tanh units, W of norm 1.3, rates 10⁻⁴ to 1; "
        "loss, of 1 for a guess: best with c = 0.1; at that rate without; and best "
        "without over best with.",
        [at_most(clipped, 0.5, label="clipped"),
         at_least(sweep.loss[-1, at], 1.0, label="without")],
        [at_least(free / clipped, 1.5, label="best over best")],
        source=PASCANU,
    )  # fmt: skip


def rates() -> Row:
    """How large the learning rate may be."""
    sweep = recall()
    return judge(
        "A clip allows larger learning rates.",
        "The same; largest rate at which all seeds reach half the loss of a guess, "
        "over that without a clip.",
        [at_least(sweep.largest(0.1, 0.5) / sweep.largest(math.inf, 0.5), 10.0)],
    )


def zone() -> Row:
    """Thresholds of seven orders of magnitude, at one rate, and at their own."""
    sweep = recall()
    at = list(sweep.rates).index(0.1)
    loss = dict(zip(LIMITS, sweep.loss[:, at], strict=True))
    return judge(
        "There is a range of good thresholds: too high a threshold is no clip, too low "
        "a one stalls training.",
        "The same at rate 0.1: loss at c = 10 and c = 0.001, over that at c = 0.1; and "
        "at c = 0.01 with its own best rate.",
        [at_least(loss[10.0] / loss[0.1], 1.5, label="10"),
         at_least(loss[1e-3] / loss[0.1], 1.5, label="0.001")],
        [at_least(sweep.best(1e-2) / loss[0.1], 1.5, label="0.01, own rate")],
    )  # fmt: skip


@functools.cache
def potential(adam: bool, steps: int = 1000, seeds: int = 3) -> dict[str, Sweep]:
    """Forces of two atoms, by the gradient of a small net's energy.

    Errors at distances on the wall, `near`, and beyond it, `far`.
    """

    def force(r):  # of the Lennard-Jones potential, 1 deep at 1
        return 12 * (r**-13.0 - r**-7.0)

    def model(params, r):
        h = jnp.tanh(r * params["a"] + params["b"])
        return jnp.tanh(h @ params["c"] + params["d"]) @ params["e"]

    def loss_at(params, r):
        found = -jax.vmap(jax.grad(lambda r: model(params, r)))(r)
        return jnp.mean((found - force(r)) ** 2)

    def loss(params, key):
        return loss_at(params, jax.random.uniform(key, (32,), minval=0.8, maxval=2.5))

    def train(max_norm, rate, key):
        a, b, c, e, draw = jax.random.split(key, 5)
        params = {
            "a": 2 * jax.random.normal(a, (16,)), "b": jax.random.normal(b, (16,)),
            "c": jax.random.normal(c, (16, 16)) / 4, "d": jnp.zeros(16),
            "e": jax.random.normal(e, (16,)) / 4,
        }  # fmt: skip
        rule = optax.adam(rate) if adam else optax.sgd(rate, 0.9)
        params = descend(loss, params, jax.random.split(draw, steps), max_norm, rule)
        at = {"near": jnp.linspace(0.8, 0.95, 64), "far": jnp.linspace(0.95, 2.5, 64)}
        # A guess of 0 has 1.
        return {k: loss_at(params, r) / jnp.mean(force(r) ** 2) for k, r in at.items()}

    rates = (1e-5, 1e-4, 1e-3, 1e-2, 0.1)
    return swept(train, rates, (1.0, math.inf), seeds)


def repulsion() -> Row:
    """A steep wall, met by some batches."""
    sweep, adam = (potential(adam)["far"] for adam in (False, True))
    free, clipped = sweep.best(math.inf), sweep.best(1.0)
    at = sweep.loss[0].mean(1).argmin()
    return judge(
        "Nets that learn the forces between atoms need a clip: close pairs repel so "
        "steeply that their gradients make training diverge.",
        "Lennard-Jones forces at distances 0.8 to 2.5, 32 tanh units, momentum 0.9; "
        "error beyond the wall, of 1 for a guess of 0: without a clip at the rate "
        "that is best with c = 1; best without over best with, and the same with "
        "Adam.",
        [at_least(sweep.loss[1, at], 0.9, label="same rate"),
         at_least(free / clipped, 1.5, label="best over best")],
        [at_least(adam.best(math.inf) / adam.best(1.0), 1.5, label="Adam")],
    )  # fmt: skip


def _groups(seed, number):
    """Two groups of 9 in 10 and 1 in 10, whose labels follow lines 60° apart."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(number, 3))
    group = np.int32(np.arange(number) >= 0.9 * number)
    turned = np.where(group, math.pi / 3, 0.0)
    side = x[:, 0] * np.cos(turned) + x[:, 1] * np.sin(turned)
    y = single(side + 0.3 * rng.normal(size=number) > 0)
    return single(x), y, group


@functools.cache
def fair_runs(ratio: float, seeds: int = 5) -> dict[str, np.ndarray]:
    """Accuracies `[seeds, 2]`, of all and of majority less minority.

    After 10 and after 300 steps of full batches.
    """

    def loss(w, example):
        x, y = example
        return optax.sigmoid_binary_cross_entropy(jnp.vdot(w, x), y)

    @jax.jit
    def train(x, y, group):
        grad = per_example.fair_grad(loss, 2, ratio)

        def step(w, _):
            g, _ = grad(w, (x, y), population_ids=group)
            return w - g / len(x), w

        return jax.lax.scan(step, jnp.zeros(3), None, length=301)[1]

    found = {"early": [], "late": []}
    for seed in range(seeds):
        data, (x, y, group) = _groups(seed, 500), _groups(100 + seed, 5000)
        path = np.asarray(train(*data))
        for name, w in (("early", path[10]), ("late", path[300])):
            hit = (x @ w > 0) == (y > 0)
            gap = hit[group == 0].mean() - hit[group == 1].mean()
            found[name].append([hit.mean(), gap])
    return {name: np.array(rows) for name, rows in found.items()}


def fair() -> Row:
    """Early in training, and at its end."""
    plain, fair, even = (fair_runs(ratio) for ratio in (math.inf, 2.0, 1.0))
    gap = lambda runs, when: runs[when][:, 1] / plain[when][:, 1]
    lost = lambda runs, when: plain[when][:, 0] - runs[when][:, 0]
    return judge(
        "Fair clipping narrows the gap between groups by far, at a small cost in "
        "overall accuracy.",
        "Logistic regression, 450 and 50 examples, whose labels follow lines 60° "
        "apart: gap of accuracy over that without, after 10 and 300 steps; accuracy "
        "lost; and the gap if groups may not differ, ratio 1.",
        [at_most(gap(fair, "early"), 0.7, label="gap, 10"),
         at_most(lost(fair, "early"), 0.05, label="lost, 10"),
         at_most(gap(fair, "late"), 0.7, label="gap, 300")],
        [at_most(gap(even, "late"), 0.7, label="gap, 300, ratio 1")],
    )  # fmt: skip


def fair_ratio() -> Row:
    """Four ratios, early and late."""
    runs = {ratio: fair_runs(ratio) for ratio in (1.0, 2.0, 5.0, math.inf)}

    def rises(when, what):
        """The least rise of a mean from one ratio to the next."""
        return np.diff([run[when][:, what].mean() for run in runs.values()]).min()

    return judge(
        "The larger the ratio that a fair clip allows, the larger the gap between "
        "groups, and the accuracy over all.",
        "The same, ratios 1, 2, 5 and ∞, means over seeds: least rise from one to the "
        "next, of the gap and of the accuracy, after 10 and 300 steps.",
        [at_least(rises("early", 1), 0.0, label="gap, 10"),
         at_least(rises("early", 0), 0.0, label="accuracy, 10"),
         at_least(rises("late", 1), 0.0, label="gap, 300"),
         at_least(rises("late", 0), 0.0, label="accuracy, 300")],
    )  # fmt: skip


def norms_of_runs(seeds: int = 3, steps: int = 1500) -> np.ndarray:
    """Norms `[seeds, steps]` of the gradient of a classifier of two noisy spirals."""

    def loss(params, key):
        pick, noise, label = jax.random.split(key, 3)
        y = jax.random.bernoulli(label, shape=(32,)).astype(jnp.float32)
        t = 6 * jax.random.uniform(pick, (32,)) + 0.5
        angle = t + math.pi * y
        x = jnp.stack([t * jnp.cos(angle), t * jnp.sin(angle)], 1) / 3
        x += 0.1 * jax.random.normal(noise, x.shape)
        h = jnp.tanh(x @ params["a"] + params["b"][None])
        return optax.sigmoid_binary_cross_entropy(h @ params["c"], y).mean()

    @jax.jit
    def run(key):
        a, c, draw = jax.random.split(key, 3)
        params = {
            "a": jax.random.normal(a, (2, 32)), "b": jnp.zeros(32),
            "c": jax.random.normal(c, (32,)) / 6,
        }  # fmt: skip
        tx = optax.chain(clipfx.record_norms(steps), optax.adam(0.01))

        def step(carry, key):
            params, state = carry
            update, state = tx.update(jax.grad(loss)(params, key), state, params)
            return (optax.apply_updates(params, update), state), None

        keys = jax.random.split(draw, steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][1]

    found = (clipfx.calibrate.history(run(jax.random.key(k))) for k in range(seeds))
    return np.stack([np.ravel(next(iter(norms.values()))) for norms in found])


def typical() -> Row:
    """A threshold from the first steps, on the steps that follow."""
    early, late = [], []
    for norms in norms_of_runs():
        limit = 1.1 * np.quantile(norms[:100], 0.95)
        early.append(np.mean(norms[100:200] > limit))
        late.append(np.mean(norms[-500:] > limit))
    return judge(
        "A threshold slightly above the norms of a short run clips exceptional steps "
        "alone.",
        "A small classifier, Adam, threshold 1.1 times the 95th percentile of the "
        "first 100 norms: share of the next 100 steps clipped, and of the last 500 of "
        "1,500.",
        [at_most(early, 0.1, label="next")],
        [at_most(late, 0.1, label="last")],
    )


CLAIMS = [rnn, rates, zone, repulsion, typical, fair, fair_ratio]
