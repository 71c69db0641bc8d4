r"""Where a parameter meets data, and what a rule has to tell of it.

At a site the gradient of one example with respect to the weight is a sum of outer
products over positions t, :math:`G = \sum_t u_t v_t^T`: rows u of the data, or of
patches of it, or one-hot rows of an index, against rows v of the gradient of the
output. Leading dimensions of what a site recorded are the turns of enclosing loops.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx.per_example.engine import primitives
from clipfx.per_example.engine.param_views import LeafSlice, ParamView

# What rows u of the outer products are.
NUMBERS, IDS, ONES = "numbers", "ids", "ones"


class SiteRule(NamedTuple):
    """What is known of the gradient of one primitive, or of a user's function.

    Attributes:
      left: What rows u are: `NUMBERS`, `IDS` of one-hot rows, or `ONES`, where the
        gradient of a weight is that of the output, scaled perhaps, added up.
      why_not: `why_not(eqn, weight, view)` says why an equation can be no site; None if
        it can.
      operand: `operand(eqn, weight)` is the input that rows u are of, or a scale; None
        if the gradient needs none.
      factors: `factors(site, part, data, delta)` of one example: u `[S, T, K]`, or ids
        `[S, T]`, and v `[S, T, N]`; for `ONES` the sum, and what was added up.
      dims: `dims(site, part)`: the dimensions of the weight behind S, K and N in the
        order of the factors, None where unknown.
      gradient: `gradient(site, data, delta, like)` with respect to the weight, summed
        over examples and turns: of data and delta `[B, loops..., ...]`, the latter of
        float32 or wider, `[loops that slice..., weight]`, of the dtype of delta; 1 long
        where elements are repeated. `like` is the weight, which knows how that is to be
        split over a mesh, or None.
      axis: `axis(site)` is where the axis of the weight's parts is: whether in the
        data, and which dimension; otherwise of the output. None if there is one part.
      rows: `rows(site)`, K, for `IDS`.
      copied: Whether rows u are copies of the data, as patches are: that costs.
      second: A further input that the gradient depends on, None if there is none:
        otherwise data are a pair.
      name: In `explain`, if it is not that of the primitive.
    """

    left: str
    why_not: Callable
    operand: Callable
    factors: Callable
    dims: Callable
    gradient: Callable
    axis: Callable = lambda site: (False, None)
    rows: Callable = lambda site: 0
    copied: bool = False
    second: int | None = None
    name: str = ""


class Scale(NamedTuple):
    """What rows of a weight are multiplied by on their way to a product.

    Attributes:
      number: Among those of sites, of what is recorded.
      var: The variable; without the dimensions that it is repeated in.
      dims: For every dimension of it as those of `Product`.
      apply: `apply(x, by)`, that multiplication of others.
    """

    number: int
    var: Any
    dims: tuple[int | None, ...]
    apply: Callable


class Product(NamedTuple):
    """The product of data with rows of a weight, which the site has looked up.

    Attributes:
      eqn: The equation.
      weight: Which input the rows are.
      operand: Which input the data are.
      number: Among those of sites, of the data recorded here.
      data: Number of these, as `Site.data`.
      dims: For every dimension of the rows that of the weight, or `~j` for the j-th of
        the ids; None where it has one element.
      scales: What the rows were multiplied by before.
    """

    eqn: Any
    weight: int
    operand: int
    number: int
    data: int
    dims: tuple[int | None, ...]
    scales: tuple[Scale, ...] = ()


class Site(NamedTuple):
    """One equation with a weight among its inputs.

    Attributes:
      number: Of the site in the program.
      eqn: The equation.
      rule: What is known of it.
      weight: Which input is the weight.
      operand: Which input is the data that the gradient depends on, if any.
      view: What the weight consists of.
      loops: Enclosing loops, number and length, the outermost first.
      data: Number of the recorded operand; sites with the same one share it. None if
        there is none.
      tap: Number of the tap that gives the gradient with respect to the output; sites
        whose outputs are only added up share it.
      region: Number of the innermost rematerialized part around, None if there is none.
      product: What becomes of rows that are looked up, if it is one product: then that
        has the tap, and there are two operands, ids and data. None elsewhere.
    """

    number: int
    eqn: Any
    rule: SiteRule
    weight: int
    operand: int | None
    view: ParamView
    loops: tuple[tuple[int, int], ...]
    data: int | None
    tap: int
    region: int | None = None
    product: Product | None = None

    @property
    def tapped(self) -> Any:
        """The equation whose output is tapped."""
        return self.eqn if self.product is None else self.product.eqn

    @property
    def recorded(self) -> list[tuple[int, int, Any]]:
        """All that the gradient depends on: number, that of the record, variable."""
        found = []
        if self.operand is not None and self.data is not None:
            found.append((self.number, self.data, self.eqn.invars[self.operand]))
        if self.product is not None:
            x = self.product
            found.append((x.number, x.data, x.eqn.invars[x.operand]))
        return found + [(x.number, x.number, x.var) for x in self.scales]

    @property
    def scales(self) -> tuple[Scale, ...]:
        """What rows that it looks up are multiplied by."""
        return () if self.product is None else self.product.scales

    def operands(self, records: Mapping[int, Any]) -> Any:
        """What was recorded for it: None, an array, or ids, data and scales."""
        found = tuple(records[data] for _, data, _ in self.recorded)
        return found if len(found) > 1 else found[0] if found else None

    @property
    def name(self) -> str:
        """Of the primitive or the function, for `explain`."""
        return self.rule.name or self.eqn.primitive.name

    @property
    def adds(self) -> bool:
        """Whether its gradient is what reaches it of the output's, added up."""
        return self.rule.left == ONES

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(self.eqn.invars[self.weight].aval.shape)

    @property
    def repeated(self) -> frozenset[int]:
        """Dimensions of the output that its weight is repeated in, added or a scale."""
        after = self.eqn.outvars[0].aval.shape
        if len(self.shape) < len(after):  # a scalar
            return frozenset(range(len(after)))
        pairs = enumerate(zip(self.shape, after, strict=True))
        return self.view.repeated.union(k for k, (a, b) in pairs if a != b)

    @property
    def repeats(self) -> bool:
        """Whether the same weight is added, or scales, in several places."""
        fixed = any(len(p.stack) < len(self.loops) for p in self.view.parts)
        return bool(self.repeated or fixed)

    @property
    def sliced(self) -> tuple[bool, ...]:
        """For every loop whether it takes a slice of the weight each turn."""
        return _sliced(self.view, self.loops)


class Door(NamedTuple):
    """Where a parameter enters a part of the program that is rematerialized.

    Attributes:
      number: Among those of sites.
      weight: Which input it is.
      view: What it consists of.
      loops: Enclosing loops, number and length, the outermost first.
    """

    number: int
    weight: int
    view: ParamView
    loops: tuple[tuple[int, int], ...]

    @property
    def sliced(self) -> tuple[bool, ...]:
        """For every loop whether it takes a slice of the parameter each turn."""
        return _sliced(self.view, self.loops)


def _sliced(view: ParamView, loops: tuple) -> tuple[bool, ...]:
    stacks = {loop for p in view.parts for loop, _ in p.stack}
    return tuple(loop in stacks for loop, _ in loops)


def other_input(eqn: Any, weight: int) -> int:
    """Of two."""
    return 1 - weight


def split_loops(site: Site, part: LeafSlice) -> tuple[list[int], list[int]]:
    """The loops that take a slice of the part each turn, and those that do not."""
    stacks = dict(part.stack)
    outer = [k for k, (loop, _) in enumerate(site.loops) if loop in stacks]
    return outer, [k for k in range(len(site.loops)) if k not in outer]


def rows_of_batch(site: Site) -> tuple[list[int], list[int]]:
    """Dimensions in front of data of a batch: of loops that slice, and all others."""
    cut = [1 + k for k, sliced in enumerate(site.sliced) if sliced]
    return cut, [k for k in range(1 + len(site.loops)) if k not in cut]


def groups_of(
    site: Site, part: LeafSlice, index: Any
) -> tuple[int | None, int | tuple[int, ...]]:
    """The loop, by position, that takes a slice with a group of its own each turn.

    And the group, or those of all turns; None and one group where there is no loop.

    Args:
      site: Where.
      part: One of `site.view.parts`.
      index: The group of the leaf, or of each slice along its first dimension.
    """
    if not isinstance(index, tuple):
        return None, index
    found = slices_of(site, part)
    assert found is not None
    loop, low, high = found
    return (None, index[low]) if loop is None else (loop, index[low:high])


def slices_of(site: Site, part: LeafSlice) -> tuple[int | None, int, int] | None:
    """Which slices along the leaf's first dimension a part is, from and to.

    Before them the position of the loop that takes one each turn, None for one slice.
    None if it is not known, or if there are several at a time.
    """
    if not part.region:
        return None
    low, high = part.region[0]
    if high - low == 1:
        return None, low, high
    stacks = dict(part.stack)
    for k, (loop, turns) in enumerate(site.loops):
        if stacks.get(loop) == (0,) and turns == high - low:
            return k, low, high
    return None


def turn_of(site: Site, part: LeafSlice, loop: int) -> tuple[Site, LeafSlice]:
    """The same within one turn of a loop, given by position."""
    number, _ = site.loops[loop]
    stack = tuple(x for x in part.stack if x[0] != number)
    loops = site.loops[:loop] + site.loops[loop + 1 :]
    return site._replace(loops=loops), part._replace(stack=stack)


def of_part(site: Site, part: LeafSlice, x: jax.Array) -> tuple[jax.Array, list[int]]:
    """What of `[loops that slice..., weight]` a part is.

    And which of these loops take slices of other parts alone.
    """
    if site.view.axis is not None:
        axis = sum(site.sliced) + site.view.axis
        x = jax.lax.slice_in_dim(x, part.start, part.stop, axis=axis)
    stacks = dict(part.stack)
    pairs = zip(site.loops, site.sliced, strict=True)
    loops = [loop for (loop, _), cut in pairs if cut]
    return x, [k for k, loop in enumerate(loops) if loop not in stacks]


def in_order(dims: list[int], part: LeafSlice) -> list[int]:
    """In the order of the leaf's dimensions, so that several sites fit each other."""
    return sorted(dims, key=lambda k: part.dims[k] if part.dims else (k,))


def matrix(x: jax.Array, *dims: list[int]) -> jax.Array:
    """Transposes and merges dimensions into as many as there are lists."""
    merged = lambda group: [d for d in group if x.shape[d] > 1]
    if any(len(merged(group)) > 1 for group in dims):
        x = _compat.whole(x)  # a merged dimension cannot say how it is split
    shape = [math.prod(x.shape[d] for d in group) for group in dims]
    x = jnp.transpose(x, [d for group in dims for d in group])
    # Merging first: with Explicit axes JAX does not do both in one reshape.
    x = x.reshape([n for n, group in zip(shape, dims, strict=True) if group])
    return jnp.expand_dims(x, [k for k, group in enumerate(dims) if not group])


def floating(data: jax.Array, dtype: Any) -> jax.Array:
    """Data as floating numbers; counts, masks and the like become `dtype`.

    JAX lets data of any dtype meet a floating weight in a product.
    """
    return data if jnp.issubdtype(data.dtype, jnp.floating) else data.astype(dtype)


def bind(site: Site, weight: jax.Array, data: jax.Array) -> jax.Array:
    """The equation, of two inputs."""
    params = primitives.in_dtype_of_inputs(site.eqn)
    inputs = (data, weight) if site.weight == 1 else (weight, data)
    return site.eqn.primitive.bind(*inputs, **params)


def bind_numbers(site: Site, weight: jax.Array, data: jax.Array) -> jax.Array:
    """The same with the data in the dtype of the weight."""
    return bind(site, weight, data.astype(weight.dtype))


def transposed(
    apply: Callable,
    site: Site,
    data: jax.Array,
    delta: jax.Array,
    like: jax.Array | None,
) -> jax.Array:
    """The gradient with respect to the weight by JAX's own transposition.

    Args:
      apply: `apply(site, weight, data)`, what of the equation is linear in the weight,
        in the dtype of the weight.
      site: See `SiteRule.gradient`, as the others.
      data: What it has seen.
      delta: The gradient of its output.
      like: The weight, or None.
    """
    run = functools.partial(apply, site)
    for sliced in reversed(site.sliced):
        run = jax.vmap(run, (0 if sliced else None, 0))
    run = jax.vmap(run, (None, 0))
    if like is None:
        turns = [n for (_, n), cut in zip(site.loops, site.sliced, strict=True) if cut]
        like = jnp.zeros((*turns, *site.shape), delta.dtype)
    # Linear in the weight: any weight has the same derivative.
    _, pull = jax.vjp(lambda w: run(w, data), like.astype(delta.dtype))
    return pull(delta)[0]
