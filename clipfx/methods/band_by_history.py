"""Norms kept in a band around their average."""

import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._core.checks import check_number, helpful
from clipfx._core.running_stats import (
    UsualNorm,
    average,
    increment,
    multiple,
)
from clipfx._types import AxisName, GroupSpec, Scalar
from clipfx.methods.clip_by_norm import clip_by_norm
from clipfx.thresholds import Threshold


@helpful
def band_by_history(
    low: Scalar = 0.5,
    high: Scalar = 2.0,
    *,
    decay: Scalar = 0.9,
    min_norm: Scalar = 0.0,
    groups: GroupSpec = "layer",
    ord: float | None = None,
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps each layer's norm within a band around its mean; lifts small ones too.

    .. math:: S \leftarrow \beta S + (1-\beta) n, \qquad
        n \leftarrow \begin{cases} U & n > U = high \cdot S \\
        L & n < L = \max(n_{\min}, low \cdot S) \\ n & \text{else} \end{cases}

    S begins at the first norm. It learns the raw norm: a single spike widens the band
    for some :math:`1/(1-\beta)` steps and passes with up to :math:`(1-\beta) high` of
    its length.

    Args:
      low: Lower edge in units of S, a number in [0, 1], or an Optax schedule.
      high: Upper edge in units of S, a number >= 1, or an Optax schedule.
      decay: :math:`\beta`, in [0, 1).
      min_norm: :math:`n_{\min}`, which shorter norms are lifted to.
      groups: See `clipfx.clip_by_norm`. Static.
      ord: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`: means `[G]`, metrics `[G]`, in which the
      threshold is what the norm became. Updates `[...]` keep structure, shapes and
      dtypes; a norm of zero stays zero.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a number is out of range.

    Example:
      >>> wide_then_narrow = optax.linear_schedule(4.0, 1.5, transition_steps=1000)
      >>> tx = optax.chain(band_by_history(high=wide_then_narrow), optax.adam(1e-3))

    Differs from the source: the edges are constants unless schedules are passed; they
    move linearly there. The values of the defaults are ours.

    Reference: `AGGC <https://arxiv.org/abs/2601.11864>`_, 2026.
    """
    if not callable(low):
        check_number("low", low, "[0, 1]", "0 lifts nothing")
    if not callable(high):
        check_number("high", high, "[1, inf]", "math.inf clips nothing")
    check_number("decay", decay, "[0, 1)", "0.9 remembers about 10 steps")
    check_number("min_norm", min_norm, "[0, inf)", "0 sets no lower bound")

    def init(groups, params):
        mean = jnp.zeros(len(groups.names), jnp.float32)
        return UsualNorm(jnp.zeros([], jnp.int32), mean)

    def update(norm, state, **_):
        count, mean = state
        edge = lambda x: x(count) if callable(x) else x
        mean = jnp.where(mean > 0, average(jnp.asarray(1 - decay), mean, norm), norm)
        upper = multiple(edge(high), mean)
        lower = jnp.maximum(edge(low) * mean, min_norm)
        became = jnp.where(norm > upper, upper, jnp.maximum(norm, lower))
        return became, UsualNorm(increment(count), mean)

    return clip_by_norm(
        Threshold(init, update),
        groups=groups,
        response=responses.normalize,
        ord=ord,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )
