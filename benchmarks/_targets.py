"""Devices to compile for that are not there, and the memory traffic of what comes out.

TPUs by the name of their topology, with libtpu (`pip install "clipfx[accelerators]"`);
an H100 as `h100`, with JAX's own plugin (`pip install "jax[cuda12]"`, 5 GB).
"""

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from benchmarks._collectives import sizes

# From NVIDIA's data sheet of the H100 SXM and the limits of compute capability 9.0.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def platform_of(topology: str) -> str:
    """As JAX calls it."""
    return "gpu" if topology == "h100" else "tpu"


def devices(topology: str) -> Sequence[Any]:
    """What to compile for."""
    if platform_of(topology) == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        return topologies.get_topology_desc(topology, "tpu").devices
    jax.config.update("jax_platforms", "cpu")  # or the plugin looks for a GPU
    jax.devices()  # registers plugins
    return topologies.get_topology_desc(
        topology_name="", platform="cuda", target_config=_H100, topology="1x1x1"
    ).devices


_LINE = re.compile(r"\s*(?:ROOT )?(%[\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "iota",
    "conditional", "copy-done", "after-all", "call", "opt-barrier", "partition-id",
}  # fmt: skip


class _Line(NamedTuple):
    """An instruction: its name, type and kind, and the rest of its line."""

    name: str
    shape: str
    kind: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Their names."""
        return re.findall(r"%[\w.\-]+", self.rest.split("), ")[0])


def computations(text: str) -> tuple[list[str], dict[str, str]]:
    """Names of those that a compiled program starts with, and all by name."""
    rows = re.findall(
        r"^(ENTRY )?(%[\w.\-]+) \(.*?\) -> .*? \{\n(.*?)^\}", text, re.S | re.M
    )
    entries = [name for entry, name, _ in rows if entry]
    return entries, {name: body for _, name, body in rows}


def _size(shapes: str) -> int:
    return sum(sizes(shapes))


def loops(text: str, bodies: dict[str, str]) -> list[tuple[str, int | None]]:
    """Of every loop in a text its body, and how often it turns, None if not known."""
    found: list[tuple[str, int | None]] = []
    for condition, inside, rest in re.findall(
        r"condition=(%[\w.\-]+), body=(%[\w.\-]+)(.*)", text
    ):
        told = re.findall(r'"known_trip_count":\{"n":"(\d+)"', rest)
        turns = told or re.findall(r"constant\((\d+)\)", bodies[condition])
        known = told or (len(turns) == 1 and "direction=LT" in bodies[condition])
        found.append((inside, int(turns[0]) if known else None))
    return found


def branches(text: str) -> list[str]:
    """What the branches of every conditional in a text compute."""
    several = re.findall(r"branch_computations=\{(.*?)\}", text)
    two = re.findall(r"(?:true|false)_computation=(%[\w.\-]+)", text)
    return [x.strip() for names in several for x in names.split(",")] + two


def moved(text: str) -> int:
    """Bytes that instructions read and write, in loops as often as these turn.

    All branches of a conditional count; of what an instruction takes slices of the
    slices, of what it updates in place the update.
    """
    entries, bodies = computations(text)
    found = {name: map(_LINE.match, body.splitlines()) for name, body in bodies.items()}
    lines = {n: [_Line(*m.groups()) for m in some if m] for n, some in found.items()}
    total, todo = 0, [(name, 1) for name in entries]
    while todo:
        name, times = todo.pop()
        shapes = {x.name: x.shape for x in lines[name]}
        for x in lines[name]:
            if x.kind == "while":
                ((inside, turns),) = loops(x.rest, bodies)
                todo.append((inside, times * (turns or 1)))
            if x.kind == "conditional":
                todo += [(inside, times) for inside in branches(x.rest)]
            if x.kind not in _FREE:
                called = re.search(r"calls=(%[\w.\-]+)", x.rest)
                inner = lines[called[1]] if called else []
                total += times * _of_one(x, shapes, inner)
    return total


def _of_one(x: _Line, shapes: dict[str, str], inner: list[_Line]) -> int:
    whole = [_size(shapes.get(name, "")) for name in x.operands]
    if not inner:
        if x.kind == "dynamic-update-slice":
            return 2 * whole[1]
        return _size(x.shape) + (0 if x.kind == "dynamic-slice" else sum(whole))
    of = {y.name: y for y in inner}
    read = 0
    for k, size in enumerate(whole):
        own = [y.name for y in inner if y.kind == "parameter"
               and y.rest.startswith(f"{k})")]  # fmt: skip
        for y in inner:  # as the other shapes that it is read in
            own += [y.name] if y.kind == "bitcast" and y.operands[0] in own else []
        users = [y for y in inner if y.name not in own and {*own} & {*y.operands}]
        if users and all(_part_of(y, own) for y in users):
            size = sum(_size(y.shape) for y in users if y.kind == "dynamic-slice")
        read += size
    updates = [y for y in inner if y.kind == "dynamic-update-slice"]
    in_place = sum(_size(y.shape) for y in updates)
    new = sum(_size(of[y.operands[1]].shape) for y in updates if y.operands[1] in of)
    return read + max(_size(x.shape) - in_place, 0) + new


def _part_of(y: _Line, names: list[str]) -> bool:
    """Whether an instruction needs a part only of an operand of these names."""
    first = y.operands[0] in names and not {*names} & {*y.operands[1:]}
    return first and y.kind in ("dynamic-slice", "dynamic-update-slice")
