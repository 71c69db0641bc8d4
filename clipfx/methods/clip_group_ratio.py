"""Groups kept within a multiple of each other."""

import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._core.checks import check_number, helpful
from clipfx._core.running_stats import (
    LARGEST,
    multiple,
)
from clipfx._types import AxisName, GroupSpec, Scalar
from clipfx.methods.clip_by_norm import clip_by_norm
from clipfx.thresholds import Threshold


@helpful
def clip_group_ratio(
    max_ratio: Scalar,
    *,
    groups: GroupSpec,
    reference_group: str | None = None,
    response: responses.Response | None = None,
    ord: float | None = None,
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps every group's norm within a multiple of the median group's.

    .. math:: g_k \leftarrow g_k \min\Bigl(1, \rho\,
        \frac{\operatorname{median}_j \lVert g_j \rVert}{\lVert g_k \rVert}\Bigr)

    or of one named group's norm. Groups whose norm is zero or not finite have no say
    in the median. A gradient multiplied by a constant is clipped alike.

    Args:
      max_ratio: :math:`\rho` >= 0.
      groups: Between which groups to balance: `"layer"`, `"leaf"` or a tree prefix of
        labels. See `clipfx.clip_by_norm`. Static.
      reference_group: Name of a group to measure the others by, which is never clipped
        itself; None for the median. If its norm is zero or not finite, nothing is
        clipped. Static.
      response: See `clipfx.clip_by_norm`; None means `hard`. Static.
      ord: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[G]`. Updates `[...]` keep
      structure, shapes and dtypes.

    Raises:
      TypeError: If `max_ratio` is not a number.
      ValueError: If it is negative, or `reference_group` is not a group.

    Example:
      >>> tx = clip_group_ratio(2.0, groups="leaf", reference_group="decoder")
      >>> grads = {"encoder": jnp.array([3.0, 4.0]), "decoder": jnp.ones(1)}
      >>> clipped, _ = tx.update(grads, tx.init(grads))
      >>> clipped["encoder"]
      Array([1.2, 1.6], dtype=float32)

    Reference: none.
    """
    check_number("max_ratio", max_ratio, "[0, inf]", "math.inf clips nothing")

    def init(groups, params):
        if (
            reference_group is not None
            and groups.names
            and reference_group not in groups.names
        ):
            raise ValueError(
                "reference_group must be the name of a group, got "
                f"{reference_group!r}; the groups are {groups.names}."
            )
        return ()

    def update(norm, state, *, groups, **_):
        if not groups.names:
            return norm, state
        usable = jnp.isfinite(norm) & (norm > 0)
        if reference_group is None:
            ordered = jnp.sort(jnp.where(usable, norm, LARGEST))
            number = jnp.sum(usable, dtype=jnp.int32)
            middle = ordered[jnp.maximum(number - 1, 0) // 2], ordered[number // 2]
            usual = middle[0] / 2 + middle[1] / 2
            limit = jnp.where(number > 0, multiple(max_ratio, usual), LARGEST)
            return limit, state
        at = groups.names.index(reference_group)
        usual = jnp.where(usable[at], norm[at], 0)
        limit = jnp.where(usable[at], multiple(max_ratio, usual), LARGEST)
        return jnp.where(jnp.arange(norm.size) == at, LARGEST, limit), state

    return clip_by_norm(
        Threshold(init, update),
        groups=groups,
        response=response,
        ord=ord,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )
