"""Clippy: steps against the parameters that they change."""

import math
from itertools import starmap

import jax
import jax.numpy as jnp
import optax

from clipfx._core import builder
from clipfx._core.checks import check_choice, check_number, check_params, helpful
from clipfx._core.clip_factors import check_nonfinite
from clipfx._core.leaves import map_counted, times, widen
from clipfx._core.matching import places, take
from clipfx._core.norms import group_norms
from clipfx._core.running_stats import LARGEST, multiple
from clipfx._types import AxisName, GroupSpec, Scalar
from clipfx.thresholds import Threshold


@helpful
def clip_by_params(
    max_ratio: Scalar = 0.5,
    min_step: Scalar = 0.01,
    *,
    per: str = "tensor",
    groups: GroupSpec = "leaf",
    axis_name: AxisName | None = None,
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
      A transform with `clipfx.ClipState`; `update` needs params. Its metrics are `[G]`
      per tensor, `[1]` per element: the norm is the largest ratio of step to bound and
      the threshold 1. Updates `[...]` keep structure, shapes and dtypes.

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

    def weights_of(updates, groups, params):
        check_params(params, "clip_by_params")
        return take(params, places(params, updates, groups, "params"), updates)

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

    def shrink(norm, one):
        """Where no step is allowed, none."""
        return jnp.where(norm < LARGEST, jnp.minimum(norm, one), 0)

    if per == "element":

        def change(updates, groups, state, params):
            weights = weights_of(updates, groups, params)
            rows = zip(jax.tree.leaves(updates), weights, groups.index, strict=True)
            rows = [(x, w) for x, w, i in rows if i is not None]
            following = iter(rows)

            def clip(x):
                limit = bound(next(following)[1]).astype(jnp.finfo(x.dtype).dtype)
                if jnp.iscomplexobj(x):
                    size = jnp.abs(jnp.where(x == 0, 1, x))
                    return times(x, jnp.minimum(size, limit) / size)
                return jnp.clip(x, -limit, limit)

            clipped = map_counted(clip, updates, groups)
            became = lambda size: shrink(size, 1.0)
            return builder.Parts(clipped, state, [*starmap(ratio, rows)], 1.0, became)

        return builder.by_part(change, axis_name=axis_name)

    def measure(updates, groups, params, state):
        weights = weights_of(updates, groups, params)
        rows = zip(jax.tree.leaves(updates), weights, groups.index, strict=True)
        ratios = [x if i is None else ratio(x, w) for x, w, i in rows]
        return group_norms(ratios, groups, math.inf, axis_name), {}

    return builder.by_norm(
        Threshold(lambda groups, params: (), lambda norm, state, **_: (1.0, state)),
        shrink,
        groups=groups,
        ord=math.inf,
        nonfinite=nonfinite,
        measure=measure,
    )
