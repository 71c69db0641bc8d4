"""What a program rematerializes: norms and sums come of its own backward pass.

Nothing that sites see there is kept. Where a region begins stands an `_entrance`, whose
backward pass is the last thing that the region's does: to it come, as gradients, the
data and the deltas of all its sites, for as long as it takes to measure the gradients
of all leaves jointly, and to add them up. From region to region goes a `Thread`. On its
way back it takes powers of norms along in a first pull of the program's derivative, and
brings factors in a second one. What one of the pulls does not need XLA leaves out.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx.per_example.engine import bookkeeping, interpreter, parts, primitives
from clipfx.per_example.engine.bookkeeping import Program, Tape
from clipfx.per_example.engine.interpreter import Done, Given
from clipfx.per_example.engine.plan import Plan
from clipfx.per_example.engine.rules.site import Site
from clipfx.per_example.engine.scaled_sums import SCALES
from clipfx.per_example.engine.walk import JaxprPlan
from clipfx.per_example.engine.weighted_sum import at_sites_of, like_weight, masked


class Thread(NamedTuple):
    """What goes through all regions, `[B, ...]`; nothing on the way forward.

    Attributes:
      powers: By leaf `[4, 2]`: on the way back they are added up.
      factor: `[L]`, by leaf; on the way back what gradients are multiplied with.
      good: 1 where an example counts, on the way back.
    """

    powers: dict[int, jax.Array]
    factor: jax.Array
    good: jax.Array


def backward_pass(
    program: Program, inputs: Sequence[Any]
) -> tuple[list[jax.Array], Tape]:
    """Runs forward and backward once, for norms; regions go on rematerializing.

    Args:
      program: The loss.
      inputs: Its inputs, flat, those that are mapped `[B, ...]`.

    Returns:
      Outputs `[B, ...]`, and the `Tape`.
    """
    plan = program.plan
    if not plan.regions:
        return bookkeeping.backward_pass(program, inputs, norms=True)
    sites, enter = plan.everywhere(), functools.partial(_enter, plan)
    rows = bookkeeping.like_rows(program, inputs)
    example = next(x for x, m in zip(inputs, program.mapped, strict=True) if m)
    each = lambda x: rows(_compat.rows_of(example, x))
    leaves = {k: inputs[program.params[k]] for k in sorted(plan.differentiated)}
    taps, leaves, thread = jax.tree.map(
        each, (bookkeeping.taps_of(plan), leaves, _thread(plan))
    )
    body, tail = parts.split(plan.root, program.mapped)
    doors = _doors(program, inputs)
    inside = set().union(*(region.sites for region in plan.regions.values()))
    every = bookkeeping.scales_of(program, inputs)
    scales = {n: c for n, c in every.items() if n in inside}

    def run(node: JaxprPlan, own: Any, doors: dict) -> Done:
        """A part of the program, on `(leaves, taps, thread, more inputs)`."""

        def one(own: tuple, *example: Any) -> Done:
            leaves, taps, thread, more = own
            values = bookkeeping.with_leaves(program, example, leaves)
            given = Given(taps, doors=doors, scales=scales)
            return interpreter.run(node, [*values, *more], sites, given, enter, thread)

        mapped = (True, *program.mapped)
        return bookkeeping.over_examples(one, mapped, [own, *inputs])

    def first(leaves: dict, taps: dict, thread: Thread, doors: dict) -> Any:
        done = run(body, (leaves, taps, thread, []), doors)
        floats, others = parts.halves(done.outs)
        return (floats, done.thread), (others, done.records)

    def last(others: dict, leaves: dict, taps: dict, floats: dict) -> Any:
        more = parts.joined(floats, others)
        done = run(tail, (leaves, taps, None, more), {})
        return done.outs[0], (done.outs[1:], done.records)

    some = lambda node: {n: taps[n] for n in taps.keys() & node.all_taps()}
    (floats, thread), pull_first, (others, data) = jax.vjp(
        first, leaves, some(body), thread, doors, has_aux=True
    )
    value, pull_last, (aux, more) = jax.vjp(
        functools.partial(last, others), leaves, some(tail), floats, has_aux=True
    )
    nothing = jax.tree.map(jnp.zeros_like, thread)
    leaves, deltas, back = pull_last(jnp.ones_like(value))
    own, before, thread, _ = pull_first((back, nothing))
    leaves = jax.tree.map(jnp.add, leaves, own)
    outs, data, leaves, deltas, back = jax.tree.map(
        rows, ([value, *aux], data | more, leaves, deltas | before, back)
    )

    def again(factor: jax.Array, good: jax.Array) -> dict[int, jax.Array]:
        cotangents = nothing._replace(
            factor=_compat.as_like(factor.astype(nothing.factor.dtype), nothing.factor),
            good=_compat.as_like(good.astype(nothing.good.dtype), nothing.good),
        )
        # Or XLA would share what both pulls run again, and keep it for that.
        behind = lambda x: jax.lax.optimization_barrier((x, factor))[0]
        return pull_first((jax.tree.map(behind, back), cotangents))[-1]

    tape = bookkeeping.tape_of(plan, data, leaves, deltas)
    return outs, tape._replace(powers=thread.powers, again=again)


def _thread(plan: Plan) -> Thread:
    """Zeros, of one example."""
    value, common = plan.root.jaxpr.outvars[0].aval, bookkeeping.dtype(plan)
    zeros = lambda *shape: bookkeeping.zeros(shape, value).astype(common)
    leaves = [
        leaf
        for leaf in range(len(plan.uses))
        if any(region.uses[leaf] for region in plan.regions.values())
    ]
    own = lambda leaf: _compat.axes_of_type(plan.types[leaf])
    powers = {leaf: _compat.vary(zeros(SCALES, 2), own(leaf)) for leaf in leaves}
    return Thread(powers, zeros(len(plan.uses)), zeros())


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
    plan: Plan,
    number: int,
    node: JaxprPlan,
    eqn: Any,
    inputs: list,
    given: Given,
    thread: Thread,
) -> Done:
    """Runs a region, from its entrance on."""
    sites, enter = plan.everywhere(), functools.partial(_enter, plan)

    def block(inputs: list, given: Given, thread: Thread) -> Done:
        if number in plan.regions:
            given, thread = _entrance(plan, number, node)(inputs, given, thread)
        return interpreter.run(node, inputs, sites, given, enter, thread)

    again = jax.checkpoint(block, **primitives.remat_options(eqn))
    return again(inputs, given, thread)


def _entrance(plan: Plan, number: int, node: JaxprPlan) -> Any:
    """`entrance(inputs, given, thread) -> given, thread` of one example."""
    region, places = plan.regions[number], plan.regions[number].places()
    here = plan._replace(
        root=node, uses=region.uses, sites=region.sites, formed=region.formed,
        regions={}, differentiated=frozenset(),
    )  # fmt: skip

    @jax.custom_vjp
    def batched(
        doors: dict, fixed: dict, scales: dict, thread: Thread
    ) -> tuple[dict, dict, Thread]:
        zeros = functools.partial(_zeros, thread.good)
        taps = {
            site.tap: zeros(site, site.eqn.outvars[0].aval)
            for site in region.sites.values()
        }
        slots = {
            n: zeros(site, _data(site))
            for n, site in region.sites.items()
            if site.data is not None
        }
        return taps, slots, thread

    def forward(*args: Any) -> tuple[Any, tuple]:
        return batched(*args), args[:3]

    def backward(kept: tuple, gradients: tuple) -> tuple[dict, None, None, Thread]:
        (doors, fixed, scales), (deltas, data, thread) = kept, gradients
        data = {
            n: interpreter.from_floats(x, _data(region.sites[n]).dtype)
            for n, x in data.items()
        }
        tape = bookkeeping.tape_of(here, data, {}, deltas)
        values = [fixed.get(k) for k in range(len(node.jaxpr.invars))]
        common = bookkeeping.dtype(here)
        at_sites = interpreter.at_sites(node, places, values, common, here.sites)
        weights, pull = jax.vjp(at_sites, doors)
        index, good = list(range(len(here.uses))), thread.good > 0
        grads = at_sites_of(here, tape, weights, thread.factor, index, good, masked)
        (sums,) = pull({n: like_weight(grads[n], w) for n, w in weights.items()})
        found = jax.vmap(functools.partial(_powers, here, scales))(tape)
        powers = thread.powers | {k: thread.powers[k] + x for k, x in found.items()}
        return sums, None, None, thread._replace(powers=powers)

    batched.defvjp(forward, backward)

    @jax.custom_batching.custom_vmap
    def entrance(doors: dict, fixed: dict, scales: dict, thread: Thread) -> Any:
        alone = batched(doors, fixed, scales, jax.tree.map(lambda x: x[None], thread))
        return jax.tree.map(lambda x: x[0], alone)

    @entrance.def_vmap
    def _(size: int, mapped: Any, *args: Any) -> Any:
        out = batched(*args)
        return out, jax.tree.map(lambda _: True, out)

    def enter(inputs: list, given: Given, thread: Thread) -> tuple[Given, Thread]:
        doors = {n: given.doors[n] for n in region.doors}
        needed = enumerate(node.jaxpr.invars)
        fixed = {k: inputs[k] for k, v in needed if v in node.needed}
        own = given.scales.keys() & region.sites.keys()
        scales = {n: given.scales[n] for n in own}
        taps, slots, thread = entrance(doors, fixed, scales, thread)
        left = {n: c for n, c in given.scales.items() if n not in own}
        taps, slots = dict(given.taps) | taps, dict(given.slots) | slots
        return Given(taps, slots, given.doors, left), thread

    return enter


def _data(site: Site) -> Any:
    """The type of what a site sees."""
    return site.eqn.invars[site.operand].aval


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


def _powers(plan: Plan, scales: dict, tape: Tape) -> dict[int, jax.Array]:
    """Norms `[4, 2]` of one example's gradient to the power of p, by leaf."""
    found: dict[int, list] = {k: [] for k, places in enumerate(plan.uses) if places}
    alike: dict[Any, list[int]] = {}  # what is measured together varies over the same
    for leaf in found:
        alike.setdefault(_compat.axes_of_type(plan.types[leaf]), []).append(leaf)
    for leaves in alike.values():
        of_leaf = functools.partial(bookkeeping.of_leaf, plan)
        parts = [(k, x) for k in leaves for x in of_leaf(k, tape, scales)]
        index, rows = bookkeeping.measure(parts, plan.ord, bookkeeping.dtype(plan))
        for leaf, row in zip(index, rows, strict=True):
            found[leaf].append(row)
    return {leaf: functools.reduce(jnp.add, rows) for leaf, rows in found.items()}
