r"""Norms of sums over the examples of a population, without forming the sums.

Of a dense layer the sum is :math:`\sum_t u_t v_t^T` over examples and positions t, and
as within one example, :math:`\sum_{t,s} (u_t^T u_s)(v_t^T v_s)` is the square of its
norm: the same inner products serve all populations. Gradients of examples may cancel,
and then rounding is what remains; where that can be seen the sums are formed after all.
Of a table of rows only those that were looked up are added up.
"""

import functools

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx._core.leaves import widen
from clipfx._core.norms import Norms
from clipfx._core.populations import measure
from clipfx.per_example.engine import outer_products, scaled_sums
from clipfx.per_example.engine.populations import Pass, contributions
from clipfx.per_example.engine.row_sums import mask
from clipfx.per_example.engine.rules.site import IDS, NUMBERS

MOST = 2048  # positions, whose inner products are kept


def choose(run: Pass) -> dict[int, str]:
    """Leaves whose contributions have norms that are cheaper than they are, and how."""
    plan, how = run.call.program.plan, {}
    if any(run.call.axes) or any(_compat.explicit_spec(run.good) or ()):
        return how  # it needs the examples of other devices
    further = run.member.shape[1] - 1
    for leaf, places in enumerate(plan.uses):
        if plan.methods[leaf] != "sum" or len(places) != 1:
            continue
        ((site, part),) = places
        if site.view.axis is not None or part.scaled is not None:
            continue
        if site.rule.left == IDS:
            blocks, length, rows, _ = outer_products.sizes(site, part)
            if blocks == 1 and 2 * run.call.size * length < further * rows:
                how[leaf] = "rows"
        elif site.rule.left == NUMBERS and not (site.rule.copied or site.product):
            _, length, k, n = outer_products.sizes(site, part)
            length *= run.call.size
            if length <= MOST and length * (k + n) < further * k * n:
                how[leaf] = "products"
    return how


def norms(run: Pass, how: dict[int, str]) -> Norms:
    """Norms `[K + 1]` of contributions of some leaves, and of their sum."""
    make = {"rows": _of_rows, "products": _of_products}
    sums = functools.reduce(jnp.add, [make[how[leaf]](run, leaf) for leaf in how])
    measured, trusted = scaled_sums.norms(sums, 2)
    # Of the whole only a small share will matter.
    alike = lambda x: jax.tree.map(lambda y: y.astype(measured.value.dtype), x)
    return jax.lax.cond(
        trusted[:-1].all(),
        lambda: measured,
        lambda: alike(measure(contributions(run, list(how)))),
    )


def _of_products(run: Pass, leaf: int) -> jax.Array:
    """Squares of norms `[K + 1, 4, 2]`."""
    left, right, member = _positions(run, leaf)
    left, right, top = scaled_sums.pair_to_one(left, right)
    dims = (((2,), (2,)), ((0,), (0,)))
    gram = lambda x: jax.lax.dot_general(x, x, dims, precision="highest")
    both = (gram(left) * gram(right)).sum(0)
    member = jnp.concatenate([member, member.sum(1, keepdims=True)], axis=1)
    inner = jnp.matmul(both, member, precision="highest")
    squares = jnp.maximum((member * inner).sum(0), 0)
    terms = (member * both.diagonal()[:, None]).sum(0)
    return _at_scale(squares, terms, 2 * top)


def _of_rows(run: Pass, leaf: int) -> jax.Array:
    """Squares of norms `[K + 1, 4, 2]`."""
    ids, rows, member = _positions(run, leaf)
    top = scaled_sums.exponent(jnp.max(jnp.abs(rows), initial=0))
    rows = rows * scaled_sums.inverse_of(top, rows.dtype)
    number = member.argmax(1)
    each = _squared_sums(ids[0], number, rows[0])
    by_population = [
        jnp.where(number == k, each, 0).sum() for k in range(member.shape[1])
    ]
    whole = _squared_sums(ids[0], jnp.zeros_like(number), rows[0]).sum()
    squares = jnp.stack([*by_population, whole])
    return _at_scale(squares, squares, 2 * top)


def _at_scale(squares: jax.Array, terms: jax.Array, n: jax.Array) -> jax.Array:
    pairs = jnp.stack([squares, terms], 1)
    return scaled_sums.spread_pairs(pairs, jnp.broadcast_to(n, squares.shape))


def _positions(run: Pass, leaf: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Factors of the gradients of all examples, `[S, B T, ...]`, and `[B T, K]`.

    Those of no population are zero.
    """
    ((site, part),) = run.call.program.plan.uses[leaf]
    make = lambda x, d: tuple(outer_products.factors(site, part, x, d)[:2])
    pair = jax.vmap(make)(run.tape.operand(site), run.tape.deltas[site.tap])
    counts = run.member.sum(1) > 0

    def joined(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = mask(widen(x), counts)
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])

    left, right = map(joined, pair)
    return left, right, jnp.repeat(run.member, pair[1].shape[2], axis=0)


def _squared_sums(ids: jax.Array, number: jax.Array, rows: jax.Array) -> jax.Array:
    """Adds up rows `[N, ...]` of equal id and number, and squares.

    Returns `[N]`, each square where its id and number come first, elsewhere 0.
    """
    order = jnp.lexsort((ids, number))
    ids, number = ids[order], number[order]
    new = jnp.ones(ids.shape, bool)
    new = new.at[1:].set((ids[1:] != ids[:-1]) | (number[1:] != number[:-1]))
    place = jnp.cumsum(new) - 1
    sums = jax.ops.segment_sum(
        rows[order], place, num_segments=ids.size, indices_are_sorted=True
    )
    first = jnp.where(new, (sums * sums).sum(-1)[place], 0)
    return jnp.zeros_like(first).at[order].set(first)
