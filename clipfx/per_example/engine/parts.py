"""A program in two parts, up to its last region and from there on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx.per_example.engine.walk import JaxprPlan, users_of


class Part(NamedTuple):
    """Some equations of a program; a jaxpr, for all that running one needs.

    Attributes:
      constvars: As of the program.
      invars: Those of the program, and what other parts computed.
      outvars: What comes out.
      eqns: The equations.
    """

    constvars: Sequence[Any]
    invars: Sequence[Any]
    outvars: Sequence[Any]
    eqns: Sequence[Any]


def split(node: JaxprPlan, mapped: Sequence[bool]) -> tuple[JaxprPlan, JaxprPlan]:
    """The program up to its last region, and the rest of it, which is run once only.

    Args:
      node: The program.
      mapped: Which inputs differ between examples.

    Returns:
      Both parts; the second one takes the outputs of the first behind its inputs. What
      does not differ between examples both compute.
    """
    jaxpr = node.jaxpr
    data = {v for v, m in zip(jaxpr.invars, mapped, strict=True) if m}
    fixed, cut = [], 0
    for k, eqn in enumerate(jaxpr.eqns):
        if any(not _compat.is_literal(v) and v in data for v in eqn.invars):
            data.update(eqn.outvars)
        else:
            fixed.append(k)
        if k in node.regions or any(map(_has_regions, node.inside(k))):
            cut = k + 1
    every = range(len(jaxpr.eqns))
    before, after = every[:cut], [*(k for k in fixed if k < cut), *every[cut:]]
    made = {v: None for k in before if k not in fixed for v in jaxpr.eqns[k].outvars}
    ends = [v for v in jaxpr.outvars if not _compat.is_literal(v)]
    wanted = {v for k in every[cut:] for v in _read(jaxpr.eqns[k])}.union(ends)
    wanted |= {v for k in every[cut:] for _, _, v, _ in node.records.get(k, ())}
    crossing = [v for v in made if v in wanted]
    first = _part(node, before, jaxpr.invars, crossing)
    return first, _part(node, after, [*jaxpr.invars, *crossing], jaxpr.outvars)


def _has_regions(node: JaxprPlan) -> bool:
    return bool(node.regions) or any(map(_has_regions, node.insides()))


def _read(eqn: Any) -> list[Any]:
    return [v for v in eqn.invars if not _compat.is_literal(v)]


def _part(
    node: JaxprPlan, which: Sequence[int], ins: Sequence[Any], outs: Sequence[Any]
) -> JaxprPlan:
    number = {k: i for i, k in enumerate(which)}
    some = lambda xs: {number[k]: x for k, x in xs.items() if k in number}
    jaxpr = Part(node.jaxpr.constvars, ins, outs, [node.jaxpr.eqns[k] for k in which])
    return node._replace(
        jaxpr=jaxpr, sites=some(node.sites), inner=some(node.inner),
        branches=some(node.branches), views=some(node.views), taps=some(node.taps),
        records=some(node.records), users=users_of(jaxpr),
        regions=some(node.regions), doors=some(node.doors),
    )  # fmt: skip


def halves(values: Sequence[jax.Array]) -> tuple[dict[int, Any], dict[int, Any]]:
    """By position, those that have gradients and those that have none."""
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    floats = {k: x for k, x in enumerate(values) if is_float(x)}
    return floats, {k: x for k, x in enumerate(values) if k not in floats}


def joined(floats: dict[int, Any], others: dict[int, Any]) -> list[Any]:
    """What `halves` was given."""
    every = floats | others
    return [every[k] for k in range(len(every))]
