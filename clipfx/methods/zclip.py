"""ZClip: norms that stand out by their z-score."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx._core.checks import check_choice, check_number, helpful
from clipfx._core.export import exportable
from clipfx._core.running_stats import LARGEST, hypot, increment, is_before, multiple
from clipfx._types import AxisName, GroupSpec, Limit, Scalar
from clipfx.methods.clip_by_norm import clip_by_norm
from clipfx.thresholds import Threshold


@exportable("clipfx.ZClipState")
class ZClipState(NamedTuple):
    """What `zclip` learns.

    Attributes:
      count: int32, steps seen.
      mean: float32 `[G]`, of the norms.
      std: float32 `[G]`, of the norms.

    Reference: none.
    """

    count: jax.Array
    mean: jax.Array
    std: jax.Array


@helpful
def zclip(
    z_threshold: Scalar = 2.5,
    *,
    decay: Scalar = 0.97,
    max_norm: Limit = float("inf"),
    clip_factor: Scalar = 1.0,
    warmup_steps: Scalar = 25,
    clip_to: str = "reciprocal",
    learn_spikes: bool | None = None,
    groups: GroupSpec = "global",
    ord: float | None = None,
    axis_name: AxisName | None = None,
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
      clip_to: `"reciprocal"`, `"mean"` or `"edge"`. Static.
      learn_spikes: Whether the statistics learn :math:`n^*` at a spike (None, True) or
        nothing (False). Static.
      groups: See `clipfx.clip_by_norm`. Static.
      ord: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`: two statistics `[G]`, metrics `[G]`. The
      threshold in the metrics is the edge :math:`\mu + \hat z\sigma`, and at a spike
      what the norm became. Updates `[...]` keep structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a number is out of range, or `clip_to` unknown.

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
    check_choice("clip_to", clip_to, ("reciprocal", "mean", "edge"))

    def init(groups, params):
        zeros = [jnp.zeros(len(groups.names), jnp.float32) for _ in range(2)]
        return ZClipState(jnp.zeros([], jnp.int32), *zeros)

    def update(norm, state, **_):
        count, mean, std = state
        warming = is_before(count, warmup_steps)
        margin = multiple(z_threshold, jnp.maximum(std, 1e-6 * mean))
        edge = 2 * jnp.minimum(mean / 2 + margin / 2, LARGEST / 2)
        spike = (norm > edge) & ~warming
        if clip_to == "reciprocal":
            share = jnp.where(spike, margin, 0) / jnp.where(spike, norm - mean, 1)
            after = (mean + margin * share) * clip_factor
        else:
            after = mean if clip_to == "mean" else edge
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
        return limit, ZClipState(increment(count), *learned)

    return clip_by_norm(
        Threshold(init, update),
        groups=groups,
        ord=ord,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )
