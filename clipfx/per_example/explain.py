"""How each parameter's norms are found, what that costs, and why."""

import collections
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx._core.groups import Groups, group_leaves
from clipfx._core.paths import leaves_with_path
from clipfx._types import GroupSpec, LossFn, Positions
from clipfx.per_example.engine import trace
from clipfx.per_example.engine.columns import each_in_one_place, of_regions
from clipfx.per_example.engine.cost_model import BIAS_SUM, factored_cost
from clipfx.per_example.engine.outer_products import sizes
from clipfx.per_example.engine.plan import INSTANTIATED, Plan
from clipfx.per_example.engine.trace import Signature

# More elements than this are worth a word where a gradient is formed for each example.
LARGE = 1_000_000


class ExplainRow(NamedTuple):
    """What is known of one leaf.

    Attributes:
      leaf: Its name.
      shape: Its shape.
      method: How the norm of its gradient is found.
      sites: The equations that use it, by name, and how many of each.
      flops: Of the norm of one example, beyond an ordinary gradient.
      bytes: Moved for it, in float32.
      because: What kept it from a cheaper method.

    Reference: none.
    """

    leaf: str
    shape: tuple[int, ...]
    method: str
    sites: dict[str, int]
    flops: int
    bytes: int
    because: str


class Report(NamedTuple):
    """What `explain` tells; `str` of it is a table.

    Attributes:
      rows: One `ExplainRow` for each leaf.
      notes: Sentences about the whole program, and warnings.

    Reference: none.
    """

    rows: tuple[ExplainRow, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """The table, and the notes below it."""
        head = ("leaf", "shape", "method", "used in", "FLOPs", "bytes", "because")
        cells = [(row.leaf, str(list(row.shape)), row.method, _used(row.sites),
                  f"{row.flops:,}", f"{row.bytes:,}", row.because)
                 for row in self.rows]  # fmt: skip
        return "\n".join([_aligned([head, *cells]), *self.notes])


def explain(
    fun: LossFn,
    *args: Any,
    argnums: Positions = 0,
    batch_argnums: Positions = 1,
    has_aux: bool = False,
    groups: GroupSpec = "global",
    ord: int | None = None,
    norm_method: Any = "auto",
    **kwargs: Any,
) -> Report:
    r"""Tells how `clipped_grad` will measure each parameter's gradient, and why so.

    =============== ==================================================================
    method          squared norm of one example's gradient
    =============== ==================================================================
    bias sum        of what is added, or scales: :math:`\|\sum_t x_t d_t\|^2`, x or 1
    outer product   :math:`|u|^2 |v|^2`, for one position
    Gram            :math:`\sum_{t,s} (u_t^T u_s)(v_t^T v_s)`, for several
    segment sum     gradients of a look-up, added up by row
    instantiated    of the gradient itself, formed for each example
    unused          0
    =============== ==================================================================

    FLOPs and bytes are those of the norm of one example, beyond an ordinary gradient,
    which the cheapest method has the fewest of: a word that is formed and moved is
    counted like some hundred multiplications.

    Args:
      fun: See `clipped_grad`.
      args: Of the loss, with *one* example, without an axis of examples; arrays, or
        their shapes, as `jax.ShapeDtypeStruct`.
      argnums: See `clipped_grad`.
      batch_argnums: Which arguments are the example's.
      has_aux: See `clipped_grad`.
      groups: See `clipped_grad`.
      ord: See `clipped_grad`.
      norm_method: See `clipped_grad`.
      kwargs: Of the loss.

    Returns:
      A `Report`, as for a large batch: a row for each leaf, with name and shape, the
      method, the equations that use it, FLOPs and bytes, and what kept it from a
      cheaper one; and a warning for each large leaf whose gradient is formed for every
      example. `print` shows it as a table.

    Raises:
      TypeError: See `clipped_grad`.
      ValueError: See `clipped_grad`.

    Example:
      >>> import clipfx, jax.numpy as jnp
      >>> def loss(params, x):
      ...     return jnp.tanh(x @ params["w"] + jnp.sin(params["b"])).sum()
      >>> params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
      >>> print(clipfx.per_example.explain(loss, params, jnp.ones(3)))
      leaf  shape   method         used in      FLOPs  bytes  because
      b     [4]     instantiated   -                8     48  sin
      w     [3, 4]  outer product  dot_general     14     28

    Reference: none.
    """
    signature = Signature(fun, argnums, batch_argnums, has_aux, norm_method)
    trace.check_signature(signature)
    p = trace.check_ord(ord)
    leaves, treedef = jax.tree.flatten((args, kwargs))
    # Numbers of Python's stay what they are, all else need only have a shape.
    shaped = [k for k, x in enumerate(leaves) if hasattr(x, "shape")]
    traced: list[tuple[trace.Call, Groups]] = []

    def follow(values: list) -> None:
        for k, x in zip(shaped, values, strict=True):
            leaves[k] = x
        filled, kwargs = treedef.unflatten(leaves)
        filled = list(filled)
        for k in trace.numbers(signature, "batch_argnums", len(args)):
            filled[k] = jax.tree.map(lambda x: jnp.asarray(x)[None], filled[k])
        members = group_leaves(
            groups, trace.params_of(signature, filled), by_slice=True
        )
        call = trace.prepare(
            signature, filled, kwargs, ord=p, large=True, members=members
        )
        traced.append((call, members))

    jax.eval_shape(follow, [leaves[k] for k in shaped])
    ((call, members),) = traced
    plan = call.program.plan
    rows, notes = [], []
    for k, (path, leaf) in enumerate(leaves_with_path(call.params)):
        size = math.prod(jnp.shape(leaf))
        flops, moved = _cost(plan, k, size)
        row = ExplainRow(
            leaf=jax.tree_util.keystr(path, simple=True, separator="/") or "(root)",
            shape=jnp.shape(leaf),
            method=plan.methods[k],
            sites=dict(collections.Counter(site.name for site, _ in plan.uses[k])),
            flops=flops,
            bytes=moved,
            because=", ".join(dict.fromkeys(plan.reasons[k])) or _why(plan, k),
        )
        rows.append(row)
        if row.method == INSTANTIATED and size > LARGE:
            notes.append(
                f"Warning: for every example {size * 4 / 1e6:,.0f} MB of {row.leaf!r} "
                f"are formed ({row.because}); microbatch_size bounds the memory."
            )
    if not each_in_one_place(plan, of_regions(plan, members, call.split), members):
        notes.append(
            "The program rematerializes: the sum takes a second backward pass there. A "
            "group for each part that does, or each weight in it, needs none."
        )
    return Report(tuple(rows), tuple(notes))


def _used(sites: dict[str, int]) -> str:
    names = (f"{n} x {name}" if n > 1 else name for name, n in sites.items())
    return ", ".join(names) or "-"


def _cost(plan: Plan, leaf: int, size: int) -> tuple[int, int]:
    """FLOPs and bytes of the norm, float32."""
    method = plan.methods[leaf]
    if method == "unused":
        return 0, 0
    if method == INSTANTIATED:
        return 2 * size, 3 * 4 * size
    if method == BIAS_SUM:
        return 2 * size, 4 * size
    words = 0
    for site, part in plan.uses[leaf]:
        if not site.adds:
            s, t, k, n = sizes(site, part)
            words += s * t * (k + n)
    return 2 * factored_cost(plan.uses[leaf])[1], 4 * words


def _why(plan: Plan, leaf: int) -> str:
    if plan.methods[leaf] != INSTANTIATED:
        return ""
    when = "" if leaf in plan.differentiated else "after loops, "
    return f"{when}cheaper than {factored_cost(plan.uses[leaf])[0]}"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = (4, 5)  # numbers
    cell = lambda k, x: x.rjust(widths[k]) if k in right else x.ljust(widths[k])
    lines = ("  ".join(cell(k, x) for k, x in enumerate(row)).rstrip() for row in rows)
    return "\n".join(lines)
