r"""The gradient of one example at a site, as a sum of outer products.

:math:`G = \sum_t u_t v_t^T` over positions t: rows u of the data, or of patches of it,
or one-hot rows of an index, against rows v of the gradient of the output.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from clipfx import _compat
from clipfx._core.leaves import widen
from clipfx.per_example.engine import sites
from clipfx.per_example.engine.param_views import Part
from clipfx.per_example.engine.sites import Site


class Factors(NamedTuple):
    """The gradient of one part as a sum of outer products.

    Attributes:
      left: `[S, T, K]`, or ids `[S, T]` of one-hot rows.
      right: `[S, T, N]`.
      key: The dimensions of the leaf behind S, K and N; None where unknown.
    """

    left: jax.Array
    right: jax.Array
    key: tuple | None

    @property
    def by_index(self) -> bool:
        """Whether rows are positions of one entry, as of a looked-up table."""
        return self.left.ndim == 2


def factors(site: Site, part: Part, data: jax.Array, delta: jax.Array) -> Factors:
    """The gradient of one example with respect to one part, as outer products.

    Args:
      site: Where.
      part: One of `site.view.parts`.
      data: Recorded operand, `[loops..., ...]`.
      delta: Gradient with respect to the output, `[loops..., ...]`.
    """
    make = {"dot_general": _dot, "conv_general_dilated": _conv, "gather": _gather}
    data = sites.numbers(site, data, widen(delta).dtype)
    left, right = make[site.kind](site, part, data, delta)
    return Factors(left, right, key(site, part))


def direct(site: Site, part: Part, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradient of one example at an addition, in the order of the leaf.

    And what is added up to it, with the positions first.

    Args:
      site: An addition.
      part: One of `site.view.parts`.
      delta: Gradient with respect to the output, `[loops..., ...]`.
    """
    lead, axis = len(site.loops), site.view.axis
    if axis is not None:
        delta = lax.slice_in_dim(delta, part.start, part.stop, axis=lead + axis)
    outer, inner = sites.split_loops(site, part)
    repeated = site.view.repeated | sites.grown(site)
    kept = [k for k in range(delta.ndim - lead) if k not in repeated]
    gone = inner + [lead + k for k in sorted(repeated)]
    order = outer + [lead + k for k in _in_order(kept, part)]
    rows = widen(jnp.transpose(delta, [*gone, *order]))
    rows = rows.reshape(-1, *rows.shape[len(gone) :])
    return rows.sum(0), rows


def key(site: Site, part: Part) -> tuple | None:
    """The dimensions of the leaf behind S, K and N; None where unknown."""
    outer, _ = sites.split_loops(site, part)
    stacks = dict(part.stack)
    stacked = [stacks[site.loops[k][0]] for k in outer]
    if part.dims is None or None in stacked or site.kind == "conv_general_dilated":
        return None
    names = lambda dims: tuple(k for d in dims for k in part.dims[d])
    if site.kind in sites.ADD:
        batch, rows, free = [], [], list(range(len(part.dims)))
    elif site.kind == "gather":
        (row,) = site.eqn.params["dimension_numbers"].start_index_map
        batch, rows = [], [row]
        free = [k for k in range(len(part.dims)) if k != row]
    else:
        batch, rows, free, *_ = sites.dot_dims(site)
    first = tuple(k for dims in stacked for k in dims or ())
    batch, rows, free = (_in_order(dims, part) for dims in (batch, rows, free))
    return first + names(batch), names(rows), names(free)


def sizes(site: Site, part: Part) -> tuple[int, int, int, int]:
    """S, T, K and N of the factors of a part."""
    turns = tuple(n for _, n in site.loops)
    if site.kind in sites.ADD:
        return 1, 1, 1, 1
    like = lambda v: jax.ShapeDtypeStruct((*turns, *v.aval.shape), v.aval.dtype)
    data, delta = like(site.eqn.invars[site.operand]), like(site.eqn.outvars[0])
    shape = jax.eval_shape(
        lambda x, d: tuple(factors(site, part, x, d)[:2]), data, delta
    )
    left, right = (x.shape for x in shape)
    if len(left) == 2:
        (k,) = site.eqn.params["dimension_numbers"].start_index_map
        left = (*left, site.eqn.invars[0].aval.shape[k])
    return (*left, right[2])


def _in_order(dims: list[int], part: Part) -> list[int]:
    """In the order of the leaf's dimensions, so that several sites fit each other."""
    return sorted(dims, key=lambda k: part.dims[k] if part.dims else (k,))


def _matrix(x: jax.Array, *dims: list[int]) -> jax.Array:
    """Transposes and merges dimensions into as many as there are lists."""
    large = lambda some: [d for d in some if x.shape[d] > 1]
    if any(len(large(some)) > 1 for some in dims):
        x = _compat.whole(x)  # a merged dimension cannot say how it is split
    shape = [math.prod(x.shape[d] for d in some) for some in dims]
    return jnp.transpose(x, [d for some in dims for d in some]).reshape(shape)


def _dot(site: Site, part: Part, x: jax.Array, d: jax.Array) -> tuple:
    wb, wc, wf, xb, xc, xf = sites.dot_dims(site)
    db, dx, dw = sites.dot_delta_dims(site)
    lead = len(site.loops)
    in_data, k = sites.where_axis(site)
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
                                 for k in _in_order(source, part)]  # fmt: skip
    left = _matrix(x, outer + pick(xb, wb), inner + [lead + k for k in xf],
                   pick(xc, wc))  # fmt: skip
    right = _matrix(d, outer + pick(db, wb), inner + [lead + k for k in dx],
                    pick(dw, wf))  # fmt: skip
    return left, right


def _conv(site: Site, part: Part, x: jax.Array, d: jax.Array) -> tuple:
    p = site.eqn.params
    dn, groups, lead = p["dimension_numbers"], p["feature_group_count"], len(site.loops)
    images = _matrix(x, [*range(lead), lead + dn.lhs_spec[0]],
                     *[[lead + k] for k in dn.lhs_spec[1:]])  # fmt: skip
    kernel = [site.eqn.invars[1].aval.shape[k] for k in dn.rhs_spec[2:]]
    space = [site.eqn.outvars[0].aval.shape[k] for k in dn.out_spec[2:]]
    patches = _patches(images, kernel, space, p)
    turns = [n for _, n in site.loops]
    count = x.shape[lead + dn.lhs_spec[0]]
    patches = patches.reshape(*turns, count, groups, -1, math.prod(space))
    rows = jnp.transpose(d, [*range(lead), *(lead + k for k in dn.out_spec)])
    rows = rows.reshape(*turns, count, groups, -1, math.prod(space))
    outer, inner = sites.split_loops(site, part)
    split = ([*outer, lead + 1], [*inner, lead, lead + 3], [lead + 2])
    return _matrix(patches, *split), _matrix(rows, *split)


def _patches(images: jax.Array, kernel: list, space: list, params: Any) -> jax.Array:
    """What each output position sees, `[images, channels, kernel size, *space]`."""
    edges = zip(params["padding"], params["lhs_dilation"], strict=True)
    padding = [(0, 0, 0), (0, 0, 0), *((lo, hi, step - 1) for (lo, hi), step in edges)]
    images = lax.pad(images, jnp.zeros((), images.dtype), padding)
    steps, spread = params["window_strides"], params["rhs_dilation"]
    found = []
    for offset in np.ndindex(*kernel):
        start = [o * r for o, r in zip(offset, spread, strict=True)]
        stop = [a + (n - 1) * step + 1
                for a, n, step in zip(start, space, steps, strict=True)]  # fmt: skip
        found.append(lax.slice(images, (0, 0, *start), (*images.shape[:2], *stop),
                               (1, 1, *steps)))  # fmt: skip
    return jnp.stack(found, axis=2)


def _gather(site: Site, part: Part, ids: jax.Array, d: jax.Array) -> tuple:
    dn, lead = site.eqn.params["dimension_numbers"], len(site.loops)
    (row,) = dn.start_index_map
    shape = site.eqn.invars[0].aval.shape
    outer, inner = sites.split_loops(site, part)
    rest = [lead + e for e in range(d.ndim - lead) if e not in dn.offset_dims]
    others = _in_order([e for e in range(len(shape)) if e != row], part)
    right = _matrix(d, outer, inner + rest,
                    [lead + dn.offset_dims[e - (e > row)] for e in others])  # fmt: skip
    ids = ids[..., 0]
    left = _matrix(ids, outer, inner + list(range(lead, ids.ndim)))
    if jnp.iinfo(left.dtype).bits < 32:  # too narrow for the number of rows
        left = left.astype(jnp.int32)
    last = shape[row] - 1
    if site.eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        return jnp.clip(left, 0, last), right
    # In all other modes the derivative leaves out what is outside of the table, also
    # where the look-up itself takes the nearest row instead.
    inside = (left >= 0) & (left <= last)
    right = jnp.where(inside[..., None], right, jnp.zeros_like(right))
    return jnp.where(inside, left, 0), right
