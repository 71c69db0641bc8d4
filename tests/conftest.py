"""Eight CPU devices, and the strictest rules that JAX has, for every test."""

import gc
import os

import xla

xla.configure()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# What JAX traces and keeps is much, and seldom garbage.
gc.set_threshold(100_000, 20, 20)
