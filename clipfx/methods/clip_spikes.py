"""Stable-SPAM: elements above the mean of the largest."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._core import builder
from clipfx._core.checks import check_number, helpful
from clipfx._core.export import exportable
from clipfx._core.leaves import map_counted, times
from clipfx._core.running_stats import (
    average,
    increment,
    unbiased_weight,
)
from clipfx._types import AxisName, GroupSpec, Scalar
from clipfx.thresholds import Threshold


@exportable("clipfx.ClipSpikesState")
class ClipSpikesState(NamedTuple):
    """What `clip_spikes` learns.

    Attributes:
      count: int32, steps seen.
      mean: float32 `[G]`, the average of the largest elements.

    Reference: none.
    """

    count: jax.Array
    mean: jax.Array


@helpful
def clip_spikes(
    decay: Scalar = 0.999,
    *,
    groups: GroupSpec = "leaf",
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Presses elements that stand out below the mean of the largest ones.

    With :math:`m = \max_i |g_i|` over a tensor,

    .. math:: M \leftarrow \theta M + (1-\theta) m, \qquad \hat M = M/(1-\theta^t),
        \qquad g_i \leftarrow g_i \, \hat M / m \quad\text{where } |g_i| > \hat M

    The elements above keep their proportions, and the largest lands on
    :math:`\hat M`. The first step is the identity. One half of Stable-SPAM; the other
    is `clipfx.norm_stabilizer`, behind.

    Args:
      decay: :math:`\theta`, in [0, 1).
      groups: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: What becomes of a group with an element that is infinite or NaN. See
        `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`: means `[G]`, metrics `[G]`, in which the norm
      is m, the threshold :math:`\hat M`, and the factor :math:`\hat M/m`. Updates
      `[...]` keep structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If `decay` is outside [0, 1).

    Example:
      >>> tx = optax.chain(clip_spikes(), optax.adam(1e-3))

    Differs from the source: the count of the bias correction is its own. There it
    restarts with the moments of Adam while M does not, which leaves the clip without
    effect for hundreds of steps.

    Reference: Huang et al., `Stable-SPAM <https://arxiv.org/abs/2502.17055>`_, 2025.
    """
    check_number("decay", decay, "[0, 1)", "0.999 is what the paper takes")

    def init(groups, params):
        mean = jnp.zeros(len(groups.names), jnp.float32)
        return ClipSpikesState(jnp.zeros([], jnp.int32), mean)

    def learn(peak, state, **_):
        count = increment(state.count)
        mean = average(unbiased_weight(decay, count), state.mean, peak)
        return mean, ClipSpikesState(count, mean)

    def press(updates, step):
        finite, total = jnp.isfinite(step.norm), step.factor()
        drop = jnp.zeros_like(finite) if step.drop is None else step.drop

        def one(x, finite, total, drop, threshold, *factors):
            size = jnp.abs(x)
            spiked = ((size > threshold.astype(size.dtype)) & (total < 1)) | ~finite
            pressed = functools.reduce(times, factors, x)
            pressed = jnp.where(drop, jnp.zeros_like(x), pressed)
            return jnp.where(spiked, pressed, x)

        facts = finite, total, drop, step.threshold, *step.factors
        return map_counted(one, updates, step.groups, *facts), total

    return builder.by_norm(
        Threshold(init, learn),
        responses.hard,
        groups=groups,
        ord=math.inf,
        axis_name=axis_name,
        nonfinite=nonfinite,
        apply=press,
    )
