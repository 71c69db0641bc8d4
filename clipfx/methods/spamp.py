"""SPAMP: large entries compressed by a power."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._core import builder
from clipfx._core.checks import check_choice, check_number, helpful
from clipfx._core.clip_factors import exceeds, factors, finite_norms
from clipfx._core.export import exportable
from clipfx._core.leaves import (
    divide,
    narrow_counted,
    scale_groups,
    signed_power,
    widen_counted,
)
from clipfx._core.norms import group_norms, group_sizes
from clipfx._core.running_stats import average, increment, unbiased_weight
from clipfx._types import AxisName, GroupSpec, Scalar
from clipfx.methods.clip_by_norm import clip_by_norm
from clipfx.thresholds import Threshold

_Curve = Callable[[jax.Array], jax.Array]


@exportable("clipfx.SpampState")
class SpampState(NamedTuple):
    """What `spamp` learns.

    Attributes:
      count: int32, steps seen.
      mean: float32 `[G]`, the average of the norms.

    Reference: none.
    """

    count: jax.Array
    mean: jax.Array


@helpful
def spamp(
    decay: Scalar = 0.99,
    min_power: Scalar = 0.7,
    *,
    init: str = "first",
    power_of: str = "entry",
    curve: _Curve | None = None,
    groups: GroupSpec = "leaf",
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Compresses large entries by a power, then projects on the ball of the mean norm.

    .. math:: \tau \leftarrow \beta\tau + (1-\beta) n, \qquad
        \alpha = h(n/\tau), \qquad
        s = \operatorname{sign}(g)\,|g|^\alpha, \qquad
        g \leftarrow s \, \min(1, \tau/\lVert s \rVert)

    per layer, with :math:`h(r) = \alpha_0 + (1-\alpha_0)/\max(r, 1)` unless another
    curve is given. A norm up to :math:`\tau` is left alone, bit for bit.

    What to know before use. It is no fuse: :math:`\tau` learns the raw norm, so a
    spike passes with up to :math:`1-\beta` of its length, and widens the ball for some
    :math:`1/(1-\beta)` steps. It is a permanent shaper: with steady norms some 44% of
    steps exceed their mean. The power raises entries below 1: where all are, it is the
    projection that sets the length, and the power only bends the direction towards
    :math:`\operatorname{sign}(g)`; and what it does depends on the scale of the loss.
    `power_of="rms"` does not: it measures entries in units of
    :math:`\kappa = \tau/\sqrt{d}`, :math:`s = \kappa \operatorname{sign}(g)
    |g/\kappa|^\alpha`. `power_of="norm"` keeps the direction too:
    :math:`g \leftarrow g\,(n/\tau)^{\alpha-1}`, without the projection, which would
    make it a hard clip at :math:`\tau`.

    Args:
      decay: :math:`\beta`, in [0, 1). The paper names 0.9 to 0.999.
      min_power: :math:`\alpha_0`, in (0, 1], which :math:`\alpha` falls to.
      init: Where :math:`\tau` begins: `"first"`, at the first norm; `"zero"`, which
        warms the step up as :math:`1-\beta^t`; `"debias"`, at zero but divided by
        :math:`1-\beta^t`. Static.
      power_of: What is raised to the power: `"entry"`, `"rms"` or `"norm"`. Static.
      curve: h, from ratios `[G]`, up to :math:`1/(1-\beta)`, to powers `[G]`. None
        means the curve above. Static.
      groups: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`: means `[G]`, metrics `[G]`, in which the
      threshold is :math:`\tau` and the factor that of the norm. Updates `[...]` keep
      structure, shapes and dtypes. Two norms are measured per step, one after the
      other, with an all-reduce each; with `power_of="norm"` one.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a number is out of range, or `init` or `power_of` unknown.

    Example:
      >>> tx = optax.chain(spamp(), optax.sgd(0.1))

    Differs from the source: no public text states h, nor where :math:`\tau` begins,
    nor values of :math:`\beta` and :math:`\alpha_0` beyond their ranges ([0.7, 1] for
    :math:`\alpha`); those here are ours.

    Reference: You and Liu, `SPAMP <https://arxiv.org/abs/2510.01578>`_, 2025.
    """
    check_number("decay", decay, "[0, 1)", "0.99 remembers about 100 steps")
    check_number("min_power", min_power, "(0, 1]", "0.7 is the lowest in the paper")
    check_choice("init", init, ("first", "zero", "debias"))
    check_choice("power_of", power_of, ("entry", "rms", "norm"))
    if curve is not None and not callable(curve):
        raise TypeError(
            f"curve must be a function from ratios to powers, got {curve!r}; None is "
            "the usual curve."
        )

    def fresh(groups, params):
        mean = jnp.zeros(len(groups.names), jnp.float32)
        return SpampState(jnp.zeros([], jnp.int32), mean)

    def learn(norm, state, **_):
        count = increment(state.count)
        weight = jnp.asarray(1 - decay)
        if init == "debias":
            weight = unbiased_weight(decay, count)
        elif init == "first":
            weight = jnp.where(count == 1, 1, weight)
        mean = average(weight, state.mean, norm)
        return mean, SpampState(count, mean)

    def power_at(norm, limit):
        above = (limit > 0) & exceeds(
            jnp.maximum(norm, limit), jnp.minimum(norm, limit)
        )
        ratio = jnp.where(above, divide(norm, jnp.where(above, limit, 1)), 1)
        if curve is not None:
            return curve(ratio)
        return min_power + (1 - min_power) / jnp.maximum(ratio, 1)

    if power_of == "norm":

        def shape(norm, limit):
            usable = (norm > 0) & (limit > 0) & (limit < jnp.inf)
            n, c = jnp.where(usable, norm, 1), jnp.where(usable, limit, 1)
            power = power_at(n, c)
            ratio = jnp.maximum(divide(n, c), jnp.finfo(n.dtype).tiny)
            shaped = c * jnp.exp(power * jnp.log(ratio))
            return jnp.where(usable & (power != 1), shaped, norm)

        return clip_by_norm(
            Threshold(fresh, learn),
            groups=groups,
            response=shape,
            axis_name=axis_name,
            nonfinite=nonfinite,
        )

    def compress(updates, step):
        members, norm = step.groups, step.norm
        limit = step.threshold.astype(norm.dtype)
        power = jnp.asarray(power_at(norm, limit))
        unit = jnp.ones_like(norm)
        if power_of == "rms":
            root = jnp.sqrt(group_sizes(updates, members, axis_name))
            unit = jnp.where(limit > 0, limit / jnp.maximum(root, 1), 1)
        shaped = widen_counted(signed_power, updates, members, power, unit)
        norms = group_norms(shaped, members, axis_name=axis_name)
        before, factor = factors(norms, limit, responses.hard, nonfinite)
        clipped = scale_groups(shaped, members, before, factor, drop=step.drop)
        became = finite_norms(norms) * (before * factor).astype(jnp.float32)
        total = divide(became, jnp.where(norm > 0, norm, 1))
        clipped = narrow_counted(clipped, updates, members)
        return clipped, jnp.where(norm > 0, total, 1)

    return builder.by_norm(
        Threshold(fresh, learn),
        responses.hard,
        groups=groups,
        axis_name=axis_name,
        nonfinite=nonfinite,
        apply=compress,
    )
