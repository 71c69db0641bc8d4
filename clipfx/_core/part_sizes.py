"""How large elements or units are: the largest of them, and how many are too large."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx._core.clip_factors import exceeds
from clipfx._core.groups import Groups
from clipfx._core.leaves import known_size, widest
from clipfx._core.norms import Norms, group_sizes
from clipfx._core.reductions import Layout, combine, layout_of, on_one_cpu, per_shard
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
    limits = [] if limit is None else [limit]

    def both(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        sizes, limits = leaves[: len(layout.index)], leaves[len(layout.index) :]
        one = functools.partial(in_one_pass, layout=layout)
        two = functools.partial(in_two_passes, layout=layout)
        # Over several devices XLA would split the one with gathers.
        return on_one_cpu(one, two, layout.device, sizes, *limits)

    peak, count = per_shard(both, [*sizes, *limits])
    every = Groups(("global",), layout.index)
    number = jnp.maximum(group_sizes(sizes, every, axis_name), 1)
    return Norms(peak, jnp.ones_like(peak)), count / number


def in_two_passes(
    sizes: list[jax.Array], limit: jax.Array | None = None, *, layout: Layout
) -> tuple[jax.Array, jax.Array]:
    """The largest `[1]`, infinite where there is a NaN, and the number `[1]` above."""
    peak = combine(jnp.maximum, [largest(x) for x in sizes], layout)
    if limit is None:
        return peak, jnp.zeros(1, jnp.float32)
    above = [exceeds(x, limit.astype(x.dtype)) for x in sizes]
    counts = [add_up(x.astype(jnp.float32)) for x in above]
    counted = layout._replace(dtype=jnp.dtype(jnp.float32))
    return peak, combine(jnp.add, counts, counted)


def in_one_pass(
    sizes: list[jax.Array], limit: jax.Array | None = None, *, layout: Layout
) -> tuple[jax.Array, jax.Array]:
    """The same, over the bits, which are in the order of what is not negative.

    XLA:CPU makes loops over whole numbers fast, which it must not of floats. It
    compiles one for alike leaves, but what follows it for each leaf, and again for
    each use: hence one array of all, and a sort, which it fuses with nothing.
    """
    rows: dict[Any, list[tuple[jax.Array, jax.Array]]] = {}
    axes = frozenset[str]().union(*map(_compat.varying_axes, sizes))
    for x in sizes:
        # With a count beside it: alone XLA:CPU takes the largest in more passes.
        bound = jnp.ones([], x.dtype) if limit is None else limit.astype(x.dtype)
        pair = _bits_and_count(x, bound)
        pair = jax.lax.optimization_barrier(pair) if limit is None else pair
        top, number = (_compat.vary(y, axes) for y in pair)
        rows.setdefault(x.dtype, []).append((top, number.astype(jnp.float32)))
    peaks: list[jax.Array] = []
    counts: list[jax.Array] = []
    for dtype, pairs in rows.items():
        tops, numbers = jax.lax.sort([*map(jnp.stack, zip(*pairs, strict=True))])
        infinite = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, dtype), tops.dtype)
        top = jnp.minimum(tops[-1], infinite)  # of NaN they are larger still
        peaks.append(jax.lax.bitcast_convert_type(top, dtype))
        counts.append(numbers.sum())
    layout = layout._replace(index=(0,) * len(rows))
    counted = layout._replace(dtype=jnp.dtype(jnp.float32))
    peak, count = combine(jnp.maximum, peaks, layout), combine(jnp.add, counts, counted)
    return peak, jnp.zeros_like(count) if limit is None else count


def _bits_and_count(x: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest as a whole number, and how many are above the limit."""
    whole = jnp.int64 if jnp.finfo(x.dtype).bits == 64 else jnp.int32
    rows = x.ndim > 1 and 2**31 <= known_size(x) < math.inf  # more than an int32 counts
    top, count = jax.lax.reduce(
        (jax.lax.bitcast_convert_type(x, whole), exceeds(x, limit).astype(jnp.int32)),
        (jnp.zeros([], whole), jnp.zeros([], jnp.int32)),
        lambda a, b: (jnp.maximum(a[0], b[0]), a[1] + b[1]),
        tuple(range(int(rows), x.ndim)),
    )
    return (
        (top.max(initial=0), count.astype(jnp.float32).sum()) if rows else (top, count)
    )
