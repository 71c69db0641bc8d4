"""The walk through a program: where parameters go, and where they meet data.

A value is constant, made of parameters alone, or data. An equation where the second
kind meets the third is a site if there is a rule for it; in any other place the leaves
behind the value are *instantiated*, that is differentiated for each example.
"""

import itertools
import math
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from clipfx import _compat
from clipfx.per_example.engine import (
    constants,
    cost_model,
    look_ups,
    param_views,
    primitives,
    rules,
)
from clipfx.per_example.engine.constants import Constant
from clipfx.per_example.engine.look_ups import LookUp, Rows, Use
from clipfx.per_example.engine.param_views import LeafSlice, ParamView
from clipfx.per_example.engine.rules import product_by_id
from clipfx.per_example.engine.rules.site import IDS, Door, Product, Site, SiteRule


class ValueInfo(NamedTuple):
    """What is known of a value before anything is computed.

    Attributes:
      leaves: The parameters it is made of; empty for constants and data.
      data: Whether it differs between examples.
      view: How it consists of parameters, None if it is computed from them.
      why: What computed it.
      constant: Where it comes from, if neither from parameters nor from data.
      rows: Of which weight it is rows that data look up, None if it is not.
    """

    leaves: frozenset[int] = frozenset()
    data: bool = False
    view: ParamView | None = None
    why: str = ""
    constant: Constant | None = None
    rows: Rows | None = None


class JaxprPlan(NamedTuple):
    """A program, and what to do at those of its equations that are not just run.

    Attributes:
      jaxpr: The program.
      consts: Values of its constants.
      sites: By equation, a site for each weight.
      inner: By equation, the program inside.
      branches: By equation, the programs that data choose from.
      views: By equation, which outputs are views of parameters.
      data: By variable the number of what is recorded of it.
      taps: By equation the number of the tap on its output.
      records: By equation, what is recorded there: the number of a site, that of the
        input among those of sites, its variable, and the number of the record.
      users: By variable the equations that read it, and None for the program's end.
      regions: By equation that rematerializes, the number of that region.
      doors: By such an equation, where parameters enter.
      needed: Constants that views depend on.
    """

    jaxpr: Any
    consts: Sequence[Any]
    sites: dict[int, list[Site]]
    inner: dict[int, "JaxprPlan"]
    branches: dict[int, list["JaxprPlan"]]
    views: dict[int, list[bool]]
    data: dict[Any, int]
    taps: dict[int, int]
    records: dict[int, list[tuple[int, int, Any, int]]]
    users: dict[Any, list[int | None]]
    regions: dict[int, int]
    doors: dict[int, list[Door]]
    needed: set[Any]

    def inside(self, k: int) -> list["JaxprPlan"]:
        """Programs inside of equation k."""
        called = [self.inner[k]] if k in self.inner else []
        return called + self.branches.get(k, [])

    def enters(self, k: int, sites: Container[int]) -> bool:
        """Whether equation k is run by the equations inside, for some of these sites.

        Or for what JAX cannot map over examples.
        """
        inside = self.inside(k)
        return bool(inside) and (
            any(n in sites for x in inside for n in x.numbers())
            or primitives.holds(self.jaxpr.eqns[k], primitives.RAGGED_DOT)
        )

    def insides(self) -> list["JaxprPlan"]:
        """All programs inside, but for those inside of them."""
        return [x for k in self.inner | self.branches for x in self.inside(k)]

    def numbers(self) -> set[int]:
        """Of all sites and doors here and inside."""
        inside = [node.numbers() for node in self.insides()]
        some = [*self.sites.values(), *self.doors.values()]
        own = {s.number for sites in some for s in sites}
        data = [{n for pair in some for n in pair[:2]}
                for some in self.records.values()]  # fmt: skip
        return own.union(*data, *inside)

    def all_regions(self) -> set[int]:
        """Numbers of what is rematerialized here and inside."""
        inside = [node.all_regions() for node in self.insides()]
        return set(self.regions.values()).union(*inside)

    def all_taps(self) -> set[int]:
        """Numbers of taps here and inside."""
        inside = [node.all_taps() for node in self.insides()]
        return set(self.taps.values()).union(*inside)


class Walked(NamedTuple):
    """What a walk has found.

    Attributes:
      root: The program.
      uses: Per leaf its sites and the parts there.
      reasons: Per leaf why no site would do, empty if one does.
      doors: By region, where parameters enter.
    """

    root: JaxprPlan
    uses: list[list[tuple[Site, LeafSlice]]]
    reasons: list[list[str]]
    doors: dict[int, list[Door]]


def walk(closed: Any, infos: Sequence[ValueInfo], leaves: int) -> Walked:
    """Walks through a program.

    Args:
      closed: The loss of one example.
      infos: What is known of its inputs.
      leaves: How many parameters there are.
    """
    found = _Walk(leaves)
    root, outs = found.walk(closed, infos, ())
    found.blame(outs[0], "a term without data")  # others are not differentiated
    found.place_look_ups()
    return Walked(root, found.uses, found.reasons, found.doors)


class _Walk:
    """State of the walk: numbers given out, uses seen."""

    def __init__(self, leaves: int):
        self.number = itertools.count()
        self.loop_number = itertools.count()
        self.uses: list[list[tuple[Site, LeafSlice]]] = [[] for _ in range(leaves)]
        self.reasons: list[list[str]] = [[] for _ in range(leaves)]
        self.region: int | None = None  # the innermost one around
        self.doors: dict[int, list[Door]] = {}
        self.look_ups: list[LookUp] = []

    def blame(self, info: ValueInfo, why: str) -> None:
        if info.rows is not None:
            self.look_ups[info.rows.number].elsewhere.append(True)
        for leaf in info.leaves:
            self.reasons[leaf].append(why)

    def walk(
        self, closed: Any, infos: Sequence[ValueInfo], loops: tuple
    ) -> tuple[JaxprPlan, list[ValueInfo]]:
        jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
        node = JaxprPlan(
            jaxpr, consts, {}, {}, {}, {}, {}, {}, {}, users_of(jaxpr), {}, {}, set()
        )
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
        rows = any(i.rows is not None for i in inputs)
        if rows and name not in primitives.CALLS:
            out = self.follow(Use(node, k, eqn, 0, loops, self.region), inputs)
            if out is not None:
                return [out]
            rows, inputs = False, [i._replace(rows=None) for i in inputs]
        fixed = [i.constant for i in inputs if i.constant is not None]
        if len(fixed) == len(inputs):
            outs = constants.of_equation(eqn, fixed, node.needed)
            return [ValueInfo(constant=constant) for constant in outs]
        matters = (
            leaves
            or rows
            # What JAX cannot map is to be run one by one, without parameters too.
            or (data and primitives.holds(eqn, primitives.RAGGED_DOT))
        )
        if not matters or name == primitives.STOP_GRADIENT:
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
        if name == primitives.COND and inputs[0].data:
            node.branches[k] = []
            for branch in primitives.branches(eqn):
                program, outs = self.walk(branch, inputs[1:], loops)
                node.branches[k].append(program)
                for info in outs:
                    self.blame(info, "leaves a branch")
            return [ValueInfo(data=True)] * count
        if not data:
            outs = self.of_parameters(eqn, inputs, leaves)
            node.views[k] = [info.view is not None for info in outs]
            return outs
        taken = self.meet(node, k, eqn, inputs, loops)
        return [ValueInfo(data=True, rows=taken)] * count

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
            return ValueInfo(view.leaves, False, view)

        return [info(v, view) for v, view in zip(eqn.outvars, views, strict=True)]

    def meet(
        self, node: JaxprPlan, k: int, eqn: Any, inputs: list[ValueInfo], loops: tuple
    ) -> Rows | None:
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
                use = Use(node, k, eqn, j, loops, self.region)
                dims = look_ups.dims_of(eqn, info.view) if rule.left == IDS else None
                if dims is not None:
                    self.look_ups.append(LookUp(use, info.view, [], []))
                    return Rows(len(self.look_ups) - 1, dims)
                product = None
                if rule.second is not None:
                    number = next(self.number)
                    product = Product(eqn, j, rule.second, number, number, ())
                self.place(use, self.site(use, rule, info.view, product), use)
        return None

    def site(
        self, use: Use, rule: SiteRule, view: ParamView, product: Product | None = None
    ) -> Site:
        """One with numbers of its own."""
        number, operand = next(self.number), rule.operand(use.eqn, use.weight)
        data = None if operand is None else number
        return Site(
            number, use.eqn, rule, use.weight, operand, view, use.loops, data, number,
            use.region, product,
        )  # fmt: skip

    def place(
        self, use: Use, site: Site, tapped: Use, scaled: Sequence[Use] = ()
    ) -> None:
        """Puts a site into the program, where it shares what others record.

        Args:
          use: Where.
          site: From `site`.
          tapped: Where its product is, if it has one; else where it is.
          scaled: Where its rows are multiplied on their way to it.
        """

        def record(at: Use, number: int, v: Any, data: int) -> None:
            kept = (site.number, number, v, data)
            at.node.records.setdefault(at.k, []).append(kept)

        def share(at: Use, x: Site | Product) -> int:
            v = at.eqn.invars[x.operand]
            data = at.node.data.setdefault(v, x.number)
            record(at, x.number, v, data)
            return data

        if site.operand is not None:
            site = site._replace(data=share(use, site))
        if site.product is not None:
            data = share(tapped, site.product)
            site = site._replace(product=site.product._replace(data=data))
        for at, x in zip(scaled, site.scales, strict=True):
            record(at, x.number, x.var, x.number)
        node, k, *_ = tapped
        tap = node.taps.setdefault(_where_added(node, k), site.number)
        site = site._replace(tap=tap)
        use.node.sites.setdefault(use.k, []).append(site)
        for part in site.view.parts:
            if part.leaf is not None:
                self.uses[part.leaf].append((site, part))

    def follow(self, use: Use, inputs: list[ValueInfo]) -> ValueInfo | None:
        """What an equation makes of rows that were looked up, None if it is unknown."""
        (j, *others) = [j for j, i in enumerate(inputs) if i.rows is not None]
        rows = inputs[j].rows
        assert rows is not None
        dims = look_ups.moved(use.eqn, rows.dims)
        if dims is not None:
            return ValueInfo(data=True, rows=rows._replace(dims=dims))
        alone = not others and not any(i.leaves for i in inputs)
        use = use._replace(weight=j)
        if alone and use.eqn.primitive.name == primitives.DOT:
            self.look_ups[rows.number].products.append((use, rows))
            return ValueInfo(data=True)
        scaled = look_ups.scaled(use, rows, self.number) if alone else None
        if scaled is not None:
            return ValueInfo(data=True, rows=scaled)
        for i in inputs:
            self.blame(i._replace(leaves=frozenset()), "")
        return None

    def place_look_ups(self) -> None:
        """Where rows go into products alone they are measured there, if it is less."""
        for use, view, products, elsewhere in self.look_ups:
            rule = rules.find(use.eqn, 0)
            assert rule is not None
            found = []
            for at, rows in products:
                number, scales = next(self.number), tuple(x for _, x in rows.scales)
                x = Product(
                    at.eqn, at.weight, 1 - at.weight, number, number, rows.dims, scales
                )
                site = self.site(use, product_by_id.RULE, view, x)
                found.append((site, at, [place for place, _ in rows.scales]))
            together = [x.together(use) for _, at, more in found for x in (at, *more)]
            fits = [product_by_id.multiplies_data(site) for site, *_ in found]
            if elsewhere or not all(together + fits):
                found = []
            turns = math.prod(n for _, n in use.loops)
            formed = turns * math.prod(use.eqn.outvars[0].aval.shape)
            places = [(site, view.parts[0]) for site, *_ in found]
            if not found or cost_model.costs_more(places, formed):
                self.place(use, self.site(use, rule, view), use)
            else:
                for site, at, more in found:
                    self.place(use, site, at, more)

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
