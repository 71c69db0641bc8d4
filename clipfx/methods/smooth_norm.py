"""Division by the smoothness that a gradient implies."""

import jax.numpy as jnp
import optax

from clipfx._core.checks import check_number, helpful
from clipfx._core.leaves import divide
from clipfx._core.running_stats import LARGEST
from clipfx._types import AxisName, GroupSpec, Scalar
from clipfx.methods.clip_by_norm import clip_by_norm
from clipfx.thresholds import Threshold


@helpful
def smooth_norm(
    l0: Scalar,
    l1: Scalar,
    *,
    groups: GroupSpec = "global",
    ord: float | None = None,
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Divides by the smoothness that the gradient's norm implies.

    .. math:: g \leftarrow g / (L_0 + L_1 \lVert g \rVert)

    the step for a loss whose curvature is at most
    :math:`L_0 + L_1 \lVert \nabla f \rVert`; a learning rate multiplies it as usual.
    Up to the factor :math:`1/L_0` it is `clipfx.responses.softsign` with the threshold
    :math:`L_0/L_1`; with :math:`L_1 = 0` a constant factor, with :math:`L_0 = 0`
    normalisation.

    Args:
      l0: :math:`L_0` >= 0, in units of curvature.
      l1: :math:`L_1` >= 0, in units of curvature per gradient norm; not both zero.
      groups: See `clipfx.clip_by_norm`. Static.
      ord: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[G]`, with the threshold
      :math:`L_0/L_1`. Updates `[...]` keep structure, shapes and dtypes; none is
      longer than :math:`1/L_1`.

    Raises:
      TypeError: If an argument is not a number.
      ValueError: If one is negative, or both are zero.

    Example:
      >>> tx = optax.chain(smooth_norm(1.0, 10.0), optax.sgd(0.1))

    Reference: Zhang et al., `Why gradient clipping accelerates training
    <https://arxiv.org/abs/1905.11881>`_, 2020.
    """
    check_number("l0", l0, "[0, inf)", "1 keeps small gradients as they are")
    check_number("l1", l1, "[0, inf)", "0 divides by l0 alone")
    if isinstance(l0, int | float) and isinstance(l1, int | float) and l0 == l1 == 0:
        raise ValueError("l0 and l1 must not both be 0; l0=1 keeps small gradients.")

    def half_way(norm, state, **_):
        positive = jnp.asarray(l1) > 0
        limit = jnp.where(positive, l0 / jnp.where(positive, l1, 1), LARGEST)
        return jnp.minimum(limit, LARGEST / 2), state  # for people, and no identity

    def respond(norm, _):
        a, b = (jnp.asarray(x).astype(norm.dtype) for x in (l0, l1))
        n = jnp.where(norm > 0, norm, 1)
        steep = divide(n, a + b * jnp.minimum(n, 1))  # for norms up to 1
        flat = 1 / (divide(a, n) + b)
        return jnp.where(norm > 0, jnp.where(n > 1, flat, steep), 0)

    return clip_by_norm(
        Threshold(lambda groups, params: (), half_way),
        groups=groups,
        response=respond,
        ord=ord,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )
