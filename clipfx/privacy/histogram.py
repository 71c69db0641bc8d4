"""A threshold from a noised histogram of norms."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipfx._core.checks import check_number, helpful, is_known, is_number
from clipfx._types import Limit
from clipfx.per_example.engine.thresholds import check_limit
from clipfx.privacy.thresholds import PrivateThreshold, check_stddev, plain


@helpful
def histogram_threshold(
    max_norm: Limit,
    *,
    edges: Sequence[float] | np.ndarray,
    count_stddev: float,
    quantile: float | None = None,
    decay: float = 0.9,
) -> PrivateThreshold:
    r"""Chooses thresholds from a noised histogram of the norms, DC-SGD.

    Norms are rounded up to the next of K edges :math:`e_j`, those above the last down
    to it. Of the examples of a batch :math:`h_j` are at edge j; with noise they are
    released:

    .. math::
        \tilde h &= h + \mathcal N(0, \sigma_b^2) \\
        H &\leftarrow \beta H + (1 - \beta)\, \tilde h \\
        p_j &= \max(H_j, 0) / \textstyle\sum_k \max(H_k, 0)

    The next threshold is the edge with the least expected squared error of the mean,
    that of its noise and a bound on that of clipping,

    .. math::
        C = \arg\min_{e_i}\ \frac{z_\Delta^2 d}{m^2}\, e_i^2
            + \sum_j p_j \max(e_j - e_i, 0)^2

    for d parameters and the expected batch size m (DC-SGD-E), or with `quantile=` the
    least edge up to which there is a share of at least :math:`\gamma` (DC-SGD-P).
    Where :math:`d / m^2` is large, that with the least error is the first edge. With
    several groups :math:`p_j` and C are those of each, and the error of the noise is
    that of `allocation`.

    One example moves one count of each group by 1, so
    :math:`z_\Delta = (z^{-2} - G \sigma_b^{-2})^{-1/2}` with G groups; each has its
    own threshold. All that is computed from noised counts is free.

    Args:
      max_norm: C of the first step: a number >= 0, `[G]`, or a dict by group name. C
        stays what it is while no averaged count is above 0.
      edges: Increasing, finite, > 0, `[K]`, the same for all groups; public, so not
        chosen by looking at norms. `np.geomspace(0.01, 100, 41)` has ten in each
        factor of 10, and is as fine for small norms as for large ones; many more make
        counts small beside their noise. Static.
      count_stddev: :math:`\sigma_b > 0`. Five times the noise multiplier makes the
        gradient's noise 2% larger, with one group.
      quantile: :math:`\gamma` in [0, 1], the share of examples that are not clipped;
        None for the least error.
      decay: :math:`\beta` in [0, 1) of the average over steps. Without it, at 0, noise
        in empty bins of large norms raises the threshold.

    Returns:
      A rule for `dp_grad(max_norm=...)`. Its state is the next C `[G]` and H `[G, K]`.

    Raises:
      TypeError: If an argument is no number, or `edges` no static array of numbers.
      ValueError: If an argument is out of range.

    Example:
      >>> rule = histogram_threshold(
      ...     1.0, edges=np.geomspace(0.01, 100, 41), count_stddev=5.0)

    Differs from the source: averages over steps, which costs nothing; `decay=0` does
    not. The error of clipping is that of the noised histogram: of the norms themselves
    it would not be private.

    Reference: Wei et al., `DC-SGD: Differentially private SGD with dynamic clipping
    through gradient norm distribution estimation <https://arxiv.org/abs/2503.22988>`_,
    2025.
    """
    check_limit(max_norm)
    at = _check_edges(edges)
    check_stddev(count_stddev)
    if quantile is not None:
        check_number("quantile", quantile, "[0, 1]", "None minimises the error")
    check_number("decay", decay, "[0, 1)", "0.9 averages ten steps")
    share_below = None if quantile is None else plain(quantile)
    decay = plain(decay)
    count = len(at)
    lower = np.asarray([-1.0, *at[:-1]], np.float32)[None, None]
    upper = np.asarray([*at[:-1], math.inf], np.float32)[None, None]
    # In units of the last edge, so that no square leaves float32.
    unit = at.astype(np.float64) / float(at[-1])
    square = np.asarray(unit**2, np.float32)[None]
    excess = np.maximum(unit[None] - unit[:, None], 0) ** 2
    table = excess if quantile is None else np.tri(count)
    table = np.asarray(table, np.float32)[None]

    def ask(state: Any, norm: jax.Array, member: Any) -> jax.Array:
        inside = (norm[..., None] > lower) & (norm[..., None] <= upper)
        return inside.astype(jnp.float32).reshape(len(norm), norm.shape[1] * count)

    def update(state: Any, counts: jax.Array, size: float, noise: jax.Array) -> Any:
        limit, average = state
        average = decay * average + (1 - decay) * counts.reshape(average.shape)
        known = jnp.maximum(average, 0)
        total = known.sum(1, keepdims=True)
        share = known / jnp.where(total > 0, total, 1)
        sums = (table * share[:, None]).sum(-1)
        if share_below is None:
            place = (noise[:, None] * square + sums).argmin(1)
        else:
            place = jnp.minimum((sums < share_below).sum(1), count - 1)
        return jnp.where(total[:, 0] > 0, jnp.asarray(at)[place], limit), average

    return PrivateThreshold(
        max_norm,
        init=lambda start: (start, jnp.zeros((*start.shape, count), start.dtype)),
        ask=ask,
        limit=lambda start, state, counts: state[0][None],
        update=update,
        reach=lambda groups: math.sqrt(groups),
        count_stddev=float(count_stddev),
    )


def _check_edges(edges: Any) -> np.ndarray:
    """Edges as float32, in which they are compared."""
    wrong = (
        "edges must be static, increasing, finite numbers above 0 in float32, got "
        f"{' '.join(repr(edges).split())}; np.geomspace(0.01, 100, 41) has ten in each "
        "factor of 10."
    )
    known = [*edges] if np.iterable(edges) else [None]
    if not all(is_number(x) and is_known(x) and not np.ndim(x) for x in known):
        raise TypeError(wrong)
    with np.errstate(over="ignore"):
        found = np.asarray(known, np.float32)
    steps = np.diff(found, prepend=np.float32(0))
    if not found.size or not (steps > 0).all() or not np.isfinite(found).all():
        raise ValueError(wrong)
    return found
