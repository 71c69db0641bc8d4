"""A history of norms, kept beside the optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._core import builder
from clipfx._core.checks import check_count, helpful
from clipfx._core.norms import check_ord
from clipfx._core.running_stats import LARGEST, empty_window, push
from clipfx._types import AxisName, GroupSpec, Tree
from clipfx.thresholds import Threshold


@helpful
def record_norms(
    size: int = 1000,
    *,
    groups: GroupSpec = "global",
    ord: float | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Changes nothing, and remembers the last norms.

    .. math:: g \leftarrow g, \qquad
        H \leftarrow (n_{t-N+1}, \dots, n_t), \quad n_t = \lVert g_t \rVert_p

    A clip at infinity with a memory: put it where the clip is to be, train a while,
    and give `clipfx.calibrate.history(opt_state)` to `clipfx.calibrate.suggest`.

    Args:
      size: N, the number of steps remembered, >= 1. Static.
      groups: Which leaves share a norm. See `clipfx.clip_by_norm`. Static.
      ord: p of the norm, None for 2. Static. See `clipfx.clip_by_norm`.
      axis_name: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`: a ring `[size, G]`, float32, metrics `[G]`.
      Updates `[...]` are what they were to the bit, infinities and NaN included. A step
      on which any norm is not finite is counted in the metrics and leaves no row.

    Raises:
      TypeError: If an argument is of the wrong kind, or `size` is not static.
      ValueError: If `size` or `ord` is below 1.

    Example:
      >>> tx = record_norms(100)
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> clipfx.calibrate.history(state)
      {'clip0/global': array([5.], dtype=float32)}

    Reference: Pascanu et al., `On the difficulty of training recurrent neural networks
    <https://arxiv.org/abs/1211.5063>`_, 2013, who choose a threshold by the average
    norm over many updates.
    """
    check_count("size", size, 1, "it is the number of steps to remember")

    def init(groups, params):
        return empty_window(size, len(groups.names))

    def update(norm, seen, **_):
        return jnp.full_like(norm, LARGEST), push(seen, norm)

    def keep(updates: Tree, step: builder.Step) -> tuple[Any, jax.Array]:
        return updates, jnp.ones_like(step.factor())

    return builder.by_norm(
        Threshold(init, update),
        responses.hard,
        groups=groups,
        ord=check_ord(ord),
        axis_name=axis_name,
        apply=keep,
    )
