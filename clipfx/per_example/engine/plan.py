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
from clipfx.per_example.engine import param_views, primitives, rules
from clipfx.per_example.engine.cost_model import (
    BIAS_SUM,
    by_region,
    factored_cost,
    unaligned,
    words,
)
from clipfx.per_example.engine.param_views import LeafSlice, ParamView
from clipfx.per_example.engine.rules.site import Door, Site

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
    """

    leaves: frozenset[int] = frozenset()
    data: bool = False
    view: ParamView | None = None
    why: str = ""


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
      regions: By equation that rematerializes, the number of that region.
      doors: By such an equation, where parameters enter.
    """

    jaxpr: Any
    consts: Sequence[Any]
    sites: dict[int, list[Site]]
    inner: dict[int, "JaxprPlan"]
    views: dict[int, list[bool]]
    data: dict[Any, int]
    taps: dict[int, int]
    users: dict[Any, list[int | None]]
    regions: dict[int, int]
    doors: dict[int, list[Door]]

    def numbers(self) -> set[int]:
        """Of all sites and doors here and inside."""
        inside = [node.numbers() for node in self.inner.values()]
        some = [*self.sites.values(), *self.doors.values()]
        return {s.number for sites in some for s in sites}.union(*inside)

    def all_taps(self) -> set[int]:
        """Numbers of taps here and inside."""
        inside = [node.all_taps() for node in self.inner.values()]
        return set(self.taps.values()).union(*inside)


class Region(NamedTuple):
    """A part of a program that is rematerialized: a rest of it that has its own tape.

    Nothing of it is kept. Its backward pass runs it again, and measures and adds up
    there what the tape of the program would have held. Of regions within each other a
    site belongs to the innermost.

    Attributes:
      sites: By number, with those loops alone that are inside of it.
      uses: Per leaf its sites and the parts there, likewise.
      doors: By number, where parameters enter.
      formed: Numbers of sites whose weight's gradient is instantiated.
    """

    sites: dict[int, Site]
    uses: list[list[tuple[Site, LeafSlice]]]
    doors: dict[int, Door]
    formed: frozenset[int]


class Plan(NamedTuple):
    """Decisions.

    Attributes:
      root: The program.
      uses: Per leaf its sites and the parts there.
      methods: Per leaf: `"unused"`, `"bias sum"`, `"outer product"`, `"Gram"`,
        `"segment sum"`, `"instantiated"`, or `"sum"` without norms.
      reasons: Per leaf why no site would do, empty if one does.
      sites: Those that are used, by number, but for what regions have.
      differentiated: Leaves whose gradients JAX's own derivative forms.
      formed: Numbers of sites whose weight's gradient is instantiated after loops.
      regions: What the program rematerializes, by number, if norms will be asked for.
      types: Of the parameters.
      ord: p of the norm, 1 or 2.
    """

    root: JaxprPlan
    uses: list[list[tuple[Site, LeafSlice]]]
    methods: list[str]
    reasons: list[list[str]]
    sites: dict[int, Site]
    differentiated: frozenset[int]
    formed: frozenset[int]
    regions: dict[int, Region]
    types: list
    ord: int

    def everywhere(self) -> dict[int, Site]:
        """All sites, those of regions too."""
        inside = [region.sites for region in self.regions.values()]
        return {n: site for sites in (self.sites, *inside) for n, site in sites.items()}

    def doors(self) -> dict[int, Door]:
        """Those of all regions."""
        return {n: x for r in self.regions.values() for n, x in r.doors.items()}

    @property
    def adds_up(self) -> bool:
        """Whether there are norms of sums over positions, unformed, that may cancel."""
        formed = self.formed.union(*(r.formed for r in self.regions.values()))

        def several(places: list) -> bool:
            (site, _), *others = places
            unformed = site.adds and site.number not in formed
            return bool(unformed and (others or site.repeats))

        return any(
            self.methods[leaf] in SQUARED or any(map(several, by_region(places)))
            for leaf, places in enumerate(self.uses)
            if leaf not in self.differentiated
        )


class _Walk:
    """State of the walk: numbers given out, uses seen."""

    def __init__(self, leaves: int):
        self.number = itertools.count()
        self.loop_number = itertools.count()
        self.uses: list[list[tuple[Site, LeafSlice]]] = [[] for _ in range(leaves)]
        self.reasons: list[list[str]] = [[] for _ in range(leaves)]
        self.region: int | None = None  # the innermost one around
        self.doors: dict[int, list[Door]] = {}

    def blame(self, info: ValueInfo, why: str) -> None:
        for leaf in info.leaves:
            self.reasons[leaf].append(why)

    def walk(
        self, closed: Any, infos: Sequence[ValueInfo], loops: tuple
    ) -> tuple[JaxprPlan, list[ValueInfo]]:
        jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
        env = dict(
            zip(jaxpr.constvars, [ValueInfo()] * len(jaxpr.constvars), strict=True)
        )
        env.update(zip(jaxpr.invars, infos, strict=True))
        read = lambda v: ValueInfo() if _compat.is_literal(v) else env[v]
        node = JaxprPlan(jaxpr, consts, {}, {}, {}, {}, {}, users_of(jaxpr), {}, {})
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
        if not leaves or name == primitives.STOP_GRADIENT:
            return [ValueInfo(data=data)] * count
        if name in primitives.REMAT and data:
            around, self.region = self.region, next(self.number)
            node.regions[k] = self.region
            node.doors[k] = self.doors[self.region] = [
                Door(next(self.number), j, info.view, loops)
                for j, info in enumerate(inputs)
                if info.view is not None
            ]
            node.inner[k], outs = self.walk(primitives.inner(eqn), inputs, loops)
            self.region = around
            return outs
        if name in primitives.CALLS:
            node.inner[k], outs = self.walk(primitives.inner(eqn), inputs, loops)
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
        views = param_views.of_equation(eqn, [i.view for i in inputs], fixed)
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
                site = Site(
                    number, eqn, rule, j, operand, info.view, loops, data, tap,
                    self.region,
                )  # fmt: skip
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
            why = info.why or ("" if view else "scan")
            infos.append(info._replace(view=view, why=why))
        node.inner[k], outs = self.walk(
            primitives.inner(eqn), infos, (*loops, (loop, primitives.turns(eqn)))
        )
        for info in outs:
            self.blame(info, "leaves a scan")
        return [ValueInfo(data=True)] * len(eqn.outvars)


def users_of(jaxpr: Any) -> dict[Any, list[int | None]]:
    """By variable the equations that read it, and None for the program's end."""
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
    jaxpr, infos = closed.jaxpr, [ValueInfo(data=d) for d in data]
    for number, k in enumerate(leaves):
        shape = jaxpr.invars[k].aval.shape
        infos[k] = ValueInfo(
            frozenset([number]), False, param_views.whole(number, shape)
        )
    walk = _Walk(len(leaves))
    root, outs = walk.walk(closed, infos, ())
    walk.blame(outs[0], "a term without data")  # others are not differentiated
    types = [jaxpr.invars[k].aval for k in leaves]
    return _decide(walk, root, types, norms, ord, force)


def _decide(
    walk: _Walk,
    root: JaxprPlan,
    types: list,
    norms: bool,
    ord: int,
    force: Any,
) -> Plan:
    uses, reasons = walk.uses, walk.reasons
    forces = force if isinstance(force, tuple) else (force,) * len(uses)
    shapes = [aval.shape for aval in types]
    for leaf, aval in enumerate(types):
        if jnp.issubdtype(aval.dtype, jnp.complexfloating):
            reasons[leaf].append("complex numbers")
    # Around each region so many loops.
    outer = {r: len(doors[0].loops) for r, doors in walk.doors.items() if doors}
    methods = [""] * len(uses)
    costs: dict[int, float] = {}
    for leaf, places in enumerate(uses):
        if reasons[leaf] or not places:
            methods[leaf] = INSTANTIATED if reasons[leaf] else "unused"
            continue
        if not norms:
            methods[leaf], costs[leaf] = "sum", 0
            continue
        why = unaligned(places, outer)
        if why:
            methods[leaf], reasons[leaf] = INSTANTIATED, [why]
            continue
        methods[leaf], costs[leaf] = factored_cost(places)
        cost, way = words() * math.prod(shapes[leaf]), forces[leaf]
        instantiate = cost < costs[leaf] if way is None else way != "factored"
        instantiate &= methods[leaf] != BIAS_SUM
        if ord != 2 and methods[leaf] in SQUARED:
            instantiate, costs[leaf] = True, math.inf
        in_time = any(len(p.stack) < len(s.loops) for s, p in places)
        in_time |= places[0][0].region is not None
        if instantiate and (not in_time or way == "instantiated"):
            methods[leaf] = INSTANTIATED
    # Up to here by JAX, in loops too. The gradient of a weight in a loop is better
    # instantiated after the loop, that in a region when its backward pass has run.
    differentiated = {k for k, method in enumerate(methods) if method == INSTANTIATED}
    sites = {s.number: s for places in uses for s, _ in places}
    regions = [region for places in uses for region in by_region(places)]
    shared = {s.number for region in regions if len(region) > 1 for s, _ in region}
    formed = set()
    for number, site in sites.items():
        leaves = {p.leaf for p in site.view.parts if p.leaf is not None}
        leaves -= differentiated
        if site.adds:
            # What positions add up to may be nothing but rounding, as it is with the
            # biases of keys: norm and sum have to be of one and the same addition. And
            # of one and the same product with data, which no factor takes out of range.
            alone = norms and number not in shared
            if leaves and alone and (site.repeats or site.operand is not None):
                formed.add(number)
            continue
        alike = [places for leaf in leaves for places in by_region(uses[leaf])]
        if any(len(places) > 1 for places in alike) or not leaves:
            continue
        if all(site.sliced) and site.region is None:
            continue
        cost = words() * sum(math.prod(shapes[leaf]) for leaf in leaves)
        ways = {forces[leaf] for leaf in leaves}
        cheaper = cost < sum(costs[leaf] for leaf in leaves)
        if (cheaper and ways == {None}) or ways == {"formed"}:
            formed.add(number)
            for leaf in leaves:
                methods[leaf] = INSTANTIATED
    if ord != 2:
        differentiated |= {k for k, method in enumerate(methods) if method in SQUARED}
    for leaf in differentiated:
        methods[leaf] = INSTANTIATED
    # What is added up is better not kept, unless a product keeps it too: JAX does it,
    # but for several slices of a leaf, each of which would be as large as the leaf.
    kept = {s.tap for leaf, places in enumerate(uses) for s, _ in places
            if not s.adds and leaf not in differentiated}  # fmt: skip
    for leaf, places in enumerate(uses):
        if methods[leaf] != BIAS_SUM or any(s.region is not None for s, _ in places):
            continue
        slices = all(s.number in formed and not s.loops for s, _ in places)
        keeps = any(
            s.operand is not None or (s.repeats and s.tap not in kept)
            for s, _ in places
        )
        if keeps and not (slices and len(places) > 1):
            differentiated.add(leaf)
    for leaf in _joined(differentiated, walk.doors):
        differentiated.add(leaf)
        methods[leaf] = INSTANTIATED
    used = {
        s.number: s
        for leaf, places in enumerate(uses)
        for s, _ in places
        if leaf not in differentiated
    }
    inside = {r: {n: s for n, s in used.items() if s.region == r} for r in outer}
    regions = {
        r: _region(sites, uses, walk.doors[r], outer[r], formed, differentiated)
        for r, sites in inside.items()
        if sites and norms
    }
    sites = {n: s for n, s in used.items() if s.region not in regions}
    return Plan(
        root, uses, methods, reasons, sites, frozenset(differentiated),
        frozenset(formed & sites.keys()), regions, types, ord,
    )  # fmt: skip


def _joined(differentiated: set[int], doors: dict[int, list[Door]]) -> set[int]:
    """Further leaves: those that enter a region together with a differentiated one."""
    joined = [leaves_of(door.view) for some in doors.values() for door in some]
    every = set(differentiated)
    while more := {x for some in joined if some & every for x in some} - every:
        every |= more
    return every - differentiated


def leaves_of(view: ParamView) -> set[int]:
    """Those that a value consists of."""
    return {part.leaf for part in view.parts if part.leaf is not None}


def _region(
    sites: dict[int, Site],
    uses: list,
    doors: list[Door],
    outer: int,
    formed: set[int],
    differentiated: set[int],
) -> Region:
    """A region, seen from the inside."""
    # Each with data of its own: where one is not differentiated its data do not come.
    cut = {
        n: site._replace(
            loops=site.loops[outer:], data=None if site.data is None else n
        )
        for n, site in sites.items()
    }
    here = [[(cut[s.number], part) for s, part in places if s.number in cut]
            if leaf not in differentiated else []
            for leaf, places in enumerate(uses)]  # fmt: skip
    leaves = {leaf for leaf, places in enumerate(here) if places}
    enter = {x.number: x for x in doors if leaves_of(x.view) & leaves}
    return Region(cut, here, enter, frozenset(formed & cut.keys()))
