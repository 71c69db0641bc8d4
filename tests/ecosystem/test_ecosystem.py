"""clipfx inside Optax, Flax, Equinox, Orbax and the transforms of JAX."""

import math

import chex
import equinox as eqx
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax import export
from tiers import in_tiers
from trees import assert_close, assert_same

import clipfx

PARAMS = {
    "dec": {"b": jnp.array([3.0]), "w": jnp.array([[4.0, 0.0]])},
    "enc": {"w": jnp.array([0.0, 12.0])},
}
GRADS = PARAMS  # norms: dec 5, enc 12, all 13
LABELS = {"dec": {"b": "bias", "w": "dec"}, "enc": "enc"}


def scaled(tree, factor):
    return jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), tree)


def steps_of(state):
    return int(clipfx.metrics.read(state)["clip0/steps/global"])


# ------------------------------------------------------------------------- Optax


def test_chain_passes_clipped_updates_on_and_keeps_metrics():
    tx = optax.chain(clipfx.clip_by_global_norm(1.3), optax.sgd(1.0))
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert_close(updates, scaled(GRADS, -0.1))
    assert math.isclose(clipfx.metrics.read(state)["clip0/norm/global"], 13.0)


def test_clips_of_a_named_chain_have_its_names():
    tx = optax.named_chain(
        ("layers", clipfx.clip_per_layer(6.0)),
        ("all", clipfx.clip_by_global_norm(1.0)),
    )
    updates, state = tx.update(GRADS, tx.init(PARAMS))
    shorter = {"dec": GRADS["dec"], "enc": scaled(GRADS["enc"], 0.5)}
    assert_close(updates, scaled(shorter, 1 / math.sqrt(61)))
    read = clipfx.metrics.read(state)
    assert math.isclose(read["layers/norm/enc"], 12.0)
    assert math.isclose(read["all/norm/global"], math.sqrt(61), rel_tol=1e-6)


def test_masked_leaves_are_neither_counted_nor_changed():
    mask = {"dec": {"b": False, "w": True}, "enc": {"w": True}}
    tx = optax.masked(clipfx.clip_by_norm(2.0, groups=LABELS), mask)
    updates, state = tx.update(GRADS, tx.init(PARAMS))
    assert_same(updates["dec"]["b"], GRADS["dec"]["b"])
    assert_close(updates["dec"]["w"], scaled(GRADS["dec"]["w"], 0.5))
    assert_close(updates["enc"], scaled(GRADS["enc"], 1 / 6))
    norms = {k: v for k, v in clipfx.metrics.read(state).items() if "/norm/" in k}
    assert norms == {"clip0/norm/dec": 4.0, "clip0/norm/enc": 12.0}


def test_each_clip_of_a_partition_sees_its_own_leaves():
    clips = {
        "heavy": clipfx.clip_by_global_norm(1.0),
        "light": clipfx.clip_per_layer(2.5),
    }
    tx = optax.partition(clips, {"dec": "light", "enc": "heavy"})
    updates, state = tx.update(GRADS, tx.init(PARAMS))
    assert_close(updates["dec"], scaled(GRADS["dec"], 0.5))
    assert_close(updates["enc"], scaled(GRADS["enc"], 1 / 12))
    read = clipfx.metrics.read(state)
    assert read["heavy/norm/global"] == 12.0
    assert read["light/norm/dec"] == 5.0
    assert "light/norm/enc" not in read


def test_clip_outside_of_a_partition_counts_every_leaf():
    inner = optax.partition(
        {"train": optax.sgd(1.0), "freeze": optax.set_to_zero()},
        {"dec": "train", "enc": "freeze"},
    )
    tx = optax.chain(clipfx.clip_by_global_norm(1.0), inner)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert_close(updates["dec"], scaled(GRADS["dec"], -1 / 13))
    assert_same(updates["enc"], scaled(GRADS["enc"], 0.0))


def test_inside_multi_steps_the_mean_is_clipped_once():
    clip = clipfx.clip_by_global_norm(1.0)
    tx = optax.MultiSteps(clip, every_k_schedule=2).gradient_transformation()
    state = tx.init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        held, state = tx.update(GRADS, state, PARAMS)
        assert_same(held, scaled(GRADS, 0.0))
        assert steps_of(state) == 0
        # A mean of twice the gradient, which no clip of single steps would give.
        updates, state = tx.update(scaled(GRADS, 3.0), state, PARAMS)
    assert_close(updates, scaled(GRADS, 1 / 13))
    assert steps_of(state) == 1
    assert math.isclose(
        clipfx.metrics.read(state)["clip0/norm/global"], 26, rel_tol=1e-6
    )


def test_apply_if_finite_skips_a_nan_step_as_if_it_had_not_happened():
    fall = optax.linear_schedule(2.0, 1.0, transition_steps=2)
    inner = optax.chain(clipfx.clip_by_global_norm(fall), optax.trace(0.5))
    tx = optax.apply_if_finite(inner, max_consecutive_errors=5)
    _, before = tx.update(GRADS, tx.init(PARAMS))
    bad = {**GRADS, "enc": {"w": jnp.array([jnp.nan, 1.0])}}
    updates, after = tx.update(bad, before)
    assert_same(updates, scaled(GRADS, 0.0))
    assert_same(after.inner_state, before.inner_state)
    assert int(after.total_notfinite) == 1
    assert_same(tx.update(GRADS, after)[0], tx.update(GRADS, before)[0])


def test_finite_gradient_whose_square_overflows_passes_apply_if_finite():
    tx = optax.apply_if_finite(clipfx.clip_by_global_norm(1.0), 5)
    huge = scaled(GRADS, 1e20)
    updates, state = tx.update(huge, tx.init(PARAMS))
    assert_close(updates, scaled(GRADS, 1 / 13))
    assert int(state.total_notfinite) == 0
    assert clipfx.metrics.read(state)["clip0/nonfinite/global"] == 0


def test_tree_get_finds_the_norm():
    tx = optax.chain(clipfx.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    _, state = tx.update(GRADS, tx.init(PARAMS))
    np.testing.assert_allclose(optax.tree.get(state, "norm"), [13.0], rtol=1e-6)


def test_unknown_extra_args_are_ignored():
    tx = optax.chain(
        clipfx.clip_by_global_norm(1.0),
        clipfx.clip_by_value(0.5),
        clipfx.clip_by_block_rms(1.0),
        clipfx.normalize_by_norm(),
    )
    state = tx.init(PARAMS)
    extra = {"value": jnp.array(1.0), "grad": GRADS, "anything": object()}
    assert_same(
        tx.update(GRADS, state, PARAMS, **extra), tx.update(GRADS, state, PARAMS)
    )


# ------------------------------------------------------------- inject_hyperparams

HYPERPARAMETERS = {
    clipfx.clip_by_global_norm: "max_norm",
    clipfx.clip_per_layer: "max_norm",
    clipfx.clip_by_block_rms: "max_rms",
    clipfx.normalize_by_norm: "target_norm",
    clipfx.clip_by_value: "max_abs",
}
methods = pytest.mark.parametrize(
    "method", HYPERPARAMETERS, ids=lambda method: method.__name__
)
CASTS = {
    "float32": {"dec": {"b": "float32", "w": "float32"}, "enc": {"w": "float32"}},
    "bfloat16": {"dec": {"b": "bfloat16", "w": "bfloat16"}, "enc": {"w": "bfloat16"}},
    "mixed": {"dec": {"b": "bfloat16", "w": "float32"}, "enc": {"w": "bfloat16"}},
}
dtypes = pytest.mark.parametrize("cast", in_tiers(CASTS, {"mixed"}))


def three_steps(tx, grads):
    update = jax.jit(tx.update)
    state, seen = tx.init(grads), []
    for factor in (1.0, 0.01, 3.0):
        updates, state = update(scaled(grads, factor), state)
        seen.append(updates)
    return seen


@methods
@dtypes
def test_injected_number_equals_the_plain_method(method, cast):
    grads = jax.tree.map(lambda x, dtype: x.astype(dtype), GRADS, cast)
    # Optax casts a hyperparameter to the dtype of the leaves: 0.5 survives that.
    tx = optax.inject_hyperparams(method)(**{HYPERPARAMETERS[method]: 0.5})
    with jax.numpy_dtype_promotion("standard"):  # Optax promotes, to find the dtype
        injected = three_steps(tx, grads)
    assert_same(injected, three_steps(method(0.5), grads))
    assert not np.array_equal(injected[0]["enc"]["w"], grads["enc"]["w"])


@methods
def test_injected_schedule_equals_the_plain_method_with_that_threshold(method):
    fall = lambda count: 2.0 ** (1 - jnp.asarray(count, jnp.float32))
    injected = optax.inject_hyperparams(method)(**{HYPERPARAMETERS[method]: fall})
    update, state = jax.jit(injected.update), injected.init(PARAMS)
    for limit in (2.0, 1.0, 0.5):
        updates, state = update(GRADS, state)
        plain = method(limit)
        assert_close(updates, plain.update(GRADS, plain.init(PARAMS))[0])
    if method is not clipfx.clip_by_value:
        direct = method(fall)
        assert_close(updates, three_identical_steps(direct))


def three_identical_steps(tx):
    state = tx.init(PARAMS)
    for _ in range(3):
        updates, state = tx.update(GRADS, state)
    return updates


@methods
def test_hyperparameter_changes_between_steps_without_a_retrace(method):
    name = HYPERPARAMETERS[method]
    tx = optax.inject_hyperparams(method)(**{name: 1.0})
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    _, state = update(GRADS, tx.init(PARAMS))
    state.hyperparams[name] = jnp.full_like(state.hyperparams[name], 0.25)
    updates, _ = update(GRADS, state)
    plain = method(0.25)
    assert_close(updates, plain.update(GRADS, plain.init(PARAMS))[0])
    chex.clear_trace_counter()


def test_clip_by_norm_is_injected_with_static_ord_and_response():
    choice = {"ord": 1, "response": clipfx.responses.tanh, "groups": "layer"}
    make = optax.inject_hyperparams(
        clipfx.clip_by_norm, static_args=("ord", "response")
    )
    tx = make(threshold=0.5, **choice)
    assert set(tx.init(PARAMS).hyperparams) == {"threshold"}
    # The compiler knows one of the two thresholds, so a tanh may end in other bits.
    assert_close(
        three_steps(tx, GRADS), three_steps(clipfx.clip_by_norm(0.5, **choice), GRADS)
    )


def test_traced_ord_gives_a_type_error_that_names_static_args():
    tx = optax.inject_hyperparams(clipfx.clip_by_global_norm)(max_norm=1.0, ord=2)
    with pytest.raises(TypeError, match="static_args"):
        jax.jit(tx.update)(GRADS, tx.init(PARAMS))


# -------------------------------------------------------------------- Flax Linen


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.relu(nn.Dense(4)(x)))


X = jnp.linspace(-1, 1, 16).reshape(8, 2)
Y = X.sum(axis=1, keepdims=True)


@jax.jit
def linen_step(train):
    loss = lambda params: jnp.mean((train.apply_fn(params, X) - Y) ** 2)
    value, grads = jax.value_and_grad(loss)(train.params)
    return train.apply_gradients(grads=grads), value


def linen_train(tx):
    model = Mlp()
    params = model.init(jax.random.key(0), X)
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def test_linen_train_state_trains_and_its_metrics_are_read():
    train = linen_train(optax.chain(clipfx.clip_per_layer(0.1), optax.sgd(0.5)))
    losses = []
    for _ in range(40):
        train, loss = linen_step(train)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    read = clipfx.metrics.read(train.opt_state)
    assert read["clip0/steps/params/Dense_0"] == 40
    assert 0 < read["clip0/clip_rate/params/Dense_1"] <= 1


def test_linen_state_survives_flax_serialization():
    fall = optax.linear_schedule(1.0, 0.01, transition_steps=4)
    train = linen_train(optax.chain(clipfx.clip_per_layer(fall), optax.sgd(0.5, 0.9)))
    later, _ = linen_step(train)
    restored = flax.serialization.from_bytes(train, flax.serialization.to_bytes(later))
    assert jax.tree.structure(restored) == jax.tree.structure(later)
    assert_same(restored.opt_state, later.opt_state)
    assert_same(linen_step(restored)[0].params, linen_step(later)[0].params)


def test_boxed_linen_params_have_the_groups_of_bare_ones():
    dense = nn.Dense(
        3, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "model"))
    )
    boxed = dense.init(jax.random.key(0), X)
    assert isinstance(boxed["params"]["kernel"], nn.Partitioned)
    tx = clipfx.clip_per_layer(1.0)
    state = tx.init(boxed)
    updates, after = tx.update(boxed, state)
    assert tuple(after.metrics.groups) == ("params",)
    assert_same(after.metrics.norm, jnp.array([math.sqrt(6)], jnp.float32))
    assert jax.tree.structure(updates) == jax.tree.structure(boxed)
    bare = nn.unbox(boxed)
    assert_same(nn.unbox(updates), tx.update(bare, state)[0])
    names = tuple(clipfx.clip_per_layer(1.0, groups="leaf").init(boxed).metrics.groups)
    assert names == ("params/bias", "params/kernel")


# ---------------------------------------------------------------------- Flax NNX


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.linear1 = nnx.Linear(2, 4, rngs=rngs)
        self.linear2 = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.linear2(nnx.relu(self.linear1(x)))


@nnx.jit
def nnx_step(model, optimizer):
    loss = lambda model: jnp.mean((model(X) - Y) ** 2)
    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value, clipfx.metrics.read(optimizer.opt_state)


def nnx_training(tx):
    model = NnxMlp(nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def test_nnx_optimizer_trains_with_readable_layers():
    tx = optax.chain(clipfx.clip_per_layer(0.1), optax.sgd(0.5))
    model, optimizer = nnx_training(tx)
    before = clipfx.metrics.read(optimizer.opt_state)
    losses = []
    for _ in range(40):
        loss, inside = nnx_step(model, optimizer)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    outside = clipfx.metrics.read(optimizer.opt_state)
    assert set(before) == set(inside) == set(outside)
    groups = {key.split("/", 2)[2] for key in outside if key != "clip0/total_norm"}
    assert groups == {"linear1", "linear2"}
    assert outside["clip0/steps/linear1"] == 40
    for key in outside:
        np.testing.assert_allclose(inside[key], outside[key], rtol=1e-6)


def test_nnx_init_from_variables_fits_update_with_arrays():
    model, optimizer = nnx_training(clipfx.clip_per_layer({"linear1": 1, "linear2": 0}))
    weights = lambda: nnx.to_pure_dict(nnx.state(model, nnx.Param))
    before = jax.tree.map(jnp.array, weights())
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    # 12 ones in linear1 are cut to a norm of 1, those of linear2 to 0.
    moved = jax.tree.map(lambda p: p + jnp.float32(12**-0.5), before["linear1"])
    assert_close(weights(), {**before, "linear1": moved}, rtol=1e-5)
    assert set(optimizer.opt_state.metrics.groups) == {"linear1", "linear2"}


# ----------------------------------------------------------------------- Equinox


def test_equinox_modules_are_clipped_by_layer():
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    tx = optax.chain(clipfx.clip_per_layer(0.1), optax.sgd(0.5))

    @eqx.filter_jit
    def step(model, state):
        loss = lambda model: jnp.mean((jax.vmap(model)(X) - Y) ** 2)
        value, grads = eqx.filter_value_and_grad(loss)(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, value

    state, losses = tx.init(eqx.filter(model, eqx.is_inexact_array)), []
    for _ in range(40):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    read = clipfx.metrics.read(state)
    assert read["clip0/steps/layers/0"] == read["clip0/steps/layers/1"] == 40


def test_labels_as_a_dict_fit_an_equinox_module():
    model = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    tx = clipfx.clip_by_norm(1.0, groups={"weight": "w", "bias": "b"})
    grads = jax.tree.map(jnp.ones_like, eqx.filter(model, eqx.is_array))
    updates, state = tx.update(grads, tx.init(grads))
    assert tuple(state.metrics.groups) == ("b", "w")
    assert_close(updates.weight, jnp.full((3, 2), 6**-0.5))
    assert_close(updates.bias, jnp.full(3, 3**-0.5))


# --------------------------------------------------------------- Orbax, donation


def test_orbax_restores_a_state_that_continues_alike(tmp_path):
    params = {"net": PARAMS, "a/b": {"w": jnp.ones(3)}}  # names with "/", both ways
    fall = optax.linear_schedule(1.0, 0.01, transition_steps=4)
    tx = optax.chain(clipfx.clip_per_layer(fall), optax.trace(0.9))
    update = jax.jit(tx.update)
    _, state = update(params, tx.init(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.tree.map(jnp.zeros_like, state)
        restored = checkpointer.restore(tmp_path / "state", target)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_same(restored, state)
    assert "clip0/norm/net/dec" in clipfx.metrics.read(restored)
    assert "clip0/norm/a/b" in clipfx.metrics.read(restored)
    assert_same(update(params, restored), update(params, state))


@pytest.mark.parametrize("kind", in_tiers(["clip", "stacked"], {"clip"}))
def test_fresh_state_can_be_donated(kind):
    tx = clipfx.clip_per_layer(optax.constant_schedule(1.0))
    if kind == "stacked":
        tx = clipfx.per_stacked_layer(tx)
    grads = {"a": {"w": jnp.ones((2, 3))}, "b": {"w": jnp.ones((2, 3))}}
    tx = optax.chain(tx, optax.trace(0.9))
    kept, state = tx.init(grads), tx.init(grads)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)
    want = tx.update(grads, kept)
    # keep_unused: the last norm, say, is not read, and would not be donated.
    got = jax.jit(tx.update, donate_argnums=1, keep_unused=True)(grads, state)
    assert_close(got, want)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))


# ------------------------------------------------------------- transforms of JAX


def test_chain_runs_in_a_scan():
    fall = optax.linear_schedule(4.0, 1.0, transition_steps=3)
    tx = optax.chain(clipfx.clip_per_layer(fall), optax.trace(0.9))
    sizes = jnp.array([0.0, 0.1, 1.0, 10.0])

    def step(state, size):
        updates, state = tx.update(scaled(GRADS, size), state)
        return state, updates

    state, seen = jax.lax.scan(step, tx.init(PARAMS), sizes)
    by_hand, rows = tx.init(PARAMS), []
    for size in sizes:
        by_hand, updates = step(by_hand, size)
        rows.append(updates)
    assert_close(state, by_hand)
    assert_close(seen, jax.tree.map(lambda *row: jnp.stack(row), *rows))
    assert clipfx.metrics.read(state)["clip0/clipped/enc"] == 2


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(clipfx.clip_per_layer(optax.constant_schedule(1.0))),
        clipfx.clip_by_norm({"all": 1.0}, groups={"a": "all", "b": "all"}),
        clipfx.clip_by_block_rms(1.0),
        clipfx.clip_by_value(1.0),
        clipfx.per_stacked_layer(clipfx.clip_per_layer(optax.constant_schedule(1.0))),
    ],
    ids=["per_layer", "labels", "block_rms", "value", "stacked"],
)
def test_init_from_shapes_equals_init_from_arrays(tx):
    params = {"a": {"w": jnp.ones((4, 2))}, "b": {"w": jnp.ones(4, jnp.bfloat16)}}
    shapes = jax.eval_shape(lambda: params)
    assert_same(tx.init(shapes), tx.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(tx.init, shapes), tx.init(params)
    )


def test_loss_after_a_clipped_step_has_a_derivative_in_the_threshold():
    target = jnp.array([1.0, -2.0, 0.5])
    loss = lambda w: jnp.sum((w - target) ** 2 * jnp.array([1.0, 2.0, 3.0]))
    start = jnp.zeros(3)

    @jax.jit
    def after(threshold):
        tx = optax.chain(clipfx.clip_by_global_norm(threshold), optax.sgd(0.1))
        updates, _ = tx.update(jax.grad(loss)(start), tx.init(start), start)
        return loss(start + updates)

    norm = float(jnp.linalg.norm(jax.grad(loss)(start)))
    slope = jax.jit(jax.grad(after))
    for threshold in (0.5 * norm, 0.9 * norm):
        step = 1e-2 * norm
        rise = float(after(threshold + step)) - float(after(threshold - step))
        np.testing.assert_allclose(slope(threshold), rise / (2 * step), rtol=1e-3)
        assert slope(threshold) < 0
    assert slope(2 * norm) == 0


def test_map_params_over_the_state_of_a_chain():
    params = {"a": {"w": jnp.ones(4)}, "b": {"w": jnp.ones(4)}}
    specs = {"a": {"w": "spec a"}, "b": {"w": "spec b"}}
    for clip in (clipfx.clip_by_global_norm(1.0), clipfx.clip_per_layer(jnp.ones(2))):
        tx = optax.chain(clip, optax.trace(0.9))
        mapped = optax.tree.map_params(
            tx, lambda _, spec: spec, tx.init(params), specs,
            transform_non_params=lambda _: "other",
        )  # fmt: skip
        assert mapped[1].trace == specs
        assert mapped[0].metrics.norm == "other"


STATEFUL = {
    "clip_update_rms": (
        clipfx.clip_update_rms(optax.scale_by_adam(), b2=0.999),
        lambda state: state.inner.nu,
    ),
    "spam_clip": (clipfx.spam_clip(), lambda state: state.rule_state.rms),
    "error_feedback": (
        clipfx.error_feedback(clipfx.clip_by_global_norm(1.0)),
        lambda state: state.error,
    ),
    "clip_by_curvature": (
        clipfx.clip_by_curvature(0.1),
        lambda state: state.rule_state.params,
    ),
    "skip_spikes": (
        clipfx.skip_spikes(optax.trace(0.9)),
        lambda state: state.inner.trace,
    ),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_state_of_every_element_is_found_and_laid_out_like_params(name):
    tx, of = STATEFUL[name]
    params = {"a": {"w": jnp.ones(4)}, "b": {"w": jnp.ones(4)}}
    specs = {"a": {"w": "spec a"}, "b": {"w": "spec b"}}
    mapped = optax.tree.map_params(
        tx, lambda _, spec: spec, tx.init(params), specs,
        transform_non_params=lambda _: "other",
    )  # fmt: skip
    assert of(mapped) == specs
    shapes = jax.eval_shape(lambda: params)
    assert_same(tx.init(shapes), tx.init(params))


def test_adaptive_state_survives_orbax_and_continues_alike(tmp_path):
    tx = clipfx.skip_spikes(
        optax.chain(
            clipfx.zclip(warmup_steps=2),
            clipfx.adagc(),
            clipfx.autoclip(50.0, window=3),
            clipfx.spamp(),
            clipfx.spam_clip(),
        ),
        window=4,
    )
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    for size in (1.0, 2.0, 3.0):
        _, state = update(scaled(GRADS, size), state, PARAMS, value=size)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(PARAMS))
    assert_same(restored, state)
    grads = scaled(GRADS, 9.0)
    assert_same(
        update(grads, restored, PARAMS, value=1.0),
        update(grads, state, PARAMS, value=1.0),
    )


def test_a_stateful_clip_inside_multi_steps_learns_once_per_emitted_step():
    tx = optax.MultiSteps(clipfx.autoclip(window=8), every_k_schedule=3)
    state = tx.init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(6):
            _, state = tx.update(GRADS, state, PARAMS)
    assert int(state.inner_opt_state.rule_state.count) == 2


def test_methods_with_params_work_masked_and_partitioned():
    only_dec = lambda params: {"dec": True, "enc": False}
    clips = {"dec": clipfx.agc(0.1), "enc": clipfx.clip_by_params(0.1, 0.0)}
    tx = optax.chain(
        optax.masked(clipfx.agc(0.1), only_dec),
        optax.partition(clips, {"dec": "dec", "enc": "enc"}),
        optax.masked(clipfx.clip_by_curvature(0.1), only_dec),
        optax.masked(clipfx.error_feedback(clipfx.clip_by_global_norm(1.0)), only_dec),
        optax.masked(clipfx.spam_clip(), only_dec),
    )
    state = tx.init(PARAMS)
    for _ in range(2):
        out, state = jax.jit(tx.update)(GRADS, state, PARAMS)
    np.testing.assert_allclose(out["enc"]["w"], [0.0, 1.2], rtol=1e-6)
    np.testing.assert_allclose(out["dec"]["b"], 0.3, rtol=1e-6)


# Whatever remembers, or asks for, something of every leaf.
PER_LEAF = {
    "agc": clipfx.agc(0.1),
    "clip_by_params": clipfx.clip_by_params(0.1, 1e-3),
    "clip_by_params_element": clipfx.clip_by_params(0.1, 1e-3, per="element"),
    "clip_by_curvature": clipfx.clip_by_curvature(1.0, max_factor=4.0),
    "clip_update_rms": clipfx.clip_update_rms(optax.scale_by_rms(), 0.1),
    "error_feedback": clipfx.error_feedback(clipfx.clip_by_global_norm(0.1)),
    "spam_clip": clipfx.spam_clip(0.5, warmup_steps=1),
}
FEW_PER_LEAF = {"clip_by_params", "error_feedback"}


class Counted(eqx.Module):
    steps: jax.Array
    name: str
    scale: jax.Array
    linear: eqx.nn.Linear
    act: object = jax.nn.relu

    def __call__(self, x):
        return self.scale * self.act(self.linear(x))


@pytest.mark.parametrize("name", in_tiers(PER_LEAF.keys(), FEW_PER_LEAF))
def test_leaves_of_equinox_modules_are_matched_by_path(name):
    """Integers, strings and functions are where gradients have nothing."""
    tx, linear = PER_LEAF[name], eqx.nn.Linear(2, 2, key=jax.random.key(0))
    model = Counted(jnp.array(0), "net", jnp.array(1.0), linear)
    bare = lambda m: {
        "bias": m.linear.bias,
        "scale": m.scale,
        "weight": m.linear.weight,
    }
    loss = lambda m: jnp.sum(m(jnp.array([1.0, -2.0])) ** 2)
    state, plain = tx.init(eqx.filter(model, eqx.is_array)), tx.init(bare(model))
    for _ in range(2):
        grads = eqx.filter_grad(loss)(model)
        out, state = tx.update(grads, state, model)  # the whole module as params
        want, plain = tx.update(bare(grads), plain, bare(model))
        assert jax.tree.structure(out) == jax.tree.structure(grads)
        assert_close(bare(out), want)
        model = eqx.apply_updates(model, scaled(out, -0.1))


@pytest.mark.parametrize("name", in_tiers(PER_LEAF.keys(), FEW_PER_LEAF))
def test_leaves_of_flax_models_are_matched_by_path(name):
    model, optimizer = nnx_training(optax.chain(PER_LEAF[name], optax.sgd(0.1)))
    tx = optax.chain(PER_LEAF[name], optax.sgd(0.1))
    bare = lambda: nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state, loss = tx.init(bare()), lambda model: jnp.mean((model(X) - Y) ** 2)
    for _ in range(2):
        grads, before = nnx.grad(loss)(model), jax.tree.map(jnp.array, bare())
        out, state = tx.update(nnx.to_pure_dict(grads), state, before)
        optimizer.update(model, grads)
        want = jax.tree.map(lambda p, u: p + u, before, out)
        assert_close(bare(), want, rtol=1e-6, atol=1e-7)


def test_an_exported_step_runs_elsewhere():
    pytest.importorskip("flatbuffers")
    clips = optax.chain(
        clipfx.zclip(warmup_steps=1), clipfx.adagc(1.5), clipfx.agc(0.1, axis=0),
        clipfx.clip_by_curvature(0.1), clipfx.spam_clip(),
    )  # fmt: skip
    tx = clipfx.skip_spikes(clipfx.error_feedback(clips), min_steps=2)
    step = jax.jit(tx.update)
    _, state = step(PARAMS, tx.init(PARAMS), PARAMS)
    grads = scaled(PARAMS, 2.0)
    written = export.export(step)(grads, state, PARAMS).serialize()
    there = export.deserialize(written).call(grads, state, PARAMS)
    assert_close(there, step(grads, state, PARAMS))


FACTORIES = {
    **{f: {} for f in (
        clipfx.adagc, clipfx.agc, clipfx.autoclip, clipfx.band_by_history,
        clipfx.clip_by_params, clipfx.clip_spikes, clipfx.grad_power,
        clipfx.limit_norm_growth, clipfx.norm_stabilizer, clipfx.normalize_by_norm,
        clipfx.quantile_clip, clipfx.spam_clip, clipfx.spamp, clipfx.zclip,
    )},
    clipfx.clip_by_block_rms: {"max_rms": 0.1},
    clipfx.clip_by_curvature: {"learning_rate": 0.1},
    clipfx.clip_by_global_norm: {"max_norm": 0.1},
    clipfx.clip_by_snr: {"max_norm": 0.1},
    clipfx.clip_by_value: {"max_abs": 0.1},
    clipfx.clip_group_ratio: {"max_ratio": 1.0, "groups": "layer"},
    clipfx.clip_per_layer: {"max_norm": 0.1},
    clipfx.clip_update_rms: {"inner": optax.scale_by_rms(), "max_rms": 0.1},
    clipfx.dual_norm_gate: {"inner": optax.identity(), "rho": 1.0},
    clipfx.error_feedback: {"inner": clipfx.clip_by_global_norm(0.1)},
    clipfx.skip_spikes: {"inner": clipfx.clip_by_global_norm(0.1)},
    clipfx.smooth_norm: {"l0": 1.0, "l1": 1.0},
}  # fmt: skip


FEW_FACTORIES = {clipfx.autoclip, clipfx.clip_by_curvature, clipfx.clip_by_snr,
                 clipfx.error_feedback, clipfx.spamp, clipfx.zclip}  # fmt: skip


@pytest.mark.parametrize(
    "make", in_tiers(FACTORIES.keys(), FEW_FACTORIES), ids=lambda make: make.__name__
)
def test_every_factory_may_be_injected_with_its_defaults(make):
    """Whose numbers injection makes arrays of, whether they may change or not."""
    given = FACTORIES[make]
    extra = {"snr": 7.0} if make is clipfx.clip_by_snr else {}
    injected, plain = optax.inject_hyperparams(make)(**given), make(**given)
    state, expected = injected.init(PARAMS), plain.init(PARAMS)
    for factor in (0.1, 1.0):
        out, state = injected.update(scaled(GRADS, factor), state, PARAMS, **extra)
        want, expected = plain.update(scaled(GRADS, factor), expected, PARAMS, **extra)
        assert_close(out, want, rtol=2e-6)


def test_counts_may_be_numbers_of_numpy():
    eight = np.int64(8)
    for tx in (
        clipfx.autoclip(50.0, window=eight),
        clipfx.skip_spikes(optax.identity(), window=eight, min_steps=np.int32(2)),
        clipfx.zclip(warmup_steps=eight),
        clipfx.adagc(warmup_steps=np.int16(8)),
        clipfx.spam_clip(warmup_steps=np.uint8(8)),
        clipfx.agc(axis=np.int64(-1)),
        clipfx.agc(axis=(np.int64(0),)),
    ):
        jax.eval_shape(tx.update, GRADS, tx.init(PARAMS), PARAMS)
    assert clipfx.snr.cosine(np.int64(20)).shape == (20,)
    assert clipfx.snr.ddpm_linear(np.int32(20)).shape == (20,)


def test_a_clip_of_what_is_trained_does_not_count_what_is_frozen():
    """What docs/placement.md says of frozen parameters."""
    grads = {**GRADS, "enc": {"w": jnp.array([0.0, 1e6])}}
    labels = {"dec": "train", "enc": "frozen"}
    parts = {
        "train": optax.chain(clipfx.clip_by_global_norm(1.0), optax.sgd(1.0)),
        "frozen": optax.set_to_zero(),
    }
    tx = optax.partition(parts, labels)
    out, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert_close(out["dec"], scaled(GRADS["dec"], -0.2))
    trained = {"dec": True, "enc": False}
    tx = optax.chain(
        optax.masked(clipfx.clip_by_global_norm(1.0), trained),
        optax.partition({"train": optax.sgd(1.0), "frozen": parts["frozen"]}, labels),
    )
    assert_close(tx.update(grads, tx.init(PARAMS), PARAMS)[0], out)
