"""Adafactor's bound on root mean squares."""

import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._core.checks import helpful
from clipfx._core.norms import group_sizes
from clipfx._core.running_stats import multiple
from clipfx._types import AxisName, GroupSpec, Limit
from clipfx.methods.clip_by_norm import clip_by_norm
from clipfx.thresholds import Threshold, as_threshold


@helpful
def clip_by_block_rms(
    max_rms: Limit,
    *,
    groups: GroupSpec = "leaf",
    response: responses.Response | None = None,
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Bounds the root mean square of each block of the update.

    .. math:: g_k \leftarrow g_k \, \min(1, c / \operatorname{rms}(g_k)), \quad
        \operatorname{rms}(g_k) = \lVert g_k \rVert_2 / \sqrt{d_k}

    with :math:`d_k` the number of elements. Norm and threshold in the metrics are
    those of the norm: :math:`\lVert g_k \rVert` and :math:`c \sqrt{d_k}`.

    Args:
      max_rms: :math:`c`, in units of one element: a number >= 0, an array `[G]`, a dict
        by group, or an Optax schedule.
      groups: What a block is, by default a leaf. See `clipfx.clip_by_norm`. Static.
      response: See `clipfx.clip_by_norm`; None means `hard`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[G]`. Updates `[...]` keep
      structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a bound is concrete and negative or NaN, or does not fit the
        groups.

    Example:
      >>> tx = optax.chain(optax.scale_by_factored_rms(), clip_by_block_rms(1.0))

    Reference: Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018.
    """
    rule = as_threshold(max_rms)

    def update(norm, state, *, groups, updates, **extra):
        limit, state = rule.update(norm, state, groups=groups, updates=updates, **extra)
        limit = jnp.asarray(limit)
        sizes = group_sizes(updates, groups, axis_name).astype(limit.dtype)
        return multiple(jnp.sqrt(sizes), limit), state

    return clip_by_norm(
        Threshold(rule.init, update),
        groups=groups,
        response=response,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )
