"""Additions: the gradient of a bias is that of the output, added up."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from clipfx._core.leaves import widen
from clipfx.per_example.engine.param_views import LeafSlice
from clipfx.per_example.engine.rules import site as sites
from clipfx.per_example.engine.rules.site import Site, SiteRule


def _factors(
    site: Site, part: LeafSlice, data: None, delta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradient in the order of the leaf, and its terms, positions first."""
    lead, axis = len(site.loops), site.view.axis
    if axis is not None:
        delta = lax.slice_in_dim(delta, part.start, part.stop, axis=lead + axis)
    outer, inner = sites.split_loops(site, part)
    repeated = site.view.repeated | sites.grown(site)
    kept = [k for k in range(delta.ndim - lead) if k not in repeated]
    gone = inner + [lead + k for k in sorted(repeated)]
    order = outer + [lead + k for k in sites.in_order(kept, part)]
    rows = widen(jnp.transpose(delta, [*gone, *order]))
    rows = rows.reshape(-1, *rows.shape[len(gone) :])
    return rows.sum(0), rows


def _gradient(
    site: Site, data: None, delta: jax.Array, like: jax.Array | None
) -> jax.Array:
    summed = [1 + k for k, sliced in enumerate(site.sliced) if not sliced]
    total = delta.sum([0, *summed])
    lead = sum(site.sliced)
    total = total.sum([lead + k for k in sites.grown(site)], keepdims=True)
    return total.reshape(*total.shape[:lead], *site.shape)


def _dims(site: Site, part: LeafSlice) -> tuple[list[int], ...]:
    return [], [], sites.in_order(list(range(len(part.dims or ()))), part)


def _apply(site: Site, weight: jax.Array, data: Any) -> jax.Array:
    return weight


RULE = SiteRule(
    left=sites.ONES,
    why_not=lambda eqn, weight, view: None,
    operand=lambda eqn, weight: None,
    factors=_factors,
    dims=_dims,
    gradient=_gradient,
    apply=_apply,
    axis=lambda site: (False, site.view.axis),
)
