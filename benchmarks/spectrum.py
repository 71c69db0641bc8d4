"""How exact spectral clips are, with how many products, and what they cost beside Muon.

    python -m benchmarks.spectrum
    python -m benchmarks.spectrum --topology=v5e:2x2   # on a mesh, compiled only

A matrix has one singular value of a multiple of the bound, and all others of a tenth of
it, or half of them so. Errors are relative, the largest of all singular values; those
of half precision as stored. Published is the coupled iteration of ten steps in float64.
Times are ratios to orthogonalising the same matrix as `optax.contrib.muon` does.
Compiled for a mesh of TPUs, a step of `soft` takes the cycles that XLA's cost model
expects of one chip, all branches taken, and collectives on top of them.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import clipfx
from benchmarks._programs import facts
from benchmarks._targets import devices
from clipfx._core import reductions, spectra

_SHAPE = flags.DEFINE_list("shape", ["128", "512"], "Of the matrix.")
_TIMED = flags.DEFINE_list("timed", ["512", "2048"], "Of the one that is timed.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU to compile for, as v5e:2x2.")
_MESHED = flags.DEFINE_list("meshed", ["1024", "4096"], "Of the matrix that is split.")
_TURNS = flags.DEFINE_integer("turns", 9, "Timed calls of each variant.")

RATIOS = (10, 30, 100, 1e3, 1e4)


def drawn(rows: int, columns: int, values: Any) -> np.ndarray:
    """A matrix with these singular values, in float64."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, rows)))[0] for n in (rows, columns))
    return (left * values) @ right.T


def published(x: np.ndarray) -> np.ndarray:
    """Ten steps of the coupled iteration for (1 + x x^T)^(-1/2) x."""
    eye = np.eye(len(x))
    y = eye + x @ x.T
    size, z = np.linalg.norm(y), eye
    y = y / size
    for _ in range(10):
        t = 1.5 * eye - 0.5 * z @ y
        y, z = y @ t, t @ z
    return z @ x / np.sqrt(size)


def bounded(response: str) -> Callable[[jax.Array], jax.Array]:
    """A spectral clip at 1 of one matrix."""
    fun = functools.partial(
        spectra.bounded,
        split=spectra.Split(),
        response=response,
        precision="highest",
    )
    return jax.jit(lambda x: fun(x[None], jnp.ones(1))[0])


def error(x: Any, out: Any, response: str) -> float:
    """The largest relative error of a singular value."""
    got, s = (np.linalg.svd(np.float64(y), compute_uv=False) for y in (out, x))
    wanted = s / np.sqrt(1 + s * s) if response == "soft" else np.minimum(s, 1)
    wanted = np.sort(wanted)[::-1]
    return float(np.max(np.abs(got - wanted) / wanted))


def products(x: np.ndarray, response: str) -> int:
    """Of matrices, that it takes."""
    gram = x @ x.T
    top = np.linalg.norm(gram @ gram) ** 0.25
    least = 1 / (np.hypot(top, 1) * (1 + 2.0**-5))
    steps = 2 + sum(least < end for end, _ in spectra.STEPS[1:-1])
    return 2 + 3 * steps + (43 if response == "hard" else 0)


def table(rows: int, columns: int) -> None:
    """Prints errors by ratio."""
    print(f"\n{rows} x {columns}: largest relative error of a singular value")
    heads = ["soft", "bfloat16", "products", "hard", "bfloat16", "products"]
    print(
        f"{'s_1 / c':>8} {'the rest':12}{'published':>10}", *(f"{x:>9}" for x in heads)
    )
    half = np.arange(rows) < rows // 2
    for ratio in RATIOS:
        cases = {
            "0.1 c": np.where(np.arange(rows) < 1, ratio, 0.1),
            "half 0.1 c": np.where(half, ratio, 0.1),
        }
        for name, values in cases.items():
            x = drawn(rows, columns, values)
            line = f"{ratio:8.0f} {name:12}{error(x, published(x), 'soft'):10.1e}"
            for response in ("soft", "hard"):
                run = bounded(response)
                single = jnp.asarray(x, jnp.float32)
                rounded = jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)
                stored = run(rounded).astype(jnp.bfloat16).astype(jnp.float32)
                line += f" {error(single, run(single), response):9.0e}"
                # What rounding leaves of half of the values is no tenth of c.
                of_half = error(rounded, stored, response) if name == "0.1 c" else None
                line += f" {'' if of_half is None else f'{of_half:.0e}':>9}"
                line += f" {products(x, response):9}"
            print(line, flush=True)


def times(rows: int, columns: int, turns: int) -> None:
    """Prints times in turns, as ratios."""
    muon = optax.contrib.scale_by_muon(
        weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(0, 1)
    )
    x = jnp.asarray(drawn(rows, columns, np.geomspace(100, 0.01, rows)), jnp.float32)
    state = muon.init(x)
    runs = {"muon": jax.jit(lambda x: muon.update(x, state)[0])}
    runs |= {response: bounded(response) for response in ("soft", "hard")}
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(x).block_until_ready()
            if turn:
                spent[name].append(time.perf_counter() - start)
    print(f"\n{rows} x {columns}, s_1 / c = 100: time as a multiple of Muon's")
    for name, seconds in spent.items():
        ratio = np.median(np.array(seconds) / np.array(spent["muon"]))
        print(f"{name:6}{ratio:8.2f}")


# Types of a mesh, and whether `axis_name` tells what they do not.
WAYS = {
    "Auto": (AxisType.Auto, False),
    "Auto, told": (AxisType.Auto, True),
    "Explicit": (AxisType.Explicit, False),
}


def on_mesh(topology: str, rows: int, columns: int) -> None:
    """Prints what a step takes on all chips, by what is split and how that is said."""
    reductions.forced_device = "mesh"
    chips = np.array(devices(topology))
    print(f"\n{rows} x {columns} over {len(chips)} chips of {topology}: a step of soft")
    print(f"{'split':9}{'axes':12}{'kcycles':>8}  collectives, MB")
    for name, spec in {"rows": P("data"), "columns": P(None, "data")}.items():
        for way, (kind, told) in WAYS.items():
            mesh = Mesh(chips, ("data",), axis_types=(kind,))
            tx = clipfx.clip_spectrum(1.0, axis_name=spec if told else None)
            like = jax.ShapeDtypeStruct((rows, columns), "float32")
            split, whole = (NamedSharding(mesh, p) for p in (spec, P()))
            grads = {"w": like.update(sharding=split)}
            state = jax.tree.map(
                lambda x, whole=whole: x.update(sharding=whole),
                jax.eval_shape(tx.init, {"w": like}),
            )
            step: Any = jax.jit(tx.update).lower(grads, state).compile()
            found = facts(step.as_text())
            each = found.collectives.items()
            parts = ", ".join(f"{n} {kind} {b / 1e6:.1f}" for kind, (n, b) in each)
            cost = f"{found.cycles / 1e3:.0f}"
            print(f"{name:9}{way:12}{cost:>8}  {parts}", flush=True)


def main(argv: list[str]) -> None:
    """Prints errors and times, or what a mesh takes."""
    del argv
    if _TOPOLOGY.value:
        print(f"jax {jax.__version__}, {_TOPOLOGY.value}")
        rows, columns = map(int, _MESHED.value)
        on_mesh(_TOPOLOGY.value, rows, columns)
        return
    print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0]}")
    rows, columns = map(int, _SHAPE.value)
    table(rows, columns)
    rows, columns = map(int, _TIMED.value)
    times(rows, columns, _TURNS.value)


if __name__ == "__main__":
    app.run(main)
