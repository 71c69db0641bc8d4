"""A running quantile of norms, in O(1)."""

import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._core.checks import check_number, helpful
from clipfx._core.running_stats import multiple
from clipfx._types import AxisName, GroupSpec, Scalar
from clipfx.methods.clip_by_norm import clip_by_norm
from clipfx.thresholds import Threshold


@helpful
def quantile_clip(
    quantile: Scalar = 0.5,
    step_size: Scalar = 0.2,
    *,
    min_norm: Scalar = 0.0,
    groups: GroupSpec = "global",
    response: responses.Response | None = None,
    ord: float | None = None,
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Clips at a quantile of the norms, tracked with one number per group.

    .. math:: g \leftarrow g \, \min(1, c_t/n_t), \qquad
        c_{t+1} = \max\bigl(c_{\min},\, c_t \, e^{-\eta (b_t - \gamma)}\bigr), \quad
        b_t = [n_t \le c_t]

    It rests where a share :math:`\gamma` of the norms is below it, at
    :math:`\gamma = 1/2` the median. :math:`c_1` is the first norm that is not zero.

    Args:
      quantile: :math:`\gamma`, in [0, 1], the share of norms that stay as they are.
      step_size: :math:`\eta` > 0, by how much the logarithm of the threshold moves.
      min_norm: :math:`c_{\min}`, which the threshold never falls below. Without it a
        loss that is fitted exactly takes the threshold to zero along with it.
      groups: See `clipfx.clip_by_norm`. Static.
      response: See `clipfx.clip_by_norm`; None means `hard`. Static.
      ord: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`: thresholds `[G]`, metrics `[G]`. Updates
      `[...]` keep structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a number is out of range.

    Example:
      >>> tx = optax.chain(quantile_clip(0.9, groups="layer"), optax.adam(1e-3))

    Differs from the source: there the share is taken over the examples of a batch and
    is noised for privacy, here it is 0 or 1 for the whole update.

    Reference: Andrew et al., `Differentially private learning with adaptive clipping
    <https://arxiv.org/abs/1905.03871>`_, 2021; the lower bound from `Bounded adaptive
    clipping <https://arxiv.org/abs/2506.01396>`_, 2025.
    """
    check_number("quantile", quantile, "[0, 1]", "0.5 is the median")
    check_number(
        "step_size", step_size, "(0, inf)", "0.2 follows a change within some 30 steps"
    )
    check_number("min_norm", min_norm, "[0, inf)", "0 sets no lower bound")

    def init(groups, params):
        return jnp.zeros(len(groups.names), jnp.float32)

    def update(norm, limit, **_):
        limit = jnp.maximum(jnp.where(limit > 0, limit, norm), min_norm)
        inside = (norm <= limit).astype(jnp.float32)
        # Its powers of e are in the range of float32.
        growth = jnp.exp(jnp.clip(-step_size * (inside - quantile), -80, 80))
        return limit, jnp.maximum(multiple(growth, limit), min_norm)

    return clip_by_norm(
        Threshold(init, update),
        groups=groups,
        response=response,
        ord=ord,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )
