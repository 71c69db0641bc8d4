"""Noise: its level, its independence, and that it never comes twice."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sentences import raises_one_sentence
from tiers import in_tiers
from trees import enable_x64

from clipfx import privacy
from clipfx._core import reductions

KEY = jax.random.key(7)
KINDS = {
    "gaussian": (privacy.add_gaussian_noise, 1.0),
    "laplace": (privacy.add_laplace_noise, math.sqrt(2)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
# Tests of `dp_grad` draw from the other.
laplace = pytest.mark.parametrize("kind", in_tiers(KINDS.keys(), {"laplace"}))


def drawn(kind, tree, steps=1, key=KEY):
    """Of several steps."""
    tx = KINDS[kind][0](1.0, key)
    state, found = tx.init(tree), []
    update = jax.jit(tx.update)
    for _ in range(steps):
        noise, state = update(jax.tree.map(jnp.zeros_like, tree), state)
        found.append(noise)
    return found


@each_kind
def test_norm_of_parameters_after_many_steps_of_nothing(kind):
    """Within 5% of what the noise should make of them."""
    make, share = KINDS[kind]
    size, steps, rate, batch, level = 2000, 40, 0.3, 64, 2.5
    params = {"a": jnp.zeros((size, 3)), "b": jnp.zeros(size)}
    tx = optax.chain(make(level, KEY), optax.scale(1 / batch), optax.sgd(rate))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=steps)
    found = math.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(params)))
    right = share * level * rate / batch * math.sqrt(steps * 4 * size)
    assert found == pytest.approx(right, rel=0.05)


@each_kind
def test_distribution(kind):
    (x,) = drawn(kind, jnp.zeros(200_000))
    x = np.sort(np.float64(x))
    error = np.vectorize(math.erf)(x / math.sqrt(2)) / 2 + 0.5
    exact = {
        "gaussian": error,
        "laplace": np.where(x < 0, np.exp(x) / 2, 1 - np.exp(-x) / 2),
    }[kind]
    steps = np.arange(len(x)) / len(x)
    assert np.abs(exact - steps).max() < 2 / math.sqrt(len(x))  # Kolmogorov


@each_kind
def test_leaves_and_steps_are_independent(kind):
    tree = {k: jnp.zeros(4000) for k in "abc"}
    rows = [np.float64(x) for noise in drawn(kind, tree, 3) for x in noise.values()]
    assert len({float(row[0]) for row in rows}) == 9
    for x, y in itertools.combinations(rows, 2):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / math.sqrt(4000)
        assert not np.isin(x, y).mean() > 0.01  # nor shifted


@laplace
def test_same_noise_for_every_dtype(kind):
    wide = drawn(kind, jnp.zeros(300))[0]
    for dtype in (jnp.bfloat16, jnp.float16):
        x = drawn(kind, jnp.zeros(300, dtype))[0]
        assert x.dtype == dtype
        chex.assert_trees_all_equal(x, wide.astype(dtype))
    with enable_x64(True):
        x = np.asarray(drawn(kind, jnp.zeros(300, jnp.float64))[0])
        assert x.dtype == np.float64
        assert (x != np.float32(x)).mean() > 0.9  # or low bits would show
    z = drawn(kind, jnp.zeros(3000, jnp.complex64))[0]
    assert abs(np.corrcoef(z.real, z.imag)[0, 1]) < 0.1
    assert float(z.imag.std()) == pytest.approx(KINDS[kind][1], rel=0.1)
    x, n = drawn(kind, [jnp.zeros(2), jnp.arange(3)])[0]
    chex.assert_trees_all_equal(n, jnp.zeros(3, n.dtype))


@laplace
@pytest.mark.parametrize("axes", in_tiers([AxisType.Explicit, AxisType.Auto], 2))
def test_sharded_draws_equal_whole_ones(kind, axes):
    tree = {"split": jnp.zeros((16, 24)), "whole": jnp.zeros(7), "odd": jnp.zeros(8)}
    right = drawn(kind, tree, 2)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axes,) * 2)
    spec = {"split": P("data", "model"), "whole": P(), "odd": P(("data", "model"))}
    place = {k: NamedSharding(mesh, s) for k, s in spec.items()}
    split = jax.device_put(tree, place)
    tx = KINDS[kind][0](1.0, KEY)
    update = jax.jit(tx.update)
    state = tx.init(split)
    for step in range(2):
        found, state = update(split, state)
        chex.assert_trees_all_close(found, right[step], rtol=1e-6)
        for k, x in found.items():
            assert x.sharding.is_equivalent_to(place[k], x.ndim)
    text = update.lower(split, state).compile().as_text()
    assert "all-gather" not in text
    assert "[16,24]" not in text.split("ENTRY")[1].replace("sharding", "")


@laplace
def test_parts_of_a_mesh_draw_their_own(kind):
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    make = KINDS[kind][0]
    split = jnp.zeros((64, 50))

    def local(make):
        tx = make()
        return lambda x, y: tx.update([x, y], tx.init(x))[0]

    typed = jax.shard_map(
        local(lambda: make(1.0, KEY)), mesh=mesh, in_specs=(P("i"), P()),
        out_specs=[P("i"), P()],
    )  # fmt: skip
    x, y = jax.jit(typed)(split, jnp.zeros(50))
    assert np.unique(x).size > 0.99 * x.size
    # What is whole has the same noise everywhere: its type says so.
    right = drawn(kind, [split, jnp.zeros(50)])[0][1]
    chex.assert_trees_all_close(y, right, rtol=1e-6)
    untyped = jax.pmap(
        local(lambda: make(1.0, KEY, axis_name="i")), axis_name="i",
    )  # fmt: skip
    x, _ = untyped(split.reshape(8, 8, 50), jnp.zeros((8, 50)))
    assert np.unique(x).size > 0.99 * x.size


@laplace
def test_resumed_run_goes_on_with_the_same_noise_and_repeats_none(kind, tmp_path):
    params = {"w": jnp.zeros(50)}
    whole = [np.asarray(x["w"]) for x in drawn(kind, params, 6)]
    make = KINDS[kind][0]
    tx = make(1.0, KEY)
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state)
    assert all(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(state))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
    tx = make(1.0, jax.random.key(7))  # a new process
    with ocp.StandardCheckpointer() as saver:
        state = saver.restore(tmp_path / "state", tx.init(params))
    for step in range(3, 6):
        noise, state = tx.update(params, state)
        np.testing.assert_allclose(noise["w"], whole[step], rtol=1e-6)
    assert len({float(x[0]) for x in whole}) == 6


@each_kind
def test_is_drawn_once_for_all_who_use_it(kind, monkeypatch):
    """On one CPU without memory for anything random, and equal to that of a mesh."""
    tx, x = KINDS[kind][0](1.0, KEY), jnp.zeros((300, 1000))

    def compiled():
        def moments(m, v, x, step):
            x, _ = tx.update(x, privacy.NoiseState(step))
            return m + x, v + x * x

        args = [jnp.copy(x) for _ in range(3)] + [jnp.zeros([], jnp.int32)]
        program = jax.jit(moments, donate_argnums=(0, 1)).lower(*args).compile()
        return program.memory_analysis().temp_size_in_bytes, program(*args)

    _, right = compiled()
    monkeypatch.setattr(reductions, "forced_device", "cpu")
    size, found = compiled()
    assert size < 1.1 * x.nbytes  # the result
    chex.assert_trees_all_close(found, right, rtol=1e-6)


ADAM = optax.adam(0.1)


@pytest.mark.parametrize("tx", [optax.sgd(0.1), ADAM], ids=["sgd", "adam"])
def test_private_step_takes_little_more_memory_than_an_ordinary_one(tx, monkeypatch):
    monkeypatch.setattr(reductions, "forced_device", "cpu")
    params = [jnp.ones((500, 500)), jnp.ones((500, 500)), jnp.ones((500, 1))]
    batch = jnp.ones((128, 500))

    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x.sum()

    def ordinary(state, params, batch):
        mean = lambda params: jax.vmap(loss, (None, 0))(params, batch).mean()
        return jax.grad(mean)(params), state, None

    def private(noise):
        grad = privacy.dp_grad(
            loss, max_norm=1.0, noise_multiplier=noise, expected_batch_size=128, key=KEY
        )
        return size(functools.partial(grad, where=None), grad.init(params))

    def size(grad, state):
        def step(params, opt_state, state, batch):
            grads, state, _ = grad(state, params, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, state

        args = params, tx.init(params), state, batch
        with jax.numpy_dtype_promotion("standard"):  # for Optax
            program = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*args).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert private(1.0) < 1.01 * private(0.0)
    if tx is ADAM:  # SGD adds up where the gradient is, not on every version
        assert private(1.0) < 1.5 * size(ordinary, ())


def test_schedule_and_accumulation():
    tx = privacy.add_gaussian_noise(lambda step: jnp.where(step < 1, 0.0, 2.0), KEY)
    params = jnp.zeros(1000)
    state, update = tx.init(params), jax.jit(tx.update)
    first, state = update(params, state)
    second, state = update(params, state)
    assert (first == 0).all()
    assert float(second.std()) == pytest.approx(2, rel=0.1)
    # Once per logical batch: inside of the accumulation, of sums. Means would get the
    # noise of a sum, here four times too much.
    for mean, size in ((False, 4.0), (True, 1.0)):
        noise = privacy.add_gaussian_noise(2.0, KEY)
        tx = optax.MultiSteps(noise, 4, use_grad_mean=mean)
        state, seen, update = tx.init(params), [], jax.jit(tx.update)
        with jax.numpy_dtype_promotion("standard"):  # for Optax
            for _ in range(8):
                out, state = update(params + 1, state, params)
                seen.append((float(out.mean()), float(out.std())))
        for place, (middle, spread) in enumerate(seen):
            last = place % 4 == 3
            assert middle == pytest.approx(size if last else 0, abs=0.3)
            assert spread == pytest.approx(2 if last else 0, abs=0.2)


@each_kind
@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_every_implementation(kind, implementation):
    tree = [jnp.zeros(20_000), jnp.zeros(20_000)]
    keys = [jax.random.key(seed, impl=implementation) for seed in (0, 1)]
    rows = [x for key in keys for x in drawn(kind, tree, 1, key)[0]]
    for x, y in itertools.combinations(rows, 2):
        assert float(x.std()) == pytest.approx(KINDS[kind][1], rel=0.05)
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.03


def test_old_and_new_keys_are_the_same():
    old = drawn("gaussian", jnp.zeros(5), key=jax.random.PRNGKey(7))
    chex.assert_trees_all_equal(old, drawn("gaussian", jnp.zeros(5)))


def test_settings_by_numpy_and_state_under_x64():
    with enable_x64(True):
        tx = privacy.add_gaussian_noise(np.float64(2.0), KEY)
        x = jnp.zeros(1000, jnp.float32)
        first = tx.init(x)
        noise, second = tx.update(x, first)
    assert noise.dtype == jnp.float32
    assert float(noise.std()) == pytest.approx(2, rel=0.1)
    kind = lambda state: (state.step.shape, state.step.dtype, state.step.weak_type)
    assert kind(first) == kind(second) == ((), jnp.int32, False)


def test_step_can_be_exported():
    pytest.importorskip("flatbuffers")
    tx = privacy.add_laplace_noise(1.0, KEY)
    args = jnp.zeros(3), tx.init(None)
    written = jax.export.export(jax.jit(tx.update))(*args).serialize()
    found, state = jax.export.deserialize(written).call(*args)
    chex.assert_trees_all_equal(found, tx.update(*args)[0])
    assert type(state) is privacy.NoiseState


ERRORS = [
    (lambda: privacy.add_gaussian_noise(-1.0, KEY), ValueError, "stddev"),
    (lambda: privacy.add_gaussian_noise(math.inf, KEY), ValueError, "stddev"),
    (lambda: privacy.add_laplace_noise(math.nan, KEY), ValueError, "scale"),
    (lambda: privacy.add_laplace_noise("1", KEY), TypeError, "scale"),
    (lambda: privacy.add_gaussian_noise(1.0, 0), TypeError, "jax.random.key"),
    (lambda: privacy.add_gaussian_noise(1.0, jax.random.split(KEY)), TypeError, "key"),
]


@pytest.mark.parametrize("case", ERRORS, ids=range(len(ERRORS)))
def test_bad_input_gets_one_sentence(case):
    raises_one_sentence(case)
