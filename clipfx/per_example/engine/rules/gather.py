"""Look-ups: positions are ids, each a one-hot row of the table.

Slices have size 1 in the dimensions that are indexed, together its rows, and take all
others whole.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipfx.per_example.engine import primitives
from clipfx.per_example.engine.param_views import LeafSlice, ParamView
from clipfx.per_example.engine.primitives import Gather
from clipfx.per_example.engine.rules import site as sites
from clipfx.per_example.engine.rules.site import Site, SiteRule

MOST = np.iinfo(np.int32).max  # rows


def look_up(eqn: Any) -> Gather:
    """What an equation looks up."""
    if eqn.primitive.name == primitives.GATHER:
        return primitives.gather(eqn)
    return primitives.dynamic_slice(eqn)


def rows_of(eqn: Any) -> list[int]:
    """The dimensions of the table that are indexed."""
    p = look_up(eqn)
    return [k for k in p.start if p.sizes[k] == 1]


def _why_not(eqn: Any, weight: int, view: ParamView) -> str | None:
    name = eqn.primitive.name
    if view.repeated:
        return f"{name} of a broadcast"
    if view.axis is not None:
        return f"{name} of a concatenation"
    p, rows, shape = look_up(eqn), rows_of(eqn), eqn.invars[0].aval.shape
    slices = tuple(1 if k in rows else n for k, n in enumerate(shape))
    if weight != 0 or not rows or p.batching or p.sizes != slices:
        return f"{name} of more than rows"
    if name == primitives.DYNAMIC_SLICE and len(rows) > 1:
        return f"{name} of several indices"
    many = math.prod(shape[k] for k in rows) > MOST
    return f"{name} of too many rows" if many else None


def _operand(eqn: Any, weight: int) -> int:
    """The ids, or the index of the one dimension that is not taken whole."""
    (first, *_) = rows_of(eqn)
    return 1 if eqn.primitive.name == primitives.GATHER else 1 + first


def _dims(site: Site, part: LeafSlice) -> tuple[list[int], ...]:
    rows = rows_of(site.eqn)
    free = [k for k in range(len(site.shape)) if k not in rows]
    return [], sites.in_order(rows, part), sites.in_order(free, part)


def numbers(
    site: Site, rows: list[int], ids: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Numbers of the rows that are looked up, `[..., ids]`, and which get a gradient.

    Args:
      site: Where.
      rows: Dimensions of the table that are indexed, in the order that they number.
      ids: What was recorded.
    """
    p = look_up(site.eqn)
    if site.eqn.primitive.name == primitives.DYNAMIC_SLICE:
        ids = ids[..., None]
    if jnp.iinfo(ids.dtype).bits < 32:  # too narrow for the number of rows
        ids = ids.astype(jnp.int32)
    by_column = lambda xs: np.asarray(xs, ids.dtype).reshape(*[1] * (ids.ndim - 1), -1)
    near = jnp.clip(ids, 0, by_column([site.shape[k] - p.sizes[k] for k in p.start]))
    steps = {k: math.prod(site.shape[j] for j in rows[i + 1 :])
             for i, k in enumerate(rows)}  # fmt: skip
    steps = by_column([steps.get(k, 0) for k in p.start])
    number = (near * steps).sum(-1, dtype=ids.dtype)
    # In all other modes the derivative leaves out what is outside of the table, also
    # where the look-up itself takes the nearest row instead.
    return number, None if p.clips else (near == ids).all(-1)


def _factors(site: Site, part: LeafSlice, ids: jax.Array, d: jax.Array) -> tuple:
    p, lead = look_up(site.eqn), len(site.loops)
    _, rows, free = _dims(site, part)
    outer, inner = sites.split_loops(site, part)
    number, counts = numbers(site, rows, ids)
    positions = inner + list(range(lead, number.ndim))
    left = sites.matrix(number, outer, positions)
    window = [k for k in range(len(site.shape)) if k not in p.collapsed]
    place = {k: lead + e for k, e in zip(window, p.offset, strict=True)}
    at = [place[k] for k in free]
    rest = [e for e in range(lead, d.ndim) if e not in at]
    right = sites.matrix(d, outer, inner + rest, at)
    if counts is None:
        return left, right
    inside = sites.matrix(counts, outer, positions)
    return left, jnp.where(inside[..., None], right, jnp.zeros_like(right))


def _apply(site: Site, weight: jax.Array, ids: jax.Array) -> jax.Array:
    if site.eqn.primitive.name == primitives.GATHER:
        return sites.bind(site, weight, ids)
    # Of a dimension that is taken whole the index does not matter.
    first = [jnp.zeros_like(ids)] * len(site.shape)
    (row,) = rows_of(site.eqn)
    # As the slice does: older JAX, when it is mapped, promises that none is outside.
    first[row] = jnp.clip(ids, 0, site.shape[row] - 1)
    return site.eqn.primitive.bind(weight, *first, **site.eqn.params)


RULE = SiteRule(
    left=sites.IDS,
    why_not=_why_not,
    operand=_operand,
    factors=_factors,
    dims=_dims,
    gradient=functools.partial(sites.transposed, _apply),
    rows=lambda site: math.prod(site.shape[k] for k in rows_of(site.eqn)),
)
