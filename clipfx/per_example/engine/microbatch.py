"""A batch in parts of fixed size, by a scan, to bound memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipfx._core.checks import check_count
from clipfx._core.groups import Groups
from clipfx.per_example.engine import clip, trace
from clipfx.per_example.engine.clip import PerExample
from clipfx.per_example.engine.trace import Signature


def in_parts(
    some: Callable,
    signature: Signature,
    step: int | None,
    args: Any,
    keep: Any,
    by_example: Any,
    size: int,
) -> tuple[Any, Any]:
    """All at once, or `step` examples at a time, added up in the order of a scan.

    Args:
      some: `some(args, keep, by_example) -> (sums, rows)` of a part: sums are added up
        over parts, rows `[B, ...]` put together.
      signature: Which arguments are batches.
      step: How many examples at a time, None for all.
      args: Of the loss.
      keep: bool `[B]`, or None for all.
      by_example: A tree of further arrays `[B, ...]`.
      size: B.
    """
    if step is None or size <= step:
        return some(args, keep, by_example)
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
        return some(tuple(filled), keep, by_example)

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

    def some(args: Any, keep: Any, _: None) -> tuple[list, PerExample]:
        call = trace.prepare(signature, args, kwargs, ord=ord)
        if call.size:
            return [], clip.measure(call, members, keep)
        return [], clip.empty(call, len(members.names))._replace(factor=None)

    return some


def check_step(step: Any) -> int | None:
    """Checks `microbatch_size`."""
    advice = "it is the number of examples computed at a time, None for all"
    return None if step is None else check_count("microbatch_size", step, 1, advice)
