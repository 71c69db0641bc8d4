"""Rows that data look up in a weight, on their way to a product.

Matrices of experts, one for each position, are rows of one weight: `w[ids]`. Their own
gradient has one matrix for each position; that of the product that they go into has two
vectors. So what becomes of rows is followed through moves of dimensions, and whatever
multiplies them but is no parameter; where it is products with data the gradient is
taken there.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx.per_example.engine import primitives
from clipfx.per_example.engine.param_views import ParamView
from clipfx.per_example.engine.rules import gather
from clipfx.per_example.engine.rules.site import Scale

Dims = tuple[int | None, ...]


class Rows(NamedTuple):
    """Rows of a weight.

    Attributes:
      number: Of the look-up.
      dims: As those of `rules.site.Product`.
      scales: What they were multiplied by, and where.
    """

    number: int
    dims: Dims
    scales: tuple[tuple["Use", Scale], ...] = ()


class Use(NamedTuple):
    """An equation, and where it stands.

    Attributes:
      node: The program.
      k: Its number there.
      eqn: The equation.
      weight: Which input is the weight, or its rows.
      loops: As those of `rules.site.Site`.
      region: Likewise.
    """

    node: Any
    k: int
    eqn: Any
    weight: int
    loops: tuple
    region: int | None

    def together(self, other: "Use") -> bool:
        """Whether one runs as often as the other."""
        return self.loops == other.loops and self.region == other.region


class LookUp(NamedTuple):
    """A look-up, and what becomes of its rows.

    Attributes:
      use: The look-up itself.
      view: The weight.
      products: Those that rows go into, and the rows there.
      elsewhere: Not empty where rows go elsewhere too.
    """

    use: Use
    view: ParamView
    products: list[tuple[Use, Rows]]
    elsewhere: list[bool]


def dims_of(eqn: Any, view: ParamView) -> Dims | None:
    """Dimensions of what a look-up returns, None if rows are no matrices.

    Nor if elements of the weight have coefficients.
    """
    shape, table = eqn.outvars[0].aval.shape, eqn.invars[0].aval.shape
    p = gather.look_up(eqn)
    window = [k for k in range(len(table)) if k not in p.collapsed]
    place = dict(zip(p.offset, window, strict=True))
    ids = iter(range(len(shape)))
    dims = tuple(place[e] if e in place else ~next(ids) for e in range(len(shape)))
    free = [k for k, n in enumerate(p.sizes) if n > 1]
    scaled = any(part.scaled for part in view.parts)
    return None if len(free) < 2 or scaled else _long(dims, shape)


def _long(dims: Dims, shape: tuple[int, ...]) -> Dims:
    return tuple(d if n > 1 else None for d, n in zip(dims, shape, strict=True))


def moved(eqn: Any, dims: Dims) -> Dims | None:
    """Dimensions after an equation that only moves elements, None for all others."""
    name, before, after = eqn.primitive.name, eqn.invars[0].aval, eqn.outvars[0].aval
    real = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    if len(eqn.invars) > 1 or not real(before) or not real(after):
        return None
    if name in primitives.SAME:
        return dims
    if name == primitives.TRANSPOSE:
        return tuple(dims[k] for k in primitives.permutation(eqn))
    if name not in primitives.RESHAPES:
        return None
    long = lambda shape: [n for n in shape if n > 1]
    if long(before.shape) != long(after.shape):
        return None
    rest = iter(d for d in dims if d is not None)
    return tuple(next(rest) if n > 1 else None for n in after.shape)


def scaled(use: Use, rows: Rows, numbers: Iterator[int]) -> Rows | None:
    """Rows times other numbers, None if an equation makes something else of them.

    Args:
      use: The equation, and which input rows are.
      rows: What they were.
      numbers: To be given out.
    """
    name, k = use.eqn.primitive.name, use.weight
    out = use.eqn.outvars[0].aval
    if name == primitives.MULTIPLY:
        by, apply = use.eqn.invars[1 - k], jnp.multiply
    elif name == primitives.DIVIDE and k == 0:
        by, apply = use.eqn.invars[1], jnp.divide
    elif name == primitives.SELECT and k > 0:
        by, apply = use.eqn.invars[0], functools.partial(_chosen, k - 1)
    else:
        return None
    if not jnp.issubdtype(out.dtype, jnp.floating):
        return None
    like, dims, at = out, rows.dims, range(len(by.aval.shape))
    while True:
        pairs = zip(by.aval.shape, at, strict=True)
        dims = tuple(dims[e] if n == like.shape[e] else None for n, e in pairs)
        source = _made_by(use.node, by)
        if source is None:
            break
        like, at = by.aval, primitives.broadcast_dimensions(source)
        by = source.invars[0]
    scale = Scale(next(numbers), by, dims, apply)
    return rows._replace(scales=(*rows.scales, (use, scale)))


def _chosen(case: int, x: jax.Array, which: jax.Array) -> jax.Array:
    """`x` where that case is chosen."""
    return jnp.where(which == jnp.asarray(case, which.dtype), x, jnp.zeros_like(x))


def _made_by(node: Any, v: Any) -> Any:
    """The equation that repeats what `v` is, None if there is none."""
    if _compat.is_literal(v):
        return None
    made = (eqn for eqn in node.jaxpr.eqns if v in eqn.outvars)
    eqn = next(made, None)
    repeats = eqn is not None and eqn.primitive.name == primitives.BROADCAST
    return eqn if repeats else None
