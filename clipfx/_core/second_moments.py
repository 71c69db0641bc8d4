"""Adam's second moment, read from the state of an optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx._core.groups import Groups, group_leaves
from clipfx._core.leaves import widen
from clipfx._core.paths import by_place, name_of


class Moment(NamedTuple):
    """The mean of squares of one leaf.

    Attributes:
      nu: `[...]`, not corrected for its start at zero.
      count: The number of steps it has seen, None if it is not to be corrected.
    """

    nu: Any
    count: Any


def parts(state: Any, field: str) -> list[Any]:
    """The parts of a state that have a field of this name."""

    def has(x: Any) -> bool:
        return isinstance(x, tuple) and field in getattr(x, "_fields", ())

    return [x for x in jax.tree.leaves(state, is_leaf=has) if has(x)]


def find(state: Any, tree: Any, name: str, advice: str) -> list[Moment | None]:
    """For each leaf of a tree its second moment, None where there is none.

    Args:
      state: Of an optimizer.
      tree: Updates or parameters.
      name: Of the argument that the state is or belongs to, for errors.
      advice: What to pass, where there is no moment.

    Raises:
      TypeError: If there is no second moment at all.
      ValueError: If there are two of one leaf.
    """
    found: dict[Any, Moment] = {}
    holders = parts(state, "nu")
    if not holders:
        raise TypeError(
            f"{name} must keep Adam's second moment as nu in its state, got "
            f"{type(state).__name__} without; {advice}."
        )
    for part in holders:
        for place, nu in by_place(part.nu).items():
            if place in found:
                raise ValueError(
                    f"{name} must keep one second moment of each leaf, got two of "
                    f"{name_of(place[0])!r}; pass the part that has one of them."
                )
            found[place] = Moment(nu, part.count if "count" in part._fields else None)
    return [found.get(place) for place in by_place(tree)]


def members(groups: Any, tree: Any, moments: list[Moment | None]) -> Groups:
    """The groups of leaves that have a moment."""
    leaves, treedef = jax.tree.flatten(tree)
    rows = [*zip(leaves, moments, strict=True)]
    known = treedef.unflatten([None if m is None else x for x, m in rows])
    names, index = group_leaves(groups, known)
    following = iter(index)
    every = (None if m is None else next(following) for _, m in rows)
    return Groups(names, tuple(every))


def root(moment: Moment, decay: Any, after: jax.Array | None = None) -> jax.Array:
    """The root `[...]` of a moment, corrected for its start at zero.

    Args:
      moment: Of one leaf.
      decay: Its b2; of no use, and None, where nothing is corrected.
      after: A gradient `[...]` to enter it before, without its square being taken.
    """
    # Of complex parameters it is complex, too, with an imaginary part of 0.
    nu, share, seen = jnp.real(widen(jnp.asarray(moment.nu))), None, jnp.float32(1)
    if decay is not None:
        # From 1 - b2, which Adam multiplies squares by, not from b2, rounded.
        share = jnp.asarray(1 - decay).astype(jnp.float32)
    if share is not None and moment.count is not None:
        steps = moment.count if after is None else moment.count + 1
        log = jnp.log1p(-jnp.minimum(share, 1 - 2.0**-24))
        seen = -jnp.expm1(steps.astype(jnp.float32) * log)
    if share is None or after is None:
        return jnp.sqrt(nu / seen.astype(nu.dtype))
    old = jnp.sqrt(nu * ((1 - share) / seen).astype(nu.dtype))
    new = jnp.abs(widen(after)).astype(nu.dtype)
    return jnp.hypot(old, new * jnp.sqrt(share / seen).astype(nu.dtype))


def relative(x: jax.Array, usual: jax.Array, eps: Any) -> jax.Array:
    """Sizes `[...]` of elements over what is usual, or over `eps` if that is more."""
    size = jnp.abs(widen(x))
    usual = usual.astype(size.dtype)
    return size / jnp.maximum(usual, jnp.asarray(eps).astype(size.dtype))
