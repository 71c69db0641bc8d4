"""What was cut is carried on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._core.checks import check_number, check_transform, helpful
from clipfx._core.clip_factors import factors
from clipfx._core.export import exportable
from clipfx._core.groups import group_leaves
from clipfx._core.leaves import counted_zeros, narrow_counted, scale_groups, widen
from clipfx._core.matching import check_state, places, put, take
from clipfx._core.norms import measure_together
from clipfx._core.running_stats import (
    multiple,
)
from clipfx._types import AxisName, Scalar


@exportable("clipfx.ErrorFeedbackState")
class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`.

    Attributes:
      error: What was cut off and not yet given back, a tree like the updates, float32
        or wider.
      inner: State of the clip inside.

    Reference: none.
    """

    error: Any
    inner: Any


@helpful
def error_feedback(
    inner: optax.GradientTransformation,
    *,
    max_ratio: Scalar = 1.0,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Carries on what clipping removed, and adds it to later gradients.

    .. math:: u_t = \operatorname{clip}(g_t + e_t), \qquad
        e_{t+1} = \operatorname{clip}(g_t + e_t - u_t;\, \rho \lVert u_t \rVert)

    so that clipping delays instead of biases. The second clip bounds what is carried
    by a multiple of what was let through: without it a single spike would be played
    back, step after step, for as many steps as it was thresholds long.

    Memory: one number of float32 or wider per parameter. In private training e comes
    from unclipped gradients: it must never be released.

    Args:
      inner: A transform that shortens updates.
      max_ratio: :math:`\rho` >= 0; 0 carries nothing, `math.inf` everything.
      axis_name: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `ErrorFeedbackState`. Updates `[...]` keep structure, shapes and
      dtypes. On a step that is not finite the error stays as it was.

    Raises:
      TypeError: If `inner` is not a transform or `max_ratio` not a number.
      ValueError: If `max_ratio` is negative.

    Example:
      >>> clip = optax.clip_by_global_norm(1.0)
      >>> tx = optax.chain(error_feedback(clip), optax.sgd(0.1))

    Differs from the source: there the bound is a second threshold, in units of the
    gradient.

    Reference: Zhang et al., `DiceSGD <https://arxiv.org/abs/2311.14632>`_, 2024; for
    many workers Khirirat et al., `Clip21 <https://arxiv.org/abs/2305.18929>`_, 2023;
    with `max_ratio=math.inf` Elesedy and Hutter, `U-Clip
    <https://arxiv.org/abs/2302.02971>`_, 2023.
    """
    check_transform("inner", inner)
    check_number("max_ratio", max_ratio, "[0, inf]", "1 carries at most one step")
    wrapped = optax.with_extra_args_support(inner)

    def init(params):
        return ErrorFeedbackState(counted_zeros(params, wide=True), inner.init(params))

    def update(updates, state, params=None, **extra_args):
        check_state(state, ErrorFeedbackState, "error_feedback")
        members = group_leaves("global", updates)
        at = places(state.error, updates, members, "the state of error_feedback")
        before = error = take(state.error, at, updates)

        def combine(tree, sign):
            """The error plus or minus the counted leaves of a tree."""
            rows = zip(error, jax.tree.leaves(tree), members.index, strict=True)
            return [e if i is None else e + sign * widen(jnp.asarray(x)).astype(e.dtype)
                    for e, x, i in rows]  # fmt: skip

        error = combine(updates, 1)
        total = jax.tree.structure(updates).unflatten(error)
        total = narrow_counted(total, updates, members)
        out, after = wrapped.update(total, state.inner, params, **extra_args)
        error = combine(out, -1)
        left, through = measure_together((error, out), members, axis_name)
        limit = multiple(max_ratio, through.value / through.scale)
        scales = factors(left, limit, responses.hard, "zero")
        kept = scale_groups(error, members, *scales)
        finite = (jnp.isfinite(left.value) & jnp.isfinite(through.value)).all()
        rows = zip(kept, before, members.index, strict=True)
        kept = [e if i is None else jnp.where(finite, x, e) for x, e, i in rows]
        return out, ErrorFeedbackState(put(state.error, at, kept), after)

    return optax.GradientTransformationExtraArgs(init, update)
