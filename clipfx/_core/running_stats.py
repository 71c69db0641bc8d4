"""Running statistics of norms `[G]` that neither overflow nor forget what they hold."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx._core.checks import check_number, is_known
from clipfx._core.export import exportable
from clipfx._core.leaves import divide
from clipfx._core.safe_sums import reciprocal_power_of_two

# What rules answer that have no threshold yet: a state and what it is made of hold no
# infinity, which cannot be averaged, written as JSON or passed by `jax_debug_infs`.
LARGEST = float(jnp.finfo(jnp.float32).max)


@exportable("clipfx.Window")
class Window(NamedTuple):
    """The last rows seen.

    Attributes:
      rows: float32 `[window, G]`, a ring, 0 where nothing has been seen yet.
      count: int32, rows ever seen.
    """

    rows: jax.Array
    count: jax.Array


@exportable("clipfx.UsualNorm")
class UsualNorm(NamedTuple):
    """The norm that is usual, of `adagc` and `band_by_history`.

    Attributes:
      count: int32, steps seen.
      norm: float32 `[G]`; of `adagc` -1 where nothing has been seen yet.

    Reference: none.
    """

    count: jax.Array
    norm: jax.Array


def empty_window(size: Any, width: int) -> Window:
    """Makes a ring of `size` rows; `ValueError` if not a known number >= 1."""
    check_window(size)
    if not is_known(size):
        raise TypeError(
            f"window must be a static Python number, got {size!r}; under "
            'optax.inject_hyperparams pass static_args="window".'
        )
    rows = jnp.zeros((int(size), width), jnp.float32)
    return Window(rows, jnp.zeros([], jnp.int32))


def check_window(size: Any) -> None:
    """Checks the number of rows, where it is known."""
    advice = "it is the number of steps to remember"
    check_number("window", size, "[1, inf)", advice)
    if is_known(size) and int(size) != size:
        raise ValueError(f"window must be a whole number, got {size!r}; {advice}.")


def push(window: Window, row: jax.Array) -> Window:
    """Replaces the oldest row."""
    size = window.rows.shape[0]
    # Not an update of a slice, whose operands have to be of one mesh.
    here = jnp.arange(size, dtype=jnp.int32) == window.count % size
    rows = jnp.where(here[:, None], row[None], window.rows)
    # The count stops short of overflow where the ring begins anew.
    last = jnp.iinfo(jnp.int32).max // size * size - 1
    after = jnp.where(window.count == last, last + 1 - size, window.count + 1)
    return Window(rows, after)


def rows_seen(window: Window) -> jax.Array:
    """Which rows `[window, 1]` hold something."""
    size = window.rows.shape[0]
    return (jnp.arange(size, dtype=jnp.int32) < window.count)[:, None]


def percentile(window: Window, q: Any) -> jax.Array:
    """The percentile `[G]` of the rows seen, linear between neighbours."""
    ordered = jnp.sort(jnp.where(rows_seen(window), window.rows, LARGEST), axis=0)
    last = jnp.minimum(window.count, window.rows.shape[0]) - 1
    place = jnp.clip(q, 0, 100) / 100 * last.astype(jnp.float32)
    below = jnp.minimum(jnp.floor(place).astype(jnp.int32), last)
    low, high = ordered[below], ordered[jnp.minimum(below + 1, last)]
    return low + (high - low) * (place - below.astype(jnp.float32))


def multiple(ratio: Any, x: jax.Array) -> jax.Array:
    """`ratio * x`, at most the largest number; that also for infinity times 0."""
    ratio, largest = jnp.asarray(ratio).astype(x.dtype), jnp.finfo(x.dtype).max
    room = jnp.where(
        ratio > 1, largest * (1 - 2.0**-20) / jnp.maximum(ratio, 1), largest
    )
    product = jnp.where(ratio < jnp.inf, ratio, 0) * jnp.minimum(x, room)
    return jnp.where((x > room) | (ratio == jnp.inf), largest, product)


def average(weight: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Old and new with weights that sum to 1, which rounding does not make infinite."""
    return jnp.minimum((1 - weight) * old + weight * new, jnp.finfo(new.dtype).max)


def hypot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The root of `a² + b²` for a, b >= 0, with a finite derivative at 0."""
    low, high = jnp.minimum(a, b), jnp.maximum(a, b)
    ratio = divide(low, jnp.where(high > 0, high, 1))
    return jnp.minimum(high * jnp.sqrt(1 + ratio * ratio), jnp.finfo(high.dtype).max)


def shares(x: jax.Array) -> jax.Array:
    """A vector >= 0 over its 2-norm, whatever its size, with a derivative at 0."""
    peak = jax.lax.stop_gradient(jnp.max(x, initial=0.0))
    unit = x * reciprocal_power_of_two(peak)  # 1 / 3e38 is no normal number
    total = jnp.sum(unit * unit)
    return divide(unit, jnp.sqrt(jnp.where(total > 0, total, 1)))


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
