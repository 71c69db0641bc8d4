r"""Norms of sums of outer products to the power of p, without forming them.

For :math:`G = \sum_t u_t v_t^T`, :math:`\|G\|^2 = \sum_{t,s} (u_t^T u_s)(v_t^T v_s)`:
two small Gram matrices instead of one large G. With one position it is
:math:`|u|^2 |v|^2`. Rows u may be one-hot, given as ids: their Gram matrix says which
ids are equal, and that of one-hot and dense rows is a look-up. For other p than 2 there
is only the case of one position, :math:`|u|_p^p |v|_p^p`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from clipfx import _compat
from clipfx._core.safe_sums import abs_power, add_up, summed
from clipfx.per_example.engine import scaled_sums, target
from clipfx.per_example.engine.coefficients import Scale
from clipfx.per_example.engine.outer_products import Factors
from clipfx.per_example.engine.scaled_sums import Elements, Power

# More positions than this are taken in tiles, half of which symmetry saves. Small ones
# leave most of a TPU's matrix unit idle.
_TILE, _TILE_ELSEWHERE = 256, 512


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
    alike: dict[Any, list[int]] = {}
    order, powers = [], []
    for k, sums in enumerate(products):
        if sum(f.right.shape[1] for f in sums.factors) == 1:
            order.append(k)
            powers.append(_of_one_position(sums.factors[0], ord, dtype))
        else:
            scaled = any(f.scale is not None for f in sums.factors)
            alike.setdefault((sums.positions, scaled), []).append(k)
    for some in alike.values():
        assert ord == 2, ord
        order += some
        each = [_of_several(products[k], dtype) for k in some]
        columns = zip(*(x[:4] for x in each), strict=True)
        total, terms, u, v = map(_compat.stack, columns)
        total, dims = jnp.maximum(total, 0), [x.dims for x in each]
        if target.is_cpu():
            odd, rest = scaled_sums.unusual(u, v, [k * n for k, n in dims])
        else:
            odd, missed = scaled_sums.unseen(u, v, dims)
            most = missed * missed
            # Nothing is formed here: what is missed counts as much as it may be.
            total = jnp.where(odd, most, (jnp.sqrt(total) + missed) ** 2)
            odd, rest = ~jnp.isfinite(total), jnp.maximum(total - terms, 0)
        # What cannot be measured so is not to be trusted, whatever came of it.
        total = jnp.where(odd, 0, total)
        terms = jnp.where(odd, jnp.inf, terms + rest)
        power = scaled_sums.at_scale(total, terms)
        more = [x.n for x in each if x.n is not None]
        if more:
            power = power._replace(n=power.n + 2 * _compat.stack(more))
        powers.append(power)
    return order, scaled_sums.join(powers)


def _tile() -> int:
    """How many positions are taken at once."""
    return _TILE if target.is_cpu() else _TILE_ELSEWHERE


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


class _Square(NamedTuple):
    """A squared norm, and what tells whether to trust it.

    Attributes:
      total: The square.
      terms: The same of terms.
      left: `[T]`, the largest magnitude of every row u; elsewhere than on CPUs its
        norm, which needs no pass over rows, or as much as that can be.
      right: The same of rows v.
      dims: How long rows are.
      n: The exponent of what the norm is to be multiplied by, None if there is none.
    """

    total: jax.Array
    terms: jax.Array
    left: jax.Array
    right: jax.Array
    dims: tuple[int, int]
    n: jax.Array | None


def _of_several(sums: Products, dtype: Any) -> _Square:
    """Of several positions."""
    factors = _align(sums.factors)
    if any(f.by_index for f in factors):  # look-ups do not know about meshes
        factors = [
            f._replace(left=_compat.whole(f.left), right=_compat.whole(f.right))
            for f in factors
        ]
    factors, before, n = _scaled(factors, dtype)
    dense = _join([f for f in factors if not f.by_index], dtype)
    rows = _join([f for f in factors if f.by_index], dtype)
    total = terms = jnp.zeros((), dtype)
    left, right, dims = [], [], [(1, 1)]
    if dense is not None:
        total, terms, *norms = _gram(dense, sums.precision, dtype)
        if target.is_cpu():
            norms = [_peaks(x).astype(dtype) for x in (dense.left, dense.right)]
        left.append(norms[0])
        right.append(norms[1])
        dims.append((dense.left.shape[-1], dense.right.shape[-1]))
    if rows is not None:
        rows = rows._replace(right=rows.right.astype(dtype))
        total += add_up(abs_power(_sum_rows(rows.left, rows.right), 2))
        terms += add_up(abs_power(rows.right, 2))
        dims.append((1, rows.right.shape[-1]))
        right.append(_sizes(_peaks(rows.right), dims[-1][1]))
        left.append(jnp.ones_like(right[-1]))
    if dense is not None and rows is not None:
        take = functools.partial(jnp.take_along_axis, axis=2)
        ids = jnp.broadcast_to(
            rows.left[:, None], (*dense.left.shape[:2], rows.left.shape[1])
        )
        inner = _matmul(dense.right.astype(dtype), rows.right, sums.precision, dtype)
        total += 2 * add_up(take(dense.left, ids).astype(dtype) * inner)
    most = max(dims, key=math.prod)
    left += [_sizes(x, most[0]) for x, _ in before]
    right += [_sizes(x, most[1]) for _, x in before]
    one = lambda xs: xs[0] if len(xs) == 1 else jnp.concatenate(xs)
    return _Square(total, terms, one(left), one(right), most, n)


def _sizes(peaks: jax.Array, dim: int) -> jax.Array:
    """What `_Square` has of rows, from their largest magnitudes."""
    return peaks if target.is_cpu() else peaks * dim**0.5


# Of rows v this many exponents are squared together, and so many bands are; of
# coefficients as many as leave room for both. What is less counts as that much.
BAND, BANDS, ROOM = 40, 2, 20


class Weighted(NamedTuple):
    """An outer product times coefficients of its elements, of one example.

    Attributes:
      left: `[S, K]`.
      right: `[S, N]`.
      c: `[S, K, N]`, or products of numbers of rows and columns.
    """

    left: jax.Array
    right: jax.Array
    c: jax.Array | Scale


def power_of_weighted(x: Weighted, p: int, dtype: Any) -> Power:
    r"""The norm to the power of p, :math:`\sum_{kn} |u_k|^p |c_{kn}|^p |v_n|^p`.

    One product with a matrix that all examples share. Coefficients hide numbers from
    each other, so that none may vanish beside a larger one: those of u have their own
    exponents, those of v are taken in bands.
    """
    if isinstance(x.c, Scale):
        return _power_of_separable(x.left, x.right, x.c, p, dtype)
    table = x.left, x.right, x.c
    u, v, c = (jnp.abs(_compat.whole(y)).astype(dtype) for y in table)
    n, m = (scaled_sums.exponent(jnp.max(y, initial=0)) for y in (c, v))
    raised = jnp.maximum(c * scaled_sums.inverse_of(n, dtype), 2.0**-ROOM)
    c = jnp.where(c > 0, raised, jnp.zeros_like(c))
    each = scaled_sums.exponent(v)
    band = jnp.clip((m - each) // BAND, 0, BANDS - 1)
    mantissas = v * scaled_sums.inverse_of(each, dtype)
    below = jnp.maximum(each - m + BAND * band, -BAND)
    rows = mantissas * scaled_sums.two_to(below, dtype)
    bands = jnp.arange(BANDS, dtype=jnp.int32)[None, :, None]
    which = band[:, None] == bands
    rows = jnp.where(which, rows[:, None], jnp.zeros_like(rows)[:, None])
    sums = _matmul(abs_power(rows, p), abs_power(c, p), "highest", dtype)
    e, a = scaled_sums.exponent(sums), scaled_sums.exponent(u)[:, None]
    size = p * (a + m + n - bands * BAND) + e
    u = (u * scaled_sums.inverse_of(a[:, 0], dtype))[:, None]
    terms = abs_power(u, p) * (sums * scaled_sums.inverse_of(e, dtype))
    nothing = scaled_sums.NOTHING
    top = jnp.max(jnp.where(terms > 0, size, nothing), initial=nothing)
    total = (terms * scaled_sums.two_to(jnp.minimum(size - top, 0), dtype)).sum()
    return _unless_infinite(x.left, x.right, total, top)


def _power_of_separable(
    u: jax.Array, v: jax.Array, c: Scale, p: int, dtype: Any
) -> Power:
    r"""The same of :math:`c_{kn} = c a_k b_n`: a product of two sums."""
    left, n = _power_of_row(u, c.left, p, dtype)
    right, m = _power_of_row(v, c.right, p, dtype)
    number, k = _power_of_row(c.number[:, None], None, p, dtype)
    size = n + m + k
    terms = left * right * number
    top = jnp.max(size, where=terms > 0, initial=scaled_sums.NOTHING)
    total = (terms * scaled_sums.two_to(jnp.minimum(size - top, 0), dtype)).sum()
    return _unless_infinite(u, v, total, top)


def _power_of_row(
    u: jax.Array, a: jax.Array | None, p: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Sums `[S]` of powers of rows `[S, K]` times numbers, and exponents of them.

    Numbers may hide the largest of a row, so both have exponents of their own.
    """
    rows = [jnp.abs(_compat.whole(y)).astype(dtype) for y in (u, a) if y is not None]
    each = [scaled_sums.exponent(y) for y in rows]
    sized = [y * scaled_sums.inverse_of(n, dtype)
             for y, n in zip(rows, each, strict=True)]  # fmt: skip
    mantissa = functools.reduce(jnp.multiply, sized)
    n = functools.reduce(jnp.add, each)
    top = jnp.max(n, axis=1, where=mantissa > 0, initial=scaled_sums.NOTHING)
    seen = mantissa * scaled_sums.two_to(jnp.minimum(n - top[:, None], 0), dtype)
    top = jnp.where(top == scaled_sums.NOTHING, 0, top)
    return abs_power(seen, p).sum(1), p * top


def _unless_infinite(
    u: jax.Array, v: jax.Array, total: jax.Array, top: jax.Array
) -> Power:
    # The sum is multiplied last: by then its gradient must not be infinite.
    usual = jnp.isfinite(jnp.max(jnp.abs(u)) * jnp.max(jnp.abs(v)))
    total = jnp.where(usual, total, jnp.inf)[None]
    top = jnp.where(top == scaled_sums.NOTHING, 0, top)
    return Power(total, total, top[None])


def _scaled(factors: list[Factors], dtype: Any) -> tuple[list[Factors], list, Any]:
    """Multiplies rows by their coefficients, but for one power of two.

    Returns the factors, magnitudes of rows as they were before, and as they are after,
    where what has vanished counts as the least number; and the exponent.
    """
    if all(f.scale is None for f in factors):
        return factors, [], None
    factors = [f._replace(left=_cast(f.left, dtype), right=_cast(f.right, dtype))
               for f in factors]  # fmt: skip
    one = lambda f: Scale(jnp.ones(f.right.shape[0], dtype))
    scales = [jax.tree.map(lambda x: x.astype(dtype), f.scale or one(f))
              for f in factors]  # fmt: skip
    largest = [jnp.max(jnp.abs(x.number), initial=0) for x in scales]
    n = scaled_sums.exponent(functools.reduce(jnp.maximum, largest))
    done, magnitudes = [], []
    for f, scale in zip(factors, scales, strict=True):
        x = (scale.number * scaled_sums.inverse_of(n, dtype))[:, None, None]
        times = lambda rows, by: rows if by is None else rows * by[:, None]
        left, right = times(f.left, scale.left), times(f.right, scale.right) * x
        ones = jnp.ones_like(right[..., 0])
        for u, v in ((f.left, f.right), (left, right)):
            sizes = (ones if f.by_index else scaled_sums.peaks(u), scaled_sums.peaks(v))
            magnitudes.append(sizes)
        least = jnp.where(x[..., 0] != 0, jnp.finfo(dtype).tiny, 0)
        *_, before, after = magnitudes
        magnitudes[-1] = tuple(
            jnp.where(x > 0, jnp.maximum(y, least), y)
            for x, y in zip(before, after, strict=True)
        )
        done.append(f._replace(left=left, right=right, scale=None))
    flat = lambda x: _compat.whole(x).reshape(-1)
    return done, [(flat(u), flat(v)) for u, v in magnitudes], n


def _peaks(rows: jax.Array) -> jax.Array:
    """The largest magnitude of each row, flat."""
    return _compat.whole(scaled_sums.peaks(rows)).reshape(-1)


def _of_one_position(f: Factors, ord: int, dtype: Any) -> Power:
    """Of one position, at any magnitude."""
    if f.by_index and f.scale is None:
        return scaled_sums.power(Elements([f.right]), ord, dtype)
    right = _cast(f.right, dtype)
    u = jnp.ones_like(right[..., :1]) if f.by_index else _cast(f.left, dtype)
    number = None if f.scale is None else f.scale.number
    left, right, top = scaled_sums.pair_to_one(u, right, number)
    total = (abs_power(left, ord).sum(-1) * abs_power(right, ord).sum(-1)).sum()
    top = jnp.where(top == scaled_sums.NOTHING, 0, top)
    if f.scale is not None:
        # The sum is multiplied last: by then its gradient must not be infinite.
        size = scaled_sums.peaks(u) * scaled_sums.peaks(_cast(f.right, dtype))
        total = jnp.where(jnp.isfinite(size).all(), total, jnp.inf)
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
        scale = f.scale and Scale(f.scale.number, f.scale.right, f.scale.left)
        return Factors(f.right, f.left, base, scale, f.block)

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
    left, right = join([f.left for f in factors]), join([f.right for f in factors])
    if all(f.block is None for f in factors):
        return Factors(left, right, key)
    first = lambda f: jnp.zeros(f.right.shape[:2], jnp.int32)
    blocks = [first(f) if f.block is None else f.block for f in factors]
    return Factors(left, right, key, block=jnp.concatenate(blocks, axis=1))


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
    dense: Factors, precision: jax.lax.PrecisionLike, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The sum over pairs of positions, in tiles, and that of pairs of a position alone.

    And the norms of rows on the left and on the right. Positions of different blocks
    share no element.

    By position: where gradients cancel the sum of a row does, that of a tile does not.
    Of several tiles some 2^20 times the rounding of their sum counts like pairs.
    """
    length = dense.right.shape[1]
    count = -(-length // _tile())
    edges = [length * k // count for k in range(count + 1)]
    cut = lambda x, k: x[:, edges[k] : edges[k + 1]]
    part = lambda k: (cut(dense.left, k), cut(dense.right, k))
    rows: list[list[jax.Array]] = [[] for _ in range(count)]
    squares: list[tuple[jax.Array, jax.Array]] = []
    for k in range(count):
        for j in range(k + 1):
            (u, v), (x, y) = part(k), part(j)
            left_tile = _matmul(u, x, precision, dtype)
            right_tile = _matmul(v, y, precision, dtype)
            tile = left_tile * right_tile
            if dense.block is not None:
                block, other = cut(dense.block, k), cut(dense.block, j)
                same = block[:, :, None] == other[:, None, :]
                tile = jnp.where(same, tile, jnp.zeros_like(tile))
            rows[k].append(tile.sum((0, 2)))
            if j < k:
                rows[j].append(tile.sum((0, 1)))
            else:
                squares.append((_diagonal(left_tile), _diagonal(right_tile)))
    add = lambda xs: functools.reduce(jnp.add, xs)
    total = jnp.concatenate([summed(add(row)) for row in rows]).sum()
    u, v = (jnp.concatenate(xs, 1) for xs in zip(*squares, strict=True))
    terms = (u * v).sum()
    if count > 1:
        sizes = jnp.concatenate([add(map(jnp.abs, row)) for row in rows])
        terms = jnp.maximum(terms, jnp.sqrt((sizes * sizes).sum()))
    return total, terms, jnp.sqrt(u).reshape(-1), jnp.sqrt(v).reshape(-1)


def _diagonal(tiles: jax.Array) -> jax.Array:
    """`[S, T]` of `[S, T, T]`."""
    flat = tiles.reshape(tiles.shape[0], -1)  # a slice: gathers are slow
    return lax.slice_in_dim(flat, 0, None, tiles.shape[1] + 1, 1)


def _sum_rows(ids: jax.Array, rows: jax.Array) -> jax.Array:
    """Adds up rows of equal id, `[S, T, N]`, each sum where its id comes first."""

    def one(ids, rows):
        first = jnp.argmax(ids[:, None] == ids[None, :], axis=1)
        return jax.ops.segment_sum(rows, first, num_segments=ids.shape[0])

    return jax.vmap(one)(ids, rows)
