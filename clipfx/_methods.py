"""The named methods: groups, threshold and response, with a paper."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._checks import check_number, helpful, is_known
from clipfx._clip import clip_by_norm
from clipfx._norms import group_sizes
from clipfx._statistics import LARGEST, multiple
from clipfx._tree import divide
from clipfx.snr import min_snr
from clipfx.thresholds import Threshold, as_threshold


@helpful
def clip_by_global_norm(
    max_norm: Any,
    *,
    ord: float | None = None,
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens the whole update where its norm exceeds a bound.

    .. math:: g \leftarrow g \, \min(1, c / \lVert g \rVert_p)

    Args:
      max_norm: :math:`c`: a number >= 0, or an Optax schedule.
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
    return clip_by_norm(max_norm, ord=ord, axis_name=axis_name, nonfinite=nonfinite)


@helpful
def clip_per_layer(
    max_norm: Any,
    *,
    groups: Any = "layer",
    ord: float | None = None,
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens the update of each layer where its norm exceeds a bound.

    .. math:: g_l \leftarrow g_l \, \min(1, c_l / \lVert g_l \rVert_p)

    The direction is kept inside a layer and changes between layers. With L layers the
    whole update is at most :math:`\sqrt{\sum_l c_l^2}` long, :math:`c\sqrt{L}` for one
    bound.

    Args:
      max_norm: :math:`c_l`: a number >= 0, an array `[G]`, a dict by layer, or an Optax
        schedule.
      groups: What a layer is: `"layer"`, leaves with the same parent; `"leaf"`; or
        a tree prefix of labels. See `clipfx.clip_by_norm`. Static.
      ord: p of the norm, None for 2. Static. See `clipfx.clip_by_norm`.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[G]`. Updates `[...]` keep
      structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a bound is concrete and negative or NaN, or the bounds do not fit
        the groups; if `ord` is below 1.

    Example:
      >>> params = {"encoder": {"w": jnp.ones(4)}, "decoder": {"w": jnp.ones(4)}}
      >>> tx = clip_per_layer({"encoder": 1.0, "decoder": 0.5})
      >>> clipped, _ = tx.update(params, tx.init(params))
      >>> clipped["decoder"]["w"]
      Array([0.25, 0.25, 0.25, 0.25], dtype=float32)

    Reference: none; common practice since Pascanu et al., 2013.
    """
    return clip_by_norm(
        max_norm, groups=groups, ord=ord, axis_name=axis_name, nonfinite=nonfinite
    )


@helpful
def clip_by_block_rms(
    max_rms: Any,
    *,
    groups: Any = "leaf",
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Bounds the root mean square of each block of the update.

    .. math:: g_k \leftarrow g_k \, \min(1, c / \operatorname{rms}(g_k)), \quad
        \operatorname{rms}(g_k) = \lVert g_k \rVert_2 / \sqrt{d_k}

    with :math:`d_k` the number of elements. Norm and threshold in the metrics are
    those of the norm: :math:`\lVert g_k \rVert` and :math:`c \sqrt{d_k}`.

    Args:
      max_rms: :math:`c`, in units of one element: a number >= 0, an array `[G]`, a dict
        by group, or an Optax schedule.
      groups: What a block is, by default a leaf. See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[G]`. Updates `[...]` keep
      structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a bound is concrete and negative or NaN, or does not fit the
        groups.

    Example:
      >>> tx = optax.chain(optax.scale_by_factored_rms(), clip_by_block_rms(1.0))

    Reference: Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018.
    """
    rule = as_threshold(max_rms)

    def update(norm, state, *, groups, updates, **extra):
        limit, state = rule.update(norm, state, groups=groups, updates=updates, **extra)
        limit = jnp.asarray(limit)
        sizes = group_sizes(updates, groups, axis_name).astype(limit.dtype)
        return multiple(jnp.sqrt(sizes), limit), state

    return clip_by_norm(
        Threshold(rule.init, update),
        groups=groups,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )


@helpful
def normalize_by_norm(
    target: Any = 1.0,
    *,
    groups: Any = "global",
    ord: float | None = None,
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Gives every update the same norm, whether longer or shorter.

    .. math:: g_k \leftarrow c\, g_k / \lVert g_k \rVert_p

    A norm of zero stays zero. In front of Adam a constant norm only weighs the steps
    against each other: Adam divides the scale out again.

    Args:
      target: :math:`c`: a number >= 0, an array `[G]`, a dict by group, or an Optax
        schedule.
      groups: See `clipfx.clip_by_norm`. Static.
      ord: p of the norm, None for 2. Static. See `clipfx.clip_by_norm`.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[G]`. Updates `[...]` keep
      structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a target is concrete and negative or NaN, or does not fit the
        groups; if `ord` is below 1.

    Example:
      >>> tx = optax.chain(optax.trace(0.9), normalize_by_norm(), optax.sgd(1e-2))

    Reference: Cutkosky and Mehta, `Momentum improves normalized SGD
    <https://arxiv.org/abs/2002.03305>`_, 2020.
    """
    return clip_by_norm(
        target,
        groups=groups,
        response=responses.normalize,
        ord=ord,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )


@helpful
def smooth_norm(
    l0: Any,
    l1: Any,
    *,
    groups: Any = "global",
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Divides by the smoothness that the gradient's norm implies.

    .. math:: g \leftarrow g / (L_0 + L_1 \lVert g \rVert)

    the step for a loss whose curvature is at most
    :math:`L_0 + L_1 \lVert \nabla f \rVert`; a learning rate multiplies it as usual.
    Up to the factor :math:`1/L_0` it is `clipfx.responses.softsign` with the threshold
    :math:`L_0/L_1`; with :math:`L_1 = 0` a constant factor, with :math:`L_0 = 0`
    normalisation.

    Args:
      l0: :math:`L_0` >= 0, in units of curvature.
      l1: :math:`L_1` >= 0, in units of curvature per gradient norm; not both zero.
      groups: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[G]`, with the threshold
      :math:`L_0/L_1`. Updates `[...]` keep structure, shapes and dtypes; none is
      longer than :math:`1/L_1`.

    Raises:
      TypeError: If an argument is not a number.
      ValueError: If one is negative, or both are zero.

    Example:
      >>> tx = optax.chain(smooth_norm(1.0, 10.0), optax.sgd(0.1))

    Reference: Zhang et al., `Why gradient clipping accelerates training
    <https://arxiv.org/abs/1905.11881>`_, 2020.
    """
    check_number("l0", l0, "[0, inf)", "1 keeps small gradients as they are")
    check_number("l1", l1, "[0, inf)", "0 divides by l0 alone")
    if isinstance(l0, int | float) and isinstance(l1, int | float) and l0 == l1 == 0:
        raise ValueError("l0 and l1 must not both be 0; l0=1 keeps small gradients.")

    def half_way(norm, state, **_):
        positive = jnp.asarray(l1) > 0
        limit = jnp.where(positive, l0 / jnp.where(positive, l1, 1), LARGEST)
        return jnp.minimum(limit, LARGEST / 2), state  # for people, and no identity

    def respond(norm, _):
        a, b = (jnp.asarray(x).astype(norm.dtype) for x in (l0, l1))
        n = jnp.where(norm > 0, norm, 1)
        steep = divide(n, a + b * jnp.minimum(n, 1))  # for norms up to 1
        flat = 1 / (divide(a, n) + b)
        return jnp.where(norm > 0, jnp.where(n > 1, flat, steep), 0)

    return clip_by_norm(
        Threshold(lambda groups, params: (), half_way),
        groups=groups,
        response=respond,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )


@helpful
def clip_by_snr(
    max_norm: Any,
    *,
    rule: Callable[[jax.Array], jax.Array] | None = None,
    gamma: Any = 5.0,
    low: Any = 1e-3,
    high: Any = 1e3,
    groups: Any = "global",
    response: responses.Response | None = None,
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Clips a diffusion model's update by the signal-to-noise ratio of its timestep.

    .. math:: g_k \leftarrow g_k \, \min(1, c_k(t) / \lVert g_k \rVert), \quad
        c_k(t) = c_k \operatorname{clip}(m(\mathrm{SNR}(t)), low, high)

    The multiple m is a rule of `clipfx.snr`, by default
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
    clip the gradient of every example by itself, at `max_norm * rule(snr)`.

    Args:
      max_norm: :math:`c_k`: a number >= 0, an array `[G]`, a dict by group, or an Optax
        schedule.
      rule: From the ratio to a multiple of the threshold; None means
        `clipfx.snr.min_snr`. Static.
      gamma: Of `clipfx.snr.min_snr`, > 0; not used with another rule.
      low: The least multiple, where the ratio is infinite.
      high: The largest multiple, where the ratio is 0.
      groups: See `clipfx.clip_by_norm`. Static.
      response: See `clipfx.clip_by_norm`; None means `hard`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[G]`. Updates `[...]` keep
      structure, shapes and dtypes. `update` needs `snr=`, a scalar >= 0.

    Raises:
      TypeError: If an argument is of the wrong kind, or `update` is not given `snr`.
      ValueError: If a number is out of range, or `snr` is an array of several.

    Example:
      >>> tx = clip_by_snr(1.0, rule=clipfx.snr.inverse)
      >>> clipped, _ = tx.update(grads, tx.init(params), snr=4.0)
      >>> clipped["w"]
      Array([0.15, 0.2 ], dtype=float32)

    Reference: none; the bound that `Min-SNR weighting
    <https://arxiv.org/abs/2303.09556>`_, 2023, puts on the loss, put on the gradient.
    """
    limits = as_threshold(max_norm)
    if rule is not None and not callable(rule):
        raise TypeError(
            "rule must be a function from a ratio to a multiple of the threshold, got "
            f"{rule!r}; clipfx.snr has them."
        )
    check_number("gamma", gamma, "(0, inf)", "5 is the usual choice")
    check_number("low", low, "[0, inf)", "the least multiple is 1e-3 by default")
    check_number("high", high, "[0, inf]", "the largest multiple is 1e3 by default")

    def update(norm, state, *, snr=None, **extra):
        limit, state = limits.update(norm, state, **extra)
        ratio = jnp.maximum(_check_snr(snr), 0)
        factor = rule(ratio) if rule else min_snr(ratio, gamma)
        factor = jnp.clip(jnp.asarray(factor).astype(jnp.float32), low, high)
        limit = jnp.asarray(limit)
        return multiple(limit, factor.astype(limit.dtype)), state

    return clip_by_norm(
        Threshold(limits.init, update),
        groups=groups,
        response=response or responses.hard,
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
            "per_example.clipped_grad with thresholds max_norm * rule(snr)."
        )
    if is_known(snr) and not float(snr) >= 0:
        raise ValueError(f"snr must be a number >= 0, got {snr!r}; clipfx.snr has it.")
    return jnp.asarray(snr).astype(jnp.float32)
