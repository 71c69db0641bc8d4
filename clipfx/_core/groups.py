"""Trees cut into groups: which leaves share a norm, and scaling them by group.

Shape letters: `G` groups, `[...]` a leaf. A *counted* leaf is of real or complex
floating dtype; all others (integers, bools, keys, `float0`) pass through unseen.
"""

import functools
import inspect
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx._core.paths import (
    KeyPath,
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
      index: Per leaf of the tree its group, or None where the leaf is not counted; a
        tuple where each slice along the first dimension has a group of its own.
    """

    names: tuple[str, ...]
    index: tuple[Any, ...]


# What a label ends in that stands for one group per slice, as of stacked layers.
EACH = "/*"


def group_leaves(groups: Any, tree: Any, *, by_slice: bool = False) -> Groups:
    """Resolves a `groups` argument against the tree in hand.

    Done anew for every tree: `optax.masked` and `optax.partition` take leaves away.
    Labels are looked up by path, so labels of the whole tree still fit a masked one.

    Args:
      groups: `"global"`, `"layer"` (the parent of each leaf), `"leaf"`, a tree prefix
        of labels, a function from the tree to one, or a function of a leaf's `path`.
      tree: Arrays or `ShapeDtypeStruct`.
      by_slice: Whether labels may end in `/*`, for one group per slice along the first
        dimension, `blocks/0` and so on for `blocks/*`.

    Raises:
      ValueError: On another string, or where a counted leaf has no label.
    """
    check_sparse(tree)
    leaves = leaves_with_path(tree)
    counted = [path for path, leaf in leaves if is_counted(leaf, path)]
    if not isinstance(groups, str):
        if leaves and is_of_path(groups):
            labels = [str(groups(words(path))) for path in counted]
        else:
            made = groups(tree) if leaves and is_function(groups) else groups
            labels = _labels(made, counted)
    elif groups == "leaf":
        labels = names_of([words(path) for path in counted])
    elif groups == "layer":
        labels = names_of(_layers([words(path) for path in counted]))
    elif groups == "global":
        labels = ["global"] * len(counted)
    else:
        raise ValueError(
            'groups must be "global", "layer", "leaf", a tree prefix of labels, a '
            f"function that makes one, or one of a path, got {groups!r}; to put all "
            'leaves into one group use "global".'
        )
    following = iter(labels)
    own: list[Any] = [next(following) if is_counted(x) else None for _, x in leaves]
    if not isinstance(groups, str):
        own = [_slices(label, leaf, by_slice) for label, (_, leaf) in
               zip(own, leaves, strict=True)]  # fmt: skip
    every = [name for x in own for name in each_of(x) if name is not None]
    names = ordered(["global"] if groups == "global" else every)
    number: dict[Any, Any] = {None: None}
    number |= dict(zip(names, range(len(names)), strict=True))
    return Groups(
        names,
        tuple(tuple(number[name] for name in x) if isinstance(x, tuple) else number[x]
              for x in own),
    )  # fmt: skip


def _slices(label: str | None, leaf: Any, by_slice: bool) -> Any:
    """A label, or those of all slices."""
    if label is None or not label.endswith(EACH):
        return label
    if not by_slice:
        raise ValueError(
            f"groups must not ask for a group per slice here, got {label!r}; wrap the "
            "transform in clipfx.per_stacked_layer."
        )
    if not jnp.ndim(leaf):
        raise ValueError(
            f"groups must ask for a group per slice of arrays, got {label!r} for a "
            f"scalar; take {EACH!r} away."
        )
    return tuple(f"{label.removesuffix('*')}{k}" for k in range(jnp.shape(leaf)[0]))


def _layers(paths: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """What has the same parent is one layer.

    Keys of a flat dict may be paths themselves: `a/b/kernel`, `layers.0.weight`.
    """
    if all(len(path) == 1 for path in paths):
        sign = next((x for x in "/." if any(x in key for (key,) in paths)), None)
        paths = [tuple(key.split(sign)) for (key,) in paths] if sign else paths
    layers = [path[:-1] for path in paths]
    if len(layers) > 1 and not any(layers):
        _say_that_all_are_one()
    return layers


@functools.cache
def _say_that_all_are_one() -> None:
    warnings.warn(
        'groups="layer" puts all leaves into one group, "(root)": they are all at the '
        'top of their tree, and what has the same parent is one layer; pass "leaf" for '
        'a norm of each, or "global".',
        stacklevel=2,
    )


def is_of_path(groups: Any) -> bool:
    """Whether it is a function of a leaf's path: its only parameter is `path`."""
    try:
        return [*inspect.signature(groups).parameters] == ["path"]
    except (TypeError, ValueError):
        return False


def is_function(groups: Any) -> bool:
    """Whether it makes labels; a module of labels may be callable, and is no function.

    As in Optax: a function is no tree, or one of nothing but functions.
    """
    return callable(groups) and all(map(callable, jax.tree.leaves(groups)))


def _labels(prefix: Any, paths: Sequence[KeyPath]) -> list[str]:
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


def is_counted(leaf: Any, path: KeyPath | None = None) -> bool:
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


def each_of(index: Any) -> tuple[Any, ...]:
    """All that an entry of `Groups.index` stands for."""
    return index if isinstance(index, tuple) else (index,)


def entry(values: Any, index: Any, leaf: Any) -> Any:
    """Of `[G]` that of a leaf's group; `[L, 1, ...]` where it has one per slice."""
    if not isinstance(index, tuple):
        return values[index]
    return picked(values, index, 0).reshape(-1, *[1] * (jnp.ndim(leaf) - 1))


def picked(values: Any, places: Sequence[int], axis: int) -> jax.Array:
    """Entries at places along an axis: slices, because gathers are slow."""
    runs: list[list[int]] = []
    for i in places:
        if runs and runs[-1][1] == i:
            runs[-1][1] += 1
        else:
            runs.append([i, i + 1])
    parts = [jax.lax.slice_in_dim(values, *run, axis=axis) for run in runs]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def counted_leaves(tree: Any, groups: Groups) -> list[tuple[jax.Array, int]]:
    """The counted leaves as arrays, each with its group."""
    pairs = zip(jax.tree.leaves(tree), groups.index, strict=True)
    return [(jnp.asarray(leaf), i) for leaf, i in pairs if i is not None]
