"""One bound for each layer."""

import optax

from clipfx import responses
from clipfx._core.checks import helpful
from clipfx._types import AxisName, GroupSpec, Limit
from clipfx.methods.clip_by_norm import clip_by_norm


@helpful
def clip_per_layer(
    max_norm: Limit,
    *,
    groups: GroupSpec = "layer",
    response: responses.Response | None = None,
    ord: float | None = None,
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens the update of each layer where its norm exceeds a bound.

    .. math:: g_l \leftarrow g_l \, \min(1, c_l / \lVert g_l \rVert_p)

    The direction is kept inside a layer and changes between layers. With L layers the
    whole update is at most :math:`\sqrt{\sum_l c_l^2}` long, :math:`c\sqrt{L}` for one
    bound.

    Args:
      max_norm: :math:`c_l`: a number >= 0, an array `[G]`, a dict by layer, or an Optax
        schedule.
      groups: What a layer is: `"layer"`, leaves with the same parent; `"leaf"`; or
        a tree prefix of labels. See `clipfx.clip_by_norm`. Static.
      response: See `clipfx.clip_by_norm`; None means `hard`. Static.
      ord: p of the norm, None for 2. Static. See `clipfx.clip_by_norm`.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[G]`. Updates `[...]` keep
      structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a bound is concrete and negative or NaN, or the bounds do not fit
        the groups; if `ord` is below 1.

    Example:
      >>> params = {"encoder": {"w": jnp.ones(4)}, "decoder": {"w": jnp.ones(4)}}
      >>> tx = clip_per_layer({"encoder": 1.0, "decoder": 0.5})
      >>> clipped, _ = tx.update(params, tx.init(params))
      >>> clipped["decoder"]["w"]
      Array([0.25, 0.25, 0.25, 0.25], dtype=float32)

    Reference: none; common practice since Pascanu et al., 2013.
    """
    return clip_by_norm(
        max_norm,
        groups=groups,
        response=response,
        ord=ord,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )
