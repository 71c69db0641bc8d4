"""Powers of single elements."""

from typing import Any

import jax.numpy as jnp
import optax

from clipfx._core.checks import check_number, helpful
from clipfx._core.groups import group_leaves
from clipfx._core.leaves import (
    _raise,
    map_counted,
)
from clipfx._core.state import no_state


@helpful
def grad_power(power: Any = 1.2) -> optax.GradientTransformationExtraArgs:
    r"""Raises every element to a power, keeping its sign.

    .. math:: x_i \leftarrow \operatorname{sign}(x_i)\,|x_i|^p

    p > 1 stresses large elements, as the paper proposes in front of Adam; p < 1
    compresses, and 0 leaves the sign. A complex element keeps its argument. A power
    beyond the range of the dtype becomes its largest number.

    Args:
      power: p >= 0.

    Returns:
      A transform without state. Updates `[...]` keep structure, shapes and dtypes.

    Raises:
      TypeError: If `power` is not a number.
      ValueError: If it is negative or not finite.

    Example:
      >>> updates, _ = grad_power(2.0).update({"w": jnp.array([3.0, -0.5])}, ())
      >>> updates["w"]
      Array([ 9.  , -0.25], dtype=float32)

    Reference: Wang et al., `GradPower <https://arxiv.org/abs/2505.24275>`_, 2025.
    """
    check_number("power", power, "[0, inf)", "1.2 is what the paper takes")

    def update(updates, state, params=None, **extra_args):
        members = group_leaves("global", updates)
        raised = lambda x, i: _raise(x, jnp.asarray(power), jnp.ones([]))
        return map_counted(raised, updates, members), state

    return optax.GradientTransformationExtraArgs(no_state, update)
