"""Runs a program again: with taps at its sites, or only its views of parameters."""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from clipfx import _compat
from clipfx.per_example.engine.plan import CALLS, REMAT, Node
from clipfx.per_example.engine.sites import Site

Visit = Callable[[Site, list, Callable, Any], Any]


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
    node: Node,
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
      visit: `visit(site, inputs, apply, given) -> output` is called instead of
        recording; `apply(*inputs)` runs the equation.
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
        inner, site = node.inner.get(k), node.sites.get(k)
        if inner is not None and inner.numbers() & sites.keys():
            again = functools.partial(_again, inner, sites, visit)
            outs, found = _inside(inner, eqn, inputs, taps, given, again)
            records.update(found)
            outs = [outs[i] for i in keep]
        elif site is not None and site.number in sites and visit is not None:
            apply = functools.partial(_apply, jaxpr, eqn)
            outs = [visit(site, inputs, apply, given.get(site.number))][: len(keep)]
        else:
            outs = _compat.evaluate(jaxpr, eqn, inputs, keep)
            if site is not None and site.number in sites and site.data is not None:
                records[site.data] = inputs[site.operand]
        if outs and node.taps.get(k) in taps:
            outs = [tap(outs[0], taps[node.taps[k]]), *outs[1:]]
        env.update(zip([eqn.outvars[i] for i in keep], outs, strict=True))
    return [read(v) for v in jaxpr.outvars], records


def _again(
    inner: Node, sites: Any, visit: Any, values: Any, taps: Any, given: Any
) -> tuple[list, dict]:
    return run(inner, values, sites, taps, visit, given)


def _apply(jaxpr: Any, eqn: Any, *inputs: Any) -> Any:
    return _compat.evaluate(jaxpr, eqn, inputs, [0])[0]


def _inside(
    inner: Node, eqn: Any, inputs: list, taps: Any, given: Any, again: Callable
) -> tuple[list, dict]:
    p, name = eqn.params, eqn.primitive.name
    taps = {n: taps[n] for n in inner.all_taps() if n in taps}
    given = {n: given[n] for n in inner.numbers() if n in given}
    if name in REMAT:
        wrapped = jax.checkpoint(
            again, prevent_cse=p["prevent_cse"], policy=p["policy"]
        )
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
        outs, found = again([*inputs[:const], *carry, *xs], taps, given)
        found = {n: x for n, x in found.items() if n not in known}
        return outs[:carried], (outs[carried:], found)

    carry, (ys, found) = lax.scan(
        body,
        inputs[const:first],
        (inputs[first:], taps, given),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*carry, *ys], found | known


def weights(
    node: Node, values: Sequence[Any], sites: Mapping[int, Site], depth: int = 0
) -> tuple[list[Any], dict[int, jax.Array]]:
    """Views of parameters up to the sites where they are used, without casts.

    Args:
      node: The program.
      values: Parameters of one dtype; None for all other inputs, which count as zero.
      sites: By number, those to look at.
      depth: How many loops there are around.

    Returns:
      The outputs that are views, None for others; and by number the weights,
      `[loops that slice..., weight]`.
    """
    jaxpr, found = node.jaxpr, {}
    env = dict(zip(jaxpr.invars, values, strict=True))
    read = lambda v: None if _compat.is_literal(v) else env.get(v)
    for k, eqn in enumerate(jaxpr.eqns):
        inputs = [read(v) for v in eqn.invars]
        if all(x is None for x in inputs):
            continue
        inner, site = node.inner.get(k), node.sites.get(k)
        if inner is not None and eqn.primitive.name in CALLS:
            outs, inside = weights(inner, inputs, sites, depth)
            env.update(zip(eqn.outvars, outs, strict=True))
            found.update(inside)
        elif inner is not None:
            found.update(_in_loop(inner, eqn, inputs, sites, depth))
        elif site is not None and site.number in sites:
            found[site.number] = inputs[site.weight]
        elif any(node.views.get(k, ())):
            env.update(zip(eqn.outvars, _move(jaxpr, eqn, inputs), strict=True))
    return [read(v) for v in jaxpr.outvars], found


def _move(jaxpr: Any, eqn: Any, inputs: list) -> list:
    """A cast is left out, what is not a parameter is zero."""
    if eqn.primitive.name == "convert_element_type":
        return inputs
    known = next(x for x in inputs if x is not None)
    zeros = lambda v: jnp.zeros(
        v.aval.shape,
        known.dtype if jnp.issubdtype(v.aval.dtype, jnp.floating) else v.aval.dtype,
    )
    values = [_literal(v) if _compat.is_literal(v) else zeros(v) if x is None else x
              for x, v in zip(inputs, eqn.invars, strict=True)]  # fmt: skip
    return _compat.evaluate(jaxpr, eqn, values, list(range(len(eqn.outvars))))


def _in_loop(inner: Node, eqn: Any, inputs: list, sites: Any, depth: int) -> dict:
    """A slice each turn becomes a dimension, what is the same each turn stays so."""
    consts, carried = _compat.scan_sizes(eqn)
    first = consts + carried
    here = {n: sites[n] for n in inner.numbers() & sites.keys()}
    if not here:
        return {}
    fixed = [*inputs[:consts], *[None] * carried]
    turn = lambda xs: weights(inner, [*fixed, *xs], here, depth + 1)[1]
    if all(x is None for x in inputs[first:]):
        return turn(inputs[first:])
    # In a mapped function a site that no parameter reaches would be missing.
    present = jax.eval_shape(lambda xs: turn([x if x is None else x[0] for x in xs]),
                             inputs[first:])  # fmt: skip
    axes = {n: 0 if here[n].sliced[depth] else None for n in present}
    return jax.vmap(turn, out_axes=axes)(inputs[first:])
