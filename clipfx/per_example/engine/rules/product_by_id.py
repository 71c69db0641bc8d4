"""Products with matrices that are looked up: positions of one id add up to one matrix.

The gradient of a look-up has a matrix for each position; that of the product has a row
of data and one of the gradient of its output. Two positions share elements of the
weight if their ids are equal, so in Gram matrices all other pairs count as zero.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from clipfx import _compat
from clipfx._core.leaves import widen
from clipfx.per_example.engine import primitives
from clipfx.per_example.engine.param_views import LeafSlice
from clipfx.per_example.engine.rules import dot_general, gather
from clipfx.per_example.engine.rules import site as sites
from clipfx.per_example.engine.rules.site import Scale, Site, SiteRule

# A dimension of an array, None where it is repeated, and how long it is.
_Axis = tuple[int | None, int]


class _Places(NamedTuple):
    """Where dimensions are, of one example and one turn of all loops.

    Attributes:
      batch: Dimensions of the weight that all three have.
      rows: Those that are contracted with the data's.
      free: Those of the output.
      ids: Those that are indexed.
      data: Of the data, those of `batch`, of positions, and of `rows`.
      delta: Of the gradient of the output, `batch`, positions and `free`.
      number: Of the ids, `batch` and positions.
    """

    batch: list[int]
    rows: list[int]
    free: list[int]
    ids: list[int]
    data: tuple[list[_Axis], ...]
    delta: tuple[list[_Axis], ...]
    number: tuple[list[_Axis], ...]


def _places(site: Site, part: LeafSlice | None = None) -> _Places:
    """In the order of the leaf, if a part is given, else of the weight."""
    p = site.product
    assert p is not None
    inner = site._replace(eqn=p.eqn, weight=p.weight)
    wb, wc, wf, xb, xc, xf = dot_general.dims_of(inner)
    db, dx, dw = dot_general.delta_dims(inner)
    in_data = dict(zip([*wb, *wc], [*xb, *xc], strict=True))
    in_delta = dict(zip([*wb, *wf], [*db, *dw], strict=True))
    at = {d: k for k, d in enumerate(p.dims) if d is not None}
    order = lambda ds: sites.in_order(sorted(ds), part) if part else sorted(ds)
    weight = lambda ks: order(d for k in ks if (d := p.dims[k]) is not None and d >= 0)
    batch, rows, free = weight(wb), weight(wc), weight(wf)
    ids = order(gather.rows_of(site.eqn))
    shape = site.shape
    index = site.eqn.invars[site.operand].aval.shape
    if site.eqn.primitive.name == primitives.GATHER:
        index = index[:-1]
    data, delta = p.eqn.invars[p.operand].aval.shape, p.eqn.outvars[0].aval.shape

    def axes(ds: Sequence[int], places: dict[int, int]) -> list[_Axis]:
        return [(places[at[d]], shape[d]) for d in ds]

    js = range(len(index))
    where = lambda j, places: places.get(at[~j]) if ~j in at else None
    positions = lambda places: [(where(j, places), index[j]) for j in js]
    more = [(k, data[k]) for k in xf], [(k, delta[k]) for k in dx]
    return _Places(
        batch, rows, free, ids,
        (axes(batch, in_data), positions(in_data) + more[0], axes(rows, in_data)),
        (axes(batch, in_delta), positions(in_delta) + more[1], axes(free, in_delta)),
        ([(None, shape[d]) for d in batch],
         [(j, index[j]) for j in js] + [(None, n) for _, n in more[0]]),
    )  # fmt: skip


def _scale_axes(site: Site, at: _Places, scale: Scale) -> list[list[_Axis]]:
    """Like those of `_Places.data`."""
    place = {d: k for k, d in enumerate(scale.dims)}
    of = lambda ds: [(place.get(d), site.shape[d]) for d in ds]
    ids = [(None if j is None else place.get(~j), n) for j, n in at.number[1]]
    return [of(at.batch), ids, of(at.rows) if {*at.rows} & {*scale.dims} else []]


def multiplies_data(site: Site) -> bool:
    """Whether scales of its rows are such of the data that they meet."""
    free = {*_places(site).free}
    return not any(free & {*scale.dims} for scale in site.scales)


def _spread(x: jax.Array, *groups: Sequence[_Axis]) -> jax.Array:
    """Transposes, repeats and merges dimensions into as many as there are groups."""
    axes = [axis for group in groups for axis in group]
    x, kept = _compat.whole(x), [k for k, _ in axes if k is not None]
    rest = [k for k in range(x.ndim) if k not in kept]  # of one element
    lengths = [x.shape[k] for k in kept]
    x = jnp.transpose(x, [*kept, *rest]).reshape(lengths)
    to = [i for i, (k, _) in enumerate(axes) if k is not None]
    x = lax.broadcast_in_dim(x, [n for _, n in axes], to)
    return x.reshape([math.prod(n for _, n in group) for group in groups])


def _matrices(
    site: Site, at: _Places, outer: list[int], inner: list[int], data: Any, d: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`[S, T, K]`, `[S, T, N]` and ids `[S, T]`.

    Args:
      site: Where.
      at: From `_places`.
      outer: Dimensions in front that belong to S.
      inner: Those that belong to T.
      data: What was recorded, with these dimensions in front.
      d: The gradient of the output, likewise.
    """
    (ids, x, *scales), lead = data, len(outer) + len(inner)
    x = sites.floating(x, widen(d).dtype)
    number, counts = gather.numbers(site, at.ids, ids)

    def spread(y: jax.Array, groups: Sequence[list[_Axis]]) -> jax.Array:
        front = lambda ks: [(k, y.shape[k]) for k in ks]
        moved = [[(k if k is None else lead + k, n) for k, n in group]
                 for group in groups]  # fmt: skip
        return _spread(y, front(outer) + moved[0], front(inner) + moved[1], *moved[2:])

    left, right = spread(x, at.data), spread(d, at.delta)
    for scale, by in zip(site.scales, scales, strict=True):
        # With the data: beside the gradient of the output a factor might overflow.
        by, left = spread(by, _scale_axes(site, at, scale)), widen(left)
        real = jnp.issubdtype(by.dtype, jnp.floating)
        left = scale.apply(left, by.astype(left.dtype) if real else by)
    if counts is not None:
        inside = spread(counts, at.number)[..., None]
        right = jnp.where(inside, right, jnp.zeros_like(right))
    return left, right, spread(number, at.number)


def _factors(site: Site, part: LeafSlice, data: Any, d: jax.Array) -> tuple:
    outer, inner = sites.split_loops(site, part)
    return _matrices(site, _places(site, part), outer, inner, data, d)


def _gradient(
    site: Site, data: Any, delta: jax.Array, like: jax.Array | None
) -> jax.Array:
    at, shape = _places(site), site.shape
    cut, summed = sites.rows_of_batch(site)
    count = math.prod(shape[k] for k in at.ids)
    turns = [delta.shape[k] for k in cut]

    def run(delta: jax.Array, *data: jax.Array) -> jax.Array:
        rows = _matrices(site, at, cut, summed, data, delta)
        out = sums_by_id(site, *rows, count)
        known = [*at.batch, *at.ids, *at.rows, *at.free]
        kept = known + [k for k in range(len(shape)) if k not in known]
        out = out.reshape(*turns, *(shape[k] for k in kept))
        lead = list(range(len(turns)))
        return jnp.transpose(out, lead + [len(lead) + kept.index(k)
                                          for k in range(len(shape))])  # fmt: skip

    return _compat.left_to_xla(run, delta, *data, like=False)


def sums_by_id(
    site: Site, u: jax.Array, v: jax.Array, ids: jax.Array, count: int
) -> jax.Array:
    """`[S, count, K, N]` from rows `[S, M, K]` and `[S, M, N]` and their ids."""
    precision = primitives.precision(site.tapped)
    add = functools.partial(by_id, count=count, precision=precision)
    return jax.vmap(add)(u.astype(v.dtype), v, ids)


def by_id(
    u: jax.Array, v: jax.Array, ids: jax.Array, count: int, precision: Any
) -> jax.Array:
    """The sum of outer products of rows `[M, K]` and `[M, N]` by id, `[count, K, N]`.

    Rows of one id are laid out in blocks of as many as an id has on average: there are
    no more than twice as many blocks as ids, and each is one small product.
    """
    length = len(ids)
    size = -(-length // max(count, 1))
    if size <= 1:
        each = u[:, :, None] * v[:, None, :]
        return jax.ops.segment_sum(each, ids, num_segments=count)
    blocks = length // size + count
    order = jnp.argsort(ids).astype(jnp.int32)
    many = jnp.zeros(count, jnp.int32).at[ids].add(1)
    own = -(-many // size)
    first, start = jnp.cumsum(own) - own, jnp.cumsum(many) - many
    ranked = ids[order]
    place = first[ranked] * size + jnp.arange(length, dtype=jnp.int32) - start[ranked]
    source = jnp.full(blocks * size, length, jnp.int32).at[place].set(order)
    laid = lambda x: x.at[source].get(mode="fill", fill_value=0).reshape(
        blocks, size, x.shape[1])  # fmt: skip
    each = lax.dot_general(laid(u), laid(v), (((1,), (1,)), ((0,), (0,))),
                           precision=precision)  # fmt: skip
    of = jnp.repeat(jnp.arange(count), own, total_repeat_length=blocks)
    return jax.ops.segment_sum(each, of, num_segments=count)


def _dims(site: Site, part: LeafSlice) -> tuple[list[int], ...]:
    return _places(site, part)[:3]


RULE = SiteRule(
    left=sites.NUMBERS,
    why_not=lambda *_: None,
    operand=gather.RULE.operand,
    factors=_factors,
    dims=_dims,
    gradient=_gradient,
    name="dot_general by id",
)
