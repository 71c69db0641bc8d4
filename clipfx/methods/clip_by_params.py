"""Clippy: steps against the parameters that they change."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._core.checks import check_choice, check_number, check_params, helpful
from clipfx._core.clip_factors import check_nonfinite, factors, finite_norms
from clipfx._core.groups import group_leaves
from clipfx._core.leaves import map_counted, scale_groups, times, widen
from clipfx._core.matching import places, take
from clipfx._core.norms import group_norms
from clipfx._core.running_stats import multiple
from clipfx._core.state import (
    ClipState,
    check_same_groups,
    fresh_metrics,
    next_state,
    no_state,
)


@helpful
def clip_by_params(
    max_ratio: Any = 0.5,
    min_step: Any = 0.01,
    *,
    per: str = "tensor",
    groups: Any = "leaf",
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Bounds the step of every parameter by a share of the parameter.

    .. math:: |u_i| \le \lambda |w_i| + \delta

    for *updates* u, so behind the optimizer and its learning rate. Either a whole
    tensor is scaled until its worst element fits, which keeps the direction, or each
    element by itself:

    .. math:: u \leftarrow u \min\Bigl(1, \min_i \frac{\lambda |w_i| + \delta}{|u_i|}
        \Bigr), \qquad \text{or} \qquad u_i \leftarrow \operatorname{sign}(u_i)
        \min(|u_i|, \lambda |w_i| + \delta) .

    With the first, one weight of zero binds its tensor to steps of :math:`\delta`:
    with a tiny :math:`\delta` a bias that starts at zero freezes.

    Args:
      max_ratio: :math:`\lambda` >= 0.
      min_step: :math:`\delta` >= 0, in units of the parameters.
      per: `"tensor"` or `"element"`. Static.
      groups: What a tensor is, by default a leaf. See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`; for single elements NaN stays NaN. Static.

    Returns:
      A transform; `update` needs params. Per tensor its state is `clipfx.ClipState`
      with metrics `[G]`, in which the norm is the largest ratio of step to bound and
      the threshold 1; per element it has no state. Updates `[...]` keep structure,
      shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind, or `update` is not given params.
      ValueError: If a number is negative, or `per` unknown.

    Example:
      >>> tx = optax.chain(optax.adagrad(0.1), clip_by_params(0.5, 0.01))

    Differs from the source: a transform for any optimizer, there Adagrad is part of
    it; :math:`\delta` is :math:`10^{-7}` in the authors' code, and the values here are
    those of the paper. Their third term, a multiple of Adagrad's preconditioner, is
    zero by default and left out.

    Reference: Tang et al., `Improving training stability for multitask ranking models
    <https://arxiv.org/abs/2302.09178>`_, 2023.
    """
    check_number("max_ratio", max_ratio, "[0, inf]", "0.5 is what the paper takes")
    check_number("min_step", min_step, "[0, inf]", "0.01 is what the paper takes")
    check_choice("per", per, ("tensor", "element"))
    check_nonfinite(nonfinite)

    def bound(w):
        size = jnp.abs(widen(jnp.asarray(w)))
        return jnp.maximum(multiple(max_ratio, size) + min_step, 0)

    def per_element(updates, state, params=None, **extra_args):
        check_params(params, "clip_by_params")
        members = group_leaves("global", updates)
        weights = take(params, places(params, updates, members, "params"), updates)
        pairs = zip(weights, members.index, strict=True)
        weights = iter([w for w, i in pairs if i is not None])

        def clip(x, i):
            limit = bound(next(weights)).astype(jnp.finfo(x.dtype).dtype)
            if jnp.iscomplexobj(x):
                size = jnp.abs(jnp.where(x == 0, 1, x))
                return times(x, jnp.minimum(size, limit) / size)
            return jnp.clip(x, -limit, limit)

        return map_counted(clip, updates, members), state

    if per == "element":
        return optax.GradientTransformationExtraArgs(no_state, per_element)

    def init(params):
        members = group_leaves(groups, params)
        return ClipState((), fresh_metrics(params, members))

    def update(updates, state, params=None, **extra_args):
        check_params(params, "clip_by_params")
        members = group_leaves(groups, updates)
        check_same_groups(state, members)

        def ratio(x, w):
            x, limit = widen(jnp.asarray(x)), bound(w)
            size = jnp.abs(jnp.where(x == 0, 1, x))
            limit = limit.astype(size.dtype)
            largest = jnp.finfo(size.dtype).max
            room = limit > 0
            quotient = jnp.minimum(size / jnp.where(room, limit, 1), largest)
            quotient = jnp.where(room, quotient, largest)
            quotient = jnp.where(jnp.isfinite(size), quotient, size)
            return jnp.where(x == 0, jnp.zeros_like(size), quotient)

        weights = take(params, places(params, updates, members, "params"), updates)
        rows = zip(jax.tree.leaves(updates), weights, members.index, strict=True)
        ratios = [x if i is None else ratio(x, w) for x, w, i in rows]
        norms = group_norms(ratios, members, float("inf"), axis_name)
        worst = finite_norms(norms)
        one = jnp.ones_like(worst)
        before, factor = factors(norms, one, responses.hard, nonfinite)
        # A step where no step is allowed.
        stop = worst >= jnp.finfo(jnp.float32).max
        stop &= jnp.isfinite(worst)
        drop = stop | ~jnp.isfinite(worst) if nonfinite == "zero" else stop
        clipped = scale_groups(updates, members, before, factor, drop=drop)
        total = jnp.where(stop, 0, before * factor)
        return clipped, next_state(state, (), worst, one, total)

    return optax.GradientTransformationExtraArgs(init, update)
