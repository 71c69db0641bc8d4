r"""Where a parameter meets data: what each kind of equation knows of its gradient.

At a site the gradient of one example with respect to the weight is a sum of outer
products over positions t, :math:`G = \sum_t u_t v_t^T`: rows u of the data, or of
patches of it, or one-hot rows of an index, against rows v of the gradient of the
output. Leading dimensions of what a site recorded are the turns of enclosing loops.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from clipfx import _compat
from clipfx.per_example.engine.param_views import Part, View


class Site(NamedTuple):
    """One equation with a weight among its inputs.

    Attributes:
      number: Of the site in the program.
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
    eqn: Any
    weight: int
    view: View
    loops: tuple[tuple[int, int], ...]
    data: int | None
    tap: int

    @property
    def kind(self) -> str:
        """The name of the primitive."""
        return self.eqn.primitive.name

    @property
    def repeats(self) -> bool:
        """Whether an addition adds the same weight in several places."""
        fixed = any(len(p.stack) < len(self.loops) for p in self.view.parts)
        return bool(self.view.repeated or grown(self) or fixed)

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


def why_not(eqn: Any, weight: int, view: View) -> str | None:
    """Why an equation can be no site, None if it can."""
    name, params = eqn.primitive.name, eqn.params
    if name not in ("dot_general", "conv_general_dilated", "gather", *ADD):
        return name
    if _compat.other_mesh(eqn.outvars[0].aval):
        return f"{name} where axes of the mesh are of another kind"
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


def grown(site: Site) -> frozenset[int]:
    """Dimensions of size 1 that an addition repeats by itself."""
    before = site.eqn.invars[site.weight].aval.shape
    after = site.eqn.outvars[0].aval.shape
    if len(before) < len(after):  # a scalar
        return frozenset(range(len(after)))
    return frozenset(k for k, (a, b) in enumerate(zip(before, after, strict=True))
                     if a != b)  # fmt: skip


def split_loops(site: Site, part: Part) -> tuple[list[int], list[int]]:
    """The loops that take a slice of the part each turn, and those that do not."""
    stacks = dict(part.stack)
    outer = [k for k, (loop, _) in enumerate(site.loops) if loop in stacks]
    return outer, [k for k in range(len(site.loops)) if k not in outer]


def dot_dims(site: Site) -> tuple[list[int], ...]:
    """Batch, contracted and free dimensions of the weight, then of the data."""
    contract, batch = site.eqn.params["dimension_numbers"]
    wc, wb = list(contract[site.weight]), list(batch[site.weight])
    xc, xb = list(contract[site.operand]), list(batch[site.operand])
    free = lambda v, used: [d for d in range(len(v.aval.shape)) if d not in used]
    wf = free(site.eqn.invars[site.weight], wc + wb)
    xf = free(site.eqn.invars[site.operand], xc + xb)
    return wb, wc, wf, xb, xc, xf


def dot_delta_dims(site: Site) -> tuple[list[int], ...]:
    """Where batch, free of the data and free of the weight are in the output."""
    wb, _, wf, _, _, xf = dot_dims(site)
    b, x, w = len(wb), len(xf), len(wf)
    first, second = list(range(b, b + w)), list(range(b + w, b + w + x))
    if site.weight == 1:
        second, first = list(range(b, b + x)), list(range(b + x, b + x + w))
    return list(range(b)), second, first


def numbers(site: Site, data: Any, dtype: Any) -> Any:
    """Recorded data as floating numbers; counts, masks and the like become `dtype`.

    JAX lets data of any dtype meet a floating weight in a product. Ids of rows stay.
    """
    if data is None or site.kind == "gather":
        return data
    floating = jnp.issubdtype(data.dtype, jnp.floating)
    return data if floating else data.astype(dtype)


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
    wb, wc, wf, _, xc, _ = dot_dims(site)
    db, _, dw = dot_delta_dims(site)
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
        total = total.sum([lead + k for k in grown(site)], keepdims=True)
        shape = site.eqn.invars[site.weight].aval.shape
        return total.reshape(*total.shape[:lead], *shape)
    run = functools.partial(apply, site)
    if site.kind != "gather":
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
    wb, wc, wf, xb, xc, xf = dot_dims(site)
    db, dx, _ = dot_delta_dims(site)
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
        given = None if like is None else _compat.explicit_spec(like)
        given = given or (None,) * len(order)
        spec = [given[order.index(k)] for k in range(len(order))]
        spec = _compat.sharding(delta, spec)
    out = lax.dot_general(
        data.astype(delta.dtype),
        delta,
        ((summed + at(xf), summed + at(dx)), (cut + at(xb), cut + at(db))),
        precision=site.eqn.params["precision"],
        out_sharding=spec,
    )
    return jnp.transpose(out, order)
