"""What clipping costs on meshes: collectives, time, compilation, a pod of 256 chips.

    python -m benchmarks.sharded

On a CPU it sets up eight devices; elsewhere it takes those that there are. Ratios are
within one run, as in `benchmarks.batch`. Seconds of compilation are CPU time of all
threads, which other jobs on the machine change less than they change the clock.
Collectives are counted in what XLA compiled for these devices; another backend may
combine them in another way. `benchmarks._collectives` names the sources of the
published figures that the last table is computed from.
"""

import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import clipfx
from benchmarks._collectives import CHIPS, PODS, collectives
from benchmarks._meshes import (
    BOTH,
    FSDP,
    WAYS,
    WHOLE,
    Layout,
    compiled,
    mesh_of,
    normal,
    tree_of,
)
from benchmarks._timing import in_turns, words

_TABLES = flags.DEFINE_list("tables", None, "Names; by default all.")
_LEAVES = flags.DEFINE_list("leaves", ["48", "400"], "Of trees to count collectives.")
_TURNS = flags.DEFINE_integer("turns", 40, "Timed steps of each variant.")
_LAYERS = flags.DEFINE_integer("layers", 24, "Of the model that steps are timed on.")
_WIDTH = flags.DEFINE_integer("width", 512, "Of these layers.")
_COMPILE = flags.DEFINE_list("compile", ["10", "100", "1000"], "Leaves, all devices.")
_MESHES = flags.DEFINE_list("meshes", ["100"], "Leaves, meshes of 1, 2, 4 ... devices.")
_ADAMW = flags.DEFINE_bool("adamw", True, "Whether to compile it behind the methods.")
_VARIANTS = flags.DEFINE_list(
    "variants",
    ["none", "clip_by_global_norm", "clip_per_layer", "optax"],
    "Methods to compile.",
)

METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "none": optax.identity,
    "clip_by_global_norm": lambda: clipfx.clip_by_global_norm(1.0),
    "clip_per_layer": lambda: clipfx.clip_per_layer(1.0),
    "zclip": clipfx.zclip,
    "spamp": clipfx.spamp,
    "optax": lambda: optax.clip_by_global_norm(1.0),
}


def before_adamw(name: str) -> optax.GradientTransformation:
    return optax.chain(METHODS[name](), optax.adamw(3e-4))


def of_program(fun: Callable, *args: Any) -> dict[str, tuple[int, int]]:
    """The collectives of a function."""
    # Machine code takes most of the time and has no say in collectives.
    fast: dict = {"xla_backend_optimization_level": 0}
    options = fast if jax.default_backend() == "cpu" else None
    program = jax.jit(fun).lower(*args).compile(compiler_options=options)
    return collectives(program.as_text() or "")


@functools.cache
def of_clip(layout: Layout, leaves: int, way: str, name: str) -> dict:
    """The collectives of one method alone, without an optimizer."""
    mesh, tx = mesh_of(layout, way), METHODS[name]()
    grads, specs = tree_of(layout, mesh, leaves, 1024)
    update: Callable = tx.update
    if way == "shard_map":
        spread: dict = {"in_specs": (specs, P()), "out_specs": (specs, P())}
        update = jax.shard_map(update, mesh=mesh, **spread)
    return of_program(update, grads, jax.eval_shape(tx.init, grads))


def cell(found: dict[str, tuple[int, int]]) -> str:
    parts = [f"{count} {kind} {size:,}" for kind, (count, size) in found.items()]
    return " + ".join(parts) or "0"


def print_collectives() -> None:
    """Prints a table for each tree: methods by ways to run."""
    print("\nCollectives of a clip alone, and bytes of their results on a device")
    first, *rest = [int(n) for n in _LEAVES.value]
    trees = [(FSDP, first), (BOTH, first), (WHOLE, first), *((FSDP, n) for n in rest)]
    for layout, n in trees:
        title = f"{layout.name}, {n} leaves"
        print(f"{title:26}" + "".join(f"{way:24}" for way in WAYS))
        for name in METHODS:
            row = f"  {name:24}"
            for way in WAYS:
                apart = (name, way) == ("optax", "shard_map")
                text = "wrong" if apart else cell(of_clip(layout, n, way, name))
                row += f"{text:24}"
            print(row, flush=True)
    print("What stands in a loop counts once: norms are in a loop that runs a second")
    print("time if sums leave float32. wrong: each device by the norm of its part.")


def print_per_example() -> None:
    """Prints the collectives of bounded sums beside those of the gradient."""
    leaves, size = int(_LEAVES.value[0]), 8 * len(jax.devices())
    print(f"\nPer example, {leaves} leaves of width 256, {size} examples split")

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for layer in params.values():
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return jnp.mean(x**2)

    total = lambda params, xs: jax.vmap(loss, (None, 0))(params, xs).sum()
    bounded = clipfx.per_example.clipped_grad(loss, 1.0)
    for layout, way in [*((WHOLE, way) for way in WAYS), (FSDP, "jit"), (BOTH, "jit")]:
        print(f"{layout.name}, {way}")
        mesh = mesh_of(layout, way)
        params, specs = tree_of(layout, mesh, leaves, 256)
        rows = NamedSharding(mesh, P("data"))
        xs = jax.ShapeDtypeStruct((size, 256), jnp.float32, sharding=rows)
        runs = (
            ("gradient", jax.grad(total), specs),
            ("clipped_grad", bounded, (specs, P("data"))),
        )
        for name, run, out in runs:
            if way == "shard_map":
                spread: dict = {"in_specs": (specs, P("data")), "out_specs": out}
                run = jax.shard_map(run, mesh=mesh, **spread)
            with jax.set_mesh(mesh):
                print(f"  {name:14}{cell(of_program(run, params, xs))}", flush=True)
    print("The sum of clipped_grad stands twice: also in a loop that drops bad")
    print("examples, which does not run if there are none.")


@functools.cache
def model_step(name: str, way: str = "jit") -> tuple[Any, Any, float]:
    """The step that is timed, where its carry has to be, words per parameter."""
    layers, width, mesh = _LAYERS.value, _WIDTH.value, mesh_of(FSDP, way)
    step, places, _ = compiled(before_adamw(name), mesh, 2 * layers, width, way)
    size = layers * width * (width + 1) // mesh.size
    return step, places, words(step, size, jnp.float32)[0]


def of_reduction(scalars: int, stacked: bool) -> float:
    """Milliseconds of a program that adds up scalars over devices."""
    mesh = mesh_of(FSDP, "shard_map")

    def add(xs: list[jax.Array]) -> Any:
        parts = [x[0] for x in xs]
        return jax.lax.psum(jnp.stack(parts) if stacked else parts, "data")

    run = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=P("data"), out_specs=P()))
    place = NamedSharding(mesh, P("data"))
    xs = [jax.device_put(jnp.ones(mesh.size), place) for _ in range(scalars)]
    clock = [time.perf_counter()]
    for _ in range(_TURNS.value + 2):
        jax.block_until_ready(run(xs))
        clock.append(time.perf_counter())
    return 1e3 * float(np.median(np.diff(clock)[2:]))


def print_speed() -> None:
    """Prints the time of a step with each method, and without."""
    layers, width = _LAYERS.value, _WIDTH.value
    variants = {"none": ("none", "jit"), "none again": ("none", "jit")}
    variants |= {name: (name, "jit") for name in METHODS}
    variants |= {
        f"global, {way}": ("clip_by_global_norm", way) for way in list(WAYS)[1:]
    }
    steps, carries = {}, {}
    for label, (name, way) in variants.items():
        steps[label], (specs, state), _ = model_step(name, way)
        params = normal(jax.random.key(0), layers, width, specs)
        init = jax.jit(before_adamw(name).init, out_shardings=state)
        carries[label] = params, init(params)
    grads = normal(jax.random.key(1), layers, width, model_step("none")[1][0])
    times = in_turns(steps, carries, grads, _TURNS.value, 1)
    print(f"\nA step of adamw, FSDP, {layers} layers of {width} x {width} + {width}")
    print(f"{'':26}{'ms':>8}{'/none':>8}{'25%':>8}{'75%':>8}{'words':>8}")
    for label, variant in variants.items():
        low, mid, high = np.percentile(times[label] / times["none"], [25, 50, 75])
        print(
            f"{label:26}{1e3 * np.median(times[label]):8.1f}{mid:8.2f}{low:8.2f}"
            f"{high:8.2f}{model_step(*variant)[2]:8.2f}",
            flush=True,
        )
    print("/none: of the same turn, median and quartiles; `none again` is the noise.")
    print("words: XLA's bytes accessed, in words per parameter that a device holds.")
    n = 2 * layers
    apart, together = of_reduction(n, False), of_reduction(n, True)
    print(f"Here {n} scalars in one all-reduce take {apart:.1f} ms, one vector of {n}")
    print(f"takes {together:.1f} ms.")


def print_compilation() -> None:
    """Prints what a step costs to compile, and how that grows with the tree."""
    behind = "adamw" if _ADAMW.value else "nothing"
    print(
        f"\nCPU seconds for a step, FSDP, {behind} behind the method; growth: powers of"
    )
    print("the number of leaves by which trace, lower and compile grew from fewer")
    heads = f"{'trace':>8}{'lower':>8}{'compile':>9}{'growth':>18}"
    print(f"{'leaves':>7}{'devices':>9}  {'':22}{heads}")
    every = len(jax.devices())
    sizes = [2**k for k in range(every.bit_length())]
    rows = [(int(n), every) for n in _COMPILE.value]
    rows += [(int(n), size) for n in _MESHES.value for size in sizes]
    before: dict[str, tuple[int, list[float]]] = {}
    for n, size in rows:
        mesh = mesh_of(FSDP, "jit", size)
        for name in _VARIANTS.value:
            tx = before_adamw(name) if _ADAMW.value else METHODS[name]()
            seconds, growth = compiled(tx, mesh, n, 1024)[2], ""
            fewer, past = before.get(name, (n, seconds))
            if n > fewer:
                powers = np.log(np.divide(seconds, past)) / math.log(n / fewer)
                growth = " ".join(f"{power:.2f}" for power in powers)
            before[name] = n, seconds
            trace, lower, rest = seconds
            row = f"{trace:8.2f}{lower:8.2f}{rest:9.2f}{growth:>18}"
            print(f"{n:7}{size:9}  {name:22}{row}", flush=True)


def print_pod() -> None:
    """Prints what the counted bytes and words would cost on a pod."""
    leaves, size, share = int(_LEAVES.value[-1]), 2 * 7e9, 2 * 7e9 / CHIPS
    part = f"{CHIPS - 1}/{CHIPS}"
    print(f"""
Predicted for 7B parameters in bfloat16, FSDP over {CHIPS} chips, {leaves} leaves
step: its communication, 3 x {part} x {size / 1e9:.0f} GB / bandwidth: parameters are
gathered twice, gradients scattered. wire: 2 x {part} x bytes / bandwidth; latency:
of each all-reduce; memory: words beyond adamw's x {share / 1e6:.1f} MB / bandwidth""")
    rows = [(name, "jit") for name in METHODS if name != "none"]
    rows += [(name, "shard_map") for name in ("clip_by_global_norm", "clip_per_layer")]
    heads = ("reduces", "bytes", "wire", "latency", "memory", "sum", "/step")
    for pod in PODS:
        step, once = 1e6 * pod.seconds(size, 3), 1e6 * share / pod.memory
        print(f"\n{pod}\n  step {step / 1e3:.1f} ms; to read the gradients once more")
        print(f"  {once:.0f} us, to read and write them besides {3 * once:.0f} us")
        print(f"  {'microseconds':32}" + "".join(f"{head:>8}" for head in heads))
        for name, way in rows:
            count, moved = of_clip(FSDP, leaves, way, name)["all-reduce"]
            wire, latency = 1e6 * pod.seconds(moved, 2), 1e6 * count * pod.latency
            memory = once * (model_step(name)[2] - model_step("none")[2])
            total = wire + latency + memory
            print(
                f"  {name + ', ' + way:32}{count:8}{moved:8,}{wire:8.3f}{latency:8.0f}"
                f"{memory:8.0f}{total:8.0f}{total / step:8.2%}"
            )


TABLES = {
    "collectives": print_collectives,
    "per_example": print_per_example,
    "speed": print_speed,
    "compilation": print_compilation,
    "pod": print_pod,
}


def main(argv: list[str]) -> None:
    """Prints the tables."""
    del argv
    names = _TABLES.value or list(TABLES)
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        raise SystemExit(
            f"sharded: unknown table {unknown[0]!r}: known are {', '.join(TABLES)}."
        )
    asked = "device_count" in os.environ.get("XLA_FLAGS", "")
    if not asked and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", 8)  # of no other platform
    kind, number = jax.devices()[0].device_kind, len(jax.devices())
    print(f"jax {jax.__version__}, optax {optax.__version__}, {number} x {kind}")
    for name in names:
        TABLES[name]()


if __name__ == "__main__":
    app.run(main)
