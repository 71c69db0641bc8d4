"""Bounds on the singular values of matrices."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from clipfx import _compat, responses
from clipfx._core import builder, spectra
from clipfx._core.checks import check_choice, check_count, helpful
from clipfx._core.clip_factors import check_nonfinite, factors
from clipfx._core.export import exportable
from clipfx._core.groups import Groups, is_counted
from clipfx._core.leaves import narrow, times, widen, widest
from clipfx._core.norms import Norms
from clipfx._core.paths import (
    by_place,
    leaves_with_path,
    name_of,
    place_names,
    prefix_lookup,
    structure_of,
    words,
)
from clipfx._core.reductions import (
    as_tuple,
    combine,
    device_of_programs,
    is_bound,
    layout_of,
)
from clipfx._core.running_stats import LARGEST
from clipfx._types import GroupSpec, Limit
from clipfx.thresholds import Threshold, as_threshold

_ROUNDS = 2
# Elements of leaves that are stacked to be bounded by one program.
_ALIKE = 2**26
_RESPONSES = {
    "soft": responses.pseudo_huber,
    "hard": responses.hard,
    "rescale": responses.hard,
}


@exportable("clipfx.SpectrumState")
class SpectrumState(NamedTuple):
    """What `clip_spectrum` keeps.

    Attributes:
      rule_state: That of the threshold's rule.
      vectors: By name of the leaf, `[..., m]`: for each of its matrices, whose smaller
        side is m, the singular vector of the largest singular value so far, where the
        next step's search begins.

    Reference: none.
    """

    rule_state: Any
    vectors: dict[str, jax.Array]


class _View(NamedTuple):
    """How a leaf is matrices `[B, m, n]`, m <= n.

    Attributes:
      order: Of its axes: those that count matrices, rows, columns.
      batch: The sizes of the first of these.
      shape: The sizes of all.
      sides: Of a matrix on this device, rows and columns.
      turned: Whether there are more rows than columns.
      least: m, of all devices.
      split: The mesh axes that the sides are split over.
      across: Those that matrices are divided among.
      path: Of the leaf.
    """

    order: tuple[int, ...]
    batch: tuple[int, ...]
    shape: tuple[int, ...]
    sides: tuple[int, int]
    turned: bool
    least: int
    split: spectra.Split
    across: tuple[str, ...]
    path: Any

    @property
    def has_sides(self) -> bool:
        """Whether there are matrices, and not vectors, or nothing at all."""
        few = [n for n in (self.least, *self.shape) if isinstance(n, int) and n < 1]
        return not few and not (isinstance(self.least, int) and self.least == 1)


@helpful
def clip_spectrum(
    max_sv: Limit,
    *,
    response: str = "soft",
    axes: Any = None,
    groups: GroupSpec = "leaf",
    axis_name: Any = None,
    nonfinite: str = "propagate",
    rounds: int | None = None,
    precision: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Bounds the singular values of every matrix of the update.

    .. math:: X = U \operatorname{diag}(s) V^\top \leftarrow
        U \operatorname{diag}(\psi_c(s)) V^\top

    with, by `response`,

    ========= ============================== =========================================
    `soft`    :math:`s / \sqrt{1 + (s/c)^2}` smooth; every singular value is shortened
    `hard`    :math:`\min(s, c)`             the nearest matrix that has none beyond c
    `rescale` :math:`s \min(1, c / s_1)`     the direction is kept; by far the cheapest
    ========= ============================== =========================================

    A scalar, a vector or a matrix with one row is bounded by its norm. In front of the
    optimizer it bounds gradients, behind it steps. A few directions that dominate are
    cut to c, and all others stay, which no factor for the whole matrix does.

    The first two take matrix products alone: 17, 20, 26, 32 at :math:`s_1 / c` of 10,
    100, 1,000, 10,000, three more where many singular values are as large, two in three
    with the larger side in them; `hard` 43 more of the smaller side. There are none
    where even the Frobenius norm is below c (`hard`), or below c / 8192. A singular
    value of c / 10 is right to 1e-5 at :math:`s_1 / c` of 10, to 1e-2 at 10,000, and
    `hard` never exceeds c by more than 3e-5; `precision` says what else there is.

    Args:
      max_sv: :math:`c`: a number >= 0, an array `[G]`, a dict by group, an Optax
        schedule, a `clipfx.thresholds.Threshold`, or a clip of this library, whose rule
        then sees singular values: `clipfx.quantile_clip(0.9)`.
      response: `"soft"`, `"hard"` or `"rescale"`. Static.
      axes: Which axes of a leaf are a matrix's rows and which its columns, two ints or
        tuples of ints; all others count matrices. None decides by rank: of 2 the two,
        of 3 the last two (layers or experts stacked), of more all but the last and the
        last (convolutions). A pair for all leaves, such as
        `optax.contrib.MuonDimensionNumbers`, a dict by path, a tree prefix, or a
        function of a leaf's path, as `jax.tree_util` has it. An attention kernel
        `[D, heads, head_dim]` wants `(0, (1, 2))`, or `(0, 2)` for each head alone;
        `((), 0)` takes a leaf's columns as vectors. Static.
      groups: What shares a threshold, by default a leaf; the norm of a group is its
        largest singular value. See `clipfx.clip_by_norm`. Static.
      axis_name: In `shard_map` and `pmap`, how matrices are split: the `PartitionSpec`
        of every leaf, one for all, a dict by path or a tree prefix of such, `()` where
        every matrix lies whole on one device. Needed there for leaves that are split.
        Matrices split by columns are never gathered, rows are exchanged for columns.
        Under `jit` types tell of Explicit axes; of Auto axes this does, without which
        XLA gathers matrices of split rows in every step. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.
      rounds: Of power iteration for :math:`s_1`, each of two products with a vector,
        from where the last step ended; None takes 2. Static.
      precision: Of matrix products on a TPU, `"highest"` for six passes of bfloat16,
        `"high"` for three, `"default"` for one, which `hard` does not survive. With
        three, singular values of c / 10 are right to 1e-2 at :math:`s_1 / c` = 1,000,
        with one at 100; GPUs may take TF32, in between. None is `"high"`, but for
        `hard` `"highest"`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[G]`, the norm is
      :math:`s_1` as the power iteration finds it, from below. `rescale` bounds what it
      finds: where many singular values are nearly as large, it falls short by a few
      per cent; the other two do not depend on it. Updates `[...]` keep structure,
      shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a bound is concrete and negative or NaN, or does not fit the
        groups; if `axes` does not fit a leaf, or a leaf is split in `shard_map` and
        `axis_name` says nothing of it.

    Example:
      >>> tx = clip_spectrum(3.0, response="hard")
      >>> grads = {"w": jnp.array([[3.0, 1.0], [1.0, 3.0]])}  # 4 and 2
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["w"].round(3)
      Array([[2.5, 0.5],
             [0.5, 2.5]], dtype=float32)

    Differs from the source: the source's iteration of ten steps shrinks small singular
    values, at :math:`s_1 / c = 100` to half; this one takes as many steps as that ratio
    asks for. Vectors are bounded smoothly too, not from c on only.

    Reference: Jiang et al., `Spectral clipping <https://arxiv.org/abs/2603.14315>`_,
    2026; hard and adaptive: `<https://arxiv.org/abs/2605.11838>`_, 2026.
    """
    rule = as_threshold(max_sv)
    check_choice("response", response, tuple(_RESPONSES))
    precision = precision or ("highest" if response == "hard" else "high")
    ways = ("highest", "high") if response == "hard" else ("high", "highest", "default")
    check_choice("precision", precision, ways)
    check_nonfinite(nonfinite)
    rounds = check_count("rounds", rounds or _ROUNDS, 1, "None takes 2")
    axes_of, spec_of = _by_path(axes), _by_path(axis_name)

    def is_scaled(view: _View) -> bool:
        return not view.has_sides or response == "rescale"

    def rows_of(tree: Any) -> list[tuple[str, Any, _View]]:
        """The name of each counted leaf, the leaf, and how it is matrices."""
        named = zip(place_names(by_place(tree)), leaves_with_path(tree), strict=True)
        return [(name, x, _view(path, x, axes_of(path), spec_of(path)))
                for name, (path, x) in named if is_counted(x)]  # fmt: skip

    def on_leaf(
        fun: Callable[..., Any], view: _View, x: Any, *rest: Any, like: bool
    ) -> Any:
        """`fun(view, x, *rest)`, on the parts that types or `axis_name` tell of."""
        x = jnp.asarray(x)
        spec = _compat.splits(x, spec_of(view.path) or ())
        if spec is None:
            return fun(view, x, *rest)
        if any(spec[k] for k in view.order[: len(view.batch)]):
            whole = functools.partial(fun, view)
            return _compat.left_to_xla(whole, x, *rest, like=like)

        def on_part(x: jax.Array, *rest: Any) -> Any:
            own = _view(view.path, x, axes_of(view.path), PartitionSpec(*spec))
            return fun(own, x, *rest)

        return _compat.on_shards(on_part, x, *rest, spec=spec, like=like)

    def init(groups: Groups, params: Any) -> SpectrumState:
        if not groups.names:
            return SpectrumState(rule.init(groups, params), structure_of(params, ()))
        rows = [(name, x, view) for name, x, view in rows_of(params) if view.has_sides]
        vectors = {name: _start(view, jnp.result_type(x)) for name, x, view in rows}
        return SpectrumState(rule.init(groups, params), vectors)

    def largest(view: _View, x: jax.Array, start: Any) -> Any:
        y = _matrices(x, view)
        if start is not None:
            start = start.reshape(y.shape[0], view.least)
        return spectra.largest(y, start, view.split, rounds, precision)

    def measure(
        updates: Any, groups: Groups, params: Any, state: Any
    ) -> tuple[Norms, dict[str, Any]]:
        del params
        found, vectors, rows = [], dict(state.vectors), rows_of(updates)
        for name, x, view in rows:
            if view.has_sides and name not in vectors:
                raise ValueError(
                    f"the state of clip_spectrum must have a vector for {name!r}, got "
                    f"{sorted(vectors)}; give init and update trees that agree there."
                )

            start = vectors[name] if view.has_sides else None
            value, end = on_leaf(largest, view, x, start, like=False)
            found.append(value)
            if end is not None:
                vectors[name] = end.reshape(vectors[name].shape)
        layout = layout_of(
            [jnp.asarray(x) for _, x, _ in rows],
            tuple(i for i in groups.index if i is not None),
            len(groups.names),
            widest(x.dtype for x in found),
            tuple({axis for *_, view in rows for axis in view.across}),
        )
        norm = combine(jnp.maximum, [x.max(initial=0) for x in found], layout)
        facts = {"vectors": vectors, "found": found}
        return Norms(norm, jnp.ones_like(norm)), facts

    def update(norm, state, *, vectors, **extra):
        limit, learned = rule.update(norm, state.rule_state, **extra)
        return limit, SpectrumState(learned, vectors)

    def apply(updates: Any, step: builder.Step) -> tuple[Any, jax.Array]:
        def scaled(y: jax.Array, found: jax.Array, limit: jax.Array) -> jax.Array:
            norms = Norms(found, jnp.ones_like(found))
            for factor in factors(norms, limit, _RESPONSES[response], nonfinite):
                y = times(y, factor[:, None, None])
            return y

        def change(views: list[_View], *rows: Any) -> list[jax.Array]:
            """Leaves that are alike, whose matrices one program bounds."""
            xs, founds, limits, norms = rows
            ys = list(map(_matrices, xs, views))
            limits = [jnp.broadcast_to(limit.astype(found.dtype), found.shape)
                      for limit, found in zip(limits, founds, strict=True)]  # fmt: skip
            if is_scaled(views[0]):
                ends = list(map(scaled, ys, founds, limits))
            else:
                y, limit = jnp.concatenate(ys), jnp.concatenate(limits)
                end = spectra.bounded(y, limit, views[0].split, response, precision)
                end = jnp.where(limit[:, None, None] < LARGEST, end, y)
                ends = jnp.split(end, np.cumsum(list(map(len, ys)))[:-1])
            # No NaN that is not the updates' own, for jax_debug_nans.
            none = jnp.zeros_like if nonfinite == "zero" else lambda norm: norm - norm
            ends = [jnp.where(jnp.isfinite(norm), y, none(norm).astype(y.dtype))
                    for norm, y in zip(norms, ends, strict=True)]  # fmt: skip
            return [narrow(_leaf(y, view), x.dtype)
                    for x, y, view in zip(xs, ends, views, strict=True)]  # fmt: skip

        leaves, treedef = jax.tree.flatten(updates)
        counted = [k for k, i in enumerate(step.groups.index) if i is not None]
        alike, sizes = dict[Any, list[Any]](), dict[Any, Any]()
        rows = zip(counted, rows_of(updates), step.facts["found"], strict=True)
        for k, (_, x, view), found in rows:
            x, i = jnp.asarray(x), step.groups.index[k]
            # Leaves on a mesh may each be split in another way.
            alone = is_scaled(view) or device_of_programs() == "mesh"
            key = (k,) if alone else (view.sides, view.split, x.dtype)
            if not alone:  # not more than some memory
                sizes[key] = sizes.get(key, 0) + x.size
                key = (*key, sizes[key] // _ALIKE)
            row = k, view, x, found, step.threshold[i], step.norm[i]
            alike.setdefault(key, []).append(row)
        for rows in alike.values():
            places, views, *facts = map(list, zip(*rows, strict=True))
            if len(places) == 1:
                one = lambda view, *row: change([view], *([x] for x in row))[0]
                row = [x for (x,) in facts]
                ends = [on_leaf(one, views[0], *row, like=True)]
            else:
                ends = change(views, *facts)
            for k, x in zip(places, ends, strict=True):
                leaves[k] = x
        return treedef.unflatten(leaves), step.factor()

    return builder.by_norm(
        Threshold(init, update),
        _RESPONSES[response],
        groups=groups,
        ord=math.inf,
        nonfinite=nonfinite,
        measure=measure,
        apply=apply,
    )


def _view(path: Any, x: Any, axes: Any, spec: Any) -> _View:
    shape = jnp.shape(x)
    rows, columns = _sides(path, shape, axes)
    apart = _mesh_axes(path, x, spec)
    batch = tuple(k for k in range(len(shape)) if k not in (*rows, *columns))
    order = (*batch, *rows, *columns)
    names = [tuple(name for k in axes for name in apart[k])
             for axes in (rows, columns, batch)]  # fmt: skip
    sides = [math.prod(shape[k] for k in axes) for axes in (rows, columns)]
    whole = [n * jax.lax.psum(1, over) if over else n
             for n, over in zip(sides, names[:2], strict=True)]  # fmt: skip
    known = all(isinstance(n, int) for n in whole)  # or symbolic
    turned = known and whole[0] > whole[1]
    return _View(
        order,
        tuple(shape[k] for k in batch),
        tuple(shape[k] for k in order),
        (sides[0], sides[1]),
        turned,
        whole[turned],
        spectra.Split(names[turned], names[not turned]),
        names[2],
        path,
    )


def _sides(
    path: Any, shape: tuple[int, ...], axes: Any
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes that are rows, and those that are columns."""
    rank = len(shape)
    if axes is None:
        if rank < 2:
            return (), tuple(range(rank))
        return ((rank - 2,) if rank == 3 else tuple(range(rank - 1))), (rank - 1,)
    advice = "a pair such as (0, 1) or ((0, 1, 2), 3)"
    try:
        rows, columns = axes
        sides = [(x,) if isinstance(x, int) else tuple(x) for x in (rows, columns)]
        sides = [tuple(range(rank)[k] for k in side) for side in sides]
    except (TypeError, ValueError, IndexError):
        sides = None
    if sides is None or len({*sides[0], *sides[1]}) < len(sides[0]) + len(sides[1]):
        raise ValueError(
            f"axes must be two different axes of a leaf, or tuples, got {axes!r}"
            f" for shape {shape} at {name_of(words(path))!r}; pass {advice}."
        )
    return sides[0], sides[1]


def _mesh_axes(path: Any, x: Any, spec: Any) -> list[tuple[str, ...]]:
    """Over which mesh axes each axis of a leaf is split."""
    split = _compat.varying_axes(x) if isinstance(x, jax.Array) else frozenset[str]()
    if spec is None and split:
        raise ValueError(
            f"axis_name must say how the leaf at {name_of(words(path))!r} is split "
            f"over {sorted(split)}, got nothing; pass its PartitionSpec, or () if "
            "every matrix lies whole on one device."
        )
    if spec is not None and not isinstance(spec, (tuple, PartitionSpec)):
        raise TypeError(
            f"axis_name must be a PartitionSpec or (), got {spec!r}; clip_spectrum has "
            "to know which axis of a leaf a mesh axis splits."
        )
    # Outside of shard_map, as `init` may be, arrays are whole.
    entries = [tuple(name for name in as_tuple(names) if is_bound(name))
               for names in (spec or ())]  # fmt: skip
    if len(entries) > jnp.ndim(x):
        raise ValueError(
            f"axis_name must fit the leaf at {name_of(words(path))!r}, got {spec!r} "
            f"for shape {jnp.shape(x)}; give one entry for each of its axes."
        )
    return entries + [()] * (jnp.ndim(x) - len(entries))


def _by_path(tree: Any) -> Any:
    """From a path to the entry for it, which a function may make."""
    find = prefix_lookup(tree, lambda node: not isinstance(node, Mapping))

    def entry(path: Any) -> Any:
        found = find(path)
        return found(path) if callable(found) else found

    return entry


def _matrices(x: jax.Array, view: _View) -> jax.Array:
    y = (
        widen(jnp.asarray(x))
        .transpose(view.order)
        .reshape(math.prod(view.batch), *view.sides)
    )
    return y.swapaxes(1, 2) if view.turned else y


def _leaf(y: jax.Array, view: _View) -> jax.Array:
    y = y.swapaxes(1, 2) if view.turned else y
    return y.reshape(view.shape).transpose(np.argsort(view.order))


def _start(view: _View, dtype: Any) -> jax.Array:
    """Vectors that the rows of no model are made to be orthogonal to."""
    wide = widen(jnp.zeros([], dtype)).dtype
    vector = jnp.cos(jnp.square(jnp.arange(view.least, dtype=jnp.float32)))
    vector /= jnp.linalg.norm(vector)
    return jnp.broadcast_to(vector.astype(wide), (*view.batch, view.least))
