"""How large elements or units are: the largest of them, and how many are too large."""

from typing import Any

import jax
import jax.numpy as jnp

from clipfx._core.clip_factors import exceeds
from clipfx._core.groups import Groups
from clipfx._core.leaves import widest
from clipfx._core.norms import Norms, group_sizes
from clipfx._core.reductions import (
    Layout,
    as_tuple,
    combine,
    per_shard,
    stacked_axes_of_trees,
    varying,
)
from clipfx._core.safe_sums import add_up, largest


def peak_and_share(
    sizes: list[jax.Array], limit: jax.Array | None, axis_name: Any = None
) -> tuple[Norms, jax.Array]:
    """The largest `[1]` of what is not negative, and the share `[1]` above a limit.

    Args:
      sizes: Arrays `[...]` of float32 or wider, >= 0.
      limit: Scalar, above which by more than rounding; None for none.
      axis_name: Mesh axes besides those that types tell, which all are split over.
    """
    if not sizes:
        return Norms(jnp.zeros(1), jnp.ones(1)), jnp.zeros(1, jnp.float32)
    split = stacked_axes_of_trees(varying(sizes, axis_name))
    dtype = widest(x.dtype for x in sizes)
    layout = Layout((0,) * len(sizes), 1, dtype, as_tuple(axis_name), split)

    counted = layout._replace(dtype=jnp.dtype(jnp.float32))

    def peaks(sizes: list[jax.Array]) -> jax.Array:
        some = jnp.asarray(1.0, jnp.float32)
        parts = [_peak_and_count(x, some.astype(x.dtype)) for x in sizes]
        # Counted all the same: a maximum alone XLA:CPU takes in more passes.
        parts = jax.lax.optimization_barrier(parts)
        return combine(jnp.maximum, [peak for peak, _ in parts], layout)

    def both(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        *sizes, limit = leaves
        parts = [_peak_and_count(x, limit.astype(x.dtype)) for x in sizes]
        peaks, counts = zip(*parts, strict=True)
        return combine(jnp.maximum, peaks, layout), combine(jnp.add, counts, counted)

    if limit is None:
        peak = per_shard(peaks, sizes)
        return Norms(peak, jnp.ones_like(peak)), jnp.zeros(1, jnp.float32)
    every = Groups(("global",), layout.index)
    peak, count = per_shard(both, [*sizes, limit])
    number = jnp.maximum(group_sizes(sizes, every, axis_name), 1)
    return Norms(peak, jnp.ones_like(peak)), count / number


def _peak_and_count(x: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest, infinite where there is a NaN, and how many are above the limit."""
    if jax.device_count() > 1:
        return in_two_passes(x, limit)  # the other XLA would split with gathers
    return jax.lax.platform_dependent(x, limit, cpu=in_one_pass, default=in_two_passes)


def in_two_passes(x: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which on TPU and GPU is one, as XLA reads `x` for both at once."""
    return largest(x), add_up(exceeds(x, limit).astype(jnp.float32))


def in_one_pass(x: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Over the bits, which are in the order of what is not negative.

    XLA:CPU makes loops over whole numbers fast, which it must not of floats.
    """
    whole = jnp.int64 if jnp.finfo(x.dtype).bits == 64 else jnp.int32
    known = all(isinstance(n, int) for n in x.shape)  # none of a symbolic shape
    rows = known and x.ndim > 1 and x.size >= 2**31  # more than an int32 counts
    top, count = jax.lax.reduce(
        (jax.lax.bitcast_convert_type(x, whole), exceeds(x, limit).astype(jnp.int32)),
        (jnp.zeros([], whole), jnp.zeros([], jnp.int32)),
        lambda a, b: (jnp.maximum(a[0], b[0]), a[1] + b[1]),
        tuple(range(int(rows), x.ndim)),
    )
    infinite = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, x.dtype), whole)
    top = jnp.minimum(top.max(initial=0), infinite)  # of NaN they are larger still
    return (
        jax.lax.bitcast_convert_type(top, x.dtype),
        count.astype(jnp.float32).sum(),
    )
