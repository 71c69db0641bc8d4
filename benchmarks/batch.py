"""What a clip costs in front of AdamW: time, traffic, temporaries, compilation.

    python -m benchmarks.batch

Every figure is a ratio within one run: the variants take turns, step by step, and the
median over the turns is compared with `adamw` alone in the same turn. `floor` is the
least that any clip can do: sum the squares, take a minimum, multiply.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import clipfx
from benchmarks._timing import compiled, floor, gradients, in_turns, words

_TURNS = flags.DEFINE_integer("turns", 15, "Timed steps of each variant.")
_TREES = flags.DEFINE_list("trees", ["1x25000000", "25x1000000", "500x2000"], "LxN.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of params and grads.")
_LEAVES = flags.DEFINE_list("leaves", ["10", "100", "1000"], "For compile times.")
_CHAIN = flags.DEFINE_integer("steps", 1, "Steps in each timed turn.")


VARIANTS = {
    "adamw": optax.identity,
    "floor": lambda: floor(1.0),
    "clipfx": lambda: clipfx.clip_by_global_norm(1.0),
    "clipfx/layer": lambda: clipfx.clip_per_layer(1.0),
    "optax": lambda: optax.clip_by_global_norm(1.0),
}


def measure_speed(leaves: int, size: int, dtype) -> None:
    """Prints one row per variant for one tree."""
    steps, carries = {}, {}
    for name, make in VARIANTS.items():
        tx = optax.chain(make(), optax.adamw(3e-4))
        steps[name], carries[name], _ = compiled(tx, leaves, size, dtype)
    grads = gradients(leaves, size, dtype)
    times = in_turns(steps, carries, grads, _TURNS.value, _CHAIN.value)
    total = leaves * size
    print(f"\n{leaves} x {size:,} {dtype}")
    print(f"{'':14}{'ms':>8}{'/adamw':>8}{'/floor':>8}{'words':>8}{'temp':>8}")
    for name in VARIANTS:
        ms, base, least = (times[n] for n in (name, "adamw", "floor"))
        traffic, temp = words(steps[name], total, dtype)
        print(
            f"{name:14}{1e3 * np.median(ms):8.2f}{np.median(ms / base):8.2f}"
            f"{np.median(ms / least):8.2f}{traffic:8.2f}{temp:8.3f}",
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
        tx = optax.chain(make(), optax.adamw(3e-4))
        runs = [compiled(tx, leaves, 2000, jnp.float32)[2] for _ in range(3)]
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
