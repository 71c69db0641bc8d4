"""Per-example clipping of any JAX loss, at the price of an ordinary gradient.

>>> import clipfx, jax.numpy as jnp
>>> def loss(params, example):  # of one example
...     x, y = example
...     return (jnp.vdot(params["w"], x) - y) ** 2
>>> grad = clipfx.per_example.clipped_grad(loss, max_norm=1.0)
>>> params, batch = {"w": jnp.ones(3)}, (jnp.ones((8, 3)), jnp.zeros(8))
>>> sums, info = grad(params, batch)
>>> mean = {k: v / 8 for k, v in sums.items()}  # to an optimizer

`norms` measures only, `population_grad` sums by population, `fair_grad` bounds what
each contributes, `clip_per_example` is a transform for gradients that are stacked
already, and `explain` tells what each parameter costs.
"""

from clipfx.per_example.clip_per_example import clip_per_example
from clipfx.per_example.clipped_grad import ClippedGrad, clipped_grad
from clipfx.per_example.engine.clip import PerExample
from clipfx.per_example.engine.rules import Rule, register_rule
from clipfx.per_example.explain import ExplainRow, Report, explain
from clipfx.per_example.fair_grad import PerPopulation, fair_grad
from clipfx.per_example.norms import norms
from clipfx.per_example.population_grad import population_grad

__all__ = [
    "ClippedGrad",
    "ExplainRow",
    "PerExample",
    "PerPopulation",
    "Report",
    "Rule",
    "clip_per_example",
    "clipped_grad",
    "explain",
    "fair_grad",
    "norms",
    "population_grad",
    "register_rule",
]
