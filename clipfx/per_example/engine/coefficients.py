"""What gradients are multiplied by where a weight is a parameter times a constant.

By number of the site `interpreter.coefficients` says by what: `[loops that slice...,
weight]`, the same for all examples.
"""

import math
from typing import NamedTuple

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
    c, others = sites.of_part(site, part, c)
    for k in reversed(others):
        c = lax.index_in_dim(c, 0, k, keepdims=False)
    return c


class Scale(NamedTuple):
    """What outer products are to be multiplied by.

    Attributes:
      number: `[S]`.
      left: `[S, K]`, none beyond 1, by which rows on the left are; None for 1.
      right: `[S, N]`, the same of rows on the right.
    """

    number: jax.Array
    left: jax.Array | None = None
    right: jax.Array | None = None


def scale(site: Site, part: LeafSlice, c: jax.Array | None, size: int) -> Scale | None:
    """That of a part with `size` blocks of outer products, None if there is none."""
    if c is None or part.scaled is None or 0 in c.shape:
        return None
    if not part.scaled:
        c = _compat.whole(_of_part(site, part, c))
        lead = len(sites.split_loops(site, part)[0])
        first = lax.slice(c, [0] * c.ndim, [*c.shape[:lead], *[1] * (c.ndim - lead)])
        return Scale(jnp.repeat(first.reshape(-1), size // math.prod(c.shape[:lead])))
    _, rows, free = site.rule.dims(site, part)
    differs = frozenset().union(*part.scaled)
    numbers = table(site, part, c)
    pick = lambda x, k, axis: jax.vmap(lambda x, k: jnp.take(x, k, axis))(x, k)
    # The largest, by its row first: `argmax` is slow on CPUs, `max` is not.
    i = jnp.argmax(jnp.max(jnp.abs(numbers), axis=2), axis=1)
    right = pick(numbers, i, 0)
    left = pick(numbers, jnp.argmax(jnp.abs(right), axis=1), 1)
    number = pick(left, i, 0)

    def share(x: jax.Array) -> jax.Array:
        part = x / jnp.where(number == 0, 1, number)[:, None]
        # Beside a larger one that is hidden it may be all: it is at least this.
        least = jnp.finfo(part.dtype).tiny
        return jnp.where((x != 0) & (jnp.abs(part) < least), least, part)

    return Scale(
        number,
        share(left) if differs.intersection(rows) else None,
        share(right) if differs.intersection(free) else None,
    )


def table(site: Site, part: LeafSlice, c: jax.Array) -> jax.Array:
    """Those of a part as a matrix for each block, `[S, K, N]`."""
    lead = len(sites.split_loops(site, part)[0])
    batch, rows, free = (
        [lead + k for k in dims] for dims in site.rule.dims(site, part)
    )
    c = _compat.whole(_of_part(site, part, c))
    return sites.matrix(c, [*range(lead), *batch], rows, free)


def of_rows(site: Site, part: LeafSlice, c: jax.Array, ids: jax.Array) -> jax.Array:
    """Those of the rows `ids` `[S, T]` of a table, `[S, T, N]`."""
    return jax.vmap(lambda rows, ids: rows[ids])(table(site, part, c), ids)


def on_output(
    site: Site, part: LeafSlice, c: jax.Array | None, delta: jax.Array
) -> jax.Array:
    """The gradient of the output of an addition, times those of what is added."""
    if c is None or part.scaled is None:
        return delta
    turns = [
        n if cut else 1 for (_, n), cut in zip(site.loops, site.sliced, strict=True)
    ]
    inner = site.shape or (1,) * (delta.ndim - len(turns))
    return widen(delta) * c.reshape(*turns, *inner)


def on_gradient(part: LeafSlice, c: jax.Array | None, gradient: jax.Array) -> jax.Array:
    """The gradient with respect to the weight, times those of the weight.

    It may be that of the first of several copies alone.
    """
    if c is None or part.scaled is None:
        return gradient
    return gradient * lax.slice(c, [0] * c.ndim, gradient.shape)
