"""Parameters behind slices and reshapes, at the places where two views may meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse
from tiers import in_tiers

import clipfx
from clipfx import per_example
from clipfx.per_example.engine import trace

B, D = 4, 6


def check(loss, params, batch, **kwargs):
    """Norms and clipped sums are those of gradients formed one by one."""
    rows = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batch)
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(rows)]
    norm = np.sqrt(sum((x**2).sum(tuple(range(1, x.ndim))) for x in leaves))
    limit = float(np.median(norm))
    grad = jax.jit(per_example.clipped_grad(loss, limit, **kwargs))
    sums, info = grad(params, batch)
    np.testing.assert_allclose(info.norm[:, 0], norm, rtol=2e-5)
    factor = np.minimum(1, limit / norm)
    for x, y in zip(jax.tree.leaves(sums), leaves, strict=True):
        want = np.tensordot(factor, y, 1)
        np.testing.assert_allclose(x, want, atol=2e-5 * np.abs(want).max())


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


CUTS = [
    lambda w: (w[1:5][1:3], w[1:5][2:4]),  # a slice of a slice
    lambda w: (w[:3], w[2:5]),  # that share one row
    lambda w: (w[:3], w[3:5]),  # side by side
    lambda w: (w[2:8].reshape(3, 2, D)[1:].reshape(4, D), w[:4]),
    lambda w: (w.reshape(4, 2, D)[1:3].reshape(4, D), w.reshape(2, 4, D)[1]),
    lambda w: (w.T.reshape(D, 4, 2)[:, 1:2].reshape(D, 2).T, w[3:5]),
    lambda w: (w[::2], w[1::2]),
    lambda w: (w[4:8][0:2], w[4:6]),  # the same rows
    lambda w: (w[4:8][0:2], w[0:2]),
    lambda w: (w.reshape(6, 8)[2:4, :6], w[2:4]),  # which mixes rows and columns
    lambda w: (w.reshape(6, 8)[2:4, :6], w[4:6]),
]


@pytest.mark.parametrize("method", in_tiers(["auto", "ghost"], {"auto"}))
@pytest.mark.parametrize("cut", in_tiers(CUTS, 2))
def test_two_views_of_one_matrix(cut, method):
    def loss(w, example):
        one, other = cut(w)
        return jnp.tanh(one @ example[0]).sum() + jnp.sin(other @ example[1]).sum()

    batch = (draw(B, D), draw(B, D, seed=1))
    check(loss, draw(8, D, seed=2), batch, norm_method=method)


def test_narrow_ids_of_a_long_table():
    """There are as many rows as their type counts, and ids beyond them."""
    ids = jnp.array([[0, 1, 1], [255, 2, 0], [5, 5, 5], [1, 0, 254]], jnp.uint8)

    def loss(table, example):
        index, weight = example
        picked = table.at[index].get(mode="fill", fill_value=0)
        return (picked * weight).sum()

    for rows in (200, 255):
        for method in ("auto", "ghost"):
            batch = (ids, draw(B, 3, D))
            check(loss, draw(rows, D, seed=2), batch, norm_method=method)


def test_two_look_ups_in_other_shapes():
    """Which leave nothing known of rows cannot be measured together."""

    def loss(table, ids):
        one, other = table.reshape(12, 4)[ids], table.T.reshape(12, 4)[ids]
        return jnp.sin(one).sum() + jnp.cos(other).sum()

    ids = jnp.array([[0, 1, 2], [1, 1, 0], [2, 0, 1], [2, 2, 2]])
    check(loss, draw(8, D, seed=2), ids, norm_method="ghost")


ORDER = np.random.default_rng(0).permutation(D)
MASK = np.random.default_rng(1).random((D, D)) < 0.6
MULTIPLIED = {
    "number": lambda w, s: 0.5 * w,
    "argument": lambda w, s: w * s,
    "argument by layer": lambda w, s: w * s * jnp.arange(1.0, D + 1)[:, None],
    "negated": lambda w, s: -w,
    "divided": lambda w, s: (1 + w) / np.float32(3),
    "mask": lambda w, s: jnp.where(MASK, w, 0),
    "another mask": lambda w, s: jnp.tril(w) * s,
    "padded": lambda w, s: jnp.pad(w, ((0, 0), (1, 2)))[:, :] * s,
    "permuted": lambda w, s: w[ORDER][:, jnp.asarray(ORDER[::-1])],
    "taken": lambda w, s: jnp.take(w, jnp.argsort(jnp.asarray(ORDER)), axis=1),
    "reversed": lambda w, s: jnp.flip(w) * s,
    "cut": lambda w, s: jax.lax.dynamic_slice_in_dim(w, jnp.int32(1) + 1, 4, 1) * s,
    "called": lambda w, s: jax.jit(lambda w: jax.jit(jnp.multiply)(w, s))(w),
    "joined": lambda w, s: jnp.concatenate(
        [w[:, :3] * s, jnp.ones((D, 1)), -w[:, 3:]], 1
    ),
    "of a branch": lambda w, s: w * jnp.where(s > 1, s, 2.0),
}


@pytest.mark.parametrize("remat", in_tiers([False, True], {False}))
@pytest.mark.parametrize("name", in_tiers(MULTIPLIED.keys(), 5))
def test_a_parameter_times_constants_is_not_instantiated(name, remat):
    """Of one position; the scale is an argument that is no parameter."""

    def loss(w, x, scale):
        return jnp.tanh(x @ MULTIPLIED[name](w, scale)).sum()

    if remat and name != "joined":  # which uses it twice
        loss = jax.checkpoint(loss)
    params, batch, scale = draw(D, D, seed=2), draw(B, D), jnp.float32(1.7)
    table = per_example.explain(loss, params, batch[0], scale)
    assert table.rows[0].method == "outer product"
    check(lambda w, x: loss(w, x, scale), params, batch)
    grad = jax.jit(per_example.clipped_grad(loss, 1.0))
    rows = jax.jit(jax.vmap(jax.grad(loss), (None, 0, None)))(params, batch, scale)
    norm = np.linalg.norm(np.asarray(rows).reshape(B, -1), axis=1)
    _, info = grad(params, batch, scale)
    np.testing.assert_allclose(info.norm[:, 0], norm, rtol=2e-5)


def test_weights_scaled_in_half_precision():
    """Their gradient is not rounded, JAX's is."""

    def loss(w, x):
        half = w.astype(jnp.bfloat16) * jnp.bfloat16(0.3)
        return jnp.tanh(x.astype(jnp.bfloat16) @ half).astype(jnp.float32).sum()

    w, x = draw(D, D, seed=2), draw(B, D)
    assert per_example.explain(loss, w, x[0]).rows[0].method == "outer product"
    sums, info = jax.jit(per_example.clipped_grad(loss, 0.1))(w, x)
    rows = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(w, x), np.float64)
    norm = np.linalg.norm(rows.reshape(B, -1), axis=1)
    np.testing.assert_allclose(info.norm[:, 0], norm, rtol=1e-2)
    want = np.tensordot(np.minimum(1, 0.1 / norm), rows, 1)
    np.testing.assert_allclose(sums, want, atol=1e-2 * np.abs(want).max())


ROW, COLUMN = np.float32([1, 0, 1, 1, 0, 1])[:, None], np.float32([[1, 2, 0, 1, 0, 2]])
OUTER = ROW * COLUMN
PRODUCTS = {  # and whether it is one of vectors
    "of vectors": (lambda w, c: w * (ROW * c), True),
    "written out": (lambda w, c: w * OUTER, True),
    "rows written out": (lambda w, c: jnp.where(np.repeat(ROW > 0, D, 1), w, 1), True),
    "its opposite": (lambda w, c: jnp.where((ROW * c).astype(bool), 0, w), False),
    "cut off": (lambda w, c: w * (1.3 * (ROW + 1) * c).astype(int), False),
    "rounded": (
        lambda w, c: w * ((ROW + 0.3) * (c + 0.3)).astype(jnp.bfloat16),
        False,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_masks_of_several_positions(name):
    scale, is_product = PRODUCTS[name]

    def loss(w, x, column):
        with jax.numpy_dtype_promotion("standard"):
            return jnp.tanh(x @ scale(w, column)).sum()

    params, batch, column = draw(D, D, seed=2), draw(B, 3, D), jnp.asarray(COLUMN)
    report = per_example.explain(loss, params, batch[0], column)
    assert report.rows[0].method == ("Gram" if is_product else "instantiated")
    clip = per_example.clipped_grad(loss, 1.0)
    norm = jax.jit(clip)(params, batch, column)[1].norm
    rows = jax.vmap(jax.grad(loss), (None, 0, None))(params, batch, column)
    exact = np.linalg.norm(np.asarray(rows).reshape(B, -1), axis=1)
    np.testing.assert_allclose(norm[:, 0], exact, rtol=2e-5)
    check(lambda w, x: loss(w, x, column), params, batch)


def test_masked_kernels_that_are_used_twice():
    """The mask, of shape and space like the kernel, differs along the latter alone."""
    mask = np.ones((3, 2, D, D), np.float32)
    mask[2] = mask[1, 1] = 0
    conv = lambda x, w: jax.lax.conv_general_dilated(
        x[None], w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]

    def loss(w, x):
        w = w * mask
        return jnp.tanh(conv(jnp.tanh(conv(x, w)), w)).sum()

    params, batch = draw(3, 2, D, D, seed=2), draw(B, 4, 3, D)
    check(loss, params, batch, norm_method="ghost")
    signature = trace.Signature(loss, 0, 1, False, "ghost")
    plan = trace.prepare(signature, (params, batch), {}).program.plan
    assert plan.methods == ["Gram"]


NO_VIEWS = {
    "twice": lambda w, s: w[np.array([0, 0, 1, 2, 3, 4])],
    "outside": lambda w, s: w.at[jnp.array([1, D])].get(mode="fill", fill_value=0),
    "not known": lambda w, s: w[jnp.argsort(s * jnp.arange(float(D)))],
    "chosen by itself": lambda w, s: jnp.where(w > 0, w, 0),
    "by itself": lambda w, s: w * jax.lax.stop_gradient(w),
    "dilated": lambda w, s: jax.lax.pad(w, 0.0, ((0, 0, 0), (0, 0, 1))),
    "inverse": lambda w, s: s / w,
}


@pytest.mark.parametrize("name", in_tiers(NO_VIEWS.keys(), 4))
def test_what_only_looks_like_a_constant_is_instantiated(name):
    scale = jnp.float32(1.7)

    def loss(w, x):
        return jnp.tanh(x[None] @ NO_VIEWS[name](w, scale).T[:D]).sum()

    def traced(w, x, scale):
        return jnp.tanh(x[None] @ NO_VIEWS[name](w, scale).T[:D]).sum()

    params, batch = draw(D, D, seed=2), draw(B, D)
    table = per_example.explain(traced, params, batch[0], scale)
    assert table.rows[0].method == "instantiated"
    check(loss, params, batch)


@pytest.mark.full
def test_a_scale_of_every_turn_of_a_loop_that_shares_its_weight():
    """The coefficient is not the same wherever the parameter is."""

    def loss(w, x):
        step = lambda h, s: (jnp.tanh(h @ (w * s)), None)
        return jax.lax.scan(step, x, jnp.array([0.5, 2.0, -1.0]))[0].sum()

    check(loss, draw(D, D, seed=2), draw(B, D))


@pytest.mark.full
def test_more_populations_than_the_type_of_the_ids_counts():
    loss = lambda w, x: jnp.vdot(w, x)
    batch, ids = draw(B, D), jnp.array([0, 127, 3, 0], jnp.int8)
    sums, _ = jax.jit(per_example.population_grad(loss, 300))(
        jnp.zeros(D), batch, population_ids=ids
    )
    want = np.zeros((300, D), np.float32)
    np.add.at(want, np.asarray(ids, int), np.asarray(batch))
    np.testing.assert_allclose(sums, want, rtol=1e-6)


def test_padding_of_sparse_arrays_repeats_no_index():
    """What is beyond the shape is padding, and may be there more than once."""
    places = jnp.array([[0, 1], [3, 3], [3, 3]])
    padded = sparse.BCOO((jnp.array([3.0, 0.0, 0.0]), places), shape=(3, 3))
    norm = clipfx.global_norm({"w": padded})
    assert float(norm) == 3.0
