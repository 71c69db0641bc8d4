"""Contributions of populations: their norms, bounds and sum."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipfx._core.checks import (
    check_count,
    check_number,
    check_static,
)
from clipfx._core.clip_factors import finite_norms
from clipfx._core.groups import Groups
from clipfx._core.leaves import times
from clipfx._core.norms import Norms, group_norms
from clipfx._core.running_stats import LARGEST, multiple

DECAY = 0.9  # of the average norm of a population


class Bounds(NamedTuple):
    """How contributions are bounded.

    Attributes:
      max_ratio: To the reference.
      reference: `"min"`, `"ema"` or the number of a population.
      floor: Share of the norm of the whole sum that the reference never goes below.
    """

    max_ratio: Any
    reference: str | int
    floor: Any


def measure(contributions: Sequence[Sequence[jax.Array]]) -> Norms:
    """Norms `[K + 1]` of the contributions of K populations and of their sum.

    Args:
      contributions: K times leaves `[...]`, float32 or wider.
    """
    total = [functools.reduce(jnp.add, x) for x in zip(*contributions, strict=True)]
    rows = [*contributions, total]
    index = [k for k, leaves in enumerate(rows) for _ in leaves]
    return group_norms(rows, Groups(tuple(map(str, range(len(rows)))), tuple(index)), 2)


def bound(
    norms: Norms, bounds: Bounds, averages: Any = (), present: Any = None
) -> tuple[jax.Array, Any]:
    """Decides on thresholds.

    Args:
      norms: `[K + 1]`, from `measure`.
      bounds: How.
      averages: `[K]`, averages of norms, 0 where never seen; only for `"ema"`.
      present: bool `[K]`, or None for all whose contribution is not zero.

    Returns:
      Thresholds `[K]`, for `clip_factors.factors`; the next averages.
    """
    dtype = norms.value.dtype
    number: Callable[[Any], jax.Array] = lambda x: jnp.asarray(x).astype(dtype)
    *_, whole = every = finite_norms(norms, dtype)
    norm = every[:-1]
    usable = jnp.isfinite(norm) & (norm > 0)
    usable = usable if present is None else usable & present
    usual = smallest = jnp.where(usable, norm, LARGEST).min()
    if bounds.reference == "ema":
        now = finite_norms(norms)[:-1]
        after = jnp.where(averages > 0, DECAY * averages + (1 - DECAY) * now, now)
        averages = jnp.where(usable, after, averages)
        usual = number(jnp.where(averages > 0, averages, LARGEST).min())
    elif bounds.reference != "min":
        chosen = bounds.reference
        usual = jnp.where(usable[chosen], norm[chosen], smallest)
    # A sum that is not finite has no share to keep.
    least = jnp.where(jnp.isfinite(whole), multiple(number(bounds.floor), whole), 0)
    usual = jnp.maximum(usual, least)
    # Below the bound by a rounding, but not below the reference.
    ratio = number(bounds.max_ratio) * (1 - 2.0 ** (-49 if norm.itemsize == 8 else -20))
    limit = jnp.maximum(usual, multiple(ratio, usual))
    return jnp.broadcast_to(limit, norm.shape), averages


def each(norms: Norms) -> Norms:
    """Those `[K]` of the populations alone, without that of the sum."""
    return Norms(norms.value[:-1], norms.scale[:-1])


def combine(
    contributions: Sequence[Sequence[jax.Array]],
    factors: Sequence[jax.Array],
    norm: jax.Array,
) -> list[jax.Array]:
    """The sum of contributions times factors `[K]`, of those with a finite norm."""
    finite = jnp.isfinite(norm)

    def bounded(k: int, x: jax.Array) -> jax.Array:
        for factor in factors:
            x = times(x, factor[k])
        return jnp.where(finite[k], x, jnp.zeros_like(x))

    add = functools.partial(functools.reduce, jnp.add)
    return [add([bounded(k, x) for k, x in enumerate(row)])
            for row in zip(*contributions, strict=True)]  # fmt: skip


def check_populations(num_populations: Any) -> int:
    """Checks the number of populations."""
    return check_count(
        "num_populations", num_populations, 1, "it is the number of populations"
    )


def check_bounds(bounds: Bounds, num_populations: int) -> Bounds:
    """Checks how contributions are bounded."""
    check_number("max_ratio", bounds.max_ratio, "[1, inf]", "math.inf bounds nothing")
    check_number("floor", bounds.floor, "[0, inf)", "0.05 is usual, 0 is none")
    reference = bounds.reference
    if isinstance(reference, str) and reference in ("min", "ema"):
        return bounds
    check_static("reference", reference)
    number = isinstance(reference, int | np.integer) and not isinstance(reference, bool)
    if not (number and 0 <= reference < num_populations):
        raise ValueError(
            f'reference must be "min", "ema" or the number of one of {num_populations} '
            f"populations, got {reference!r}; the first is the default."
        )
    return bounds._replace(reference=int(reference))
