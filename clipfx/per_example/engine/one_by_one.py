"""Examples that the others' ways of measuring do not fit, one after the other.

Where the gradients of an example's positions cancel, rounding is what is left of sums
of outer products, and the norm and the sum would be of different roundings. The
gradient of such an example is formed, by itself, and measured, bounded and added up as
any gradient is. There are few: the loop usually does not run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx._core.groups import Groups
from clipfx._core.leaves import widen
from clipfx._core.norms import Norms
from clipfx.per_example.engine import bookkeeping, interpreter, scaled_sums
from clipfx.per_example.engine.bookkeeping import Tape
from clipfx.per_example.engine.scaled_sums import Elements
from clipfx.per_example.engine.trace import Call
from clipfx.per_example.engine.weighted_sum import weighted_sum


class Progress(NamedTuple):
    """What the loop finds out.

    Attributes:
      norms: `[B, G]`.
      factor: `[B, G]`.
      sums: By leaf.
    """

    norms: Norms
    factor: jax.Array
    sums: list[jax.Array]


def each(
    call: Call,
    tape: Tape,
    members: Groups,
    todo: jax.Array,
    progress: Progress,
    bound: Callable | None,
    anew: Any = False,
) -> Progress:
    """Measures some examples anew, and adds them up.

    Args:
      call: The loss and its inputs.
      tape: From `backward_pass`.
      members: Of the leaves of the parameters.
      todo: bool `[B]`, which.
      progress: What is known so far; entries of these examples are replaced, their
        contributions are added to the sums.
      bound: `bound(gradient, norms, row) -> contributions, factor [1, G]` for the
        gradient by leaf of one example, `row` picking what is the example's from arrays
        `[B, ...]`, contributions and factor of what is not there yet; None to measure
        only.
      anew: Whether to forget the sums, and to do all examples.
    """
    plan = call.program.plan
    number = _compat.as_like(jnp.arange(call.size, dtype=jnp.int32), todo)
    alike: dict[Any, list[int]] = {}
    for k, key in enumerate(zip(call.split, members.index, strict=True)):
        alike.setdefault(key, []).append(k)

    def body(state: tuple) -> tuple:
        _, todo, progress, forget = state
        i = jnp.where(todo, number, call.size).min()
        row = lambda x: _row(x, i)
        gradient = _gradient(call, tape, row)
        # Behind barriers: of a constant XLA takes the scale out, and squares it.
        gradient = [jax.lax.optimization_barrier(x) for x in gradient]
        parts = []
        for (axes, index), ks in alike.items():
            some = [gradient[k] for k in ks]
            if isinstance(index, tuple):
                each = [bookkeeping.of_gradient(plan, x, index) for x in some]
                parts += [(axes, *x) for xs in each for x in xs]
            else:
                parts.append((axes, index, Elements(some)))
        powers = bookkeeping.powers_of_parts(plan, parts, members)
        norms, _ = scaled_sums.norms(powers[None], plan.ord)
        chosen = number == i

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            new = jnp.broadcast_to(new.astype(old.dtype), old.shape)
            return jnp.where(chosen[:, None], _compat.as_like(new, old), old)

        norms = Norms(*map(put, progress.norms, norms))
        todo = todo & ~chosen
        left = jnp.where(todo, 1.0, 0.0).sum()
        if bound is None:
            return left, todo, progress._replace(norms=norms), forget
        parts, factor = bound(gradient, jax.tree.map(row, norms), row)
        sums = [
            jnp.where(forget, jnp.zeros_like(x), x)
            + _compat.as_like(y.astype(x.dtype), x)
            for x, y in zip(progress.sums, parts, strict=True)
        ]
        factor = put(progress.factor, factor)
        return left, todo, Progress(norms, factor, sums), jnp.zeros_like(forget)

    with jax.named_scope("out_of_range"):
        # A sum of numbers: one all-reduce with those of the gradients.
        todo |= anew
        left = jnp.where(todo, 1.0, 0.0).sum()
        state = (left, todo, progress, jnp.asarray(anew))
        return jax.lax.while_loop(lambda state: state[0] > 0, body, state)[2]


def _gradient(call: Call, tape: Tape, row: Callable) -> list[jax.Array]:
    """The gradient of one example by leaf, in float32 or wider."""
    program, plan = call.program, call.program.plan
    if tape.again is None:
        one = jax.tree.map(row, tape)
        index = [0] * len(program.params)
        return weighted_sum(program, call.inputs, one, None, index, None)
    # Nothing was kept of a program that rematerializes.
    pairs = zip(call.inputs, program.mapped, strict=True)
    values = [row(x)[0] if mapped else x for x, mapped in pairs]

    def loss(params: list) -> jax.Array:
        filled = bookkeeping.with_leaves(program, values, dict(enumerate(params)))
        return interpreter.run(plan.root, filled, {}).outs[0]

    value, pull = jax.vjp(loss, [values[k] for k in program.params])
    return [widen(x) for x in pull(jnp.ones_like(value))[0]]


def _row(x: jax.Array, i: jax.Array) -> jax.Array:
    """Row i of `[B, ...]` as `[1, ...]`."""
    # A gather: of what is split over devices each then adds its part, which is none but
    # for one. Of a slice XLA would hand all rows to every device, and before the loop.
    spec = _compat.explicit_spec(x)
    out = _compat.sharding(x, (None, *spec[1:])) if spec else None
    return x.at[i[None]].get(
        mode="promise_in_bounds", out_sharding=out, wrap_negative_indices=False
    )
