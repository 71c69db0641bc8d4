"""Additions and scales: what reaches the weight of the output's gradient, added up."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from clipfx._core.leaves import widen
from clipfx.per_example.engine.param_views import LeafSlice, ParamView
from clipfx.per_example.engine.rules import site as sites
from clipfx.per_example.engine.rules.site import Site, SiteRule


def _rule(
    times: Callable, operand: Callable, why_not: Callable = lambda *_: None
) -> SiteRule:
    """The rule of an equation that is linear in its weight, element by element.

    Args:
      times: `times(site, data, x)`, what the equation does to a weight x; and, as that
        is a multiplication, what its derivative does to the gradient of the output.
      operand: See `SiteRule`.
      why_not: See `SiteRule`.
    """

    def reaching(site: Site, data: Any, delta: jax.Array, lead: int) -> jax.Array:
        delta = widen(delta)
        if data is not None:  # a scalar has no dimensions but those in front
            ones = (1,) * (delta.ndim - data.ndim)
            data = data.reshape(*data.shape[:lead], *ones, *data.shape[lead:])
            data = data.astype(delta.dtype)
        return times(site, data, delta)

    def factors(
        site: Site, part: LeafSlice, data: Any, delta: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The gradient in the order of the leaf, and its terms, positions first."""
        lead, axis = len(site.loops), site.view.axis
        rows = reaching(site, data, delta, lead)
        if axis is not None:
            rows = lax.slice_in_dim(rows, part.start, part.stop, axis=lead + axis)
        outer, inner = sites.split_loops(site, part)
        repeated = site.repeated
        kept = [k for k in range(rows.ndim - lead) if k not in repeated]
        gone = inner + [lead + k for k in sorted(repeated)]
        order = outer + [lead + k for k in sites.in_order(kept, part)]
        rows = jnp.transpose(rows, [*gone, *order])
        rows = rows.reshape(-1, *rows.shape[len(gone) :])
        return rows.sum(0), rows

    def gradient(
        site: Site, data: Any, delta: jax.Array, like: jax.Array | None
    ) -> jax.Array:
        summed = [1 + k for k, sliced in enumerate(site.sliced) if not sliced]
        total = reaching(site, data, delta, 1 + len(site.loops)).sum([0, *summed])
        lead = sum(site.sliced)
        total = total.sum([lead + k for k in site.repeated], keepdims=True)
        shape = [1 if k in site.repeated else n for k, n in enumerate(site.shape)]
        return total.reshape(*total.shape[:lead], *shape)

    return SiteRule(
        left=sites.ONES,
        why_not=why_not,
        operand=operand,
        factors=factors,
        dims=_dims,
        gradient=gradient,
        axis=lambda site: (False, site.view.axis),
    )


def _dims(site: Site, part: LeafSlice) -> tuple[list[int], ...]:
    return [], [], sites.in_order(list(range(len(part.dims or ()))), part)


def _no_divisor(eqn: Any, weight: int, view: ParamView) -> str | None:
    return f"{eqn.primitive.name} by a parameter" if weight == 1 else None


ADD = _rule(lambda site, _, x: x, lambda *_: None)
SUB = _rule(lambda site, _, x: -x if site.weight == 1 else x, lambda *_: None)
MUL = _rule(lambda site, data, x: data * x, sites.other_input)
DIV = _rule(lambda site, data, x: x / data, sites.other_input, _no_divisor)
