"""Leaves of parameters and states that belong to those of updates, found by path."""

from typing import Any

import jax
import jax.numpy as jnp

from clipfx._core.groups import Groups, is_counted
from clipfx._core.paths import by_place, name_of


def check_state(state: Any, kind: type, method: str) -> None:
    """Checks that a state is one of the method's."""
    if not isinstance(state, kind):
        raise TypeError(
            f"the state of {method} must be that of init or of the last update, got a "
            f"{type(state).__name__}; call tx.init(params) first."
        )


def places(tree: Any, updates: Any, groups: Groups, name: str) -> list[int | None]:
    """Finds the leaf of `tree` for every leaf of `updates`, None for uncounted ones.

    By path, since trees differ in what is not counted: where parameters have integers,
    functions or nothing, gradients have `float0`, None or `optax.MaskedNode`.

    Args:
      tree: Params, or a part of a state that is like them.
      updates: Leaves `[...]`.
      groups: From `group_leaves(..., updates)`.
      name: Of `tree`, for errors.

    Returns:
      Positions among the leaves of `tree`.

    Raises:
      ValueError: If a counted leaf has none of its shape there.
    """
    leaves, wanted = jax.tree.leaves(tree), jax.tree.leaves(updates)
    found: list[int | None]
    if jax.tree.structure(tree) == jax.tree.structure(updates):
        found = [*range(len(leaves))]
    else:
        at = {key: k for k, key in enumerate(by_place(tree))}
        found = [at.get(key) for key in by_place(updates)]
    for number, (k, x, i) in enumerate(zip(found, wanted, groups.index, strict=True)):
        if i is None:
            found[number] = None
        elif k is None or not _is_like(leaves[k], x):
            path = name_of([*by_place(updates)][number][0])
            got = "none" if k is None else f"one of {_kind(leaves[k])}"
            raise ValueError(
                f"{name} must have a leaf of floating dtype and shape {jnp.shape(x)} "
                f"at {path!r}, as updates have, got {got}; give init and update trees "
                "that agree there."
            )
    return found


def take(tree: Any, at: list[int | None], updates: Any) -> list[Any]:
    """The leaves at these places; where there is none, those of `updates`."""
    leaves = jax.tree.leaves(tree)
    pairs = zip(at, jax.tree.leaves(updates), strict=True)
    return [x if k is None else leaves[k] for k, x in pairs]


def put(tree: Any, at: list[int | None], new: list[Any]) -> Any:
    """The tree with new leaves at these places."""
    leaves, treedef = jax.tree.flatten(tree)
    for k, x in zip(at, new, strict=True):
        if k is not None:
            leaves[k] = x
    return treedef.unflatten(leaves)


def _is_like(leaf: Any, x: Any) -> bool:
    array = hasattr(leaf, "dtype") or isinstance(leaf, float | complex)
    return array and is_counted(leaf) and jnp.shape(leaf) == jnp.shape(x)


def _kind(leaf: Any) -> str:
    if hasattr(leaf, "dtype"):
        return f"{leaf.dtype} and shape {jnp.shape(leaf)}"
    return type(leaf).__name__
