r"""Signal-to-noise ratios of diffusion models, and thresholds made of them.

With :math:`x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon`,

.. math:: \mathrm{SNR}(t) = \bar\alpha_t / (1 - \bar\alpha_t) ,
    \qquad \bar\alpha_t = \prod_{s \le t} (1 - \beta_s) .

The first four functions give it for every timestep, float32 `[T]`, t counted from 0.
The other four turn it into a multiple of a threshold. They are plain functions of
arrays, `[]`, `[B]` or `[T]`: for `clipfx.clip_by_snr`, or for thresholds of single
examples.

=============== ========================================= ===========================
rule            multiple                                  meant for
=============== ========================================= ===========================
`inverse`       :math:`1/\mathrm{SNR}`                    a gradient that the loss
                                                          weight SNR multiplies later
`min_snr`       :math:`\min(1, \gamma/\mathrm{SNR})`      the same, left alone where
                                                          the noise is strong
`inverse_sqrt`  :math:`1/\sqrt{\mathrm{SNR}}`             residuals, that is losses
                                                          before the square
`power`         :math:`(\mathrm{SNR}/\mathrm{ref})^{-p}`  in between
=============== ========================================= ===========================
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipfx._core.checks import check_count, check_number, helpful, is_known

__all__ = [
    "cosine",
    "ddpm_linear",
    "from_alpha_bar",
    "from_betas",
    "inverse",
    "inverse_sqrt",
    "min_snr",
    "power",
]


@helpful
def ddpm_linear(num_steps: int = 1000) -> jax.Array:
    r"""Gives the ratio under the linear schedule of DDPM.

    .. math:: \beta_t \text{ from } 10^{-4} s \text{ to } 0.02\, s
        \text{ in equal steps}, \quad s = 1000/T

    Args:
      num_steps: T, the number of timesteps, 20 or more: with fewer a beta exceeds 1.

    Returns:
      float32 `[T]`, falling.

    Raises:
      TypeError: If `num_steps` is no static number.
      ValueError: If it is below 20.

    Example:
      >>> [f"{x:.4g}" for x in ddpm_linear()[jnp.array([0, 258, 999])]]
      ['9999', '1.001', '4.036e-05']

    Reference: Ho et al., `Denoising diffusion probabilistic models
    <https://arxiv.org/abs/2006.11239>`_, 2020; scaled to other T as by Nichol and
    Dhariwal, 2021.
    """
    advice = "1000 is what the paper takes"
    num_steps = check_count("num_steps", num_steps, 20, advice)
    scale = 1000 / num_steps
    return from_betas(np.linspace(1e-4 * scale, 0.02 * scale, num_steps))


@helpful
def cosine(num_steps: int = 1000, *, max_beta: float = 0.999) -> jax.Array:
    r"""Gives the ratio under the cosine schedule.

    .. math:: \beta_t = \min\bigl(1 - f(\tfrac{t+1}{T})/f(\tfrac{t}{T}),\,
        \beta_{\max}\bigr), \quad
        f(u) = \cos^2\Bigl(\frac{u + 0.008}{1.008} \frac{\pi}{2}\Bigr)

    Args:
      num_steps: T, the number of timesteps.
      max_beta: :math:`\beta_{\max}`, which keeps the last ratio above 0.

    Returns:
      float32 `[T]`, falling.

    Raises:
      TypeError: If an argument is no static number.
      ValueError: If one is out of range.

    Example:
      >>> [f"{x:.4g}" for x in cosine()[jnp.array([0, 495, 999])]]
      ['2.422e+04', '1', '2.429e-09']

    Reference: Nichol and Dhariwal, `Improved denoising diffusion probabilistic models
    <https://arxiv.org/abs/2102.09672>`_, 2021.
    """
    advice = "1000 is what the paper takes"
    num_steps = check_count("num_steps", num_steps, 1, advice)
    advice = "0.999 is what the paper takes"
    check_number("max_beta", max_beta, "(0, 1)", advice, static=True)
    u = np.arange(num_steps + 1) / num_steps
    signal = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return from_betas(np.minimum(1 - signal[1:] / signal[:-1], max_beta))


@helpful
def from_betas(betas: Any) -> jax.Array:
    r"""Gives the ratio of any schedule, :math:`1/(\prod(1-\beta)^{-1} - 1)`.

    Args:
      betas: `[T]`, variances of the noise of single steps, in [0, 1].

    Returns:
      float32 `[T]`: infinite before the first noise, 0 after a beta of 1.

    Raises:
      ValueError: If they are known and one is outside [0, 1], or they are no vector.

    Example:
      >>> [f"{x:.4g}" for x in from_betas([0.5, 0.5, 1.0])]
      ['1', '0.3333', '0']

    Reference: Ho et al., `Denoising diffusion probabilistic models
    <https://arxiv.org/abs/2006.11239>`_, 2020.
    """
    betas, math = _vector("betas", betas)
    with np.errstate(divide="ignore"):
        return _from_log(math.cumsum(math.log1p(-betas)), math)


@helpful
def from_alpha_bar(alpha_bar: Any) -> jax.Array:
    r"""Gives the ratio from the share of the signal, :math:`\bar\alpha/(1-\bar\alpha)`.

    Args:
      alpha_bar: `[T]`, in [0, 1]. Near 1 float32 leaves few digits of the noise: pass
        NumPy float64 where the first timesteps matter.

    Returns:
      float32 `[T]`, from 0 to infinity.

    Raises:
      ValueError: If it is known and one is outside [0, 1], or it is no vector.

    Example:
      >>> from_alpha_bar([1.0, 0.75, 0.0])
      Array([inf,  3.,  0.], dtype=float32)

    Reference: Kingma et al., `Variational diffusion models
    <https://arxiv.org/abs/2107.00630>`_, 2021.
    """
    alpha_bar, math = _vector("alpha_bar", alpha_bar)
    with np.errstate(divide="ignore"):
        return _from_log(math.log(alpha_bar), math)


@helpful
def inverse(snr: jax.Array) -> jax.Array:
    r"""Counters a loss weight of SNR exactly, :math:`1/\mathrm{SNR}`.

    For the gradient h of the unweighted loss and g = SNR h,
    :math:`\mathrm{SNR} \operatorname{clip}(h; c/\mathrm{SNR}) = \operatorname{clip}(g;
    c)`: every timestep contributes at most c. On g itself the same rule suppresses the
    timesteps of high SNR twice.

    Args:
      snr: Any shape, >= 0.

    Returns:
      The multiple, of the shape of `snr`; infinite at 0.

    Example:
      >>> inverse(jnp.array([4.0, 0.25]))
      Array([0.25, 4.  ], dtype=float32)

    Reference: none.
    """
    return 1 / jnp.asarray(snr)


@helpful
def min_snr(snr: jax.Array, gamma: Any = 5.0) -> jax.Array:
    r"""Tightens only where the SNR is high, :math:`\min(1, \gamma/\mathrm{SNR})`.

    On the unweighted gradient, later multiplied by SNR, a timestep contributes at most
    :math:`c \min(\mathrm{SNR}, \gamma)`: the Min-SNR weight as a bound.

    Args:
      snr: Any shape, >= 0.
      gamma: Where it sets in.

    Returns:
      The multiple, of the shape of `snr`, in [0, 1].

    Example:
      >>> min_snr(jnp.array([10.0, 0.25]))
      Array([0.5, 1. ], dtype=float32)

    Reference: Hang et al., `Efficient diffusion training via Min-SNR weighting strategy
    <https://arxiv.org/abs/2303.09556>`_, 2023, who weigh losses with it.
    """
    snr = jnp.asarray(snr)
    return gamma / jnp.maximum(snr, gamma)


@helpful
def inverse_sqrt(snr: jax.Array) -> jax.Array:
    r"""Counters the scale of a residual, :math:`1/\sqrt{\mathrm{SNR}}`.

    Args:
      snr: Any shape, >= 0.

    Returns:
      The multiple, of the shape of `snr`; infinite at 0.

    Example:
      >>> inverse_sqrt(jnp.array([4.0, 0.25]))
      Array([0.5, 2. ], dtype=float32)

    Reference: none.
    """
    return 1 / jnp.sqrt(jnp.asarray(snr))


@helpful
def power(snr: jax.Array, exponent: Any = 0.5, reference: Any = 1.0) -> jax.Array:
    r"""Goes any part of the way, :math:`(\mathrm{SNR}/\mathrm{ref})^{-p}`.

    With the geometric mean of a schedule as reference, `jnp.exp(jnp.log(snr).mean())`,
    the mean of the logarithm of the threshold stays where it was.

    Args:
      snr: Any shape, >= 0.
      exponent: p; 0 ignores the SNR, 1 is `inverse` up to the reference.
      reference: The SNR at which the multiple is 1.

    Returns:
      The multiple, of the shape of `snr`; infinite at 0.

    Example:
      >>> power(jnp.array([4.0, 0.25]), 0.5, 4.0)
      Array([1., 4.], dtype=float32)

    Reference: none.
    """
    return (jnp.asarray(snr) / reference) ** -exponent


def _vector(name: str, values: Any) -> tuple[Any, Any]:
    """The values, and the module to compute with: NumPy's has float64."""
    if not isinstance(values, jax.Array):
        values = np.asarray(values, np.float64)
    known = np.asarray(values) if is_known(values) else np.zeros(values.shape)
    if values.ndim != 1 or not np.all((known >= 0) & (known <= 1)):
        raise ValueError(
            f"{name} must be a vector of numbers in [0, 1], got shape {values.shape} "
            f"and numbers from {known.min(initial=1):.3g} to {known.max(initial=0):.3g}"
            "; ddpm_linear and cosine make the usual ones."
        )
    return values, jnp if isinstance(values, jax.Array) else np


def _from_log(log_alpha_bar: Any, math: Any) -> jax.Array:
    # 1 - alpha_bar has few digits near the data; this has all.
    ratio = 1 / math.abs(math.expm1(-log_alpha_bar))  # the zero there has a sign
    return jnp.asarray(ratio).astype(jnp.float32)
