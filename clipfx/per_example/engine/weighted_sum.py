"""Weighted sums of gradients, from what one pass over a batch left behind."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipfx import _compat
from clipfx._core.groups import each_of, picked
from clipfx._core.leaves import times, widen
from clipfx.per_example.engine import bookkeeping, interpreter, target
from clipfx.per_example.engine.bookkeeping import Program, Tape
from clipfx.per_example.engine.param_views import LeafSlice
from clipfx.per_example.engine.plan import Plan
from clipfx.per_example.engine.row_sums import mask, sum_of_rows
from clipfx.per_example.engine.rules.site import Site, floating, groups_of


def weighted_sum(
    program: Program,
    inputs: Sequence[Any],
    tape: Tape,
    factor: jax.Array | None,
    index: Sequence[Any],
    good: jax.Array | None,
) -> list[jax.Array]:
    """Sums over examples of gradients times factors, by leaf, in float32 or wider.

    Args:
      program: The loss.
      inputs: As for `backward_pass`.
      tape: From `backward_pass`.
      factor: `[B, G]`, 0 where an example is not good; None for 1.
      index: By leaf its group, or those of its slices along the first dimension.
      good: bool `[B]`, which examples have only finite numbers on the tape; None if
        nothing has to be left out.
    """
    plan = program.plan
    params = [widen(inputs[k]) for k in program.params]
    sums = [jnp.zeros_like(p) for p in params]
    for leaf, x in tape.leaves.items():
        groups = _Factors((), tuple((g, 1) for g in each_of(index[leaf])))
        total = sum_of_rows(x, _rows(x, factor, groups, 1), good)
        sums[leaf] = total.astype(params[leaf].dtype)
    sites = plan.sites | plan.doors()
    if not sites:
        return sums
    # One dtype for all, because views may join leaves.
    views = {k: p for k, p in enumerate(params) if k not in tape.leaves}
    common = bookkeeping.dtype(plan)
    views = {k: p.astype(common) for k, p in views.items()}

    at_sites = interpreter.at_sites(plan.root, program.params, inputs, common, sites)
    weights, pull = jax.vjp(at_sites, views)
    drop = _masked_if_any if target.is_cpu() else masked
    grads = at_sites_of(plan, tape, weights, factor, index, good, drop)
    if tape.again is not None:
        assert factor is not None and good is not None
        grads |= tape.again(factor, good)
    (back,) = pull({n: like_weight(grads[n], w) for n, w in weights.items()})
    for leaf, x in back.items():
        sums[leaf] = x.astype(params[leaf].dtype)
    return sums


def at_sites_of(
    plan: Plan,
    tape: Tape,
    weights: dict,
    factor: jax.Array | None,
    index: Sequence[Any],
    good: jax.Array | None,
    drop: Callable[[list, jax.Array | None], list],
) -> dict[int, jax.Array]:
    """Weighted sums at sites, `[loops that slice..., weight]`.

    Args:
      plan: Decisions.
      tape: From one pass.
      weights: By number of the site, its weight.
      factor: See `weighted_sum`, as the next two.
      index: By leaf its group.
      good: Which examples are finite.
      drop: `drop(data, good)` takes examples out that are not good.
    """
    groups = {n: _groups(site, index, range(len(site.loops)))
              for n, site in plan.sites.items()}  # fmt: skip
    grads = _of_sites(plan, tape, weights, factor, groups, good, drop)
    for n, x in tape.formed.items():
        site = plan.sites[n]
        turns = [k for k, cut in enumerate(site.sliced) if cut]
        rows = _rows(x, factor, _groups(site, index, turns), _axis_of_weight(site))
        grads[n] = sum_of_rows(x, rows, good)
    return grads


def like_weight(x: jax.Array, weight: jax.Array) -> jax.Array:
    """A gradient in the shape and dtype of its weight, split over a mesh as that is.

    What was added up over copies of an element belongs to the first of them.
    """
    x = x.astype(weight.dtype)
    if x.shape != weight.shape:
        edges = [(0, n - k, 0) for k, n in zip(x.shape, weight.shape, strict=True)]
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), edges)
    return _compat.as_like(x, weight)


def _of_sites(
    plan: Plan,
    tape: Tape,
    weights: dict,
    factor: jax.Array | None,
    groups: dict,
    good: jax.Array | None,
    drop: Callable[[list, jax.Array | None], list],
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
        seen = tuple(number for _, number, _ in site.recorded)
        first, second = seen, (site.tap, axis, groups[n])
        if in_data:
            a = floating(a, widen(d).dtype)
            first, second = (*seen, axis, groups[n]), (site.tap,)
        if first not in data:
            data[first] = _scale(a, factor, groups[n], axis) if in_data else a
        if second not in deltas:
            d = widen(d) if in_data else _scale(d, factor, groups[n], axis)
            deltas[second] = mask(d, good)
        pairs[n] = first, second
    data = dict(zip(data, drop(list(data.values()), good), strict=True))
    return {
        n: plan.sites[n].rule.gradient(plan.sites[n], data[a], deltas[d], weights[n])
        for n, (a, d) in pairs.items()
    }


def masked(data: list, good: jax.Array | None) -> list:
    """Nothing of examples that are not good: 0 times NaN is NaN."""
    return jax.tree.map(lambda x: mask(x, good), data)


def _masked_if_any(data: list, good: jax.Array | None) -> list:
    """The same where a product does not take the mask along, and a copy costs time."""
    if good is None or not jax.tree.leaves(data):
        return data

    def turn(state):
        bad, data = state
        return jnp.zeros_like(bad), masked(data, good)

    # Hardly ever. A loop works in place, where a branch would copy its results.
    # A sum of numbers: one all-reduce with those of the gradients.
    bad = jnp.where(good, 0.0, 1.0).sum()
    return jax.lax.while_loop(lambda state: state[0] > 0, turn, (bad, data))[1]


class _Factors(NamedTuple):
    """Which factors belong where.

    Attributes:
      loops: How long the loops are along which they may differ.
      parts: For every part along the axis its group and how long it is; the group of
        every turn of all loops, one after the other, where it is not the same.
    """

    loops: tuple[int, ...]
    parts: tuple[tuple[int | tuple[int, ...], int], ...]


def _groups(site: Site, index: Sequence[Any], loops: Sequence[int]) -> _Factors:
    """Those of a site, along some of its loops, given by position."""
    lengths = tuple(site.loops[k][1] for k in loops)

    def group(p: LeafSlice) -> Any:
        if p.leaf is None or index[p.leaf] is None:
            return 0
        loop, groups = groups_of(site, p, index[p.leaf])
        if loop is None:
            return groups
        turns = np.indices(lengths)[loops.index(loop)].reshape(-1)
        return tuple(np.asarray(groups)[turns].tolist())

    parts = tuple((group(p), p.stop - p.start) for p in site.view.parts)
    known = {group for (group, _), p in zip(parts, site.view.parts, strict=True)
             if p.leaf is not None}  # fmt: skip
    return _Factors(lengths, ((known.pop(), 0),) if len(known) == 1 else parts)


def _axis_of_weight(site: Site) -> int | None:
    axis = site.view.axis
    return None if axis is None else 1 + sum(site.sliced) + axis


def _scale(x: Any, factor: jax.Array | None, groups: _Factors, axis: int | None) -> Any:
    """Multiplies `[B, loops..., ...]` by factors `[B, G]`, of parts along `axis`."""
    return functools.reduce(times, _rows(x, factor, groups, axis), widen(x))


def _rows(
    x: Any, factor: jax.Array | None, groups: _Factors, axis: int | None
) -> list[jax.Array]:
    """By what to multiply `[B, loops..., ...]`, as many dimensions; nothing for 1."""
    if factor is None:
        return []
    loops = groups.loops

    def of(group: int | tuple[int, ...]) -> jax.Array:
        """`[B, loops...]`, the loops 1 long where it is the same in all turns."""
        if isinstance(group, int):
            return factor[:, group].reshape(-1, *[1] * len(loops))
        return picked(factor, group, 1).reshape(-1, *loops)

    rows = [of(group) for group, _ in groups.parts]
    if len(rows) == 1:
        (row,) = rows
    else:
        assert axis is not None
        lead = jnp.broadcast_shapes(*(y.shape for y in rows))
        pieces = [jnp.broadcast_to(y[..., None], (*lead, n))
                  for y, (_, n) in zip(rows, groups.parts, strict=True)]  # fmt: skip
        row = jnp.concatenate(pieces, -1)
        between = [1] * (axis - len(lead))
        row = row.reshape(*lead, *between, row.shape[-1])
    row = row.reshape(*row.shape, *[1] * (x.ndim - row.ndim))
    return [row]
