r"""Norms of sums over the examples of a population, without forming the sums.

Of a dense layer the sum is :math:`\sum_t u_t v_t^T` over examples and positions t, and
as within one example, :math:`\sum_{t,s} (u_t^T u_s)(v_t^T v_s)` is the square of its
norm: the same inner products serve all populations. Gradients of examples may cancel,
and then rounding is what remains; where that can be seen the sums are formed after all.
Of a table of rows only those that were looked up are added up.
"""

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx._fair import measure
from clipfx._tree import widen
from clipfx.per_example import _factors, _squares
from clipfx.per_example._groups import Pass, contributions

# A square below this share of the sum of squares of examples is not trusted: rounding
# would change the norm by 2^-20 or more.
CANCELLED = 1 / 16
MOST = 2048  # positions, whose inner products are kept


def choose(run: Pass) -> dict[int, str]:
    """Leaves whose contributions have norms that are cheaper than they are, and how."""
    plan, found = run.call.program.plan, {}
    if any(run.call.axes) or any(_compat.explicit_spec(run.good) or ()):
        return found  # it needs the examples of other devices
    further = run.member.shape[1] - 1
    for leaf, places in enumerate(plan.uses):
        if plan.roads[leaf] != "sum" or len(places) != 1:
            continue
        ((site, part),) = places
        if site.view.axis is not None:
            continue
        if site.kind == "gather":
            blocks, length, rows, _ = _factors.sizes(site, part)
            if blocks == 1 and 2 * run.call.size * length < further * rows:
                found[leaf] = "rows"
        elif site.kind == "dot_general":
            _, length, k, n = _factors.sizes(site, part)
            length *= run.call.size
            if length <= MOST and length * (k + n) < further * k * n:
                found[leaf] = "products"
    return found


def norms(run: Pass, how: dict[int, str]) -> jax.Array:
    """Norms `[K + 1]` of contributions of some leaves, and of their sum."""
    count = run.member.shape[1] + 1
    squares = jnp.zeros(count, run.member.dtype)
    for leaf in (k for k in how if how[k] == "rows"):
        squares += _of_rows(run, leaf)
    dense = [k for k in how if how[k] == "products"]
    if not dense:
        return jnp.sqrt(squares)
    pairs = jnp.stack([jnp.stack(_of_products(run, leaf)) for leaf in dense])
    found, terms = pairs.sum(0)

    def formed():
        norms = measure(contributions(run, dense))
        return jnp.square(norms.value / norms.scale)

    # Of the whole only a small share will matter.
    own = found[:-1]
    trusted = (own >= CANCELLED * terms[:-1]).all() | ~jnp.isfinite(own).all()
    found = jax.lax.cond(trusted, lambda: jnp.maximum(found, 0), formed)
    return jnp.sqrt(squares + found)


def _of_products(run: Pass, leaf: int) -> tuple[jax.Array, jax.Array]:
    """Squares `[K + 1]`, and the sums of the squares of all examples."""
    left, right, member = _positions(run, leaf)
    dims = (((2,), (2,)), ((0,), (0,)))
    gram = lambda x: jax.lax.dot_general(x, x, dims, precision="highest")
    both = (gram(left) * gram(right)).sum(0)
    member = jnp.concatenate([member, member.sum(1, keepdims=True)], axis=1)
    inner = jnp.matmul(both, member, precision="highest")
    return (member * inner).sum(0), (member * both.diagonal()[:, None]).sum(0)


def _of_rows(run: Pass, leaf: int) -> jax.Array:
    """Squares `[K + 1]`."""
    ids, rows, member = _positions(run, leaf)
    number = member.argmax(1)
    each = _squared_sums(ids[0], number, rows[0])
    own = [jnp.where(number == k, each, 0).sum() for k in range(member.shape[1])]
    whole = _squared_sums(ids[0], jnp.zeros_like(number), rows[0]).sum()
    return jnp.stack([*own, whole])


def _positions(run: Pass, leaf: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Factors of the gradients of all examples, `[S, B T, ...]`, and `[B T, K]`.

    Those of no population are zero.
    """
    ((site, part),) = run.call.program.plan.uses[leaf]
    make = lambda x, d: tuple(_factors.factors(site, part, x, d)[:2])
    pair = jax.vmap(make)(run.tape.operand(site), run.tape.deltas[site.tap])
    counts = run.member.sum(1) > 0

    def joined(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = jnp.where(counts.reshape((-1,) + (1,) * (x.ndim - 1)), widen(x), 0)
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
    first = jnp.where(new, _squares.power(sums, axis=-1)[place], 0)
    return jnp.zeros_like(first).at[order].set(first)
