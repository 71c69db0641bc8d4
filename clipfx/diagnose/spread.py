"""How far gradients stray: from what Adam is used to, and from one another."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx._core import second_moments
from clipfx._core.checks import check_number, helpful
from clipfx._core.export import exportable
from clipfx._core.groups import Groups, group_leaves
from clipfx._core.matching import places, take
from clipfx._core.norms import Norms, group_norms, group_sizes, measure_together
from clipfx._core.safe_sums import reciprocal_power_of_two
from clipfx._types import AxisName, GroupSpec, Scalar, Tree
from clipfx.diagnose.layers import check_some, names_of, plain


@exportable("clipfx.MomentLag")
class MomentLag(NamedTuple):
    r"""Gradients against Adam's second moment, without and with a clip.

    Attributes:
      raw: `[G]`, R of the gradient as it came, had it entered the moment so.
      clipped: `[G]`, R of the clipped gradient, had that entered.
      raw_moment: `[G]`, the root of the mean of :math:`\hat v` after the first.
      clipped_moment: `[G]`, after the second.
      groups: The names of the groups, the keys of a dict of nothing.

    Reference: none.
    """

    raw: jax.Array
    clipped: jax.Array
    raw_moment: jax.Array
    clipped_moment: jax.Array
    groups: dict[str, tuple[()]]


@exportable("clipfx.NoiseScale")
class NoiseScale(NamedTuple):
    r"""The noise of a gradient from batch to batch.

    Attributes:
      scale: `[G]`, :math:`B_{\text{simple}}`, in examples.
      noise: `[G]`, an unbiased estimate of :math:`\operatorname{tr} \Sigma`, the
        variance of one example's gradient, summed over its elements.
      signal: `[G]`, an unbiased estimate of :math:`\lVert G \rVert^2`, of the true
        mean; may be negative.
      groups: The names of the groups, the keys of a dict of nothing.

    Reference: none.
    """

    scale: jax.Array
    noise: jax.Array
    signal: jax.Array
    groups: dict[str, tuple[()]]


@helpful
def second_moment_lag(
    raw: Tree,
    clipped: Tree,
    opt_state: Any,
    *,
    b2: Scalar,
    eps: Scalar = 1e-8,
    groups: GroupSpec = "leaf",
    axis_name: AxisName | None = None,
) -> MomentLag:
    r"""Measures a gradient against Adam's second moment, without and with a clip.

    With :math:`\hat v(g)` the second moment once g has entered that of `opt_state`,
    corrected for its start at zero, and :math:`d_k` elements in group k,

    .. math:: R_k(g) = \sqrt{\frac{1}{d_k} \sum_{i \in k}
        \frac{g_i^2}{\max(\hat v_i(g), \epsilon^2)}}, \qquad
        m_k(g) = \sqrt{\frac{1}{d_k} \sum_{i \in k} \hat v_i(g)} .

    R is near 1 where gradients are as usual. Above it the moment lags behind, which
    precedes spikes of the loss; it is what `clipfx.clip_update_rms` bounds. Where m
    with the clip is much below that without, clips make Adam's steps longer.

    Args:
      raw: The gradient before the clip, leaves `[...]`.
      clipped: The same behind it, as it goes to Adam.
      opt_state: The state of the optimizer before the step, which has Adam's second
        moment `nu` somewhere. That of an `optax.scale_by_adam` which is given raw
        gradients tells what clips did over the whole run.
      b2: Of that Adam, in [0, 1).
      eps: :math:`\epsilon` > 0, in units of the gradient.
      groups: See `clipfx.clip_by_norm`; leaves without a moment do not count. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.

    Returns:
      `MomentLag`, `[G]` each, float32, or float64 if a leaf is. R has no unit; m has
      that of the gradient. No square of a gradient is taken.

    Raises:
      TypeError: If a number is of the wrong kind, or no second moment is found.
      ValueError: If a number is out of range, there is no leaf of floating dtype with a
        moment, two moments of one, or none in `clipped` for one.

    Example:
      >>> adam = optax.scale_by_adam(b2=0.99)
      >>> state = adam.init({"w": jnp.ones(2)})
      >>> _, state = adam.update({"w": jnp.ones(2)}, state)
      >>> spike, cut = {"w": jnp.full(2, 100.0)}, {"w": jnp.full(2, 1.0)}
      >>> lag = second_moment_lag(spike, cut, state, b2=0.99)
      >>> [f"{x.item():.3f}" for x in (lag.raw, lag.clipped, lag.raw_moment)]
      ['1.411', '1.000', '70.892']

    Reference: Wortsman et al., `Stable and low-precision training for large-scale
    vision-language models <https://arxiv.org/abs/2304.13013>`_, 2023, for R.
    """
    check_number("b2", b2, "[0, 1)", "pass the b2 of the optimizer")
    check_number("eps", eps, "(0, inf)", "1e-8 is Adam's own")
    advice = "pass that of an optimizer with Adam in it, before the step"
    moments = second_moments.find(opt_state, raw, "opt_state", advice)
    members = second_moments.members(groups, raw, moments)
    check_some("raw", members)
    found = places(clipped, raw, members, "clipped")
    sides = jax.tree.leaves(raw), take(clipped, found, raw)
    counted = [k for k, i in enumerate(members.index) if i is not None]
    members = Groups(members.names, tuple(members.index[k] for k in counted))
    trees: list[list[jax.Array]] = []
    for side in sides:
        pairs = [(jnp.asarray(side[k]), moments[k]) for k in counted]
        usual = [second_moments.root(m, b2, x) for x, m in pairs if m is not None]
        sizes = zip(pairs, usual, strict=True)
        trees.append([second_moments.relative(x, u, eps) for (x, _), u in sizes])
        trees.append(usual)
    norms = measure_together(trees, members, axis_name)
    root = jnp.sqrt(group_sizes(trees[0], members, axis_name))
    means = [plain(Norms(n.value / root.astype(n.value.dtype), n.scale)) for n in norms]
    lag, moment, clipped_lag, clipped_moment = means
    return MomentLag(lag, clipped_lag, moment, clipped_moment, names_of(members))


@helpful
def noise_scale(
    norms: jax.Array,
    mean: Tree,
    *,
    where: jax.Array | None = None,
    groups: GroupSpec = "global",
    axis_name: AxisName | None = None,
) -> NoiseScale:
    r"""Estimates the simple noise scale from the norms of examples and of their mean.

    With norms :math:`n_b` of the gradients of B examples and :math:`\bar g` their mean,

    .. math:: S = \frac{B}{B - 1} \Bigl(\frac{1}{B} \sum_b n_b^2 - \lVert \bar g
        \rVert^2\Bigr), \qquad s = \lVert \bar g \rVert^2 - \frac{S}{B}, \qquad
        B_{\text{simple}} = \frac{S}{s}

    of which S estimates :math:`\operatorname{tr} \Sigma` and s :math:`\lVert G
    \rVert^2` without bias. Batches far below it are mostly noise; far above it more
    examples buy little. The quotient is biased, and noisy where s is: average `noise`
    and `signal` over steps, each by itself, and divide then.

    Args:
      norms: `[B]` or `[B, G]`, B >= 2: Euclidean norms of the gradient of each example,
        `norm` of `clipfx.per_example.norms`, before any clip.
      mean: The mean gradient of these examples, leaves `[...]`, as `jax.grad` of the
        mean loss or `per_example.clipped_grad(loss, jnp.inf, reduce="mean")` give it.
      where: bool `[B]`, False for padding, which the mean is not over. None for none.
      groups: Those of the norms. See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`; axes that leaves of the mean are split over.
        Static.

    Returns:
      `NoiseScale`, `[G]` each, float32, or float64 if a leaf is; `noise` and `signal`
      in squares of the gradient's unit, infinite beyond the largest number, where the
      scale is still right. It is infinite where s is not positive. NaN where fewer than
      two examples are no padding. A noise below zero by more than rounding says that
      `mean` is not the mean of these examples.

    Raises:
      ValueError: If the shapes of `norms` or `where` do not fit, or there is no leaf of
        floating dtype.

    Example:
      >>> grads = jnp.array([[2.0, 1.0], [2.0, -1.0], [2.0, 1.0], [2.0, -1.0]])
      >>> found = noise_scale(jnp.linalg.norm(grads, axis=1), {"w": grads.mean(0)})
      >>> [f"{x.item():.3f}" for x in (found.noise, found.signal, found.scale)]
      ['1.333', '3.667', '0.364']

    Reference: McCandlish et al., `An empirical model of large-batch training
    <https://arxiv.org/abs/1812.06162>`_, 2018, appendix A, with a small batch of 1.
    """
    members = group_leaves(groups, mean)
    check_some("mean", members)
    norms, number = jnp.asarray(norms), len(members.names)
    rows = norms[:, None] if norms.ndim == 1 else norms
    if rows.ndim != 2 or rows.shape[0] < 2 or rows.shape[1] != number:
        raise ValueError(
            f"norms must have shape [B, {number}] with B >= 2, got {norms.shape}; pass "
            "the norms of examples by the same groups."
        )
    keep = jnp.ones(len(rows), bool) if where is None else jnp.asarray(where)
    if keep.shape != rows.shape[:1]:
        raise ValueError(
            f"where must have shape {rows.shape[:1]}, got {keep.shape}; pass one bool "
            "for each example."
        )
    whole = group_norms(mean, members, axis_name=axis_name)
    dtype = jnp.promote_types(whole.value.dtype, jnp.result_type(rows))
    rows = jnp.where(keep[:, None], rows.astype(dtype), 0)
    # In units of the longest: squares of norms overflow.
    unit = reciprocal_power_of_two(jnp.max(rows, axis=0))
    size = jnp.sum(keep).astype(dtype)
    rest = whole.value.astype(dtype) * (unit / whole.scale.astype(dtype))
    square, of_mean = jnp.sum((rows * unit[None]) ** 2, axis=0) / size, rest**2
    noise = (square - of_mean) * (size / (size - 1))
    signal = of_mean - noise / size
    some = jnp.where(signal > 0, signal, 1)
    scale = jnp.where(signal <= 0, jnp.inf, noise / some)
    scale = jnp.where(jnp.isnan(signal), jnp.nan, scale)
    back = 1 / unit
    return NoiseScale(
        scale,
        noise * back * back,
        signal * back * back,
        names_of(members),
    )
