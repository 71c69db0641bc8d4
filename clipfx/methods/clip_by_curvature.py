"""Steps shortened where the gradient turns fast."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._core import builder
from clipfx._core.checks import check_number, check_params, helpful
from clipfx._core.export import exportable
from clipfx._core.leaves import counted_zeros, divide, widen
from clipfx._core.matching import places, put, take
from clipfx._core.norms import Norms, measure_together
from clipfx._core.running_stats import average, increment, multiple, unbiased_weight
from clipfx._types import AxisName, GroupSpec, Scalar
from clipfx.thresholds import Threshold


@exportable("clipfx.CurvatureState")
class CurvatureState(NamedTuple):
    """What `clip_by_curvature` learns.

    Attributes:
      params: Those of the last step.
      updates: Those of the last step.
      steps: int32, steps seen.
      curvature: float32 `[G]`, the average of the secants' slopes.
      secants: int32 `[G]`, how many.

    Reference: none.
    """

    params: Any
    updates: Any
    steps: jax.Array
    curvature: jax.Array
    secants: jax.Array


@helpful
def clip_by_curvature(
    learning_rate: Scalar,
    *,
    max_product: Scalar = 0.5,
    max_factor: Scalar = 1.0,
    decay: Scalar = 0.9,
    groups: GroupSpec = "global",
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens steps where the gradient turns fast, and may lengthen them on plateaus.

    .. math:: L_t = \frac{\lVert g_t - g_{t-1} \rVert}{\lVert w_t - w_{t-1} \rVert},
        \qquad g_t \leftarrow g_t \min\Bigl(s_{\max},
        \frac{\kappa}{\eta\, \bar L_t}\Bigr)

    with :math:`\bar L` the bias-corrected average of L. On a quadratic plain gradient
    descent is stable while :math:`\eta L < 2`. Noise between batches counts as
    curvature, and inflates L by up to
    :math:`\lVert \text{noise} \rVert / (\eta \lVert g \rVert)`: for large batches, or
    gradients averaged before.

    Memory: two more numbers per parameter, the last params and updates.

    Args:
      learning_rate: :math:`\eta` > 0, that of the optimizer behind, for plain gradient
        steps. For a schedule use `optax.inject_hyperparams`.
      max_product: :math:`\kappa` > 0, the most that learning rate times curvature may
        be.
      max_factor: :math:`s_{\max}` > 0; above 1 it lengthens steps where the gradient
        hardly changes.
      decay: Of the average, in [0, 1); 0 takes the last secant alone.
      groups: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; `update` needs params. Its metrics are `[G]`,
      in which the threshold is what the norm became. Updates `[...]` keep structure,
      shapes and dtypes. The first step is the identity.

    Raises:
      TypeError: If an argument is of the wrong kind, or `update` is not given params.
      ValueError: If a number is out of range.

    Example:
      >>> tx = optax.chain(clip_by_curvature(0.1, max_factor=4.0), optax.sgd(0.1))

    Differs from the source: a clip in front of any step size, where there the secant
    sets the step size itself.

    Reference: Malitsky and Mishchenko, `Adaptive gradient descent without descent
    <https://arxiv.org/abs/1910.09529>`_, 2020.
    """
    advice = "pass the optimizer's"
    check_number("learning_rate", learning_rate, "(0, inf)", advice)
    check_number("max_product", max_product, "(0, inf)", "0.5 is cautious, 2 the edge")
    check_number("max_factor", max_factor, "(0, inf)", "1 never lengthens a step")
    check_number("decay", decay, "[0, 1)", "0.9 remembers about 10 steps")

    def init(groups, params):
        number = len(groups.names)
        return CurvatureState(
            params=counted_zeros(params, wide=False),
            updates=counted_zeros(params, wide=False),
            steps=jnp.zeros([], jnp.int32),
            curvature=jnp.zeros(number, jnp.float32),
            secants=jnp.zeros(number, jnp.int32),
        )

    def learn(moved, turned, last):
        """The factors `[G]`, the new curvature and the number of secants."""
        moved, turned = (Norms(*(x.astype(jnp.float32) for x in n))
                         for n in (moved, turned))  # fmt: skip
        known = (last.steps > 0) & (moved.value > 0)
        secant = divide(turned.value, jnp.where(known, moved.value, 1))
        secant *= moved.scale / turned.scale
        known &= jnp.isfinite(secant)
        secants = last.secants + known.astype(jnp.int32)
        weight = unbiased_weight(decay, jnp.maximum(secants, 1))
        mean = average(weight, last.curvature, jnp.where(known, secant, 0))
        curvature = jnp.where(known, mean, last.curvature)
        product = learning_rate * curvature
        factor = max_product / jnp.where(product > 0, product, 1)
        factor = jnp.where(product > 0, jnp.minimum(factor, max_factor), max_factor)
        return jnp.where(secants > 0, factor, 1), curvature, secants

    def measure(updates, groups, params, last):
        """The norms, and of the same reduction what moved and how it turned."""
        check_params(params, "clip_by_curvature")
        new = jax.tree.leaves(updates)
        at = places(last.params, updates, groups, "the state of clip_by_curvature")
        points = take(params, places(params, updates, groups, "params"), updates)
        trees = (
            updates,
            _differences(points, take(last.params, at, updates), groups.index),
            _differences(new, take(last.updates, at, updates), groups.index),
        )
        norms, *secant = measure_together(trees, groups, axis_name)
        kept = _replaced(last.params, at, points), _replaced(last.updates, at, new)
        return norms, {"secant": secant, "kept": kept}

    def rule(norm, last, *, secant, kept, **_):
        moved, turned = secant
        factor, curvature, secants = learn(moved, turned, last)
        params, updates = kept
        steps = increment(last.steps)
        learned = CurvatureState(params, updates, steps, curvature, secants)
        # The norms tell whether the updates are finite, but not the parameters.
        sound = jnp.isfinite(moved.value).all()
        learned = jax.tree.map(lambda x, old: jnp.where(sound, x, old), learned, last)
        return multiple(factor, norm), learned

    return builder.by_norm(
        Threshold(init, rule),
        responses.normalize,  # the norm becomes the threshold
        groups=groups,
        nonfinite=nonfinite,
        measure=measure,
    )


def _differences(new: list, old: list, index: tuple) -> list[Any]:
    """New minus old, leaf by leaf, in float32 or wider where they are counted."""
    rows = zip(new, old, index, strict=True)
    wide = lambda x: widen(jnp.asarray(x))
    return [x if i is None else wide(x) - wide(y).astype(wide(x).dtype)
            for x, y, i in rows]  # fmt: skip


def _replaced(old: Any, at: list[int | None], new: list) -> Any:
    """The new leaves in the dtypes of the old ones, which may not reach as far."""

    def cast(x, dtype):
        x = jnp.asarray(x)
        if jnp.iscomplexobj(x) or jnp.finfo(x.dtype).max <= jnp.finfo(dtype).max:
            return x.astype(dtype)
        largest = jnp.finfo(dtype).max.astype(x.dtype)
        return jnp.clip(x, -largest, largest).astype(dtype)

    leaves = jax.tree.leaves(old)
    pairs = zip(at, new, strict=True)
    cast_all = [None if k is None else cast(x, leaves[k].dtype) for k, x in pairs]
    return put(old, at, cast_all)
