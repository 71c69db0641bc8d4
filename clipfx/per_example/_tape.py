"""Norms of every example's gradient from one pass, and weighted sums of them."""

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


def record(
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


def dtype(plan: Plan) -> Any:
    """Of norms: float32, or wider where gradients are."""
    found = [site.eqn.outvars[0].aval.dtype for site in plan.sites.values()]
    found += [plan.root.jaxpr.outvars[0].aval.dtype, *plan.dtypes]
    found = [jnp.finfo(x).dtype for x in found]  # real for complex
    return jnp.dtype(jnp.float64 if jnp.dtype(jnp.float64) in found else jnp.float32)


def squares(plan: Plan, tape: Tape) -> jax.Array:
    """Squared norms `[B, L]` of each example's gradient, by leaf."""

    def one(tape: Tape) -> jax.Array:
        found = [_of_leaf(plan, leaf, tape) for leaf in range(len(plan.roads))]
        return jnp.stack([x.astype(dtype(plan)) for x in found])

    if tape.squares is None:
        return jax.vmap(one)(tape)
    found = tape.squares
    for leaf, x in tape.leaves.items():
        found = found.at[:, leaf].add(jax.vmap(_squares.square)(x))
    return found.astype(dtype(plan))


def _of_leaf(plan: Plan, leaf: int, tape: Tape) -> jax.Array:
    """The squared norm of one example's gradient."""
    if leaf in tape.leaves:
        return _squares.square(tape.leaves[leaf])
    groups: dict[Any, list] = {}
    for place in plan.uses[leaf]:
        groups.setdefault(place[1].region or place[0].number, []).append(place)
    total = jnp.float32(0)
    for places in groups.values():
        (site, part), *_ = places
        if site.number in tape.formed:
            x = tape.formed[site.number]
            if site.view.axis is not None:
                axis = sum(site.sliced) + site.view.axis
                x = jax.lax.slice_in_dim(x, part.start, part.stop, axis=axis)
            total += _squares.square(x)
            continue
        factors = [
            _sites.factors(s, p, tape.data[s.number], tape.deltas[s.number])
            for s, p in places
        ]
        precision = site.eqn.params.get("precision")
        total += _squares.square_of_products(factors, precision)
    return total


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


def weigh(plan: Plan, tape: Tape, factor: jax.Array) -> Tape:
    """The tape of losses that are multiplied with `factor`, `[B, L]`, in float32 or wider.

    A factor may differ between the leaves that a weight consists of; where they lie side
    by side along what is summed over, it goes to the data instead.
    """
    data, deltas, formed = dict(tape.data), {}, {}
    for n, d in tape.deltas.items():
        site = plan.sites[n]
        in_data, k = _sites.where_axis(site)
        axis = None if k is None else 1 + len(site.loops) + k
        deltas[n] = wide(d)
        if in_data:
            data[n] = _scale(site, wide(data[n]), factor, axis)
        else:
            deltas[n] = _scale(site, deltas[n], factor, axis)
    for n, x in tape.formed.items():
        k = plan.sites[n].view.axis
        axis = None if k is None else 1 + sum(plan.sites[n].sliced) + k
        formed[n] = _scale(plan.sites[n], x, factor, axis)
    return tape._replace(data=data, deltas=deltas, formed=formed)


def only(tape: Tape, good: jax.Array) -> Tape:
    """The tape without the examples where `good` `[B]` is False.

    A factor of 0 is not enough: 0 times NaN is NaN.
    """

    def mask(x):
        return jnp.where(good.reshape((-1,) + (1,) * (x.ndim - 1)), x, jnp.zeros_like(x))

    return jax.tree.map(mask, tape)


def total(
    program: Program, inputs: Sequence[Any], tape: Tape, factor: jax.Array
) -> list[jax.Array]:
    """Sums over examples, by leaf, in float32 or wider.

    Args:
      program: The loss.
      inputs: As for `record`.
      tape: From `weigh`.
      factor: `[B, L]`, as for `weigh`.
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
    common = jnp.result_type(*views.values())
    views = {k: p.astype(common) for k, p in views.items()}

    def at_sites(views):
        values = [None] * len(inputs)
        for k, leaf in views.items():
            values[program.params[k]] = leaf
        return _run.weights(plan.root, values, plan.sites)[1]

    found, pull = jax.vjp(at_sites, views)
    if tape.squares is None:
        grads = {n: x.sum(0) for n, x in tape.formed.items()}
        for n, d in tape.deltas.items():
            grads[n] = _sites.weight_gradient(plan.sites[n], tape.data[n], d)
    else:
        grads = _second_pass(program, inputs, found, factor)
    (back,) = pull({n: grads[n].astype(common) for n in found})
    for leaf, x in back.items():
        sums[leaf] = x.astype(params[leaf].dtype)
    return sums


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
