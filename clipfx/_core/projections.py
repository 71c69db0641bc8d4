"""Query and key projections of attention layers: leaves, heads, and their logits."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipfx import _compat
from clipfx._core.groups import Groups, is_counted, is_of_path
from clipfx._core.leaves import widen
from clipfx._core.paths import (
    KeyPath,
    leaves_with_path,
    name_of,
    ordered,
    prefix_lookup,
    words,
)

ROLES = ("query", "rotary_query", "key")


class Which(NamedTuple):
    """Where the leaves of a role are.

    Attributes:
      layer: From the path of a leaf to the name of its layer, None if it has not the
        role.
      index: Of the part of the leaf, None for all of it.
      word: What was looked for, if it is a word.
    """

    layer: Callable[[KeyPath], str | None]
    index: Any
    word: str | None


class Projections(NamedTuple):
    """What is known of the arguments before any tree is."""

    which: dict[str, Which]
    content_dim: int | None
    head_axis: int | None
    layer_axis: int | None


class Part(NamedTuple):
    """A leaf of a projection, or a part of one.

    Attributes:
      role: One of `ROLES`.
      path: Its name.
      place: Among the leaves of the tree.
      index: Of the part of the leaf, None for all of it.
      shape: Of the part, without the axis of layers.
      layers: How many it stacks, 0 for none.
      bias: Whether it is one.
      flat: Whether heads share an axis with their features, as in `[D, N d]`.
      axis: Of heads in `shape`, from the end.
    """

    role: str
    path: str
    place: int
    index: Any
    shape: tuple[int, ...]
    layers: int
    bias: bool = False
    flat: bool = False
    axis: int = -1


def which_leaves(role: str, given: Any) -> Which:
    index, word = None, None
    if isinstance(given, tuple) and len(given) == 2 and _is_index(given[1]):
        given, index = given
    if isinstance(given, str):
        word, wanted = given, _split([given])

        def layer(path: KeyPath) -> str | None:
            own = _split(words(path))
            last = len(own) - len(wanted)
            found = [k for k in range(last + 1) if own[k : k + len(wanted)] == wanted]
            return name_of(own[: found[-1]]) if found else None

    elif is_of_path(given):

        def layer(path: KeyPath) -> str | None:
            return given(words(path))

    elif callable(given) or not jax.tree.leaves(given):
        raise TypeError(
            f"{role} must be a word of paths, a function whose parameter is `path`, or "
            f'a tree prefix of names of layers, got {given!r}; "{role}" is what Flax '
            "calls it."
        )
    else:
        layer = prefix_lookup(given)
    return Which(layer, index, word)


def _is_index(x: Any) -> bool:
    if isinstance(x, tuple):
        return all(map(_is_index, x))
    return isinstance(x, int | slice) or x is Ellipsis


def _split(keys: Sequence[str]) -> tuple[str, ...]:
    """Words of a path: keys of flat dicts may be paths themselves."""
    return tuple(word for key in keys for word in re.split("[/.]", key) if word)


def layers_of(fixed: Projections, tree: Any) -> dict[str, list[Part]]:
    """The parts of every layer, by its name."""
    layers: dict[str, list[Part]] = {}
    rows = leaves_with_path(tree)
    counted = [(k, path, x) for k, (path, x) in enumerate(rows) if is_counted(x, path)]
    for role, which in fixed.which.items():
        found: dict[str, list[Part]] = {}
        for k, path, x in counted:
            if (layer := which.layer(path)) is not None:
                part = _part(fixed, role, name_of(words(path)), k, which.index, x)
                found.setdefault(f"{layer}", []).append(part)
        if rows and not found:
            known = [name_of(words(path)) for _, path, _ in counted]
            known = known if len(known) < 9 else [*known[:8], "..."]
            raise ValueError(
                f"{role} must name leaves of the tree, got {which.word or 'a rule'!r}, "
                f"which fits none of {known}; pass a word of their paths, such as "
                f'{role}="q_proj", or a function of the path.'
            )
        for layer, parts in found.items():
            own = layers.setdefault(layer, [])
            own += _with_heads(fixed, layer, parts, which.word)
    needed = [role for role in ROLES if role in fixed.which]
    for layer, parts in layers.items():
        roles = {part.role for part in parts}
        missing = [role for role in needed if role not in roles]
        if missing:
            raise ValueError(
                f"every layer must have leaves for {needed}, got only those for "
                f"{sorted(roles)} in {layer!r}; let {missing[0]} fit its leaves too, "
                "or the others fit none of that layer."
            )
        chosen = [(part.place, repr(part.index)) for part in parts]
        if len({*chosen}) < len(chosen):
            raise ValueError(
                f"a leaf must have one role, got two for {parts[0].path!r}; give parts "
                'of a fused leaf by index, as in query=("qkv", np.s_[..., 0, :, :]).'
            )
    return {layer: layers[layer] for layer in ordered(layers)}


def _part(
    fixed: Projections, role: str, path: str, place: int, index: Any, leaf: Any
) -> Part:
    shape, layers = [*jnp.shape(leaf)], 0
    if index is not None:
        shape = list(np.broadcast_to(np.empty(()), shape)[index].shape)
    if fixed.layer_axis is not None:
        try:
            layers = shape.pop(fixed.layer_axis)
        except IndexError:
            raise ValueError(
                f"layer_axis must be an axis of every projection, got "
                f"{fixed.layer_axis} for {path!r} of shape {jnp.shape(leaf)}; pass "
                "None if its layers are not stacked."
            ) from None
    return Part(role, path, place, index, tuple(shape), layers)


def _with_heads(
    fixed: Projections, layer: str, parts: list[Part], word: str | None
) -> list[Part]:
    """The leaves of a projection, each knowing where its heads are."""
    role, rank = parts[0].role, max(len(part.shape) for part in parts)
    kernels = sum(len(part.shape) == rank for part in parts)
    few = any(len(part.shape) < rank - 1 for part in parts)
    if few or (word and (kernels > 1 or len(parts) > 2)):
        raise ValueError(
            f"{role} must fit a kernel and at most one bias of each layer, got "
            f"{[part.path for part in parts]} in {layer!r}; be more precise, as in "
            f'{role}="{word or role}/kernel", or pass a function of the path.'
        )
    flat, axis = rank <= 2, fixed.head_axis
    usual = -1 if flat else -2
    if axis is not None and not -rank <= axis < rank:
        raise ValueError(
            f"head_axis must be an axis of every kernel, got {axis} for "
            f"{parts[0].path!r} of shape {parts[0].shape}; None is right for Flax."
        )
    own = usual if axis is None else axis - rank * (axis >= 0)

    def known(part: Part) -> Part:
        bias = len(part.shape) < rank
        return part._replace(bias=bias, flat=flat, axis=usual if bias else own)

    return [*map(known, parts)]


def names_of_groups(fixed: Projections, layers: dict[str, list[Part]]) -> list[str]:
    """Of the groups: layers, or slices of them."""
    if fixed.layer_axis is None:
        return [*layers]
    return [f"{name}/{k}" for name, parts in layers.items()
            for k in range(parts[0].layers)]  # fmt: skip


def members_of(fixed: Projections, layers: dict[str, list[Part]]) -> Groups:
    return Groups(ordered(names_of_groups(fixed, layers)), ())


# --------------------------------------------------------------------- logits by layer


def logits_by_layer(max_logits: Any, layers: dict[str, Any]) -> dict[str, jax.Array]:
    """The logits of each layer, `[N]` or `[L, N]`, in float32 or wider."""
    at = {() if name == "(root)" else _split([name]): name for name in layers}
    found: dict[str, list[jax.Array]] = {name: [] for name in layers}
    entries = leaves_with_path(max_logits)
    for path, x in entries:
        own = _split(words(path))
        above = [end for end in at if own[: len(end)] == end]
        mine = [max(above, key=len)] if above else [
            end for end in at if end[: len(own)] == own
        ]  # fmt: skip
        if len(mine) != 1:
            what = "several layers" if mine else "no layer"
            raise ValueError(
                "max_logits must have an array for each layer, got one at "
                f"{name_of(own)!r} for {what}; there are {[*layers]}."
            )
        x = jnp.asarray(x)
        x = widen(x) if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
        found[at[mine[0]]].append(_compat.whole(x))
    for name, rows in found.items():
        if not rows:
            known = [name_of(words(path)) for path, _ in entries]
            raise ValueError(
                f"max_logits must have an array for each layer, got none for {name!r} "
                f"and some for {known}; name it as the layer is, or nest it as "
                "parameters are."
            )
        if len({row.shape for row in rows}) > 1:
            raise ValueError(
                f"max_logits must agree on the number of heads of {name!r}, got shapes "
                f"{[row.shape for row in rows]}; sow nothing else with them."
            )
    return {name: functools.reduce(jnp.maximum, rows) for name, rows in found.items()}


# ------------------------------------------------------------------------------- heads


def key_heads(fixed: Projections, parts: Sequence[Part], heads: int) -> int:
    """How many key heads there are, for so many query heads; 0 if shapes disagree."""
    kernels = [part for part in parts if not part.bias]
    query = next(part for part in kernels if part.role == "query")
    key = next(part for part in kernels if part.role == "key")
    size = key.shape[key.axis]
    if not key.flat:
        return size
    if fixed.content_dim is not None or "rotary_query" in fixed.which:
        return heads  # of latent attention, each query head has a key head
    features = query.shape[query.axis] // heads if query.flat else query.shape[-1]
    return size // features if features and size % features == 0 else 0


def check_heads(
    fixed: Projections, name: str, parts: Sequence[Part], logits: jax.Array
) -> None:
    """Checks that logits and shapes of a layer agree on heads and layers."""
    stacked = fixed.layer_axis is not None
    if logits.ndim != 1 + stacked:
        wanted = "[L, N] of stacked layers" if stacked else "[N], one per query head"
        raise ValueError(
            f"max_logits of {name!r} must be {wanted}, got shape {logits.shape}; "
            + ("pass layer_axis=None if the layers are not stacked." if stacked else
               "pass layer_axis=0 if its leaves stack layers, and take the maximum "
               "over all else.")
        )  # fmt: skip
    heads = logits.shape[-1]
    groups = key_heads(fixed, parts, heads)
    for part in parts:
        number = groups if part.role == "key" else heads
        size = part.shape[part.axis]
        wrong = size % max(number, 1) if part.flat else size != number
        if wrong or heads % max(groups, 1) or not groups:
            raise ValueError(
                f"max_logits of {name!r} must have one number per query head, got "
                f"{heads} for {part.path!r} with shape {part.shape}, whose axis "
                f"{part.axis} has size {size}, and {groups or 'no'} "
                "whole key heads; pass the heads of the model, or their axis as "
                "head_axis."
            )
        if stacked and part.layers != logits.shape[0]:
            raise ValueError(
                f"max_logits of {name!r} must have a row for each of {part.layers} "
                f"layers, got shape {logits.shape}; layer_axis is {fixed.layer_axis} "
                f"of {part.path!r}."
            )
        features = size // number if part.flat else part.shape[-1]
        if part.role != "rotary_query" and features < (fixed.content_dim or 0):
            raise ValueError(
                f"content_dim must be at most the features of a head, got "
                f"{fixed.content_dim} for {features} of {part.path!r}; count those of "
                "one head that are neither rotary nor values."
            )
