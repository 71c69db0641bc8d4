"""Private Adam: clipped and noised in coordinates of what was released before."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sentences import raises_one_sentence
from tiers import in_tiers

from clipfx import per_example, privacy
from clipfx.privacy.scales import in_scale

KEY = jax.random.key(5)
SIZE = 8
EPS, LIMIT = 0.01, 20.0


def loss(params, example):
    """Matrices used once and at several positions, one with three dimensions."""
    x, y = (part.astype(params["in"].dtype) for part in example)
    bias = params["bias"][None]
    hidden = jnp.tanh(jnp.einsum("ti,ihd->thd", x, params["in"]) + bias)
    mixed = hidden.reshape(len(x), -1) @ params["out"]
    return jnp.square(mixed.mean(0) * params["gain"] - y).mean()


def params_of(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "in": jax.random.normal(keys[0], (3, 2, 4), dtype),
        "out": jax.random.normal(keys[1], (8, 5), dtype),
        "bias": jnp.zeros((2, 4), dtype),
        "gain": jnp.ones((), dtype),
    }


def batch_of(seed=1, size=SIZE):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(size, 6, 3)), rng.normal(size=(size, 5))
    return jnp.float32(x * rng.exponential(size=(size, 1, 1))), jnp.float32(y)


def dp(noise=0.8, max_norm=LIMIT, fun=loss, size=SIZE, factored=True, **settings):
    scale = privacy.second_moment(0.9, eps_root=EPS, factored=factored)
    return privacy.dp_grad(
        fun, max_norm=max_norm, noise_multiplier=noise, expected_batch_size=size,
        key=KEY, **{"scale": scale, **settings},
    )  # fmt: skip


def fixed(v):
    """A scale that does not learn."""
    return privacy.PrivateScale(
        init=lambda params: (),
        scale=lambda state, params: jax.tree.map(
            lambda p, v: (jnp.asarray(v) ** -0.5,), params, v
        ),
        update=lambda state, released: state,
    )


def test_numbers_of_the_source():
    v = jnp.array([1e-4, 1])
    grad = functools.partial(
        dp, fun=jnp.vdot, max_norm=1.0, size=1, scale=fixed(v)
    )  # fmt: skip
    example, params = jnp.array([[0.03, 0.4]]), jnp.array([7.0, -2.0])
    exact = jax.jit(functools.partial(grad(0.0), where=None))
    found, _, info = exact(grad(0.0).init(params), params, example)
    np.testing.assert_allclose(info.norm, [[3.02655]], rtol=2e-6)
    np.testing.assert_allclose(found, [0.00991228, 0.132164], rtol=5e-6)
    # Where nothing is drawn to be added to, the noise has v's shape.
    step = jax.jit(functools.partial(grad(2.0), where=None))
    state, rows = grad(2.0).init(params), []
    for _ in range(2000):
        found, state, _ = step(state, params, 0 * example)
        rows.append(np.asarray(found))
    spread = np.std(rows, 0)
    np.testing.assert_allclose(spread, [2 * 0.01, 2 * 1.0], rtol=0.06)


def exact_scale(moments, step, factored, decay=0.9):
    """From averages of whole squares, in float64."""
    v = moments / (1 - decay**step) if step else moments
    if not factored or v.ndim < 2:
        return (v + EPS) ** -0.5
    every = range(v.ndim)
    mean = v.mean() + EPS
    rank_one = mean
    for a in every:
        along = v.mean(tuple(d for d in every if d != a), keepdims=True)
        rank_one = rank_one * (along + EPS) / mean
    return rank_one**-0.5


CASES = {
    f"{'factored' if factored else 'full'}-{size}-{noise}": (factored, size, noise)
    for factored in (True, False)
    for size in (None, 3)
    for noise in (0.0, 0.8)
}
USUAL = {"factored-3-0.8", "full-None-0.8"}


@pytest.mark.parametrize("case", in_tiers(CASES, USUAL))
def test_several_steps_as_in_float64(case):
    factored, microbatch_size, noise = case
    grad = dp(noise, factored=factored, microbatch_size=microbatch_size)
    params, where = params_of(), jnp.arange(SIZE) != 2
    names = list(params)
    state, step = grad.init(params), jax.jit(grad)
    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
    draws = privacy.add_gaussian_noise(1.0, KEY)
    nothing = jax.tree.map(jnp.zeros_like, params)
    moments = {k: np.zeros(params[k].shape) for k in names}
    clipped = 0
    for turn in range(5):
        batch = batch_of(turn)
        batch = batch[0].at[2].multiply(100.0), batch[1]  # who is padding
        found, state, info = step(state, params, batch, where=where)
        scales = {k: exact_scale(moments[k], turn, factored) for k in names}
        h = {k: np.float64(x) * scales[k] for k, x in each(params, batch).items()}
        norm = np.sqrt(sum((x**2).reshape(SIZE, -1).sum(1) for x in h.values()))
        norm = np.where(where, norm, 0)
        np.testing.assert_allclose(info.norm[:, 0], norm, rtol=1e-4)
        share = np.where(where, np.minimum(1, LIMIT / np.maximum(norm, 1e-9)), 0)
        clipped += (norm > LIMIT).sum()
        z = draws.update(nothing, privacy.NoiseState(jnp.int32(turn)))[0]
        for k in names:
            total = np.tensordot(share, h[k], 1) + noise * LIMIT * np.float64(z[k])
            right = total / scales[k] / SIZE
            np.testing.assert_allclose(found[k], right, rtol=1e-4, atol=1e-5)
            moments[k] += 0.1 * (np.float64(found[k]) ** 2 - moments[k])
        params = optax.apply_updates(params, optax.tree.scale(-0.1, found))
    assert 3 <= clipped < 30


@pytest.mark.parametrize("factored", [True, False])
def test_state_is_made_of_what_was_released(factored):
    """Nothing else goes in: it follows from the gradients, exactly."""
    grad = dp(factored=factored)
    params = params_of()
    state, follow = grad.init(params), jax.jit(grad.scale.update)
    step = jax.jit(functools.partial(grad, where=None))
    shapes = jax.tree.map(jnp.shape, state)
    known = state.scale
    for turn in range(3):
        found, state, _ = step(state, params, batch_of(turn))
        known = follow(known, found)
        chex.assert_trees_all_close(state.scale, known, rtol=1e-6)
        assert jax.tree.map(jnp.shape, state) == shapes
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert (size(known.moments) < size(params) / 2) == factored


NEIGHBOURS = ["float32", "bfloat16"]


@pytest.mark.parametrize("dtype", in_tiers(NEIGHBOURS, {"float32"}))
@pytest.mark.parametrize("factored", in_tiers([True, False], 2))
def test_one_example_moves_the_scaled_sum_by_the_threshold_at_most(factored, dtype):
    params = params_of(dtype)
    noisy, quiet = dp(0.8, factored=factored), dp(0.0, factored=factored)
    state, step = noisy.init(params), jax.jit(functools.partial(noisy, where=None))
    for turn in range(4):
        _, state, _ = step(state, params, batch_of(turn))
    scales = quiet.scale.scale(state.scale, params)
    product = lambda p, f: math.prod(np.float64(x) for x in f) * np.ones(p.shape)
    scales = jax.tree.map(product, params, scales)
    assert max(s.max() / s.min() for s in map(np.asarray, scales.values())) > 3
    x, y = batch_of(9)
    x = x.at[:4].multiply(jnp.array([0, 1e3, 1e30, jnp.nan])[:, None, None])
    # In float32, whatever the dtype: the sum before what is released is rounded.
    wide = jax.tree.map(jnp.float32, params)
    call = jax.jit(quiet)
    release = lambda where: call(state, wide, (x, y), where=where)[0]
    whole = release(jnp.ones(SIZE, bool))
    for out in range(SIZE):
        less = release(jnp.arange(SIZE) != out)
        moved = [SIZE * (np.float64(whole[k]) - np.float64(less[k])) * scales[k]
                 for k in whole]  # fmt: skip
        distance = math.sqrt(sum((m**2).sum() for m in moved))
        assert distance <= LIMIT * (1 + 1e-5)
        assert np.isfinite(distance)
    assert noisy.sensitivity(state) == pytest.approx(LIMIT, rel=1e-6)


def test_costs_what_unscaled_steps_do():
    pytest.importorskip("dp_accounting")
    plain, scaled = dp(scale=None), dp()
    assert plain.event(100, sampling_probability=0.1) == scaled.event(
        100, sampling_probability=0.1
    )
    assert scaled.gradient_noise_multiplier() == 0.8
    rule = privacy.quantile(LIMIT, count_stddev=2.0)
    assert dp(max_norm=rule).gradient_noise_multiplier() > 0.8


@pytest.mark.parametrize("factored", [True, False])
def test_products_of_vectors_keep_gram_matrices(factored):
    grad = dp(factored=factored)
    params, (x, y) = params_of(), batch_of()
    x = jnp.concatenate([x] * 3, 1)[:, :2]
    wide = {**params, "in": jnp.ones((3, 20, 40)), "out": jnp.ones((800, 5)),
            "bias": jnp.ones((20, 40))}  # fmt: skip
    # At first all are alike, which is a product of vectors.
    unlike = lambda v: (
        v + jnp.linspace(0.1, 0.9, v.size, dtype=v.dtype).reshape(v.shape)
    )
    moments = jax.tree.map(unlike, grad.init(wide).scale)
    scales = grad.scale.scale(moments, wide)
    factors = jax.tree.structure(wide).flatten_up_to(scales)
    clip, args = in_scale(grad.clipped, (wide, (x, y)), wide, factors)
    report = str(per_example.explain(clip.signature.fun, args[0], (x[0], y[0])))
    assert ("instantiated" in report) == (not factored)
    assert report.count("Gram") == 2 * factored


@pytest.mark.full
def test_plain_steps_are_those_of_a_scale_that_is_one():
    """Also with other thresholds, norms, groups, and several arguments."""
    one = lambda params: fixed(jax.tree.map(jnp.ones_like, params))
    params, batch = params_of(), batch_of()
    both = {**params, "bias": None}, params["bias"]

    def split(params, bias, example):
        return loss({**params, "bias": bias}, example)

    settings = {
        "quantile": {"max_norm": privacy.quantile(1.0, count_stddev=2.0)},
        "leaf": {"groups": "leaf"},
        "laplace": {"ord": 1},
        "several": {"fun": split, "argnums": (0, 1), "batch_argnums": 2},
    }
    for name, extra in settings.items():
        args = both if name == "several" else (params,)
        tree = both if name == "several" else params
        found = []
        for scale in (None, one(tree)):
            grad = dp(scale=scale, **extra)
            call = jax.jit(functools.partial(grad, where=None))
            found.append(call(grad.init(tree), *args, batch)[0])
        chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)


def flat_loss(params, example):
    """With matrices alone."""
    x, y = example
    hidden = jnp.tanh(x @ params["in"])
    return jnp.square((hidden @ params["out"]).mean(0) - y).mean()


@pytest.mark.parametrize("kind", in_tiers([AxisType.Auto, AxisType.Explicit], 2))
def test_on_a_mesh(kind):
    grad = dp(fun=flat_loss)
    params = {"in": params_of()["in"].reshape(3, 8), "out": params_of()["out"]}
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    host = functools.partial(jax.tree.map, np.asarray)
    split = {"in": put(params["in"], None, "model"), "out": put(params["out"], "data")}
    scale = grad.scale
    follow = jax.jit(lambda p: scale.scale(scale.update(scale.init(p), p), p))
    whole = host(follow(params))
    with jax.set_mesh(mesh):
        chex.assert_trees_all_close(host(follow(split)), whole, rtol=1e-6)
        if kind == AxisType.Explicit:  # or the loss would have to say where sums go
            split = {k: put(p) for k, p in params.items()}
        right, found = grad.init(params), grad.init(split)
        step = jax.jit(functools.partial(grad, where=None))
        for turn in range(3):
            batch = batch_of(turn)
            one, right, _ = step(right, params, batch)
            parted = jax.tree.map(lambda x: put(x, "data"), batch)
            other, found, _ = step(found, split, parted)
            chex.assert_trees_all_close(host(other), host(one), rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_resumed_and_exported_runs_go_on(tmp_path):
    grad = dp(max_norm=privacy.quantile(LIMIT, count_stddev=2.0))
    params, step = params_of(), jax.jit(functools.partial(grad, where=None))
    state = grad.init(params)
    for turn in range(2):
        _, state, _ = step(state, params, batch_of(turn))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
    with ocp.StandardCheckpointer() as saver:
        again = saver.restore(tmp_path / "state", grad.init(params))
    args = params, batch_of(2)
    right = step(state, *args)[:2]
    chex.assert_trees_all_equal(step(again, *args)[:2], right)
    pytest.importorskip("flatbuffers")
    run = jax.jit(lambda *args: grad(*args, where=None)[:2])
    written = jax.export.export(run)(state, *args).serialize()
    chex.assert_trees_all_close(
        jax.export.deserialize(written).call(state, *args), right, rtol=1e-5, atol=1e-6
    )


def test_gradient_that_is_not_finite_leaves_the_state():
    rule = privacy.second_moment(eps_root=EPS)
    params = params_of()
    state = rule.update(rule.init(params), params)
    for bad in (jnp.nan, jnp.inf, 1e30):  # whose square is not
        worse = {**params, "gain": jnp.float32(bad)}
        chex.assert_trees_all_equal(rule.update(state, worse), state)
    # The first scale is that of nothing.
    first = rule.scale(rule.init(params), params)
    for parts, p in zip(first.values(), params.values(), strict=True):
        whole = math.prod(map(np.asarray, parts))
        np.testing.assert_allclose(whole * np.ones(p.shape), EPS**-0.5, rtol=1e-6)


ERRORS = [
    (lambda: privacy.second_moment(1.0, eps_root=EPS), ValueError, "decay"),
    (lambda: privacy.second_moment(eps_root=0.0), ValueError, "eps_root"),
    (lambda: privacy.second_moment(eps_root="1"), TypeError, "eps_root"),
    (lambda: dp(scale=2.0), TypeError, "scale"),
    (lambda: dp(scale=privacy.second_moment), TypeError, "second_moment"),
]


@pytest.mark.parametrize("case", ERRORS, ids=range(len(ERRORS)))
def test_bad_input_gets_one_sentence(case):
    raises_one_sentence(case)
