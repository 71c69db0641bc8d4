"""Products by groups of rows, of one example and of a batch.

JAX has no rule to map `ragged_dot` over examples. Here rows of all examples are sorted
by group: then it is one product, as the groups' matrices are the same for all.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from clipfx import _compat
from clipfx._core.leaves import widen
from clipfx.per_example.engine import primitives
from clipfx.per_example.engine.param_views import LeafSlice, ParamView
from clipfx.per_example.engine.rules import product_by_id
from clipfx.per_example.engine.rules import site as sites
from clipfx.per_example.engine.rules.site import Site, SiteRule


def plain(eqn: Any) -> bool:
    """Whether rows `[T, K]` meet matrices `[E, K, N]`, whose groups follow each other.

    In the order of the inputs; sizes of groups are the third, integers `[E]`.
    """
    usual = ((((1,), (1,)), ((), ())), (0,), (0,), None)
    return len(eqn.invars) == 3 and primitives.ragged_dot(eqn) == usual


def evaluate(eqn: Any, inputs: list) -> list:
    """Runs the equation, in a way that can be mapped over examples."""
    if not plain(eqn):
        return _compat.evaluate(eqn, inputs)

    @jax.custom_batching.custom_vmap
    def mapped(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        (out,) = _compat.evaluate(eqn, [x, w, sizes])
        return out

    @mapped.def_vmap
    def _(size: int, where: list, x: Any, w: Any, sizes: Any) -> tuple[Any, bool]:
        rows = lambda y, m: y if m else jnp.broadcast_to(y, (size, *y.shape))
        x, sizes = rows(x, where[0]), rows(sizes, where[2])
        if where[1]:
            return lax.map(lambda args: mapped(*args), (x, w, sizes)), True
        group = jax.vmap(_groups, (0, None))(sizes, x.shape[1]).reshape(-1)
        order = jnp.argsort(group).astype(jnp.int32)
        # Not the sum of sizes: an example may have fewer rows than its groups ask for.
        sizes = jnp.zeros(len(w), sizes.dtype).at[group].add(1, mode="drop")
        joined = mapped(x.reshape(-1, x.shape[-1])[order], w, sizes)
        out = jnp.zeros_like(joined).at[order].set(joined, unique_indices=True)
        return out.reshape(*x.shape[:2], -1), True

    @jax.custom_vjp
    def run(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return mapped(x, w, sizes)

    def backward(kept: tuple, delta: jax.Array) -> tuple:
        x, w, sizes = kept
        wide = jnp.promote_types(delta.dtype, w.dtype)
        across = w.swapaxes(1, 2).astype(wide)
        back = mapped(delta.astype(wide), across, sizes).astype(x.dtype)
        group, count = _groups(sizes, len(x)), len(w)
        rows = jnp.where((group < count)[:, None], widen(delta), 0)
        both = x.astype(rows.dtype), rows, jnp.minimum(group, count - 1)
        sums = product_by_id.by_id(*both, count, primitives.precision(eqn))
        return back, sums.astype(w.dtype), None

    run.defvjp(lambda *args: (mapped(*args), args), backward)
    return [run(*inputs)]


def _groups(sizes: jax.Array, length: int) -> jax.Array:
    """The group of each of so many rows, `len(sizes)` behind the last group."""
    rows = jnp.arange(length, dtype=jnp.int32)
    return (rows[:, None] >= jnp.cumsum(sizes)[None]).sum(-1, dtype=jnp.int32)


def _why_not(eqn: Any, weight: int, view: ParamView) -> str | None:
    fits = weight == 1 and plain(eqn) and not view.repeated and view.axis is None
    scaled = any(part.scaled for part in view.parts)
    return None if fits and not scaled else f"{eqn.primitive.name} in another form"


def _matrices(
    site: Site, outer: list[int], inner: list[int], data: Any, d: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`[S, T, K]`, `[S, T, N]` and groups `[S, T]`."""
    (sizes, x), lead, d = data, len(outer) + len(inner), widen(d)
    groups = lambda sizes: _groups(sizes, x.shape[lead])
    for _ in range(lead):
        groups = jax.vmap(groups)
    group, count = groups(sizes), site.shape[0]
    d = jnp.where((group < count)[..., None], d, jnp.zeros_like(d))
    rows = outer, [*inner, lead]
    return (
        sites.matrix(sites.floating(x, d.dtype), *rows, [lead + 1]),
        sites.matrix(d, *rows, [lead + 1]),
        sites.matrix(jnp.minimum(group, count - 1), *rows),
    )


def _factors(site: Site, part: LeafSlice, data: Any, d: jax.Array) -> tuple:
    return _matrices(site, *sites.split_loops(site, part), data, d)


def _gradient(
    site: Site, data: Any, delta: jax.Array, like: jax.Array | None
) -> jax.Array:
    outer, inner = sites.rows_of_batch(site)
    rows = _matrices(site, outer, inner, data, delta)
    sums = product_by_id.sums_by_id(site, *rows, site.shape[0])
    return sums.reshape(*(delta.shape[k] for k in outer), *site.shape)


RULE = SiteRule(
    left=sites.NUMBERS,
    why_not=_why_not,
    operand=lambda eqn, weight: 2,
    factors=_factors,
    dims=lambda site, part: ([], [1], [2]),
    gradient=_gradient,
    second=0,
)
