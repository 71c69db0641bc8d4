"""Sizes and directions by layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx._core.checks import helpful
from clipfx._core.clip_factors import finite_norms
from clipfx._core.export import exportable
from clipfx._core.groups import Groups, group_leaves
from clipfx._core.matching import places, take
from clipfx._core.norms import Norms, cosines, measure_together
from clipfx._core.paths import ordered
from clipfx._types import AxisName, GroupSpec, Tree


@exportable("clipfx.UpdateRatios")
class UpdateRatios(NamedTuple):
    r"""How far a step moves each group, relative to its size.

    Attributes:
      update: `[G]`, :math:`\lVert u \rVert`.
      weight: `[G]`, :math:`\lVert w \rVert`.
      ratio: `[G]`, :math:`\lVert u \rVert / \lVert w \rVert`.
      groups: The names of the groups, the keys of a dict of nothing.

    Reference: none.
    """

    update: jax.Array
    weight: jax.Array
    ratio: jax.Array
    groups: dict[str, tuple[()]]


@exportable("clipfx.ClipEffect")
class ClipEffect(NamedTuple):
    r"""What a clip made of each group.

    Attributes:
      raw: `[G]`, :math:`\lVert g \rVert`.
      clipped: `[G]`, :math:`\lVert u \rVert`.
      ratio: `[G]`, :math:`\lVert u \rVert / \lVert g \rVert`.
      cosine: `[G]`, between u and g: 1 where only the length changed.
      groups: The names of the groups, the keys of a dict of nothing.

    Reference: none.
    """

    raw: jax.Array
    clipped: jax.Array
    ratio: jax.Array
    cosine: jax.Array
    groups: dict[str, tuple[()]]


@helpful
def update_ratios(
    updates: Tree,
    params: Tree,
    *,
    groups: GroupSpec = "layer",
    axis_name: AxisName | None = None,
) -> UpdateRatios:
    r"""Measures updates against weights, :math:`\lVert u_k \rVert / \lVert w_k \rVert`.

    Of gradients the first norm is what explodes or vanishes with depth; of the updates
    that are added to the weights the ratio is the relative step of a layer.

    Args:
      updates: Leaves `[...]`: gradients, or what the optimizer made of them.
      params: Leaves `[...]` of the same structure.
      groups: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.

    Returns:
      `UpdateRatios`, `[G]` each, float32, or float64 if a leaf is. Norms in units of
      the updates and of the weights; finite for finite leaves, at most the largest
      number. The ratio is 0 for updates of zero, and infinite for weights of zero.

    Raises:
      ValueError: If there is no leaf of floating dtype, or none in `params` for one.

    Example:
      >>> updates = {"w": jnp.array([0.3, 0.4])}
      >>> print(update_ratios(updates, {"w": jnp.array([3.0, 4.0])}).ratio)
      [0.1]

    Reference: You et al., `Large batch training of convolutional networks
    <https://arxiv.org/abs/1708.03888>`_, 2017, whose steps have one ratio.
    """
    members, u, w, _ = _measured(
        ("updates", "params"), (updates, params), groups, axis_name
    )
    return UpdateRatios(plain(u), plain(w), _quotient(u, w), names_of(members))


@helpful
def clip_effect(
    raw: Tree,
    clipped: Tree,
    *,
    groups: GroupSpec = "layer",
    axis_name: AxisName | None = None,
) -> ClipEffect:
    r"""Compares updates before and after a clip: their lengths, and the angle between.

    .. math:: \cos_k = \langle g_k, u_k \rangle / (\lVert g_k \rVert \lVert u_k \rVert)

    It is 1 for every clip by the norm of the group, and less for one that cuts single
    elements, singular values or groups within k.

    Args:
      raw: g, leaves `[...]`.
      clipped: u, leaves `[...]` of the same structure.
      groups: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.

    Returns:
      `ClipEffect`, `[G]` each, float32, or float64 if a leaf is. The ratio is 0 where
      u is zero, the cosine where either is.

    Raises:
      ValueError: If there is no leaf of floating dtype, or none in `clipped` for one.

    Example:
      >>> raw, clipped = {"w": jnp.array([7.0, 1.0])}, {"w": jnp.array([1.0, 1.0])}
      >>> effect = clip_effect(raw, clipped)  # of clip_by_value(1.0)
      >>> [f"{x.item():.2f}" for x in (effect.ratio, effect.cosine)]
      ['0.20', '0.80']

    Reference: Zhang et al., `Why gradient clipping accelerates training
    <https://arxiv.org/abs/1905.11881>`_, 2020, for clips that keep the direction.
    """
    members, g, u, pair = _measured(
        ("raw", "clipped"), (raw, clipped), groups, axis_name
    )
    cosine = cosines(*pair, members, (g, u), axis_name)
    return ClipEffect(plain(g), plain(u), _quotient(u, g), cosine, names_of(members))


@helpful
def by_group(found: Any) -> dict[str, dict[str, jax.Array]]:
    """Gives every number the name of its group.

    Rows `[G]` are in natural order, `layer_2` before `layer_10`; `jax.jit` sorts the
    names, as keys of a dict, by letters, so do not pair the two by hand.

    Args:
      found: `UpdateRatios`, `ClipEffect`, `MomentLag`, `NoiseScale` or
        `clipfx.WeightDecayBalance`.

    Returns:
      For each group a dict from the names of the fields to scalars `[]`.

    Raises:
      TypeError: If `found` is none of these.

    Example:
      >>> found = update_ratios({"w": jnp.ones(4)}, {"w": jnp.ones(4)}, groups="leaf")
      >>> print(by_group(found)["w"]["update"])
      2.0

    Reference: none.
    """
    rows = getattr(found, "_asdict", dict)()
    if "groups" not in rows:
        raise TypeError(
            "found must be a result by group, such as that of update_ratios, got a "
            f"{type(found).__name__}; pass all of it, not a field."
        )
    names = ordered(rows.pop("groups"))
    return {group: {name: row[k] for name, row in rows.items()}
            for k, group in enumerate(names)}  # fmt: skip


def _measured(
    names: tuple[str, str], pair: tuple[Tree, Tree], groups: GroupSpec, axis_name: Any
) -> tuple[Groups, Norms, Norms, tuple[Tree, Tree]]:
    tree, other = pair
    members = group_leaves(groups, tree)
    check_some(names[0], members)
    pair = tree, take(other, places(other, tree, members, names[1]), tree)
    a, b = measure_together(pair, members, axis_name)
    return members, a, b, pair


def check_some(name: str, members: Groups) -> None:
    """Checks that something is counted."""
    if all(i is None for i in members.index):
        raise ValueError(
            f"{name} must have a leaf of floating dtype, got none; pass gradients, or "
            "what a transform made of them."
        )


def names_of(members: Groups) -> dict[str, tuple[()]]:
    """The names of the groups as results keep them."""
    return dict.fromkeys(members.names, ())


def plain(norms: Norms) -> jax.Array:
    """Norms as numbers `[G]` of their dtype."""
    return finite_norms(norms, norms.value.dtype)


def _quotient(a: Norms, b: Norms) -> jax.Array:
    """The ratio of two norms, neither of which need be a normal number."""
    ratio = a.value / b.value * (b.scale / a.scale)
    return jnp.where(a.value == 0, jnp.where(b.value >= 0, 0, b.value), ratio)
