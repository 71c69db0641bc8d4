"""Sums of powers that leave the range of their dtype before their root does.

They are taken a second time with the elements multiplied by a power of two, in a loop
that the usual step does not turn again.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx._core.reductions import Layout

# What the loops here pass on.
_Carry: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]


def far(dtype: Any) -> float:
    """A power of two at three quarters of the exponents, 2^96 for float32.

    Divided by it what overflowed comes down, and multiplied what vanished comes up,
    with room for 2^60 elements.
    """
    return 2.0 ** (jnp.finfo(dtype).maxexp * 3 // 4)


def rescaled_sums(
    sums: Callable[[jax.Array], jax.Array], layout: Layout
) -> tuple[jax.Array, jax.Array]:
    """Runs `sums(scale)`, again at another scale for groups that left the range.

    One scale for all groups, so that nothing in the loop depends on their number.
    """
    dtype = layout.dtype
    up, tiny = far(dtype), _least(dtype)

    def body(carry: _Carry) -> _Carry:
        scale, total, used = carry
        over, under = total == jnp.inf, total < tiny
        wanted = (scale == 1) | ((scale < 1) & over) | ((scale > 1) & under)
        total = jnp.where(wanted, sums(scale), total)
        used = jnp.where(wanted, scale, used)
        bring_down = (scale == 1) & jnp.any(total == jnp.inf)
        bring_up = (scale <= 1) & jnp.any(total < tiny)
        after = jnp.where(bring_down, 1 / up, jnp.where(bring_up, up, 0.0))
        return after.astype(dtype), total, used

    zeros = jnp.zeros(layout.number, dtype)
    vary: Callable[[jax.Array], jax.Array] = lambda x: _compat.vary(x, layout.apart)
    start = (vary(jnp.ones([], dtype)), vary(zeros), vary(zeros + 1))
    return jax.lax.while_loop(lambda carry: carry[0] > 0, body, start)[1:]


def rescue_out_of_range(
    sums: jax.Array,
    roots: jax.Array,
    around_largest: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    layout: Layout,
) -> tuple[jax.Array, jax.Array]:
    """Takes norms whose sums left the range from `around_largest(start)` instead.

    High powers leave it soon, on either side: no fixed scale brings them back. A loop
    that hardly ever turns, as a branch would be taken always under `vmap`.
    """
    lost = (sums == jnp.inf) | (sums < _least(layout.dtype))

    def body(carry: _Carry) -> _Carry:
        _, value, scale = carry
        again, closer = around_largest(scale)
        done = jnp.zeros_like(carry[0])
        return done, jnp.where(lost, again, value), jnp.where(lost, closer, scale)

    with jax.named_scope("out_of_range"):
        start = (jnp.any(lost), roots, jnp.ones_like(roots))
        return jax.lax.while_loop(lambda carry: carry[0], body, start)[1:]


def _least(dtype: Any) -> float:
    """Below this, powers that were lost could add up to more than a rounding: 2^-72."""
    info = jnp.finfo(dtype)
    return float(info.tiny / info.eps) * 2.0**31


def root(total: jax.Array, power: float) -> jax.Array:
    """`total ** (1 / power)`, to a rounding or two.

    The exponent is rounded, which far from 1 costs a few units: hence a Newton step.
    """
    near = total ** (1 / power)
    error = total / near**power - 1
    return jnp.where(jnp.abs(error) < 1e-3, near + near * error / power, near)


def abs_power(x: jax.Array, power: float) -> jax.Array:
    """`|x| ** power`, real."""
    if power == 2:
        return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else x * x
    return jnp.abs(x) if power == 1 else jnp.abs(x) ** power


def add_up(x: jax.Array) -> jax.Array:
    """The sum of all elements, of small arrays too to a few roundings.

    XLA:CPU adds in short runs along dimensions of at least 32 elements, and an array
    that has none, however many elements it has, in one: 31 x 31 equal numbers came out
    wrong by 9e-6. So those are added up dimension by dimension.
    """
    known = all(isinstance(n, int) for n in x.shape)  # none of a symbolic shape
    if not known or x.size <= 64 or max(x.shape) >= 32:
        return jnp.sum(x)
    while x.ndim > 1:
        x = summed(jnp.sum(x, axis=-1))
    return jnp.sum(x)


def summed(x: jax.Array) -> jax.Array:
    """`x`, but XLA does not see that, and keeps a sum of sums apart."""
    return jnp.maximum(x, 0) + jnp.minimum(x, 0)


def largest(x: jax.Array) -> jax.Array:
    """The largest magnitude, infinite where there is a NaN: collectives may lose it."""
    size = jnp.abs(x)
    return jnp.max(jnp.where(jnp.isnan(size), jnp.inf, size), initial=0.0)


def reciprocal_power_of_two(x: jax.Array) -> jax.Array:
    """A power of two within a factor of two of `1 / x`, but for the ends of the range.

    XLA:CPU may flush a quotient to 0 that is the least normal number.
    """
    limit = jnp.finfo(x.dtype).maxexp - 8
    exponent = jnp.frexp(jnp.where(jnp.isfinite(x) & (x > 0), x, 1))[1]
    # XLA computes a division once, and what is cheaper again for every leaf.
    return 1 / jnp.ldexp(jnp.ones_like(x), jnp.clip(exponent, -limit, limit))
