"""Training of the decoder on a mesh: the state, its sharding, and a step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import clipfx
from examples import _run
from examples._clippers import CLIPPERS
from examples._decoder import Decoder, spec_of


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is, each a flag of the same name; a resumed run must have the same."""

    width: int = _run.flag(64, "Model width.", least=1)
    layers: int = _run.flag(2, "Transformer layers.", least=1)
    heads: int = _run.flag(4, "Attention heads.", least=1)
    length: int = _run.flag(64, "Sequence length, in bytes.", least=1)
    batch: int = _run.flag(32, "Global batch size, in sequences.", least=1)
    accumulate: int = _run.flag(1, "Gradient accumulation steps.", least=1)
    dropout: float = _run.flag(0.1, "Dropout rate.", least=0, most=0.9)
    dtype: str = _run.flag("bfloat16", "Compute dtype.", among=("bfloat16", "float32"))
    learning_rate: float = _run.flag(2e-3, "Peak learning rate of AdamW.", above=0)
    warmup: int = _run.flag(20, "Warm-up steps.", least=0)
    seed: int = _run.flag(0, "Random seed of weights, batches, dropout.", least=0)


class TrainState(NamedTuple):
    """All that the next step needs, or as many shapes or shardings.

    Attributes:
      step: int32, steps done.
      key: uint32 `[2]`, of all dropout from here on.
      params: Float32, nested dicts.
      opt_state: Of clipper and optimizer.
    """

    step: Any
    key: Any
    params: Any
    opt_state: Any


class Optimizer(NamedTuple):
    """Marks what of the state is not the clipper's."""

    adamw: Any


def make_transform(
    settings: Settings, clip: str, max_norm: float
) -> optax.GradientTransformationExtraArgs:
    """The clipper, then AdamW."""
    rate = optax.warmup_constant_schedule(0.0, settings.learning_rate, settings.warmup)
    adamw = optax.adamw(rate, b2=0.95)

    def update(updates, state, params=None):
        updates, after = adamw.update(updates, state.adamw, params)
        return updates, Optimizer(after)

    marked = optax.GradientTransformation(
        lambda params: Optimizer(adamw.init(params)), update
    )
    clipped = CLIPPERS[clip](max_norm, settings.learning_rate, marked)
    return optax.with_extra_args_support(clipped)


def make_model(settings: Settings, **given: Any) -> Callable[[nnx.Rngs], Decoder]:
    """The decoder of some settings, but for its random numbers."""
    names = ("width", "layers", "heads", "length", "dropout")
    same = {name: getattr(settings, name) for name in names}
    return lambda rngs: Decoder(
        **same, dtype=jnp.dtype(settings.dtype), rngs=rngs, **given
    )


def make_init(
    settings: Settings, tx: optax.GradientTransformation
) -> tuple[nnx.GraphDef, Callable[[], TrainState]]:
    """The model without its parameters, and a function that makes the first state."""
    model = make_model(settings)

    def init() -> TrainState:
        weights, dropout = jax.random.split(jax.random.key(settings.seed))
        params = nnx.to_pure_dict(nnx.state(model(nnx.Rngs(weights)), nnx.Param))
        key = jax.random.key_data(dropout)
        return TrainState(jnp.zeros([], jnp.int32), key, params, tx.init(params))

    graph = nnx.graphdef(nnx.eval_shape(lambda: model(nnx.Rngs(0))))
    return graph, init


def places_of(params: Any, mesh: Mesh) -> Any:
    """Where parameters lie, by their layer."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, spec_of(path)), params
    )


def shardings_of(state: Any, tx: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Parameters by their layer, what belongs to one like it, all else everywhere.

    Of any NamedTuple with `params`, and the state of `tx` as `opt_state`.
    """
    everywhere = NamedSharding(mesh, P())
    specs = places_of(state.params, mesh)
    around = optax.tree_map_params(
        tx.init,
        lambda _, spec: spec,
        state.opt_state,
        specs,
        transform_non_params=lambda _: everywhere,
    )
    same = jax.tree.map(lambda _: everywhere, state)
    return same._replace(params=specs, opt_state=around)


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes that know where they lie; of shardings a tree prefix is enough."""

    def place(sharding, tree):
        put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.tree.map(put, tree)

    return jax.tree.map(place, shardings, shapes)


def by_name(tree: Any) -> dict[str, Any]:
    """Every leaf by its path, with dots."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path): leaf for path, leaf in leaves}


def _kind(name: str) -> str:
    """Whether a leaf of a state is the model's or the clipper's."""
    words = name.split(".")
    clip = words[0] == "opt_state" and "adamw" not in words
    return "clip" if clip else "model"


def items_of(state: TrainState) -> dict[str, dict[str, Any]]:
    """What to save: the leaves of a state by name, those of the clipper apart."""
    items: dict[str, dict[str, Any]] = {"model": {}, "clip": {"step": state.step}}
    for name, leaf in by_name(state).items():
        items[_kind(name)][name] = leaf
    return items


def from_items(like: TrainState, items: dict[str, dict[str, Any]]) -> TrainState:
    """The other way round; an item that is missing is taken from `like`."""
    leaves = [items.get(_kind(k), {}).get(k, x) for k, x in by_name(like).items()]
    return jax.tree.structure(like).unflatten(leaves)


def make_step(
    settings: Settings, graph: nnx.GraphDef, tx: optax.GradientTransformationExtraArgs
) -> tuple[Callable, Callable]:
    """The loss of parameters on passages `[batch, length + 1]`, and a step on them.

    The step goes from a `TrainState` to the next and a dict of scalars to log.
    Parameters become `settings.dtype` within the loss, whose gradient, and the clip of
    it, is float32 therefore.
    """
    narrow = lambda params: jax.tree.map(lambda x: x.astype(settings.dtype), params)

    def loss_of(params, passages, key=None):
        model = nnx.merge(graph, nnx.State(narrow(params)))
        rngs = None if key is None else nnx.Rngs(dropout=key)
        logits = model(passages[:, :-1], rngs)
        ids = passages[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()

    def part(params, passages, key):
        return jax.value_and_grad(loss_of)(params, passages, key)

    def accumulated(params, passages, key):
        # Each part takes from the whole batch, so that it is split as that is; sums
        # begin with zeros that lie where parameters do. Newer versions of Optax than
        # the oldest that this runs on have `optax.microbatch` for it.
        parts = settings.accumulate
        cut = passages.reshape(-1, parts, passages.shape[1]).swapaxes(0, 1)
        add = lambda x, y: x + y / parts

        def step(total, each):
            return jax.tree.map(add, total, part(params, *each)), None

        zeros = jnp.zeros([]), jax.tree.map(lambda x: 0 * x, params)
        return jax.lax.scan(step, zeros, (cut, jax.random.split(key, parts)))[0]

    def step(state, passages):
        key, dropout = jax.random.split(jax.random.wrap_key_data(state.key))
        gradient = part if settings.accumulate == 1 else accumulated
        loss, grads = gradient(state.params, passages, dropout)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        seen = {"loss": loss, "norm": clipfx.global_norm(grads)}
        seen |= clipfx.metrics.read(opt_state)
        key = jax.random.key_data(key)
        return TrainState(state.step + 1, key, params, opt_state), seen

    return loss_of, step


class Programs(NamedTuple):
    """What a run on a mesh calls, compiled once for each clipper.

    Attributes:
      start: Makes the first state.
      step: From state (donated) and passages `[batch, length + 1]` to the next state
        and a dict of scalars.
      loss: Of parameters on passages.
      shapes: Of the state, each leaf knowing where it lies.
    """

    start: Callable[[], TrainState]
    step: Callable[[TrainState, jax.Array], tuple[TrainState, dict[str, jax.Array]]]
    loss: Callable[[Any, jax.Array], jax.Array]
    shapes: TrainState


@functools.cache
def programs(settings: Settings, clip: str, max_norm: float, mesh: Mesh) -> Programs:
    """Puts the pieces on a mesh."""
    tx = make_transform(settings, clip, max_norm)
    graph, init = make_init(settings, tx)
    loss, step = make_step(settings, graph, tx)
    shapes = jax.eval_shape(init)
    places = shardings_of(shapes, tx, mesh)
    everywhere = NamedSharding(mesh, P())
    return Programs(
        start=jax.jit(init, out_shardings=places),
        step=jax.jit(step, donate_argnums=0, out_shardings=(places, everywhere)),
        loss=jax.jit(loss, out_shardings=everywhere),
        shapes=placed(shapes, places),
    )
