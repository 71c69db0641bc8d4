"""AdaGC: each tensor against its own moving average."""

import jax.numpy as jnp
import optax

from clipfx._core.checks import check_number, helpful
from clipfx._core.running_stats import (
    LARGEST,
    UsualNorm,
    increment,
    is_before,
    multiple,
    shares,
)
from clipfx._types import AxisName, GroupSpec, Limit, Scalar
from clipfx.methods.clip_by_norm import clip_by_norm
from clipfx.thresholds import Threshold


@helpful
def adagc(
    max_ratio: Scalar = 1.04,
    *,
    decay: Scalar = 0.99,
    warmup_steps: Scalar = 100,
    max_norm: Limit = 1.0,
    groups: GroupSpec = "leaf",
    ord: float | None = None,
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Holds the norm of each tensor near what it was.

    .. math:: c_i = \begin{cases}
        n_i \, c_0 / \lVert g \rVert & \text{in the warm-up} \\
        \lambda \gamma_i & \text{afterwards} \end{cases} \qquad
        \hat n_i = \min(n_i, c_i)

    .. math:: \gamma_i \leftarrow \begin{cases}
        \min(\gamma_i, \hat n_i) & \text{in the warm-up, from infinity} \\
        \beta\gamma_i + (1-\beta)\hat n_i & \text{afterwards} \end{cases}

    so the warm-up clips by the norm of the whole update, and no step is ever longer
    than :math:`\lambda` times the usual one.

    Because :math:`\gamma` learns the clipped norm, noise ratchets it down, far below
    the mean norm. Measured with the defaults on lognormal norms of deviation 0.1, 0.3,
    0.6 and 1.0: 49, 75, 84 and 88% of the steps clipped, to 0.96, 0.75, 0.44 and 0.17
    of the mean norm. With `max_ratio=1.5` and `decay=0.98` it is 0, 7, 24 and 37%.
    Upwards it creeps by at most :math:`1 + (1-\beta)(\lambda-1)` per step, with the
    defaults 1,700 steps to double.

    Args:
      max_ratio: :math:`\lambda`, how far above the usual norm a step may go.
      decay: :math:`\beta`, in [0, 1).
      warmup_steps: Steps of the warm-up, >= 0.
      max_norm: :math:`c_0`, the threshold of the whole update in the warm-up.
      groups: See `clipfx.clip_by_norm`. Static.
      ord: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`: usual norms `[G]`, metrics `[G]`. Updates
      `[...]` keep structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a number is out of range.

    Example:
      >>> tx = optax.chain(adagc(1.5), optax.adamw(3e-4))

    Differs from the source: a norm of zero teaches nothing, where there it freezes the
    tensor for good; a tensor first seen after the warm-up starts from its first norm.

    Reference: Wang et al., `AdaGC <https://arxiv.org/abs/2502.11034>`_, 2025.
    """
    check_number("max_ratio", max_ratio, "[0, inf]", "1.04 is what the paper takes")
    check_number("decay", decay, "[0, 1)", "0.99 remembers about 100 steps")
    check_number("warmup_steps", warmup_steps, "[0, inf)", "100 is the usual number")
    check_number("max_norm", max_norm, "[0, inf]", "math.inf warms up unclipped")

    def init(groups, params):
        unseen = jnp.full(len(groups.names), -1, jnp.float32)  # as no norm is
        return UsualNorm(jnp.zeros([], jnp.int32), unseen)

    def update(norm, state, **_):
        warming = is_before(state.count, warmup_steps)
        share = multiple(max_norm, shares(jnp.where(jnp.isfinite(norm), norm, 0)))
        unseen = state.norm < 0
        usual = jnp.where(unseen, 0, state.norm)
        limit = jnp.where(unseen, LARGEST, multiple(max_ratio, usual))
        limit = jnp.where(warming, share, limit)
        became = jnp.minimum(norm, limit)
        mean = decay * usual + (1 - decay) * became
        learned = jnp.where(warming, jnp.minimum(usual, became), mean)
        learned = jnp.where(unseen, became, learned)
        learned = jnp.where(norm > 0, learned, state.norm)
        return limit, UsualNorm(increment(state.count), learned)

    return clip_by_norm(
        Threshold(init, update),
        groups=groups,
        ord=ord,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )
