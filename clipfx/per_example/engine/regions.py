"""What a program rematerializes: norms and sums come of its own backward pass.

Nothing that sites see there is kept. Where a region begins stands an `_entrance`, whose
backward pass is the last thing that the region's does: to it come, as gradients, the
data and the deltas of all its sites, for as long as it takes to measure the gradients
of all leaves jointly, and to add them up. From region to region goes a `Thread`. On its
way back it takes powers of norms along in a first pull of the program's derivative, and
brings factors in a second one. What one of the pulls does not need XLA leaves out.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipfx import _compat
from clipfx._core.groups import Groups, picked
from clipfx.per_example.engine import (
    bookkeeping,
    interpreter,
    parts,
    primitives,
    scaled_sums,
    target,
)
from clipfx.per_example.engine.bookkeeping import Program, Tape
from clipfx.per_example.engine.columns import Columns, each_in_one_place, of_regions
from clipfx.per_example.engine.interpreter import Done, Given
from clipfx.per_example.engine.plan import Plan
from clipfx.per_example.engine.rules.site import Site
from clipfx.per_example.engine.scaled_sums import SCALES
from clipfx.per_example.engine.trace import Call
from clipfx.per_example.engine.walk import JaxprPlan
from clipfx.per_example.engine.weighted_sum import at_sites_of, like_weight, masked


class Thread(NamedTuple):
    """What goes through all regions, `[B, ...]`; nothing on the way forward.

    Attributes:
      factor: `[G]`, on the way back what gradients are multiplied with.
      good: 1 where an example counts, on the way back.
    """

    factor: jax.Array
    good: jax.Array


class Spot(NamedTuple):
    """What bounds gradients on the spot, where all of a group is in one region.

    Attributes:
      decide: `decide(norms, trusted, limit, counts)` returns factors, and which of
        them are left for later, `[B, N]` each.
      limit: Thresholds `[B or 1, G]`.
      where: bool `[B]`, False for padding; None if there is none.
    """

    decide: Callable
    limit: jax.Array
    where: jax.Array | None


class _Inside(NamedTuple):
    """What is the same in all regions of a program.

    Attributes:
      plan: Decisions.
      columns: By region what it measures apart.
      decide: That of `Spot`; None where factors come in a second pull.
      limit: `[G]` of one example, None likewise.
      keep: Whether it is no padding, likewise.
    """

    plan: Plan
    columns: dict[int, Columns]
    decide: Callable | None = None
    limit: jax.Array | None = None
    keep: jax.Array | None = None


def backward_pass(
    call: Call, members: Groups, spot: Spot | None = None
) -> tuple[list[jax.Array], Tape]:
    """Runs forward and backward once, for norms; regions go on rematerializing.

    Args:
      call: The loss and its inputs, those that are mapped `[B, ...]`.
      members: Of the leaves.
      spot: What bounds in regions, if that can be.

    Returns:
      Outputs `[B, ...]`, and the `Tape`.
    """
    program, inputs, plan = call.program, call.inputs, call.program.plan
    if not plan.regions:
        return bookkeeping.backward_pass(program, inputs, norms=True)
    sites = plan.everywhere()
    rows = bookkeeping.like_rows(program, inputs)
    each = lambda x: rows(jnp.broadcast_to(x, (call.size, *x.shape)))
    leaves = {k: inputs[program.params[k]] for k in sorted(plan.differentiated)}
    columns = of_regions(plan, members, call.split)
    if spot is not None and not each_in_one_place(plan, columns, members):
        spot = None
    found = {n: _found(plan, x, spot is not None) for n, x in columns.items()}
    thread = _thread(plan, members) if spot is None else None
    taps, leaves, found, thread = jax.tree.map(
        each, (bookkeeping.taps_of(plan), leaves, found, thread)
    )
    limits: Any = ()
    if spot is not None:
        where = jnp.ones(call.size, bool) if spot.where is None else spot.where
        shape = (call.size, spot.limit.shape[1])
        like = each(jnp.zeros(shape[1:], spot.limit.dtype))
        limit = _compat.as_like(jnp.broadcast_to(spot.limit, shape), like)
        limits = (limit, _compat.as_like(where, like[:, 0]))
    body, tail = parts.split(plan.root, program.mapped)
    doors = _doors(program, inputs)
    inside = set().union(*(region.sites for region in plan.regions.values()))
    every = bookkeeping.scales_of(program, inputs)
    scales = {n: c for n, c in every.items() if n in inside}
    ids = {n: jnp.asarray(x.ids) for n, x in columns.items() if x.ids.ndim > 1}

    def run(node: JaxprPlan, own: Any, doors: dict) -> Done:
        """A part of the program, on `(leaves, taps, found, thread, more inputs)`."""

        def one(own: tuple, limits: tuple, *example: Any) -> Done:
            leaves, taps, found, thread, more = own
            decide = None if spot is None else spot.decide
            enter = functools.partial(_enter, _Inside(plan, columns, decide, *limits))
            values = bookkeeping.with_leaves(program, example, leaves)
            given = Given(taps, doors=doors, scales=scales, found=found, ids=ids)
            return interpreter.run(node, [*values, *more], sites, given, enter, thread)

        mapped = (True, True, *program.mapped)
        return bookkeeping.over_examples(one, mapped, [own, limits, *inputs])

    def first(leaves: dict, taps: dict, found: dict, thread: Any, doors: dict) -> Any:
        done = run(body, (leaves, taps, found, thread, []), doors)
        floats, others = parts.halves(done.outs)
        return (floats, done.thread), (others, done.records)

    def last(others: dict, leaves: dict, taps: dict, floats: dict) -> Any:
        more = parts.joined(floats, others)
        done = run(tail, (leaves, taps, {}, None, more), {})
        return done.outs[0], (done.outs[1:], done.records)

    some = lambda node: {n: taps[n] for n in taps.keys() & node.all_taps()}
    (floats, thread), pull_first, (others, data) = jax.vjp(
        first, leaves, some(body), found, thread, doors, has_aux=True
    )
    value, pull_last, (aux, more) = jax.vjp(
        functools.partial(last, others), leaves, some(tail), floats, has_aux=True
    )
    nothing = jax.tree.map(jnp.zeros_like, thread)
    leaves, deltas, back = pull_last(jnp.ones_like(value))
    own, before, found, _, sums = pull_first((back, nothing))
    leaves = jax.tree.map(jnp.add, leaves, own)
    outs, data, leaves, deltas, back, found = jax.tree.map(
        rows, ([value, *aux], data | more, leaves, deltas | before, back, found)
    )

    def again(factor: jax.Array, good: jax.Array) -> dict[int, jax.Array]:
        if spot is not None:
            return sums
        like = lambda x, y: _compat.as_like(x.astype(y.dtype), y)
        cotangents = Thread(like(factor, nothing.factor), like(good, nothing.good))
        # Or XLA would share what both pulls run again, and keep it for that.
        behind = lambda x: jax.lax.optimization_barrier((x, factor))[0]
        return pull_first((jax.tree.map(behind, back), cotangents))[-1]

    tape = bookkeeping.tape_of(plan, data, leaves, deltas)
    return outs, tape._replace(
        powers={n: x.powers for n, x in found.items()}, columns=columns, again=again,
        verdicts=None if spot is None else {n: x.verdict for n, x in found.items()},
    )  # fmt: skip


def with_verdicts(
    tape: Tape, factor: jax.Array, later: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Factors `[B, G]`, and what is left for later, with what regions decided.

    All that regions did not decide is left, where anything of an example is.
    """
    found: list[jax.Array] = []
    places: list[int] = []
    for n, x in (tape.verdicts or {}).items():
        ids = (tape.columns or {})[n].ids
        by_turn = x.reshape(len(x), -1, *x.shape[-2:])
        found.append(by_turn.swapaxes(1, 2).reshape(len(x), -1, 2))
        places += np.moveaxis(ids, -1, 0).reshape(-1).tolist()
    groups = factor.shape[1]
    if found:
        decided = dict(zip(places, range(groups, groups + len(places)), strict=True))
        own = jnp.stack([factor, later.astype(factor.dtype)], -1)
        joined = jnp.concatenate([own, *(x.astype(own.dtype) for x in found)], 1)
        chosen = picked(joined, [decided.get(i, i) for i in range(groups)], 1)
        factor = _compat.as_like(chosen[..., 0], factor)
        later = _compat.as_like(chosen[..., 1] > 0, later)
    others = np.array([i not in {*places} for i in range(groups)])
    return factor, later | (later.any(1, keepdims=True) & others[None])


class _Found(NamedTuple):
    """What a region has found out, as a gradient of zeros, `[outer loops..., ...]`.

    Attributes:
      powers: By mesh axes of its columns `[M, 4, 2]`, norms to the power of p.
      verdict: `[N, 2]`, factors and what is left for later; None without `Spot`.
    """

    powers: list[jax.Array]
    verdict: Any


def _found(plan: Plan, columns: Columns, decides: bool) -> _Found:
    """Zeros, of one example."""
    *loops, count = columns.ids.shape
    kinds = columns.by_axes().items()
    powers = [_compat.vary(_zeros_of(plan, *loops, len(which), SCALES, 2), axes)
              for axes, which in kinds]  # fmt: skip
    verdict = _zeros_of(plan, *loops, count, 2) if decides else None
    return _Found(powers, verdict)


def _zeros_of(plan: Plan, *shape: int) -> jax.Array:
    value = plan.root.jaxpr.outvars[0].aval
    return bookkeeping.zeros(shape, value).astype(bookkeeping.dtype(plan))


def _thread(plan: Plan, members: Groups) -> Thread:
    """Zeros, of one example."""
    return Thread(_zeros_of(plan, len(members.names)), _zeros_of(plan))


def _doors(program: Program, inputs: Sequence[Any]) -> dict[int, jax.Array]:
    """The parameters at all doors, in the dtype of norms and without casts."""
    plan, common = program.plan, bookkeeping.dtype(program.plan)
    leaves = {
        leaf: inputs[k].astype(common)
        for leaf, k in enumerate(program.params)
        if leaf not in plan.differentiated
    }
    run = interpreter.at_sites(plan.root, program.params, inputs, common, plan.doors())
    return run(leaves)


def _enter(
    inside: _Inside,
    number: int,
    node: JaxprPlan,
    eqn: Any,
    inputs: list,
    given: Given,
    thread: Any,
) -> Done:
    """Runs a region, from its entrance on."""
    plan, enter = inside.plan, functools.partial(_enter, inside)
    sites = plan.everywhere()

    def block(inputs: list, given: Given, thread: Any) -> Done:
        if number in plan.regions:
            given, thread = _entrance(inside, number, node)(inputs, given, thread)
        return interpreter.run(node, inputs, sites, given, enter, thread)

    again = jax.checkpoint(block, **primitives.remat_options(eqn))
    return again(inputs, given, thread)


class _Fixed(NamedTuple):
    """What an entrance is given and has no gradient.

    Attributes:
      inputs: Of the region, those that views of weights depend on.
      scales: By site its coefficients.
      ids: The group of each column, None if that is known.
      limit: `[B, G]`, None without `Spot`.
      keep: bool `[B]`, likewise.
    """

    inputs: dict
    scales: dict
    ids: Any
    limit: Any
    keep: Any


def _entrance(inside: _Inside, number: int, node: JaxprPlan) -> Any:
    """`entrance(inputs, given, thread) -> given, thread` of one example."""
    plan, columns = inside.plan, inside.columns[number]
    region, places = plan.regions[number], plan.regions[number].places()
    here = plan._replace(
        root=node, uses=region.uses, sites=region.sites, formed=region.formed,
        regions={}, differentiated=frozenset(),
    )  # fmt: skip

    @jax.custom_vjp
    def batched(
        doors: dict, found: _Found, thread: Any, fixed: _Fixed
    ) -> tuple[dict, dict, Any]:
        zeros = functools.partial(_zeros, found.powers[0])
        taps = {
            site.tap: zeros(site, site.tapped.outvars[0].aval)
            for site in region.sites.values()
        }
        slots = {
            n: zeros(site, v.aval)
            for site in region.sites.values()
            for n, _, v in site.recorded
        }
        return taps, slots, thread

    def forward(*args: Any) -> tuple[Any, tuple]:
        doors, _, _, fixed = args
        return batched(*args), (doors, fixed)

    def backward(kept: tuple, gradients: tuple) -> tuple[dict, _Found, Any, None]:
        (doors, fixed), (deltas, data, thread) = kept, gradients
        data = {
            n: interpreter.from_floats(data[n], v.aval.dtype)
            for site in region.sites.values()
            for n, _, v in site.recorded
        }
        tape = bookkeeping.tape_of(here, data, {}, deltas)
        measure = functools.partial(_powers, here, columns, fixed.scales)
        powers, verdict = jax.vmap(measure)(tape), None
        if inside.decide is None:
            factor, good = columns.of_turn(thread.factor, fixed.ids), thread.good > 0
        else:
            factor, later, good = _on_the_spot(inside, columns, powers, fixed)
            verdict = jnp.stack([factor, later.astype(factor.dtype)], -1)
            factor = jnp.where(later, 0, factor)
        values = [fixed.inputs.get(k) for k in range(len(node.jaxpr.invars))]
        common = bookkeeping.dtype(here)
        at_sites = interpreter.at_sites(node, places, values, common, here.sites)
        weights, pull = jax.vjp(at_sites, doors)
        grads = at_sites_of(here, tape, weights, factor, columns.index, good, masked)
        (sums,) = pull({n: like_weight(grads[n], w) for n, w in weights.items()})
        return sums, _Found(powers, verdict), thread, None

    batched.defvjp(forward, backward)

    @jax.custom_batching.custom_vmap
    def entrance(doors: dict, found: _Found, thread: Any, fixed: _Fixed) -> Any:
        one = lambda x: jax.tree.map(lambda y: y[None], x)
        fixed = fixed._replace(limit=one(fixed.limit), keep=one(fixed.keep))
        alone = batched(doors, one(found), one(thread), fixed)
        return jax.tree.map(lambda x: x[0], alone)

    @entrance.def_vmap
    def _(size: int, mapped: Any, *args: Any) -> Any:
        out = batched(*args)
        return out, jax.tree.map(lambda _: True, out)

    def enter(inputs: list, given: Given, thread: Any) -> tuple[Given, Any]:
        doors = {n: given.doors[n] for n in region.doors}
        needed = enumerate(node.jaxpr.invars)
        known = {k: inputs[k] for k, v in needed if v in node.needed}
        own = given.scales.keys() & region.sites.keys()
        scales = {n: given.scales[n] for n in own}
        fixed = _Fixed(known, scales, given.ids.get(number), inside.limit, inside.keep)
        taps, slots, thread = entrance(doors, given.found[number], thread, fixed)
        return given._replace(
            taps=dict(given.taps) | taps, slots=dict(given.slots) | slots,
            scales={n: c for n, c in given.scales.items() if n not in own},
        ), thread  # fmt: skip

    return enter


def _on_the_spot(
    inside: _Inside, columns: Columns, powers: list[jax.Array], fixed: _Fixed
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Factors `[B, N]`, what is left for later, and which examples are finite here."""
    assert inside.decide is not None
    whole = map(bookkeeping.over, powers, columns.by_axes())
    norms, trusted = scaled_sums.norms(
        columns.in_order([*whole]), inside.plan.ord, bound=not target.is_cpu()
    )
    good = jnp.isfinite(norms.value / norms.scale).all(1)
    limit = columns.of_turn(fixed.limit, fixed.ids)
    factor, later = inside.decide(norms, trusted, limit, good & fixed.keep)
    return factor, later, good


def _zeros(rows: jax.Array, site: Site, aval: Any) -> jax.Array:
    """Zeros `[B, loops..., ...]` like what a site sees or makes, as a gradient.

    Args:
      rows: `[B]`, split over a mesh as examples are.
      site: Which.
      aval: The type of what it sees or makes, in one turn of one example.
    """
    loops = tuple(n for _, n in site.loops)
    like = jax.ShapeDtypeStruct((*loops, *aval.shape), aval.dtype)
    kind = jax.eval_shape(interpreter.as_floats, like)
    zeros = bookkeeping.zeros(kind.shape, aval).astype(kind.dtype)
    zeros, own = _compat.rows_of(rows, zeros), _compat.spec_of_type(aval)
    spec = _compat.explicit_spec(zeros)
    if spec is None or own is None:
        return zeros
    turns, ends = (None,) * len(loops), (None,) * (len(kind.shape) - len(like.shape))
    return _compat.reshard(zeros, (spec[0], *turns, *own, *ends))


def _powers(plan: Plan, columns: Columns, scales: dict, tape: Tape) -> list[jax.Array]:
    """Norms of one example's gradient to the power of p, by column, see `_Found`."""
    parts = [
        x for leaf, index in enumerate(columns.index) if plan.uses[leaf]
        for x in bookkeeping.of_leaf(plan, leaf, index, tape, scales)
    ]  # fmt: skip
    found = []
    for which in columns.by_axes().values():
        mine = lambda k: k[0] if isinstance(k, tuple) else k
        some = [(k, x) for k, x in parts if mine(k) in which]
        index, rows = bookkeeping.measure(some, plan.ord, bookkeeping.dtype(plan))
        sums = [
            functools.reduce(
                jnp.add, [rows[j : j + 1] for j, i in enumerate(index) if i == k]
            )
            for k in which
        ]
        found.append(sums[0] if len(sums) == 1 else jnp.concatenate(sums))
    return found
