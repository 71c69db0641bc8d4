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

from typing import Any

import jax
import jax.numpy as jnp

from clipfx._norms import Norms
from clipfx._range import add_up
from clipfx._tree import times, widen

SCALES = 4
# A power below this share of that of its terms is not trusted: rounding would change
# the norm by 2^-20 or more.
CANCELLED = 1 / 16


def exponent(x: jax.Array) -> jax.Array:
    """The least n with `x <= 2**n`, kept so that `2**n` and `2**-n` are normal."""
    limit = jnp.finfo(x.dtype).maxexp - 2
    usual = jnp.isfinite(x) & (x > 0)
    return jnp.clip(jnp.frexp(jnp.where(usual, x, 1))[1], -limit, limit)


def two_to(n: jax.Array, dtype: Any) -> jax.Array:
    """`2**n`, exactly."""
    return jnp.ldexp(jnp.ones_like(n, dtype), n)


def rows_to_one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows `[..., K]` over powers of two, so that none exceeds 1; and the exponents.

    Rows of zeros, and such that are not finite, stay as they are.
    """
    n = exponent(jnp.max(jnp.abs(x), axis=-1, initial=0))
    return x * two_to(-n, x.dtype)[..., None], n


NOTHING = -(10**6)  # the exponent of zero


def pair_to_one(u: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows `[S, T, K]` and `[S, T, N]`, so that no product of them exceeds 1.

    Products of all rows stay as they are but for one power of two, whose exponent is
    returned last. What vanishes does not matter beside the largest.
    """
    u, n = rows_to_one(u)
    v, m = rows_to_one(v)
    here = jnp.any(u != 0, -1) & jnp.any(v != 0, -1)
    size = jnp.where(here, n + m, NOTHING)
    top = jnp.max(size, initial=NOTHING)
    return u, v * two_to(jnp.minimum(size - top, 0), v.dtype)[..., None], top


def raised(x: jax.Array, p: int) -> jax.Array:
    """`|x|**p`, real."""
    if p == 1:
        return jnp.abs(x)
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def power(x: jax.Array, p: int) -> jax.Array:
    """The sum of powers of all elements of `x`, `[4, 2]`."""
    x = widen(x)
    n = exponent(jnp.max(jnp.abs(x), initial=0))
    total = add_up(raised(times(x, two_to(-n, jnp.finfo(x.dtype).dtype)), p))
    return spread(total, total, p * n)


def spread(value: jax.Array, terms: jax.Array, n: jax.Array) -> jax.Array:
    """`value * 2**n` and `terms * 2**n`, scalars, as `[4, 2]`."""
    width = _width(value.dtype)
    k = jnp.clip((n + 2 * width) // width, 0, SCALES - 1)
    pair = jnp.stack([value, terms]) * two_to(n - _centre(k, width), value.dtype)
    at = k == jnp.arange(SCALES, dtype=jnp.int32)
    return jnp.where(at[:, None], pair[None], jnp.zeros_like(pair)[None])


def norms(sums: jax.Array, p: int) -> tuple[Norms, jax.Array]:
    """Norms `[...]` from `[..., 4, 2]`, and whether their terms did not cancel."""
    dtype, width = sums.dtype, _width(sums.dtype)
    limit = jnp.finfo(dtype).maxexp - 2
    value, terms = sums[..., 0], sums[..., 1]
    centre = _centre(
        jax.lax.broadcasted_iota(jnp.int32, terms.shape, terms.ndim - 1), width
    )
    size = exponent(terms) + centre
    top = jnp.where(terms > 0, size, -10 * width).max(-1, keepdims=True)
    top = -(-top // p) * p
    unit = two_to(jnp.clip(centre - top, -4 * width, limit), dtype)
    value, terms = (value * unit).sum(-1), (terms * unit).sum(-1)
    root = jnp.sqrt(value) if p == 2 else value
    n = jnp.where(value > 0, top[..., 0] // p, 0)
    near = jnp.clip(n, -limit, limit)
    found = Norms(root * two_to(n - near, dtype), two_to(-near, dtype))
    return found, ~(value < CANCELLED * terms)


def _width(dtype: Any) -> int:
    """How many exponents each of the scales serves: 140 of float32."""
    return 140 * jnp.finfo(dtype).maxexp // 128


def _centre(k: jax.Array, width: int) -> jax.Array:
    return (2 * k - SCALES + 1) * width // 2
