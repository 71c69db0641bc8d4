"""Parameters behind slices and reshapes, at the places where two views may meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse
from tiers import in_tiers

import clipfx
from clipfx import per_example

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
