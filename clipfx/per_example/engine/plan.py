"""What becomes of every parameter: the walk through a program, and its decisions.

A value is constant, made of parameters alone, or data. An equation where the second
kind meets the third is a site if there is a rule for it; in any other place the leaves
behind the value are *instantiated*, that is differentiated for each example. Per leaf
the cheaper of the methods that its uses allow is taken.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from clipfx import _compat
from clipfx.per_example.engine import constants, param_views, primitives, rules
from clipfx.per_example.engine.constants import Constant
from clipfx.per_example.engine.cost_model import (
    BIAS_SUM,
    WORDS,
    factored_cost,
    only_formed,
    unaligned,
)
from clipfx.per_example.engine.param_views import LeafSlice, ParamView
from clipfx.per_example.engine.rules.site import Site

# Methods that know the 2-norm only.
SQUARED = {"Gram", "segment sum"}
INSTANTIATED = "instantiated"


class ValueInfo(NamedTuple):
    """What is known of a value before anything is computed.

    Attributes:
      leaves: The parameters it is made of; empty for constants and data.
      data: Whether it differs between examples.
      view: How it consists of parameters, None if it is computed from them.
      why: What computed it.
      constant: Where it comes from, if neither from parameters nor from data.
    """

    leaves: frozenset[int] = frozenset()
    data: bool = False
    view: ParamView | None = None
    why: str = ""
    constant: Constant | None = None


class JaxprPlan(NamedTuple):
    """A program, and what to do at those of its equations that are not just run.

    Attributes:
      jaxpr: The program.
      consts: Values of its constants.
      sites: By equation, a site for each weight.
      inner: By equation, the program inside.
      views: By equation, which outputs are views of parameters.
      data: By variable the number of what is recorded of it.
      taps: By equation the number of the tap on its output.
      users: By variable the equations that read it, and None for the program's end.
      needed: Constants that views depend on.
    """

    jaxpr: Any
    consts: Sequence[Any]
    sites: dict[int, list[Site]]
    inner: dict[int, "JaxprPlan"]
    views: dict[int, list[bool]]
    data: dict[Any, int]
    taps: dict[int, int]
    users: dict[Any, list[int | None]]
    needed: set[Any]

    def numbers(self) -> set[int]:
        """Of all sites here and inside."""
        inside = [node.numbers() for node in self.inner.values()]
        numbers_here = {s.number for sites in self.sites.values() for s in sites}
        return numbers_here.union(*inside)

    def all_taps(self) -> set[int]:
        """Numbers of taps here and inside."""
        inside = [node.all_taps() for node in self.inner.values()]
        return set(self.taps.values()).union(*inside)


class Plan(NamedTuple):
    """Decisions.

    Attributes:
      root: The program.
      uses: Per leaf its sites and the parts there.
      methods: Per leaf: `"unused"`, `"bias sum"`, `"outer product"`, `"Gram"`,
        `"segment sum"`, `"instantiated"`, or `"sum"` without norms.
      reasons: Per leaf why no site would do, empty if one does.
      sites: Those that are used, by number.
      differentiated: Leaves that are instantiated by JAX's own derivative.
      formed: Numbers of sites whose weight's gradient is instantiated after loops.
      remat: Whether the program rematerializes.
      dtypes: Of the parameters.
      ord: p of the norm, 1 or 2.
    """

    root: JaxprPlan
    uses: list[list[tuple[Site, LeafSlice]]]
    methods: list[str]
    reasons: list[list[str]]
    sites: dict[int, Site]
    differentiated: frozenset[int]
    formed: frozenset[int]
    remat: bool
    dtypes: list
    ord: int

    @property
    def adds_up(self) -> bool:
        """Whether there are norms of sums over positions, unformed, that may cancel."""

        def several(places: list) -> bool:
            site = places[0][0]
            repeats = site.repeats and site.number not in self.formed
            return len(places) > 1 or repeats

        return any(
            method in SQUARED or (method == BIAS_SUM and several(places))
            for method, places in zip(self.methods, self.uses, strict=True)
        )


class _Walk:
    """State of the walk: numbers given out, uses seen."""

    def __init__(self, leaves: int):
        self.number = itertools.count()
        self.loop_number = itertools.count()
        self.uses: list[list[tuple[Site, LeafSlice]]] = [[] for _ in range(leaves)]
        self.reasons: list[list[str]] = [[] for _ in range(leaves)]
        self.remat = False

    def blame(self, info: ValueInfo, why: str) -> None:
        for leaf in info.leaves:
            self.reasons[leaf].append(why)

    def walk(
        self, closed: Any, infos: Sequence[ValueInfo], loops: tuple
    ) -> tuple[JaxprPlan, list[ValueInfo]]:
        jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
        node = JaxprPlan(jaxpr, consts, {}, {}, {}, {}, {}, _users(jaxpr), set())
        closed_over = [ValueInfo(constant=constants.of_const(x)) for x in consts]
        names = [*jaxpr.constvars, *jaxpr.invars]
        env = {
            v: info._replace(
                constant=info.constant
                and constants.named(info.constant, v, node.needed)
            )
            for v, info in zip(names, [*closed_over, *infos], strict=True)
        }
        known = lambda v: ValueInfo(constant=constants.literal(v))
        read = lambda v: known(v) if _compat.is_literal(v) else env[v]
        for k, eqn in enumerate(jaxpr.eqns):
            inputs = [read(v) for v in eqn.invars]
            outs = self.equation(node, k, eqn, inputs, loops)
            env.update(zip(eqn.outvars, outs, strict=True))
        return node, [read(v) for v in jaxpr.outvars]

    def equation(
        self, node: JaxprPlan, k: int, eqn: Any, inputs: list[ValueInfo], loops: tuple
    ) -> list[ValueInfo]:
        name, count = eqn.primitive.name, len(eqn.outvars)
        leaves = frozenset().union(*(i.leaves for i in inputs))
        data = any(i.data for i in inputs)
        fixed = [i.constant for i in inputs if i.constant is not None]
        if len(fixed) == len(inputs):
            outs = constants.of_equation(eqn, fixed, node.needed)
            return [ValueInfo(constant=constant) for constant in outs]
        if not leaves or name == primitives.STOP_GRADIENT:
            return [ValueInfo(data=data)] * count
        if name in primitives.CALLS:
            node.inner[k], outs = self.walk(primitives.inner(eqn), inputs, loops)
            self.remat |= name in primitives.REMAT and data
            return outs
        if name == primitives.SCAN and data:
            return self.scan(node, k, eqn, inputs, loops)
        if not data:
            outs = self.of_parameters(eqn, inputs, leaves)
            node.views[k] = [info.view is not None for info in outs]
            return outs
        self.meet(node, k, eqn, inputs, loops)
        return [ValueInfo(data=True)] * count

    def of_parameters(
        self, eqn: Any, inputs: list[ValueInfo], leaves: frozenset
    ) -> list:
        fixed = [not i.leaves for i in inputs]
        views = param_views.of_equation(
            eqn, [i.view for i in inputs], fixed, [i.constant for i in inputs]
        )
        why = next((i.why for i in inputs if i.why), "") or eqn.primitive.name

        def info(v: Any, view: ParamView | None) -> ValueInfo:
            if not jnp.issubdtype(v.aval.dtype, jnp.inexact):
                return ValueInfo()
            if view is None:
                return ValueInfo(leaves, False, None, why)
            seen = frozenset(p.leaf for p in view.parts if p.leaf is not None)
            return ValueInfo(seen, False, view)

        return [info(v, view) for v, view in zip(eqn.outvars, views, strict=True)]

    def meet(
        self, node: JaxprPlan, k: int, eqn: Any, inputs: list[ValueInfo], loops: tuple
    ) -> None:
        """Parameters meet data: at a site, or for each example."""
        weights = [j for j, i in enumerate(inputs) if i.leaves]
        for j in weights:
            info, rule = inputs[j], rules.find(eqn, j)
            if info.view is None:
                self.blame(info, info.why)
            elif rule is None:
                two = " of two parameters" if len(weights) > 1 else ""
                self.blame(info, eqn.primitive.name + two)
            elif why := rules.why_not(rule, eqn, j, info.view):
                self.blame(info, why)
            else:
                number, data = next(self.number), None
                operand = rule.operand(eqn, j)
                if operand is not None:
                    data = node.data.setdefault(eqn.invars[operand], number)
                tap = node.taps.setdefault(_where_added(node, k), number)
                site = Site(number, eqn, rule, j, operand, info.view, loops, data, tap)
                node.sites.setdefault(k, []).append(site)
                for part in info.view.parts:
                    if part.leaf is not None:
                        self.uses[part.leaf].append((site, part))

    def scan(
        self, node: JaxprPlan, k: int, eqn: Any, inputs: list[ValueInfo], loops: tuple
    ) -> list[ValueInfo]:
        loop = next(self.loop_number)
        consts, carry = _compat.scan_sizes(eqn)
        for info in inputs[consts : consts + carry]:
            self.blame(info, "initial carry of scan")
        infos = [*inputs[:consts], *[ValueInfo(data=True)] * carry]
        for info in inputs[consts + carry :]:
            view = info.view and param_views.slice_of_loop(info.view, loop)
            fixed = info.constant and constants.slice_of_loop(info.constant, loop)
            why = info.why or ("" if view else "scan")
            infos.append(info._replace(view=view, why=why, constant=fixed))
        node.inner[k], outs = self.walk(
            primitives.inner(eqn), infos, (*loops, (loop, primitives.turns(eqn)))
        )
        for info in outs:
            self.blame(info, "leaves a scan")
        return [ValueInfo(data=True)] * len(eqn.outvars)


def _users(jaxpr: Any) -> dict[Any, list[int | None]]:
    users: dict[Any, list[int | None]] = {}
    ends = [(None, v) for v in jaxpr.outvars]
    for k, v in [*((k, v) for k, e in enumerate(jaxpr.eqns) for v in e.invars), *ends]:
        if not _compat.is_literal(v):
            users.setdefault(v, []).append(k)
    return users


def _where_added(node: JaxprPlan, k: int) -> int:
    """The last of the additions that are all that becomes of equation k's output.

    The gradient with respect to a sum is that with respect to each of its terms.
    """
    while True:
        out = node.jaxpr.eqns[k].outvars[0]
        after, *others = node.users.get(out, [None])
        if after is None or others:
            return k
        then = node.jaxpr.eqns[after]
        same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
        added = then.primitive.name in primitives.ADD
        if not added or not same(out.aval, then.outvars[0].aval):
            return k
        k = after


def make_plan(
    closed: Any,
    leaves: Sequence[int],
    data: Sequence[bool],
    *,
    norms: bool = True,
    ord: int = 2,
    force: Any = None,
) -> Plan:
    """Walks a program and decides on a norm method for every parameter.

    Args:
      closed: The loss of one example.
      leaves: Which inputs are parameters.
      data: Per input whether it differs between examples.
      norms: Whether norms will be asked for; sums alone need no alignment.
      ord: p of the norm, 1 or 2.
      force: What to do wherever possible, for tests and measurements: `"factored"`,
        `"formed"` (after loops) or `"instantiated"`; a tuple says it by leaf.
    """
    jaxpr = closed.jaxpr
    infos = [
        ValueInfo(data=True) if d else ValueInfo(constant=Constant()) for d in data
    ]
    for number, k in enumerate(leaves):
        shape = jaxpr.invars[k].aval.shape
        infos[k] = ValueInfo(
            frozenset([number]), False, param_views.whole(number, shape)
        )
    walk = _Walk(len(leaves))
    root, outs = walk.walk(closed, infos, ())
    walk.blame(outs[0], "a term without data")  # others are not differentiated
    shapes = [jaxpr.invars[k].aval.shape for k in leaves]
    dtypes = [jaxpr.invars[k].aval.dtype for k in leaves]
    return _decide(walk, root, shapes, dtypes, norms, ord, force)


def _decide(
    walk: _Walk,
    root: JaxprPlan,
    shapes: list,
    dtypes: list,
    norms: bool,
    ord: int,
    force: Any,
) -> Plan:
    uses, reasons = walk.uses, walk.reasons
    forces = force if isinstance(force, tuple) else (force,) * len(uses)
    for leaf, dtype in enumerate(dtypes):
        if jnp.issubdtype(dtype, jnp.complexfloating):
            reasons[leaf].append("complex numbers")
    methods = [""] * len(uses)
    costs: dict[int, float] = {}
    for leaf, places in enumerate(uses):
        if reasons[leaf] or not places:
            methods[leaf] = INSTANTIATED if reasons[leaf] else "unused"
            continue
        if not norms:
            methods[leaf], costs[leaf] = "sum", 0
            continue
        why = unaligned(places, walk.remat)
        if why:
            methods[leaf], reasons[leaf] = INSTANTIATED, [why]
            continue
        methods[leaf], costs[leaf] = factored_cost(places)
        if any(only_formed(site, part) for site, part in places):
            reasons[leaf], costs[leaf] = ["scaled by element"], math.inf
        cost, way = WORDS * math.prod(shapes[leaf]), forces[leaf]
        instantiate = cost < costs[leaf] if way is None else way != "factored"
        instantiate &= methods[leaf] != BIAS_SUM
        if ord != 2 and methods[leaf] in SQUARED:
            costs[leaf] = math.inf
        instantiate |= costs[leaf] == math.inf
        in_time = any(len(p.stack) < len(s.loops) for s, p in places)
        if instantiate and (not in_time or way == "instantiated"):
            methods[leaf] = INSTANTIATED
    # Up to here by JAX, in loops too. The gradient of a weight in a loop is better
    # instantiated after the loop.
    differentiated = {k for k, method in enumerate(methods) if method == INSTANTIATED}
    sites = {s.number: s for places in uses for s, _ in places}
    formed = set()
    for number, site in sites.items():
        leaves = {p.leaf for p in site.view.parts if p.leaf is not None}
        leaves -= differentiated
        if not leaves or any(len(uses[leaf]) > 1 for leaf in leaves):
            continue
        if site.adds:
            # What positions add up to may be nothing but rounding, as it is with the
            # biases of keys: norm and sum have to be of one and the same addition.
            if norms and site.repeats and not site.view.repeated:
                formed.add(number)
            continue
        if all(site.sliced):
            continue
        cost = WORDS * sum(math.prod(shapes[leaf]) for leaf in leaves)
        ways = {forces[leaf] for leaf in leaves}
        cheaper = cost < sum(costs[leaf] for leaf in leaves)
        scaled = any(reasons[leaf] for leaf in leaves)
        if (cheaper and ways == {None}) or ways == {"formed"} or scaled:
            formed.add(number)
            for leaf in leaves:
                methods[leaf] = INSTANTIATED
    lost = {k for k, cost in costs.items()
            if cost == math.inf and methods[k] != INSTANTIATED}  # fmt: skip
    differentiated |= lost
    # What an addition adds up over is better not kept, unless a product keeps it too.
    kept = {s.tap for leaf, places in enumerate(uses) for s, _ in places
            if not s.adds and leaf not in differentiated}  # fmt: skip
    for leaf, places in enumerate(uses):
        if methods[leaf] == BIAS_SUM and any(
            s.repeats and s.tap not in kept for s, _ in places
        ):
            differentiated.add(leaf)
    for leaf in differentiated:
        methods[leaf] = INSTANTIATED
    used = {
        s.number: s
        for leaf, places in enumerate(uses)
        for s, _ in places
        if leaf not in differentiated
    }
    return Plan(
        root, uses, methods, reasons, used, frozenset(differentiated),
        frozenset(formed & used.keys()), walk.remat and norms, dtypes, ord,
    )  # fmt: skip
