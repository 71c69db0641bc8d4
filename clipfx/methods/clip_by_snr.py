"""Thresholds that follow a diffusion model's signal-to-noise ratio."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._core.checks import check_number, helpful, is_known
from clipfx._core.running_stats import multiple
from clipfx._types import AxisName, GroupSpec, Limit, Scalar
from clipfx.methods.clip_by_norm import clip_by_norm
from clipfx.snr import min_snr
from clipfx.thresholds import Threshold, as_threshold


@helpful
def clip_by_snr(
    max_norm: Limit,
    *,
    weight: Callable[[jax.Array], jax.Array] | None = None,
    gamma: Scalar = 5.0,
    low: Scalar = 1e-3,
    high: Scalar = 1e3,
    groups: GroupSpec = "global",
    response: responses.Response | None = None,
    ord: float | None = None,
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Clips a diffusion model's update by the signal-to-noise ratio of its timestep.

    .. math:: g_k \leftarrow g_k \, \min(1, c_k(t) / \lVert g_k \rVert), \quad
        c_k(t) = c_k \operatorname{clip}(m(\mathrm{SNR}(t)), low, high)

    The multiple m is a weight of `clipfx.snr`, by default
    :math:`\min(1, \gamma/\mathrm{SNR})`. It is meant for the gradient of the
    *unweighted* loss, multiplied by the weight afterwards; on a weighted gradient it
    suppresses the timesteps of high SNR twice. `update` takes the ratio as `snr=`:

    >>> import clipfx
    >>> ratios = clipfx.snr.cosine(1000)
    >>> tx = optax.chain(clip_by_snr(1.0), optax.adam(1e-3))
    >>> params = {"w": jnp.zeros(2)}
    >>> grads = {"w": jnp.array([3.0, 4.0])}
    >>> updates, state = tx.update(grads, tx.init(params), params, snr=ratios[10])

    One ratio per update means one timestep per batch. Where a batch mixes timesteps,
    clip the gradient of every example by itself, at `max_norm * weight(snr)`.

    Args:
      max_norm: :math:`c_k`: a number >= 0, an array `[G]`, a dict by group, or an Optax
        schedule.
      weight: From the ratio to a multiple of the threshold; None means
        `clipfx.snr.min_snr`. Static.
      gamma: Of `clipfx.snr.min_snr`, > 0; not used with another weight.
      low: The least multiple, where the ratio is infinite.
      high: The largest multiple, where the ratio is 0.
      groups: See `clipfx.clip_by_norm`. Static.
      response: See `clipfx.clip_by_norm`; None means `hard`. Static.
      ord: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[G]`. Updates `[...]` keep
      structure, shapes and dtypes. `update` needs `snr=`, a scalar >= 0.

    Raises:
      TypeError: If an argument is of the wrong kind, or `update` is not given `snr`.
      ValueError: If a number is out of range, or `snr` is an array of several.

    Example:
      >>> tx = clip_by_snr(1.0, weight=clipfx.snr.inverse)
      >>> clipped, _ = tx.update(grads, tx.init(params), snr=4.0)
      >>> clipped["w"]
      Array([0.15, 0.2 ], dtype=float32)

    Reference: none; the bound that `Min-SNR weighting
    <https://arxiv.org/abs/2303.09556>`_, 2023, puts on the loss, put on the gradient.
    """
    limits = as_threshold(max_norm)
    if weight is not None and not callable(weight):
        raise TypeError(
            "weight must be a function from a ratio to a multiple of the threshold, "
            f"got {weight!r}; clipfx.snr has them."
        )
    check_number("gamma", gamma, "(0, inf)", "5 is the usual choice")
    check_number("low", low, "[0, inf)", "the least multiple is 1e-3 by default")
    check_number("high", high, "[0, inf]", "the largest multiple is 1e3 by default")

    def update(norm, state, *, snr=None, **extra):
        limit, state = limits.update(norm, state, **extra)
        ratio = jnp.maximum(_check_snr(snr), 0)
        factor = weight(ratio) if weight else min_snr(ratio, gamma)
        factor = jnp.clip(jnp.asarray(factor).astype(jnp.float32), low, high)
        limit = jnp.asarray(limit)
        return multiple(limit, factor.astype(limit.dtype)), state

    return clip_by_norm(
        Threshold(limits.init, update),
        groups=groups,
        response=response,
        ord=ord,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )


def _check_snr(snr: Any) -> jax.Array:
    if snr is None:
        raise TypeError(
            "snr must be passed to update, the signal-to-noise ratio of the timestep, "
            "got nothing; call tx.update(updates, state, params, snr=snr[t])."
        )
    if jnp.ndim(snr) > 0:
        raise ValueError(
            f"snr must be a scalar, one timestep for the whole update, got shape "
            f"{jnp.shape(snr)}; to give every example of a batch its own timestep use "
            "per_example.clipped_grad with thresholds max_norm * weight(snr)."
        )
    if is_known(snr) and not float(snr) >= 0:
        raise ValueError(f"snr must be a number >= 0, got {snr!r}; clipfx.snr has it.")
    return jnp.asarray(snr).astype(jnp.float32)
