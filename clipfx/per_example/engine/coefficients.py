"""What gradients are multiplied by where a weight is a parameter times a constant.

By number of the site `interpreter.coefficients` says by what: `[loops that slice...,
weight]`, the same for all examples.
"""

import jax
import jax.numpy as jnp
from jax import lax

from clipfx import _compat
from clipfx._core.leaves import widen
from clipfx.per_example.engine.param_views import LeafSlice
from clipfx.per_example.engine.rules import site as sites
from clipfx.per_example.engine.rules.site import Site


def _of_part(site: Site, part: LeafSlice, c: jax.Array) -> jax.Array:
    """Those of one part, `[loops that slice it..., part]`."""
    if site.view.axis is not None:
        axis = sum(site.sliced) + site.view.axis
        c = lax.slice_in_dim(c, part.start, part.stop, axis=axis)
    stacks = dict(part.stack)
    loops = [
        loop for (loop, _), cut in zip(site.loops, site.sliced, strict=True) if cut
    ]
    for k in reversed(range(len(loops))):
        if loops[k] not in stacks:
            c = lax.index_in_dim(c, 0, k, keepdims=False)
    return c


def number(
    site: Site, part: LeafSlice, c: jax.Array | None, size: int
) -> jax.Array | None:
    """The number of a part, `[S]` for as many factors; None if there is none."""
    if c is None or not part.scaled:
        return None
    c = _compat.whole(_of_part(site, part, c))
    outer, _ = sites.split_loops(site, part)
    turns = c.shape[: len(outer)]
    if 0 in c.shape:
        return None
    first = lax.slice(c, [0] * c.ndim, [*turns, *[1] * (c.ndim - len(outer))])
    numbers = first.reshape(-1)
    return jnp.repeat(numbers, size // numbers.size)


def of_rows(site: Site, part: LeafSlice, c: jax.Array, ids: jax.Array) -> jax.Array:
    """Those of the rows `ids`, `[S, T, N]` for ids `[S, T]`."""
    outer, _ = sites.split_loops(site, part)
    lead = len(outer)
    batch, rows, free = (
        [lead + k for k in dims] for dims in site.rule.dims(site, part)
    )
    table = sites.matrix(_of_part(site, part, c), [*range(lead), *batch], rows, free)
    return jax.vmap(lambda table, ids: table[ids])(table, ids)


def on_output(
    site: Site, part: LeafSlice, c: jax.Array | None, delta: jax.Array
) -> jax.Array:
    """The gradient of the output of an addition, times those of what is added."""
    if c is None or not part.scaled:
        return delta
    turns = [
        n if cut else 1 for (_, n), cut in zip(site.loops, site.sliced, strict=True)
    ]
    inner = site.shape or (1,) * (delta.ndim - len(turns))
    return widen(delta) * c.reshape(*turns, *inner)


def on_gradient(part: LeafSlice, c: jax.Array | None, gradient: jax.Array) -> jax.Array:
    """The gradient with respect to the weight, times those of the weight."""
    return gradient if c is None or not part.scaled else gradient * c
