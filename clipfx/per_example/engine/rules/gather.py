"""Look-ups of rows: positions are ids, each a one-hot row of the table."""

from typing import Any

import jax
import jax.numpy as jnp

from clipfx.per_example.engine import primitives
from clipfx.per_example.engine.param_views import LeafSlice, ParamView
from clipfx.per_example.engine.rules import site as sites
from clipfx.per_example.engine.rules.site import Site, SiteRule


def _why_not(eqn: Any, weight: int, view: ParamView) -> str | None:
    if view.repeated:
        return f"{eqn.primitive.name} of a broadcast"
    if view.axis is not None:
        return f"{eqn.primitive.name} of a concatenation"
    p, shape = primitives.gather(eqn), eqn.invars[0].aval.shape
    if weight != 0 or len(p.start) != 1 or p.batching:
        return "gather of more than rows"
    one_row = tuple(1 if d in p.start else n for d, n in enumerate(shape))
    if p.collapsed != p.start or p.sizes != one_row:
        return "gather of more than rows"
    return None


def _row(site: Site) -> int:
    """The dimension of the table that ids are of."""
    (row,) = primitives.gather(site.eqn).start
    return row


def _dims(site: Site, part: LeafSlice) -> tuple[list[int], ...]:
    row = _row(site)
    free = [k for k in range(len(site.shape)) if k != row]
    return [], [row], sites.in_order(free, part)


def _factors(site: Site, part: LeafSlice, ids: jax.Array, d: jax.Array) -> tuple:
    p, row, lead = primitives.gather(site.eqn), _row(site), len(site.loops)
    outer, inner = sites.split_loops(site, part)
    rest = [lead + e for e in range(d.ndim - lead) if e not in p.offset]
    others = _dims(site, part)[2]
    right = sites.matrix(d, outer, inner + rest,
                         [lead + p.offset[e - (e > row)] for e in others])  # fmt: skip
    ids = ids[..., 0]
    left = sites.matrix(ids, outer, inner + list(range(lead, ids.ndim)))
    if jnp.iinfo(left.dtype).bits < 32:  # too narrow for the number of rows
        left = left.astype(jnp.int32)
    last = site.shape[row] - 1
    if p.clips:
        return jnp.clip(left, 0, last), right
    # In all other modes the derivative leaves out what is outside of the table, also
    # where the look-up itself takes the nearest row instead.
    inside = (left >= 0) & (left <= last)
    right = jnp.where(inside[..., None], right, jnp.zeros_like(right))
    return jnp.where(inside, left, 0), right


RULE = SiteRule(
    left=sites.IDS,
    why_not=_why_not,
    operand=sites.other_input,
    factors=_factors,
    dims=_dims,
    gradient=sites.transposed,
    apply=sites.bind,
    rows=lambda site: site.shape[_row(site)],
)
