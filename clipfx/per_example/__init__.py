"""Per-example clipping of any JAX loss, at the price of an ordinary gradient.

>>> import clipfx, jax.numpy as jnp
>>> def loss(params, example):  # of one example
...     x, y = example
...     return (jnp.vdot(params["w"], x) - y) ** 2
>>> grad = clipfx.per_example.clipped_grad(loss, max_norm=1.0)
>>> params, batch = {"w": jnp.ones(3)}, (jnp.ones((8, 3)), jnp.zeros(8))
>>> sums, info = grad(params, batch)
>>> mean = {k: v / 8 for k, v in sums.items()}  # to an optimizer

`norms` measures only, `group_grad` sums by population, `fair_grad` bounds what each
contributes, `clip_per_example` is a transform for gradients that are stacked already,
and `explain` tells what each parameter costs.
"""

from clipfx.per_example._bounded import PerExample
from clipfx.per_example._explain import explain
from clipfx.per_example._fair import PerPopulation, fair_grad
from clipfx.per_example._grad import ClippedGrad, clipped_grad
from clipfx.per_example._groups import group_grad
from clipfx.per_example._measures import norms
from clipfx.per_example._stacked import clip_per_example

__all__ = [
    "ClippedGrad",
    "PerExample",
    "PerPopulation",
    "clip_per_example",
    "clipped_grad",
    "explain",
    "fair_grad",
    "group_grad",
    "norms",
]
