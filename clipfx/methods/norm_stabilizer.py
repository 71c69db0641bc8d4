"""Norms pulled to their average."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._core.checks import check_number, helpful
from clipfx._core.export import exportable
from clipfx._core.leaves import divide
from clipfx._core.running_stats import (
    average,
    hypot,
    increment,
    unbiased_weight,
)
from clipfx._types import AxisName, GroupSpec, Scalar
from clipfx.methods.clip_by_norm import clip_by_norm
from clipfx.thresholds import Threshold


@exportable("clipfx.NormStabilizerState")
class NormStabilizerState(NamedTuple):
    """What `norm_stabilizer` learns.

    Attributes:
      count: int32, steps seen.
      mean: float32 `[G]`, of the norms, bias corrected.
      rms: float32 `[G]`, their root mean square, bias corrected.

    Reference: none.
    """

    count: jax.Array
    mean: jax.Array
    rms: jax.Array


@helpful
def norm_stabilizer(
    mean_decay: Scalar = 0.7,
    square_decay: Scalar = 0.9,
    *,
    groups: GroupSpec = "leaf",
    ord: float | None = None,
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Gives each tensor a norm near 1, longer where the norms have been steady.

    .. math:: a \leftarrow \gamma_1 a + (1-\gamma_1) n, \qquad
        b \leftarrow \gamma_2 b + (1-\gamma_2) n^2, \qquad
        g \leftarrow \frac{g}{n} \cdot
        \frac{a/(1-\gamma_1^t)}{\sqrt{b/(1-\gamma_2^t)}}

    The result does not depend on the scale of the gradient: the learning rate carries
    all of it. One half of Stable-SPAM; the other is `clipfx.clip_spikes`, in front.

    Args:
      mean_decay: :math:`\gamma_1`, in [0, 1).
      square_decay: :math:`\gamma_2`, in [0, 1).
      groups: See `clipfx.clip_by_norm`. Static.
      ord: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`: two statistics `[G]`, metrics `[G]`, in which
      the threshold is what the norm became. Updates `[...]` keep structure, shapes and
      dtypes; a norm of zero stays zero.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a decay is outside [0, 1).

    Example:
      >>> import clipfx
      >>> tx = optax.chain(clipfx.clip_spikes(), norm_stabilizer(), optax.adam(1e-3))

    Differs from the source: the count of the bias correction is its own, and never
    restarts with the moments of Adam; nothing is added to the denominator.

    Reference: Huang et al., `Stable-SPAM <https://arxiv.org/abs/2502.17055>`_, 2025.
    """
    check_number("mean_decay", mean_decay, "[0, 1)", "0.7 is what the paper takes")
    check_number("square_decay", square_decay, "[0, 1)", "0.9 is what the paper takes")

    def init(groups, params):
        zeros = [jnp.zeros(len(groups.names), jnp.float32) for _ in range(2)]
        return NormStabilizerState(jnp.zeros([], jnp.int32), *zeros)

    def update(norm, state, **_):
        count = increment(state.count)
        weight = unbiased_weight(mean_decay, count)
        mean = average(weight, state.mean, norm)
        weight = unbiased_weight(square_decay, count)
        rms = hypot(jnp.sqrt(1 - weight) * state.rms, jnp.sqrt(weight) * norm)
        became = divide(mean, jnp.where(rms > 0, rms, 1))
        return became, NormStabilizerState(count, mean, rms)

    return clip_by_norm(
        Threshold(init, update),
        groups=groups,
        response=responses.normalize,
        ord=ord,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )
