"""What per-example clipping of a decoder costs on a TPU or an H100, owning one or not.

    python -m benchmarks.per_example_programs --topology=v5p:2x2x1
    python -m benchmarks.per_example_programs --topology=h100

A decoder in bfloat16 with a table tied to the head, compiled for one chip (see
`_targets` for what that needs) and read: FLOPs; for a TPU the cycles that XLA's cost
model expects, for a GPU what instructions move through memory, in a loop as often as it
turns; temporaries and seconds to compile, each beside its ratio to the ordinary
gradient of the same model. XLA counts the FLOPs of a loop once, for a GPU not at all.
"""

import time
from typing import Any

import jax
import numpy as np
import optax
from absl import app, flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks._programs import Shape, decoder_of_examples, facts, of_examples
from benchmarks._targets import devices, moved, platform_of
from clipfx.per_example.engine import target

_TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x1", "TPU to compile for, or h100.")
_KINDS = flags.DEFINE_list("kinds", ["kept", "remat", "unrolled"], "Of the decoder.")
_GROUPS = flags.DEFINE_list(
    "groups", ["global", "weight", "block"],
    "Of the thresholds: global, leaf, or each weight or block of each layer.",
)  # fmt: skip
_SHAPE = flags.DEFINE_list(
    "shape", ["4", "512", "512", "8", "32000"],
    "Layers, width, length, examples, vocabulary.",
)  # fmt: skip


def main(argv: Any) -> None:
    del argv
    target.forced = platform_of(_TOPOLOGY.value)
    chips = np.array(devices(_TOPOLOGY.value)[:1])
    whole = NamedSharding(Mesh(chips, ("data",)), P())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
    shape = Shape(*map(int, _SHAPE.value))
    print(
        f"jax {jax.__version__}, optax {optax.__version__}, {_TOPOLOGY.value}, {shape}"
    )
    tpu = target.forced == "tpu"
    cost_of = "kcycles" if tpu else "moved MB"
    heads = "".join(f"{x:>14}" for x in ("GFLOPs", cost_of, "temp MB", "compile s"))
    print(f"{'':17}{heads} while")
    for kind in _KINDS.value:
        model = decoder_of_examples(shape, kind)
        args = jax.tree.map(place, (model.params, model.batch))
        base = None
        for groups in [None, *_GROUPS.value]:
            start = time.perf_counter()
            step: Any = jax.jit(of_examples(model, groups)).lower(*args).compile()
            seconds = time.perf_counter() - start
            text, cost = step.as_text(), step.cost_analysis() or {}
            found = facts(text)
            row = np.array([
                cost.get("flops", np.nan) / 1e9,
                found.cycles / 1e3 if tpu else moved(text) / 1e6,
                step.memory_analysis().temp_size_in_bytes / 1e6, seconds,
            ])  # fmt: skip
            base = row if base is None else base
            each = [f"{x:.0f} ({r:.2f})" for x, r in zip(row, row / base, strict=True)]
            label = f"{kind}, {groups or 'gradient'}"
            cells = "".join(f"{x:>14}" for x in each)
            print(f"{label:17}{cells}{found.loops:6}", flush=True)


if __name__ == "__main__":
    app.run(main)
