r"""What to do about a norm: pure functions from a norm to the norm it becomes.

A response maps a norm :math:`n \ge 0` and a threshold :math:`c > 0` to
:math:`\psi_c(n)`, the norm that the group is given. The same functions shape single
elements, :math:`\operatorname{sign}(x)\,\psi_c(|x|)`, in `clipfx.clip_by_value`.

=============== ===================================== ============ ==================
response        :math:`\psi_c(n)`                     largest      monotone, smooth
=============== ===================================== ============ ==================
`hard`          :math:`\min(n, c)`                    c            weakly, C0
`tanh`          :math:`c \tanh(n/c)`                  c            yes, C-infinity
`softsign`      :math:`cn/(c + n)`                    c            yes, C1
`pseudo_huber`  :math:`n/\sqrt{1 + (n/c)^2}`          c            yes, C-infinity
`arctan`        :math:`(2c/\pi)\arctan(\pi n/(2c))`   c            yes, C-infinity
`log`           :math:`c \log(1 + n/c)`               unbounded    yes, C1
`power(a)`      :math:`c\,(n/c)^a`                    unbounded    yes, C0 at 0
`normalize`     :math:`c`                             c            jumps at 0
`reject`        :math:`n` if :math:`n \le c`, else 0  c            no, jumps at c
`band(low)`     :math:`\min(\max(n, low\,c), c)`      c            weakly, jumps at 0
`auto_s(g)`     :math:`cn/(n + g)`                    c            yes, C1
`psac(r)`       :math:`cn/(n + r/(n + r))`            c            yes, C1
=============== ===================================== ============ ==================

"Smooth" is that of the odd extension to negative arguments. All but `power` and the
three that jump have slope 1 at 0, so small norms pass nearly unchanged, and for those
the map on vectors is non-expansive in the 2-norm.

Every response broadcasts `norm` and `threshold` (floating arrays of one dtype, `[G]`
or any shape), gives 0 at norm 0 and at threshold 0, is the identity at threshold
infinity, stays finite and exact to rounding over the whole range of the dtype, and
has finite derivatives everywhere. Anything else with that signature is a response too:

>>> import clipfx, jax.numpy as jnp
>>> redescending = lambda norm, threshold: norm / (1 + (norm / threshold) ** 2)
>>> tx = clipfx.clip_by_norm(1.0, response=redescending)
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipfx._core.checks import helpful
from clipfx._core.leaves import divide
from clipfx._types import Response


def bounded(response: Any) -> Response:
    """Says that no value exceeds the threshold, which then is a sensitivity."""
    response.bounded = True
    return response


@helpful
def auto_s(stability: float = 0.01) -> Response:
    r"""Makes the response :math:`c\,n/(n + \gamma)`, automatic clipping.

    Nearly `normalize` for norms well above gamma, but small ones keep their order. With
    threshold 1 it is also NSGD, :math:`n/(n + r)`. The threshold only scales the
    result: leave it at 1 and set the learning rate.

    Args:
      stability: :math:`\gamma > 0`, in the units of a norm, a Python number.

    Returns:
      A response.

    Raises:
      ValueError: If `stability` is not a finite number > 0.

    Example:
      >>> shaped = auto_s(0.01)(jnp.array([0.0, 0.01, 5.0]), jnp.array(1.0))
      >>> [f"{x:.3f}" for x in shaped]
      ['0.000', '0.500', '0.998']

    Reference: Bu et al., `Automatic clipping <https://arxiv.org/abs/2206.07136>`_,
    2023, AUTO-S (AUTO-V is `normalize`); Yang et al., `Normalized/clipped SGD with
    perturbation <https://arxiv.org/abs/2206.13033>`_, 2022, NSGD.
    """
    _check_positive("stability", stability, "0.01 is usual")

    def respond(norm: jax.Array, threshold: jax.Array) -> jax.Array:
        usable = threshold < jnp.inf
        limit = jnp.where(usable, threshold, 1)
        return jnp.where(usable, limit * _share(norm, stability, stability), norm)

    return bounded(respond)


@helpful
def psac(stability: float = 0.1) -> Response:
    r"""Makes the response :math:`c\,n / (n + r/(n + r))` of DP-PSAC.

    Like `auto_s` for large norms, but the factor of a vanishing gradient is c, not
    :math:`c/\gamma`: tiny gradients are not blown up. The factor is largest, at
    :math:`c/(2\sqrt{r} - r)`, for a norm of :math:`\sqrt{r} - r`.

    Args:
      stability: r > 0, a Python number.

    Returns:
      A response.

    Raises:
      ValueError: If `stability` is not a finite number > 0.

    Example:
      >>> shaped = psac(0.1)(jnp.array([0.001, 0.216, 5.0]), jnp.array(1.0))
      >>> [f"{x:.3f}" for x in shaped]
      ['0.001', '0.406', '0.996']

    Reference: Xia et al., `Differentially private learning with per-sample adaptive
    clipping <https://arxiv.org/abs/2212.00328>`_, 2023.
    """
    _check_positive("stability", stability, "0.1 and 0.01 are usual")

    def respond(norm: jax.Array, threshold: jax.Array) -> jax.Array:
        usable = threshold < jnp.inf
        limit = jnp.where(usable, threshold, 1)
        rest = stability / (norm + stability)
        return jnp.where(usable, limit * _share(norm, rest, 1.0), norm)

    return bounded(respond)


def _share(norm: jax.Array, rest: Any, far: float) -> jax.Array:
    """The share n / (n + rest), for norms beyond `far` without their sum."""
    large = 1 / (1 + divide(rest, jnp.where(norm > 0, norm, 1)))
    return jnp.where(norm > far, large, norm / (norm + rest))


def _check_positive(name: str, value: float, usual: str) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}; {usual}.")


__all__ = [
    "Response",
    "arctan",
    "auto_s",
    "band",
    "hard",
    "log",
    "normalize",
    "power",
    "psac",
    "pseudo_huber",
    "reject",
    "softsign",
    "tanh",
]


@bounded
def hard(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    r"""Cuts off at the threshold, :math:`\min(n, c)`.

    Args:
      norm: `[G]` or any shape, >= 0.
      threshold: Broadcasts against `norm`, >= 0.

    Returns:
      The norm that the group is given, of the broadcast shape.

    Example:
      >>> hard(jnp.array([0.5, 5.0]), jnp.array(1.0))
      Array([0.5, 1. ], dtype=float32)

    Reference: Pascanu et al., `On the difficulty of training recurrent neural networks
    <https://arxiv.org/abs/1211.5063>`_, 2013.
    """
    return jnp.minimum(norm, threshold)


@bounded
def softsign(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    r"""Saturates slowly, :math:`cn/(c + n)`; at 50 c it gives 0.98 c.

    Equal to :math:`g/(L_0 + L_1 \lVert g \rVert)` up to a learning rate, with
    :math:`c = L_0/L_1`.

    Args:
      norm: `[G]` or any shape, >= 0.
      threshold: Broadcasts against `norm`, >= 0.

    Returns:
      The norm that the group is given, of the broadcast shape.

    Example:
      >>> shaped = softsign(jnp.array([0.5, 5.0]), jnp.array(1.0))
      >>> [f"{x:.2f}" for x in shaped]
      ['0.33', '0.83']

    Reference: Zhang et al., `Why gradient clipping accelerates training
    <https://arxiv.org/abs/1905.11881>`_, 2020.
    """
    low, ratio = _low_and_ratio(norm, threshold)
    return low / (1 + ratio)


@bounded
def pseudo_huber(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    r"""The derivative of the pseudo-Huber loss, :math:`n/\sqrt{1 + (n/c)^2}`.

    Args:
      norm: `[G]` or any shape, >= 0.
      threshold: Broadcasts against `norm`, >= 0.

    Returns:
      The norm that the group is given, of the broadcast shape.

    Example:
      >>> shaped = pseudo_huber(jnp.array([0.5, 5.0]), jnp.array(1.0))
      >>> [f"{x:.2f}" for x in shaped]
      ['0.45', '0.98']

    Reference: Charbonnier et al., `Deterministic edge-preserving regularization in
    computed imaging <https://doi.org/10.1109/83.551699>`_, 1997.
    """
    low, ratio = _low_and_ratio(norm, threshold)
    return low / jnp.sqrt(1 + ratio * ratio)


@bounded
def tanh(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    r"""Saturates fast, :math:`c \tanh(n/c)`.

    Args:
      norm: `[G]` or any shape, >= 0.
      threshold: Broadcasts against `norm`, >= 0.

    Returns:
      The norm that the group is given, of the broadcast shape.

    Example:
      >>> shaped = tanh(jnp.array([0.5, 5.0]), jnp.array(1.0))
      >>> [f"{x:.2f}" for x in shaped]
      ['0.46', '1.00']

    Reference: used for private training in `SoftAdaClip
    <https://arxiv.org/abs/2510.01447>`_, 2025.
    """
    return _curve(lambda r, c: jnp.tanh(r), norm, threshold)


@bounded
def arctan(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    r"""Saturates slowly, :math:`(2c/\pi)\arctan(\pi n/(2c))`.

    Args:
      norm: `[G]` or any shape, >= 0.
      threshold: Broadcasts against `norm`, >= 0.

    Returns:
      The norm that the group is given, of the broadcast shape.

    Example:
      >>> shaped = arctan(jnp.array([0.5, 5.0]), jnp.array(1.0))
      >>> [f"{x:.2f}" for x in shaped]
      ['0.42', '0.92']

    Reference: none; a standard sigmoid scaled to slope 1 and bound c.
    """
    half_pi = math.pi / 2
    return _curve(lambda r, c: jnp.arctan(half_pi * r) / half_pi, norm, threshold)


def log(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    r"""Compresses without a bound, :math:`c \log(1 + n/c)`.

    Args:
      norm: `[G]` or any shape, >= 0.
      threshold: Broadcasts against `norm`, >= 0.

    Returns:
      The norm that the group is given, of the broadcast shape.

    Example:
      >>> shaped = log(jnp.array([0.5, 5.0]), jnp.array(1.0))
      >>> [f"{x:.2f}" for x in shaped]
      ['0.41', '1.79']

    Reference: none; the logarithm with slope 1 at 0.
    """

    def curve(ratio, limit):
        finite = ratio < _far(ratio) / 2
        beyond = jnp.log(jnp.where(finite, 1, norm)) - jnp.log(limit)
        return jnp.where(finite, jnp.log1p(jnp.where(finite, ratio, 1)), beyond)

    return _curve(curve, norm, threshold)


@helpful
def power(exponent: float) -> Response:
    r"""Makes the response :math:`c\,(n/c)^a`, which leaves a norm of c alone.

    With a < 1 larger norms shrink and smaller ones grow; a > 1 does the opposite, and
    a = 0 is `normalize`.

    Args:
      exponent: a >= 0, a Python number.

    Returns:
      A response.

    Raises:
      ValueError: If the exponent is negative or not finite.

    Example:
      >>> power(0.5)(jnp.array([0.25, 4.0]), jnp.array(1.0))
      Array([0.5, 2. ], dtype=float32)

    Reference: the norm form of `SPAMP <https://arxiv.org/abs/2510.01578>`_, 2025.
    """
    if not 0 <= exponent < math.inf:
        raise ValueError(
            f"exponent must be a finite number >= 0, got {exponent!r}; 0.5 takes the "
            "square root of a norm measured in thresholds."
        )

    def respond(norm: jax.Array, threshold: jax.Array) -> jax.Array:
        # c^(1-a) n^a, from logarithms: n/c itself may leave the range.
        usable = (norm > 0) & (threshold > 0) & (threshold < jnp.inf)
        log_norm = jnp.log(jnp.where(usable, norm, 1))
        log_limit = jnp.log(jnp.where(usable, threshold, 1))
        shaped = jnp.exp(log_limit + exponent * (log_norm - log_limit))
        return jnp.where(
            usable, shaped, jnp.where(threshold > 0, norm, jnp.zeros_like(norm))
        )

    return respond


@bounded
def normalize(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    r"""Gives every norm but 0 the length of the threshold, :math:`c`.

    Args:
      norm: `[G]` or any shape, >= 0.
      threshold: Broadcasts against `norm`, >= 0.

    Returns:
      The norm that the group is given, of the broadcast shape.

    Example:
      >>> normalize(jnp.array([0.0, 0.5, 5.0]), jnp.array(1.0))
      Array([0., 1., 1.], dtype=float32)

    Reference: Cutkosky and Mehta, `Momentum improves normalized SGD
    <https://arxiv.org/abs/2002.03305>`_, 2020.
    """
    return jnp.where((norm > 0) & (threshold < jnp.inf), threshold, norm)


@bounded
def reject(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    r"""Drops what exceeds the threshold: :math:`n` if :math:`n \le c`, else 0.

    Args:
      norm: `[G]` or any shape, >= 0.
      threshold: Broadcasts against `norm`, >= 0.

    Returns:
      The norm that the group is given, of the broadcast shape.

    Example:
      >>> reject(jnp.array([0.5, 5.0]), jnp.array(1.0))
      Array([0.5, 0. ], dtype=float32)

    Reference: skipping of spikes, as in `PaLM <https://arxiv.org/abs/2204.02311>`_,
    2022, without rewinding.
    """
    return jnp.where(norm > threshold, jnp.zeros_like(norm), norm)


@helpful
def band(low: float) -> Response:
    r"""Makes the response :math:`\min(\max(n, low\,c), c)`, which also lifts.

    A norm of 0 stays 0: there is no direction to lift it along.

    Args:
      low: The lower edge as a fraction of the threshold, in [0, 1].

    Returns:
      A response.

    Raises:
      ValueError: If `low` is outside [0, 1].

    Example:
      >>> band(0.5)(jnp.array([0.0, 0.1, 0.7, 5.0]), jnp.array(1.0))
      Array([0. , 0.5, 0.7, 1. ], dtype=float32)

    Reference: the two-sided interval of `AGGC <https://arxiv.org/abs/2601.11864>`_,
    2026.
    """
    if not 0 <= low <= 1:
        raise ValueError(
            f"low must be a fraction of the threshold in [0, 1], got {low!r}; 0 never "
            "lifts a norm."
        )

    def respond(norm: jax.Array, threshold: jax.Array) -> jax.Array:
        usable = (norm > 0) & (threshold < jnp.inf)
        limit = jnp.where(usable, threshold, 1)
        return jnp.where(usable, jnp.clip(norm, low * limit, limit), norm)

    return bounded(respond)


def check_response(response: Any) -> Response:
    """Returns the response, `hard` for None, or says what it has to be."""
    if response is None:
        return hard
    wrong = "response must be a function from norms and thresholds to norms, got"
    if not callable(response):
        raise TypeError(f"{wrong} {response!r}; clipfx.responses has them.")
    try:
        inspect.signature(response).bind(0.0, 1.0)
    except TypeError:
        name = getattr(response, "__name__", repr(response))
        raise TypeError(
            f"{wrong} {name}{inspect.signature(response)}, which does not take these "
            f"two; if it makes a response, call it: response={name}()."
        ) from None
    except ValueError:  # nobody knows
        pass
    return response


def _low_and_ratio(norm: jax.Array, threshold: jax.Array) -> tuple:
    """The smaller of both and its ratio to the larger: nothing here can overflow."""
    low, high = jnp.minimum(norm, threshold), jnp.maximum(norm, threshold)
    usable = (high > 0) & (high < jnp.inf)
    return low, jnp.where(usable, divide(low, jnp.where(usable, high, 1)), 0)


def _far(x: jax.Array) -> float:
    """A quarter of the largest number."""
    return float(jnp.finfo(x.dtype).max) / 4


def _curve(curve: Callable, norm: jax.Array, threshold: jax.Array) -> jax.Array:
    """`c * curve(n / c)` for a curve of slope 1 at 0."""
    usable = (threshold > 0) & (threshold < jnp.inf)
    limit = jnp.where(usable, threshold, 1)
    # No more than is far beyond any bend: what is infinite stops `jax_debug_infs`.
    ratio = divide(jnp.minimum(norm, _far(norm) * jnp.minimum(limit, 4)), limit)
    # Where the ratio is nothing beside 1 the curve is straight, and may underflow.
    shaped = jnp.where(ratio > 2.0**-30, limit * curve(ratio, limit), norm)
    return jnp.where(
        usable, shaped, jnp.where(threshold > 0, norm, jnp.zeros_like(norm))
    )
