"""What becomes of every parameter: per leaf the cheaper of what its uses allow."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from clipfx.per_example.engine import param_views
from clipfx.per_example.engine.constants import Constant
from clipfx.per_example.engine.cost_model import (
    BIAS_SUM,
    by_region,
    factored_cost,
    only_formed,
    unaligned,
    unsliced,
    words,
)
from clipfx.per_example.engine.param_views import LeafSlice
from clipfx.per_example.engine.rules.site import Door, Site
from clipfx.per_example.engine.walk import JaxprPlan, ValueInfo, Walked, walk

# Methods that know the 2-norm only.
SQUARED = {"Gram", "segment sum"}
INSTANTIATED = "instantiated"


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

    def places(self) -> dict[int, int]:
        """Which inputs doors are."""
        return {n: door.weight for n, door in self.doors.items()}


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


def make_plan(
    closed: Any,
    leaves: Sequence[int],
    data: Sequence[bool],
    *,
    size: int,
    norms: bool = True,
    ord: int = 2,
    force: Any = None,
    stacked: Sequence[bool] | None = None,
) -> Plan:
    """Walks a program and decides on a norm method for every parameter.

    Args:
      closed: The loss of one example.
      leaves: Which inputs are parameters.
      data: Per input whether it differs between examples.
      size: How many examples a batch has.
      norms: Whether norms will be asked for; sums alone need no alignment.
      ord: p of the norm, 1 or 2.
      force: What to do wherever possible, for tests and measurements: `"factored"`,
        `"formed"` (after loops) or `"instantiated"`; a tuple says it by leaf.
      stacked: Per leaf whether its slices along the first dimension have groups of
        their own; None for none.
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
    types = [jaxpr.invars[k].aval for k in leaves]
    walked = walk(closed, infos, len(leaves))
    stacked = [False] * len(leaves) if stacked is None else stacked
    return _decide(walked, types, size, norms, ord, force, stacked)


def _decide(
    walked: Walked,
    types: list,
    size: int,
    norms: bool,
    ord: int,
    force: Any,
    stacked: Sequence[bool],
) -> Plan:
    root, uses, reasons, doors = walked
    # Around each region so many loops.
    outer = {r: len(some[0].loops) for r, some in doors.items() if some}
    uses = _kept(uses, outer)
    forces = force if isinstance(force, tuple) else (force,) * len(uses)
    shapes = [aval.shape for aval in types]
    for leaf, aval in enumerate(types):
        if jnp.issubdtype(aval.dtype, jnp.complexfloating):
            reasons[leaf].append("complex numbers")
    count = [math.prod(shape) for shape in shapes]
    instantiated = lambda leaf: count[leaf] * words(size * count[leaf])
    methods = [""] * len(uses)
    costs: dict[int, float] = {}
    for leaf, places in enumerate(uses):
        if reasons[leaf] or not places:
            methods[leaf] = INSTANTIATED if reasons[leaf] else "unused"
            continue
        if not norms:
            methods[leaf], costs[leaf] = "sum", 0
            continue
        why = unaligned(places, outer) or (
            unsliced(places, outer) if stacked[leaf] else ""
        )
        if why:
            methods[leaf], reasons[leaf] = INSTANTIATED, [why]
            continue
        methods[leaf], costs[leaf] = factored_cost(places)
        if any(only_formed(site, part) for site, part in places):
            reasons[leaf], costs[leaf] = ["scaled by element"], math.inf
        cost, way = instantiated(leaf), forces[leaf]
        instantiate = cost < costs[leaf] if way is None else way != "factored"
        instantiate &= methods[leaf] != BIAS_SUM
        if ord != 2 and methods[leaf] in SQUARED:
            costs[leaf] = math.inf
        instantiate |= costs[leaf] == math.inf
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
        leaves = site.view.leaves - differentiated
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
        cost = sum(map(instantiated, leaves))
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
    for leaf in _joined(differentiated, doors):
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
        r: _region(sites, uses, doors[r], outer[r], formed, differentiated)
        for r, sites in inside.items()
        if sites and norms
    }
    sites = {n: s for n, s in used.items() if s.region not in regions}
    return Plan(
        root, uses, methods, reasons, sites, frozenset(differentiated),
        frozenset(formed & sites.keys()), regions, types, ord,
    )  # fmt: skip


def _kept(uses: list, outer: dict[int, int]) -> list:
    """The uses, some of which are taken out of their regions.

    A weight in several regions, or in all turns of a loop around one (a head whose loss
    is taken in chunks), has a norm that none of them knows. Where it is less than the
    gradient of an example what its sites see is kept, and measured jointly.
    """
    out: set[int] = set()
    for places in uses:
        whole = [(site._replace(region=None), part) for site, part in places]
        if not unaligned(places, outer) or unaligned(whole, outer):
            continue
        count = math.prod(high - low for low, high in places[0][1].region or ())
        turns = lambda site: math.prod(n for _, n in site.loops)
        inside = [site for site, _ in places if site.region is not None]
        if sum(turns(site) * _words(site) for site in inside) < count:
            out |= {site.number for site, _ in places}
    free = lambda site: site._replace(region=None) if site.number in out else site
    return [[(free(site), part) for site, part in places] for places in uses]


def _words(site: Site) -> int:
    """What a site sees in one turn."""
    inputs = [v for _, _, v in site.recorded]
    return sum(math.prod(v.aval.shape) for v in (site.tapped.outvars[0], *inputs))


def _joined(differentiated: set[int], doors: dict[int, list[Door]]) -> set[int]:
    """Further leaves: those that enter a region together with a differentiated one."""
    joined = [door.view.leaves for some in doors.values() for door in some]
    every = set(differentiated)
    while more := {x for some in joined if some & every for x in some} - every:
        every |= more
    return every - differentiated


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
            loops=site.loops[outer:],
            data=None if site.data is None else n,
            product=site.product and site.product._replace(data=site.product.number),
        )
        for n, site in sites.items()
    }
    here = [[(cut[s.number], part) for s, part in places if s.number in cut]
            if leaf not in differentiated else []
            for leaf, places in enumerate(uses)]  # fmt: skip
    leaves = {leaf for leaf, places in enumerate(here) if places}
    enter = {x.number: x for x in doors if x.view.leaves & leaves}
    return Region(cut, here, enter, frozenset(formed & cut.keys()))
