"""Elements that stand out: pressed down by statistics of their group or their own."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._checks import check_number, helpful
from clipfx._clip import (
    ClipState,
    check_nonfinite,
    check_same_groups,
    factors,
    fresh_metrics,
    next_state,
    reported,
)
from clipfx._export import exportable
from clipfx._match import check_state, places, put, take
from clipfx._norms import group_norms
from clipfx._statistics import (
    average,
    hypot,
    increment,
    is_before,
    multiple,
    unbiased_weight,
)
from clipfx._tree import (
    counted_zeros,
    group_leaves,
    map_counted,
    narrow_counted,
    times,
    widen,
)


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
        count = increment(state.threshold.count)
        weight, mean = unbiased_weight(decay, count), state.threshold.mean
        peak = reported(norms)
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


@exportable("clipfx.spam_clip.Moment")
class _Moment(NamedTuple):
    """The root of the second moment of every element, and the steps seen."""

    count: jax.Array
    rms: Any


@helpful
def spam_clip(
    threshold: Any = 5000.0, *, decay: Any = 0.999, warmup_steps: Any = 20
) -> optax.GradientTransformationExtraArgs:
    r"""Bounds every element by a multiple of its own second moment.

    .. math:: g_i \leftarrow \operatorname{sign}(g_i) \min\bigl(|g_i|,
        \sqrt{\theta v_i}\bigr), \qquad
        v_i \leftarrow \beta v_i + (1-\beta) g_i^2

    with the moment of the steps before, and the clipped :math:`g_i` learned. As in the
    paper v is not bias corrected: at first :math:`\sqrt{\theta v}` is about 10 root
    mean squares, in the long run 70.

    Args:
      threshold: :math:`\theta` >= 0, of the square.
      decay: :math:`\beta`, in [0, 1), as of Adam's second moment.
      warmup_steps: Steps that learn without clipping, >= 1.

    Returns:
      A transform whose state holds one number of float32 or wider for every element.
      Updates `[...]` keep structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is not a number.
      ValueError: If one is out of range.

    Example:
      >>> tx = optax.chain(spam_clip(), optax.adam(1e-3))

    Differs from the source: only the clip; Adam's moments are not reset every 500
    steps. An element whose gradient has been zero so far is left alone, where there it
    would stay zero for good; one that is not finite is not learned.

    Reference: Huang et al., `SPAM <https://arxiv.org/abs/2501.06842>`_, 2025.
    """
    check_number("threshold", threshold, "[0, inf]", "5000 is what the paper takes")
    check_number("decay", decay, "[0, 1)", "0.999 is Adam's")
    check_number("warmup_steps", warmup_steps, "[1, inf)", "20 is what the paper takes")

    def init(params):
        real = jax.tree.map(jnp.real, counted_zeros(params, wide=True))
        return _Moment(jnp.zeros([], jnp.int32), real)

    def update(updates, state, params=None, **extra_args):
        members = group_leaves("global", updates)
        check_state(state, _Moment, "spam_clip")
        warming = is_before(state.count, warmup_steps)

        def bound(x, rms):
            size = jnp.abs(jnp.where(x == 0, 1, x))
            of = lambda v: jnp.asarray(v).astype(size.dtype)
            limit = multiple(jnp.sqrt(of(threshold)), rms)
            spiked = (size > limit) & (rms > 0) & (x != 0) & ~warming
            kept = jnp.where(spiked, limit, jnp.where(x == 0, 0, size))
            after = hypot(jnp.sqrt(of(decay)) * rms, jnp.sqrt(1 - of(decay)) * kept)
            learned = jnp.where(jnp.isfinite(x), after, rms)
            if jnp.iscomplexobj(x):
                return jnp.where(spiked, times(x, limit / size), x), learned
            return jnp.where(spiked, jnp.where(x < 0, -limit, limit), x), learned

        at = places(state.rms, updates, members, "the state of spam_clip")
        leaves, treedef = jax.tree.flatten(updates)
        roots = take(state.rms, at, updates)
        for k, i in enumerate(members.index):
            if i is not None:
                leaves[k], roots[k] = bound(widen(jnp.asarray(leaves[k])), roots[k])
        clipped = narrow_counted(treedef.unflatten(leaves), updates, members)
        return clipped, _Moment(increment(state.count), put(state.rms, at, roots))

    return optax.GradientTransformationExtraArgs(init, update)
