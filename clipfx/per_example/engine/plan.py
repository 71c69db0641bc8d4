"""What becomes of every parameter: the walk through a program, and its decisions.

A value is constant, made of parameters alone, or data. An equation where the second
kind meets the third is a site if there is a rule for it; in any other place the leaves
behind the value are *instantiated*, that is differentiated for each example. Per leaf
the cheaper of the roads that its uses allow is taken.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from clipfx import _compat
from clipfx.per_example.engine import param_views
from clipfx.per_example.engine.cost_model import WORDS, factored_cost, unaligned
from clipfx.per_example.engine.param_views import Part, View
from clipfx.per_example.engine.sites import ADD, Site, why_not

# Roads that know the 2-norm only.
SQUARED = {"Gram", "segment sum"}


class Info(NamedTuple):
    """What is known of a value before anything is computed.

    Attributes:
      leaves: The parameters it is made of; empty for constants and data.
      data: Whether it differs between examples.
      view: How it consists of parameters, None if it is computed from them.
      why: What computed it.
    """

    leaves: frozenset[int] = frozenset()
    data: bool = False
    view: View | None = None
    why: str = ""


class Node(NamedTuple):
    """A program, and what to do at those of its equations that are not just run.

    Attributes:
      jaxpr: The program.
      consts: Values of its constants.
      sites: By equation, the site.
      inner: By equation, the program inside.
      views: By equation, which outputs are views of parameters.
      data: By variable the number of what is recorded of it.
      taps: By equation the number of the tap on its output.
      users: By variable the equations that read it, and None for the program's end.
    """

    jaxpr: Any
    consts: Sequence[Any]
    sites: dict[int, Site]
    inner: dict[int, "Node"]
    views: dict[int, list[bool]]
    data: dict[Any, int]
    taps: dict[int, int]
    users: dict[Any, list[int | None]]

    def numbers(self) -> set[int]:
        """Of all sites here and inside."""
        inside = [node.numbers() for node in self.inner.values()]
        return {s.number for s in self.sites.values()}.union(*inside)

    def all_taps(self) -> set[int]:
        """Numbers of taps here and inside."""
        inside = [node.all_taps() for node in self.inner.values()]
        return set(self.taps.values()).union(*inside)


class Plan(NamedTuple):
    """Decisions.

    Attributes:
      root: The program.
      uses: Per leaf its sites and the parts there.
      roads: Per leaf: `"unused"`, `"direct"`, `"outer product"`, `"Gram"`,
        `"segment sum"`, `"formed"`, `"instantiated"`, or `"sum"` without norms.
      reasons: Per leaf why no site would do, empty if one does.
      sites: Those that are used, by number.
      formed: Numbers of sites whose weight's gradient is formed for each example.
      remat: Whether the program rematerializes.
      dtypes: Of the parameters.
      ord: p of the norm, 1 or 2.
    """

    root: Node
    uses: list[list[tuple[Site, Part]]]
    roads: list[str]
    reasons: list[list[str]]
    sites: dict[int, Site]
    formed: frozenset[int]
    remat: bool
    dtypes: list
    ord: int

    @property
    def adds_up(self) -> bool:
        """Whether there are norms of sums over positions, unformed, that may cancel."""

        def direct(places: list) -> bool:
            site = places[0][0]
            repeats = site.repeats and site.number not in self.formed
            return len(places) > 1 or repeats

        return any(
            road in SQUARED or (road == "direct" and direct(places))
            for road, places in zip(self.roads, self.uses, strict=True)
        )


class _Walk:
    """State of the walk: numbers given out, uses seen."""

    def __init__(self, leaves: int):
        self.number = itertools.count()
        self.loop_number = itertools.count()
        self.uses: list[list[tuple[Site, Part]]] = [[] for _ in range(leaves)]
        self.reasons: list[list[str]] = [[] for _ in range(leaves)]
        self.remat = False

    def blame(self, info: Info, why: str) -> None:
        for leaf in info.leaves:
            self.reasons[leaf].append(why)

    def walk(
        self, closed: Any, infos: Sequence[Info], loops: tuple
    ) -> tuple[Node, list[Info]]:
        jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
        env = dict(zip(jaxpr.constvars, [Info()] * len(jaxpr.constvars), strict=True))
        env.update(zip(jaxpr.invars, infos, strict=True))
        read = lambda v: Info() if _compat.is_literal(v) else env[v]
        node = Node(jaxpr, consts, {}, {}, {}, {}, {}, _users(jaxpr))
        for k, eqn in enumerate(jaxpr.eqns):
            inputs = [read(v) for v in eqn.invars]
            outs = self.equation(node, k, eqn, inputs, loops)
            env.update(zip(eqn.outvars, outs, strict=True))
        return node, [read(v) for v in jaxpr.outvars]

    def equation(
        self, node: Node, k: int, eqn: Any, inputs: list[Info], loops: tuple
    ) -> list[Info]:
        name, count = eqn.primitive.name, len(eqn.outvars)
        leaves = frozenset().union(*(i.leaves for i in inputs))
        data = any(i.data for i in inputs)
        if not leaves or name == "stop_gradient":
            return [Info(data=data)] * count
        if name in CALLS:
            node.inner[k], outs = self.walk(eqn.params["jaxpr"], inputs, loops)
            self.remat |= name in REMAT and data
            return outs
        if name == "scan" and data:
            return self.scan(node, k, eqn, inputs, loops)
        if not data:
            outs = self.of_parameters(eqn, inputs, leaves)
            node.views[k] = [info.view is not None for info in outs]
            return outs
        self.meet(node, k, eqn, inputs, loops)
        return [Info(data=True)] * count

    def of_parameters(self, eqn: Any, inputs: list[Info], leaves: frozenset) -> list:
        fixed = [not i.leaves for i in inputs]
        views = param_views.of_equation(eqn, [i.view for i in inputs], fixed)
        why = next((i.why for i in inputs if i.why), "") or eqn.primitive.name

        def info(v: Any, view: View | None) -> Info:
            if not jnp.issubdtype(v.aval.dtype, jnp.inexact):
                return Info()
            if view is None:
                return Info(leaves, False, None, why)
            seen = frozenset(p.leaf for p in view.parts if p.leaf is not None)
            return Info(seen, False, view)

        return [info(v, view) for v, view in zip(eqn.outvars, views, strict=True)]

    def meet(
        self, node: Node, k: int, eqn: Any, inputs: list[Info], loops: tuple
    ) -> None:
        """Parameters meet data: at a site, or for each example."""
        weights = [j for j, i in enumerate(inputs) if i.leaves]
        for j in weights:
            info = inputs[j]
            if info.view is None:
                self.blame(info, info.why)
            elif len(weights) > 1:
                self.blame(info, f"{eqn.primitive.name} of two parameters")
            elif why := why_not(eqn, j, info.view):
                self.blame(info, why)
            else:
                number = next(self.number)
                data = None
                if eqn.primitive.name not in ADD:
                    data = node.data.setdefault(eqn.invars[1 - j], number)
                tap = node.taps.setdefault(_where_added(node, k), number)
                site = Site(number, eqn, j, info.view, loops, data, tap)
                node.sites[k] = site
                for part in info.view.parts:
                    if part.leaf is not None:
                        self.uses[part.leaf].append((site, part))

    def scan(
        self, node: Node, k: int, eqn: Any, inputs: list[Info], loops: tuple
    ) -> list[Info]:
        p, loop = eqn.params, next(self.loop_number)
        consts, carry = _compat.scan_sizes(eqn)
        for info in inputs[consts : consts + carry]:
            self.blame(info, "initial carry of scan")
        infos = [*inputs[:consts], *[Info(data=True)] * carry]
        for info in inputs[consts + carry :]:
            view = info.view and param_views.slice_of_loop(info.view, loop)
            why = info.why or ("" if view else "scan")
            infos.append(info._replace(view=view, why=why))
        node.inner[k], outs = self.walk(
            p["jaxpr"], infos, (*loops, (loop, p["length"]))
        )
        for info in outs:
            self.blame(info, "leaves a scan")
        return [Info(data=True)] * len(eqn.outvars)


def _users(jaxpr: Any) -> dict[Any, list[int | None]]:
    users: dict[Any, list[int | None]] = {}
    ends = [(None, v) for v in jaxpr.outvars]
    for k, v in [*((k, v) for k, e in enumerate(jaxpr.eqns) for v in e.invars), *ends]:
        if not _compat.is_literal(v):
            users.setdefault(v, []).append(k)
    return users


def _where_added(node: Node, k: int) -> int:
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
        if then.primitive.name not in ADD or not same(out.aval, then.outvars[0].aval):
            return k
        k = after


REMAT = {"checkpoint", "remat", "remat2"}
CALLS = {"closed_call", "core_call", "jit", "pjit", *REMAT}


def make_plan(
    closed: Any,
    leaves: Sequence[int],
    data: Sequence[bool],
    *,
    norms: bool = True,
    ord: int = 2,
    force: str | None = None,
) -> Plan:
    """Walks a program and decides on a road for every parameter.

    Args:
      closed: The loss of one example.
      leaves: Which inputs are parameters.
      data: Per input whether it differs between examples.
      norms: Whether norms will be asked for; sums alone need no alignment.
      ord: p of the norm, 1 or 2.
      force: A road to take wherever possible, for tests and measurements:
        `"factored"`, `"formed"` or `"instantiated"`.
    """
    jaxpr, infos = closed.jaxpr, [Info(data=d) for d in data]
    for number, k in enumerate(leaves):
        shape = jaxpr.invars[k].aval.shape
        infos[k] = Info(frozenset([number]), False, param_views.whole(number, shape))
    walk = _Walk(len(leaves))
    root, outs = walk.walk(closed, infos, ())
    walk.blame(outs[0], "a term without data")  # others are not differentiated
    shapes = [jaxpr.invars[k].aval.shape for k in leaves]
    dtypes = [jaxpr.invars[k].aval.dtype for k in leaves]
    return _decide(walk, root, shapes, dtypes, norms, ord, force)


def _decide(
    walk: _Walk,
    root: Node,
    shapes: list,
    dtypes: list,
    norms: bool,
    ord: int,
    force: Any,
) -> Plan:
    uses, reasons = walk.uses, walk.reasons
    for leaf, dtype in enumerate(dtypes):
        if jnp.issubdtype(dtype, jnp.complexfloating):
            reasons[leaf].append("complex numbers")
    roads = [""] * len(uses)
    costs: dict[int, float] = {}
    for leaf, places in enumerate(uses):
        if reasons[leaf] or not places:
            roads[leaf] = "instantiated" if reasons[leaf] else "unused"
            continue
        if not norms:
            roads[leaf], costs[leaf] = "sum", 0
            continue
        why = unaligned(places, walk.remat)
        if why:
            roads[leaf], reasons[leaf] = "instantiated", [why]
            continue
        roads[leaf], costs[leaf] = factored_cost(places)
        large = WORDS * math.prod(shapes[leaf])
        dear = large < costs[leaf] if force is None else force != "factored"
        dear &= roads[leaf] != "direct"
        if ord != 2 and roads[leaf] in SQUARED:
            dear, costs[leaf] = True, math.inf
        in_time = any(len(p.stack) < len(s.loops) for s, p in places)
        if dear and (not in_time or force == "instantiated"):
            roads[leaf] = "instantiated"
    # The gradient of a weight in a loop is better formed after the loop than in it.
    sites = {s.number: s for places in uses for s, _ in places}
    formed = set()
    for number, site in sites.items():
        own = [p.leaf for p in site.view.parts if p.leaf is not None]
        own = [leaf for leaf in own if roads[leaf] != "instantiated"]
        if not own or any(len(uses[leaf]) > 1 for leaf in own):
            continue
        if site.kind in ADD:
            # What positions add up to may be nothing but rounding, as it is with the
            # biases of keys: norm and sum have to be of one and the same addition.
            if norms and site.repeats and not site.view.repeated:
                formed.add(number)
            continue
        if all(site.sliced):
            continue
        words = WORDS * sum(math.prod(shapes[leaf]) for leaf in own)
        dear = words < sum(costs[leaf] for leaf in own)
        if (dear and force is None) or force == "formed":
            formed.add(number)
            for leaf in own:
                roads[leaf] = "formed"
    if ord != 2:
        for leaf, road in enumerate(roads):
            roads[leaf] = "instantiated" if road in SQUARED else road
    # What an addition adds up over is better not kept, unless a product keeps it too.
    kept = {s.tap for leaf, places in enumerate(uses) for s, _ in places
            if s.kind not in ADD and roads[leaf] != "instantiated"}  # fmt: skip
    for leaf, places in enumerate(uses):
        if roads[leaf] == "direct" and any(
            s.repeats and s.tap not in kept for s, _ in places
        ):
            roads[leaf] = "instantiated"
    used = {
        s.number: s
        for leaf, places in enumerate(uses)
        for s, _ in places
        if roads[leaf] != "instantiated"
    }
    remat = walk.remat and norms
    formed = frozenset(formed & used.keys())
    return Plan(root, uses, roads, reasons, used, formed, remat, dtypes, ord)
