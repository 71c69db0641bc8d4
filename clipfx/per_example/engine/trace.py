"""Arguments of a loss, with and without an axis of examples, and its program."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipfx import _compat
from clipfx._core.checks import check_keywords
from clipfx._core.groups import Groups, is_counted
from clipfx._core.paths import leaves_with_path, name_of, prefix_lookup, words
from clipfx.per_example.engine.bookkeeping import Program
from clipfx.per_example.engine.plan import make_plan


class Call(NamedTuple):
    """One call of a loss, flat.

    Attributes:
      inputs: Arrays, those that are mapped `[B, ...]`.
      program: Of one example.
      size: B.
      params: The tree of parameters, as `jax.grad` sees it.
      aux: Structure of the loss's second output.
      axes: Per parameter the mesh axes of `jax.shard_map` that only the batch varies
        over: what sums run over.
      split: Per parameter those that only it varies over: what norms run over.
      specs: Per parameter how it was split on a mesh with Explicit axes.
    """

    inputs: list[Any]
    program: Program
    size: int
    params: Any
    aux: Any
    axes: list[frozenset[str]]
    split: list[frozenset[str]]
    specs: list[tuple | None]


class Signature(NamedTuple):
    """Which arguments are what.

    Attributes:
      fun: The loss of one example.
      argnums: Parameters, an int or a tuple.
      batch_argnums: Arguments with an axis of examples, an int or a tuple.
      has_aux: Whether the loss returns a second output.
      norm_method: How norms are found, a tree prefix.
    """

    fun: Callable
    argnums: int | tuple[int, ...]
    batch_argnums: int | tuple[int, ...]
    has_aux: bool
    norm_method: Any = "auto"


def check_signature(signature: Signature, *keywords: str) -> None:
    """Checks all but the numbers' ranges, which need a call.

    Args:
      signature: What the user said.
      keywords: Arguments of the function that is made, which the loss cannot have.
    """
    if not callable(signature.fun):
        raise TypeError(
            f"fun must be the loss of one example, got {signature.fun!r}; pass a "
            "function of parameters and one example."
        )
    for name in ("argnums", "batch_argnums"):
        given = getattr(signature, name)
        positions = _several(given)
        whole = lambda k: isinstance(k, int | np.integer) and not isinstance(k, bool)
        if not positions or not all(map(whole, positions)):
            raise TypeError(
                f"{name} must be an int or a tuple of ints, got {given!r}; it says "
                "which positional arguments are meant."
            )
    methods = jax.tree.leaves(signature.norm_method)
    if not methods or not all(isinstance(x, str) and x in FORCE for x in methods):
        raise ValueError(
            'norm_method must be "auto", "ghost", "instantiate" or a tree prefix of '
            f"these, got {signature.norm_method!r}; per_example.explain shows costs."
        )
    shared = sorted({*keywords} & {*_parameters_of(signature.fun)})
    if shared:
        raise ValueError(
            f"fun must not have an argument named {shared[0]}, which is one of the "
            f"function that is made of it, got {signature.fun!r}; rename it."
        )


# What `norm_method` means to the plan.
FORCE = {"auto": None, "ghost": "factored", "instantiate": "instantiated"}


def forced(norm_method: Any, params: Any) -> Any:
    """What the plan is to do with each leaf, None where it may choose for all."""
    if norm_method == "auto":
        return None
    find = prefix_lookup(norm_method)
    leaves = [(path, find(path)) for path, _ in leaves_with_path(params)]
    lost = [name_of(words(path)) for path, method in leaves if method is None]
    if lost:
        raise ValueError(
            f"norm_method must cover every leaf, got nothing for {lost[0]!r}; a tree "
            'prefix may end in "auto".'
        )
    return tuple(FORCE[method] for _, method in leaves)


def _parameters_of(fun: Callable) -> dict[str, inspect.Parameter]:
    """Those of the loss; none where Python cannot tell."""
    try:
        return dict(inspect.signature(fun).parameters)
    except (TypeError, ValueError):
        return {}


def _several(given: Any) -> tuple:
    return given if isinstance(given, tuple) else (given,)


def numbers(signature: Signature, name: str, count: int) -> tuple[int, ...]:
    """The positions of `argnums` or `batch_argnums` in a call, from 0."""
    given = getattr(signature, name)
    if not all(-count <= k < count for k in _several(given)):
        raise ValueError(
            f"{name} must be positions of arguments, got {given!r} for a call with "
            f"{count}; pass parameters and batches by position."
        )
    return tuple(k % count for k in _several(given))


def prepare(
    signature: Signature,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    norms: bool = True,
    ord: int = 2,
    force: Any = None,
    large: bool = False,
    members: Groups | None = None,
) -> Call:
    """Traces the loss of one example and decides on norm methods.

    Args:
      signature: The loss and its arguments.
      args: With a batch in place of an example.
      kwargs: Passed on as they are.
      norms: Whether norms will be asked for.
      ord: p of the norm, 1 or 2.
      force: See `make_plan`.
      large: Whether to decide as for a batch that no cache holds.
      members: Of the leaves, for slices with groups of their own; None for none.
    """
    argnums = numbers(signature, "argnums", len(args))
    batch_argnums = numbers(signature, "batch_argnums", len(args))
    if set(argnums) & set(batch_argnums):
        raise ValueError(
            f"batch_argnums must differ from argnums, got {signature.batch_argnums!r} "
            f"and {signature.argnums!r}; parameters have no axis of examples."
        )
    params = args[argnums[0]] if isinstance(signature.argnums, int) else tuple(
        args[k] for k in argnums)  # fmt: skip
    size = batch_size(args, batch_argnums)
    _check_own_keywords(signature.fun, kwargs)
    kinds = []
    for k, arg in enumerate(args):
        kind = "param" if k in argnums else "batch" if k in batch_argnums else ""
        kinds += [kind] * len(jax.tree.leaves(arg))
    leaves, treedef = jax.tree.flatten((tuple(args), kwargs))
    kinds += [""] * (len(leaves) - len(kinds))
    # Numbers of Python's that are no parameters stay what they are, as in `jax.grad`.
    arrays = jax.Array | np.ndarray
    where = [k for k, x in enumerate(leaves) if kinds[k] or isinstance(x, arrays)]
    inputs = [jnp.asarray(leaves[k]) for k in where]
    # In the order of `params`, which a tuple of argnums may change.
    starts = np.cumsum([0, *(len(jax.tree.leaves(arg)) for arg in args)])
    order = [j for k in argnums for j in range(starts[k], starts[k + 1])]
    position = {k: number for number, k in enumerate(where)}
    mapped = tuple(kinds[k] == "batch" for k in where)
    param_inputs = [position[k] for k in order]
    batch = frozenset().union(
        *(_compat.varying_axes(x) for x, m in zip(inputs, mapped, strict=True) if m)
    )
    param_axes = [_compat.varying_axes(inputs[k]) for k in param_inputs]
    # On Explicit meshes vmap wants parameters whole along what the batch is split over.
    specs = [_compat.explicit_spec(inputs[k]) for k in param_inputs]
    over: set[str] = set()
    for x, m in zip(inputs, mapped, strict=True):
        spec = _compat.explicit_spec(x) if m else None
        if spec and spec[0]:
            over |= {spec[0]} if isinstance(spec[0], str) else set(spec[0])
    for k, spec in zip(param_inputs, specs, strict=True):
        if spec is not None:
            inputs[k] = _compat.reshard(inputs[k], tuple(_less(d, over) for d in spec))
    # Or shard_map would add up the gradients of different examples.
    for k in param_inputs:
        inputs[k] = _compat.vary(inputs[k], batch)
    program: dict[str, Any] = {}
    advice = _advice(args, {*argnums, *batch_argnums}, batch_argnums, size)

    def flat(*values):
        filled = list(leaves)
        for k, value in zip(where, values, strict=True):
            filled[k] = value
        args, kwargs = treedef.unflatten(filled)
        out = _call(signature.fun, args, kwargs, advice)
        value, aux = _outputs(out, signature.has_aux, advice)
        flat_aux, program["aux"] = jax.tree.flatten(aux)
        return [value, *map(jnp.asarray, flat_aux)]

    def capture(*values):
        program["jaxpr"] = jax.make_jaxpr(flat)(*values)
        return jnp.zeros(())

    axes = tuple(0 if m else None for m in mapped)
    # Mapped only for the types of an example, which know about meshes.
    like = [x if size or not m else jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
            for x, m in zip(inputs, mapped, strict=True)]  # fmt: skip
    jax.eval_shape(jax.vmap(capture, axes, out_axes=None), *like)
    if force is None:
        force = forced(signature.norm_method, params)
    count = 2**30 if large else size
    index = () if members is None else members.index
    plan = make_plan(
        program["jaxpr"], param_inputs, mapped, size=count, norms=norms, ord=ord,
        force=force, stacked=[isinstance(i, tuple) for i in index] or None,
    )  # fmt: skip
    built = Program(plan, tuple(param_inputs), mapped)
    axes, split = [batch - x for x in param_axes], [x - batch for x in param_axes]
    return Call(inputs, built, size, params, program["aux"], axes, split, specs)


def _less(names: Any, over: set[str]) -> Any:
    """Mesh axes of one dimension without some."""
    names = (names,) if isinstance(names, str) else tuple(names or ())
    left = tuple(n for n in names if n not in over)
    return left[0] if len(left) == 1 else left or None


def _is_array(x: Any) -> bool:
    return isinstance(
        x, jax.Array | np.ndarray | np.generic | bool | int | float | complex
    )


def check_params(params: Any) -> None:
    """Checks that parameters are such, and floating."""
    boxes = jax.tree_util.tree_flatten_with_path(params, is_leaf=_compat.is_boxed)[0]
    name_of = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    statistics = [name_of(path) for path, _ in boxes if "batch_stats" in name_of(path)]
    kinds = [(_compat.other_variable(box), name_of(path)) for path, box in boxes]
    kinds += [("batch_stats", name) for name in statistics]
    for kind, name in kinds:
        if kind is not None:
            raise TypeError(
                f"the parameters (argnums) must be parameters alone, got {kind} at "
                f"{name!r}; split it off, as in nnx.split(model, nnx.Param, ...), pass "
                "it as another argument, and instead of batch normalization, which "
                "mixes examples, use group or layer normalization."
            )
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if not _is_array(leaf) or not is_counted(jnp.asarray(leaf)):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"the parameters (argnums) must be floating arrays, got {kind} at "
                f"{name!r}; take other leaves out, for example with "
                "equinox.partition or nnx.split, and close over them."
            )


def batch_size(args: Sequence[Any], numbers: Sequence[int]) -> int:
    """The number of examples, the same for all leaves of all batches."""
    lengths = {}
    for k in numbers:
        for path, leaf in jax.tree_util.tree_flatten_with_path(args[k])[0]:
            name = f"argument {k}" + jax.tree_util.keystr(path)
            if not np.ndim(leaf):
                raise ValueError(
                    "the batch (batch_argnums) must have an axis of examples first, "
                    f"got a scalar at {name}; make arrays of lists of numbers with "
                    "jnp.asarray, and pass what all examples share as another argument."
                )
            lengths[name] = np.shape(leaf)[0]
    if not lengths:
        raise ValueError(
            "the batch (batch_argnums) must hold an array, got none; its first axis is "
            "that of examples."
        )
    if len(set(lengths.values())) > 1:
        sizes = ", ".join(f"{n} at {name}" for name, n in lengths.items())
        raise ValueError(
            f"the batch (batch_argnums) must have one size, got {sizes}; the first "
            "axis of every leaf is that of examples."
        )
    return next(iter(lengths.values()))


def params_of(signature: Signature, args: Any) -> Any:
    """The parameters, as `jax.grad` sees them, checked."""
    params = tuple(args[k] for k in numbers(signature, "argnums", len(args)))
    check_params(params)
    return params[0] if isinstance(signature.argnums, int) else params


def size_of(signature: Signature, args: Any) -> int:
    """B, checked."""
    return batch_size(args, numbers(signature, "batch_argnums", len(args)))


def mask_of(where: Any, size: int) -> jax.Array | None:
    """Checks which examples count."""
    if where is None:
        return None
    where = jnp.asarray(where)
    if where.shape != (size,) or where.dtype != jnp.bool_:
        raise ValueError(
            f"where must be bool[{size}], one entry for each example, got "
            f"{where.dtype}{list(where.shape)}; False marks padding."
        )
    return where


def check_ord(ord: Any) -> int:
    """Checks p of the norm; None means 2."""
    if ord not in (None, 1, 2):
        raise ValueError(
            f"ord must be 2 or 1, got {ord!r}; the 1-norm is for Laplace noise."
        )
    return 2 if ord is None else int(ord)


def _check_own_keywords(fun: Callable, kwargs: dict[str, Any]) -> None:
    """Checks that the loss has the keyword arguments that it is to be given."""
    parameters = _parameters_of(fun)
    if parameters and not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        check_keywords("fun", kwargs, [*parameters, "where"])


def _advice(args: Sequence[Any], used: set, batches: Sequence[int], size: int) -> str:
    """What may have gone wrong if a loss of one example does not work."""
    sized = lambda x: all(np.shape(leaf)[:1] == (size,) for leaf in jax.tree.leaves(x))
    more = [k for k, x in enumerate(args)
            if k not in used and jax.tree.leaves(x) and sized(x)]  # fmt: skip
    if more:
        return f"did you mean batch_argnums={tuple(sorted({*batches, *more}))}?"
    return "write it for arguments without the axis of examples."


def _call(fun: Callable, args: Any, kwargs: Any, advice: str) -> Any:
    """Calls the loss with one example, and says so if that does not work."""
    batch_norm = ValueError(
        "fun must be the loss of one example, got batch normalization, which takes "
        "means of a batch and leaves no gradient of one example; use group or layer "
        "normalization, or use_running_average=True."
    )
    try:
        with _compat.refusing_batch_norm(batch_norm):
            return fun(*args, **kwargs)
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise ValueError(
            f"fun must be the loss of one example, which has no axis of a batch, got "
            f"{error}; for batch normalization use group or layer normalization, and "
            "take means over devices outside of fun."
        ) from error
    except (IndexError, TypeError, ValueError) as error:
        if error is batch_norm or type(error).__module__ != "builtins":
            raise
        first = (str(error).splitlines() or [""])[0].rstrip(".")
        raise type(error)(
            f"fun must be the loss of one example, which failed ({first}); {advice}"
        ) from error


def _outputs(out: Any, has_aux: bool, advice: str) -> tuple[Any, Any]:
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(
            f"fun must return (loss, aux) with has_aux=True, got {type(out).__name__}; "
            "return a pair."
        )
    value, aux = out if has_aux else (out, ())
    if not hasattr(value, "shape") and not isinstance(value, float):
        raise TypeError(
            f"fun must return the loss of one example, got {type(value).__name__}; "
            "with further outputs pass has_aux=True."
        )
    value = jnp.asarray(value)
    if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            "fun must return the loss of one example, a floating scalar, got "
            f"{value.dtype}{list(value.shape)}; {advice}"
        )
    return value, aux
