"""Norms of groups: right in every dtype, at every magnitude, on every mesh."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipfx._core.checks import check_static, is_number
from clipfx._core.groups import Groups, counted_leaves
from clipfx._core.leaves import columns, times, widen, widest
from clipfx._core.reductions import (
    Layout,
    by_device,
    combine,
    layout_of,
    per_shard,
    stacked_axes_of_trees,
    varying,
)
from clipfx._core.safe_sums import (
    abs_power,
    add_up,
    largest,
    reciprocal_power_of_two,
    rescue_out_of_range,
    root,
    sums_in_range,
)


class Norms(NamedTuple):
    """Norms `[G]` that neither overflow nor vanish: each is `value / scale`.

    Attributes:
      value: `[G]`, float32 or wider.
      scale: `[G]`, powers of two, 1 unless the norm is enormous or tiny.
    """

    value: jax.Array
    scale: jax.Array


def check_ord(ord: Any) -> float:
    """Returns `ord` as a float >= 1 or infinity, 2 for None."""
    if ord is None:
        return 2.0
    check_static("ord", ord)
    if not is_number(ord) or np.ndim(ord):
        raise TypeError(
            f"ord must be a number >= 1 or math.inf, got {ord!r}; for the Euclidean "
            "norm pass 2."
        )
    if not ord >= 1:
        raise ValueError(
            f"ord must be a number >= 1 or math.inf, got {ord!r}; for the Euclidean "
            "norm pass 2."
        )
    return float(ord)


def group_norms(
    tree: Any, groups: Groups, ord: float = 2.0, axis_name: Any = None
) -> Norms:
    r"""Measures each group, :math:`(\sum_i |x_i|^p)^{1/p}`, p = `ord`.

    Accumulates in float32 or wider, pairwise over leaves. Inside `jax.shard_map` sums
    run over the mesh axes that each leaf varies over. Its derivative is that of the
    norm, and zero where the norm is zero.

    Args:
      tree: Leaves `[...]`.
      groups: From `group_leaves(..., tree)`.
      ord: p >= 1 or infinity.
      axis_name: Mesh axes besides, which all leaves are split over.
    """
    pairs = counted_leaves(tree, groups)
    leaves, index = [leaf for leaf, _ in pairs], tuple(i for _, i in pairs)
    if not groups.names:
        return Norms(jnp.zeros(0, jnp.float32), jnp.ones(0, jnp.float32))
    dtype = widest(x.dtype for x in leaves)
    layout = layout_of(leaves, index, len(groups.names), dtype, axis_name)
    return _jitted(leaves, layout, ord)


def measure_together(
    trees: Sequence[Any], groups: Groups, axis_name: Any = None
) -> tuple[Norms, ...]:
    """The norms of several trees of one structure, with one reduction for all."""
    number, pairs = len(groups.names), [counted_leaves(tree, groups) for tree in trees]
    index = [k * number + i for k, rows in enumerate(pairs) for _, i in rows]
    every = Groups(groups.names * len(trees), tuple(index))
    leaves = [leaf for rows in pairs for leaf, _ in rows]
    norms = group_norms(leaves, every, axis_name=axis_name)
    value, scale = (x.reshape(len(trees), number) for x in norms)
    return tuple(Norms(*row) for row in zip(value, scale, strict=True))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _measure(leaves: list[jax.Array], layout: Layout, ord: float) -> Norms:
    return per_shard(lambda leaves: _norms_of(leaves, layout, ord), leaves)


def _norms_of(leaves: list[jax.Array], layout: Layout, ord: float) -> Norms:
    if ord in (1, 2):
        total, scale = sums_in_range(leaves, layout, int(ord))
        return Norms(jnp.sqrt(total) if ord == 2 else total, scale)

    def wide(leaves: list[jax.Array]) -> list[jax.Array]:
        return [widen(x, layout.dtype) for x in leaves]

    def peak_of(leaves: list[jax.Array]) -> jax.Array:
        return combine(jnp.maximum, [largest(x) for x in wide(leaves)], layout)

    if ord == math.inf:
        peak = peak_of(leaves)
        scale = reciprocal_power_of_two(peak)
        return Norms(peak * scale, scale)

    def around_largest(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        peak = peak_of(leaves)
        scale = reciprocal_power_of_two(peak)
        near = peak * scale  # 0.6 to the power of 200 is out of range already
        near = jnp.where(jnp.isfinite(near) & (near > 0), near, 1)
        rows = columns(scale, 1 / near)

        def part(x: jax.Array, i: int) -> jax.Array:
            # A barrier, or XLA:CPU keeps scales of full size for leaves of one shape.
            x, *scales = jax.lax.optimization_barrier((x, *rows[i]))
            unit = functools.reduce(times, scales, widen(x, layout.dtype))
            return add_up(abs_power(unit, ord))

        parts = [part(x, i) for x, i in zip(leaves, layout.index, strict=True)]
        return root(combine(jnp.add, parts, layout), ord) * near, scale

    def in_range_or_again(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        powers = [add_up(abs_power(x, ord)) for x in wide(leaves)]
        sums = combine(jnp.add, powers, layout)

        def again(start: jax.Array) -> tuple[jax.Array, jax.Array]:
            # Tied to the loop, or XLA takes widened leaves out of it.
            barrier = jax.lax.optimization_barrier
            return around_largest([barrier((x, start))[0] for x in leaves])

        return rescue_out_of_range(sums, root(sums, ord), again, layout)

    # Around the largest at once there is no loop, but a second collective over a mesh.
    ways = {"cpu": in_range_or_again, "gpu": around_largest, "tpu": around_largest}
    return Norms(*by_device(ways, layout.device, leaves))


@_measure.defjvp
def _measure_jvp(
    layout: Layout,
    ord: float,
    primals: tuple[list[jax.Array]],
    tangents: tuple[list[jax.Array]],
) -> tuple[Norms, Norms]:
    norms = _again(primals[0], layout, ord)
    inverse = jnp.unstack(_inverse(norms.value))
    scales = jnp.unstack(norms.scale)
    # The unit vector dual to x, |u| <= 1: the derivative is its inner product.
    duals = [
        _dual(times(times(widen(x, layout.dtype), scales[i]), inverse[i]), ord)
        for x, i in zip(primals[0], layout.index, strict=True)
    ]
    pairs = zip(duals, tangents[0], strict=True)
    dots = [_inner(u, widen(dx, layout.dtype)) for u, dx in pairs]
    slope = combine(jnp.add, dots, layout) * norms.scale
    if ord == math.inf:  # ties share the derivative
        ties = combine(jnp.add, [jnp.sum(jnp.abs(u)) for u in duals], layout)
        slope = slope / jnp.maximum(ties, 1)
    return norms, Norms(slope, jnp.zeros_like(norms.scale))


def _again(leaves: list[jax.Array], layout: Layout, ord: float) -> Norms:
    """The norms once more, as what has derivatives of every order without a rule.

    Hoisting out of a `scan` drops rules of derivatives, and a loop has none in reverse:
    so it sees constants, and what is 1 has the derivative of the norm beside it.
    """
    value, scale = _measure(jax.lax.stop_gradient(leaves), layout, ord)
    usable = (value > 0) & jnp.isfinite(value)
    rows = jnp.unstack(scale), jnp.unstack(_inverse(jnp.where(usable, value, 0)))

    def part(x: jax.Array, i: int) -> jax.Array:
        unit = functools.reduce(times, (row[i] for row in rows), widen(x, layout.dtype))
        if ord < math.inf:
            return jnp.sum(abs_power(unit, ord))
        return jnp.sum(_inner(jax.lax.stop_gradient(_dual(unit, ord)), unit))

    parts = [part(x, i) for x, i in zip(leaves, layout.index, strict=True)]
    total = jnp.where(usable, combine(jnp.add, parts, layout), 1)
    one = total / jax.lax.stop_gradient(total)
    return Norms(value * (one if ord == math.inf else one ** (1 / ord)), scale)


def _inverse(value: jax.Array) -> jax.Array:
    """`1 / value`, and 0 where that is 0."""
    return jnp.where(value > 0, 1 / jnp.where(value > 0, value, 1), 0)


# Without jit around it, every call outside of jit would compile the loop anew.
_jitted = jax.jit(_measure, static_argnums=(1, 2), inline=True)


def cosines(
    a: Any, b: Any, groups: Groups, norms: tuple[Norms, Norms], axis_name: Any = None
) -> jax.Array:
    """The cosine `[G]` between two trees whose norms are known, 0 where one is 0."""
    u, v = (units(x, groups, n) for x, n in zip((a, b), norms, strict=True))
    counted = Groups(groups.names, tuple(i for i in groups.index if i is not None))
    return inner_products(u, v, counted, axis_name)


def units(tree: Any, groups: Groups, norms: Norms) -> list[jax.Array]:
    """The counted leaves over the norm of their group, float32 or wider; 0 of 0."""

    def unit(x: jax.Array, i: int) -> jax.Array:
        size = jnp.where(norms.value[i] == 0, 1, norms.value[i])
        return times(times(widen(x, size.dtype), norms.scale[i]), 1 / size)

    return [unit(x, i) for x, i in counted_leaves(tree, groups)]


def inner_products(a: Any, b: Any, groups: Groups, axis_name: Any = None) -> jax.Array:
    """The real inner product `[G]` of two trees, float32 or wider, in one reduction."""
    pairs = zip(counted_leaves(a, groups), counted_leaves(b, groups), strict=True)
    rows = [(x, y, i) for (x, i), (y, _) in pairs]
    leaves = [x for x, _, _ in rows] + [y for _, y, _ in rows]
    dtype, index = widest(x.dtype for x in leaves), tuple(i for _, _, i in rows)
    layout = layout_of(leaves, index, len(groups.names), dtype, axis_name)

    def dots(leaves: list[jax.Array]) -> jax.Array:
        wide, half = [widen(x, dtype) for x in leaves], len(leaves) // 2
        return combine(jnp.add, [*map(_inner, wide[:half], wide[half:])], layout)

    return per_shard(dots, leaves)


def group_sizes(tree: Any, groups: Groups, axis_name: Any = None) -> jax.Array:
    """Counts the elements of each group, float32 `[G]`, over all shards."""
    sizes = [0] * len(groups.names)
    for x, i in counted_leaves(tree, groups):
        axes = varying([x], axis_name)
        shards = (jax.lax.psum(1, axis) for axis in axes - stacked_axes_of_trees(axes))
        sizes[i] += x.size * math.prod(shards)
    return jnp.array(sizes, jnp.float32)


def _inner(u: jax.Array, dx: jax.Array) -> jax.Array:
    """The real inner product."""
    if jnp.iscomplexobj(u):
        return jnp.sum(u.real * dx.real + u.imag * dx.imag)
    return jnp.sum(u * dx)


def _dual(unit: jax.Array, ord: float) -> jax.Array:
    """The derivative of the p-norm at a vector of norm one."""
    if ord == 2:
        return unit
    if ord == math.inf:
        return jnp.where(
            jnp.abs(unit) >= 1 - 1e-6, jnp.sign(unit), jnp.zeros_like(unit)
        )
    return times(jnp.sign(unit), jnp.abs(unit) ** (ord - 1))
