"""What clips of several libraries make of the same gradients: a table in Markdown.

    python -m benchmarks.numerics

Each clips by the global norm at 1. A cell has the norm that the library reports, if it
does, and the length of what it returns, in float64: "600 → 1". PyTorch and jax_privacy
are in the table where they are installed.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipfx

Leaves = list[np.ndarray]  # of float64, and what they are rounded to

_EVEN = [1.0, 1.0, 1.0, 1.0]
_STEPS = np.linspace(0.5, 1.5, 1000)
INPUTS: dict[str, tuple[str, list[Any]]] = {
    "float32, 3 and 4": ("float32", [[3.0, 4.0]]),
    "float32, norm 0.5": ("float32", [[0.3, 0.4]]),
    "bfloat16, 400 leaves of one 1": ("bfloat16", [[1.0]] * 400),
    "bfloat16, 1,000 elements of 0.5 to 1.5": ("bfloat16", [_STEPS]),
    "float16, four of 300": ("float16", [300 * np.array(_EVEN)]),
    "float16, four of 0.0001": ("float16", [1e-4 * np.array(_EVEN)]),
    "float32, four of 1e38": ("float32", [1e38 * np.array(_EVEN)]),
    "float32, four of 3e38": ("float32", [3e38 * np.array(_EVEN)]),
    "float32, four of 1e-30": ("float32", [1e-30 * np.array(_EVEN)]),
    "float32, four of 1e-40 (subnormal)": ("float32", [1e-40 * np.array(_EVEN)]),
    "zeros": ("float32", [np.zeros(4)]),
    "no elements": ("float32", [np.zeros(0)]),
    "no leaves": ("float32", []),
    "3, 4 and NaN": ("float32", [[3.0, 4.0], [np.nan]]),
    "3, 4 and infinity": ("float32", [[3.0, 4.0], [np.inf]]),
    "1e38 and one bfloat16": ("float32, bfloat16", [[1e38], [1.0]]),
}


def arrays(name: str) -> list[jax.Array]:
    """Leaves of an input, in its dtype or dtypes."""
    dtypes, leaves = INPUTS[name]
    kinds = dtypes.split(", ")
    return [jnp.array(x, kinds[i % len(kinds)]) for i, x in enumerate(leaves)]


def compiled(step: Callable[..., Any], leaves: list[jax.Array]) -> Any:
    """Jitted where that takes no minutes; the results are the same."""
    return (jax.jit(step) if len(leaves) < 100 else step)(leaves)


def by_clipfx(leaves: list[jax.Array]) -> tuple[float, Leaves]:
    clipped, metrics = compiled(lambda x: clipfx.tree_clip(x, 1.0), leaves)
    return float(metrics.total), list(map(as_float64, clipped))


def by_optax(leaves: list[jax.Array]) -> tuple[float, Leaves]:
    tx = optax.clip_by_global_norm(1.0)
    clipped = compiled(lambda x: tx.update(x, tx.init(x))[0], leaves)
    return float(optax.global_norm(leaves)), list(map(as_float64, clipped))


def by_jax_privacy(leaves: list[jax.Array]) -> tuple[float, Leaves]:
    from jax_privacy import clipping

    clipped, norm = compiled(lambda x: clipping.clip_pytree(x, 1.0), leaves)
    return float(norm), list(map(as_float64, clipped))


def by_torch(leaves: list[jax.Array]) -> tuple[float, Leaves]:
    import torch

    params = []
    for x in leaves:
        param = torch.zeros(x.shape, dtype=getattr(torch, str(x.dtype)))
        param.grad = torch.tensor(as_float64(x)).to(param.dtype)
        params.append(param)
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
    return float(norm), [param.grad.double().numpy() for param in params]


def as_float64(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


LIBRARIES: dict[str, Callable[[list[jax.Array]], tuple[float, Leaves]]] = {
    "clipfx": by_clipfx,
    "optax": by_optax,
    "torch": by_torch,
    "jax_privacy": by_jax_privacy,
}
TITLES = {"optax": "Optax", "torch": "PyTorch"}


def length(leaves: Leaves) -> float:
    flat = np.concatenate([np.zeros(0), *map(np.ravel, leaves)])
    return float(np.linalg.norm(flat))


def number(x: float) -> str:
    return f"{x:.4g}".replace("e+", "e").replace("inf", "∞").replace("nan", "NaN")


def cell(library: str, name: str) -> str:
    """Norm and length of the result, or what was raised."""
    try:
        norm, clipped = LIBRARIES[library](arrays(name))
    except Exception as error:  # whatever it is, it is the result
        return f"`{type(error).__name__}`"
    return f"{number(norm)}\u00a0→\u00a0{number(length(clipped))}"  # in one line


def table(libraries: list[str]) -> list[list[str]]:
    """Rows of cells, the titles first."""
    rows = [["input", "norm", *(TITLES.get(x, x) for x in libraries)]]
    for name in INPUTS:
        exact = number(length(list(map(as_float64, arrays(name)))))
        rows.append([name, exact, *(cell(library, name) for library in libraries)])
    return rows


def main() -> None:
    installed = [x for x in LIBRARIES if importlib.util.find_spec(x)]
    titles, *rows = table(installed)
    for row in (titles, ["---"] * len(titles), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
