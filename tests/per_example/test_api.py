"""Per-example clipping: what is promised of sums, norms, thresholds, bad examples."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from per_example_oracle import cast, forced, methods
from sentences import raises_one_sentence
from tiers import in_tiers

import clipfx
from clipfx import per_example, responses
from clipfx._core import groups as grouping

B, T, WIDTH, VOCABULARY = 6, 4, 5, 7
LOWERED = 1 - 2.0**-20


def loss(params, example):
    """A little of everything: a look-up, products over time, a scale, a tied head."""
    tokens, weight = example
    x = params["embed"][tokens] + params["layer"]["b"][None]
    x = jnp.tanh(x @ params["layer"]["w"]) * params["scale"][None]
    logits = x @ params["embed"].T
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)
    return -weight * picked.sum()


def draw(dtype=np.float32):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    params = {
        "embed": normal(VOCABULARY, WIDTH),
        "layer": {"b": normal(WIDTH), "w": normal(WIDTH, WIDTH)},
        "scale": normal(WIDTH),
    }
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, (B, T)), jnp.int32)
    return params, (tokens, jnp.linspace(0.1, 2, B).astype(dtype))


PARAMS, BATCH = draw()


def oracle(fun, params, batch, groups="global"):
    """Gradients and norms `[B, G]` of each example, in float64."""
    grads = jax.jit(jax.vmap(jax.grad(fun), (None, 0)))(params, batch)
    members = grouping.group_leaves(groups, params)
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(grads)]
    squares = np.zeros((len(leaves[0]), len(members.names)))
    for x, group in zip(leaves, members.index, strict=True):
        squares[:, group] += (x**2).reshape(len(x), -1).sum(1)
    return leaves, np.sqrt(squares), members.index


def assert_sum(got, leaves, factor, index, tolerance=1e-5):
    for x, y, group in zip(jax.tree.leaves(got), leaves, index, strict=True):
        want = np.tensordot(factor[:, group], y, 1)
        np.testing.assert_allclose(x, want, atol=tolerance * max(np.abs(want).max(), 1))


@pytest.mark.parametrize("groups", in_tiers(["global", "layer", "leaf"], {"layer"}))
@pytest.mark.parametrize("microbatch", in_tiers([None, 2, 4], {2}))
def test_sum_norms_and_factors(groups, microbatch):
    grad = jax.jit(
        per_example.clipped_grad(loss, 1.5, groups=groups, microbatch_size=microbatch)
    )
    sums, info = grad(PARAMS, BATCH)
    leaves, norms, index = oracle(loss, PARAMS, BATCH, groups)
    factor = np.minimum(1, 1.5 * LOWERED / norms)
    assert 0 < (factor < 1).mean() < 1
    np.testing.assert_allclose(info.norm, norms, rtol=1e-5)
    np.testing.assert_allclose(info.factor, factor, rtol=1e-5)
    value = jax.vmap(loss, (None, 0))(PARAMS, BATCH)
    np.testing.assert_allclose(info.value, value, rtol=1e-6)
    assert_sum(sums, leaves, factor, index)


def test_thresholds_of_every_shape():
    grad = jax.jit(per_example.clipped_grad(loss, 1.0, groups="layer"))
    _, norms, _ = oracle(loss, PARAMS, BATCH, "layer")
    by_group = np.array([0.5, 2.0], np.float32)
    by_example = np.linspace(0.1, 3, B).astype(np.float32)
    both = by_example[:, None] * by_group
    names = grouping.group_leaves("layer", PARAMS).names
    for given, limit in [
        (0.7, 0.7),
        (by_group, by_group),
        (dict(zip(names, by_group.tolist(), strict=True)), by_group),
        (both, both),
        (by_example[:, None], by_example[:, None]),
        (math.inf, math.inf),
        (0.0, 0.0),
    ]:
        _, info = grad(PARAMS, BATCH, max_norm=given)
        want = np.minimum(1, limit * LOWERED / norms)
        np.testing.assert_allclose(info.factor, want, rtol=1e-5)


@pytest.mark.parametrize("bad", in_tiers([math.nan, math.inf], {math.inf}))
@pytest.mark.parametrize("microbatch", in_tiers([None, 2], {2}))
def test_an_example_that_is_not_finite_contributes_zero(bad, microbatch):
    grad = jax.jit(per_example.clipped_grad(loss, 1.5, microbatch_size=microbatch))
    tokens, weight = BATCH
    sums, info = grad(PARAMS, (tokens, weight.at[2].set(bad)))
    keep = jnp.arange(B) != 2
    want, _ = grad(PARAMS, BATCH, where=keep)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6)
    jax.tree.map(close, sums, want)
    assert not np.isfinite(info.norm[2]).any()
    assert (info.factor[2] == 0).all()
    assert (info.factor[keep] > 0).all()


def looped(p, example):
    x, scale = example
    step = lambda c, row: (jnp.tanh(c @ p["w"] + row), None)
    return scale * jax.lax.scan(step, x[0], x)[0].sum()


def rematerialized(p, example):
    x, scale = example
    return scale * jax.checkpoint(lambda x: jnp.sin(x @ p["w"]))(x).sum()


@pytest.mark.parametrize("bad", in_tiers([math.nan, math.inf], {math.inf}))
@pytest.mark.parametrize("force", ["formed", None])
def test_bad_examples_contribute_zero_with_every_method(force, bad):
    """Formed behind a loop; by a second pass, which would see NaN again, with remat."""
    fun = looped if force else rematerialized
    rng = np.random.default_rng(0)
    params = {"w": jnp.float32(rng.normal(size=(WIDTH, WIDTH)))}
    x, scale = jnp.float32(rng.normal(size=(B, T, WIDTH))), jnp.linspace(1, 2, B)
    assert methods(fun, params, (x, scale), force=force) == {
        "w": "instantiated" if force else "Gram"
    }
    run = jax.jit(forced(fun, force, limit=0.5))
    right, _ = run(params, (x, scale.at[2].set(0)))  # no gradient at all
    assert np.abs(right["w"]).max() > 0.01
    for spoiled in ((x, scale.at[2].set(bad)), (x.at[2, 1, 0].set(math.nan), scale)):
        sums, info = run(params, spoiled)
        trees.assert_close(sums, right, 1e-6)
        assert not np.isfinite(info.norm[2]).any()
        assert info.factor[2] == 0 and (np.delete(info.factor, 2) > 0).all()
    sums, info = run(params, (x, bad * scale))  # nor any that could stand in
    assert (sums["w"] == 0).all() and (info.factor == 0).all()


@pytest.mark.parametrize("microbatch", [None, 2])
def test_a_bad_example_contributes_zero_to_groups_where_it_is_finite(microbatch):
    fun = lambda p, e: p["a"] @ e[0] + p["b"] @ e[1]
    params, (x, y) = {"a": jnp.ones(2), "b": jnp.ones(2)}, jnp.ones((2, 3, 2))
    grad = per_example.clipped_grad(fun, 9.0, groups="leaf", microbatch_size=microbatch)
    sums, info = jax.jit(grad)(params, (x, y.at[1, 0].set(math.nan)))
    np.testing.assert_array_equal(sums["a"], [2, 2])
    np.testing.assert_array_equal(sums["b"], [2, 2])
    np.testing.assert_array_equal(info.factor, [[1, 1], [0, 0], [1, 1]])


def test_padding_contributes_nothing_whatever_it_holds():
    grad = jax.jit(per_example.clipped_grad(loss, 1.5))
    tokens, weight = BATCH
    keep = jnp.arange(B) < 4
    few, info = grad(PARAMS, jax.tree.map(lambda x: x[:4], BATCH))
    for rest in (0.3, math.nan, math.inf, 1e38):
        padded = (tokens, jnp.where(keep, weight, rest))
        sums, got = grad(PARAMS, padded, where=keep)
        for x, y in zip(jax.tree.leaves(sums), jax.tree.leaves(few), strict=True):
            # Beside what is not finite examples are added up one by one.
            most = float(jnp.abs(y).max())
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=2e-7 * most)
        np.testing.assert_allclose(got.norm[:4], info.norm, rtol=1e-6)
        for x in got[:3]:
            assert (np.asarray(x[4:]) == 0).all()


def test_no_example_at_all():
    for size in (0, 3):  # none, and none that counts
        batch = tuple(x[:size] for x in BATCH)
        grad = per_example.clipped_grad(loss, 1.0, groups="layer")
        bad = jax.tree.map(
            lambda x: x * math.nan if x.dtype == jnp.float32 else x, batch
        )
        sums, info = jax.jit(grad)(PARAMS, bad, where=jnp.zeros(size, bool))
        jax.tree.map(lambda x, p: np.testing.assert_array_equal(x, 0 * p), sums, PARAMS)
        assert info.norm.shape == info.factor.shape == (size, 2)
        assert info.value.shape == (size,)


def test_sums_are_float32_or_wider():
    params, batch = draw(jnp.bfloat16)
    sums, info = jax.jit(per_example.clipped_grad(loss, 1.0))(params, batch)
    leaves, norms, index = oracle(loss, params, batch)
    assert {x.dtype for x in jax.tree.leaves((sums, info.norm))} == {
        np.dtype("float32")
    }
    np.testing.assert_allclose(info.norm, norms, rtol=0.02)
    factor = np.minimum(1, 1 / norms)
    assert_sum(sums, leaves, factor, index, tolerance=0.03)


@pytest.mark.parametrize("dtype", in_tiers([jnp.bfloat16, jnp.float32], 2))
def test_a_neighbour_moves_the_sum_by_at_most_the_sensitivity(dtype):
    params, (tokens, weight) = draw(dtype)
    for groups in ("global", "leaf"):
        grad = per_example.clipped_grad(loss, 0.1, groups=groups)
        bound = grad.sensitivity(params=params)
        run = jax.jit(grad)
        vector = lambda sums: np.concatenate(
            [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(sums)]
        )
        without = vector(run(params, (tokens, weight), where=jnp.arange(B) != 1)[0])
        for scale in (0.0, 1.0, 1e3, 1e38, math.inf, math.nan):
            changed = weight.at[1].set(jnp.asarray(scale, dtype))
            moved = np.linalg.norm(vector(run(params, (tokens, changed))[0]) - without)
            # The sums themselves are rounded, in float32.
            assert moved <= bound + 1e-6 * np.linalg.norm(without)
        assert moved <= 1e-6  # nothing is left of what is not finite


def test_sensitivity():
    grad = per_example.clipped_grad(loss, 2.0)
    assert grad.sensitivity() == 2.0
    assert grad.sensitivity("replace_one") == 4.0
    assert grad.sensitivity("replace_special") == 2.0
    assert grad.sensitivity(max_norm=np.array([1.0, 3.0])[:, None]) == 3.0
    grad = per_example.clipped_grad(loss, 2.0, groups="leaf")
    assert grad.sensitivity(params=PARAMS) == 4.0
    grad = per_example.clipped_grad(loss, {"a": 3.0, "b": 4.0}, groups="layer")
    assert grad.sensitivity() == 5.0
    for response in (responses.normalize, responses.reject, responses.auto_s(),
                     responses.psac(), responses.band(0.5)):  # fmt: skip
        assert per_example.clipped_grad(loss, 1.0, response=response).sensitivity() == 1
    with pytest.raises(ValueError, match="response must be bounded"):
        per_example.clipped_grad(loss, 1.0, response=responses.log).sensitivity()


@pytest.mark.full
def test_responses_are_weights():
    """Abadi, AUTO-V, AUTO-S or NSGD, PSAC, global: as published, METHODS of weights."""
    _, norms, _ = oracle(loss, PARAMS, BATCH)
    n, c = norms, 1.5 * LOWERED
    for response, weight in [
        (responses.hard, np.minimum(1, c / n)),
        (responses.normalize, c / n),
        (responses.auto_s(0.01), c / (n + 0.01)),
        (responses.psac(0.1), c / (n + 0.1 / (n + 0.1))),
        (responses.reject, (n <= c) * 1.0),
    ]:
        grad = per_example.clipped_grad(loss, 1.5, response=response)
        _, info = jax.jit(grad)(PARAMS, BATCH)
        np.testing.assert_allclose(info.factor, weight, rtol=1e-5)


def test_norms_alone():
    info = jax.jit(per_example.norms(loss, groups="leaf"))(PARAMS, BATCH)
    _, norms, _ = oracle(loss, PARAMS, BATCH, "leaf")
    np.testing.assert_allclose(info.norm, norms, rtol=1e-5)
    assert info.factor is None
    keep = jnp.arange(B) < 4
    padded = jax.jit(per_example.norms(loss, groups="leaf"))(PARAMS, BATCH, where=keep)
    np.testing.assert_allclose(
        padded.norm, norms * np.asarray(keep)[:, None], rtol=1e-5
    )


@pytest.mark.parametrize("size", in_tiers([None, 2], {2}))
def test_threshold_as_a_function_of_norms(size):
    """The median of a batch, padding left out; microbatches see the whole batch."""
    where = np.arange(B) != 1

    def median(norm, where):
        return jnp.nanmedian(jnp.where(where[:, None], norm, jnp.nan))

    grad = per_example.clipped_grad(loss, median, microbatch_size=size)
    _, info = jax.jit(grad)(PARAMS, BATCH, where=jnp.asarray(where))
    _, norm, _ = oracle(loss, PARAMS, BATCH)
    limit = np.median(norm[where])
    right = np.where(where[:, None], np.minimum(1, limit / norm), 0)
    np.testing.assert_allclose(info.factor, right, rtol=1e-5)
    with pytest.raises(ValueError, match="the function"):
        grad.sensitivity()
    assert grad.sensitivity(max_norm=2.0) == 2.0


@pytest.mark.parametrize("size", in_tiers([None, 4], {4}))
def test_threshold_function_sees_no_norms_of_padding(size):
    """Nothing but 0, whatever padding holds, nor rows that fill a microbatch up."""
    where = np.arange(B) < 4
    tokens, weight = BATCH
    total = lambda norm, where: 0.1 * norm.sum()
    grad = jax.jit(per_example.clipped_grad(loss, total, microbatch_size=size))
    _, norm, _ = oracle(loss, PARAMS, BATCH)
    limit = 0.1 * norm[where].sum() * LOWERED
    right = np.where(where[:, None], np.minimum(1, limit / norm), 0)
    assert 0 < right[where].min() < 1
    for rest in (1.0, 1e30, math.nan):
        padded = (tokens, jnp.where(where, weight, rest))
        _, info = grad(PARAMS, padded, where=jnp.asarray(where))
        np.testing.assert_allclose(info.factor, right, rtol=1e-5)
    _, info = grad(PARAMS, BATCH)  # nobody is padding
    limit = 0.1 * norm.sum() * LOWERED
    np.testing.assert_allclose(info.factor, np.minimum(1, limit / norm), rtol=1e-5)


@pytest.mark.parametrize(
    "response", in_tiers([responses.hard, responses.normalize], {responses.hard})
)
def test_a_negative_threshold_that_is_traced_acts_as_0(response):
    """Where it is known it is refused."""
    grad = per_example.clipped_grad(loss, 1.0, groups="layer", response=response)
    run = jax.jit(lambda limit: grad(PARAMS, BATCH, max_norm=limit))
    sums, info = run(jnp.array([-2.0, 2.0]))
    right, expected = run(jnp.array([0.0, 2.0]))
    trees.assert_same(sums, right)
    trees.assert_same(info.factor, expected.factor)
    index = grouping.group_leaves("layer", PARAMS).index
    gone = [(x == 0).all() for x in jax.tree.leaves(sums)]
    assert gone == [g == 0 for g in index]
    below = lambda norm, where: -norm
    grad = per_example.clipped_grad(loss, below, response=response)
    sums, info = jax.jit(grad)(PARAMS, BATCH)
    assert all((x == 0).all() for x in jax.tree.leaves(sums))
    assert (info.factor == 0).all()

    @jax.jit
    def stacked(limit):
        tx = per_example.clip_per_example(limit, response=response)
        return tx.update({"w": jnp.ones((3, 2))}, tx.init({"w": jnp.ones(2)}))[0]

    np.testing.assert_array_equal(stacked(-1.0)["w"], [0, 0])


@pytest.mark.parametrize("ord", in_tiers([1, 2], {1}))
def test_norms_in_microbatches_and_of_either_kind(ord):
    grads, _, _ = oracle(loss, PARAMS, BATCH)
    rows = np.concatenate([x.reshape(B, -1) for x in grads], axis=1)
    right = np.linalg.norm(rows, ord, axis=1)[:, None]
    for size in (None, 2):
        measure = per_example.norms(loss, ord=ord, microbatch_size=size)
        found = jax.jit(measure)(PARAMS, BATCH)
        np.testing.assert_allclose(found.norm, right, rtol=1e-5)


def test_sensitivity_in_the_1_norm_adds_up():
    limit = np.array([1.0, 0.5, 0.25])
    grad = per_example.clipped_grad(loss, limit, groups="layer", ord=1)
    assert grad.sensitivity() == 1.75
    assert grad.sensitivity("replace_one") == 3.5


def product(w, e):
    x, d = e
    return jnp.sum((x @ w) * d)


def wave(w, e):
    """Positions that cancel in the whole, but not in any stretch of time."""
    return product(w, e)


def table(w, e):
    """One row again and again."""
    _, d, ids = e
    return jnp.sum(w[ids] * d)


def table_and_head(w, e):
    """Rows of a table, and the products that take them away again."""
    x, d, ids = e
    return jnp.sum(w[ids] * x) + jnp.sum((x @ w.T) * d)


def magnitude(fun, w, e):
    """The sum of the norms of what a gradient adds up."""
    x, d, *ids = e
    length = lambda a: jnp.linalg.norm(a, axis=-1)
    terms = (length(x) * length(d)).sum()
    return terms + length(x).sum() if ids else terms


SPREADS = 10.0 ** -np.arange(8.0)


def cancelling(fun, length, wide, narrow):
    """Examples whose gradients over time leave these shares; the weight first."""
    draws = 4 if fun is wave else 32
    normal = lambda *s: np.random.default_rng(0).normal(size=(draws, len(SPREADS), *s))
    spread = SPREADS[:, None, None]
    if fun is wave:
        time = np.sin(2 * np.pi * np.arange(length) / length)[:, None]
        noisy = lambda n: normal(1, n) * (1 + 0.3 * normal(length, n))
        return np.zeros((wide, narrow)), noisy(wide), noisy(narrow) * time
    if fun is table:
        d = normal(length, wide)
        d = d - d.mean(-2, keepdims=True) + spread * normal(1, wide)
        return np.zeros((narrow, wide)), d, d, np.ones(d.shape[:3], int)
    if fun is product:  # a softmax's gradients add up to nothing
        d = normal(length, narrow)
        x = normal(1, wide) * (1 + spread * normal(length, wide))
        return np.zeros((wide, narrow)), x, d - d.mean(-2, keepdims=True)
    ids = np.random.default_rng(1).integers(0, narrow, (draws, len(SPREADS), length))
    d = spread * normal(length, narrow) - np.eye(narrow)[ids]
    return np.zeros((narrow, wide)), normal(length, wide), d, ids


CANCELLING = {
    f"{fun.__name__}-{dtype}-{shape[0]}": (fun, dtype, shape)
    for fun, dtype, shape in [
        (product, "float32", (4, 90, 80)),
        (product, "float32", (64, 8, 6)),
        (product, "bfloat16", (8, 16, 4)),
        (product, "float16", (8, 16, 4)),
        (wave, "float32", (300, 8, 6)),
        (table, "float32", (64, 6, 5)),
        (table_and_head, "float32", (8, 6, 5)),
        (table_and_head, "bfloat16", (8, 6, 5)),
    ]
}


@pytest.mark.parametrize(
    "case", in_tiers(CANCELLING, {"product-bfloat16-8", "table_and_head-float32-8"})
)
def test_norms_that_cancel_bound_all_the_same(case):
    """Rounding must not make a bound of nothing, whatever share of a sum remains."""
    fun, dtype, shape = case
    w, *batch = cancelling(fun, *shape)
    batch = [a.reshape(-1, *a.shape[2:]) for a in batch]
    w, *batch = cast([w, *batch], dtype)
    limit = 2.0**-20
    one = lambda *e: forced(fun, "factored", limit=limit)(w, [a[None] for a in e])
    sums, info = jax.jit(jax.vmap(one))(*batch)
    with trees.enable_x64(True):
        exact = cast([w, *batch], "float64")
        grads = jax.vmap(lambda w, *e: jax.grad(fun)(w, e), (None, *[0] * len(batch)))(
            *exact
        )
        terms = np.asarray(jax.vmap(lambda *e: magnitude(fun, w, e))(*exact[1:]))
    size = lambda g: np.linalg.norm(np.asarray(g, np.float64), axis=(-2, -1))
    norm, true = np.asarray(info.norm[:, 0, 0], np.float64), size(grads)
    assert np.isfinite(norm).all() and (norm > limit).mean() > 0.9
    assert (size(sums) <= limit * (1 + 1e-6)).all()
    assert (size(sums) >= np.minimum(norm, limit) * (1 - 4e-6)).all()
    # Of what cancels the gradient itself is rounded; the floor that was is gone.
    assert (np.abs(norm - true) <= 1e-6 * true + 4 * 2.0**-24 * terms).all()


@pytest.mark.parametrize("length", in_tiers([1, 5], {5}))
def test_no_contribution_exceeds_its_threshold_by_a_rounding(length):
    """Of what is stored, in float64: not by a bit, and it is hardly below."""
    rng = np.random.default_rng(length)
    x = jnp.float32(rng.normal(size=(256, length, 7)))
    d = jnp.float32(rng.normal(size=(256, length, 3)))
    limit, w = 0.1, jnp.zeros((7, 3))
    grad = per_example.clipped_grad(product, limit)
    sums, _ = jax.jit(jax.vmap(lambda x, d: grad(w, (x[None], d[None]))))(x, d)
    tx = per_example.clip_per_example(limit, reduce="sum")
    grads = jax.vmap(lambda x, d: jax.grad(product)(w, (x, d)))(x, d)
    one = lambda g: tx.update(g[None], tx.init(w))[0]
    for found in (sums, jax.jit(jax.vmap(one))(grads)):
        size = np.linalg.norm(np.asarray(found, np.float64), axis=(1, 2))
        assert (size <= np.float32(limit)).all()
        assert (size >= limit * (1 - 2e-6)).all()


def test_sums_by_group():
    group = jnp.array([0, 2, 0, 2, 2, 0])
    grad = jax.jit(per_example.population_grad(loss, 3))
    parts, info = grad(PARAMS, BATCH, population_ids=group)
    leaves, _, _ = oracle(loss, PARAMS, BATCH)
    for x, y in zip(jax.tree.leaves(parts), leaves, strict=True):
        want = np.stack([y[np.asarray(group) == k].sum(0) for k in range(3)])
        np.testing.assert_allclose(x, want, atol=1e-5)
    assert info.norm is None
    np.testing.assert_array_equal(info.factor, np.eye(3)[np.asarray(group)])
    tokens, weight = BATCH
    bad, info = grad(PARAMS, (tokens, weight.at[1].set(math.nan)), population_ids=group)
    few, _ = grad(
        PARAMS, BATCH, population_ids=group.at[1].set(7)
    )  # out of range, traced: nowhere
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), bad, few)
    assert (info.factor[1] == 0).all()
    none, ids = jax.tree.map(lambda x: x[:0], (BATCH, group))
    parts, _ = grad(PARAMS, none, population_ids=ids)
    jax.tree.map(lambda x, p: np.testing.assert_array_equal(
        x, np.zeros((3, *p.shape))), parts, PARAMS)  # fmt: skip


def test_arguments_and_aux():
    def fun(a, key, x, b, *, power):
        value = ((a * x) ** power).sum() * jax.random.uniform(key) + b.sum()
        return value, {"seen": x, "noise": jax.random.uniform(key)}

    grad = per_example.clipped_grad(
        fun, math.inf, argnums=(3, 0), batch_argnums=(1, 2), has_aux=True
    )
    keys = jax.random.split(jax.random.key(0), 3)
    a, x, b = jnp.ones(2), jnp.arange(6.0).reshape(3, 2), jnp.ones(4)
    (db, da), info = jax.jit(grad, static_argnames="power")(a, keys, x, b, power=2)
    noise = jax.vmap(jax.random.uniform)(keys)
    np.testing.assert_allclose(db, np.full(4, 3.0))
    np.testing.assert_allclose(da, (2 * x**2 * noise[:, None]).sum(0), rtol=1e-6)
    np.testing.assert_array_equal(info.aux["noise"], noise)
    np.testing.assert_array_equal(info.aux["seen"], x)


def test_complex_parameters_count_with_both_parts():
    fun = lambda w, x: (jnp.vdot(w, x.astype(jnp.complex64)) * (0.6 + 0.8j)).real
    w, x = jnp.array([1 + 2j, 3 - 1j]), jnp.array([[3.0, 4.0], [0.0, 0.5]])
    sums, info = jax.jit(per_example.clipped_grad(fun, 1.0))(w, x)
    np.testing.assert_allclose(info.norm[:, 0], [5, 0.5], rtol=1e-6)
    right = [jax.grad(fun)(w, row) * f for row, f in zip(x, (0.2, 1), strict=True)]
    np.testing.assert_allclose(sums, sum(right), rtol=2e-6)


@pytest.mark.parametrize("shape", ["b, 4, 5", "b, t, d"])
def test_shapes_may_be_symbolic(shape):
    """Of examples; of all where gradients are formed, and none is compared with 1."""
    dims = jax.export.symbolic_shape(shape)
    wide = dims[2]

    def loss(params, x):
        x = x @ (params["w"] * jnp.tanh(params["gate"]))
        return jnp.tanh(x @ params["plain"] if wide == 5 else x).sum()

    draw = np.random.default_rng(0).normal
    params = {"w": draw(size=(5, 3)), "gate": draw(size=(5, 3)), "plain": np.eye(3)}
    params, x = cast((params, draw(size=(6, 4, 5))), "float32")
    like = lambda x, *shape: jax.ShapeDtypeStruct(shape, x.dtype)
    told = {name: like(w, 3 if name == "plain" else wide, 3)
            for name, w in params.items()}  # fmt: skip
    tx = per_example.clip_per_example(0.5)

    def both(params, x):
        rows = jax.vmap(jax.grad(loss), (None, 0))(params, x)
        grads, _ = per_example.clipped_grad(loss, 0.5)(params, x)
        return grads, tx.update(rows, tx.init(params), params)[0]

    program = jax.export.export(jax.jit(both))(told, like(x, *dims))
    trees.assert_close(program.call(params, x), jax.jit(both)(params, x), 1e-5, 1e-6)


def test_one_trace_for_many_calls():
    traces = []

    def counted(params, example):
        traces.append(1)
        return loss(params, example)

    grad = jax.jit(per_example.clipped_grad(counted, 1.0))
    for k in range(3):
        grad(PARAMS, BATCH, max_norm=1.0 + k, where=jnp.arange(B) != k)
    assert len(traces) == 1


# ----------------------------------------------------------------- stacked gradients


@pytest.mark.parametrize("reduce", in_tiers(["mean", "sum"], 2))
@pytest.mark.parametrize("groups", in_tiers(["global", "layer"], {"layer"}))
def test_stacked_gradients(reduce, groups):
    tx = per_example.clip_per_example(1.5, groups=groups, reduce=reduce)
    stacked = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(PARAMS, BATCH)
    stacked["scale"] = stacked["scale"].at[3, 0].set(math.nan)
    updates, state = jax.jit(tx.update)(stacked, tx.init(PARAMS), PARAMS)
    keep = jnp.arange(B) != 3
    grad = per_example.clipped_grad(loss, 1.5, groups=groups)
    want, info = jax.jit(grad)(PARAMS, BATCH, where=keep)
    scale = 1 / B if reduce == "mean" else 1.0
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, scale * y, atol=1e-5), updates, want
    )
    metrics = state.metrics
    np.testing.assert_allclose(metrics.norm, info.norm[keep].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(metrics.clipped, (info.factor[keep] < 1).sum(0))
    assert (metrics.steps == B).all()
    assert (metrics.nonfinite == 1).all()
    group = next(iter(metrics.groups)).strip("()")
    assert f"clip0/clip_rate/{group}" in clipfx.metrics.read(state)


def test_derivative_through_stacked_gradients_is_finite_where_one_is_zero():
    tx = per_example.clip_per_example(1.0, reduce="sum")
    rows = jnp.array([[3.0, 4.0], [0.0, 0.0], [0.3, 0.4]])
    state = tx.init({"w": jnp.zeros(2)})
    total = lambda x: tx.update({"w": x}, state)[0]["w"].sum()
    # Of the first row its direction counts, of the others each element.
    want = [[0.032, -0.024], [1.0, 1.0], [1.0, 1.0]]
    np.testing.assert_allclose(jax.jit(jax.grad(total))(rows), want, atol=1e-6)


def test_stacked_updates_without_a_gradient():
    tx = per_example.clip_per_example(1.0)
    updates, state = jax.jit(tx.update)(
        {"n": jnp.ones((3, 2), int)}, tx.init({"n": jnp.ones(2, int)})
    )
    np.testing.assert_array_equal(updates["n"], [0, 0])
    assert state.metrics.norm.shape == (0,)


def test_stacked_gradients_in_a_chain_keep_dtypes():
    params, batch = draw(jnp.bfloat16)
    tx = optax.chain(per_example.clip_per_example(1.0), optax.sgd(0.1, momentum=0.9))
    stacked = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batch)
    updates, state = jax.jit(tx.update)(stacked, tx.init(params), params)
    same = lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype)
    assert jax.tree.all(jax.tree.map(same, updates, params))
    assert jax.tree.all(jax.tree.map(same, state, tx.init(params)))


# ------------------------------------------------------------------------- the table


def test_explain_shows_each_leaf_and_why():
    table = per_example.explain(loss, PARAMS, jax.tree.map(lambda x: x[0], BATCH))
    lines = str(table).splitlines()
    assert len(lines) == 5
    assert [row.leaf for row in table.rows] == [x.split()[0] for x in lines[1:]]
    method = {line.split()[0]: line for line in lines[1:]}
    assert "Gram" in method["embed"] and "gather, dot_general" in method["embed"]
    assert "bias sum" in method["scale"] and "mul" in method["scale"]
    assert "Gram" in method["layer/w"]
    assert re.search(r"bias sum|instantiated", method["layer/b"])


def test_explain_warns_of_large_leaves_that_are_formed():
    shape = lambda *size: jax.ShapeDtypeStruct(size, jnp.float32)
    loss = lambda w, x: jnp.sum(jnp.sin(w) * x)
    report = per_example.explain(loss, shape(1200, 1000), shape(1200, 1000))
    (row,), (note,) = report
    assert (row.method, row.shape) == ("instantiated", (1200, 1000))
    assert "5 MB" in note and "microbatch_size" in note and "sin" in note
    assert str(report).endswith(note)
    assert not per_example.explain(loss, shape(12, 10), shape(12, 10)).notes


# --------------------------------------------------------------------------- errors

SIMPLE = lambda w, x: jnp.vdot(w, x)
W, X = jnp.ones(2), jnp.ones((3, 2))
clipped = per_example.clipped_grad


def ragged(w, e):  # in a derivative of its own JAX cannot map it over examples
    x, sizes = e
    product = jax.custom_vjp(jax.lax.ragged_dot)
    product.defvjp(lambda *args: (product(*args), ()), lambda *_: (None, None, None))
    return (product(x, jnp.ones((2, 3, 2)), sizes) @ w).sum()


SHARES = jnp.ones((4, 5, 3)), jnp.full((4, 2), 2, jnp.int32)


ERRORS = [
    (lambda: clipped(3, 1.0), TypeError, "fun must be"),
    (lambda: clipped(SIMPLE, -1.0), ValueError, "max_norm must be >= 0"),
    (lambda: clipped(SIMPLE, "1"), TypeError, "max_norm must be a number"),
    (lambda: clipped(SIMPLE, lambda t: 1.0), TypeError, "schedule"),
    (lambda: clipped(SIMPLE, 1.0, argnums="0"), TypeError, "argnums must be"),
    (lambda: clipped(SIMPLE, 1.0, batch_argnums=()), TypeError, "batch_argnums must"),
    (lambda: clipped(SIMPLE, 1.0, microbatch_size=0), ValueError, "microbatch_size"),
    (lambda: clipped(SIMPLE, 1.0, ord=3), ValueError, "ord must be"),
    (lambda: clipped(SIMPLE, 1.0, response=1), TypeError, "response must be"),
    (lambda: clipped(SIMPLE, 1.0, groups="row")(W, X), ValueError, "groups must be"),
    (lambda: clipped(SIMPLE, 1.0, argnums=5)(W, X), ValueError, "argnums must be"),
    (lambda: clipped(SIMPLE, 1.0, argnums=1)(W, X), ValueError, "batch_argnums must"),
    (lambda: clipped(SIMPLE, 1.0)(jnp.arange(2), X), TypeError, "parameters .argnums"),
    (lambda: clipped(SIMPLE, 1.0)({"w": "x"}, X), TypeError, "parameters .argnums"),
    (lambda: clipped(SIMPLE, 1.0)(W, 1.0), ValueError, "batch .batch_argnums"),
    (lambda: clipped(SIMPLE, 1.0)(W, ()), ValueError, "batch .batch_argnums"),
    (
        lambda: clipped(lambda w, x: w.sum(), 1.0)(W, {"a": X, "b": X[:2]}),
        ValueError,
        "must have one size, got 3 at .*'a'.*, 2 at",
    ),
    (lambda: clipped(lambda w, x: w * x, 1.0)(W, X), TypeError, r"got float32\[2\]"),
    (lambda: clipped(lambda w, x: (w @ x, 1), 1.0)(W, X), TypeError, "has_aux=True"),
    (lambda: clipped(SIMPLE, 1.0, has_aux=True)(W, X), TypeError, "return a pair"),
    (lambda: clipped(lambda w, x: 1, 1.0)(W, X), TypeError, "loss of one example"),
    (lambda: clipped(SIMPLE, jnp.ones(2))(W, X), ValueError, r"got \(2,\)"),
    (lambda: clipped(SIMPLE, {"a": 1.0})(W, X), ValueError, "name every group"),
    (
        lambda: clipped(SIMPLE, 1.0)(W, X, max_norm=jnp.ones(3)),
        ValueError,
        r"got \(3,\); pass max_norm\[:, None\]",
    ),
    (
        lambda: clipped(SIMPLE, 1.0)(W, X, where=jnp.ones(3)),
        ValueError,
        "where must be",
    ),
    (lambda: clipped(SIMPLE, 1.0).sensitivity("add"), ValueError, "relation must be"),
    (
        lambda: clipped(SIMPLE, 1.0, groups="leaf").sensitivity(),
        ValueError,
        "params must be passed",
    ),
    (
        lambda: per_example.population_grad(SIMPLE, 0),
        ValueError,
        "num_populations must be",
    ),
    (
        lambda: per_example.population_grad(SIMPLE, 2)(W, X),
        TypeError,
        "population_ids must be",
    ),
    (
        lambda: per_example.population_grad(SIMPLE, 2)(
            W, X, population_ids=jnp.array([0, 1, 2])
        ),
        ValueError,
        r"population_ids must be in \[0, 2\), got 0 to 2",
    ),
    (
        lambda: per_example.population_grad(SIMPLE, 2)(
            W, X, population_ids=jnp.zeros(2, int)
        ),
        ValueError,
        r"population_ids must have shape \(3,\)",
    ),
    (
        lambda: per_example.population_grad(SIMPLE, 2)(
            W, X, population_ids=jnp.zeros(3)
        ),
        TypeError,
        "population_ids must be integers",
    ),
    (
        lambda: per_example.clip_per_example(1.0, reduce="max"),
        ValueError,
        "reduce must be",
    ),
    (
        lambda: clipped(SIMPLE, 1.0)(W, X, mask=jnp.ones(3, bool)),
        TypeError,
        "did you mean where",
    ),
    (lambda: clipped(SIMPLE, l2_norm_clip=1.0), TypeError, "did you mean max_norm"),
    (
        lambda: clipped(lambda w, x, y: (w @ x - y) ** 2, 1.0)(W, X, jnp.ones(3)),
        TypeError,
        r"did you mean batch_argnums=\(1, 2\)",
    ),
    (
        lambda: clipped(lambda w, x: (w * x).sum(axis=1).mean(), 1.0)(W, X),
        ValueError,
        "failed .axis 1 is out of bounds .*without the axis of examples",
    ),
    (lambda: clipped(SIMPLE, 1.0)(W, [1.0, 2.0]), ValueError, "jnp.asarray"),
    (
        lambda: clipped(SIMPLE, {"global": 1.0, "globe": 2.0})(W, X),
        ValueError,
        "got .'globe'.; did you mean 'global'",
    ),
    (lambda: clipped(ragged, 1.0)(W, SHARES), NotImplementedError, "size=1"),
    (
        lambda: clipped(lambda w, x: jax.lax.pmean(w @ x, "batch"), 1.0)(W, X),
        ValueError,
        "group or layer normalization",
    ),
    (
        lambda: per_example.clip_per_example(1.0).update(
            {"w": jnp.ones((3, 2))},
            per_example.clip_per_example(1.0).init({"w": jnp.ones((3, 2))}),
        ),
        ValueError,
        "updates must have an axis of examples",
    ),
    (lambda: responses.auto_s(0), ValueError, "stability must be"),
    (lambda: responses.psac(math.inf), ValueError, "stability must be"),
]


@pytest.mark.parametrize("case", ERRORS, ids=[case[2] for case in ERRORS])
def test_bad_input_gets_one_sentence(case):
    raises_one_sentence(case)
