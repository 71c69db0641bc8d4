"""Runs a program again: with taps at its sites, or only its views of parameters."""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from clipfx import _compat
from clipfx.per_example.engine import primitives
from clipfx.per_example.engine.plan import JaxprPlan, Plan
from clipfx.per_example.engine.primitives import CALLS, REMAT
from clipfx.per_example.engine.rules.site import Site

Visit = Callable[[Site, list, jax.Array, Any], Any]


@jax.custom_jvp
def tap(x: jax.Array, tapped: jax.Array) -> jax.Array:
    """`x`; its derivative is also that with respect to `tapped`, which costs nothing.

    An addition of zeros would do, if zeros did not have to be stored for each turn of
    a loop.
    """
    return x


@tap.defjvp
def _tap_jvp(primals, tangents):
    return tap(*primals), tangents[0] + tangents[1]


def _literal(v: Any) -> jax.Array:
    return jnp.asarray(v.val, v.aval.dtype)


def run(
    node: JaxprPlan,
    values: Sequence[Any],
    sites: Mapping[int, Site],
    taps: Mapping[int, Any],
    visit: Visit | None = None,
    given: Mapping[int, Any] = types.MappingProxyType({}),
) -> tuple[list[Any], dict[int, Any]]:
    """Runs a program, with taps, and records what sites see.

    Args:
      node: The program.
      values: Of its inputs.
      sites: By number, those that matter.
      taps: By number, `[loops..., ...]`; may be empty.
      visit: `visit(site, inputs, output, given) -> output` is called instead of
        recording.
      given: By number of the site what `visit` is given, `[loops..., ...]`.

    Returns:
      The outputs, and the records by number, stacked over the turns of loops.
    """
    jaxpr = node.jaxpr
    env = dict(zip(jaxpr.constvars, node.consts, strict=True))
    env.update(zip(jaxpr.invars, values, strict=True))
    read = lambda v: _literal(v) if _compat.is_literal(v) else env[v]
    records = {}
    for k, eqn in enumerate(jaxpr.eqns):
        inputs = [read(v) for v in eqn.invars]
        keep = [i for i, v in enumerate(eqn.outvars) if v in node.users]
        inner = node.inner.get(k)
        if inner is not None and inner.numbers() & sites.keys():
            again = functools.partial(_again, inner, sites, visit)
            outs, inside = _inside(inner, eqn, inputs, taps, given, again)
            records.update(inside)
            outs = [outs[i] for i in keep]
        else:
            every = _compat.evaluate(eqn, inputs)
            for site in node.sites.get(k, ()):
                if site.number in sites and visit is not None:
                    every[0] = visit(site, inputs, every[0], given.get(site.number))
                elif site.number in sites and site.operand is not None:
                    records[site.data] = inputs[site.operand]
            outs = [every[i] for i in keep]
        if outs and node.taps.get(k) in taps:
            outs = [tap(outs[0], taps[node.taps[k]]), *outs[1:]]
        env.update(zip([eqn.outvars[i] for i in keep], outs, strict=True))
    return [read(v) for v in jaxpr.outvars], records


def _again(
    inner: JaxprPlan, sites: Any, visit: Any, values: Any, taps: Any, given: Any
) -> tuple[list, dict]:
    return run(inner, values, sites, taps, visit, given)


def _inside(
    inner: JaxprPlan, eqn: Any, inputs: list, taps: Any, given: Any, again: Callable
) -> tuple[list, dict]:
    name = eqn.primitive.name
    taps = {n: taps[n] for n in inner.all_taps() if n in taps}
    given = {n: given[n] for n in inner.numbers() if n in given}
    if name in REMAT:
        wrapped = jax.checkpoint(again, **primitives.remat_options(eqn))
        return wrapped(inputs, taps, given)
    if name in CALLS:
        return again(inputs, taps, given)
    const, carried = _compat.scan_sizes(eqn)
    first = const + carried
    # What a loop takes slices of need not be recorded, it is there.
    sliced = dict(zip(inner.jaxpr.invars[first:], inputs[first:], strict=True))
    known = {n: sliced[v] for v, n in inner.data.items() if v in sliced}

    def body(carry, turn):
        xs, taps, given = turn
        outs, records = again([*inputs[:const], *carry, *xs], taps, given)
        records = {n: x for n, x in records.items() if n not in known}
        return outs[:carried], (outs[carried:], records)

    carry, (ys, records) = lax.scan(
        body,
        inputs[const:first],
        (inputs[first:], taps, given),
        **primitives.scan_options(eqn),
    )
    return [*carry, *ys], records | known


def weights(
    node: JaxprPlan,
    values: Sequence[Any],
    sites: Mapping[int, Site],
    dtype: Any,
    depth: int = 0,
) -> tuple[list[Any], dict[int, jax.Array]]:
    """Views of parameters up to the sites where they are used, without casts.

    Args:
      node: The program.
      values: Of its inputs, parameters of one dtype and constants; None for others.
      sites: By number, those to look at.
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
        inner, node_sites = node.inner.get(k), node.sites.get(k, ())
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
    plan: Plan, params: Sequence[int], inputs: Sequence[Any], dtype: Any
) -> Callable[[Mapping[int, jax.Array]], dict[int, jax.Array]]:
    """The map from leaves to weights at sites.

    Args:
      plan: Decisions.
      params: Which inputs are parameters.
      inputs: Of the program.
      dtype: Of the leaves.

    Returns:
      A function of leaves by number; those left out count as zero.
    """
    root = plan.root
    pairs = zip(inputs, root.jaxpr.invars, strict=True)
    fixed = [x if v in root.needed else None for x, v in pairs]

    def run(leaves: Mapping[int, jax.Array]) -> dict[int, jax.Array]:
        values = list(fixed)
        for k, leaf in leaves.items():
            values[params[k]] = leaf
        return weights(root, values, plan.sites, dtype)[1]

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
    scaled = {n: site for n, site in plan.sites.items() if has(site)}
    if not scaled:
        return {}
    leaves: set[Any] = {part.leaf for site in scaled.values() for part in used(site)}
    views = {k: inputs[params[k]].astype(dtype) for k in leaves}
    run = at_sites(plan._replace(sites=scaled), params, inputs, dtype)
    found = jax.jvp(run, (views,), (jax.tree.map(jnp.ones_like, views),))[1]
    # Of a large constant XLA would compute at compile time, slowly, what is made of it.
    large = lambda n: any(part.scaled for part in used(scaled[n]))
    return {n: lax.optimization_barrier(x) if large(n) else x for n, x in found.items()}
