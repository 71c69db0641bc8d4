"""Steps of a linear minimisation oracle that shrink near the optimum."""

from typing import Any

import jax.numpy as jnp
import optax

from clipfx._core import builder
from clipfx._core.checks import check_number, check_transform, helpful
from clipfx._core.clip_factors import check_nonfinite
from clipfx._core.groups import group_leaves
from clipfx._core.leaves import divide
from clipfx._core.matching import check_state
from clipfx._core.norms import Norms, inner_products
from clipfx._core.state import ClipAroundState
from clipfx._types import AxisName, Scalar
from clipfx.thresholds import as_threshold


@helpful
def dual_norm_gate(
    inner: optax.GradientTransformation,
    rho: Scalar,
    *,
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens an orthogonalised step where the momentum's dual norm is small.

    With d what `inner` is given and v what it makes of it,

    .. math:: D = \sum_{l} \langle d_l, v_l \rangle, \qquad
        v \leftarrow v \min(1, D / \rho)

    over all leaves together. Where v is the steepest direction in a norm, as of Muon in
    the spectral norm and of signs in the largest entry, D is the dual norm of d. Such
    steps have one length, and circle an optimum at that distance; with the factor they
    shrink with D below :math:`\rho`.

    `inner` has to make v of the d of the same step alone: momentum stands in front.

    Args:
      inner: From momentum to direction, of the momentum's own sign, such as
        `optax.scale_by_sign()`, `optax.contrib.scale_by_muon(beta=0.0,
        nesterov=False, weight_dimension_numbers=...)`, or both in a partition.
      rho: :math:`\rho` > 0, in units of D: look at the norm in the metrics first.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.states.ClipAroundState`; in its metrics, `[1]`, the norm
      is D, 0 where it is negative, the threshold is :math:`\rho`, and `clipped` counts
      the steps of full length. Updates `[...]` keep structure, shapes and dtypes.

    Raises:
      TypeError: If `inner` is not a transform or `rho` not a number.
      ValueError: If `rho` is not positive.

    Example:
      >>> signs = dual_norm_gate(optax.scale_by_sign(), 10.0)
      >>> tx = optax.chain(
      ...     optax.ema(0.9, debias=False), signs, optax.scale_by_learning_rate(0.02))

    Differs from the source: there the step is :math:`\min(\rho, D)`, which differs by
    the factor :math:`\rho`, part of the learning rate here as in the authors' code.

    Reference: Pethick et al., `Generalized gradient norm clipping and non-Euclidean
    (L0, L1)-smoothness <https://arxiv.org/abs/2506.01913>`_, 2025.
    """
    check_transform("inner", inner)
    check_number("rho", rho, "(0, inf)", "take the usual norm in the metrics")
    check_nonfinite(nonfinite)
    wrapped = optax.with_extra_args_support(inner)

    def respond(norm, limit):
        short = norm < limit  # a traced rho may be 0
        return norm * jnp.where(short, divide(norm, jnp.where(short, limit, 1)), 1)

    def gate(measure: builder.Measure | None = None) -> Any:
        rule = as_threshold(rho)
        return builder.by_norm(rule, respond, nonfinite=nonfinite, measure=measure)

    def init(params):
        return ClipAroundState(gate().init(params), inner.init(params))

    def update(updates, state, params=None, **extra_args):
        check_state(state, ClipAroundState, "dual_norm_gate")
        out, after = wrapped.update(updates, state.inner, params, **extra_args)
        members = group_leaves("global", updates)

        def measure(*_):
            dual = inner_products(updates, out, members, axis_name)
            dual = jnp.maximum(dual, 0)
            return Norms(dual, jnp.ones_like(dual)), {}

        out, kept = gate(measure).update(out, state.clip, params, **extra_args)
        return out, ClipAroundState(kept, after)

    return optax.GradientTransformationExtraArgs(init, update)
