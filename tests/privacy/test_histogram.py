"""Thresholds from a noised histogram: the rule, what it costs, what it sees."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sentences import raises_one_sentence
from trees import enable_x64

from clipfx import privacy

KEY = jax.random.key(5)
EDGES = (1.0, 2.0, 3.0, 5.0, 8.0, 10.0)
FINE = np.geomspace(0.1, 10, 21)


def make(max_norm=1.0, edges=EDGES, count_stddev=5.0, **settings):
    return privacy.histogram_threshold(
        max_norm, edges=edges, count_stddev=count_stddev, **settings
    )


def expected_error(noise, edges, share):
    """Of each edge as the threshold, in float64."""
    clipped = [sum(p * max(n - c, 0) ** 2 for p, n in zip(share, edges, strict=True))
               for c in edges]  # fmt: skip
    return noise * np.square(np.float64(edges)) + clipped


def choose(average, edges, noise, quantile=None):
    """The rule for one group, in float64, written from the paper."""
    share = np.maximum(average, 0)
    share = share / share.sum()
    if quantile is None:
        return edges[int(np.argmin(expected_error(noise, edges, share)))]
    reached = np.cumsum(share) >= quantile - 1e-12
    return edges[int(np.argmax(reached))]


def after(rule, counts, noise=0.25, steps=1):
    """The threshold of one group behind some steps with the same counts."""
    state = rule.init(jnp.ones(1))
    for _ in range(steps):
        state = rule.update(state, jnp.float32(counts), 20.0, jnp.float32([noise]))
    return float(rule.limit(jnp.ones(1), state, jnp.float32(counts))[0, 0])


def loss(w, x):  # its gradient is the example
    return jnp.vdot(w, x)


def dp(rule, noise_multiplier=1.0, size=20, **settings):
    return privacy.dp_grad(
        settings.pop("fun", loss), max_norm=rule, noise_multiplier=noise_multiplier,
        expected_batch_size=size, key=KEY, **settings,
    )  # fmt: skip


# ----------------------------------------------------------------------- the rule


def test_golden_values():
    """Norms 1, 2, 3, 10, noise of multiplier 1 on 100 parameters, a batch of 20."""
    counts, noise = [1, 1, 1, 0, 0, 1], 100 / 20**2
    errors = expected_error(noise, EDGES, np.divide(counts, 4))
    np.testing.assert_allclose(errors, [21.75, 17.25, 14.5, 12.5, 17.0, 25.0])
    assert after(make(decay=0.0), counts, noise) == 5
    assert after(make(decay=0.9), counts, noise, steps=3) == 5
    assert after(make(), counts, 0.0) == 10  # the least that clips nothing
    assert after(make(), [1, 1, 1, 0, 0, 0], 0.0) == 3
    assert after(make(), counts, 1e6) == 1
    for share, edge in ((0, 1), (0.25, 1), (0.26, 2), (0.75, 3), (0.76, 10), (1, 10)):
        assert after(make(quantile=share), counts) == edge


def test_follows_the_paper():
    """With counts below zero, averages over steps, and groups with noise each."""
    rng = np.random.default_rng(0)
    for decay, quantile in ((0.0, None), (0.7, None), (0.7, 0.6)):
        rule = make(np.ones(2), FINE, quantile=quantile, decay=decay)
        update = jax.jit(lambda *args, rule=rule: rule.update(*args[:2], 30.0, args[2]))
        state, average, seen = rule.init(jnp.ones(2)), np.zeros((2, 21)), set()
        for _ in range(60):
            counts = np.float32(rng.poisson(4, (2, 21)) + 5 * rng.normal(size=(2, 21)))
            noise = np.float32(np.exp(3 * rng.normal(size=2)))
            state = update(state, counts.ravel(), noise)
            average = decay * average + (1 - decay) * np.float64(counts)
            right = [choose(h, FINE, a, quantile)
                     for h, a in zip(average, noise, strict=True)]  # fmt: skip
            np.testing.assert_allclose(state[0], right, rtol=1e-6)
            seen |= {*right}
        assert len(seen) > 3


def test_choice_has_no_scale_and_stays_where_nothing_was_counted():
    counts = [3, 1, 4, 1, 5, 2]
    for scale in (2.0**-90, 2.0**90):  # squares of which leave float32
        edges = scale * np.array(EDGES)
        assert after(make(edges=edges), counts) == scale * after(make(), counts)
    for counts in (np.zeros(6), np.full(6, -2.0)):
        assert after(make(), counts, steps=2) == 1
        state = (jnp.float32([3.0]), jnp.zeros((1, 6)))
        state = make().update(state, jnp.float32(counts), 20.0, jnp.ones(1))
        assert state[0].tolist() == [3]


def test_threshold_goes_to_the_least_error():
    """On norms of one distribution, whose histogram the rule sees with noise."""
    size, d, steps = 256, 10_000, 300
    rule, z = make(0.1, FINE, count_stddev=5.0), 1.0206
    norms = np.exp(0.7 * np.random.default_rng(0).normal(size=(steps, size)))
    noise = z**2 * d / size**2

    def step(state, given):
        norm, key = given
        counts = rule.ask(state, norm[:, None], None).sum(0)
        counts += 5.0 * jax.random.normal(key, counts.shape)
        state = rule.update(state, counts, size, jnp.float32([noise]))
        return state, state[0][0]

    keys = jax.random.split(KEY, steps)
    start = rule.init(jnp.float32([0.1]))
    _, seen = jax.lax.scan(step, start, (jnp.float32(norms), keys))
    error = lambda c: noise * c**2 + np.square(np.maximum(norms - c, 0)).mean()
    errors = np.array([error(c) for c in FINE])
    late = np.float64(seen[50:])
    best = FINE[errors.argmin()]
    assert 0.5 < best < 5
    assert np.abs(np.log(late / best)).max() < 3.5 * math.log(FINE[1] / FINE[0])
    assert np.mean([error(c) for c in late]) < 1.05 * errors.min()


# ----------------------------------------------------------------- what is counted


def test_every_norm_is_in_one_bin():
    """So one example more or less moves the counts by 1 for each group."""
    norms = [0, 1e-30, 1, 1.001, 2, 2.5, 5, 8.001, 10, 1e4, 3.4e38]
    places = [0, 0, 0, 1, 1, 2, 3, 5, 5, 5, 5]
    rule = make()
    found = rule.ask(None, jnp.float32(norms)[:, None], None)
    np.testing.assert_array_equal(found, np.eye(6)[places])
    both = rule.ask(None, jnp.stack([jnp.float32(norms)] * 2, 1), None)
    np.testing.assert_array_equal(both, np.tile(found, 2))
    assert np.linalg.norm(found, axis=1).tolist() == [rule.reach(1)] * 11
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), rule.reach(2))


def test_steps_use_what_was_released_before():
    """Thresholds, noise and counts of each step, resumed, and under x64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 12, 100)) / 10 * np.exp(rng.normal(size=(5, 12, 1)))
    x = np.float32(x)
    x[1, 4], x[2, 3] = np.nan, np.inf
    where = np.arange(12) < np.array([9, 9, 9, 0, 12])[:, None]
    grad = dp(make(0.7, FINE))
    own = grad.gradient_noise_multiplier()
    params = jnp.zeros(100)

    def run(state, *given):
        step = lambda state, given: (
            (new := grad(state, params, given[0], where=given[1])[1]), new)  # fmt: skip
        return jax.lax.scan(step, state, given)

    for x64 in (False, True):
        with enable_x64(x64):
            state = grad.init(params)
            last, states = jax.jit(run)(state, x, where)
            chex.assert_trees_all_equal_shapes_and_dtypes(last, state)
    half, _ = run(grad.init(params), x[:2], where[:2])
    resumed, _ = run(jax.tree.map(jnp.asarray, jax.device_get(half)), x[2:], where[2:])
    chex.assert_trees_all_close(resumed, last, rtol=1e-6)
    average, right = np.zeros(21), np.float32(0.7)
    for t, counts in enumerate(np.float64(states.counts)):
        assert float(states.threshold[t, 0]) == pytest.approx(right, rel=1e-6)
        assert float(states.stddev[t, 0]) == pytest.approx(own * right, rel=1e-6)
        average = 0.9 * average + 0.1 * counts
        right = choose(average, FINE, own**2 * 100 / 20**2)
    assert len(np.unique(states.threshold)) > 2
    assert right == pytest.approx(float(last.rule[0][0]), rel=1e-6)
    # Without noise: nobody who is padding or not finite.
    _, seen = jax.lax.scan(
        lambda state, given: ((new := dp(make(0.7, FINE), 0.0)(
            state, params, given[0], where=given[1])[1]), new.counts),
        dp(make(0.7, FINE), 0.0).init(params), (x, where))  # fmt: skip
    norms = np.linalg.norm(np.float64(x), axis=-1)
    for t in range(5):
        kept = norms[t][where[t] & np.isfinite(norms[t])]
        places = np.minimum(np.searchsorted(np.float32(FINE), kept), 20)
        np.testing.assert_array_equal(seen[t], np.bincount(places, minlength=21))


# ------------------------------------------------------------------------ the cost


def test_costs_what_the_multiplier_says():
    """Against the composition of two Gaussian releases, in closed form."""
    z, z_h, steps, delta = 1.0, 5.0, 3, 1e-5
    grad = dp(make(count_stddev=z_h), z)
    own = grad.gradient_noise_multiplier()
    assert own == pytest.approx(1.0206207, abs=1e-7)
    mu = math.sqrt(steps) * math.hypot(1 / own, 1 / z_h)
    spent = privacy.epsilon(grad.event(steps), delta)
    cdf = stats.norm.cdf
    found = cdf(mu / 2 - spent / mu) - math.exp(spent) * cdf(-mu / 2 - spent / mu)
    assert found == pytest.approx(delta, rel=0.01, abs=0)
    for groups in (1, 4):
        own = grad.gradient_noise_multiplier(groups)
        assert own**-2 + groups / z_h**2 == pytest.approx(z**-2)


@pytest.mark.parametrize("allocation", ["global", "equal_budget"])
def test_rule_is_told_the_noise_that_is_drawn(allocation):
    """Of leaves of several groups, stacked layers among them, and complex numbers."""
    params = {
        "a": jnp.zeros((3, 5)),
        "b": jnp.zeros((2, 4)),
        "c": jnp.zeros(6, jnp.complex64),
    }
    whole = lambda p, x: x * sum(jnp.sum(jnp.abs(v) ** 2) for v in p.values())
    groups = {"a": "a/*", "b": "b", "c": "b"}
    limits = {"a/0": 0.5, "a/1": 1.0, "a/2": 2.0, "b": 3.0}
    told = make(limits)._replace(
        init=lambda start: start,
        limit=lambda start, state, counts: start[None],
        update=lambda state, counts, size, noise: noise,
    )
    grad = dp(told, 1.5, size=4, fun=whole, groups=groups, allocation=allocation)
    nobody = functools.partial(grad, where=jnp.zeros(1, bool))
    state = grad.init(params)

    def draw(step):
        found, after, _ = nobody(state._replace(step=step), params, jnp.ones(1))
        square = lambda x: jnp.sum(jnp.abs(x) ** 2)
        return sum(map(square, found.values())), after

    drawn, after = jax.jit(jax.vmap(draw))(jnp.arange(1500))
    noise, limit = np.float64(after.rule[0]), np.float64(after.threshold[0])
    z = grad.gradient_noise_multiplier(4)
    sizes = {"global": np.full(4, 35), "equal_budget": 4 * np.array([5, 5, 5, 20])}
    np.testing.assert_allclose(noise, sizes[allocation] * (z / 4) ** 2, rtol=1e-6)
    spread = drawn.std() / math.sqrt(len(drawn))
    assert abs(drawn.mean() - (noise * limit**2).sum()) < 4 * spread


# ----------------------------------------------------------------------- bad input

ERRORS = [
    (lambda: make(-1.0), ValueError, ">= 0"),
    (lambda: make(edges=1.0), TypeError, "edges must be static"),
    (lambda: make(edges=["1", "2"]), TypeError, "edges must be static"),
    (lambda: make(edges=np.ones((2, 2))), TypeError, "edges must be static"),
    (
        lambda: jax.jit(lambda e: make(edges=e)(0))(jnp.ones(2)),
        TypeError,
        "edges must be static",
    ),
    (lambda: make(edges=()), ValueError, "edges must be static"),
    (lambda: make(edges=(0.0, 1.0)), ValueError, "edges must be static"),
    (lambda: make(edges=(1.0, 1.0)), ValueError, "edges must be static"),
    (lambda: make(edges=(1.0, math.inf)), ValueError, "edges must be static"),
    (lambda: make(edges=(1.0, math.nan)), ValueError, "edges must be static"),
    (lambda: make(edges=(1.0, 1 + 1e-9)), ValueError, "in float32"),
    (lambda: make(count_stddev=0.0), ValueError, "count_stddev"),
    (lambda: make(quantile=1.5), ValueError, "quantile"),
    (lambda: make(decay=1.0), ValueError, "decay"),
    (lambda: dp(make(count_stddev=1.0), 1.0), ValueError, "count_stddev must be above"),
    (lambda: dp(make(), ord=1), ValueError, "ord=1"),
]


@pytest.mark.parametrize("case", ERRORS, ids=range(len(ERRORS)))
def test_bad_input_gets_one_sentence(case):
    raises_one_sentence(case)
