"""From norms, thresholds and a response to the factors of a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipfx._core.leaves import divide
from clipfx._core.norms import Norms
from clipfx._core.running_stats import LARGEST
from clipfx._core.safe_sums import far

# A factor this close to 1 is 1. It is wider than the rounding of a norm and of what
# was scaled by it, so that a clipped group is left alone when it is clipped again.
SLACK = 2.0**-21


def finite_norms(norms: Norms, dtype: Any = jnp.float32) -> jax.Array:
    """The norms as plain numbers, at most the largest of `dtype`."""
    largest = jnp.asarray(jnp.finfo(dtype).max, norms.value.dtype)
    # Capped before the division, which then does not overflow.
    capped = jnp.minimum(norms.value, largest * jnp.minimum(norms.scale, 1))
    value = jnp.where(jnp.isfinite(norms.value), capped, norms.value)
    return (value / norms.scale).astype(dtype)


def factors(
    norms: Norms,
    limit: jax.Array,
    response: Callable[[jax.Array, jax.Array], jax.Array],
    nonfinite: str,
) -> tuple[jax.Array, jax.Array]:
    """Two factors `[G]` to apply in turn: their product may be no normal number."""
    dtype = norms.value.dtype
    info = jnp.finfo(dtype)
    norm, limit = finite_norms(norms, dtype), limit.astype(dtype)
    target = response(norm, limit)
    beyond = norm >= info.max  # the true norm may be larger
    same = (jnp.abs(target - norm) <= SLACK * norm) & ~beyond
    same |= (target == norm) & (limit == jnp.inf)
    same |= limit == LARGEST  # no threshold, in a finite number
    # A quotient beyond these powers of two may be no normal number: divide twice.
    up = far(dtype)
    near = (target >= norm / up) & (target / up <= norm) & ~beyond
    once = same | near | ((target == 0) & ~beyond)
    # Quotients come last: XLA computes a division once, and anything cheaper again in
    # the loop over every leaf, which takes it twice as long to compile.
    divisor = jnp.where(once, 1, jnp.where(target <= norm, up, 1 / up))
    measured = norms.value * (1 / divisor / norms.scale)
    finite = jnp.isfinite(norms.value)
    instead = 0.0 if nonfinite == "zero" else jnp.nan
    target = jnp.where(finite, jnp.where(same, 1, target), instead)
    measured = jnp.where(same | ~finite | (norms.value == 0), 1, measured)
    return 1 / divisor, divide(target, measured)


def exceeds(norm: jax.Array, limit: jax.Array) -> jax.Array:
    """Whether a norm is above its threshold by more than rounding."""
    return norm * (1 - SLACK) > limit


def check_nonfinite(nonfinite: Any) -> None:
    """Checks the policy for norms that are not finite."""
    if nonfinite not in ("propagate", "zero"):
        raise ValueError(
            f'nonfinite must be "propagate" or "zero", got {nonfinite!r}; to skip the '
            "whole step wrap the optimizer in optax.apply_if_finite."
        )
