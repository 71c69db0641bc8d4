"""Runs a program again: with taps at its sites, or only its views of parameters."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from clipfx import _compat
from clipfx.per_example.engine import primitives, rules
from clipfx.per_example.engine.plan import Plan
from clipfx.per_example.engine.primitives import CALLS, REMAT
from clipfx.per_example.engine.rules.site import Door, Site
from clipfx.per_example.engine.walk import JaxprPlan

_NONE: Mapping[int, Any] = types.MappingProxyType({})


@jax.custom_jvp
def tap(x: jax.Array, tapped: jax.Array) -> jax.Array:
    """`x`; its derivative is also that with respect to `tapped`, which costs nothing.

    An addition of zeros would do, if zeros did not have to be stored for each turn of
    a loop.
    """
    return x


@tap.defjvp
def _tap_jvp(primals, tangents):
    return tap(*primals), tangents[0] + tangents[1].reshape(primals[0].shape)


@jax.custom_vjp
def keep(x: jax.Array, data: jax.Array, slot: jax.Array) -> jax.Array:
    """`x`; the gradient with respect to `slot` is `data`, which nobody has to keep."""
    return x


keep.defvjp(lambda x, data, slot: (x, data), lambda data, d: (d, None, data))


def as_floats(x: jax.Array) -> jax.Array:
    """Of any dtype, as gradients have to be; integers in pieces that are exact."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    size = x.dtype.itemsize
    if size <= 2:
        return x.astype(jnp.float32)
    pieces = [(x >> (16 * k)) & 0xFFFF for k in range(size // 2)]
    return jnp.stack(pieces, -1).astype(jnp.float32)


def from_floats(x: jax.Array, dtype: Any) -> jax.Array:
    """What `as_floats` was given."""
    if jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize <= 2:
        return x.astype(dtype)
    pieces = jnp.unstack(x.astype(dtype), axis=-1)
    return sum((y << (16 * k) for k, y in enumerate(pieces)), jnp.zeros_like(pieces[0]))


class Given(NamedTuple):
    """What comes in beside a program's inputs, by number.

    Attributes:
      taps: Where to tap, `[loops..., ...]`.
      slots: By number of the site, `[loops..., ...]`: its data become the gradient with
        respect to this, instead of being recorded.
      doors: Parameters that enter regions, `[loops that slice..., ...]`.
      scales: By number of the site in a region its coefficients, likewise.
      found: By region, zeros whose gradient becomes what it finds out, likewise.
      ids: By region the groups of its columns, likewise.
    """

    taps: Mapping[int, Any] = _NONE
    slots: Mapping[int, Any] = _NONE
    doors: Mapping[int, Any] = _NONE
    scales: Mapping[int, Any] = _NONE
    found: Mapping[int, Any] = _NONE
    ids: Mapping[int, Any] = _NONE

    def within(
        self, inner: JaxprPlan, doors: Sequence[Door] = (), region: int | None = None
    ) -> "Given":
        """Of a program inside, and for what enters it."""
        some = lambda xs, numbers: {n: xs[n] for n in numbers & xs.keys()}
        taps, numbers = inner.all_taps(), inner.numbers()
        numbers |= {door.number for door in doors}
        rest = (some(xs, numbers) for xs in (self.slots, self.doors, self.scales))
        regions = inner.all_regions() | ({region} if region is not None else set())
        more = (some(xs, regions) for xs in (self.found, self.ids))
        return Given(some(self.taps, taps), *rest, *more)


_NOTHING = Given()


class Done(NamedTuple):
    """What comes of running a program.

    Attributes:
      outs: Its outputs.
      records: The data that sites see, by number, stacked over the turns of loops.
      thread: What went through all regions.
    """

    outs: list[Any]
    records: dict[int, Any]
    thread: Any


# Runs a region: its number, its program, the equation, inputs, what is given inside,
# and the thread.
Enter = Callable[[int, JaxprPlan, Any, list, Given, Any], Done]


def _literal(v: Any) -> jax.Array:
    return jnp.asarray(v.val, v.aval.dtype)


def run(
    node: JaxprPlan,
    values: Sequence[Any],
    sites: Mapping[int, Site],
    given: Given = _NOTHING,
    enter: Enter | None = None,
    thread: Any = None,
) -> Done:
    """Runs a program, with taps, and records what sites see.

    Args:
      node: The program.
      values: Of its inputs.
      sites: By number, those that matter.
      given: What comes in besides.
      enter: What runs regions.
      thread: What each region is given by the one before it.
    """
    jaxpr = node.jaxpr
    env = dict(zip(jaxpr.constvars, node.consts, strict=True))
    env.update(zip(jaxpr.invars, values, strict=True))
    read = lambda v: _literal(v) if _compat.is_literal(v) else env[v]
    records = {}
    for k, eqn in enumerate(jaxpr.eqns):
        inputs = [read(v) for v in eqn.invars]
        used = [i for i, v in enumerate(eqn.outvars) if v in node.users]
        enters = node.enters(k, sites)
        if k in node.inner and enters:
            outs, inside, thread = _inside(node, k, inputs, sites, given, enter, thread)
            records.update(inside)
        elif k in node.branches and enters:
            every = []
            for branch in node.branches[k]:
                within = given.within(branch)
                outs, inside, thread = run(
                    branch, inputs[1:], sites, within, enter, thread
                )
                every.append(outs)
                records.update(inside)
            # As `jax.vmap` does it, where examples choose different branches.
            outs = [lax.select_n(inputs[0], *xs) for xs in zip(*every, strict=True)]
        else:
            outs = rules.evaluate(eqn, inputs)
            for n, number, v, data in node.records.get(k, ()):
                if n in sites and number in given.slots:
                    slot = given.slots[number]
                    outs[0] = keep(outs[0], as_floats(read(v)), slot)
                elif n in sites:
                    records[data] = read(v)
        if used and node.taps.get(k) in given.taps:
            outs[used[0]] = tap(outs[used[0]], given.taps[node.taps[k]])
        env.update((eqn.outvars[i], outs[i]) for i in used)
    return Done([read(v) for v in jaxpr.outvars], records, thread)


def _inside(
    node: JaxprPlan,
    k: int,
    inputs: list,
    sites: Mapping[int, Site],
    given: Given,
    enter: Enter | None,
    thread: Any,
) -> Done:
    eqn, inner = node.jaxpr.eqns[k], node.inner[k]
    given = given.within(inner, node.doors.get(k, ()), node.regions.get(k))
    if enter is not None and k in node.regions:
        return enter(node.regions[k], inner, eqn, inputs, given, thread)

    def again(values: list, given: Given, thread: Any) -> Done:
        return run(inner, values, sites, given, enter, thread)

    name = eqn.primitive.name
    if name in REMAT:
        again = jax.checkpoint(again, **primitives.remat_options(eqn))
    if name in CALLS:
        return again(inputs, given, thread)
    const, carried = _compat.scan_sizes(eqn)
    first = const + carried
    # What a loop takes slices of need not be recorded, it is there.
    sliced = dict(zip(inner.jaxpr.invars[first:], inputs[first:], strict=True))
    known = {n: sliced[v] for v, n in inner.data.items() if v in sliced}

    def body(state: tuple, turn: tuple) -> tuple:
        (carry, thread), (xs, given) = state, turn
        outs, records, thread = again([*inputs[:const], *carry, *xs], given, thread)
        records = {n: x for n, x in records.items() if n not in known}
        return (outs[:carried], thread), (outs[carried:], records)

    (carry, thread), (ys, records) = lax.scan(
        body,
        (inputs[const:first], thread),
        (inputs[first:], given),
        **primitives.scan_options(eqn),
    )
    return Done([*carry, *ys], records | known, thread)


def weights(
    node: JaxprPlan,
    values: Sequence[Any],
    sites: Mapping[int, Site | Door],
    dtype: Any,
    depth: int = 0,
) -> tuple[list[Any], dict[int, jax.Array]]:
    """Views of parameters up to the sites where they are used, without casts.

    Args:
      node: The program.
      values: Of its inputs, parameters of one dtype and constants; None for others.
      sites: By number, those to look at, and doors.
      dtype: Of parameters.
      depth: How many loops there are around.

    Returns:
      The outputs that are views, None for others; and by number the weights,
      `[loops that slice..., weight]`.
    """
    jaxpr, needed, at_sites = node.jaxpr, node.needed, {}
    pairs = zip(jaxpr.constvars, node.consts, strict=True)
    env: dict[Any, Any] = {v: x for v, x in pairs if v in needed}
    env.update(zip(jaxpr.invars, values, strict=True))
    read = lambda v: None if _compat.is_literal(v) else env.get(v)
    for k, eqn in enumerate(jaxpr.eqns):
        inputs = [read(v) for v in eqn.invars]
        if any(v in needed for v in eqn.outvars):
            env.update(zip(eqn.outvars, _compat.evaluate(eqn, inputs), strict=True))
            continue
        if all(x is None for x in inputs):
            continue
        for branch in node.branches.get(k, ()):
            some = _handed(branch, inputs[1:], eqn.invars[1:])
            at_sites |= weights(branch, some, sites, dtype, depth)[1]
        inner, node_sites = node.inner.get(k), node.sites.get(k, ())
        if inner is not None:
            inputs = _handed(inner, inputs, eqn.invars)
        at_sites |= {
            door.number: inputs[door.weight]
            for door in node.doors.get(k, ())
            if door.number in sites
        }
        if inner is not None and eqn.primitive.name in CALLS:
            outs, inside = weights(inner, inputs, sites, dtype, depth)
            env.update(zip(eqn.outvars, outs, strict=True))
            at_sites.update(inside)
        elif inner is not None:
            at_sites.update(_in_loop(inner, eqn, inputs, sites, dtype, depth))
        elif node_sites:
            at_sites |= {
                s.number: inputs[s.weight] for s in node_sites if s.number in sites
            }
        elif any(node.views.get(k, ())):
            env.update(zip(eqn.outvars, _move(eqn, inputs, dtype), strict=True))
    return [read(v) for v in jaxpr.outvars], at_sites


def _handed(inner: JaxprPlan, inputs: Sequence[Any], named: Sequence[Any]) -> list:
    """Inputs of a program inside, with numbers that are needed there."""
    needs = lambda v, w: _compat.is_literal(v) and w in inner.needed
    triples = zip(inputs, named, inner.jaxpr.invars, strict=True)
    return [_literal(v) if needs(v, w) else x for x, v, w in triples]


def _move(eqn: Any, inputs: list, dtype: Any) -> list:
    """A cast is left out, what has no part in the derivative is zero."""
    if eqn.primitive.name == primitives.CONVERT:
        return inputs
    floats = lambda v: jnp.issubdtype(v.aval.dtype, jnp.floating)

    def value(x: Any, v: Any) -> Any:
        if _compat.is_literal(v):
            x = v.val
        elif x is None:
            return jnp.zeros(v.aval.shape, dtype if floats(v) else v.aval.dtype)
        return jnp.asarray(x, dtype) if floats(v) else x

    values = [value(x, v) for x, v in zip(inputs, eqn.invars, strict=True)]
    return _compat.evaluate(eqn, values, literals=False)


def _in_loop(
    inner: JaxprPlan, eqn: Any, inputs: list, sites: Any, dtype: Any, depth: int
) -> dict:
    """A slice each turn becomes a dimension, what is the same each turn stays so."""
    consts, carried = _compat.scan_sizes(eqn)
    first = consts + carried
    inside = {n: sites[n] for n in inner.numbers() & sites.keys()}
    if not inside:
        return {}
    fixed = [*inputs[:consts], *[None] * carried]
    turn = lambda xs: weights(inner, [*fixed, *xs], inside, dtype, depth + 1)[1]
    if all(x is None for x in inputs[first:]):
        return turn(inputs[first:])
    # In a mapped function a site that no parameter reaches would be missing.
    present = jax.eval_shape(lambda xs: turn([x if x is None else x[0] for x in xs]),
                             inputs[first:])  # fmt: skip
    axes = {n: 0 if inside[n].sliced[depth] else None for n in present}
    return jax.vmap(turn, out_axes=axes)(inputs[first:])


def at_sites(
    root: JaxprPlan,
    params: Mapping[int, int] | Sequence[int],
    inputs: Sequence[Any],
    dtype: Any,
    sites: Mapping[int, Site | Door],
) -> Callable[[Mapping[int, jax.Array]], dict[int, jax.Array]]:
    """The map from leaves to weights at sites.

    Args:
      root: The program.
      params: Which inputs are parameters, by number of the leaf.
      inputs: Of the program; only constants that views depend on are looked at.
      dtype: Of the leaves.
      sites: Those to look at, and doors.

    Returns:
      A function of leaves by number; those left out count as zero.
    """
    pairs = zip(inputs, root.jaxpr.invars, strict=True)
    fixed = [x if v in root.needed else None for x, v in pairs]

    def run(leaves: Mapping[int, jax.Array]) -> dict[int, jax.Array]:
        values = list(fixed)
        for k, leaf in leaves.items():
            values[params[k]] = leaf
        return weights(root, values, sites, dtype)[1]

    return run


def coefficients(
    plan: Plan, params: Sequence[int], inputs: Sequence[Any], dtype: Any
) -> dict[int, jax.Array]:
    """By number of the site those of its weight, `[loops that slice..., weight]`.

    The weight is an affine function of leaves, of one element of them in each of its
    own: the derivative in the direction of ones is what each is multiplied by. Nothing
    where no weight has coefficients.
    """
    used = lambda site: [p for p in site.view.parts if p.leaf is not None]
    has = lambda site: any(p.scaled is not None for p in used(site))
    every = plan.everywhere()
    uses = [site for places in plan.uses for site, _ in places]  # with all their loops
    scaled = {x.number: x for x in uses if x.number in every and has(x)}
    if not scaled:
        return {}
    leaves: set[Any] = {part.leaf for site in scaled.values() for part in used(site)}
    views = {k: inputs[params[k]].astype(dtype) for k in leaves}
    run = at_sites(plan.root, params, inputs, dtype, scaled)
    found = jax.jvp(run, (views,), (jax.tree.map(jnp.ones_like, views),))[1]
    # Of a large constant XLA would compute at compile time, slowly, what is made of it.
    large = lambda n: any(part.scaled for part in used(scaled[n]))
    return {n: lax.optimization_barrier(x) if large(n) else x for n, x in found.items()}
