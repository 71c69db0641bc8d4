"""The usual clip: one norm, one bound."""

import optax

from clipfx import responses
from clipfx._core.checks import helpful
from clipfx._types import AxisName, Limit
from clipfx.methods.clip_by_norm import clip_by_norm


@helpful
def clip_by_global_norm(
    max_norm: Limit,
    *,
    response: responses.Response | None = None,
    ord: float | None = None,
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens the whole update where its norm exceeds a bound.

    .. math:: g \leftarrow g \, \min(1, c / \lVert g \rVert_p)

    Args:
      max_norm: :math:`c`: a number >= 0, or an Optax schedule.
      response: See `clipfx.clip_by_norm`; None means `hard`. Static.
      ord: p of the norm, None for 2. Static. See `clipfx.clip_by_norm`.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[1]`. Updates `[...]` keep
      structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If `max_norm` is concrete and negative or NaN, or `ord` below 1.

    Example:
      >>> tx = optax.chain(clip_by_global_norm(1.0), optax.adamw(3e-4))

    Differs from `optax.clip_by_global_norm`: see `clipfx.clip_by_norm`.

    Reference: Pascanu et al., `On the difficulty of training recurrent neural networks
    <https://arxiv.org/abs/1211.5063>`_, 2013. As threshold they advise 0.5 to 10 times
    the average norm over many updates.
    """
    return clip_by_norm(
        max_norm, response=response, ord=ord, axis_name=axis_name, nonfinite=nonfinite
    )
