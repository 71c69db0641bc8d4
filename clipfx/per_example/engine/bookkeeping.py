"""What one pass over a batch leaves behind, and norms of gradients from it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from clipfx import _compat
from clipfx._core.groups import Groups
from clipfx._core.leaves import widen, widest
from clipfx.per_example.engine import (
    coefficients,
    ghost_norm,
    interpreter,
    outer_products,
    primitives,
    scaled_sums,
)
from clipfx.per_example.engine.columns import Columns
from clipfx.per_example.engine.cost_model import by_region
from clipfx.per_example.engine.interpreter import Given
from clipfx.per_example.engine.param_views import LeafSlice
from clipfx.per_example.engine.plan import Plan
from clipfx.per_example.engine.row_sums import by_rows
from clipfx.per_example.engine.rules import site as sites
from clipfx.per_example.engine.rules.site import Site
from clipfx.per_example.engine.scaled_sums import Elements


class Program(NamedTuple):
    """The loss of one example as a program of flat inputs.

    Attributes:
      plan: Decisions.
      params: Which inputs are parameters.
      mapped: Per input whether it has an axis of examples.
    """

    plan: Plan
    params: tuple[int, ...]
    mapped: tuple[bool, ...]


class Tape(NamedTuple):
    """What one pass over a batch leaves behind.

    Attributes:
      data: Recorded operands, `[B, loops..., ...]`, by number.
      deltas: Gradients with respect to outputs, `[B, loops..., ...]`, by number of the
        tap.
      leaves: By leaf the gradient of each example, `[B, ...]`, where instantiated.
      formed: By site the gradient of each example with respect to its weight.
      powers: By region, and mesh axes of its columns, `[B, outer loops..., M, 4, 2]`,
        norms to the power of p.
      columns: By region what these are of; None if there are no regions.
      again: `again(factor [B, G], good [B])` pulls what regions add up, by door; None
        if there are no regions.
      verdicts: By region `[B, outer loops..., N, 2]`, what `Spot` has decided; None if
        there was none, and what `again` returns depends on its arguments.
    """

    data: dict[int, jax.Array]
    deltas: dict[int, jax.Array]
    leaves: dict[int, jax.Array]
    formed: dict[int, jax.Array]
    powers: dict[int, list[jax.Array]]
    columns: dict[int, Columns] | None = None
    again: Callable | None = None
    verdicts: dict[int, jax.Array] | None = None

    def operand(self, site: Site) -> Any:
        """What was recorded for a site, None if it needs nothing."""
        return site.operands(self.data)


def backward_pass(
    program: Program, inputs: Sequence[Any], *, norms: bool
) -> tuple[list[jax.Array], Tape]:
    """Runs forward and backward once.

    Args:
      program: The loss.
      inputs: Its inputs, flat, those that are mapped `[B, ...]`.
      norms: Whether norms will be asked for.

    Returns:
      Outputs `[B, ...]`, and the `Tape`.
    """
    plan = program.plan
    params = [inputs[k] for k in program.params]

    def one(*example):
        def loss(leaves, taps):
            values = with_leaves(program, example, leaves)
            outs, data, _ = interpreter.run(plan.root, values, plan.sites, Given(taps))
            return outs[0], (outs[1:], data)

        leaves = {k: params[k] for k in sorted(plan.differentiated)}
        value, pull, (aux, data) = jax.vjp(loss, leaves, taps_of(plan), has_aux=True)
        return [value, *aux], data, *pull(jnp.ones_like(value))

    outs, *rest = over_examples(one, program.mapped, inputs)
    tape = tape_of(plan, *jax.tree.map(like_rows(program, inputs), rest), norms=norms)
    return jax.tree.map(like_rows(program, inputs), outs), tape


def with_leaves(program: Program, values: Sequence, leaves: Mapping[int, Any]) -> list:
    """The inputs, with other values of some leaves."""
    filled = list(values)
    for k, leaf in leaves.items():
        filled[program.params[k]] = leaf
    return filled


def tape_of(
    plan: Plan,
    data: dict[int, jax.Array],
    leaves: dict[int, jax.Array],
    deltas: dict[int, jax.Array],
    *,
    norms: bool = True,
) -> Tape:
    """What is left of a pass, with the gradients that are better formed at once.

    Args:
      plan: Decisions.
      data: Recorded operands, by number.
      leaves: By leaf the gradient of each example, where instantiated.
      deltas: Gradients with respect to outputs, by number of the tap.
      norms: Whether norms will be asked for.
    """
    deltas = deltas | {
        site.tap: deltas[site.tap].reshape(_delta_shape(site, deltas[site.tap]))
        for site in plan.sites.values()
    }
    data, leaves, deltas = jax.tree.map(_settled, (data, leaves, deltas))
    leaves = jax.tree.map(by_rows, leaves)
    formed = {}
    for n in plan.formed if norms else ():
        site = plan.sites[n]
        form = functools.partial(_form, site)
        formed[n] = by_rows(jax.vmap(form)(site.operands(data), deltas[site.tap]))
    rest = [site for n, site in plan.sites.items() if n not in formed]
    data = {n: data[n] for site in rest for _, n, _ in site.recorded}
    deltas = {site.tap: deltas[site.tap] for site in rest}
    return Tape(data, deltas, leaves, formed, {})


def over_examples(one: Callable, mapped: Sequence[bool], inputs: Sequence[Any]) -> Any:
    """Maps a function of one example's inputs over the batch."""
    axes = tuple(0 if m else None for m in mapped)
    try:
        return jax.vmap(one, axes)(*inputs)
    except (NotImplementedError, ValueError) as error:
        if isinstance(error, ValueError) and "vmap" not in str(error):
            raise
        pairs = list(zip(inputs, mapped, strict=True))
        batched = jax.tree.leaves([x for x, m in pairs if m])
        if any(x.shape[0] != 1 for x in batched):
            raise NotImplementedError(
                "fun must be made of what JAX can map over examples, got "
                f"{str(error).splitlines()[0].rstrip('.')!r}; pass microbatch_size=1, "
                "which takes one example after the other."
            ) from error
    first = lambda x: jax.tree.map(lambda y: y[0], x)
    alone = one(*(first(x) if m else x for x, m in pairs))
    return jax.tree.map(lambda x: x[None], alone)


def like_rows(program: Program, inputs: Sequence[Any]) -> Callable:
    """Splits by example as the batch is; older JAX forgets it where axes are Auto."""
    pairs = zip(inputs, program.mapped, strict=True)
    mapped = [x for x, is_mapped in pairs if is_mapped]
    split = [x for x in mapped if (_compat.explicit_spec(x) or (None,))[0]]
    return functools.partial(_compat.as_rows_of, (split or mapped)[0])


def _settled(x: jax.Array) -> jax.Array:
    """XLA may drop a rounding to half precision where it fuses, and keep it elsewhere.

    The norm and the sum have to be of the same numbers.
    """
    half = jnp.issubdtype(x.dtype, jnp.inexact) and jnp.finfo(x.dtype).bits < 32
    return jax.lax.optimization_barrier(x) if half else x


def taps_of(plan: Plan) -> dict[int, jax.Array]:
    """Zeros for every tap, `[loops..., 1, ...]`, or `[...]` where there are no loops.

    The 1 tells them from what loops keep on the way forward: XLA would share the zeros
    that both start from, and fill them in, where nothing reads them.
    """

    def like(site: Site) -> jax.Array:
        out, loops = site.tapped.outvars[0].aval, [n for _, n in site.loops]
        return zeros((*loops, *[1] * bool(loops), *out.shape), out)

    return {site.tap: like(site) for site in plan.sites.values()}


def _delta_shape(site: Site, delta: jax.Array) -> tuple[int, ...]:
    """`[B, loops..., ...]`."""
    turns = tuple(n for _, n in site.loops)
    return (delta.shape[0], *turns, *site.tapped.outvars[0].aval.shape)


def zeros(shape: tuple[int, ...], like: Any) -> jax.Array:
    """Of the dtype of a type, varying over the same axes of `jax.shard_map`."""
    return _compat.vary(jnp.zeros(shape, like.dtype), _compat.axes_of_type(like))


def dtype(plan: Plan) -> Any:
    """Of norms: float32, or wider where gradients are."""
    dtypes = [site.tapped.outvars[0].aval.dtype for site in plan.everywhere().values()]
    dtypes += [
        plan.root.jaxpr.outvars[0].aval.dtype,
        *(aval.dtype for aval in plan.types),
    ]
    return widest(dtypes)


def scales_of(program: Program, inputs: Sequence[Any]) -> dict[int, jax.Array]:
    """What weights are parameters times, by number of the site."""
    plan = program.plan
    return interpreter.coefficients(plan, program.params, inputs, dtype(plan))


# What is measured of a leaf; an array `[N, 4, 2]` is measured already, of N groups.
_Measured: TypeAlias = Elements | ghost_norm.Products | ghost_norm.Weighted | jax.Array
_OfGroup: TypeAlias = tuple[Any, _Measured]
# Before them the mesh axes of `jax.shard_map` that the leaf is split over.
_Part: TypeAlias = tuple[frozenset[str], Any, _Measured]


def powers(
    plan: Plan,
    tape: Tape,
    size: int,
    split: Sequence[frozenset[str]],
    members: Groups,
    scales: Mapping[int, jax.Array],
) -> jax.Array:
    """Norms `[B, G, 4, 2]` of each example's gradient to the power of p, by group.

    Args:
      plan: Decisions.
      tape: From `backward_pass`.
      size: B.
      split: Per leaf the mesh axes of `jax.shard_map` that it is split over.
      members: Of the leaves.
      scales: From `scales_of`.
    """
    columns = tape.columns

    def one(tape: Tape) -> jax.Array:
        keys = enumerate(zip(split, members.index, strict=True))
        parts = [(axes, *x) for k, (axes, index) in keys
                 for x in of_leaf(plan, k, index, tape, scales)]  # fmt: skip
        for number, own in (columns or {}).items():
            parts += own.parts(tape.powers[number])
        return powers_of_parts(plan, parts, members)

    tape = Tape(tape.data, tape.deltas, tape.leaves, tape.formed, tape.powers)
    return jax.vmap(one, axis_size=size)(tape)


def over(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Adds up over mesh axes of `jax.shard_map`, if there are any."""
    return jax.lax.psum(x, tuple(sorted(axes, key=str))) if axes else x


def powers_of_parts(plan: Plan, parts: Sequence[_Part], members: Groups) -> jax.Array:
    """Norms `[G, 4, 2]` of one example's gradient to the power of p, by group."""
    index: list[int | None] = []
    rows = []
    for axes in dict.fromkeys(axes for axes, _, _ in parts):
        some = [(group, x) for other, group, x in parts if other == axes]
        groups, powers = measure(some, plan.ord, dtype(plan))
        index += groups
        rows.append(over(powers, axes))
    if not rows:  # of parameters that the loss does not use
        return jnp.zeros((len(members.names), scaled_sums.SCALES, 2), dtype(plan))
    return _by_group(jnp.concatenate(rows), index, members)


def measure(parts: Sequence[_OfGroup], ord: int, dtype: Any) -> tuple[list, jax.Array]:
    """Of which group each power is, and powers `[J, 4, 2]`, of one example."""
    arrays = scaled_sums.joined([(g, x) for g, x in parts if isinstance(x, Elements)])
    weighted = [(g, x) for g, x in parts if isinstance(x, ghost_norm.Weighted)]
    products = [(g, x) for g, x in parts if isinstance(x, ghost_norm.Products)]
    known = [(some, x) for some, x in parts if isinstance(x, jax.Array)]
    powers = [scaled_sums.power(x, ord, dtype) for _, x in arrays]
    powers += [ghost_norm.power_of_weighted(x, ord, dtype) for _, x in weighted]
    groups = [group for group, _ in [*arrays, *weighted]]
    if products:
        order, power = ghost_norm.powers_of_products(
            [x for _, x in products], ord, dtype
        )
        groups += [products[k][0] for k in order]
        powers.append(power)
    rows = [scaled_sums.spread(scaled_sums.join(powers))] if powers else []
    rows += [x for _, x in known]
    groups += [group for some, _ in known for group in some]
    return groups, rows[0] if len(rows) == 1 else jnp.concatenate(rows)


# Groups whose rows are added up by name, not by a gather.
_FEW = 64


def _by_group(
    rows: jax.Array, index: Sequence[int | None], members: Groups
) -> jax.Array:
    """Adds up `[J, ...]` by group, `[G, ...]`."""
    count = len(members.names)
    if count == 1 and None not in index:
        return rows.sum(0, keepdims=True)
    if count > _FEW:
        # As many for each group, zeros where there are less.
        each = [[k for k, i in enumerate(index) if i == g] for g in range(count)]
        most, nothing = max(map(len, each)), len(index)
        take = np.array([ks + [nothing] * (most - len(ks)) for ks in each], np.int32)
        rows = jnp.concatenate([rows, jnp.zeros_like(rows[:1])])
        return rows.at[take].get(mode="promise_in_bounds").sum(1)
    # Slices of one: XLA moves what squeezes them by one addition at a time.
    columns = [
        sum((rows[k : k + 1] for k, i in enumerate(index) if i == g),
            jnp.zeros_like(rows[:1]))
        for g in range(count)
    ]  # fmt: skip
    return jnp.concatenate(columns)


def of_leaf(
    plan: Plan, leaf: int, index: Any, tape: Tape, scales: Mapping[int, jax.Array]
) -> list[_OfGroup]:
    """What is to be measured of one example's gradient, in parts to add up by group.

    Args:
      plan: Decisions.
      leaf: Which.
      index: Its group, or those of its slices along the first dimension.
      tape: Of one example.
      scales: From `scales_of`.
    """
    if leaf in tape.leaves:
        return of_gradient(plan, tape.leaves[leaf], index)
    found: list[_OfGroup] = []
    kept = [(site, part) for site, part in plan.uses[leaf] if site.number in plan.sites]
    for places in by_region(kept):
        seen = [_Seen.at(site, tape, scales) for site, _ in places]
        loops, several = zip(
            *(sites.groups_of(*place, index) for place in places), strict=True
        )
        groups = several[0]
        if loops[0] is None:
            pairs = [(*place, x) for place, x in zip(places, seen, strict=True)]
            found += [(groups, x) for x in _of_region(pairs)]
            continue
        turn = [sites.turn_of(*x, k or 0) for x, k in zip(places, loops, strict=True)]

        def one(seen: list, turn: list = turn) -> jax.Array:
            pairs = [(*place, x) for place, x in zip(turn, seen, strict=True)]
            return _measured(plan, _of_region(pairs))

        turns = zip(places, seen, loops, strict=True)
        axes = [x.axes(site, k or 0) for (site, _), x, k in turns]
        found.append((groups, jax.vmap(one, (axes,))(seen)))
    return found


def of_gradient(plan: Plan, gradient: jax.Array, index: Any) -> list[_OfGroup]:
    """The same of a gradient that is there."""
    if not isinstance(index, tuple):
        return [(index, Elements([gradient]))]
    of_slice = lambda x: _measured(plan, [Elements([x])])
    return [(index, jax.vmap(of_slice)(gradient))]


def _measured(plan: Plan, parts: Sequence[_Measured]) -> jax.Array:
    """What one group has in all, `[4, 2]`."""
    return measure([(0, x) for x in parts], plan.ord, dtype(plan))[1].sum(0)


class _Seen(NamedTuple):
    """What is known of a site and one example.

    Attributes:
      data: Recorded, `[loops..., ...]`, None if it needs nothing.
      delta: The gradient of its output, likewise.
      scale: What its weight was multiplied by, `[loops that slice..., weight]`.
      formed: The gradient of its weight, likewise, if it was formed.
    """

    data: Any
    delta: Any
    scale: Any
    formed: Any

    @classmethod
    def at(cls, site: Site, tape: Tape, scales: Mapping[int, Any]) -> "_Seen":
        """From the tape of one example."""
        n, scale = site.number, scales.get(site.number)
        if n in tape.formed:
            return cls(None, None, scale, tape.formed[n])
        return cls(tape.operand(site), tape.deltas[site.tap], scale, None)

    def axes(self, site: Site, loop: int) -> "_Seen":
        """Where the turns of a loop are."""
        sliced = sum(site.sliced[:loop])
        where = _Seen(loop, loop, sliced, sliced)
        return _Seen(
            *(None if x is None else k for x, k in zip(self, where, strict=True))
        )


def _form(site: Site, data: Any, delta: jax.Array) -> jax.Array:
    """The gradient of one example with respect to a weight."""
    data = jax.tree.map(lambda x: x[None], data)
    return site.rule.gradient(site, data, widen(delta)[None], None)


def _part(site: Site, part: LeafSlice, formed: jax.Array) -> jax.Array:
    """The gradient of one part from that of a weight, `[loops that slice..., ...]`."""
    formed, others = sites.of_part(site, part, formed)
    return formed.sum(others)


def _of_region(places: list[tuple[Site, LeafSlice, _Seen]]) -> list[_Measured]:
    """From all uses of one region of a leaf, each with what was recorded there."""
    site, part, (data, delta, c, formed) = places[0]
    if formed is not None:
        formed = coefficients.on_gradient(part, c, formed)
        return [Elements([_part(site, part, formed)])]
    if site.adds:
        on_output = coefficients.on_output
        parts = [s.rule.factors(s, p, x.data, on_output(s, p, x.scale, x.delta))
                 for s, p, x in places]  # fmt: skip
        rows = [rows.reshape(rows.shape[0], -1) for _, rows in parts]
        total = functools.reduce(jnp.add, [x.reshape(-1) for x, _ in parts])
        if sum(len(x) for x in rows) == 1:
            return [Elements([total])]
        # What positions add up to may cancel.
        return [Elements([total], terms=False), Elements(rows, counts=False)]
    if len(places) == 1 and outer_products.differ(site, part):
        if site.rule.dims(site, part) is None:
            formed = coefficients.on_gradient(part, c, _form(site, data, delta))
            return [Elements([_part(site, part, formed)])]
        left, right = (
            widen(x)[:, 0] for x in site.rule.factors(site, part, data, delta)
        )
        together = outer_products.by_element(site, part)
        scale = None if together else coefficients.scale(site, part, c, len(right))
        numbers = scale or coefficients.table(site, part, c)
        return [ghost_norm.Weighted(left, right, numbers)]
    factors = [outer_products.factors(s, p, *x[:3]) for s, p, x in places]
    return [ghost_norm.Products(factors, primitives.precision(site.tapped))]
