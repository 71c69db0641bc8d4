"""What a clip costs in whole training steps on a TPU or GPU, owning one or not.

    python -m benchmarks.accelerators                      # on the device here: times
    python -m benchmarks.accelerators --topology=v5e:2x2   # compiled only, for a TPU
    python -m benchmarks.accelerators --topology=h100      # the same for a GPU
    python -m benchmarks.accelerators --topology=v5e:16x16 --mesh=64,4 --models=decoder

Times are ratios to Optax's clip within one run, in which the variants take turns.
Compiled for a device that is not there (see `_targets` for what that needs), a step is
measured by the cycles that XLA's cost model expects of a TPU's instructions, and by
what a GPU's move through memory, in a loop as often as it turns. Cycles depend on what
XLA places in fast memory, which a changed instruction far away may change: a bare
multiply is the yardstick beside Optax.
Over a mesh, cycles and memory are those of one chip; collectives take no cycles.
"""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jax.sharding import Mesh

from benchmarks._programs import (
    COSTS,
    MATRICES,
    METHODS,
    MODELS,
    PLAIN,
    compiled,
    cost_and_temporaries,
    facts,
)
from benchmarks._targets import devices, platform_of
from benchmarks._timing import in_turns
from clipfx._core import reductions

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPU to compile for, as v5e:2x2, or h100."
)
_MODELS = flags.DEFINE_list("models", ["mlp", "decoder"], "Of MODELS.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of activations.")
_METHODS = flags.DEFINE_list(
    "methods", [], "Of METHODS; none for all but those of MATRICES."
)
_AS = flags.DEFINE_list("as", [""], "Sums as on a cpu, gpu or tpu; none for its own.")
_WIDTH = flags.DEFINE_integer("width", 0, "Of the models; 0 for 2048 and 1024.")
_LAYERS = flags.DEFINE_integer("layers", 4, "Of the models.")
_MESH = flags.DEFINE_list("mesh", ["1"], "Chips along data, and along model if given.")
_TURNS = flags.DEFINE_integer("turns", 9, "Timed turns of each variant.")
_CHAIN = flags.DEFINE_integer("steps", 10, "Steps in each turn.")


_KNOWN = {"models": MODELS, "methods": METHODS, "as": ["", "cpu", "gpu", "tpu", "mesh"]}
for _flag, _names in _KNOWN.items():
    flags.register_validator(
        _flag,
        lambda chosen, names=_names: all(x in names for x in chosen),
        f"must be of {', '.join(filter(None, _names))}.",
    )


def drawn(shapes: Any) -> Any:
    """Small random numbers, on the device."""

    def draw(x: Any) -> jax.Array:
        rng = np.random.default_rng(0)
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 256, x.shape), x.dtype)
        return jnp.asarray(0.02 * rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(draw, shapes)


def measure(name: str, dtype: Any, mesh: Mesh | None) -> None:
    """Prints a row for each method, of one model in one dtype."""
    model = MODELS[name](_WIDTH.value, _LAYERS.value, mesh)
    size = sum(x.size for x in jax.tree.leaves(model.params)) / 1e6
    print(f"\n{name}, {jnp.dtype(dtype).name}, {size:.0f}M parameters", flush=True)
    platform = platform_of(_TOPOLOGY.value or "")
    head = f"{'':24}{COSTS[platform]:>10}{'while':>6}{'cond':>5}"
    head += f"{'temp MB':>9}{'compile':>9}"
    several = mesh is not None and mesh.size > 1
    times = f"{'ms':>9}{'/optax':>8}" if mesh is None else ""
    print(head + times + ("  collectives, MB" if several else ""))
    steps, carries, rows = {}, {}, {}
    for method in _METHODS.value or [x for x in METHODS if x not in MATRICES]:
        for way in _AS.value if method not in PLAIN else [""]:
            reductions.forced_device = way
            start = time.perf_counter()
            step, tx = compiled(model, METHODS[method](), dtype, mesh)
            seconds = time.perf_counter() - start
            found = facts(step.as_text())
            cost, temp = cost_and_temporaries(step, platform)
            label = f"{method} as on {way}" if way else method
            shown = f"{cost:.0f}" if cost else "-"
            row = f"{label:24}{shown:>10}{found.loops:6}{found.branches:5}"
            rows[label] = f"{row}{temp:9.1f}{seconds:9.1f}"
            if several:
                each = found.collectives.items()
                parts = [f"{n} {kind} {size / 1e6:.2f}" for kind, (n, size) in each]
                rows[label] += "  " + ", ".join(parts)
            if mesh is None:
                params = drawn(model.params)
                steps[label], carries[label] = step, (params, tx.init(params))
            else:
                print(rows[label], flush=True)
    if mesh is None:
        batch = drawn(model.batch)
        spent = in_turns(steps, carries, batch, _TURNS.value, _CHAIN.value)
        base = spent.get("optax", next(iter(spent.values())))
        for label, ms in spent.items():
            ratio = np.median(ms / base)
            print(f"{rows[label]}{1e3 * np.median(ms):9.3f}{ratio:8.3f}", flush=True)


def main(argv: Any) -> None:
    del argv
    mesh = None
    if _TOPOLOGY.value:
        shape = tuple(map(int, _MESH.value))
        chips = devices(_TOPOLOGY.value)[: math.prod(shape)]
        chips = np.array(chips).reshape(shape)
        mesh = Mesh(chips, ("data", "model")[: len(shape)])
    device = _TOPOLOGY.value or jax.devices()[0].device_kind
    over = f", {' x '.join(_MESH.value)} chips" if mesh is not None else ""
    print(f"jax {jax.__version__}, optax {optax.__version__}, {device}{over}")
    for name in _MODELS.value:
        for dtype in _DTYPES.value:
            measure(name, jnp.dtype(dtype), mesh)


if __name__ == "__main__":
    app.run(main)
