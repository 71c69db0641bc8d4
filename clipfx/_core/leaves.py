"""Single leaves: widened to compute in, narrowed to be stored, scaled by group."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx._core.groups import Groups, is_counted
from clipfx._core.paths import KeyPath
from clipfx._core.reductions import by_device, device_of_programs

# As many leaves are together in one loop: what it takes XLA to compile that grows with
# the square of their number.
MANY = 256


def widen(x: jax.Array, least: Any = jnp.float32) -> jax.Array:
    """What is narrower than `least` is computed in it; anything wider is left alone."""
    if jnp.finfo(x.dtype).bits >= jnp.finfo(least).bits:
        return x
    return x.astype(jnp.complex128 if jnp.iscomplexobj(x) else least)


def widest(dtypes: Iterable[Any]) -> Any:
    """What norms are taken in: float64 if a dtype has as many bits, else float32."""
    double = any(jnp.finfo(dtype).bits == 64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def known_size(x: jax.Array) -> float:
    """How many elements there are, infinity if the shape is symbolic."""
    return x.size if all(isinstance(n, int) for n in x.shape) else math.inf


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x * factor` for a real factor, in the dtype of `x`, complex or not."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(times(x.real, factor), times(x.imag, factor))
    return x * factor.astype(x.dtype)


@jax.custom_jvp
def divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x / y` whose derivative does not square `y`, which may leave the range."""
    return x / y


@divide.defjvp
def _divide_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x, y), (dx, dy) = primals, tangents
    quotient = divide(x, y)
    return quotient, divide(dx - quotient * dy, y)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _toward_zero(x: jax.Array, dtype: Any) -> jax.Array:
    """Drops the bits of float32 `x` that `dtype` cannot hold."""
    info = jnp.finfo(dtype)
    kept = jnp.uint32(2**32 - 2 ** (23 - info.nmant))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    normal = jax.lax.bitcast_convert_type(bits & kept, jnp.float32)
    if info.minexp == jnp.finfo(jnp.float32).minexp:
        return normal
    largest = jnp.float32(info.max)
    normal = jnp.where(jnp.isinf(x), x, jnp.clip(normal, -largest, largest))
    # Below the smallest normal number the spacing is fixed.
    step = jnp.float32(info.smallest_subnormal)
    small = jnp.abs(x) < jnp.float32(info.smallest_normal)
    return jnp.where(small, jnp.trunc(x / step) * step, normal)


@_toward_zero.defjvp
def _toward_zero_jvp(
    dtype: Any, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _toward_zero(*primals, dtype), tangents[0]


def narrow(wide: jax.Array, dtype: Any) -> jax.Array:
    """Casts back to `dtype`, to half precision by rounding towards zero.

    What is stored is then never longer than what was computed, so a bound on the
    computed norm bounds the stored one too, and a second clip finds nothing to do.
    """
    if wide.dtype == dtype:
        return wide
    return _toward_zero(wide, dtype).astype(dtype)


def counted_zeros(tree: Any, wide: bool) -> Any:
    """Zeros like each counted leaf, if `wide` float32 or wider; none for the others."""

    def zeros(path: KeyPath, x: Any) -> jax.Array:
        if not is_counted(x, path):
            return jnp.zeros(0, jnp.float32)
        dtype = jnp.result_type(x)
        dtype = jnp.float32 if wide and jnp.finfo(dtype).bits < 32 else dtype
        # Of an array, which knows its sharding, or of its shape.
        return (
            jnp.zeros_like(x, dtype)
            if isinstance(x, jax.Array)
            else jnp.zeros(jnp.shape(x), dtype)
        )

    return jax.tree_util.tree_map_with_path(zeros, tree)


def widen_counted(
    fn: Callable[..., jax.Array], tree: Any, groups: Groups, *rows: jax.Array
) -> Any:
    """Maps `fn(wide leaf, *scalars) -> wide leaf` over counted leaves.

    The scalars are what `rows`, each `[G]`, hold for the group of the leaf.
    """
    scalars = columns(*rows) if rows else [()] * len(groups.names)

    def on(x: Any, i: int | None) -> Any:
        return x if i is None else fn(widen(jnp.asarray(x)), *scalars[i])

    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([on(*x) for x in zip(leaves, groups.index, strict=True)])


def narrow_counted(wide: Any, tree: Any, groups: Groups) -> Any:
    """Casts counted leaves back to the dtypes that `tree` has there."""

    def on(w: Any, x: Any, i: int | None) -> Any:
        return x if i is None else narrow(w, jnp.asarray(x).dtype)

    leaves, treedef = jax.tree.flatten(tree)
    wide = jax.tree.leaves(wide)
    rows = zip(wide, leaves, groups.index, strict=True)
    return treedef.unflatten([on(*row) for row in rows])


def map_counted(
    fn: Callable[..., jax.Array], tree: Any, groups: Groups, *rows: jax.Array
) -> Any:
    """`widen_counted` that keeps dtypes."""
    return narrow_counted(widen_counted(fn, tree, groups, *rows), tree, groups)


def scale_groups(
    tree: Any, groups: Groups, *factors: jax.Array, drop: jax.Array | None = None
) -> Any:
    """Multiplies every leaf by its group's factors `[G]`, one after the other.

    Args:
      tree: Leaves `[...]`.
      groups: From `group_leaves(..., tree)`.
      *factors: `[G]`; two where their product is no normal number.
      drop: bool `[G]`, groups that become exactly zero, whatever they hold.
    """

    def scale(x: jax.Array, *factors: jax.Array) -> jax.Array:
        return functools.reduce(times, factors, x)

    def scale_or_drop(x: jax.Array, drop: jax.Array, *factors: jax.Array) -> jax.Array:
        return jnp.where(drop, jnp.zeros_like(x), scale(x, *factors))

    if drop is None:
        return map_counted(scale, tree, groups, *factors)
    return map_counted(scale_or_drop, tree, groups, drop, *factors)


def columns(*rows: jax.Array) -> Sequence[tuple[jax.Array, ...]]:
    """What each of several `[G]` holds for each group, as scalars.

    XLA:CPU compiles alike loops over leaves once, and a loop with the second entry of
    an array in it is not like one with the third: there it cannot tell them apart.
    """
    if rows[0].size <= 8:
        return list(zip(*_unstack(*rows), strict=True))
    ways = {"cpu": _alike, "gpu": _unstack, "tpu": _unstack}
    return list(zip(*by_device(ways, device_of_programs(), *rows), strict=True))


def _unstack(*rows: jax.Array) -> list[tuple[jax.Array, ...]]:
    return [tuple(jnp.unstack(row)) for row in rows]


def _alike(*rows: jax.Array) -> list[tuple[jax.Array, ...]]:
    places = unseen([jnp.uint32(k) for k in range(rows[0].size)], rows[0][0])
    pick = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    return [tuple(pick(row, k) for k in places) for row in rows]


def unseen(values: list[jax.Array], by: jax.Array) -> list[jax.Array]:
    """The values, of which XLA:CPU sees no more what they are or where they come from.

    They pass loops that never turn, which it does not know. Each turn would change them
    in a way that it cannot sum up.

    Args:
      values: Of one set of mesh axes.
      by: A number that is computed when the program runs.
    """

    def turn(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return carry[0] - 1, *(x * x for x in carry[1:])

    bits = jax.lax.stop_gradient(by).astype(jnp.float32)
    never = jnp.abs(jax.lax.bitcast_convert_type(bits, jnp.int32)).clip(max=0)
    axes = _compat.varying_axes(never)
    passed: list[jax.Array] = []
    for k in range(0, len(values), MANY):
        start = (never, *(_compat.vary(x, axes) for x in values[k : k + MANY]))
        _, *held = jax.lax.while_loop(lambda carry: carry[0] > 0, turn, start)
        passed += held
    return passed


def signed_power(x: jax.Array, power: jax.Array, unit: jax.Array) -> jax.Array:
    """`unit * (x / unit)**power` with the sign of x, finite for finite x."""
    size = jnp.abs(jnp.where(x == 0, 1, x))
    power, unit = power.astype(size.dtype), unit.astype(size.dtype)
    largest = jnp.finfo(size.dtype).max
    shaped = unit * jnp.minimum((size / unit) ** power, largest)
    shaped = jnp.where(jnp.isinf(size), size, jnp.minimum(shaped, largest))
    if jnp.iscomplexobj(x):
        turned = times(x, shaped / size)
    else:
        turned = jnp.where(x < 0, -shaped, shaped)
    return jnp.where((x == 0) | (power == 1), x, turned)
