"""Thresholds that set themselves from the norms they have seen.

A rule's state stands still on a step whose norm is not finite (`clip_by_norm` sees to
it), and holds nothing that squares a norm: one of 1e38 is remembered, not overflowed.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._checks import check_choice, check_number, helpful, is_known
from clipfx._clip import clip_by_norm
from clipfx._export import exportable
from clipfx._statistics import (
    LARGEST,
    check_window,
    empty_window,
    hypot,
    increment,
    is_before,
    multiple,
    push,
)
from clipfx._statistics import percentile as window_percentile
from clipfx.thresholds import Threshold


@helpful
def autoclip(
    percentile: Any = 10.0,
    *,
    window: Any = 1000,
    groups: Any = "global",
    response: responses.Response | None = None,
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Clips at a percentile of the norms seen so far.

    .. math:: c_t = \operatorname{percentile}_p(n_{t-N+1}, \dots, n_t), \qquad
        g \leftarrow g \, \min(1, c_t/n_t)

    exact, linear between neighbours, with the present norm among them. The first step
    is the identity.

    p is the share of norms that are *not* clipped: 10 clips some 90% of all steps,
    close to normalising every gradient, and 100 clips nothing.

    Args:
      percentile: p, in [0, 100].
      window: N, the number of steps remembered. Static. Every step sorts it: on a CPU
        0.2 ms for one group, 130 ms for 1,000. For many prefer
        `clipfx.quantile_clip`.
      groups: See `clipfx.clip_by_norm`. Static.
      response: See `clipfx.clip_by_norm`; None means `hard`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`: a ring `[window, G]`, metrics `[G]`. Updates
      `[...]` keep structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind, or `window` is not static.
      ValueError: If `percentile` is outside [0, 100] or `window` below 1.

    Example:
      >>> tx = optax.chain(autoclip(50.0), optax.adam(1e-3))

    Differs from the source: the history is a window, not all of training; norms that
    are not finite never enter it.

    Reference: Seetharaman et al., `AutoClip <https://arxiv.org/abs/2007.14469>`_, 2020.
    """
    advice = "it is the share of norms that stay as they are, in percent"
    check_number("percentile", percentile, "[0, 100]", advice)
    if is_known(percentile) and 0 < percentile < 1:
        warnings.warn(
            f"percentile should be in percent, from 0 to 100, got {percentile!r}; if "
            f"that is a share pass {100 * percentile:g}.",
            stacklevel=3,
        )
    check_window(window)

    def init(groups, params):
        return empty_window(window, len(groups.names))

    def update(norm, seen, **_):
        seen = push(seen, norm)
        return window_percentile(seen, percentile), seen

    return clip_by_norm(
        Threshold(init, update),
        groups=groups,
        response=response or responses.hard,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )


@helpful
def quantile_clip(
    quantile: Any = 0.5,
    rate: Any = 0.2,
    *,
    min_norm: Any = 0.0,
    groups: Any = "global",
    response: responses.Response | None = None,
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Clips at a quantile of the norms, tracked with one number per group.

    .. math:: g \leftarrow g \, \min(1, c_t/n_t), \qquad
        c_{t+1} = \max\bigl(c_{\min},\, c_t \, e^{-\eta (b_t - \gamma)}\bigr), \quad
        b_t = [n_t \le c_t]

    It rests where a share :math:`\gamma` of the norms is below it, at
    :math:`\gamma = 1/2` the median. :math:`c_1` is the first norm that is not zero.

    Args:
      quantile: :math:`\gamma`, in [0, 1], the share of norms that stay as they are.
      rate: :math:`\eta` > 0, by how much the logarithm of the threshold moves.
      min_norm: :math:`c_{\min}`, which the threshold never falls below. Without it a
        loss that is fitted exactly takes the threshold to zero along with it.
      groups: See `clipfx.clip_by_norm`. Static.
      response: See `clipfx.clip_by_norm`; None means `hard`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`: thresholds `[G]`, metrics `[G]`. Updates
      `[...]` keep structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a number is out of range.

    Example:
      >>> tx = optax.chain(quantile_clip(0.9, groups="layer"), optax.adam(1e-3))

    Differs from the source: there the share is taken over the examples of a batch and
    is noised for privacy, here it is 0 or 1 for the whole update.

    Reference: Andrew et al., `Differentially private learning with adaptive clipping
    <https://arxiv.org/abs/1905.03871>`_, 2021; the lower bound from `Bounded adaptive
    clipping <https://arxiv.org/abs/2506.01396>`_, 2025.
    """
    check_number("quantile", quantile, "[0, 1]", "0.5 is the median")
    check_number("rate", rate, "(0, inf)", "0.2 follows a change within some 30 steps")
    check_number("min_norm", min_norm, "[0, inf)", "0 sets no lower bound")

    def init(groups, params):
        return jnp.zeros(len(groups.names), jnp.float32)

    def update(norm, limit, **_):
        limit = jnp.maximum(jnp.where(limit > 0, limit, norm), min_norm)
        inside = (norm <= limit).astype(jnp.float32)
        # Its powers of e are in the range of float32.
        growth = jnp.exp(jnp.clip(-rate * (inside - quantile), -80, 80))
        return limit, jnp.maximum(multiple(growth, limit), min_norm)

    return clip_by_norm(
        Threshold(init, update),
        groups=groups,
        response=response or responses.hard,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )


@exportable("clipfx.zclip.Spread")
class _Spread(NamedTuple):
    """Mean and standard deviation `[G]` of the norms, and the steps seen."""

    count: jax.Array
    mean: jax.Array
    std: jax.Array


@helpful
def zclip(
    z_threshold: Any = 2.5,
    *,
    decay: Any = 0.97,
    max_norm: Any = float("inf"),
    clip_factor: Any = 1.0,
    warmup_steps: Any = 25,
    target: str = "reciprocal",
    learn_spikes: bool | None = None,
    groups: Any = "global",
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Cuts back the norms that stand out from the last ones.

    With mean :math:`\mu` and deviation :math:`\sigma` of the norms,
    :math:`z = (n - \mu)/\sigma` and :math:`\hat z` the threshold, a *spike* is a step
    with :math:`z > \hat z`, and its norm becomes :math:`\min(n^*, c_{\max})`:

    .. math:: n^* = \Bigl(\mu + \hat z \sigma\, \frac{\hat z}{z}\Bigr) f
        \quad\text{("reciprocal")}, \qquad
        n^* = \mu \quad\text{("mean")}, \qquad
        n^* = \mu + \hat z \sigma \quad\text{("edge")} .

    Then, with :math:`x = n^*` at a spike and :math:`x = n` elsewhere,

    .. math:: \mu \leftarrow a\mu + (1-a)x, \qquad
        \sigma^2 \leftarrow a\sigma^2 + (1-a)(x - \mu)^2

    with the new :math:`\mu`. During the first steps :math:`\mu` and :math:`\sigma` are
    plain mean and deviation of the norms so far, and only :math:`c_{\max}` clips.

    "Reciprocal" is redescending: the further a norm stands out, the closer to
    :math:`\mu` it is cut. About 1% of steps are clipped if norms are normal, 6% if they
    are lognormal with deviation 0.5. A norm below the mean is never a spike.

    Args:
      z_threshold: :math:`\hat z` > 0.
      decay: a, in [0, 1). For restless data 0.9 to 0.95.
      max_norm: :math:`c_{\max}`, a bound besides, in the warm-up too.
      clip_factor: f, in (0, 1]; 0.5 to 0.9 is aggressive. It scales the mean as well.
      warmup_steps: Steps to collect norms from, >= 1. A spike among them inflates the
        deviation for long afterwards.
      target: `"reciprocal"`, `"mean"` or `"edge"`. Static.
      learn_spikes: Whether the statistics learn :math:`n^*` at a spike (None, True) or
        nothing (False). Static.
      groups: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`: two statistics `[G]`, metrics `[G]`. The
      threshold in the metrics is the edge :math:`\mu + \hat z\sigma`, and at a spike
      what the norm became. Updates `[...]` keep structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a number is out of range, or `target` unknown.

    Example:
      >>> tx = optax.chain(zclip(max_norm=1.0), optax.adamw(3e-4))

    Differs from the source: `max_norm` is 1 there, here infinite, so that no absolute
    number is left; :math:`\sigma` is at least :math:`10^{-6}\mu` instead of
    :math:`10^{-6}` being added to it.

    Reference: Kumar et al., `ZClip <https://arxiv.org/abs/2504.02507>`_, 2025.
    """
    check_number("z_threshold", z_threshold, "(0, inf)", "2.5 is what the paper takes")
    check_number("decay", decay, "[0, 1)", "0.97 remembers about 30 steps")
    check_number("max_norm", max_norm, "[0, inf]", "math.inf sets no bound besides")
    check_number("clip_factor", clip_factor, "(0, 1]", "1 is what the paper takes")
    check_number("warmup_steps", warmup_steps, "[1, inf)", "25 is the usual number")
    check_choice("target", target, ("reciprocal", "mean", "edge"))

    def init(groups, params):
        zeros = [jnp.zeros(len(groups.names), jnp.float32) for _ in range(2)]
        return _Spread(jnp.zeros([], jnp.int32), *zeros)

    def update(norm, state, **_):
        count, mean, std = state
        warming = is_before(count, warmup_steps)
        margin = multiple(z_threshold, jnp.maximum(std, 1e-6 * mean))
        edge = 2 * jnp.minimum(mean / 2 + margin / 2, LARGEST / 2)
        spike = (norm > edge) & ~warming
        if target == "reciprocal":
            share = jnp.where(spike, margin, 0) / jnp.where(spike, norm - mean, 1)
            after = (mean + margin * share) * clip_factor
        else:
            after = mean if target == "mean" else edge
        after = jnp.where(spike, after, edge)
        limit = jnp.minimum(jnp.where(warming, LARGEST, after), max_norm)

        steps = (count + 1).astype(jnp.float32)
        weight = jnp.where(warming, 1 / steps, 1 - decay)
        gap = jnp.where(spike, after, norm) - mean
        share = jnp.sqrt(weight) * jnp.where(
            warming, jnp.sqrt(1 - 1 / steps), 1 - weight
        )
        grown = hypot(jnp.sqrt(1 - weight) * std, share * jnp.abs(gap))
        learned = mean + weight * gap, grown
        if learn_spikes is not None:
            ignored = spike & ~jnp.asarray(learn_spikes).astype(bool)
            pairs = zip(state[1:], learned, strict=True)
            learned = [jnp.where(ignored, old, new) for old, new in pairs]
        return limit, _Spread(increment(count), *learned)

    return clip_by_norm(
        Threshold(init, update),
        groups=groups,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )
