"""What per-example clipping of a decoder costs on a TPU or an H100, owning one or not.

    python -m benchmarks.per_example_programs                       # here: times
    python -m benchmarks.per_example_programs --topology=v5p:2x2x1  # compiled only
    python -m benchmarks.per_example_programs --topology=h100

A decoder in bfloat16 with a table tied to the head. On the device here the programs
take turns, beside `vmap(grad)`, which keeps the gradient of every example. For a chip
that need not be here (see `_targets` for what that needs) they are compiled and read:
FLOPs; for a TPU the cycles that XLA's cost model expects, for a GPU what instructions
move through memory, in a loop as often as it turns; temporaries and seconds to compile,
each beside its ratio to the ordinary gradient of the same model. XLA counts the FLOPs
of a loop once, for a GPU not at all.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks._programs import (
    COSTS,
    Model,
    Shape,
    cost_and_temporaries,
    decoder_of_examples,
    facts,
    of_examples,
    on_a_chip,
)
from benchmarks._targets import platform_of
from benchmarks._timing import in_turns
from clipfx.per_example.engine import target

_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU to compile for, or h100.")
_KINDS = flags.DEFINE_list("kinds", ["kept", "remat", "unrolled"], "Of the decoder.")
_GROUPS = flags.DEFINE_list(
    "groups", ["global", "weight", "block"],
    "Of the thresholds: global, leaf, or each weight or block of each layer.",
)  # fmt: skip
_SHAPE = flags.DEFINE_list(
    "shape", ["4", "512", "512", "8", "32000"],
    "Layers, width, length, examples, vocabulary.",
)  # fmt: skip
_TURNS = flags.DEFINE_integer("turns", 9, "Timed turns of each program.")
_CHAIN = flags.DEFINE_integer("steps", 5, "Steps in each turn.")


def every(model: Model) -> Callable[[Any, Any], Any]:
    """`vmap(grad)`, then clip and add up."""

    def run(params: Any, batch: Any) -> Any:
        grads = jax.vmap(jax.grad(model.loss), (None, 0))(params, batch)
        factors = jnp.minimum(1, 1 / jax.vmap(optax.tree.norm)(grads))
        return jax.tree.map(lambda g: jnp.tensordot(factors, g, 1), grads)

    return run


def programs(model: Model) -> dict[str, Callable[[Any, Any], Any]]:
    """What is compared: the gradient, that of every example, and ours."""
    runs = {"gradient": of_examples(model, None), "vmap(grad)": every(model)}
    return runs | {name: of_examples(model, name) for name in _GROUPS.value}


def drawn(shapes: Any, words: int) -> Any:
    """Small weights, and words of a vocabulary."""
    rng = np.random.default_rng(0)

    def draw(x: Any) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, words, x.shape), x.dtype)
        return jnp.asarray(0.02 * rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(draw, shapes)


def compare_times(shape: Shape, kind: str) -> None:
    """Prints the milliseconds of each program, over those of the gradient."""
    model = decoder_of_examples(shape, kind)
    params, batch = drawn((model.params, model.batch), shape.vocabulary)
    steps: dict[str, Any] = {}
    for name, run in programs(model).items():
        step = jax.jit(run)
        try:
            jax.block_until_ready(step(params, batch))
        except jax.errors.JaxRuntimeError as error:
            print(f"{kind}, {name}: {str(error).splitlines()[0][:90]}")
            continue
        steps[name] = lambda _, batch, step=step: (step(params, batch),)
    carries: dict[str, Any] = dict.fromkeys(steps, (None,))
    spent = in_turns(steps, carries, batch, _TURNS.value, _CHAIN.value)
    for name, seconds in spent.items():
        ratio = np.median(seconds / spent["gradient"])
        label = f"{kind}, {name}"
        print(f"{label:20}{1e3 * np.median(seconds):10.2f} ms{ratio:8.2f}", flush=True)


def main(argv: Any) -> None:
    del argv
    shape = Shape(*map(int, _SHAPE.value))
    device = _TOPOLOGY.value or jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, optax {optax.__version__}, {device}, {shape}")
    if not _TOPOLOGY.value:
        for kind in _KINDS.value:
            compare_times(shape, kind)
        return
    target.forced = platform_of(_TOPOLOGY.value)
    names = "GFLOPs", COSTS[target.forced], "temp MB", "compile s"
    heads = "".join(f"{x:>14}" for x in names)
    print(f"{'':21}{heads} while")
    for kind in _KINDS.value:
        model = decoder_of_examples(shape, kind)
        args = on_a_chip(_TOPOLOGY.value, (model.params, model.batch))
        base = None
        for name, run in programs(model).items():
            start = time.perf_counter()
            step: Any = jax.jit(run).lower(*args).compile()
            seconds = time.perf_counter() - start
            flops = (step.cost_analysis() or {}).get("flops", np.nan) / 1e9
            costs = cost_and_temporaries(step, target.forced)
            found = facts(step.as_text())
            row = np.array([flops, *costs, seconds])
            base = row if base is None else base
            each = [f"{x:.0f} ({r:.2f})" for x, r in zip(row, row / base, strict=True)]
            label = f"{kind}, {name}"
            cells = "".join(f"{x:>14}" for x in each)
            print(f"{label:21}{cells}{found.loops:6}", flush=True)


if __name__ == "__main__":
    app.run(main)
