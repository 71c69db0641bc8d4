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

from benchmarks._programs import (
    COSTS,
    Shape,
    cost_and_temporaries,
    decoder_of_examples,
    facts,
    of_examples,
    on_a_chip,
)
from benchmarks._targets import platform_of
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
    shape = Shape(*map(int, _SHAPE.value))
    print(
        f"jax {jax.__version__}, optax {optax.__version__}, {_TOPOLOGY.value}, {shape}"
    )
    names = "GFLOPs", COSTS[target.forced], "temp MB", "compile s"
    heads = "".join(f"{x:>14}" for x in names)
    print(f"{'':17}{heads} while")
    for kind in _KINDS.value:
        model = decoder_of_examples(shape, kind)
        args = on_a_chip(_TOPOLOGY.value, (model.params, model.batch))
        base = None
        for groups in [None, *_GROUPS.value]:
            start = time.perf_counter()
            step: Any = jax.jit(of_examples(model, groups)).lower(*args).compile()
            seconds = time.perf_counter() - start
            flops = (step.cost_analysis() or {}).get("flops", np.nan) / 1e9
            costs = cost_and_temporaries(step, target.forced)
            found = facts(step.as_text())
            row = np.array([flops, *costs, seconds])
            base = row if base is None else base
            each = [f"{x:.0f} ({r:.2f})" for x, r in zip(row, row / base, strict=True)]
            label = f"{kind}, {groups or 'gradient'}"
            cells = "".join(f"{x:>14}" for x in each)
            print(f"{label:17}{cells}{found.loops:6}", flush=True)


if __name__ == "__main__":
    app.run(main)
