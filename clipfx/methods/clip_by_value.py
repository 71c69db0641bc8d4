"""Transforms of single elements: no norm, no collective, no state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._core.checks import helpful
from clipfx._core.groups import group_leaves
from clipfx._core.leaves import map_counted, times
from clipfx._core.state import no_state
from clipfx.thresholds import check_values


@helpful
def clip_by_value(
    max_abs: Any, *, response: responses.Response | None = None
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

    Returns:
      A transform without state. Updates `[...]` keep structure, shapes and dtypes.

    Raises:
      TypeError: If `max_abs` is not a number, as a schedule is not, or `response` is
        no function.
      ValueError: If a concrete `max_abs` is negative or NaN; a traced one acts as 0.

    Example:
      >>> updates, _ = clip_by_value(1.0).update({"w": jnp.array([10.0, 0.1])}, ())
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
    shape = responses.hard if response is None else response
    responses.check_response(shape)

    def bound(x: jax.Array, _: int) -> jax.Array:
        limit = jnp.maximum(jnp.asarray(max_abs).astype(jnp.finfo(x.dtype).dtype), 0)
        if jnp.iscomplexobj(x):
            size = jnp.abs(jnp.where(x == 0, 1, x))
            return jnp.where(x == 0, x, times(x, shape(size, limit) / size))
        # Not jnp.sign: at 0 it is 0, and so would be the derivative.
        sign = jnp.where(x < 0, -1, 1).astype(x.dtype)
        return sign * shape(sign * x, limit)

    def update(updates, state, params=None, **extra_args):
        members = group_leaves("global", updates)
        return map_counted(bound, updates, members), state

    return optax.GradientTransformationExtraArgs(no_state, update)
