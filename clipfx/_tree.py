"""Trees cut into groups: which leaves share a norm, and scaling them by group.

Shape letters: `G` groups, `[...]` a leaf. A *counted* leaf is of real or complex
floating dtype; all others (integers, bools, keys, `float0`) pass through unseen.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx import _compat


class Groups(NamedTuple):
    """Which counted leaf belongs to which group.

    Attributes:
      names: One name per group, in alphabetical order, as JAX orders a dict.
      index: Per leaf of the tree its group, or None where the leaf is not counted.
    """

    names: tuple[str, ...]
    index: tuple[int | None, ...]


def group_leaves(groups: Any, tree: Any) -> Groups:
    """Resolves a `groups` argument against the tree in hand.

    Done anew for every tree: `optax.masked` and `optax.partition` take leaves away.
    Labels are looked up by path, so labels of the whole tree still fit a masked one.

    Args:
      groups: `"global"`, `"layer"` (the parent of each leaf), `"leaf"`, or a tree
        prefix of labels.
      tree: Arrays or `ShapeDtypeStruct`.

    Raises:
      ValueError: On another string, or where a counted leaf has no label.
    """
    if not isinstance(groups, str):
        label_of = _label_by_path(groups)
    elif groups in _LABELS:
        label_of = _LABELS[groups]
    else:
        raise ValueError(
            'groups must be "global", "layer", "leaf" or a tree prefix of labels, got '
            f'{groups!r}; to put all leaves into one group use "global".'
        )
    leaves = leaves_with_path(tree)
    labels = [label_of(path) if is_counted(leaf) else None for path, leaf in leaves]
    always = {"global"} if groups == "global" else set()
    names = tuple(sorted(always | {label for label in labels if label is not None}))
    number = dict(zip(names, range(len(names)), strict=True))
    return Groups(names, tuple(None if x is None else number[x] for x in labels))


def leaves_with_path(tree: Any) -> list[tuple[tuple, Any]]:
    """The leaves in order; a path ends where a box of Flax begins."""
    boxes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_compat.is_boxed)[0]
    return [(path, leaf) for path, box in boxes for leaf in jax.tree.leaves(box)]


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(root)"


_LABELS: dict[str, Callable[[tuple], str]] = {
    "global": lambda path: "global",
    "layer": lambda path: _name(path[:-1]),
    "leaf": _name,
}


def prefix_lookup(prefix: Any, is_leaf: Callable | None = None) -> Callable:
    """From a path to the entry of a tree prefix at or above it, None without one."""
    # Keys are compared as text: a dict of labels also fits a dataclass of arrays.
    words = lambda path: tuple(_name((key,)) for key in path)
    flat = jax.tree_util.tree_flatten_with_path(prefix, is_leaf=is_leaf)[0]
    by_path = {words(path): entry for path, entry in flat}

    def find(path: tuple) -> Any:
        keys = words(path)
        ends = (keys[:end] for end in range(len(keys) + 1))
        return next((by_path[end] for end in ends if end in by_path), None)

    return find


def _label_by_path(labels: Any) -> Callable[[tuple], str]:
    find = prefix_lookup(labels)

    def label_of(path: tuple) -> str:
        label = find(path)
        if label is None:
            known = jax.tree_util.tree_flatten_with_path(labels)[0]
            raise ValueError(
                f"groups must label every leaf, got no label for {_name(path)!r} "
                f"(there are labels at {sorted(_name(path) for path, _ in known)}); "
                "label it or a parent of it, or take it out with optax.masked."
            )
        return str(label)

    return label_of


# ------------------------------------------------------------------- single leaves


def is_counted(leaf: Any) -> bool:
    """Whether a leaf is of real or complex floating dtype."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.inexact)


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

    def zeros(x):
        if not is_counted(x):
            return jnp.zeros(0, jnp.float32)
        dtype = jnp.result_type(x)
        dtype = jnp.float32 if wide and jnp.finfo(dtype).bits < 32 else dtype
        # Of an array, which knows its sharding, or of its shape.
        return (
            jnp.zeros_like(x, dtype)
            if isinstance(x, jax.Array)
            else jnp.zeros(jnp.shape(x), dtype)
        )

    return jax.tree.map(zeros, tree)


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
