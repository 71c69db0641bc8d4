"""Norms of every example's gradient from one pass, and weighted sums of them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx.per_example import _run, _sites, _squares
from clipfx.per_example._plan import Plan
from clipfx.per_example._sites import Site


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
      data: By site the recorded operand, `[B, loops..., ...]`.
      deltas: By site the gradient with respect to its output, `[B, loops..., ...]`.
      leaves: By leaf the gradient of each example, `[B, ...]`, where instantiated.
      formed: By site the gradient of each example with respect to its weight.
      squares: `[B, L]`, squared norms by leaf, if they were measured on the way.
    """

    data: dict[int, jax.Array]
    deltas: dict[int, jax.Array]
    leaves: dict[int, jax.Array]
    formed: dict[int, jax.Array]
    squares: jax.Array | None


def record(program: Program, inputs: Sequence[Any], *, norms: bool) -> tuple:
    """Runs forward and backward once.

    Args:
      program: The loss.
      inputs: Its inputs, flat, those that are mapped `[B, ...]`.
      norms: Whether norms will be asked for.

    Returns:
      Outputs `[B, ...]`, and the `Tape`.
    """
    plan = program.plan
    direct = [k for k, road in enumerate(plan.roads) if road == "instantiated"]
    params = [inputs[k] for k in program.params]
    ghost = plan.remat and norms

    def one(*example):
        def loss(leaves, taps):
            values = list(example)
            for k, leaf in leaves.items():
                values[program.params[k]] = leaf
            if ghost:
                visit = lambda s, xs, apply, _: (
                    _probe(s, plan, xs[s.operand], apply(*xs), taps), None)  # fmt: skip
                outs, data = _run.run(plan.root, values, plan.sites, visit, {})
            else:
                outs, data = _run.run(plan.root, values, plan.sites, _visit, taps)
            return outs[0], (outs[1:], data)

        taps = jnp.zeros(len(params), jnp.float32) if ghost else _taps(plan)
        leaves = {k: params[k] for k in direct}
        value, pull, (aux, data) = jax.vjp(loss, leaves, taps, has_aux=True)
        leaves, deltas = pull(jnp.ones_like(value))
        return [value, *aux], data, leaves, deltas

    axes = tuple(0 if mapped else None for mapped in program.mapped)
    outs, data, leaves, deltas = jax.vmap(one, axes)(*inputs)
    if ghost:
        return outs, Tape({}, {}, leaves, {}, deltas)
    formed = {}
    for n in plan.formed if norms else ():
        form = lambda x, d, site=plan.sites[n]: _sites.weight_gradient(
            site, x[None], wide(d)[None])  # fmt: skip
        formed[n] = jax.vmap(form)(data.pop(n), deltas.pop(n))
    return outs, Tape(data, deltas, leaves, formed, None)


def _visit(site: Site, inputs: list, apply: Callable, tap: Any) -> tuple:
    return _run.tap(apply(*inputs), tap), inputs[site.operand]


def _taps(plan: Plan) -> dict[int, jax.Array]:
    def zeros(site: Site) -> jax.Array:
        out = site.eqn.outvars[0].aval
        return jnp.zeros((*(n for _, n in site.loops), *out.shape), out.dtype)

    return {n: zeros(site) for n, site in plan.sites.items()}


def wide(x: jax.Array) -> jax.Array:
    """In float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# --------------------------------------------------------------------------- norms


def squares(plan: Plan, tape: Tape) -> jax.Array:
    """Squared norms `[B, L]` of each example's gradient, by leaf."""
    if tape.squares is None:
        return _stacked(plan, tape, lambda x: 0)[0]
    found = tape.squares
    for leaf, x in tape.leaves.items():
        found = found.at[:, leaf].add(jax.vmap(_squares.square)(x))
    return found


def scaled_squares(plan: Plan, tape: Tape) -> tuple[jax.Array, jax.Array]:
    """The same for any magnitudes: the norm is `sqrt(square) * 2**exponent`."""
    if tape.squares is None:
        return _stacked(plan, tape, _exponent)
    found = squares(plan, tape)
    return found, jnp.zeros(found.shape, jnp.int32)


def _stacked(plan: Plan, tape: Tape, exponent: Callable) -> tuple:
    def one(tape: Tape) -> tuple:
        leaves = range(len(plan.roads))
        found = [_of_leaf(plan, leaf, tape, exponent) for leaf in leaves]
        dtype = jnp.result_type(jnp.float32, *(x for x, _ in found))
        exponents = jnp.stack([jnp.asarray(e, jnp.int32) for _, e in found])
        return jnp.stack([x.astype(dtype) for x, _ in found]), exponents

    return jax.vmap(one)(tape)


def _exponent(x: jax.Array) -> jax.Array:
    """Of the power of two above the largest finite entry."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.int32(0)
    size = jnp.where(jnp.isfinite(x), jnp.abs(wide(x)), 0).max(initial=0)
    return jnp.frexp(size)[1].astype(jnp.int32)


def _shift(x: jax.Array, exponent: Any) -> jax.Array:
    """`x / 2**exponent`."""
    if isinstance(exponent, int):
        return x
    # Twice half of it: the power of two itself may be out of range.
    half = exponent // 2
    power = lambda k: jnp.ldexp(jnp.ones((), wide(x).real.dtype), -k)
    return wide(x) * power(half) * power(exponent - half)


def _larger(a: Any, b: Any) -> Any:
    return max(a, b) if isinstance(a, int) else jnp.maximum(a, b)


def _of_leaf(plan: Plan, leaf: int, tape: Tape, exponent: Callable) -> tuple:
    """The square of one example's gradient, and the exponent taken out of its norm."""
    if leaf in tape.leaves:
        out = exponent(tape.leaves[leaf])
        return _squares.square(_shift(tape.leaves[leaf], out)), out
    places = plan.uses[leaf]
    numbers = {site.number for site, _ in places}
    if numbers & tape.formed.keys():
        ((site, part),) = places
        x = tape.formed[site.number]
        if site.view.axis is not None:
            axis = sum(site.sliced) + site.view.axis
            x = jax.lax.slice_in_dim(x, part.start, part.stop, axis=axis)
        out = exponent(x)
        return _squares.square(_shift(x, out)), out
    data = {n: exponent(tape.data[n]) for n in numbers}
    deltas = {n: exponent(tape.deltas[n]) for n in numbers}
    out = functools.reduce(_larger, [data[n] + deltas[n] for n in numbers])
    groups: dict[Any, list] = {}
    for site, part in places:
        groups.setdefault(part.region or site.number, []).append((site, part))
    total = jnp.float32(0)
    for some in groups.values():
        factors = []
        for site, part in some:
            x, d = tape.data[site.number], tape.deltas[site.number]
            if jnp.issubdtype(x.dtype, jnp.inexact):
                x = _shift(x, data[site.number])
            d = _shift(d, out - data[site.number])
            factors.append(_sites.factors(site, part, x, d))
        precision = some[0][0].eqn.params.get("precision")
        total += _squares.square_of_products(factors, precision)
    return total, out


def _probe(site: Site, plan: Plan, data: Any, out: Any, found: Any) -> jax.Array:
    """`out`, whose backward pass adds squared norms to the gradient of `found`.

    So nothing is kept, and rematerialization goes on saving memory.
    """
    parts = [p for p in site.view.parts
             if p.leaf is not None and plan.roads[p.leaf] != "instantiated"]  # fmt: skip

    @jax.custom_vjp
    def probe(data, out, found):
        return out

    def backward(data, delta):
        found = jnp.zeros(len(plan.roads), jnp.float32)
        turn, precision = site._replace(loops=()), site.eqn.params.get("precision")
        for part in parts:
            factors = _sites.factors(turn, part._replace(stack=()), data, delta)
            x = _squares.square_of_products([factors], precision)
            found = found.at[part.leaf].add(x.astype(found.dtype))
        return None, delta, found

    probe.defvjp(lambda data, out, found: (out, data), backward)
    return probe(data, out, found)


# ---------------------------------------------------------------------------- sums


def weighted_sum(
    program: Program, inputs: Sequence[Any], tape: Tape, factor: jax.Array
) -> list[jax.Array]:
    """The sum over examples of each gradient times its factor.

    Args:
      program: The loss.
      inputs: As for `record`.
      tape: From `record`.
      factor: `[B, L]`, by example and leaf.

    Returns:
      Per leaf, in float32 or wider.
    """
    plan = program.plan
    params = [wide(inputs[k]) for k in program.params]
    sums = [jnp.zeros_like(p) for p in params]
    for leaf, x in tape.leaves.items():
        f = factor[:, leaf].astype(params[leaf].dtype)
        sums[leaf] = jnp.tensordot(f, x.astype(f.dtype), 1)
    if not plan.sites:
        return sums
    # One dtype for all, because views may join leaves.
    views = {k: p for k, p in enumerate(params) if k not in tape.leaves}
    dtype = jnp.result_type(*views.values())
    views = {k: p.astype(dtype) for k, p in views.items()}

    def at_sites(views):
        values = [None] * len(inputs)
        for k, leaf in views.items():
            values[program.params[k]] = leaf
        return _run.weights(plan.root, values, plan.sites)[1]

    found, pull = jax.vjp(at_sites, views)
    if tape.squares is None:
        grads = {n: _of_site(plan, n, tape, factor) for n in found}
    else:
        grads = _second_pass(program, inputs, found, factor)
    (back,) = pull({n: grads[n].astype(dtype) for n in found})
    for leaf, x in back.items():
        sums[leaf] = x.astype(params[leaf].dtype)
    return sums


def only(
    program: Program, inputs: Sequence[Any], tape: Tape, good: jax.Array
) -> tuple[list[Any], Tape]:
    """Inputs and tape without the examples where `good` `[B]` is False.

    A factor of 0 is not enough: 0 times NaN is NaN.
    """

    def mask(x):
        return jnp.where(good.reshape((-1,) + (1,) * (x.ndim - 1)), x, jnp.zeros_like(x))

    masked = jax.tree.map(mask, tape._replace(squares=None))
    if tape.squares is None:
        return list(inputs), masked
    # A second pass is to come: a good example stands in, with factor 0.
    rows = jnp.where(good, jnp.arange(good.shape[0]), jnp.argmax(good))
    stand_in = [x[rows] if m else x for x, m in zip(inputs, program.mapped, strict=True)]
    return stand_in, masked._replace(squares=tape.squares)


def scale(tape: Tape, factor: jax.Array) -> Tape:
    """Multiplies gradients by powers of two `[B]`, and takes them out of large data.

    So that later factors, which may be tiny, meet numbers of ordinary size.
    """

    def one(tape: Tape, factor: jax.Array) -> Tape:
        times = lambda x: wide(x) * factor.astype(wide(x).dtype)
        out = {n: jnp.maximum(_exponent(x), 0) for n, x in tape.data.items()}
        move = lambda x, e: _shift(x, e) if jnp.issubdtype(x.dtype, jnp.inexact) else x
        return tape._replace(
            data={n: move(x, out[n]) for n, x in tape.data.items()},
            deltas={n: _shift(times(x), -out[n]) for n, x in tape.deltas.items()},
            leaves=jax.tree.map(times, tape.leaves),
            formed=jax.tree.map(times, tape.formed),
        )

    return tape if tape.squares is not None else jax.vmap(one)(tape, factor)


def _of_site(plan: Plan, number: int, tape: Tape, factor: jax.Array) -> jax.Array:
    """The weighted sum of gradients with respect to the weight at a site."""
    site = plan.sites[number]
    axis = site.view.axis
    if number in tape.formed:
        x = tape.formed[number]
        k = None if axis is None else 1 + sum(site.sliced) + axis
        return _scale(site, x, factor, k).sum(0)
    data, delta = tape.data[number], wide(tape.deltas[number])
    lead = 1 + len(site.loops)
    in_data, k = _sites.where_axis(site)
    if in_data:
        data = _scale(site, data.astype(delta.dtype), factor, lead + k)
    else:
        delta = _scale(site, delta, factor, None if k is None else lead + k)
    return _sites.weight_gradient(site, data, delta)


def _scale(site: Site, x: jax.Array, factor: jax.Array, axis: int | None) -> jax.Array:
    """Multiplies `[B, ...]` by factors, different ones for the parts along `axis`."""
    leaves = [p.leaf for p in site.view.parts]
    columns = [jnp.zeros_like(factor[:, 0]) if k is None else factor[:, k]
               for k in leaves]  # fmt: skip
    if axis is None:
        row, shape = columns[0], (x.shape[0],) + (1,) * (x.ndim - 1)
    else:
        sizes = [p.stop - p.start for p in site.view.parts]
        row = jnp.concatenate(
            [jnp.broadcast_to(c[:, None], (x.shape[0], n))
             for c, n in zip(columns, sizes, strict=True)], axis=1)  # fmt: skip
        shape = [1] * x.ndim
        shape[0], shape[axis] = row.shape
    return x * row.reshape(shape).astype(x.dtype)


def _second_pass(
    program: Program, inputs: Sequence[Any], found: dict, factor: jax.Array
) -> dict[int, jax.Array]:
    """Weighted sums by an ordinary backward pass, which rematerializes."""
    plan = program.plan
    axes = tuple(0 if mapped else None for mapped in program.mapped)

    def loss(weights, row, *values):
        def visit(site, values, apply, weight):
            # Data get the gradient as it is, the weight gets it times the factor.
            data = jax.lax.stop_gradient(values[site.operand])
            if jnp.issubdtype(data.dtype, jnp.floating):
                data = data.astype(weight.dtype)
            in_data, k = _sites.where_axis(site)
            one = lambda x, axis: _scale(site, x[None], row[None], axis)[0]
            if in_data:
                scaled = _sites.apply(site, weight, one(data, k + 1))
            else:
                scaled = _sites.apply(site, weight, data)
                scaled = one(scaled, None if k is None else k + 1)
            out = apply(*values)
            return _run.tap(out, scaled.astype(out.dtype)), None

        return _run.run(plan.root, values, plan.sites, visit, weights)[0][0]

    batched = jax.vmap(loss, (None, 0, *axes))
    value, pull = jax.vjp(lambda weights: batched(weights, factor, *inputs), found)
    return pull(jnp.ones_like(value))[0]
