r"""Thresholds that set themselves from noised counts.

Every rule asks each example a few questions about its norm, adds the answers up, adds
Gaussian noise of standard deviation :math:`\sigma_b`, and computes thresholds from the
result. What one example can change an answer vector by, in the 2-norm, is s. A step
that releases both counts and gradient costs exactly as much as one Gaussian release of
multiplier z if the gradient gets

.. math:: z_\Delta = \bigl(z^{-2} - (s / \sigma_b)^2\bigr)^{-1/2} .
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipfx._core.checks import check_count, check_number, helpful, is_known, is_number
from clipfx._types import Limit
from clipfx.per_example.engine.thresholds import check_limit
from clipfx.responses import Response, bounded

LEAST = 2.0**-100  # Of thresholds: noise of their size is far from leaving float32.


class PrivateThreshold(NamedTuple):
    r"""A rule from noised counts to thresholds, for `clipfx.privacy.dp_grad`.

    Attributes:
      max_norm: Where it starts: a number, `[G]`, or a dict by group name.
      init: `init(max_norm) -> state`, from `[G]` to a tree of arrays.
      ask: `ask(state, norm, member) -> answers`, from norms `[B, G]` and `[B, P]`, 1
        where an example belongs to a population, or None, to `[B, Q]`. Answers of
        padding and of examples that are not finite are not counted.
      limit: `limit(start, state, counts) -> thresholds`, from `max_norm` `[G]` and
        noised sums `[Q]`, of this batch with `at_once`, else of the last one, to
        `[P, G]`, P populations or 1.
      update: `update(state, counts, size, noise) -> state`, with the expected batch
        size, and `[G]`: the expected squared 2-norm of the Gaussian noise on the mean
        is `(noise * thresholds**2).sum()`. Shapes and dtypes stay those of `init`;
        norms, thresholds and counts are float32.
      reach: s from G: how far one example moves the sums, in the 2-norm.
      count_stddev: :math:`\sigma_b`.
      response: `response(state) -> response`, with an attribute `bounded = True`; None
        for that of `dp_grad`.
      num_populations: P, None if populations play no part.
      at_once: Whether thresholds depend on the counts of the same batch.

    Reference: none; the shape is that of `clipfx.thresholds.Threshold`.
    """

    max_norm: Any
    init: Callable[[jax.Array], Any]
    ask: Callable[[Any, jax.Array, Any], jax.Array]
    limit: Callable[[jax.Array, Any, jax.Array], jax.Array]
    update: Callable[[Any, jax.Array, float, jax.Array], Any]
    reach: Callable[[int], float]
    count_stddev: float
    response: Callable[[Any], Response] | None = None
    num_populations: int | None = None
    at_once: bool = False


def fixed(max_norm: Limit) -> PrivateThreshold:
    """A rule that counts nothing."""
    return PrivateThreshold(
        max_norm,
        init=lambda start: (),
        ask=lambda state, norm, member: norm[:, :0],
        limit=lambda start, state, counts: start[None],
        update=lambda state, counts, size, noise: state,
        reach=lambda groups: 0.0,
        count_stddev=0.0,
    )


@helpful
def quantile(
    max_norm: Limit,
    *,
    count_stddev: float,
    quantile: float = 0.5,
    step_size: float = 0.2,
    min_norm: float = 0.0,
) -> PrivateThreshold:
    r"""Follows a quantile of the norms, privately.

    With :math:`b_i = 1` where :math:`n_i \le C_t`, m the expected batch size,

    .. math::
        \tilde b &= \frac1m \Bigl(\sum_i (b_i - \tfrac12)
            + \mathcal N(0, \sigma_b^2)\Bigr) + \tfrac12 \\
        C_{t+1} &= \max\bigl(C_{\min},\ C_t\, e^{-\eta (\tilde b - \gamma)}\bigr)

    One example moves the centred count of each group by at most 1/2, so
    :math:`z_\Delta = (z^{-2} - G (2 \sigma_b)^{-2})^{-1/2}` with G groups.

    Args:
      max_norm: :math:`C_0`: a number > 0, `[G]`, or a dict by group name.
      count_stddev: :math:`\sigma_b > 0`; a twentieth of the batch size is usual, and
        with one group the noise multiplier is always enough.
      quantile: :math:`\gamma` in [0, 1], the share of examples below the threshold.
      step_size: :math:`\eta > 0`.
      min_norm: :math:`C_{\min} \ge 0`. Without a bound a majority that fits can draw
        the threshold to 0, and with it what a minority has to say.

    Returns:
      A rule for `dp_grad(max_norm=...)`.

    Raises:
      TypeError: If an argument is no number.
      ValueError: If an argument is out of range.

    Example:
      >>> rule = quantile(1.0, count_stddev=12.8, min_norm=0.1)

    Reference: Andrew et al., `Differentially private learning with adaptive clipping
    <https://arxiv.org/abs/1905.03871>`_, 2021; `Bounded adaptive clipping
    <https://arxiv.org/abs/2506.01396>`_, 2025.
    """
    check_limit(max_norm)
    check_stddev(count_stddev)
    check_number("quantile", quantile, "[0, 1]", "0.5 follows the median")
    check_number("step_size", step_size, "(0, inf)", "0.2 is usual")
    check_number("min_norm", min_norm, "[0, inf)", "0 bounds nothing")
    share_below, step_size, min_norm = map(plain, (quantile, step_size, min_norm))

    def update(
        limit: jax.Array, counts: jax.Array, size: float, noise: jax.Array
    ) -> jax.Array:
        share = counts / size + 0.5
        return jnp.maximum(_grown(limit, -step_size * (share - share_below)), min_norm)

    return PrivateThreshold(
        max_norm,
        init=lambda start: start,
        ask=lambda limit, norm, _: jnp.where(norm <= limit[None], 0.5, -0.5),
        limit=lambda start, limit, counts: limit[None],
        update=update,
        reach=lambda groups: math.sqrt(groups) / 2,
        count_stddev=float(count_stddev),
    )


@helpful
def dpsgd_f(
    max_norm: float, num_populations: int, *, count_stddev: float
) -> PrivateThreshold:
    r"""Gives populations with many large gradients a larger threshold, DPSGD-F.

    Of the :math:`b_k` examples of population k in a batch :math:`m_k` have a norm above
    :math:`C_0`; with :math:`b = \sum b_k` and :math:`m = \sum m_k`,

    .. math:: C_k = C_0 \Bigl(1 + \frac{m_k / b_k}{m / b}\Bigr) .

    The numbers above and below, 2K of them, are noised; one example moves one of them
    by 1. Noise on the gradient is that of the largest :math:`C_k`.

    Args:
      max_norm: :math:`C_0 > 0`.
      num_populations: K >= 1. Static.
      count_stddev: :math:`\sigma_b > 0`; 8 to 10 is usual. A population with fewer
        examples in a batch has a count that says nothing.

    Returns:
      A rule for `dp_grad(max_norm=...)`, which then needs `population_ids=` at each
      call.
      In microbatches it takes one more pass, for the counts.

    Raises:
      TypeError: If an argument is no number.
      ValueError: If an argument is out of range.

    Example:
      >>> rule = dpsgd_f(0.5, 2, count_stddev=8.0)

    Differs from the source: counts below zero are zero, a population without examples
    by the noised count has the ratio 1, and with no norm above :math:`C_0` all
    thresholds are :math:`C_0`. The noise scale is that of all populations, not of
    those in the batch, which would tell who is in it.

    Reference: Xu et al., `Removing disparate impact on model accuracy in
    differentially private stochastic gradient descent
    <https://arxiv.org/abs/2003.03699>`_, 2021.
    """
    check_number("max_norm", max_norm, "(0, inf)", "0.5 to 1 is usual")
    count = check_count(
        "num_populations", num_populations, 1, "it is how many there are"
    )
    check_stddev(count_stddev)
    bound = plain(max_norm)

    def ask(_: Any, norm: jax.Array, member: jax.Array) -> jax.Array:
        above = jnp.where(norm > bound, member, 0)
        return jnp.concatenate([above, member - above], axis=1)

    def limit(start: jax.Array, _: Any, counts: jax.Array) -> jax.Array:
        above, below = jnp.maximum(counts, 0).reshape(2, count)
        size, every = above + below, counts.clip(0).sum()
        share = above.sum() / jnp.where(every > 0, every, 1)
        own = above / jnp.where(size > 0, size, 1)
        ratio = jnp.where(size > 0, own / jnp.where(share > 0, share, 1), 1)
        ratio = jnp.where(share > 0, ratio, 0)
        return start[None] * (1 + ratio)[:, None]

    return PrivateThreshold(
        max_norm,
        init=lambda start: (),
        ask=ask,
        limit=limit,
        update=lambda state, counts, size, noise: state,
        reach=lambda groups: 1.0,
        count_stddev=float(count_stddev),
        num_populations=count,
        at_once=True,
    )


@helpful
def dpsgd_global(max_norm: float, upper: float = 100.0) -> PrivateThreshold:
    r"""Scales all norms alike up to a second threshold, drops the rest, DPSGD-Global.

    .. math:: w(n) = C/Z \text{ if } n \le Z, \text{ else } 0

    Directions are kept where clipping would turn the mean towards small gradients. The
    learning rate has to grow by Z/C.

    Args:
      max_norm: C > 0.
      upper: Z > 0, a bound that almost no norm exceeds.

    Returns:
      A rule for `dp_grad(max_norm=...)`. Nothing is counted.

    Raises:
      TypeError: If an argument is no number.
      ValueError: If an argument is out of range.

    Example:
      >>> rule = dpsgd_global(1.0, upper=50.0)

    Reference: Bu et al., `On the convergence and calibration of deep learning with
    differential privacy <https://arxiv.org/abs/2106.07830>`_, 2021.
    """
    _check_upper(max_norm, upper)

    @bounded
    def respond(norm: jax.Array, limit: jax.Array) -> jax.Array:
        most = jnp.asarray(upper, norm.dtype)
        return jnp.where(norm <= most, _share(norm, limit, most), 0)

    return fixed(max_norm)._replace(response=lambda state: respond)


@helpful
def dpsgd_global_adapt(
    max_norm: float,
    upper: float = 50.0,
    *,
    count_stddev: float,
    step_size: float = 0.1,
    tolerance: float = 0.7,
) -> PrivateThreshold:
    r"""Scales all norms alike up to a second threshold that adapts, and clips the rest.

    .. math::
        w(n) &= C/Z \text{ if } n \le Z, \text{ else } \min(1, C/n) \\
        b &= \tfrac1m \bigl(\#\{n_i > \tau Z\} + \mathcal N(0, \sigma_b^2)\bigr) \\
        Z &\leftarrow Z\, e^{b - \eta}

    with m the expected batch size. At rest the share above :math:`\tau Z` is
    :math:`\eta`. One example moves the count of each group by at most 1.

    Args:
      max_norm: C > 0.
      upper: :math:`Z_0 > 0`.
      count_stddev: :math:`\sigma_b > 0`; 10 is usual.
      step_size: :math:`\eta > 0`.
      tolerance: :math:`\tau > 0`.

    Returns:
      A rule for `dp_grad(max_norm=...)`. Its state is Z `[G]`.

    Raises:
      TypeError: If an argument is no number.
      ValueError: If an argument is out of range.

    Example:
      >>> rule = dpsgd_global_adapt(1.0, upper=50.0, count_stddev=10.0)

    Differs from the source: divides by the expected batch size, a public number.

    Reference: Esipova et al., `Disparate impact in differential privacy from gradient
    misalignment <https://arxiv.org/abs/2206.07737>`_, 2023.
    """
    _check_upper(max_norm, upper)
    check_stddev(count_stddev)
    check_number("step_size", step_size, "(0, inf)", "0.1 is usual")
    check_number("tolerance", tolerance, "(0, inf)", "0.7 and 1 are usual")
    first, step_size, tolerance = map(plain, (upper, step_size, tolerance))

    def respond(upper: jax.Array) -> Response:
        @bounded
        def response(norm: jax.Array, limit: jax.Array) -> jax.Array:
            most = upper[None].astype(norm.dtype)
            return jnp.where(
                norm <= most, _share(norm, limit, most), jnp.minimum(norm, limit)
            )

        return response

    return PrivateThreshold(
        max_norm,
        init=lambda start: jnp.full_like(start, first),
        ask=lambda upper, norm, _: jnp.where(norm > tolerance * upper[None], 1.0, 0.0),
        limit=lambda start, upper, counts: start[None],
        update=lambda upper, counts, size, noise: _grown(
            upper, counts / size - step_size
        ),
        reach=lambda groups: math.sqrt(groups),
        count_stddev=float(count_stddev),
        response=respond,
    )


def plain(x: Any) -> Any:
    """A number that changes no dtype."""
    return float(x) if is_known(x) else jnp.asarray(x, jnp.float32)


def _grown(norm: jax.Array, power: jax.Array) -> jax.Array:
    """`norm * exp(power)`, finite, and never so small that it could not grow again."""
    grown = jnp.minimum(norm, 1 / LEAST) * jnp.exp(jnp.clip(power, -15, 15))
    return jnp.clip(grown, LEAST, 1 / LEAST)


def _share(norm: jax.Array, limit: jax.Array, upper: Any) -> jax.Array:
    """At most the limit for norms up to `upper`."""
    return norm / upper * limit


def check_stddev(count_stddev: Any) -> None:
    """Checks the standard deviation of the noise on counts."""
    check_number(
        "count_stddev", count_stddev, "(0, inf)",
        "a twentieth of the batch size is usual", static=True,
    )  # fmt: skip


def _check_upper(max_norm: Any, upper: Any) -> None:
    check_number("max_norm", max_norm, "(0, inf)", "1 is usual")
    check_number("upper", upper, "(0, inf)", "50 to 100 times max_norm is usual")


def check_finite(max_norm: Limit) -> None:
    """Checks that a threshold is finite where noise is."""
    values = max_norm.values() if isinstance(max_norm, Mapping) else [max_norm]
    known = [np.asarray(x, np.float64) for x in values if is_known(x)]
    if not all(np.isfinite(x).all() for x in known):
        raise ValueError(
            f"max_norm must be finite, got {max_norm!r}; noise is as large as what one "
            "example may contribute."
        )


def check_start(max_norm: Limit) -> None:
    """Checks that it is a number or several; what changes with the data pays for it."""
    if isinstance(max_norm, Mapping) or is_number(max_norm):
        return
    learns = isinstance(max_norm, tuple)  # a transform, a threshold
    advice = (
        "clipfx.privacy.quantile(...) adapts it privately"
        if learns or not callable(max_norm)
        else "a function of norms is not private, and a schedule is evaluated by you, "
        "in a dp_grad made inside of the step"
    )
    raise TypeError(
        "max_norm must be a number, an array, a dict by group name or a rule of "
        f"clipfx.privacy, got {max_norm!r}; {advice}."
    )
