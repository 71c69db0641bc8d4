"""Which rule belongs to an equation: those that are built in, and those of users."""

from typing import Any

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx._core.checks import helpful
from clipfx.per_example.engine import primitives
from clipfx.per_example.engine.param_views import ParamView
from clipfx.per_example.engine.rules import (
    conv,
    dot_general,
    elementwise,
    gather,
    ragged_dot,
)
from clipfx.per_example.engine.rules.custom import Rule, check_arguments, site_rule
from clipfx.per_example.engine.rules.site import SiteRule

# By the name of the primitive.
RULES: dict[str, SiteRule] = {
    primitives.DOT: dot_general.RULE,
    primitives.CONVOLUTION: conv.RULE,
    primitives.GATHER: gather.RULE,
    primitives.DYNAMIC_SLICE: gather.RULE,
    **dict.fromkeys(primitives.ADD, elementwise.ADD),
    primitives.SUB: elementwise.SUB,
    primitives.MUL: elementwise.MUL,
    primitives.DIV: elementwise.DIV,
    primitives.RAGGED_DOT: ragged_dot.RULE,
}
# Of users: what `primitives.owner` returns, the rule, and what the engine makes of it.
_USERS: list[tuple[Any, Rule, SiteRule]] = []


def find(eqn: Any, weight: int) -> SiteRule | None:
    """The rule for one input of an equation, None if there is none."""
    rule = RULES.get(eqn.primitive.name)
    if rule is not None or not _USERS:
        return rule
    owner, argument = primitives.owner(eqn), weight - primitives.num_consts(eqn)
    ours = [(given, rule) for thing, given, rule in _USERS if thing is owner]
    for given, rule in ours:
        check_arguments(eqn, given, rule.name)
    return next((rule for given, rule in ours if given.weight == argument), None)


def evaluate(eqn: Any, inputs: list) -> list:
    """What an equation returns, also where JAX cannot map it over examples."""
    if eqn.primitive.name == primitives.RAGGED_DOT:
        return ragged_dot.evaluate(eqn, inputs)
    return _compat.evaluate(eqn, inputs)


def why_not(rule: SiteRule, eqn: Any, weight: int, view: ParamView) -> str | None:
    """Why an equation can be no site, None if it can."""
    if _compat.other_mesh(eqn.outvars[0].aval):
        return f"{eqn.primitive.name} where axes of the mesh are of another kind"
    dtypes = [eqn.invars[weight].aval.dtype, eqn.outvars[0].aval.dtype]
    if not all(jnp.issubdtype(x, jnp.floating) for x in dtypes):
        return "complex numbers"
    return rule.why_not(eqn, weight, view)


@helpful
def register_rule(function: Any, rule: Rule) -> Any:
    r"""Teaches per-example clipping a primitive or a custom derivative of yours.

    A kernel, as of Pallas, and whatever else is wrapped in `jax.custom_vjp`, hides from
    `clipped_grad` what it does with a parameter: without a rule that one's gradient is
    instantiated for each example, which is right, but takes the memory and the time of
    `jax.vmap(jax.grad(fun))`. With a rule that says how the gradient of one example is
    a sum of outer products, :math:`G = \sum_t u_t v_t^T`, its norm is

    .. math:: \|G\|^2 = \sum_{t,s} (u_t^T u_s)(v_t^T v_s)

    and weighted sums over examples are one matrix product, as for a layer of JAX's own.
    The function itself runs as it is, forward and backward.

    A rule is trusted: one that is wrong gives wrong norms, and with them a wrong bound.
    Test yours against `jax.vmap(jax.grad(fun))`, once. It holds from then on, for all
    that is traced later. Under a `jax.vmap` of the loss's own the function has other
    shapes, and no rule.

    Args:
      function: What `jax.custom_vjp` returned, after `defvjp`, or a primitive.
      rule: The rule for one of its arguments; register one for every weight. A second
        one for the same weight replaces the first.

    Returns:
      The function, as it is.

    Raises:
      TypeError: If it is neither, or the rule is no `Rule` of numbers and functions.
      ValueError: If the primitive has a rule already, or the rule names the same
        argument twice.

    Example:
      >>> import clipfx, jax, jax.numpy as jnp
      >>> from clipfx import per_example
      >>> @jax.custom_vjp
      ... def dense(x, w):
      ...     return x @ w
      >>> dense.defvjp(lambda x, w: (x @ w, (x, w)),
      ...              lambda kept, d: (d @ kept[1].T, kept[0].T @ d))
      >>> rule = per_example.Rule(weight=1, data=0, factors=lambda x, d, _: (x, d))
      >>> dense = per_example.register_rule(dense, rule)
      >>> loss = lambda w, x: jnp.tanh(dense(x, w)).sum()
      >>> print(per_example.explain(loss, jnp.ones((64, 64)), jnp.ones((5, 64))))
      leaf    shape     method  used in  FLOPs  bytes  because
      (root)  [64, 64]  Gram    dense    4,480  2,560

    Reference: none.
    """
    primitive = hasattr(function, "bind") and isinstance(
        getattr(function, "name", None), str
    )
    if not primitive and not isinstance(function, jax.custom_vjp):
        raise TypeError(
            f"function must be a jax.custom_vjp function or a primitive, got "
            f"{function!r}; register what jax.custom_vjp returned, before jax.jit or "
            "jax.vmap."
        )
    if primitive and function.name in (*RULES, *primitives.CALLS, primitives.SCAN):
        raise ValueError(
            f"function must be a primitive without a rule, got {function.name}, which "
            "has one; wrap what you do in jax.custom_vjp."
        )
    if not primitive and function.bwd is None:
        raise ValueError(
            f"function must have its derivative, got {function.__name__!r} without; "
            "call its defvjp first."
        )
    _check(rule)
    owner, name = (
        (function, function.name) if primitive else (function.bwd, function.__name__)
    )
    same = lambda thing, given: thing is owner and given.weight == rule.weight
    _USERS[:] = [x for x in _USERS if not same(*x[:2])]
    _USERS.append((owner, rule, site_rule(rule, name)))
    return function


def _check(rule: Any) -> None:
    if not isinstance(rule, Rule):
        raise TypeError(
            f"rule must be a Rule, got {rule!r}; write per_example.Rule(weight=1, "
            "data=0, factors=...)."
        )
    for name in ("weight", "data"):
        k = getattr(rule, name)
        if k is None and name == "data":
            continue
        if not isinstance(k, int) or isinstance(k, bool) or k < 0:
            raise TypeError(
                f"{name} of a rule must be the number of an argument, got {k!r}; count "
                "from 0."
            )
    if rule.weight == rule.data:
        raise ValueError(
            f"data of a rule must differ from its weight, got {rule.data} for both; it "
            "is the argument that the gradient of the weight depends on, or None."
        )
    for name in ("factors", "weight_gradient"):
        given = getattr(rule, name)
        if not callable(given) and not (given is None and name == "weight_gradient"):
            raise TypeError(
                f"{name} of a rule must be a function of x, delta and params, got "
                f"{given!r}."
            )
