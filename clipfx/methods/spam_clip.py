"""SPAM: elements far above their own second moment."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx._core import builder
from clipfx._core.checks import check_number, helpful
from clipfx._core.export import exportable
from clipfx._core.leaves import counted_zeros, divide, narrow_counted, times, widen
from clipfx._core.matching import places, put, take
from clipfx._core.running_stats import (
    LARGEST,
    hypot,
    increment,
    is_before,
    multiple,
)
from clipfx._types import AxisName, Limit, Scalar


@exportable("clipfx.SpamClipState")
class SpamClipState(NamedTuple):
    """What `spam_clip` learns.

    Attributes:
      count: int32, steps seen.
      rms: The root of the second moment of every element, float32 or wider.

    Reference: none.
    """

    count: jax.Array
    rms: Any


@helpful
def spam_clip(
    threshold: Limit = 5000.0,
    *,
    decay: Scalar = 0.999,
    warmup_steps: Scalar = 20,
    axis_name: AxisName | None = None,
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
      axis_name: Of the metrics alone. See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`, whose rule's state holds one number of
      float32 or wider for every element. Its metrics are `[1]`: the norm is the largest
      ratio of an element to its bound, the share that of clipped elements. Updates
      `[...]` keep structure, shapes and dtypes.

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
        return SpamClipState(jnp.zeros([], jnp.int32), real)

    def change(updates, groups, state, params):
        warming = is_before(state.count, warmup_steps)

        def bound(x, rms):
            size = jnp.abs(jnp.where(x == 0, 1, x))
            of = lambda v: jnp.asarray(v).astype(size.dtype)
            limit = multiple(jnp.sqrt(of(threshold)), rms)
            bounded = (rms > 0) & (x != 0) & ~warming
            spiked = (size > limit) & bounded
            kept = jnp.where(spiked, limit, jnp.where(x == 0, 0, size))
            after = hypot(jnp.sqrt(of(decay)) * rms, jnp.sqrt(1 - of(decay)) * kept)
            learned = jnp.where(jnp.isfinite(x), after, rms)
            over = divide(size, jnp.where(limit > 0, limit, size))
            over = jnp.where(bounded, jnp.where(limit > 0, over, LARGEST), 0)
            if jnp.iscomplexobj(x):
                return jnp.where(spiked, times(x, limit / size), x), learned, over
            return jnp.where(spiked, jnp.where(x < 0, -limit, limit), x), learned, over

        at = places(state.rms, updates, groups, "the state of spam_clip")
        leaves, treedef = jax.tree.flatten(updates)
        roots, sizes = take(state.rms, at, updates), []
        for k, i in enumerate(groups.index):
            if i is not None:
                x = widen(jnp.asarray(leaves[k]))
                leaves[k], roots[k], over = bound(x, roots[k])
                sizes.append(over)
        clipped = narrow_counted(treedef.unflatten(leaves), updates, groups)
        learned = SpamClipState(increment(state.count), put(state.rms, at, roots))
        became = lambda size: jnp.minimum(size, 1)
        return builder.Parts(clipped, learned, sizes, 1.0, became)

    return builder.by_part(change, init=init, axis_name=axis_name)
