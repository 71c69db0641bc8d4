"""Weighted sums of gradients, from what one pass over a batch left behind."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx._core.leaves import widen
from clipfx.per_example.engine import bookkeeping, interpreter
from clipfx.per_example.engine.bookkeeping import Program, Tape
from clipfx.per_example.engine.plan import Plan
from clipfx.per_example.engine.rules.site import Site, floating


def weighted_sum(
    program: Program,
    inputs: Sequence[Any],
    tape: Tape,
    factor: jax.Array | None,
    index: Sequence[int | None],
    good: jax.Array | None,
) -> list[jax.Array]:
    """Sums over examples of gradients times factors, by leaf, in float32 or wider.

    Args:
      program: The loss.
      inputs: As for `backward_pass`.
      tape: From `backward_pass`.
      factor: `[B, G]`, 0 where an example is not good; None for 1.
      index: By leaf its group.
      good: bool `[B]`, which examples have only finite numbers on the tape; None if
        nothing has to be left out.
    """
    plan = program.plan
    params = [widen(inputs[k]) for k in program.params]
    sums = [jnp.zeros_like(p) for p in params]
    for leaf, x in tape.leaves.items():
        x = _mask(_scale(x, factor, ((index[leaf], 0),), None), good)
        sums[leaf] = x.sum(0, dtype=params[leaf].dtype)
    if not plan.sites:
        return sums
    # One dtype for all, because views may join leaves.
    views = {k: p for k, p in enumerate(params) if k not in tape.leaves}
    common = bookkeeping.dtype(plan)
    views = {k: p.astype(common) for k, p in views.items()}

    at_sites = interpreter.at_sites(plan, program.params, inputs, common)
    weights, pull = jax.vjp(at_sites, views)
    groups = {n: _groups(site, index) for n, site in plan.sites.items()}
    if tape.powers is None:
        grads = _of_sites(plan, tape, weights, factor, groups, good)
        for n, x in tape.formed.items():
            axis = _axis_of_weight(plan.sites[n])
            grads[n] = _mask(_scale(x, factor, groups[n], axis), good).sum(0)
    else:
        assert factor is not None and good is not None
        inputs = _stand_in(program, inputs, good)
        grads = _second_pass(program, inputs, weights, factor, groups)
    like = lambda x, w: _compat.as_like(x.astype(common), w)
    (back,) = pull({n: like(grads[n], w) for n, w in weights.items()})
    for leaf, x in back.items():
        sums[leaf] = x.astype(params[leaf].dtype)
    if tape.powers is None or good is None:
        return sums
    # Without a good example there is none to stand in.
    return [jnp.where(good.any(), x, jnp.zeros_like(x)) for x in sums]


def _of_sites(
    plan: Plan,
    tape: Tape,
    weights: dict,
    factor: jax.Array | None,
    groups: dict,
    good: jax.Array | None,
) -> dict[int, jax.Array]:
    """Sums at the sites that are not formed.

    A factor belongs to the gradient of an output, unless the parts of the weight lie
    side by side along what is summed over; then it belongs to the data.
    """
    data, deltas, pairs = {}, {}, {}
    for n, site in plan.sites.items():
        if n in tape.formed:
            continue
        in_data, k = site.rule.axis(site)
        axis = None if k is None else 1 + len(site.loops) + k
        a, d = tape.operand(site), tape.deltas[site.tap]
        # Sites that share what is recorded share what is scaled, if factors agree.
        first, second = (site.data,), (site.tap, axis, groups[n])
        if in_data:
            a = floating(a, widen(d).dtype)
            first, second = (site.data, axis, groups[n]), (site.tap,)
        if first not in data:
            data[first] = _scale(a, factor, groups[n], axis) if in_data else a
        if second not in deltas:
            d = widen(d) if in_data else _scale(d, factor, groups[n], axis)
            deltas[second] = _mask(d, good)
        pairs[n] = first, second
    data = dict(zip(data, _finite(list(data.values()), good), strict=True))
    return {
        n: plan.sites[n].rule.gradient(plan.sites[n], data[a], deltas[d], weights[n])
        for n, (a, d) in pairs.items()
    }


def _finite(data: list, good: jax.Array | None) -> list:
    """Nothing of examples that are not good: 0 times NaN is NaN."""
    if good is None or not jax.tree.leaves(data):
        return data

    def mask(state):
        bad, data = state
        return jnp.zeros_like(bad), jax.tree.map(lambda x: _mask(x, good), data)

    # Hardly ever. A loop works in place, where a branch would copy its results.
    # A sum of numbers: one all-reduce with those of the gradients.
    bad = jnp.where(good, 0.0, 1.0).sum()
    return jax.lax.while_loop(lambda state: state[0] > 0, mask, (bad, data))[1]


def _mask(x: jax.Array, good: jax.Array | None) -> jax.Array:
    if good is None:
        return x
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


def _groups(site: Site, index: Sequence[int | None]) -> tuple[tuple[Any, int], ...]:
    """For every part of a weight its group, and how long it is."""
    parts = [(0 if p.leaf is None else index[p.leaf], p.stop - p.start)
             for p in site.view.parts]  # fmt: skip
    distinct = {index[p.leaf] for p in site.view.parts if p.leaf is not None}
    return ((distinct.pop(), 0),) if len(distinct) == 1 else tuple(parts)


def _axis_of_weight(site: Site) -> int | None:
    axis = site.view.axis
    return None if axis is None else 1 + sum(site.sliced) + axis


def _scale(x: Any, factor: jax.Array | None, groups: tuple, axis: int | None) -> Any:
    """Multiplies `[B, ...]` by factors `[B, G]`, those of the groups along `axis`."""
    if factor is None:
        return widen(x)
    if len(groups) == 1:
        row, shape = factor[:, groups[0][0]], (x.shape[0],) + (1,) * (x.ndim - 1)
    else:
        rows = [
            jnp.broadcast_to(factor[:, i, None], (x.shape[0], n)) for i, n in groups
        ]
        row, shape = jnp.concatenate(rows, axis=1), [1] * x.ndim
        shape[0], shape[axis] = row.shape
    return widen(x) * row.reshape(shape).astype(widen(x).dtype)


def _second_pass(
    program: Program,
    inputs: Sequence[Any],
    weights: dict,
    factor: jax.Array,
    groups: dict,
) -> dict[int, jax.Array]:
    """Weighted sums by an ordinary backward pass, which rematerializes."""
    plan = program.plan

    def loss(weights, row, *values):
        def visit(site, inputs, out, weight):
            # Data get the gradient as it is, the weight gets it times the factor.
            site_groups = groups[site.number]
            times = lambda x, axis: _scale(x[None], row[None], site_groups, axis)[0]
            data: Any = None if site.operand is None else inputs[site.operand]
            data = jax.lax.stop_gradient(data)
            in_data, k = site.rule.axis(site)
            axis = None if k is None else k + 1
            if in_data:
                data = times(data.astype(weight.dtype), axis)
                scaled = site.rule.apply(site, weight, data)
            else:
                scaled = times(site.rule.apply(site, weight, data), axis)
            return interpreter.tap(out, scaled.astype(out.dtype))

        outs, _ = interpreter.run(plan.root, values, plan.sites, {}, visit, weights)
        return outs[0]

    def batched(weights):
        one = functools.partial(loss, weights)
        mapped = (True, *program.mapped)
        return bookkeeping.over_examples(one, mapped, [factor, *inputs])

    value, pull = jax.vjp(batched, weights)
    return pull(jnp.ones_like(value))[0]
