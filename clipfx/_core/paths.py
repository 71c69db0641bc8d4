"""Paths of leaves: their names, what is looked up by them, and how many axes."""

import collections
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from clipfx import _compat
from clipfx._core.checks import is_known

# A leaf's path, of the keys that JAX gives.
KeyPath: TypeAlias = tuple[Any, ...]
# A leaf's path in words, and its number in its box.
Place: TypeAlias = tuple[tuple[str, ...], int]


def leaves_with_path(tree: Any) -> list[tuple[KeyPath, Any]]:
    """The leaves in order; a path ends where a box of Flax or a sparse array begins."""

    def is_box(node: Any) -> bool:
        return _compat.is_boxed(node) or _compat.is_sparse(node)

    boxes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)[0]
    return [(path, leaf) for path, box in boxes for leaf in jax.tree.leaves(box)]


def check_sparse(tree: Any) -> None:
    """Checks that no two entries of a sparse array share a place.

    They add up, and the norm of what they add up to is not that of the entries.

    Raises:
      ValueError: If some do, or may, where indices are traced.
    """
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_compat.is_sparse)[0]
    for path, node in flat:
        if _compat.is_sparse(node) and _may_share(node):
            raise ValueError(
                "leaves of a tree must be arrays without repeated indices, got a "
                f"{type(node).__name__} at {name_of(words(path))!r} whose entries may "
                "share a place; call its sum_duplicates(nse=...), or pass "
                "unique_indices=True if none do."
            )


def _may_share(node: Any) -> bool:
    if getattr(node, "unique_indices", False):
        return False
    _, *where = jax.tree.leaves(node)
    if not all(isinstance(x, jax.Array | np.ndarray) and is_known(x) for x in where):
        return True
    if hasattr(node, "indptr"):
        starts = np.asarray(node.indptr)
        if starts.ndim > 1:
            return True
        first = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        places = np.stack([first, np.asarray(node.indices)[: len(first)]], -1)[None]
    elif hasattr(node, "row"):
        places = np.stack([np.asarray(node.row), np.asarray(node.col)], -1)[None]
    else:
        places = np.asarray(node.indices)
        sizes = node.shape[places.ndim - 2 :][: places.shape[-1]]
        places = places.reshape(-1, *places.shape[-2:])
        places = [x[(x < sizes).all(-1)] for x in places]  # beyond is padding
    return any(len(np.unique(x, axis=0)) < len(x) for x in places)


def words(path: KeyPath) -> tuple[str, ...]:
    """A path as text: a dict of labels also fits a dataclass of arrays."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def name_of(keys: Sequence[str]) -> str:
    """The usual name of a path."""
    return "/".join(keys) or "(root)"


def names_of(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """A name for each path, the usual one unless two paths would share it."""
    name: Callable[[Sequence[str]], str] = name_of
    if len({*map(name, paths)}) < len({*paths}):
        name = lambda path: name_of([_escaped(word) for word in path])
    return [name(path) for path in paths]


def _escaped(word: str) -> str:
    r"""A word without a bare separator: `\/` for `/`, and no two words alike."""
    if word in ("", "(root)"):
        return rf"\({word.strip('()')})"
    return word.replace("\\", r"\\").replace("/", r"\/")


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Names once each in alphabetical order, numbers in them as numbers."""

    def key(name: str) -> tuple[list[tuple[str, int]], str]:
        words, numbers = re.split("[0-9]+", name), re.findall("[0-9]+", name)
        return [*zip(words, [*map(int, numbers), -1], strict=True)], name

    return tuple(sorted(set(names), key=key))


def prefix_lookup(
    prefix: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Callable[[KeyPath], Any]:
    """From a path to the entry of a tree prefix at or above it, None without one."""
    flat = (
        leaves_with_path(prefix)
        if is_leaf is None
        else jax.tree_util.tree_flatten_with_path(prefix, is_leaf=is_leaf)[0]
    )
    by_path = {words(path): entry for path, entry in reversed(flat)}

    def find(path: KeyPath) -> Any:
        keys = words(path)
        ends = (keys[:end] for end in range(len(keys) + 1))
        return next((by_path[end] for end in ends if end in by_path), None)

    return find


def ranks(params: Any) -> Any:
    """The number of dimensions of each leaf as structure of a state."""
    places = by_place(params)
    named = zip(place_names(places), places.values(), strict=True)
    return structure_of(params, [f"{name}:{jnp.ndim(x)}" for name, x in named])


def check_stacked(
    updates: Any, params: Any, known: Any, axis: str, advice: str
) -> None:
    """Checks that every leaf has one axis more than the parameter that it is of.

    Sizes may agree by chance, and the first axis would be taken for another.

    Args:
      updates: Leaves `[axis, ...]`.
      params: As `update` is given them, or None: then their shapes are not compared.
      known: From `ranks` at `init`.
      axis: What the first axis is of, as in `"examples"`.
      advice: Where such updates come from, the second half of the sentence.

    Raises:
      ValueError: If a leaf is not stacked.
    """
    wanted = {} if params is None else by_place(params)
    rank = dict(key.rsplit(":", 1) for key in known) if isinstance(known, dict) else {}
    places = by_place(updates)
    for name, (place, leaf) in zip(place_names(places), places.items(), strict=True):
        shape = jnp.shape(leaf)
        if place in wanted:
            right = shape[1:] == jnp.shape(wanted[place])
            of = f"a parameter of shape {jnp.shape(wanted[place])}"
        else:
            number = rank.get(name, str(len(shape) - 1))
            right, of = len(shape) - 1 == int(number), f"a parameter [{number} axes]"
        if not right:
            raise ValueError(
                f"updates must have an axis of {axis} before those of the parameters, "
                f"got shape {shape} for {of} at {name!r}; {advice}."
            )


def structure_of(params: Any, names: Iterable[str]) -> Any:
    """Names as structure, or a leaf in their place where nobody can know them.

    `optax.tree.map_params` calls `init` with a stand-in for params and lays the
    result over a real state; a leaf there covers any names here.
    """
    keys = dict.fromkeys(names, ())
    if keys or params is None or isinstance(params, (dict, list, tuple)):
        return keys
    return jnp.zeros(0, jnp.float32)


def place_names(places: Iterable[Place]) -> list[str]:
    """A name for each place, of `by_place`."""
    return names_of([(*keys, *([str(k)] if k else [])) for keys, k in places])


def by_place(tree: Any) -> dict[Place, Any]:
    """Leaves in order by path, and number in their box."""
    places: dict[Place, Any] = {}
    seen = collections.Counter[tuple[str, ...]]()
    for path, leaf in leaves_with_path(tree):
        keys = words(path)
        places[keys, seen[keys]] = leaf
        seen[keys] += 1
    return places
