"""How large elements or units are: the largest of them, and how many are too large."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipfx._core.clip_factors import exceeds
from clipfx._core.groups import Groups
from clipfx._core.leaves import widest
from clipfx._core.norms import Norms, group_sizes
from clipfx._core.reductions import (
    by_device,
    combine,
    device_of_programs,
    layout_of,
    per_shard,
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
    dtype = widest(x.dtype for x in sizes)
    layout = layout_of(sizes, (0,) * len(sizes), 1, dtype, axis_name)

    def peaks(sizes: list[jax.Array]) -> jax.Array:
        parts = [_on_one_cpu(peak_in_one_pass, largest, x) for x in sizes]
        return combine(jnp.maximum, parts, layout)

    def both(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        *sizes, limit = leaves
        parts = [
            _on_one_cpu(in_one_pass, in_two_passes, x, limit.astype(x.dtype))
            for x in sizes
        ]
        peaks, counts = zip(*parts, strict=True)
        counted = layout._replace(dtype=jnp.dtype(jnp.float32))
        return combine(jnp.maximum, peaks, layout), combine(jnp.add, counts, counted)

    if limit is None:
        peak = per_shard(peaks, sizes)
        return Norms(peak, jnp.ones_like(peak)), jnp.zeros(1, jnp.float32)
    every = Groups(("global",), layout.index)
    peak, count = per_shard(both, [*sizes, limit])
    number = jnp.maximum(group_sizes(sizes, every, axis_name), 1)
    return Norms(peak, jnp.ones_like(peak)), count / number


def _on_one_cpu(one: Callable[..., Any], other: Callable[..., Any], *args: Any) -> Any:
    """Calls `one` there. Over several devices XLA would split it with gathers."""
    ways = dict.fromkeys(("gpu", "tpu", "mesh"), other) | {"cpu": one}
    return by_device(ways, device_of_programs(), *args)


def in_two_passes(x: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest, infinite where there is a NaN, and how many are above the limit."""
    return largest(x), add_up(exceeds(x, limit).astype(jnp.float32))


def in_one_pass(x: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same, over the bits, which are in the order of what is not negative.

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


def peak_in_one_pass(x: jax.Array) -> jax.Array:
    """`largest`, with a count beside it: alone XLA:CPU takes it in more passes."""
    return jax.lax.optimization_barrier(in_one_pass(x, jnp.ones([], x.dtype)))[0]
