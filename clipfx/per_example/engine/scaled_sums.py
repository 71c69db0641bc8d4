"""Sums of powers of any magnitude, as four sums at four scales.

Squares leave the range of a dtype long before what is squared does. So elements are
brought to 1 by powers of two before they are raised to a power, and what comes of it is
added up at one of four scales, which together reach from the smallest product of two
numbers to the largest. Such sums, `[..., 4, 2]`, are added like any others: over
leaves, over the turns of a loop, over devices.

The second column adds up the powers of what was added up first. Where gradients of
several positions cancel it is much more than the first, and tells that rounding is what
is left.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx._core.leaves import known_size, times, widen
from clipfx._core.norms import Norms
from clipfx._core.safe_sums import abs_power, add_up
from clipfx.per_example.engine import target

SCALES = 4
# A power below this share of that of its terms is not trusted: rounding would change
# the norm by 2^-20 or more.
CANCELLED = 1 / 16


def exponent(x: jax.Array) -> jax.Array:
    """The least n with `x < 2**n`, but for the ends of the range; 0 for 0 and infinity.

    So far from the ends that a division by `2**n` does not touch them: XLA:CPU makes an
    estimate of it, which is flushed to 0 where the quotient is the least normal number.
    """
    info, whole = jnp.finfo(x.dtype), _whole(x.dtype)
    limit = info.maxexp - 2
    bits = jax.lax.bitcast_convert_type(x, whole)
    n = ((bits >> info.nmant) & (2 * info.maxexp - 1)).astype(jnp.int32)
    n = jnp.where(jnp.isfinite(x) & (x > 0), n - limit, 0)
    return jnp.clip(n, -_far(x.dtype), _far(x.dtype))


def two_to(n: jax.Array, dtype: Any) -> jax.Array:
    """`2**n`, exactly, 0 and infinite where that is no normal number."""
    info, whole = jnp.finfo(dtype), _whole(dtype)
    bits = (jnp.clip(n, -info.maxexp + 1, info.maxexp) + (info.maxexp - 1)).astype(
        whole
    )
    return jax.lax.bitcast_convert_type(bits << info.nmant, dtype)


def inverse_of(n: jax.Array, dtype: Any) -> jax.Array:
    """`2**-n` for n from `exponent`, or 0 where that is too small.

    A division: XLA computes it once, and what is cheaper again for every element.
    """
    return 1 / two_to(jnp.minimum(n, jnp.finfo(dtype).maxexp - 1), dtype)


def _far(dtype: Any) -> int:
    """The largest exponent, 120 for float32."""
    return jnp.finfo(dtype).maxexp - 8


def _whole(dtype: Any) -> Any:
    return jnp.int64 if jnp.finfo(dtype).bits == 64 else jnp.int32


def peaks(x: jax.Array) -> jax.Array:
    """The largest magnitude of every row, `[..., K]` to `[...]`."""
    return jnp.max(jnp.abs(x), axis=-1, initial=0)


def rows_to_one(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows `[..., K]` over powers of two, so that none exceeds 1; and the exponents.

    And which are not zero.
    """
    peak = peaks(x)
    n = exponent(peak)
    return x * inverse_of(n, x.dtype)[..., None], n, peak != 0


NOTHING = -(10**6)  # the exponent of zero


def pair_to_one(
    u: jax.Array, v: jax.Array, scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows `[S, T, K]` and `[S, T, N]`, so that no product of them exceeds 1.

    Products of all rows, times `scale` `[S]`, stay as they are but for one power of
    two, whose exponent is returned last. What vanishes does not matter beside the
    largest.
    """
    (u, n, u_counts), (v, m, v_counts) = rows_to_one(u), rows_to_one(v)
    if scale is not None:
        scale, k, counts = rows_to_one(scale[:, None, None])
        v, m, v_counts = v * scale, m + k, v_counts & counts
    size = jnp.where(u_counts & v_counts, n + m, NOTHING)
    if size.size == 1:
        return u, v, size.reshape(())
    top = jnp.max(size, initial=NOTHING)
    return u, v * inverse_of(jnp.maximum(top - size, 0), v.dtype)[..., None], top


def unusual(
    u: jax.Array, v: jax.Array, count: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """Whether squares may overflow; and what may vanish of them, to be added to terms.

    Args:
      u: `[K, T]`, the largest magnitude of each row.
      v: `[K, T]`, that of the row in the outer product with it.
      count: K numbers of elements of a position's gradient.
    """
    size = u * v
    info = jnp.finfo(size.dtype)
    high = 2.0 ** (info.maxexp // 4)  # 2^32: room for 2^60 elements
    low = 2.0 ** (-info.maxexp * 3 // 8)  # 2^-48: what matters has normal squares
    usual = jnp.isfinite(u) & jnp.isfinite(v)
    largest = jnp.maximum(jnp.maximum(u, v), size)
    smallest = jnp.minimum(jnp.minimum(u, v), size)
    nonzero = jnp.minimum(u, v) > 0
    # Of vanishing rows 2^22 times their share, so that it is seen if it matters.
    share = jnp.asarray([2.0**24 * n**0.5 for n in count], size.dtype)
    lost = jnp.where(nonzero & (smallest < low), size, 0).sum(-1) * share
    least = jnp.maximum(lost * lost, low * low)  # which may vanish itself
    return (usual & (largest > high)).any(-1), jnp.where(lost > 0, least, 0)


def unseen(
    u: jax.Array, v: jax.Array, dims: Sequence[tuple[int, int]]
) -> tuple[jax.Array, jax.Array]:
    """Whether squares may overflow; and what norms may miss, at most all there is.

    From norms of rows, which may have vanished themselves.

    Args:
      u: `[K, T]`, norms of rows, or more.
      v: `[K, T]`, those of the rows in the outer product with them.
      dims: K times how long rows are.
    """
    info = jnp.finfo(u.dtype)
    high = 2.0 ** (info.maxexp // 4)
    low = 2.0 ** (-info.maxexp * 3 // 8)  # as of elements in `unusual`
    k, n = (jnp.asarray([d[j] ** 0.5 for d in dims], u.dtype)[:, None] for j in (0, 1))
    odd = ~(jnp.maximum(jnp.maximum(u, v), u * v) <= high)  # or not a number
    least = jnp.minimum(jnp.minimum(u / k, v / n), u * v / (k * n))
    # Where the square of an element vanishes it is less than that; so may what is
    # missed not be, whose square is to be added.
    gone = 2.0 ** (-info.maxexp // 2 + 4)
    size = jnp.maximum(u, k * gone) * jnp.maximum(v, n * gone)
    size = jnp.maximum(size, gone)
    odd = odd.any(-1)
    return odd, jnp.where((least < low) | odd[:, None], size, 0).sum(-1)


class Elements(NamedTuple):
    """Arrays to be measured.

    Attributes:
      arrays: Whose elements, at one scale for all: what vanishes of a small array does
        not matter beside a large one.
      counts: Whether they are what is measured.
      terms: Whether they are what was added up to it.
    """

    arrays: Sequence[jax.Array]
    counts: bool = True
    terms: bool = True


class Power(NamedTuple):
    """Sums of powers `[K]`, `value * 2**n`.

    Attributes:
      value: Of what is measured.
      terms: Of what was added up to it, in the same units.
      n: int32.
    """

    value: jax.Array
    terms: jax.Array
    n: jax.Array


def power(x: Elements, p: int, dtype: Any) -> Power:
    """The sum of powers of all elements, `[1]`."""
    arrays = _in_one([widen(y, dtype) for y in x.arrays])
    formed = x.counts and x.terms and sum(map(known_size, arrays)) > _SMALL
    plain = formed and target.is_one_cpu(arrays)
    total, n = (_as_they_are if plain else _to_one)(arrays, p)
    zero = jnp.zeros_like(total)
    return Power(
        (total if x.counts else zero)[None], (total if x.terms else zero)[None], n[None]
    )


def _to_one(arrays: list[jax.Array], p: int) -> tuple[jax.Array, jax.Array]:
    """The sum of powers over `2**n`, and n: elements are brought to 1 before."""
    peaks = [jnp.max(jnp.abs(y), initial=0) for y in arrays]
    n = exponent(functools.reduce(jnp.maximum, peaks))
    unit = inverse_of(n, peaks[0].dtype)
    return _total([times(y, unit) for y in arrays], p), p * n


def _total(arrays: list[jax.Array], p: int) -> jax.Array:
    return functools.reduce(jnp.add, [add_up(abs_power(y, p)) for y in arrays])


def _as_they_are(arrays: list[jax.Array], p: int) -> tuple[jax.Array, jax.Array]:
    """The same, where to look for the largest costs twice what the powers do.

    A loop that hardly ever turns brings to 1 what needs it: of no examples, usually.
    """
    total = _total(arrays, p)
    least = 2.0 ** (-jnp.finfo(total.dtype).maxexp // 2)
    odd = ~(jnp.isfinite(total) & (total >= least))

    def again(state: tuple) -> tuple:
        # A barrier, or XLA would take out of the loop what does not change in it.
        total, n = _to_one(jax.lax.optimization_barrier((arrays, state))[0], p)
        return total, n, state[2] & ~state[2]

    state = (total, jnp.zeros_like(total, jnp.int32), odd)
    total, n, _ = jax.lax.while_loop(lambda state: state[2], again, state)
    near = at_scale(total, total)
    return near.value, n + near.n


def _in_one(arrays: list[jax.Array]) -> list[jax.Array]:
    """One array for each dtype, where a copy needs nobody else.

    XLA compiles kernels for every shape, and looks at each array in all its passes.
    And it writes out a scale for each element, if several arrays have the same.
    """
    if not target.is_one_cpu(arrays):
        return arrays
    alike: dict[Any, list[jax.Array]] = {}
    for x in arrays:
        alike.setdefault(x.dtype, []).append(x.reshape(-1))
    return [xs[0] if len(xs) == 1 else jnp.concatenate(xs) for xs in alike.values()]


# What is not worth measuring by itself on a CPU.
_SMALL = 2**12


def joined(parts: Sequence[tuple[Any, Elements]]) -> list[tuple[Any, Elements]]:
    """Those of a group whose arrays are small as one, where that is less to compile."""
    alike: dict[Any, list[jax.Array]] = {}
    for k, (group, x) in enumerate(parts):
        small = sum(map(known_size, x.arrays)) <= _SMALL and target.is_one_cpu(x.arrays)
        key = (group, x.counts, x.terms, None if small else k)
        alike.setdefault(key, []).extend(x.arrays)
    return [(g, Elements(xs, *use)) for (g, *use, _), xs in alike.items()]


def at_scale(total: jax.Array, terms: jax.Array) -> Power:
    """Sums and their terms, brought to 1 together."""
    n = exponent(jnp.maximum(total, terms))
    unit = inverse_of(n, total.dtype)
    return Power(total * unit, terms * unit, n)


def join(powers: Sequence[Power]) -> Power:
    """One after the other."""
    if len(powers) == 1:
        return powers[0]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *powers)


def spread(power: Power) -> jax.Array:
    """Each at the scale that serves it, `[K, 4, 2]`."""
    return spread_pairs(jnp.stack([power.value, power.terms], -1), power.n)


def spread_pairs(pair: jax.Array, n: jax.Array) -> jax.Array:
    """`[K, 4, 2]` from values and their terms `[K, 2]`, to be multiplied by `2**n`."""
    bits = _bits(pair.dtype)
    k = jnp.clip((n >> bits) + SCALES // 2, 0, SCALES - 1)
    pair = pair * two_to(n - _centre(k, bits), pair.dtype)[:, None]
    at = k[:, None] == jnp.arange(SCALES, dtype=jnp.int32)[None]
    return jnp.where(at[:, :, None], pair[:, None], jnp.zeros_like(pair)[:, None])


def norms(sums: jax.Array, p: int, *, bound: bool = False) -> tuple[Norms, jax.Array]:
    """Norms `[...]` from `[..., 4, 2]`, and whether their terms did not cancel.

    Args:
      sums: Of powers, at four scales.
      p: Of the norm.
      bound: Whether to raise norms whose terms did cancel, to what they can be at most.
    """
    dtype, bits = sums.dtype, _bits(sums.dtype)
    limit = jnp.finfo(dtype).maxexp - 2
    terms = sums[..., 1]
    k = jax.lax.broadcasted_iota(jnp.int32, terms.shape, terms.ndim - 1)
    centre = _centre(k, bits)
    top = jnp.where(terms > 0, exponent(terms) + centre, NOTHING)
    top = top.max(-1, keepdims=True)
    top = top + (top & 1) if p == 2 else top
    unit = two_to(jnp.minimum(centre - top, limit), dtype)
    total = (sums * unit[..., None]).sum(-2)
    value, terms = total[..., 0], total[..., 1]
    if bound:
        value = jnp.maximum(value, CANCELLED * terms)
    root = jnp.sqrt(value) if p == 2 else value
    n = jnp.where(value > 0, top[..., 0] >> (p - 1), 0)
    near = jnp.clip(n, -_far(dtype), _far(dtype))
    result = Norms(root * two_to(n - near, dtype), two_to(-near, dtype))
    return result, value >= CANCELLED * terms


def _bits(dtype: Any) -> int:
    """Each of the scales serves this power of two of exponents, 128 of float32."""
    return int(jnp.finfo(dtype).maxexp).bit_length() - 1


def _centre(k: jax.Array, bits: int) -> jax.Array:
    return (2 * k - SCALES + 1) << (bits - 1)
