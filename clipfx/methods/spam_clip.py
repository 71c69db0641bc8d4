"""SPAM: elements far above their own second moment."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx._core.checks import check_number, helpful
from clipfx._core.export import exportable
from clipfx._core.groups import group_leaves
from clipfx._core.leaves import counted_zeros, narrow_counted, times, widen
from clipfx._core.matching import check_state, places, put, take
from clipfx._core.running_stats import (
    hypot,
    increment,
    is_before,
    multiple,
)


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
