r"""Differentially private training: noise, thresholds that adapt, accounting.

>>> import clipfx, jax, jax.numpy as jnp
>>> def loss(params, example):  # of one example
...     x, y = example
...     return (jnp.vdot(params["w"], x) - y) ** 2
>>> grad = clipfx.privacy.dp_grad(
...     loss, max_norm=1.0, noise_multiplier=1.1, expected_batch_size=8,
...     key=jax.random.key(0))
>>> params, batch = {"w": jnp.ones(3)}, (jnp.ones((8, 3)), jnp.zeros(8))
>>> state = grad.init(params)
>>> grads, state, _ = grad(state, params, batch, where=None)  # nobody is padding

What a run costs is computed by dp-accounting, how batches are drawn is jax_privacy's
affair; both come with the extra `privacy`.
"""

from clipfx.privacy.accounting import epsilon, event, noise_multiplier_for
from clipfx.privacy.dp_grad import dp_grad
from clipfx.privacy.histogram import histogram_threshold
from clipfx.privacy.noise import NoiseState, add_gaussian_noise, add_laplace_noise
from clipfx.privacy.scales import PrivateScale, SecondMomentState, second_moment
from clipfx.privacy.step import DPGrad, DPState
from clipfx.privacy.thresholds import (
    PrivateThreshold,
    dpsgd_f,
    dpsgd_global,
    dpsgd_global_adapt,
    quantile,
)

__all__ = [
    "DPGrad",
    "DPState",
    "NoiseState",
    "PrivateScale",
    "PrivateThreshold",
    "SecondMomentState",
    "add_gaussian_noise",
    "add_laplace_noise",
    "dp_grad",
    "dpsgd_f",
    "dpsgd_global",
    "dpsgd_global_adapt",
    "epsilon",
    "event",
    "histogram_threshold",
    "noise_multiplier_for",
    "quantile",
    "second_moment",
]
