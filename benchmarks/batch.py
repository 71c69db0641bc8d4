"""What a clip costs in front of AdamW: time, traffic, temporaries, compilation.

    python -m benchmarks.batch

Every figure is a ratio within one run: the variants take turns, step by step, and the
median over the turns is compared with `adamw` alone in the same turn. `floor` is the
least that any clip can do: sum the squares, take a minimum, multiply.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import clipfx

_TURNS = flags.DEFINE_integer("turns", 15, "Timed steps of each variant.")
_TREES = flags.DEFINE_list("trees", ["1x25000000", "25x1000000", "500x2000"], "LxN.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of params and grads.")
_LEAVES = flags.DEFINE_list("leaves", ["10", "100", "1000"], "For compile times.")
_CHAIN = flags.DEFINE_integer("steps", 1, "Steps in each timed turn.")


def floor(max_norm: float) -> optax.GradientTransformation:
    """A bare multiply: no metrics, no policy, no care."""

    def update(updates, state, params=None):
        leaves = jax.tree.leaves(updates)
        square = sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves)
        factor = jnp.minimum(1.0, max_norm / jnp.sqrt(square))
        return jax.tree.map(lambda x: (x * factor).astype(x.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


VARIANTS = {
    "adamw": optax.identity,
    "floor": lambda: floor(1.0),
    "clipfx": lambda: clipfx.clip_by_global_norm(1.0),
    "clipfx/layer": lambda: clipfx.clip_per_layer(1.0),
    "optax": lambda: optax.clip_by_global_norm(1.0),
}


def compiled(clip, leaves: int, size: int, dtype):
    """A compiled donating step, its arguments, and seconds to trace and compile."""
    params = {f"layer{i}": {"w": jnp.full(size, 0.1, dtype)} for i in range(leaves)}
    tx = optax.chain(clip, optax.adamw(3e-4))
    state = tx.init(params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    traced = time.perf_counter()
    step = lowered.compile()
    return step, (params, state), (traced - start, time.perf_counter() - traced)


def measure_speed(leaves: int, size: int, dtype) -> None:
    """Prints one row per variant for one tree."""
    steps, carries, times = {}, {}, {name: [] for name in VARIANTS}
    for name, make in VARIANTS.items():
        steps[name], carries[name], _ = compiled(make(), leaves, size, dtype)
    key = jax.random.key(0)
    grads = {
        f"layer{i}": {
            "w": jax.random.normal(jax.random.fold_in(key, i), (size,), dtype)
        }
        for i in range(leaves)
    }
    for turn in range(_TURNS.value + 2):
        names = list(VARIANTS)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            jax.block_until_ready(carries[name])
            start = time.perf_counter()
            for _ in range(_CHAIN.value):
                carries[name] = steps[name](*carries[name], grads)
            jax.block_until_ready(carries[name])
            times[name].append((time.perf_counter() - start) / _CHAIN.value)
    total = leaves * size
    print(f"\n{leaves} x {size:,} {dtype}")
    print(f"{'':14}{'ms':>8}{'/adamw':>8}{'/floor':>8}{'words':>8}{'temp':>8}")
    for name in VARIANTS:
        ms, base, least = (np.array(times[n][2:]) for n in (name, "adamw", "floor"))
        cost = steps[name].cost_analysis()
        cost = cost[0] if isinstance(cost, list) else cost
        words = cost["bytes accessed"] / total / jnp.dtype(dtype).itemsize
        temp = steps[name].memory_analysis().temp_size_in_bytes
        temp = temp / total / jnp.dtype(dtype).itemsize
        print(
            f"{name:14}{1e3 * np.median(ms):8.2f}{np.median(ms / base):8.2f}"
            f"{np.median(ms / least):8.2f}{words:8.2f}{temp:8.3f}",
            flush=True,
        )


def measure_compilation(leaves: int) -> None:
    """Prints the best of three traces and compilations for each variant."""
    print(
        f"\n{leaves:5} leaves of 2,000 float32    "
        f"{'trace s':>10}{'compile s':>12}{'/optax':>8}"
    )
    best = {}
    for name, make in VARIANTS.items():
        runs = [compiled(make(), leaves, 2000, jnp.float32)[2] for _ in range(3)]
        best[name] = np.min(runs, axis=0)
    for name, (trace, compile_) in best.items():
        ratio = (trace + compile_) / best["optax"].sum()
        print(f"{name:32}{trace:10.2f}{compile_:12.2f}{ratio:8.2f}", flush=True)


def main(argv) -> None:
    del argv
    print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0]}")
    print(
        "words and temp: XLA's bytes accessed and temporaries, in words per parameter"
    )
    for dtype in _DTYPES.value:
        for tree in _TREES.value:
            leaves, size = map(int, tree.split("x"))
            measure_speed(leaves, size, jnp.dtype(dtype))
    for leaves in _LEAVES.value:
        measure_compilation(int(leaves))


if __name__ == "__main__":
    app.run(main)
