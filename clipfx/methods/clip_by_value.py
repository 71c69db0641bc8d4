"""Bounds on single elements."""

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._core import builder
from clipfx._core.checks import helpful
from clipfx._core.groups import counted_leaves
from clipfx._core.leaves import map_counted, times, widen
from clipfx._types import AxisName, Scalar
from clipfx.thresholds import check_values


@helpful
def clip_by_value(
    max_abs: Scalar,
    *,
    response: responses.Response | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Bounds every element, and so changes the direction.

    .. math:: x_i \leftarrow \operatorname{sign}(x_i)\, \psi_c(|x_i|)

    with the response :math:`\psi`; by default :math:`\min(|x_i|, c)`. A complex
    element keeps its argument. NaN stays NaN and an infinite element becomes
    :math:`\pm\psi_c(\infty)`. Half precision is rounded towards zero, so what is
    stored is within the bound too.

    Args:
      max_abs: :math:`c`, a number or scalar array >= 0; infinity changes nothing.
      response: From `clipfx.responses`; None means `hard`. Static.
      axis_name: Of the metrics alone. See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`, whose metrics are `[1]`: the norm is the
      largest magnitude, the share that of clipped elements. Updates `[...]` keep
      structure, shapes and dtypes.

    Raises:
      TypeError: If `max_abs` is not a number, as a schedule is not, or `response` is
        no function.
      ValueError: If a concrete `max_abs` is negative or NaN; a traced one acts as 0.

    Example:
      >>> tx, grads = clip_by_value(1.0), {"w": jnp.array([10.0, 0.1])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["w"]
      Array([1. , 0.1], dtype=float32)

    Reference: Mikolov, Statistical language models based on neural networks, 2012.
    """
    if callable(max_abs) or isinstance(max_abs, dict):
        raise TypeError(
            f"max_abs must be a number, got {max_abs!r}; for a schedule use "
            "optax.inject_hyperparams(clipfx.clip_by_value)(max_abs=schedule)."
        )
    check_values(max_abs)
    shape = responses.check_response(response)

    def bound(x: jax.Array) -> jax.Array:
        limit = jnp.maximum(jnp.asarray(max_abs).astype(jnp.finfo(x.dtype).dtype), 0)
        return bounded(x, limit, shape)

    def change(updates, groups, state, params):
        clipped = map_counted(bound, updates, groups)
        sizes = [jnp.abs(widen(x)) for x, _ in counted_leaves(updates, groups)]
        limit = jnp.maximum(jnp.asarray(max_abs), 0)
        became = lambda size: shape(size, limit.astype(size.dtype))
        return builder.Parts(clipped, state, sizes, limit, became)

    return builder.by_part(change, axis_name=axis_name)


def bounded(x: jax.Array, limit: jax.Array, response: responses.Response) -> jax.Array:
    """Every element with the magnitude that a response gives it."""
    if jnp.iscomplexobj(x):
        size = jnp.abs(jnp.where(x == 0, 1, x))
        return jnp.where(x == 0, x, times(x, response(size, limit) / size))
    # Not jnp.sign: at 0 it is 0, and so would be the derivative.
    size = response(jnp.where(x < 0, -x, x), limit)
    return jnp.where(x < 0, -size, size)
