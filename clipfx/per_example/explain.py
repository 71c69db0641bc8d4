"""Which road each parameter takes, what it costs, and why."""

import collections
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipfx._core.paths import leaves_with_path
from clipfx.per_example.engine import trace
from clipfx.per_example.engine.cost_model import factored_cost
from clipfx.per_example.engine.outer_products import sizes
from clipfx.per_example.engine.plan import Plan
from clipfx.per_example.engine.sites import ADD
from clipfx.per_example.engine.trace import Signature


def explain(
    fun: Callable,
    *args: Any,
    argnums: int | tuple[int, ...] = 0,
    batch_argnums: int | tuple[int, ...] = 1,
    has_aux: bool = False,
    **kwargs: Any,
) -> str:
    r"""Tells how `clipped_grad` will measure each parameter's gradient, and why so.

    =============== ==================================================================
    road            squared norm of one example's gradient
    =============== ==================================================================
    direct          of what is added: :math:`\|\sum_t d_t\|^2`
    outer product   :math:`|u|^2 |v|^2`, for one position
    Gram            :math:`\sum_{t,s} (u_t^T u_s)(v_t^T v_s)`, for several
    segment sum     gradients of a look-up, added up by row
    formed          the gradient is formed after a loop, for each example
    instantiated    the gradient is formed, for each example
    unused          0
    =============== ==================================================================

    FLOPs and bytes are those of the norm of one example, beyond an ordinary gradient,
    which the cheapest road has the fewest of: a word that is formed and moved is
    counted like some hundred multiplications.

    Args:
      fun: See `clipped_grad`.
      args: Of the loss, with *one* example, without an axis of examples; arrays, or
        their shapes, as `jax.ShapeDtypeStruct`.
      argnums: See `clipped_grad`.
      batch_argnums: Which arguments are the example's.
      has_aux: See `clipped_grad`.
      kwargs: Of the loss.

    Returns:
      A table, a line for each leaf: its name and shape, the road, the equations where
      it is used, FLOPs and bytes, and what kept it from a cheaper road.

    Raises:
      TypeError: See `clipped_grad`.
      ValueError: See `clipped_grad`.

    Example:
      >>> import clipfx, jax.numpy as jnp
      >>> def loss(params, x):
      ...     return jnp.tanh(x @ params["w"] + jnp.sin(params["b"])).sum()
      >>> params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
      >>> print(clipfx.per_example.explain(loss, params, jnp.ones(3)))
      leaf  shape   road           used in      FLOPs  bytes  because
      b     [4]     instantiated   -                8     48  sin
      w     [3, 4]  outer product  dot_general     14     28

    Reference: none.
    """
    signature = Signature(fun, argnums, batch_argnums, has_aux)
    trace.check_signature(signature)
    leaves, treedef = jax.tree.flatten((args, kwargs))
    # Numbers of Python's stay what they are, all else need only have a shape.
    shaped = [k for k, x in enumerate(leaves) if hasattr(x, "shape")]
    traced: list[trace.Call] = []

    def follow(values: list) -> None:
        for k, x in zip(shaped, values, strict=True):
            leaves[k] = x
        filled, kwargs = treedef.unflatten(leaves)
        filled = list(filled)
        for k in trace.numbers(signature, "batch_argnums", len(args)):
            filled[k] = jax.tree.map(lambda x: jnp.asarray(x)[None], filled[k])
        traced.append(trace.prepare(signature, filled, kwargs))

    jax.eval_shape(follow, [leaves[k] for k in shaped])
    (call,) = traced
    plan = call.program.plan
    rows: list[tuple[str, ...]] = []
    rows.append(("leaf", "shape", "road", "used in", "FLOPs", "bytes", "because"))
    for k, (path, leaf) in enumerate(leaves_with_path(call.params)):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "(root)"
        flops, moved = _cost(plan, k, math.prod(jnp.shape(leaf)))
        used = collections.Counter(site.kind for site, _ in plan.uses[k])
        where = ", ".join(
            f"{n} x {kind}" if n > 1 else kind for kind, n in used.items()
        )
        because = ", ".join(dict.fromkeys(plan.reasons[k])) or _why(plan, k)
        rows.append((name, str(list(jnp.shape(leaf))), plan.roads[k], where or "-",
                     f"{flops:,}", f"{moved:,}", because))  # fmt: skip
    if plan.remat:
        note = "\nThe program rematerializes: norms take one pass, the sum a second."
    else:
        note = ""
    return _aligned(rows) + note


def _cost(plan: Plan, leaf: int, size: int) -> tuple[int, int]:
    """FLOPs and bytes of the norm, float32."""
    road = plan.roads[leaf]
    if road == "unused":
        return 0, 0
    if road in ("formed", "instantiated"):
        return 2 * size, 3 * 4 * size
    if road == "direct":
        return 2 * size, 4 * size
    words = 0
    for site, part in plan.uses[leaf]:
        if site.kind not in ADD:
            s, t, k, n = sizes(site, part)
            words += s * t * (k + n)
    return 2 * factored_cost(plan.uses[leaf])[1], 4 * words


def _why(plan: Plan, leaf: int) -> str:
    road = plan.roads[leaf]
    if road not in ("formed", "instantiated"):
        return ""
    if all(site.kind in ADD for site, _ in plan.uses[leaf]):
        return "added in several places"
    return f"cheaper than {factored_cost(plan.uses[leaf])[0]}"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = (4, 5)  # numbers
    cell = lambda k, x: x.rjust(widths[k]) if k in right else x.ljust(widths[k])
    lines = ("  ".join(cell(k, x) for k, x in enumerate(row)).rstrip() for row in rows)
    return "\n".join(lines)
