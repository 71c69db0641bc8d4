"""What the benchmarks share: a compiled training step, and turns for fair times."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def floor(max_norm: float) -> optax.GradientTransformation:
    """A bare multiply: no metrics, no policy, no care."""

    def update(updates, state, params=None):
        leaves = jax.tree.leaves(updates)
        square = sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves)
        factor = jnp.minimum(1.0, max_norm / jnp.sqrt(square))
        return jax.tree.map(lambda x: (x * factor).astype(x.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def compiled(
    tx: optax.GradientTransformation, leaves: int, size: int, dtype: Any, **extra: Any
) -> tuple[Any, Any, tuple[float, float]]:
    """A compiled donating step, its arguments, and seconds to trace and compile."""
    params = {f"layer{i}": {"w": jnp.full(size, 0.1, dtype)} for i in range(leaves)}
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    traced = time.perf_counter()
    step = lowered.compile()
    return step, (params, state), (traced - start, time.perf_counter() - traced)


def gradients(leaves: int, size: int, dtype: Any) -> Any:
    """Normal numbers in the shape that `compiled` takes."""
    key = jax.random.key(0)
    draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), (size,), dtype)
    return {f"layer{i}": {"w": draw(i)} for i in range(leaves)}


def in_turns(
    steps: dict[str, Any], carries: dict[str, Any], grads: Any, turns: int, chain: int
) -> dict[str, np.ndarray]:
    """Seconds per step `[turns]` of each variant, which take turns step by step.

    The first two turns are thrown away. A carry is donated; the last one is put back.
    """
    names: Sequence[str] = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + 2):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            jax.block_until_ready(carries[name])
            start = time.perf_counter()
            for _ in range(chain):
                carries[name] = steps[name](*carries[name], grads)
            jax.block_until_ready(carries[name])
            times[name].append((time.perf_counter() - start) / chain)
    return {name: np.array(row[2:]) for name, row in times.items()}


def words(step: Any, params: int, dtype: Any) -> tuple[float, float]:
    """XLA's bytes accessed, and its temporaries, in words per parameter."""
    cost = step.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    size = params * jnp.dtype(dtype).itemsize
    return (
        cost["bytes accessed"] / size,
        step.memory_analysis().temp_size_in_bytes / size,
    )
