"""Names and parameters of JAX's primitives: all that the engine knows of them.

Where a new JAX changes one of them, tests/per_example/test_primitives.py says which,
and this is the file to change. Differences of supported versions are in `_compat`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

DOT, CONVOLUTION, GATHER = "dot_general", "conv_general_dilated", "gather"
RAGGED_DOT = "ragged_dot_general"
CONVERT = "convert_element_type"
CUSTOM_VJP = "custom_vjp_call"
COND, SCAN = "cond", "scan"
STOP_GRADIENT = "stop_gradient"
# Sums of two arrays; what transposition makes of several uses.
ADD = {"add", "add_any"}
SUB, MUL, DIV = "sub", "mul", "div"
# Programs inside that are walked, and run equation by equation.
REMAT = {"remat2"}
CALLS = {"jit", *REMAT}
# Views: every element of the output is one of the input's.
SAME = {CONVERT, "copy", "name", "optimization_barrier", "pvary", "reshard",
        "sharding_constraint"}  # fmt: skip
RESHAPES = {"broadcast_in_dim", "reshape", "squeeze"}
BROADCAST, CONCATENATE, DYNAMIC_SLICE = (
    "broadcast_in_dim",
    "concatenate",
    "dynamic_slice",
)
REVERSE, SLICE, SPLIT, TRANSPOSE = "rev", "slice", "split", "transpose"
# Views with coefficients: every element is a number times one of the input's, plus one.
MULTIPLY, DIVIDE, NEGATE, SUBTRACT = "mul", "div", "neg", "sub"
PAD, SELECT = "pad", "select_n"
ARITHMETIC = {MULTIPLY, DIVIDE, NEGATE, SUBTRACT, *ADD}
PRODUCTS = {MULTIPLY, DIVIDE, NEGATE}


class Gather(NamedTuple):
    """Of `gather` and `dynamic_slice`.

    Attributes:
      start: Dimensions of the table that ids are of.
      collapsed: Dimensions of the table that a slice does not have.
      batching: Dimensions of the table that are shared with the ids.
      offset: Dimensions of the output that are a slice's.
      sizes: Of a slice.
      clips: Whether ids outside of the table mean its nearest row.
    """

    start: tuple[int, ...]
    collapsed: tuple[int, ...]
    batching: tuple[int, ...]
    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    clips: bool


def gather(eqn: Any) -> Gather:
    """Parameters of a `gather`."""
    dn, p = eqn.params["dimension_numbers"], eqn.params
    return Gather(
        tuple(dn.start_index_map),
        tuple(dn.collapsed_slice_dims),
        tuple(dn.operand_batching_dims),
        tuple(dn.offset_dims),
        tuple(p["slice_sizes"]),
        p["mode"] == jax.lax.GatherScatterMode.CLIP,
    )


def dynamic_slice(eqn: Any) -> Gather:
    """Parameters of a `dynamic_slice`, as of a look-up: it has an index each dimension.

    Where it takes all of one the index does not matter.
    """
    shape, sizes = eqn.invars[0].aval.shape, tuple(eqn.params["slice_sizes"])
    start = tuple(k for k, n in enumerate(shape) if sizes[k] < n)
    return Gather(start, (), (), tuple(range(len(shape))), sizes, True)


def take(eqn: Any, x: Any, ids: Any) -> Any:
    """What a `gather` with ids inside of the table takes of another table."""
    mode = {"mode": jax.lax.GatherScatterMode.CLIP, "fill_value": None}
    return eqn.primitive.bind(x, ids, **{**eqn.params, **mode})


class Convolution(NamedTuple):
    """Of `conv_general_dilated`.

    Attributes:
      lhs: Dimensions of the images: batch, channels, space.
      rhs: Of the kernel: output, input, space.
      out: Of the output: batch, channels, space.
      strides: By dimension of space.
      padding: Pairs, by dimension of space.
      lhs_dilation: By dimension of space.
      rhs_dilation: By dimension of space.
      groups: Of channels.
      batch_groups: Of images.
    """

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    out: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int
    batch_groups: int


def convolution(eqn: Any) -> Convolution:
    """Parameters of a `conv_general_dilated`."""
    dn, p = eqn.params["dimension_numbers"], eqn.params
    return Convolution(
        dn.lhs_spec,
        dn.rhs_spec,
        dn.out_spec,
        p["window_strides"],
        p["padding"],
        p["lhs_dilation"],
        p["rhs_dilation"],
        p["feature_group_count"],
        p["batch_group_count"],
    )


def dot_dimensions(eqn: Any) -> tuple[Any, Any]:
    """Contracted dimensions of both inputs of a `dot_general`, and batch dimensions."""
    return eqn.params["dimension_numbers"]


def ragged_dot(eqn: Any) -> tuple[Any, tuple[int, ...], tuple[int, ...], Any]:
    """Dimensions of a `ragged_dot_general`.

    Contracted and batch dimensions as of a `dot_general`, those that groups of rows
    follow each other along, those that matrices do, and where groups start or how the
    output is to be split over a mesh.
    """
    dn = eqn.params["ragged_dot_dimension_numbers"]
    rows, matrices = dn.lhs_ragged_dimensions, dn.rhs_group_dimensions
    offset = eqn.params["group_offset"] or eqn.params.get("out_sharding")
    return dn.dot_dimension_numbers, tuple(rows), tuple(matrices), offset


def precision(eqn: Any) -> Any:
    """Of products; None where there are none."""
    return eqn.params.get("precision")


def in_dtype_of_inputs(eqn: Any) -> dict[str, Any]:
    """Parameters of the equation for inputs of another dtype."""
    params = dict(eqn.params)
    if "preferred_element_type" in params:
        params["preferred_element_type"] = None
    return params


def inner(eqn: Any) -> Any:
    """The program inside of a call or a scan."""
    return eqn.params["jaxpr"]


def branches(eqn: Any) -> Sequence[Any]:
    """The programs that a `cond` chooses from, by its first input."""
    return eqn.params["branches"]


def holds(eqn: Any, name: str) -> bool:
    """Whether an equation is of this name, or has one such that runs inside of it."""
    if eqn.primitive.name == COND:
        inside = branches(eqn)
    elif eqn.primitive.name in (*CALLS, SCAN):
        inside = [inner(eqn)]
    else:
        return eqn.primitive.name == name
    programs = [getattr(program, "jaxpr", program) for program in inside]
    return any(holds(x, name) for program in programs for x in program.eqns)


def remat_options(eqn: Any) -> dict[str, Any]:
    """Arguments of the `jax.checkpoint` that made a call."""
    return {k: eqn.params[k] for k in ("prevent_cse", "policy")}


def scan_options(eqn: Any) -> dict[str, Any]:
    """Arguments of the `jax.lax.scan` that made a loop."""
    return {k: eqn.params[k] for k in ("length", "reverse", "unroll")}


def turns(eqn: Any) -> int:
    """How often the body of a scan runs."""
    return eqn.params["length"]


def broadcast_dimensions(eqn: Any) -> tuple[int, ...]:
    """Where the input's dimensions are in the output."""
    return eqn.params["broadcast_dimensions"]


def permutation(eqn: Any) -> tuple[int, ...]:
    """The input's dimensions, in the order of the output."""
    return eqn.params["permutation"]


def concatenated(eqn: Any) -> int:
    """The dimension along which inputs are concatenated."""
    return eqn.params["dimension"]


def edges(eqn: Any) -> list[tuple[int, int, int]]:
    """What a padding adds before, after and between, along every dimension."""
    config = eqn.params["padding_config"]
    return [(int(low), int(high), int(inside)) for low, high, inside in config]


def cuts(eqn: Any) -> list[tuple[int, int, int]]:
    """First, end and step of a slice along every dimension."""
    starts, ends = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(starts)
    return list(zip(starts, ends, steps, strict=True))


def pieces(eqn: Any) -> tuple[int, list[int]]:
    """The dimension that is split, and the sizes."""
    return eqn.params["axis"], [int(n) for n in eqn.params["sizes"]]


def num_consts(eqn: Any) -> int:
    """How many inputs of a custom_vjp's call are not its arguments; else 0."""
    return eqn.params["num_consts"] if eqn.primitive.name == CUSTOM_VJP else 0


def owner(eqn: Any) -> Any:
    """Whose derivative an equation has: a primitive, or a custom_vjp's function `bwd`.

    JAX wraps that function, but keeps it. Of a call that `jax.vmap` has changed it is
    another one: then shapes are no longer those that a rule was written for.
    """
    if eqn.primitive.name != CUSTOM_VJP:
        return eqn.primitive
    backward = eqn.params["bwd"]
    return getattr(backward, "f", backward)
