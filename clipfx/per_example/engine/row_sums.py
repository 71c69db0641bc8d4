"""Sums over examples of arrays that have a row for each."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from clipfx._core.leaves import known_size, times, widen
from clipfx.per_example.engine import target

_SMALL = 2**16  # numbers, which a cache holds


def mask(x: jax.Array, good: jax.Array | None) -> jax.Array:
    """Zeros in the rows `[B, ...]` of examples that are not good, bool `[B]`."""
    return x if good is None else jnp.where(column(good, x), x, jnp.zeros_like(x))


def column(numbers: jax.Array, x: jax.Array) -> jax.Array:
    """`[B]` to be multiplied with `[B, ...]`."""
    return numbers.reshape((-1,) + (1,) * (x.ndim - 1))


def by_rows(x: jax.Array) -> jax.Array:
    """`x`, one example after the other in the memory of a CPU.

    XLA lays what a program computes out as it likes, and loops copy what is not so.
    Who reads it has to merge its dimensions again: of two reshapes without a copy, one
    before the barrier and one after it, XLA makes a kernel that copies.
    """
    if not _goes_by_rows(x):
        return x
    flat = x.reshape(x.shape[0], -1)
    return jax.lax.optimization_barrier(flat).reshape(x.shape)


def _goes_by_rows(x: jax.Array) -> bool:
    return _SMALL < known_size(x) < math.inf and target.is_one_cpu([x])


def sum_of_rows(
    x: jax.Array, factors: Sequence[jax.Array], good: jax.Array | None
) -> jax.Array:
    """The sum of `[B, ...]` times factors `[B, ...]`, in float32 or wider.

    Factors have as many dimensions as `x`, 1 long where they are the same.
    """
    if _goes_by_rows(x):
        return _row_by_row(x, factors, good)
    return mask(functools.reduce(times, factors, widen(x)), good).sum(0)


def _row_by_row(
    x: jax.Array, factors: Sequence[jax.Array], good: jax.Array | None
) -> jax.Array:
    """The same, where XLA:CPU would take tens of times as long.

    It adds up along a first dimension with strides, and writes out what it adds up. A
    product with the factors would need that, and a copy without what is not good.
    """

    def scaled(row: tuple) -> jax.Array:
        x, factors, good = row
        wide = functools.reduce(times, factors, widen(x))
        return wide if good is None else jnp.where(good, wide, 0)

    differ = [k for y in factors for k, n in enumerate(y.shape) if n > 1]
    lead = 1 + max(differ, default=0)
    merged = lambda y: y.reshape(*y.shape[:lead], -1)
    rows = merged(x), tuple(map(merged, factors)), good
    start = jnp.zeros_like(scaled(jax.tree.map(lambda x: x[0], rows)))
    add = lambda total, row: (total + scaled(row), None)
    return jax.lax.scan(add, start, rows)[0].reshape(x.shape[1:])
