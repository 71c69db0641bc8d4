"""StableAdamW: Adam's steps against Adam's own second moment."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._core import builder, second_moments
from clipfx._core.checks import check_number, check_transform, helpful
from clipfx._core.clip_factors import check_nonfinite
from clipfx._core.groups import Groups
from clipfx._core.matching import check_state
from clipfx._core.norms import Norms, group_norms, group_sizes
from clipfx._core.second_moments import parts
from clipfx._core.state import ClipAroundState
from clipfx._types import AxisName, GroupSpec, Limit, Scalar
from clipfx.thresholds import as_threshold


@helpful
def clip_update_rms(
    inner: optax.GradientTransformation,
    max_rms: Limit = 1.0,
    *,
    b2: Scalar | None = None,
    eps: Scalar = 1e-8,
    groups: GroupSpec = "leaf",
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens Adam's step where gradients outgrow their second moment: StableAdamW.

    With :math:`\hat v_t` the second moment of the Adam inside, just updated by
    :math:`g_t` and corrected for its start at zero, and :math:`d_k` elements in group
    k,

    .. math:: R_k = \sqrt{\frac{1}{d_k} \sum_{i \in k}
        \frac{g_{t,i}^2}{\max(\hat v_{t,i}, \epsilon^2)}}, \qquad
        u_k \leftarrow u_k \min(1, c / R_k)

    where u is what `inner` made of g. The moment is read from the state of `inner`:
    there is no second copy. Around `optax.scale_by_adam`, with `add_decayed_weights`
    behind, weight decay stays as it is; around `optax.adamw` the factor shortens it,
    too, as in optimi's StableAdamW.

    What it is not: `clip_by_block_rms` behind Adam bounds the step, and R is no size of
    the step: the momentum hides a spike, R shows it. :math:`R \le (1 -
    \beta_{2,t})^{-1/2}` with :math:`\beta_{2,t} = 1 - (1 - \beta_2) / (1 -
    \beta_2^t)`, so that with :math:`\beta_2 = 0.999` no factor is below 0.03, and
    momentum and second moment learn a spike in full: an outlier may still need a clip
    in front.

    Args:
      inner: What has Adam's second moment in its state, as an array `nu` for each leaf:
        `optax.scale_by_adam`, `optax.adamw`, `optax.nadamw`, `optax.amsgrad`,
        `optax.rmsprop`, or chains, masks and partitions of such. Leaves without one,
        say Muon's, are neither counted nor changed. Adafactor has no full moment;
        that of `optax.adabelief` or `optax.adamax` is another quantity. Put
        `optax.MultiSteps` around all of it, not inside.
      max_rms: c >= 0: a number, an array `[G]`, a dict by group, or an Optax schedule.
      b2: :math:`\beta_2` of `inner`, in [0, 1), which its state does not say. None
        reads it from `optax.inject_hyperparams` inside, and is enough for a moment that
        is not corrected, as of `optax.scale_by_rms`.
      eps: :math:`\epsilon` > 0, in units of the gradient.
      groups: What shares an R, by default a leaf. See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`; the state of `inner` is its own affair, so
        put `optax.apply_if_finite` around. Static.

    Returns:
      A transform with `clipfx.states.ClipAroundState`; in its metrics, `[G]`, the norm
      is R, the threshold c, and the total the largest R. Updates `[...]` keep
      structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind, `b2` is neither given nor found,
        or the state of `inner` has no second moment.
      ValueError: If a number is out of range, or `inner` has two moments of one leaf.

    Example:
      >>> adam = clip_update_rms(optax.scale_by_adam(b2=0.99), b2=0.99)
      >>> tx = optax.chain(
      ...     adam, optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(3e-4))

    Differs from the source: the second moment is divided by :math:`1 - \beta_2^t`,
    where there :math:`\beta_2` depends on t; both are the same numbers.

    Reference: Wortsman et al., `Stable and low-precision training for large-scale
    vision-language models <https://arxiv.org/abs/2304.13013>`_, 2023.
    """
    check_transform("inner", inner)
    if b2 is not None:
        check_number("b2", b2, "[0, 1)", "pass the b2 of inner")
    check_number("eps", eps, "(0, inf)", "1e-8 is Adam's own")
    check_nonfinite(nonfinite)
    rule = as_threshold(max_rms)
    wrapped = optax.with_extra_args_support(inner)

    def moments_of(state: Any, tree: Any) -> list[second_moments.Moment | None]:
        advice = (
            "put clip_update_rms around optax.scale_by_adam or optax.adamw, or use "
            "clipfx.clip_by_block_rms"
        )
        return second_moments.find(state, tree, "inner", advice)

    def clip(members: Groups, measure: builder.Measure | None = None) -> Any:
        return builder.by_norm(
            rule,
            responses.hard,
            groups=members,
            ord=math.inf,
            nonfinite=nonfinite,
            measure=measure,
        )

    def init(params):
        state = inner.init(params)
        moments = moments_of(state, params)
        _decay(b2, state, moments)
        members = second_moments.members(groups, params, moments)
        return ClipAroundState(clip(members).init(params), state)

    def update(updates, state, params=None, **extra_args):
        check_state(state, ClipAroundState, "clip_update_rms")
        out, after = wrapped.update(updates, state.inner, params, **extra_args)
        moments = moments_of(after, updates)
        decay = _decay(b2, after, moments)
        members = second_moments.members(groups, updates, moments)

        def ratio(x, moment):
            usual = second_moments.root(moment, decay)
            return second_moments.relative(jnp.asarray(x), usual, eps)

        rows = zip(jax.tree.leaves(updates), moments, members.index, strict=True)
        ratios = [x if i is None else ratio(x, moment) for x, moment, i in rows]

        def measure(*_):
            norms = group_norms(ratios, members, 2.0, axis_name)
            root = jnp.sqrt(group_sizes(ratios, members, axis_name))
            return Norms(norms.value / root.astype(norms.value.dtype), norms.scale), {}

        tx = clip(members, measure)
        out, kept = tx.update(out, state.clip, params, **extra_args)
        return out, ClipAroundState(kept, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _decay(b2: Any, state: Any, moments: list[second_moments.Moment | None]) -> Any:
    """What was given, or else what `optax.inject_hyperparams` has."""
    if b2 is not None or all(m is None or m[1] is None for m in moments):
        return b2
    found = [x.hyperparams.get("b2") for x in parts(state, "hyperparams")]
    if len(found) != 1 or found[0] is None:
        raise TypeError(
            "b2 must be given, since the state of inner does not say it; pass the b2 "
            "of the Adam inside, 0.999 unless you set it."
        )
    return found[0]
