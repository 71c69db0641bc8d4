"""Stable-SPAM: elements above the mean of the largest."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._core.checks import check_number, helpful
from clipfx._core.clip_factors import check_nonfinite, factors, finite_norms
from clipfx._core.export import exportable
from clipfx._core.groups import group_leaves
from clipfx._core.leaves import map_counted, times
from clipfx._core.norms import group_norms
from clipfx._core.running_stats import (
    average,
    increment,
    unbiased_weight,
)
from clipfx._core.state import ClipState, check_same_groups, fresh_metrics, next_state


@exportable("clipfx.clip_spikes.Mean")
class _Mean(NamedTuple):
    """The average `[G]` of the largest elements, and the steps seen."""

    count: jax.Array
    mean: jax.Array


@helpful
def clip_spikes(
    decay: Any = 0.999,
    *,
    groups: Any = "leaf",
    axis_name: Any = None,
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
    check_nonfinite(nonfinite)

    def init(params):
        members = group_leaves(groups, params)
        mean = jnp.zeros(len(members.names), jnp.float32)
        state = _Mean(jnp.zeros([], jnp.int32), mean)
        return ClipState(state, fresh_metrics(params, members))

    def update(updates, state, params=None, **extra_args):
        members = group_leaves(groups, updates)
        check_same_groups(state, members)
        norms = group_norms(updates, members, math.inf, axis_name)
        count = increment(state.rule_state.count)
        weight, mean = unbiased_weight(decay, count), state.rule_state.mean
        peak = finite_norms(norms)
        mean = average(weight, mean, peak)
        before, factor = factors(norms, mean, responses.hard, nonfinite)
        total, finite = before * factor, jnp.isfinite(peak)

        def press(x, i):
            size = jnp.abs(x)
            above = size > mean[i].astype(size.dtype)
            spiked = (above & (total[i] < 1)) | ~finite[i]
            pressed = times(times(x, before[i]), factor[i])
            if nonfinite == "zero":
                pressed = jnp.where(finite[i], pressed, jnp.zeros_like(x))
            return jnp.where(spiked, pressed, x)

        pressed = map_counted(press, updates, members)
        learned = _Mean(count, mean)
        return pressed, next_state(state, learned, peak, mean, total)

    return optax.GradientTransformationExtraArgs(init, update)
