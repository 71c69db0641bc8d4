"""Norms of every example's gradient from one pass, and weighted sums of them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx import _compat
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
      data: Recorded operands, `[B, loops..., ...]`, by number.
      deltas: Gradients with respect to outputs, `[B, loops..., ...]`, by number of the
        tap.
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
            visit = functools.partial(_probe, plan, taps) if ghost else None
            outs, data = _run.run(
                plan.root, values, plan.sites, {} if ghost else taps, visit
            )
            return outs[0], (outs[1:], data)

        taps = _found(plan) if ghost else _taps(plan)
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
        site = plan.sites[n]
        form = lambda x, d, site=site: _sites.weight_gradient(
            site, x[None], wide(d)[None])  # fmt: skip
        formed[n] = jax.vmap(form)(data[site.data], deltas[site.tap])
    rest = [site for n, site in plan.sites.items() if n not in formed]
    data = {site.data: data[site.data] for site in rest if site.data is not None}
    deltas = {site.tap: deltas[site.tap] for site in rest}
    return outs, Tape(data, deltas, leaves, formed, None)


def _found(plan: Plan) -> jax.Array:
    """Where squared norms are added up, `[L]`."""
    value = plan.root.jaxpr.outvars[0].aval
    return _zeros((len(plan.roads),), value).astype(dtype(plan))


def _taps(plan: Plan) -> dict[int, jax.Array]:
    def zeros(site: Site) -> jax.Array:
        out = site.eqn.outvars[0].aval
        return _zeros((*(n for _, n in site.loops), *out.shape), out)

    return {site.tap: zeros(site) for site in plan.sites.values()}


def _zeros(shape: tuple[int, ...], like: Any) -> jax.Array:
    """Of the dtype of a type, varying over the same axes of `jax.shard_map`."""
    return _compat.vary(jnp.zeros(shape, like.dtype), _compat.axes_of_type(like))


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
        seen = [(s, p, tape.data.get(s.data), tape.deltas[s.tap]) for s, p in places]
        total += _of_region(seen)
    return total


def _of_region(places: list) -> jax.Array:
    """From all uses of one region of a leaf, each with what was recorded there."""
    site = places[0][0]
    if site.kind in _sites.ADD:
        return _squares.square(sum(_sites.direct(s, p, d) for s, p, _, d in places))
    factors = [_sites.factors(*place) for place in places]
    return _squares.square_of_products(factors, site.eqn.params.get("precision"))


def _probe(
    plan: Plan, found: jax.Array, site: Site, inputs: list, apply: Callable, _: Any
) -> jax.Array:
    """The output; its backward pass adds squared norms to the gradient of `found`.

    So nothing is kept, and rematerialization goes on saving memory.
    """
    parts = [p for p in site.view.parts
             if p.leaf is not None and plan.roads[p.leaf] != "instantiated"]  # fmt: skip

    @jax.custom_vjp
    def probe(data, out, found):
        return out

    def backward(data, delta):
        found = _found(plan)
        turn = site._replace(loops=())
        for part in parts:
            x = _of_region([(turn, part._replace(stack=()), data, delta)])
            found = found.at[part.leaf].add(x.astype(found.dtype))
        return None, delta, found

    probe.defvjp(lambda data, out, found: (out, data), backward)
    data = None if site.data is None else inputs[site.operand]
    return probe(data, apply(*inputs), found)


# ---------------------------------------------------------------------------- sums


def weighted_sum(
    program: Program,
    inputs: Sequence[Any],
    tape: Tape,
    factor: jax.Array,
    index: Sequence[int],
    good: jax.Array,
) -> list[jax.Array]:
    """Sums over examples of gradients times factors, by leaf, in float32 or wider.

    Args:
      program: The loss.
      inputs: As for `record`.
      tape: From `record`.
      factor: `[B, G]`, 0 where an example is not good.
      index: By leaf its group.
      good: bool `[B]`, which examples have only finite numbers on the tape.
    """
    plan = program.plan
    params = [wide(inputs[k]) for k in program.params]
    sums = [jnp.zeros_like(p) for p in params]
    for leaf, x in tape.leaves.items():
        x = _mask(_scale(x, factor, ((index[leaf], 0),), None), good)
        sums[leaf] = x.sum(0, dtype=params[leaf].dtype)
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
    groups = {n: _groups(site, index) for n, site in plan.sites.items()}
    if tape.squares is None:
        grads = _of_sites(plan, tape, found, factor, groups, good)
        for n, x in tape.formed.items():
            axis = _axis_of_weight(plan.sites[n])
            grads[n] = _mask(_scale(x, factor, groups[n], axis), good).sum(0)
    else:
        inputs = _stand_in(program, inputs, good)
        grads = _second_pass(program, inputs, found, factor, groups)
    like = lambda x, w: _compat.reshard(x.astype(common), _compat.explicit_spec(w))
    (back,) = pull({n: like(grads[n], w) for n, w in found.items()})
    for leaf, x in back.items():
        sums[leaf] = x.astype(params[leaf].dtype)
    if tape.squares is None:
        return sums
    # Without a good example there is none to stand in.
    return [jnp.where(good.any(), x, jnp.zeros_like(x)) for x in sums]


def _of_sites(
    plan: Plan,
    tape: Tape,
    found: dict,
    factor: jax.Array,
    groups: dict,
    good: jax.Array,
) -> dict[int, jax.Array]:
    """Sums at the sites that are not formed.

    A factor belongs to the gradient of an output, unless the parts of the weight lie
    side by side along what is summed over; then it belongs to the data.
    """
    data, deltas, pairs = {}, {}, {}
    for n, site in plan.sites.items():
        if n in tape.formed:
            continue
        in_data, k = _sites.where_axis(site)
        axis = None if k is None else 1 + len(site.loops) + k
        a, d = tape.data.get(site.data), tape.deltas[site.tap]
        # Sites that share what is recorded share what is scaled, if factors agree.
        first, second = (site.data,), (site.tap, axis, groups[n])
        if in_data:
            first, second = (site.data, axis, groups[n]), (site.tap,)
        if first not in data:
            data[first] = _scale(a, factor, groups[n], axis) if in_data else a
        if second not in deltas:
            deltas[second] = wide(d) if in_data else _scale(d, factor, groups[n], axis)
        pairs[n] = list(data).index(first), list(deltas).index(second)
    if not pairs:
        return {}

    def sums(data, deltas):
        # An addition has no data: `None` is kept in its place.
        return {
            n: _sites.weight_gradient(plan.sites[n], data[a], deltas[d], found[n])
            for n, (a, d) in pairs.items()
        }

    def again(state):
        done, data, deltas, _ = state
        # A factor of 0 is not enough: 0 times NaN is NaN.
        data, deltas = jax.tree.map(lambda x: _mask(x, good), (data, deltas))
        return ~done, data, deltas, sums(data, deltas)

    # Hardly ever. A loop works in place, where a branch would copy its results.
    both = list(data.values()), list(deltas.values())
    # A sum of numbers: one all-reduce with those of the gradients.
    bad = jnp.where(good, 0.0, 1.0).sum()
    state = (bad == 0, *both, sums(*both))
    return jax.lax.while_loop(lambda state: ~state[0], again, state)[3]


def _mask(x: jax.Array, good: jax.Array) -> jax.Array:
    return jnp.where(good.reshape((-1,) + (1,) * (x.ndim - 1)), x, jnp.zeros_like(x))


def _stand_in(program: Program, inputs: Sequence[Any], good: jax.Array) -> list:
    """A good example in the place of each that is not."""
    mapped = [x for x, m in zip(inputs, program.mapped, strict=True) if m]

    def replace(mapped):
        rows = jnp.where(good, jnp.arange(good.shape[0]), jnp.argmax(good))
        return [x[rows] for x in mapped]

    mapped = iter(jax.lax.cond(good.all(), lambda xs: xs, replace, mapped))
    return [next(mapped) if m else x
            for x, m in zip(inputs, program.mapped, strict=True)]  # fmt: skip


def _groups(site: Site, index: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """For every part of a weight its group, and how long it is."""
    parts = [(0 if p.leaf is None else index[p.leaf], p.stop - p.start)
             for p in site.view.parts]  # fmt: skip
    found = {index[p.leaf] for p in site.view.parts if p.leaf is not None}
    return ((*found, 0),) if len(found) == 1 else tuple(parts)


def _axis_of_weight(site: Site) -> int | None:
    axis = site.view.axis
    return None if axis is None else 1 + sum(site.sliced) + axis


def _scale(x: jax.Array, factor: jax.Array, groups: tuple, axis: int | None) -> Any:
    """Multiplies `[B, ...]` by factors `[B, G]`, those of the groups along `axis`."""
    if len(groups) == 1:
        row, shape = factor[:, groups[0][0]], (x.shape[0],) + (1,) * (x.ndim - 1)
    else:
        rows = [jnp.broadcast_to(factor[:, i, None], (x.shape[0], n)) for i, n in groups]
        row, shape = jnp.concatenate(rows, axis=1), [1] * x.ndim
        shape[0], shape[axis] = row.shape
    return wide(x) * row.reshape(shape).astype(wide(x).dtype)


def _second_pass(
    program: Program, inputs: Sequence[Any], found: dict, factor: jax.Array, groups: dict
) -> dict[int, jax.Array]:
    """Weighted sums by an ordinary backward pass, which rematerializes."""
    plan = program.plan
    axes = tuple(0 if mapped else None for mapped in program.mapped)

    def loss(weights, row, *values):
        def visit(site, inputs, apply, weight):
            # Data get the gradient as it is, the weight gets it times the factor.
            some = groups[site.number]
            times = lambda x, axis: _scale(x[None], row[None], some, axis)[0]
            data = jax.lax.stop_gradient(inputs[site.operand])
            if jnp.issubdtype(data.dtype, jnp.floating):
                data = data.astype(weight.dtype)
            in_data, k = _sites.where_axis(site)
            axis = None if k is None else k + 1
            if in_data:
                scaled = _sites.apply(site, weight, times(data, axis))
            else:
                scaled = times(_sites.apply(site, weight, data), axis)
            out = apply(*inputs)
            return _run.tap(out, scaled.astype(out.dtype))

        outs, _ = _run.run(plan.root, values, plan.sites, {}, visit, weights)
        return outs[0]

    batched = jax.vmap(loss, (None, 0, *axes))
    value, pull = jax.vjp(lambda weights: batched(weights, factor, *inputs), found)
    return pull(jnp.ones_like(value))[0]
