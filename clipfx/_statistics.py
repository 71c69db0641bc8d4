"""Running statistics of norms `[G]` that neither overflow nor forget what they hold."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx._checks import check_number, is_known
from clipfx._tree import divide


class Window(NamedTuple):
    """The last rows seen.

    Attributes:
      rows: float32 `[window, G]`, a ring, infinite where nothing has been seen yet.
      count: int32, rows ever seen.
    """

    rows: jax.Array
    count: jax.Array


def empty_window(size: Any, width: int) -> Window:
    """Makes a ring of `size` rows; `ValueError` if not a known number >= 1."""
    check_window(size)
    if not is_known(size):
        raise TypeError(
            f"window must be a static Python number, got {size!r}; under "
            'optax.inject_hyperparams pass static_args="window".'
        )
    rows = jnp.full((int(size), width), jnp.inf, jnp.float32)
    return Window(rows, jnp.zeros([], jnp.int32))


def check_window(size: Any) -> None:
    """Checks the number of rows, where it is known."""
    advice = "it is the number of steps to remember"
    check_number("window", size, "[1, inf)", advice)
    if is_known(size) and int(size) != size:
        raise ValueError(f"window must be a whole number, got {size!r}; {advice}.")


def push(window: Window, row: jax.Array) -> Window:
    """Replaces the oldest row."""
    at = window.count % window.rows.shape[0]
    rows = jax.lax.dynamic_update_index_in_dim(window.rows, row, at, 0)
    # The count stops short of overflow where the ring begins anew.
    size = window.rows.shape[0]
    last = jnp.iinfo(jnp.int32).max // size * size - 1
    after = jnp.where(window.count == last, last + 1 - size, window.count + 1)
    return Window(rows, after)


def percentile(window: Window, q: Any) -> jax.Array:
    """The percentile `[G]` of the rows seen, linear between neighbours."""
    ordered = jnp.sort(window.rows, axis=0)
    last = jnp.minimum(window.count, window.rows.shape[0]) - 1
    place = jnp.clip(q, 0, 100) / 100 * last.astype(jnp.float32)
    below = jnp.minimum(jnp.floor(place).astype(jnp.int32), last)
    low, high = ordered[below], ordered[jnp.minimum(below + 1, last)]
    return low + (high - low) * (place - below.astype(jnp.float32))


def multiple(ratio: Any, x: jax.Array) -> jax.Array:
    """`ratio * x`, infinite for an infinite ratio also at and differentiated in 0."""
    ratio = jnp.asarray(ratio).astype(x.dtype)
    bounded = ratio < jnp.inf
    return jnp.where(bounded, jnp.where(bounded, ratio, 0) * x, jnp.inf)


def hypot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The root of `a² + b²` for a, b >= 0, with a finite derivative at 0."""
    low, high = jnp.minimum(a, b), jnp.maximum(a, b)
    ratio = divide(low, jnp.where(high > 0, high, 1))
    return high * jnp.sqrt(1 + ratio * ratio)


def vector_norm(x: jax.Array) -> jax.Array:
    """The 2-norm of one vector >= 0, whatever its size, with a derivative at 0."""
    peak = jax.lax.stop_gradient(jnp.max(x, initial=0.0))
    unit = x / jnp.where(peak > 0, peak, 1)
    total = jnp.sum(unit * unit)
    return peak * jnp.sqrt(jnp.where(total > 0, total, 1))


def increment(count: jax.Array) -> jax.Array:
    """One more, but never past the largest number."""
    return jnp.asarray(optax.safe_increment(count))


def is_before(count: jax.Array, steps: Any) -> jax.Array:
    """Whether fewer than `steps` have been counted; `steps` may be a float."""
    return count.astype(jnp.float32) < jnp.asarray(steps).astype(jnp.float32)


def unbiased_weight(decay: Any, steps: jax.Array) -> jax.Array:
    """The weight of the newest value in a bias-corrected exponential average.

    `(1 - weight) * mean + weight * value` is the usual average divided by
    `1 - decay**steps`. Exactly 1 at the first step; steps count from 1.
    """
    log = jnp.log(jnp.asarray(decay).astype(jnp.float32))
    weight = jnp.expm1(log) / jnp.expm1(log * steps.astype(jnp.float32))
    return jnp.where(steps == 1, 1, jnp.minimum(weight, 1))
