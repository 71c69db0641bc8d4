"""Collectives: counted in a compiled program, predicted for a pod of 256 chips.

Sources of the published figures:

- TPU v5e, docs.cloud.google.com/tpu/docs/v5e: 400 GB/s of ICI a chip, both ways, and
  819 GB/s of HBM; v5p, docs.cloud.google.com/tpu/docs/v5p: 1200 GB/s and 2765 GB/s.
- H100 SXM, nvidia.com/en-us/data-center/h100: 900 GB/s of NVLink, both ways, and 3.35
  TB/s of HBM; DGX H100, docs.nvidia.com/dgx-basepod, "Core Components": eight GPUs and
  eight ports of 400 Gb/s.
- Latencies are assumptions. ICI: 1 us a hop, jax-ml.github.io/scaling-book/sharding,
  which also reports 3 hops that took 8 us. H100: the model that NCCL chooses algorithms
  by, github.com/NVIDIA/nccl, src/graph/tuning.cc: a tree, protocol LL.
"""

import math
import re
from typing import NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Of an operation in two halves the second counts: the result of the first may hold the
# operands and other things. A shape has neither quotes nor names of values in it.
_LINE = re.compile(
    rf'^\s*(?:ROOT )?\S+ = ([^%"]*?) ({"|".join(KINDS)})(?:-done)?\(', re.MULTILINE
)
_ARRAY = re.compile(r"\b(pred|token|[a-z]+(\d+)\w*)\[([\d,<=]*)\]")


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Counts collectives, and the bytes of their results on one device.

    One that XLA combined from several counts as one, with the bytes of all; one in the
    body of a loop counts once. The result of an all-reduce is as large as its operand,
    that of an all-gather is all that was gathered, that of a reduce-scatter the share
    of one device.

    Args:
      text: `compiled.as_text()` of a program for several devices.

    Returns:
      By kind, as in `KINDS`, how many and their bytes; kinds that do not occur are
      left out.
    """
    found: dict[str, tuple[int, int]] = {}
    for shape, kind in _LINE.findall(text):
        count, size = found.get(kind, (0, 0))
        size += sum(sizes(shape))
        found[kind] = count + 1, size
    return found


def sizes(shapes: str) -> list[int]:
    """Bytes of every array in the text of a type."""
    return [_bytes(*array) for array in _ARRAY.findall(shapes)]


def _bytes(dtype: str, bits: str, dims: str) -> int:
    width = int(bits) if bits else 8 * (dtype == "pred")
    size = math.prod(int(dim.strip("<=")) for dim in dims.split(",") if dim)
    return (width * size + 7) // 8


CHIPS = 256


class Pod(NamedTuple):
    """256 chips.

    Attributes:
      name: Of the machine.
      bandwidth: Bytes per second into each chip of a collective over all of them, and
        how it follows from what is published.
      hops: Of an all-reduce of a few bytes: how many, seconds each; and why.
      memory: Bytes per second of a chip's memory.
    """

    name: str
    bandwidth: tuple[float, str]
    hops: tuple[tuple[tuple[int, float], ...], str]
    memory: float

    @property
    def latency(self) -> float:
        """Seconds of an all-reduce of a few bytes."""
        return sum(number * seconds for number, seconds in self.hops[0])

    def seconds(self, size: float, passes: int = 1) -> float:
        """Seconds to gather or scatter `size` bytes; an all-reduce takes two passes."""
        return passes * (CHIPS - 1) / CHIPS * size / self.bandwidth[0]

    def __str__(self) -> str:
        """The arithmetic of bandwidth and latency."""
        (speed, why), (hops, path) = self.bandwidth, self.hops
        terms = " + ".join(f"{number} x {1e6 * s:.2g}" for number, s in hops)
        return (
            f"{self.name}: {speed / 1e9:.0f} GB/s ({why}), memory "
            f"{self.memory / 1e9:.0f} GB/s\n  latency {terms} = "
            f"{1e6 * self.latency:.0f} us ({path})"
        )


PODS = (
    Pod(
        "TPU v5e, 16 x 16",
        (400e9 / 2, "400 GB/s both ways / 2"),
        (((2 * (8 + 8), 1e-6),), "there and back, half of each ring"),
        819e9,
    ),
    Pod(
        "TPU v5p, 4 x 8 x 8",
        (1200e9 / 2, "1200 GB/s both ways / 2"),
        (((2 * (2 + 4 + 4), 1e-6),), "there and back, half of each ring"),
        2765e9,
    ),
    Pod(
        "H100, 32 nodes of 8",
        (min(900e9 / 2, 8 * 400e9 / 8), "8 x 400 Gb/s a node, less than NVLink's 450"),
        (
            ((1, 6.8e-6), (2 * 7, 1.8 * 0.6e-6), (2 * 5, 5e-6)),
            "start, 2 x 7 within a node, 2 x log2(32) between nodes",
        ),
        3350e9,
    ),
)
