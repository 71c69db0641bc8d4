"""Powers of single elements."""

import jax.numpy as jnp
import optax

from clipfx._core import builder
from clipfx._core.checks import check_number, helpful
from clipfx._core.groups import counted_leaves
from clipfx._core.leaves import (
    map_counted,
    signed_power,
    widen,
)
from clipfx._types import AxisName, Scalar


@helpful
def grad_power(
    power: Scalar = 1.2, *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Raises every element to a power, keeping its sign.

    .. math:: x_i \leftarrow \operatorname{sign}(x_i)\,|x_i|^p

    p > 1 stresses large elements, as the paper proposes in front of Adam; p < 1
    compresses, and 0 leaves the sign. A complex element keeps its argument. A power
    beyond the range of the dtype becomes its largest number.

    Args:
      power: p >= 0.
      axis_name: Of the metrics alone. See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`, whose metrics are `[1]`: the norm is the
      largest magnitude. Updates `[...]` keep structure, shapes and dtypes.

    Raises:
      TypeError: If `power` is not a number.
      ValueError: If it is negative or not finite.

    Example:
      >>> tx, grads = grad_power(2.0), {"w": jnp.array([3.0, -0.5])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["w"]
      Array([ 9.  , -0.25], dtype=float32)

    Reference: Wang et al., `GradPower <https://arxiv.org/abs/2505.24275>`_, 2025.
    """
    check_number("power", power, "[0, inf)", "1.2 is what the paper takes")

    exponent = jnp.asarray(power)

    def change(updates, groups, state, params):
        shaped = lambda x: signed_power(x, exponent, jnp.ones([]))
        sizes = [jnp.abs(widen(x)) for x, _ in counted_leaves(updates, groups)]
        became = lambda size: signed_power(size, exponent, jnp.ones([]))
        raised = map_counted(shaped, updates, groups)
        return builder.Parts(raised, state, sizes, None, became)

    return builder.by_part(change, axis_name=axis_name)
