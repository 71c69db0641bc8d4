"""Rules of users, for primitives and `jax.custom_vjp` functions of theirs."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx._core.leaves import widen
from clipfx.per_example.engine import primitives
from clipfx.per_example.engine.param_views import LeafSlice, ParamView
from clipfx.per_example.engine.rules import site as sites
from clipfx.per_example.engine.rules.site import Site, SiteRule


class Rule(NamedTuple):
    r"""How the gradient of one weight is a sum of outer products.

    Of one example, with x the data that the function has seen and :math:`\delta` the
    gradient of the loss with respect to its output,

    .. math:: G = \sum_t u_t v_t^T ,

    where u and v are rows of two matrices made of x and :math:`\delta`. For a dense
    layer `x @ w` these are x and :math:`\delta` themselves, for a weight that is stored
    transposed they change places, and for a scale u is 1 and v is :math:`x \delta`.

    Attributes:
      weight: Which argument is the weight, counted from 0, leaf by leaf where arguments
        are trees, without `nondiff_argnums`.
      data: Which argument is x, or None if the gradient needs none, as that of a bias.
      factors: `factors(x, delta, params) -> (u [T, K], v [T, N])` of one example, x and
        delta in float32 or wider. K N is the size of the weight, and :math:`G_{kn}` are
        its elements' gradients in their order. A row for each position, not added up:
        what cancels has to be seen. Linear in delta. `params` are those of the
        primitive, `{}` for a function.
      weight_gradient: `weight_gradient(x [B, ...], delta [B, ...], params)`, the sum of
        G over B examples in the shape of the weight, if there is a faster kernel; None
        for a matrix product of what `factors` returns, which is also what meshes with
        Explicit axes get.

    Reference: none.
    """

    weight: int
    data: int | None
    factors: Callable[[Any, Any, Mapping], tuple[Any, Any]]
    weight_gradient: Callable[[Any, Any, Mapping], Any] | None = None


def site_rule(rule: Rule, name: str) -> SiteRule:
    """What the engine has to know."""
    make = functools.partial(functools.partial, rule=rule, name=name)
    return SiteRule(
        left=sites.NUMBERS,
        why_not=make(_why_not),
        operand=make(_operand),
        factors=make(_factors),
        dims=make(_dims),
        gradient=make(_gradient),
        name=name,
    )


def check_arguments(eqn: Any, rule: Rule, name: str) -> None:
    """Checks that an equation has the inputs that a rule is about."""
    count = len(eqn.invars) - primitives.num_consts(eqn)
    if max(rule.weight, rule.data or 0) >= count:
        raise ValueError(
            f"rule must name arguments of {name}, which has {count}, got "
            f"weight={rule.weight} and data={rule.data}; count from 0, leaf by leaf."
        )


def _operand(eqn: Any, weight: int, rule: Rule, name: str) -> int | None:
    return None if rule.data is None else primitives.num_consts(eqn) + rule.data


def _why_not(
    eqn: Any, weight: int, view: ParamView, rule: Rule, name: str
) -> str | None:
    if view.repeated:
        return f"{name} of a broadcast"
    if view.axis is not None:
        return f"{name} of a concatenation"
    if len(eqn.outvars) != 1:
        return f"{name} of several outputs"
    data = _operand(eqn, weight, rule, name)
    literal = data is not None and _compat.is_literal(eqn.invars[data])
    return f"{name} of a constant" if literal else None


def _params(site: Site) -> Mapping:
    custom = site.eqn.primitive.name == primitives.CUSTOM_VJP
    return {} if custom else site.eqn.params


def _alike(x: Any, delta: jax.Array) -> tuple[Any, jax.Array]:
    """Both in the dtype of norms, but for data that are no numbers, as ids."""
    delta = widen(delta)
    if x is not None and jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(delta.dtype)
    return x, delta


def _rows(
    site: Site, x: Any, delta: jax.Array, lead: int, rule: Rule, name: str
) -> tuple[jax.Array, jax.Array]:
    """Matrices `[..., T, K]` and `[..., T, N]`, with so many dimensions in front."""
    x, delta = _alike(x, delta)

    def one(x: Any, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
        pair = rule.factors(x, delta, _params(site))
        shapes = jax.tree.map(jnp.shape, pair)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            kind = type(pair).__name__
            raise TypeError(
                f"factors of the rule for {name} must return two matrices, [T, K] and "
                f"[T, N], got {kind}; return (left, right)."
            )
        u, v = shapes
        fits = len(u) == len(v) == 2 and u[0] == v[0]
        if not fits or u[1] * v[1] != math.prod(site.shape):
            raise ValueError(
                f"factors of the rule for {name} must return matrices [T, K] and "
                f"[T, N], K N = {math.prod(site.shape)} for a weight {site.shape}, got "
                f"{u} and {v}; reshape x and delta of one example to rows."
            )
        left, right = map(jnp.asarray, pair)
        return left.astype(delta.dtype), right.astype(delta.dtype)

    for _ in range(lead):
        one = jax.vmap(one)
    return one(x, delta)


def _factors(
    site: Site, part: LeafSlice, x: Any, delta: jax.Array, rule: Rule, name: str
) -> tuple[jax.Array, jax.Array]:
    lead = len(site.loops)
    outer, inner = sites.split_loops(site, part)
    left, right = _rows(site, x, delta, lead, rule, name)
    order = outer, [*inner, lead], [lead + 1]
    return sites.matrix(left, *order), sites.matrix(right, *order)


def _dims(site: Site, part: LeafSlice, rule: Rule, name: str) -> Any:
    """Known where K and N are products of the first and of the last dimensions."""
    like = lambda v: jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)
    data = None if site.operand is None else like(site.eqn.invars[site.operand])
    rows = lambda x, d: _rows(site, x, d, 0, rule, name)
    left, _ = jax.eval_shape(rows, data, like(site.eqn.outvars[0]))
    dims = list(range(len(site.shape)))
    for k in range(len(dims) + 1):
        if math.prod(site.shape[:k]) == left.shape[1]:
            return [], dims[:k], dims[k:]
    return None


def _gradient(
    site: Site, x: Any, delta: jax.Array, like: Any, rule: Rule, name: str
) -> jax.Array:
    lead = 1 + len(site.loops)
    cut, summed = sites.rows_of_batch(site)
    explicit = _compat.explicit_spec(delta) is not None
    if rule.weight_gradient is None or explicit:
        left, right = _rows(site, x, delta, lead, rule, name)
        dims = ((*summed, lead), (*summed, lead)), (cut, cut)
        spec = (None,) * (len(cut) + 2)
        whole = _compat.sharding(right, spec) if explicit else None
        out = jax.lax.dot_general(left, right, dims, out_sharding=whole)
        return out.reshape(*out.shape[: len(cut)], *site.shape)

    def joined(y: Any) -> Any:
        """`[loops that slice..., examples and other turns, ...]`."""
        if y is None:
            return None
        y = jnp.transpose(y, [*cut, *summed, *range(lead, y.ndim)])
        return y.reshape(*y.shape[: len(cut)], -1, *y.shape[lead:])

    def one(x: Any, delta: jax.Array) -> jax.Array:
        out = jnp.asarray(rule.weight_gradient(x, delta, _params(site)))
        if out.shape != site.shape:
            raise ValueError(
                f"weight_gradient of the rule for {name} must return an array of the "
                f"shape of the weight, {site.shape}, got {out.shape}; sum over the "
                "first dimension of x and delta, which is that of examples."
            )
        return out.astype(delta.dtype)

    for _ in cut:
        one = jax.vmap(one)
    return one(*map(joined, _alike(x, delta)))
