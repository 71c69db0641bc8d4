r"""Where a parameter meets data: what each kind of equation knows of its gradient.

At a site the gradient of one example with respect to the weight is a sum of outer
products over positions t, :math:`G = \sum_t u_t v_t^T`: rows u of the data, or of
patches of it, or one-hot rows of an index, against rows v of the gradient of the
output. Leading dimensions of what a site recorded are the turns of enclosing loops.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from clipfx import _compat
from clipfx.per_example._views import Part, View


class Site(NamedTuple):
    """One equation with a weight among its inputs.

    Attributes:
      number: Of the site in the program.
      jaxpr: That the equation is from.
      eqn: The equation.
      weight: Which input is the weight.
      view: What the weight consists of.
      loops: Enclosing loops, number and length, the outermost first.
      data: Number of the recorded operand; sites with the same one share it. None for
        an addition, which needs none.
      tap: Number of the tap that gives the gradient with respect to the output; sites
        whose outputs are only added up share it.
    """

    number: int
    jaxpr: Any
    eqn: Any
    weight: int
    view: View
    loops: tuple[tuple[int, int], ...]
    data: int | None
    tap: int

    @property
    def kind(self) -> str:
        return self.eqn.primitive.name

    @property
    def repeats(self) -> bool:
        """Whether an addition adds the same weight in several places."""
        return bool(self.view.repeated or _grown(self) or not all(self.sliced))

    @property
    def operand(self) -> int:
        """Which input is the data that the gradient depends on."""
        return 1 - self.weight

    @property
    def sliced(self) -> tuple[bool, ...]:
        """For every loop whether it takes a slice of the weight each turn."""
        stacks = {loop for p in self.view.parts for loop, _ in p.stack}
        return tuple(loop in stacks for loop, _ in self.loops)


ADD = ("add", "add_any")


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
        return self.left.ndim == 2


def why_not(eqn: Any, weight: int, view: View) -> str | None:
    """Why an equation can be no site, None if it can."""
    name, params = eqn.primitive.name, eqn.params
    if name not in ("dot_general", "conv_general_dilated", "gather", *ADD):
        return name
    dtypes = [eqn.invars[weight].aval.dtype, eqn.outvars[0].aval.dtype]
    if not all(jnp.issubdtype(x, jnp.floating) for x in dtypes):
        return "complex numbers"
    if name in ADD:
        return None
    if view.repeated:
        return f"{name} of a broadcast"
    if name == "dot_general":
        return None
    if view.axis is not None:
        return f"{name} of a concatenation"
    if name == "conv_general_dilated":
        if weight != 1:
            return "convolution of a parameter"
        return "batch_group_count" if params["batch_group_count"] != 1 else None
    dn, shape = params["dimension_numbers"], eqn.invars[0].aval.shape
    if weight != 0 or len(dn.start_index_map) != 1 or dn.operand_batching_dims:
        return "gather of more than rows"
    (k,) = dn.start_index_map
    rows = tuple(1 if d == k else n for d, n in enumerate(shape))
    if tuple(dn.collapsed_slice_dims) != (k,) or tuple(params["slice_sizes"]) != rows:
        return "gather of more than rows"
    return None


# ------------------------------------------------------------------------- factors


def factors(site: Site, part: Part, data: jax.Array, delta: jax.Array) -> Factors:
    """The gradient of one example with respect to one part, as outer products.

    Args:
      site: Where.
      part: One of `site.view.parts`.
      data: Recorded operand, `[loops..., ...]`.
      delta: Gradient with respect to the output, `[loops..., ...]`.
    """
    make = {"dot_general": _dot, "conv_general_dilated": _conv, "gather": _gather}
    left, right = make[site.kind](site, part, data, delta)
    return Factors(left, right, key(site, part))


def direct(site: Site, part: Part, delta: jax.Array) -> jax.Array:
    """The gradient of one example at an addition, in the order of the leaf.

    Args:
      site: An addition.
      part: One of `site.view.parts`.
      delta: Gradient with respect to the output, `[loops..., ...]`.
    """
    lead, axis = len(site.loops), site.view.axis
    if axis is not None:
        delta = lax.slice_in_dim(delta, part.start, part.stop, axis=lead + axis)
    outer, inner = _loops(site, part)
    repeated = site.view.repeated | _grown(site)
    kept = [k for k in range(delta.ndim - lead) if k not in repeated]
    gone = inner + [lead + k for k in sorted(repeated)]
    order = outer + [lead + k for k in _in_order(kept, part)]
    wide = jnp.promote_types(delta.dtype, jnp.float32)
    return jnp.transpose(delta, [*gone, *order]).sum(range(len(gone)), dtype=wide)


def _grown(site: Site) -> frozenset[int]:
    """Dimensions of size 1 that an addition repeats by itself."""
    before = site.eqn.invars[site.weight].aval.shape
    after = site.eqn.outvars[0].aval.shape
    return frozenset(k for k, (a, b) in enumerate(zip(before, after, strict=True))
                     if a != b)  # fmt: skip


def key(site: Site, part: Part) -> tuple | None:
    """The dimensions of the leaf behind S, K and N; None where unknown."""
    outer, _ = _loops(site, part)
    stacks = dict(part.stack)
    stacked = [stacks[site.loops[k][0]] for k in outer]
    if part.dims is None or None in stacked or site.kind == "conv_general_dilated":
        return None
    names = lambda dims: tuple(k for d in dims for k in part.dims[d])
    if site.kind in ADD:
        batch, rows, free = [], [], list(range(len(part.dims)))
    elif site.kind == "gather":
        (row,) = site.eqn.params["dimension_numbers"].start_index_map
        batch, rows = [], [row]
        free = [k for k in range(len(part.dims)) if k != row]
    else:
        batch, rows, free, *_ = _dot_dims(site)
    first = tuple(k for dims in stacked for k in dims)
    batch, rows, free = (_in_order(dims, part) for dims in (batch, rows, free))
    return first + names(batch), names(rows), names(free)


def sizes(site: Site, part: Part) -> tuple[int, int, int, int]:
    """S, T, K and N of the factors of a part."""
    turns = tuple(n for _, n in site.loops)
    if site.kind in ADD:
        return 1, 1, 1, 1
    like = lambda v: jax.ShapeDtypeStruct((*turns, *v.aval.shape), v.aval.dtype)
    data, delta = like(site.eqn.invars[site.operand]), like(site.eqn.outvars[0])
    shape = jax.eval_shape(lambda x, d: tuple(factors(site, part, x, d)[:2]), data, delta)
    left, right = (x.shape for x in shape)
    if len(left) == 2:
        (k,) = site.eqn.params["dimension_numbers"].start_index_map
        left = (*left, site.eqn.invars[0].aval.shape[k])
    return (*left, right[2])


def _loops(site: Site, part: Part) -> tuple[list[int], list[int]]:
    """The loops that take a slice of the part each turn, and those that do not."""
    stacks = dict(part.stack)
    outer = [k for k, (loop, _) in enumerate(site.loops) if loop in stacks]
    return outer, [k for k in range(len(site.loops)) if k not in outer]


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


def _dot_dims(site: Site) -> tuple[list[int], ...]:
    """Batch, contracted and free dimensions of the weight, then of the data."""
    contract, batch = site.eqn.params["dimension_numbers"]
    wc, wb = list(contract[site.weight]), list(batch[site.weight])
    xc, xb = list(contract[site.operand]), list(batch[site.operand])
    free = lambda v, used: [d for d in range(len(v.aval.shape)) if d not in used]
    wf = free(site.eqn.invars[site.weight], wc + wb)
    xf = free(site.eqn.invars[site.operand], xc + xb)
    return wb, wc, wf, xb, xc, xf


def _dot_delta_dims(site: Site) -> tuple[list[int], ...]:
    """Where batch, free of the data and free of the weight are in the output."""
    wb, _, wf, _, _, xf = _dot_dims(site)
    b, x, w = len(wb), len(xf), len(wf)
    first, second = list(range(b, b + w)), list(range(b + w, b + w + x))
    if site.weight == 1:
        second, first = list(range(b, b + x)), list(range(b + x, b + x + w))
    return list(range(b)), second, first


def _dot(site: Site, part: Part, x: jax.Array, d: jax.Array) -> tuple:
    wb, wc, wf, xb, xc, xf = _dot_dims(site)
    db, dx, dw = _dot_delta_dims(site)
    lead = len(site.loops)
    in_data, k = where_axis(site)
    if k is not None:
        cut = lambda a, dim: lax.slice_in_dim(a, part.start, part.stop, axis=lead + dim)
        if in_data:
            x = cut(x, k)
        else:
            d = cut(d, k)
        if k in db and not in_data:  # shared by both
            x = cut(x, xb[db.index(k)])
    outer, inner = _loops(site, part)
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
    outer, inner = _loops(site, part)
    split = (outer + [lead + 1], [*inner, lead, lead + 3], [lead + 2])
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
    outer, inner = _loops(site, part)
    rest = [lead + e for e in range(d.ndim - lead) if e not in dn.offset_dims]
    others = _in_order([e for e in range(len(shape)) if e != row], part)
    right = _matrix(d, outer, inner + rest,
                    [lead + dn.offset_dims[e - (e > row)] for e in others])  # fmt: skip
    ids = ids[..., 0]
    left = _matrix(ids, outer, inner + list(range(lead, ids.ndim)))
    mode = str(site.eqn.params["mode"])
    if "CLIP" in mode:
        left = jnp.clip(left, 0, shape[row] - 1)
    elif "FILL" in mode:
        inside = (left >= 0) & (left < shape[row])
        right = jnp.where(inside[..., None], right, jnp.zeros_like(right))
        left = jnp.where(inside, left, 0)
    return left, right


# ----------------------------------------------------------------------- gradients


def apply(site: Site, weight: jax.Array, data: jax.Array) -> jax.Array:
    """What of the equation is linear in the weight, in the dtype of the inputs."""
    if site.kind in ADD:
        return weight
    params = dict(site.eqn.params)
    if "preferred_element_type" in params:
        params["preferred_element_type"] = None
    inputs = (data, weight) if site.weight == 1 else (weight, data)
    return site.eqn.primitive.bind(*inputs, **params)


def where_axis(site: Site) -> tuple[bool, int | None]:
    """Where the axis of the weight's parts is: in the data, and which dimension.

    Otherwise it is a dimension of the output; None if there is one part.
    """
    axis = site.view.axis
    if axis is None:
        return False, None
    if site.kind in ADD:
        return False, axis
    wb, wc, wf, _, xc, _ = _dot_dims(site)
    db, _, dw = _dot_delta_dims(site)
    if axis in wc:
        return True, xc[wc.index(axis)]
    return False, dw[wf.index(axis)] if axis in wf else db[wb.index(axis)]


def weight_gradient(
    site: Site, data: Any, delta: jax.Array, like: jax.Array | None = None
) -> jax.Array:
    """The gradient with respect to the weight, summed over examples and turns.

    Args:
      site: Where.
      data: `[B, loops..., ...]`.
      delta: `[B, loops..., ...]`, of float32 or wider.
      like: The weight, which knows how the result is to be split over a mesh.

    Returns:
      `[loops that slice..., weight]`, of the dtype of `delta`.
    """
    if site.kind == "dot_general":
        return _dot_gradient(site, data, delta, like)
    if site.kind in ADD:
        summed = [1 + k for k, sliced in enumerate(site.sliced) if not sliced]
        total = delta.sum([0, *summed])
        lead = sum(site.sliced)
        return total.sum([lead + k for k in _grown(site)], keepdims=True)
    run = functools.partial(apply, site)
    if jnp.issubdtype(data.dtype, jnp.floating):
        data = data.astype(delta.dtype)
    for sliced in reversed(site.sliced):
        run = jax.vmap(run, (0 if sliced else None, 0))
    run = jax.vmap(run, (None, 0))
    if like is None:
        turns = [n for (_, n), cut in zip(site.loops, site.sliced, strict=True) if cut]
        shape = (*turns, *site.eqn.invars[site.weight].aval.shape)
        like = jnp.zeros(shape, delta.dtype)
    # Linear in the weight: any weight has the same derivative.
    _, pull = jax.vjp(lambda w: run(w, data), like.astype(delta.dtype))
    return pull(delta)[0]


def _dot_gradient(
    site: Site, data: jax.Array, delta: jax.Array, like: jax.Array | None
) -> jax.Array:
    wb, wc, wf, xb, xc, xf = _dot_dims(site)
    db, dx, dw = _dot_delta_dims(site)
    lead = 1 + len(site.loops)
    cut = [1 + k for k, sliced in enumerate(site.sliced) if sliced]
    summed = [k for k in range(lead) if k not in cut]
    at = lambda dims: [lead + k for k in dims]
    # Dimensions of the product: loops, batch, contracted in the data's order, free.
    kept = [*wb, *[wc[xc.index(k)] for k in sorted(xc)], *wf]
    front = list(range(len(cut)))
    order = front + [len(cut) + kept.index(k) for k in range(len(kept))]
    spec = _compat.explicit_spec(delta)
    if spec is not None:
        given = (None,) * len(order) if like is None else _compat.explicit_spec(like)
        spec = PartitionSpec(*(given[order.index(k)] for k in range(len(order))))
    out = lax.dot_general(
        data.astype(delta.dtype),
        delta,
        ((summed + at(xf), summed + at(dx)), (cut + at(xb), cut + at(db))),
        precision=site.eqn.params["precision"],
        out_sharding=spec,
    )
    return jnp.transpose(out, order)
