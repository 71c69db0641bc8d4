"""Trees cut into groups: which leaves share a norm, and scaling them by group.

Shape letters: `G` groups, `[...]` a leaf. A *counted* leaf is of real or complex
floating dtype; all others (integers, bools, keys, `float0`) pass through unseen.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx._paths import (
    check_sparse,
    leaves_with_path,
    name_of,
    names_of,
    ordered,
    prefix_lookup,
    words,
)


class Groups(NamedTuple):
    """Which counted leaf belongs to which group.

    Attributes:
      names: One name per group, in alphabetical order, numbers as numbers.
      index: Per leaf of the tree its group, or None where the leaf is not counted.
    """

    names: tuple[str, ...]
    index: tuple[int | None, ...]


def group_leaves(groups: Any, tree: Any) -> Groups:
    """Resolves a `groups` argument against the tree in hand.

    Done anew for every tree: `optax.masked` and `optax.partition` take leaves away.
    Labels are looked up by path, so labels of the whole tree still fit a masked one.

    Args:
      groups: `"global"`, `"layer"` (the parent of each leaf), `"leaf"`, a tree prefix
        of labels, or a function from the tree to one.
      tree: Arrays or `ShapeDtypeStruct`.

    Raises:
      ValueError: On another string, or where a counted leaf has no label.
    """
    check_sparse(tree)
    leaves = leaves_with_path(tree)
    counted = [path for path, leaf in leaves if is_counted(leaf, path)]
    if not isinstance(groups, str):
        made = groups(tree) if leaves and is_function(groups) else groups
        labels = _labels(made, counted)
    elif groups in _PARENTS:
        labels = names_of([words(path)[: _PARENTS[groups]] for path in counted])
    elif groups == "global":
        labels = ["global"] * len(counted)
    else:
        raise ValueError(
            'groups must be "global", "layer", "leaf", a tree prefix of labels or a '
            f"function that makes one, got {groups!r}; to put all leaves into one "
            'group use "global".'
        )
    names = ordered(["global"] if groups == "global" else labels)
    number = dict(zip(names, range(len(names)), strict=True))
    following = iter(labels)
    return Groups(
        names,
        tuple(number[next(following)] if is_counted(x) else None for _, x in leaves),
    )


_PARENTS = {"layer": -1, "leaf": None}  # where the path of a group ends


def is_function(groups: Any) -> bool:
    """Whether it makes labels; a module of labels may be callable, and is no function.

    As in Optax: a function is no tree, or one of nothing but functions.
    """
    return callable(groups) and all(map(callable, jax.tree.leaves(groups)))


def _labels(prefix: Any, paths: Sequence[tuple]) -> list[str]:
    """The label of each path."""
    labels = [*map(prefix_lookup(prefix), paths)]
    lost = [path for path, x in zip(paths, labels, strict=True) if x is None]
    if lost:
        known = sorted(name_of(words(path)) for path, _ in leaves_with_path(prefix))
        raise ValueError(
            f"groups must label every leaf, got no label for "
            f"{name_of(words(lost[0]))!r} (there are labels at {known}); label it or a "
            "parent of it, or take it out with optax.masked."
        )
    return [*map(str, labels)]


# ------------------------------------------------------------------- single leaves


def is_counted(leaf: Any, path: tuple | None = None) -> bool:
    """Whether a leaf is of real or complex floating dtype.

    Raises:
      TypeError: If it is no array and no number; at `path`, if that is known.
    """
    if hasattr(leaf, "dtype") and not isinstance(leaf, type):
        return jnp.issubdtype(leaf.dtype, jnp.inexact)
    if not isinstance(leaf, complex | float | int):
        place = "" if path is None else f" at {name_of(words(path))!r}"
        raise TypeError(
            f"leaves of a tree must be arrays, got a {type(leaf).__name__}{place}; "
            "take it out, as eqx.filter(model, eqx.is_inexact_array) does in Equinox."
        )
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def counted_leaves(tree: Any, groups: Groups) -> list[tuple[jax.Array, int]]:
    """The counted leaves as arrays, each with its group."""
    pairs = zip(jax.tree.leaves(tree), groups.index, strict=True)
    return [(jnp.asarray(leaf), i) for leaf, i in pairs if i is not None]


def widen(x: jax.Array, least: Any = jnp.float32) -> jax.Array:
    """What is narrower than `least` is computed in it; anything wider is left alone."""
    if jnp.finfo(x.dtype).bits >= jnp.finfo(least).bits:
        return x
    return x.astype(jnp.complex128 if jnp.iscomplexobj(x) else least)


def widest(dtypes: Iterable[Any]) -> Any:
    """What norms are taken in: float64 if a dtype has as many bits, else float32."""
    double = any(jnp.finfo(dtype).bits == 64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


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
def _divide_jvp(primals, tangents):
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
def _toward_zero_jvp(dtype, primals, tangents):
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

    def zeros(path, x):
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


def widen_counted(fn: Callable, tree: Any, groups: Groups) -> Any:
    """Maps `fn(wide leaf, group) -> wide leaf` over counted leaves."""
    on = lambda x, i: x if i is None else fn(widen(jnp.asarray(x)), i)
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([on(*x) for x in zip(leaves, groups.index, strict=True)])


def narrow_counted(wide: Any, tree: Any, groups: Groups) -> Any:
    """Casts counted leaves back to the dtypes that `tree` has there."""
    on = lambda w, x, i: x if i is None else narrow(w, jnp.asarray(x).dtype)
    leaves, treedef = jax.tree.flatten(tree)
    wide = jax.tree.leaves(wide)
    rows = zip(wide, leaves, groups.index, strict=True)
    return treedef.unflatten([on(*row) for row in rows])


def map_counted(fn: Callable, tree: Any, groups: Groups) -> Any:
    """Maps `fn(wide leaf, group) -> wide leaf` over counted leaves, keeping dtypes."""
    return narrow_counted(widen_counted(fn, tree, groups), tree, groups)


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
    rows = [jnp.unstack(row) for row in factors]
    drops = None if drop is None else jnp.unstack(drop)

    def scale(x, i):
        for row in rows:
            x = times(x, row[i])
        return x if drops is None else jnp.where(drops[i], jnp.zeros_like(x), x)

    return map_counted(scale, tree, groups)
