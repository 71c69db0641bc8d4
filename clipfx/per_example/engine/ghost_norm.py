r"""Norms of sums of outer products to the power of p, without forming them.

For :math:`G = \sum_t u_t v_t^T`, :math:`\|G\|^2 = \sum_{t,s} (u_t^T u_s)(v_t^T v_s)`:
two small Gram matrices instead of one large G. With one position it is
:math:`|u|^2 |v|^2`. Rows u may be one-hot, given as ids: their Gram matrix says which
ids are equal, and that of one-hot and dense rows is a look-up. For other p than 2 there
is only the case of one position, :math:`|u|_p^p |v|_p^p`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from clipfx import _compat
from clipfx._core.safe_sums import abs_power, add_up, summed
from clipfx.per_example.engine import scaled_sums, target
from clipfx.per_example.engine.outer_products import Factors
from clipfx.per_example.engine.scaled_sums import Elements, Power

# More positions than this are taken in tiles, half of which symmetry saves.
TILE = 256


class Products(NamedTuple):
    """A sum of outer products, of one example.

    Attributes:
      factors: All of the same leaf or the same region of it, aligned.
      precision: Of the matrix products.
    """

    factors: list[Factors]
    precision: jax.lax.PrecisionLike

    @property
    def positions(self) -> int:
        """How many outer products are added up."""
        return sum(f.right.shape[0] * f.right.shape[1] for f in self.factors)


def powers_of_products(
    products: Sequence[Products], ord: int, dtype: Any
) -> tuple[list[int], Power]:
    """The norms of sums of outer products, to the power of p.

    Args:
      products: The sums.
      ord: p, 2 unless there is one position only.
      dtype: Of the powers.

    Returns:
      Which of `products` each power is of, and the powers.
    """
    # Those of as many positions together: small numbers are traced once for all.
    alike: dict[int, list[int]] = {}
    order, powers = [], []
    for k, sums in enumerate(products):
        if sum(f.right.shape[1] for f in sums.factors) == 1:
            order.append(k)
            powers.append(_of_one_position(sums.factors[0], ord, dtype))
        else:
            alike.setdefault(sums.positions, []).append(k)
    for some in alike.values():
        assert ord == 2, ord
        order += some
        each = [_of_several(products[k], dtype) for k in some]
        columns = zip(*(x[:4] for x in each), strict=True)
        total, terms, u, v = map(_compat.stack, columns)
        odd, rest = scaled_sums.unusual(u, v, [x[4] for x in each])
        # What cannot be measured so is not to be trusted, whatever came of it.
        total = jnp.where(odd, 0, jnp.maximum(total, 0))
        terms = jnp.where(odd, jnp.inf, terms + rest)
        powers.append(scaled_sums.at_scale(total, terms))
    return order, scaled_sums.join(powers)


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _of_several(
    sums: Products, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, int]:
    """The square of the norm, that of terms, and what tells whether to trust them.

    That is the largest magnitudes of rows u and v, and the size of their product.
    """
    factors = _align(sums.factors)
    if any(f.by_index for f in factors):  # look-ups do not know about meshes
        factors = [
            Factors(_compat.whole(f.left), _compat.whole(f.right), f.key)
            for f in factors
        ]
    dense = _join([f for f in factors if not f.by_index], dtype)
    rows = _join([f for f in factors if f.by_index], dtype)
    total = terms = jnp.zeros((), dtype)
    left, right, count = [], [], 1
    if dense is not None:
        total, terms = _gram(dense.left, dense.right, sums.precision, dtype)
        left.append(_peaks(dense.left).astype(dtype))
        right.append(_peaks(dense.right).astype(dtype))
        count = dense.left.shape[-1] * dense.right.shape[-1]
    if rows is not None:
        rows = rows._replace(right=rows.right.astype(dtype))
        total += add_up(abs_power(_sum_rows(rows.left, rows.right), 2))
        terms += add_up(abs_power(rows.right, 2))
        right.append(_peaks(rows.right))
        left.append(jnp.ones_like(right[-1]))
        count = max(count, rows.right.shape[-1])
    if dense is not None and rows is not None:
        take = functools.partial(jnp.take_along_axis, axis=2)
        ids = jnp.broadcast_to(
            rows.left[:, None], (*dense.left.shape[:2], rows.left.shape[1])
        )
        inner = _matmul(dense.right.astype(dtype), rows.right, sums.precision, dtype)
        total += 2 * add_up(take(dense.left, ids).astype(dtype) * inner)
    one = lambda xs: xs[0] if len(xs) == 1 else jnp.concatenate(xs)
    return total, terms, one(left), one(right), count


def _peaks(rows: jax.Array) -> jax.Array:
    """The largest magnitude of each row, flat."""
    return _compat.whole(scaled_sums.peaks(rows)).reshape(-1)


def _of_one_position(f: Factors, ord: int, dtype: Any) -> Power:
    """Of one position, at any magnitude."""
    if f.by_index:
        return scaled_sums.power(Elements([f.right]), ord, dtype)
    left, right, top = scaled_sums.pair_to_one(
        _cast(f.left, dtype), _cast(f.right, dtype)
    )
    total = (abs_power(left, ord).sum(-1) * abs_power(right, ord).sum(-1)).sum()
    top = jnp.where(top == scaled_sums.NOTHING, 0, top)
    return Power(total[None], total[None], ord * top[None])


def fits(keys: list[tuple | None]) -> bool:
    """Whether sums of outer products with these keys can be measured together."""
    known = [key for key in keys if key is not None]
    if len(known) < len(keys):
        return False
    s, k, n = known[0]
    return all(key in ((s, k, n), (s, n, k)) for key in keys)


def _align(factors: list[Factors]) -> list[Factors]:
    """Exchanges left and right where a leaf is used transposed; ids stay left."""
    if len(factors) == 1:
        return factors
    base = next((f.key for f in factors if f.by_index), factors[0].key)

    def turn(f: Factors) -> Factors:
        if f.key == base:
            return f
        return Factors(f.right, f.left, base)

    return [turn(f) for f in factors]


def _join(factors: list[Factors], dtype: Any) -> Factors | None:
    """One sum over the positions of all.

    Where there are products of half precision numbers stay such: products are exact in
    float32, and a copy of the gradient of a head is larger than all else.
    """
    if not factors:
        return None

    def join(xs: list[jax.Array]) -> jax.Array:
        kinds = {x.dtype for x in xs}
        half = len(kinds) == 1 and next(iter(kinds)).itemsize == 2
        if target.is_cpu() or not half:
            xs = [_cast(x, dtype) for x in xs]
        return xs[0] if len(xs) == 1 else jnp.concatenate(xs, axis=1)

    key = factors[0].key if len(factors) == 1 else None
    return Factors(
        join([f.left for f in factors]), join([f.right for f in factors]), key
    )


def _matmul(
    a: jax.Array, b: jax.Array, precision: jax.lax.PrecisionLike, dtype: Any
) -> jax.Array:
    """`[S, T, T']` from `[S, T, K]` and `[S, T', K]`."""
    spec = _compat.explicit_spec(a)
    spec = None if spec is None else _compat.sharding(a, (spec[0], None, None))
    dims = (((2,), (2,)), ((0,), (0,)))
    # Of half precision as it is: products are exact, a copy would be twice as large.
    return lax.dot_general(
        a, b, dims, precision=precision, preferred_element_type=dtype, out_sharding=spec
    )


def _gram(
    left: jax.Array, right: jax.Array, precision: jax.lax.PrecisionLike, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """The sum over pairs of positions, in tiles, and that of pairs of a position alone.

    By position: where gradients cancel the sum of a row does, that of a tile does not.
    Of several tiles some 2^20 times the rounding of their sum counts like pairs.
    """
    length = left.shape[1]
    count = -(-length // TILE)
    edges = [length * k // count for k in range(count + 1)]
    part = lambda k: tuple(x[:, edges[k] : edges[k + 1]] for x in (left, right))
    rows: list[list[jax.Array]] = [[] for _ in range(count)]
    terms = jnp.zeros((), dtype)
    for k in range(count):
        for j in range(k + 1):
            (u, v), (x, y) = part(k), part(j)
            tile = _matmul(u, x, precision, dtype) * _matmul(v, y, precision, dtype)
            rows[k].append(tile.sum((0, 2)))
            if j < k:
                rows[j].append(tile.sum((0, 1)))
            else:
                flat = tile.reshape(tile.shape[0], -1)  # a slice: gathers are slow
                terms += lax.slice_in_dim(flat, 0, None, tile.shape[1] + 1, 1).sum()
    add = lambda xs: functools.reduce(jnp.add, xs)
    total = jnp.concatenate([summed(add(row)) for row in rows]).sum()
    if count > 1:
        sizes = jnp.concatenate([add(map(jnp.abs, row)) for row in rows])
        terms = jnp.maximum(terms, jnp.sqrt((sizes * sizes).sum()))
    return total, terms


def _sum_rows(ids: jax.Array, rows: jax.Array) -> jax.Array:
    """Adds up rows of equal id, `[S, T, N]`, each sum where its id comes first."""

    def one(ids, rows):
        first = jnp.argmax(ids[:, None] == ids[None, :], axis=1)
        return jax.ops.segment_sum(rows, first, num_segments=ids.shape[0])

    return jax.vmap(one)(ids, rows)
