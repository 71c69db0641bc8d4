"""Products: positions are the free dimensions of the data."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from clipfx import _compat
from clipfx._core.leaves import widen
from clipfx.per_example.engine import primitives
from clipfx.per_example.engine.param_views import LeafSlice, ParamView
from clipfx.per_example.engine.rules import site as sites
from clipfx.per_example.engine.rules.site import Site, SiteRule


def _why_not(eqn: Any, weight: int, view: ParamView) -> str | None:
    return f"{eqn.primitive.name} of a broadcast" if view.repeated else None


def dims_of(site: Site) -> tuple[list[int], ...]:
    """Batch, contracted and free dimensions of the weight, then of the data."""
    contract, batch = primitives.dot_dimensions(site.eqn)
    wc, wb = list(contract[site.weight]), list(batch[site.weight])
    data = 1 - site.weight
    xc, xb = list(contract[data]), list(batch[data])
    free = lambda v, used: [d for d in range(len(v.aval.shape)) if d not in used]
    wf = free(site.eqn.invars[site.weight], wc + wb)
    xf = free(site.eqn.invars[data], xc + xb)
    return wb, wc, wf, xb, xc, xf


def delta_dims(site: Site) -> tuple[list[int], ...]:
    """Where batch, free of the data and free of the weight are in the output."""
    wb, _, wf, _, _, xf = dims_of(site)
    b, x, w = len(wb), len(xf), len(wf)
    first, second = list(range(b, b + w)), list(range(b + w, b + w + x))
    if site.weight == 1:
        second, first = list(range(b, b + x)), list(range(b + x, b + x + w))
    return list(range(b)), second, first


def _axis(site: Site) -> tuple[bool, int | None]:
    axis = site.view.axis
    if axis is None:
        return False, None
    wb, wc, wf, _, xc, _ = dims_of(site)
    db, _, dw = delta_dims(site)
    if axis in wc:
        return True, xc[wc.index(axis)]
    return False, dw[wf.index(axis)] if axis in wf else db[wb.index(axis)]


def _factors(site: Site, part: LeafSlice, x: jax.Array, d: jax.Array) -> tuple:
    x = sites.floating(x, widen(d).dtype)
    wb, wc, wf, xb, xc, xf = dims_of(site)
    db, dx, dw = delta_dims(site)
    lead = len(site.loops)
    in_data, k = _axis(site)
    if k is not None:
        cut = lambda a, dim: lax.slice_in_dim(a, part.start, part.stop, axis=lead + dim)
        if in_data:
            x = cut(x, k)
        else:
            d = cut(d, k)
        if k in db and not in_data:  # shared by both
            x = cut(x, xb[db.index(k)])
    outer, inner = sites.split_loops(site, part)
    pick = lambda dims, source: [lead + dims[source.index(k)]
                                 for k in sites.in_order(source, part)]  # fmt: skip
    left = sites.matrix(x, outer + pick(xb, wb), inner + [lead + k for k in xf],
                        pick(xc, wc))  # fmt: skip
    right = sites.matrix(d, outer + pick(db, wb), inner + [lead + k for k in dx],
                         pick(dw, wf))  # fmt: skip
    return left, right


def _gradient(
    site: Site, data: jax.Array, delta: jax.Array, like: jax.Array | None
) -> jax.Array:
    wb, wc, wf, xb, xc, xf = dims_of(site)
    db, dx, _ = delta_dims(site)
    lead = 1 + len(site.loops)
    cut, summed = sites.rows_of_batch(site)
    at = lambda dims: [lead + k for k in dims]
    # Dimensions of the product: loops, batch, contracted in the data's order, free.
    kept = [*wb, *[wc[xc.index(k)] for k in sorted(xc)], *wf]
    front = list(range(len(cut)))
    order = front + [len(cut) + kept.index(k) for k in range(len(kept))]
    spec = _compat.explicit_spec(delta)
    if spec is not None:
        given = None if like is None else _compat.explicit_spec(like)
        given = given or (None,) * len(order)
        spec = [given[order.index(k)] for k in range(len(order))]
        spec = _compat.sharding(delta, spec)
    out = lax.dot_general(
        data.astype(delta.dtype),
        delta,
        ((summed + at(xf), summed + at(dx)), (cut + at(xb), cut + at(db))),
        precision=primitives.precision(site.eqn),
        out_sharding=spec,
    )
    return jnp.transpose(out, order)


RULE = SiteRule(
    left=sites.NUMBERS,
    why_not=_why_not,
    operand=sites.other_input,
    factors=_factors,
    dims=lambda site, part: [sites.in_order(dims, part) for dims in dims_of(site)[:3]],
    gradient=_gradient,
    axis=_axis,
)
