"""What a response is, and those that were published as weights of examples."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipfx._checks import helpful
from clipfx._tree import divide

Response = Callable[[jax.Array, jax.Array], jax.Array]


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
