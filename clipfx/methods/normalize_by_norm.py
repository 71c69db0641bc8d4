"""Updates of one norm."""

import optax

from clipfx import responses
from clipfx._core.checks import helpful
from clipfx._types import AxisName, GroupSpec, Limit
from clipfx.methods.clip_by_norm import clip_by_norm


@helpful
def normalize_by_norm(
    target_norm: Limit = 1.0,
    *,
    groups: GroupSpec = "global",
    ord: float | None = None,
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Gives every update the same norm, whether longer or shorter.

    .. math:: g_k \leftarrow c\, g_k / \lVert g_k \rVert_p

    A norm of zero stays zero. In front of Adam a constant norm only weighs the steps
    against each other: Adam divides the scale out again.

    Args:
      target_norm: :math:`c`: a number >= 0, an array `[G]`, a dict by group, or an
        Optax schedule.
      groups: See `clipfx.clip_by_norm`. Static.
      ord: p of the norm, None for 2. Static. See `clipfx.clip_by_norm`.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[G]`. Updates `[...]` keep
      structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a target is concrete and negative or NaN, or does not fit the
        groups; if `ord` is below 1.

    Example:
      >>> tx = optax.chain(optax.trace(0.9), normalize_by_norm(), optax.sgd(1e-2))

    Reference: Cutkosky and Mehta, `Momentum improves normalized SGD
    <https://arxiv.org/abs/2002.03305>`_, 2020.
    """
    return clip_by_norm(
        target_norm,
        groups=groups,
        response=responses.normalize,
        ord=ord,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )
