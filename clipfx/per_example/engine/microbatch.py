"""A batch in parts of fixed size, by a scan, to bound memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx._core.checks import check_count
from clipfx._core.groups import Groups
from clipfx.per_example.engine import clip, trace
from clipfx.per_example.engine.bookkeeping import over
from clipfx.per_example.engine.clip import PerExample
from clipfx.per_example.engine.trace import Signature


def in_parts(
    compute: Callable,
    signature: Signature,
    step: int | None,
    args: Any,
    keep: Any,
    by_example: Any,
    size: int,
) -> tuple[Any, Any]:
    """All at once, or `step` examples at a time, added up in the order of a scan.

    Args:
      compute: `compute(args, keep, by_example) -> (sums, rows)` of a part: sums are
        added up over parts, rows `[B, ...]` put together.
      signature: Which arguments are batches.
      step: How many examples at a time, None for all.
      args: Of the loss.
      keep: bool `[B]`, or None for all.
      by_example: A tree of further arrays `[B, ...]`.
      size: B.
    """
    if step is None or size <= step:
        return compute(args, keep, by_example)
    count = -(-size // step)
    numbers = trace.numbers(signature, "batch_argnums", len(args))
    batches = [args[k] for k in numbers]

    def cut(x):
        x = jnp.asarray(x)
        if count * step > size:  # the last example again, masked
            x = x[jnp.minimum(jnp.arange(count * step), size - 1)]
        # Every part takes from the whole length: a batch split over devices stays so.
        return x.reshape(step, count, *x.shape[1:]).swapaxes(0, 1)

    inside = (jnp.arange(count * step) < size).reshape(step, count).T
    inside = inside if keep is None else inside & cut(keep)
    parts = (*jax.tree.map(cut, (batches, by_example)), inside)

    def of_part(part):
        batches, by_example, keep = part
        filled = list(args)
        for k, batch in zip(numbers, batches, strict=True):
            filled[k] = batch
        return compute(tuple(filled), keep, by_example)

    def body(sums, part):
        more, rows = of_part(part)
        return jax.tree.map(jnp.add, sums, more), rows

    like, _ = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    sums, rows = jax.lax.scan(body, zeros, parts)
    join = lambda x: x.swapaxes(0, 1).reshape(count * step, *x.shape[2:])[:size]
    return sums, jax.tree.map(join, rows)


def measuring(
    signature: Signature, members: Groups, ord: int, kwargs: dict[str, Any]
) -> Callable:
    """What `in_parts` needs to measure norms, without `by_example`."""

    def compute(args: Any, keep: Any, _: None) -> tuple[list, PerExample]:
        call = trace.prepare(signature, args, kwargs, ord=ord, members=members)
        if call.size:
            return [], clip.measure(call, members, keep)
        return [], clip.empty(call, len(members.names))._replace(factor=None)

    return compute


def check_step(step: Any) -> int | None:
    """Checks `microbatch_size`."""
    advice = "it is the number of examples computed at a time, None for all"
    return None if step is None else check_count("microbatch_size", step, 1, advice)


def reduced(
    sums: list[jax.Array], value: jax.Array, keep: Any, reduce: str, axis_name: Any
) -> list[jax.Array]:
    """Sums over all devices, divided by the number of examples for `"mean"`.

    Args:
      sums: By leaf, added up over the axes that types tell of.
      value: `[B]`, losses, for the mesh axes that examples vary over.
      keep: bool `[B]` or None.
      reduce: `"sum"` or `"mean"`.
      axis_name: Mesh axes that types do not tell of.
    """
    if axis_name is not None:
        sums = [jax.lax.psum(x, axis_name) for x in sums]
    return averaged(sums, value, keep, reduce, axis_name)


def averaged(
    sums: list[jax.Array], value: jax.Array, keep: Any, reduce: str, axis_name: Any
) -> list[jax.Array]:
    """The second half of `reduced`, for sums that are of all devices already."""
    if reduce == "sum":
        return sums
    counted = jnp.ones_like(value) if keep is None else keep
    number = counted.sum(dtype=jnp.float32)
    if axis_name is not None:
        number = jax.lax.psum(number, axis_name)
    split = _compat.varying_axes(value)

    def mean(x: jax.Array) -> jax.Array:
        every = over(_compat.vary(number, split), split - _compat.varying_axes(x))
        return x / jnp.maximum(every, 1).astype(x.dtype)

    return [mean(x) for x in sums]
