"""One meaning an argument: the same words do the same in every per-example function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentences import raises_one_sentence
from tiers import in_tiers

from clipfx import per_example, privacy

B, K = 7, 3


def loss(params, example):
    x, y = example
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.sum((hidden @ params["v"] - y) ** 2)


def draw(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"b": normal(5), "v": normal(5, 2), "w": normal(4, 5)}
    return params, (normal(B, 4), normal(B, 2))


PARAMS, BATCH = draw()
IDS = jnp.array([0, 2, 0, 1, 1, 2, 0])
MASK = jnp.array([True, True, False, True, True, True, False])
by_id = {"population_ids": IDS}
SUMS = {
    "clipped_grad": (lambda **kw: per_example.clipped_grad(loss, 1.0, **kw), {}),
    "population_grad": (lambda **kw: per_example.population_grad(loss, K, **kw), by_id),
    "fair_grad": (lambda **kw: per_example.fair_grad(loss, K, 1.5, **kw), by_id),
}
functions = pytest.mark.parametrize(
    "name", in_tiers(SUMS.keys(), {"population_grad", "fair_grad"})
)


def close(a, b, rtol=2e-5):
    def one(x, y):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * np.abs(y).max(initial=0))

    jax.tree.map(one, a, b)


@functions
@pytest.mark.parametrize("where", [None, MASK])
def test_a_mean_is_the_sum_over_the_examples_that_count(name, where):
    make, extra = SUMS[name]
    total, _ = jax.jit(make())(PARAMS, BATCH, where=where, **extra)
    mean, _ = jax.jit(make(reduce="mean"))(PARAMS, BATCH, where=where, **extra)
    number = B if where is None else int(where.sum())
    close(mean, jax.tree.map(lambda x: x / number, total))


@functions
@pytest.mark.parametrize("masked", in_tiers([False, True], {True}))
def test_a_mean_is_that_of_all_devices(name, masked):
    make, extra = SUMS[name]
    params, (x, y) = PARAMS, BATCH
    batch = (jnp.concatenate([x, x[:1]]), jnp.concatenate([y, y[:1]]))
    extra = {key: jnp.append(ids, 1) for key, ids in extra.items()}
    if masked:  # not the same number on every device
        extra["where"] = jnp.array([True, True, False, True, True, True, True, False])
    whole = jax.jit(make(reduce="mean"))(params, batch, **extra)[0]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    run = lambda grad: lambda batch, extra: grad(params, batch, **extra)[0]
    local = jax.shard_map(
        run(make(reduce="mean")),
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=jax.sharding.PartitionSpec(),
    )
    close(jax.jit(local)(batch, extra), whole)
    grad = make(reduce="mean", batch_axis_name="i")
    cut = lambda x: x.reshape(4, -1, *x.shape[1:])
    each = jax.jit(jax.vmap(run(grad), axis_name="i"))
    rows = each(jax.tree.map(cut, batch), jax.tree.map(cut, extra))
    for k in range(4):
        close(jax.tree.map(lambda x, k=k: x[k], rows), whole)


@functions
@pytest.mark.parametrize("size", in_tiers([1, 3, 7, 9], {3}))
@pytest.mark.parametrize("where", [None, MASK])
def test_microbatches_change_nothing(name, size, where):
    make, extra = SUMS[name]
    whole = jax.jit(make())(PARAMS, BATCH, where=where, **extra)
    parts = jax.jit(make(microbatch_size=size))(PARAMS, BATCH, where=where, **extra)
    close(parts, whole)


@pytest.mark.parametrize(
    "method", in_tiers(["auto", "ghost", "instantiate"], {"ghost", "instantiate"})
)
def test_a_norm_method_changes_nothing_but_the_way(method):
    plain = jax.jit(per_example.norms(loss, groups="leaf"))(PARAMS, BATCH)
    measure = per_example.norms(loss, groups="leaf", norm_method=method)
    close(jax.jit(measure)(PARAMS, BATCH).norm, plain.norm)
    grad = per_example.clipped_grad(loss, 1.0, norm_method=method)
    close(
        jax.jit(grad)(PARAMS, BATCH),
        jax.jit(per_example.clipped_grad(loss, 1.0))(PARAMS, BATCH),
    )


def test_a_norm_method_by_leaf():
    by_leaf = {"w": "instantiate", "b": "auto", "v": "ghost"}
    table = per_example.explain(
        loss, PARAMS, jax.tree.map(lambda x: x[0], BATCH), norm_method=by_leaf
    )
    methods = {row.leaf: row.method for row in table.rows}
    assert methods["w"] == "instantiated"
    assert methods["v"] == "outer product"
    grad = per_example.clipped_grad(loss, 1.0, norm_method=by_leaf)
    close(
        jax.jit(grad)(PARAMS, BATCH)[0],
        jax.jit(per_example.clipped_grad(loss, 1.0))(PARAMS, BATCH)[0],
    )


def test_none_is_the_default_of_ord_and_response():
    plain = jax.jit(per_example.clipped_grad(loss, 1.0))(PARAMS, BATCH)
    given = per_example.clipped_grad(loss, 1.0, ord=None, response=None)
    given = jax.jit(given)(PARAMS, BATCH)
    jax.tree.map(np.testing.assert_array_equal, given, plain)
    grad = privacy.dp_grad(
        loss, max_norm=1.0, noise_multiplier=0.0, expected_batch_size=B,
        key=jax.random.key(0), ord=None, response=None, norm_method="ghost",
    )  # fmt: skip
    run = jax.jit(lambda: grad(grad.init(PARAMS), PARAMS, BATCH, where=None))
    mean, *_ = run()
    close(mean, jax.tree.map(lambda x: x / B, plain[0]))


def test_thresholds_of_rank_one_are_by_group():
    limit = jnp.array([0.1, 0.2, 0.3])
    grad = jax.jit(per_example.clipped_grad(loss, limit, groups="leaf"))
    _, info = grad(PARAMS, BATCH)
    size = info.norm * info.factor
    assert (size <= np.float32([[0.1, 0.2, 0.3]]) * (1 + 1e-6)).all()
    # Three examples and three groups: what it means does not change with the batch.
    few = jax.tree.map(lambda x: x[:3], BATCH)
    _, same = grad(PARAMS, few)
    np.testing.assert_allclose(same.factor, info.factor[:3], rtol=1e-5)
    by_example = jnp.linspace(0.1, 0.7, B)[:, None]
    grad = jax.jit(per_example.clipped_grad(loss, 1.0))
    _, info = grad(PARAMS, BATCH, max_norm=by_example)
    assert (info.norm * info.factor <= by_example * (1 + 1e-6)).all()


def own(name):
    scope = {}
    exec(f"def fun(params, example, {name}=None): return 0.0", scope)
    return scope["fun"]


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: per_example.clipped_grad(own("where"), 1.0), ValueError,
         "fun must not have an argument named where"),
        (lambda: per_example.clipped_grad(own("max_norm"), 1.0), ValueError,
         "fun must not have an argument named max_norm"),
        (lambda: per_example.fair_grad(own("population_ids"), 2), ValueError,
         "fun must not have an argument named population_ids"),
        (lambda: per_example.clipped_grad(loss, 1.0, reduce="max"), ValueError,
         "reduce must be"),
        (lambda: per_example.norms(loss, norm_method="gram"), ValueError,
         "norm_method must be"),
        (lambda: per_example.norms(loss, norm_method={"w": "ghost"})(PARAMS, BATCH),
         ValueError, "norm_method must cover every leaf"),
        (lambda: per_example.clipped_grad(loss, 1.0)(
            PARAMS, BATCH, max_norm=jnp.ones(B)), ValueError, r"max_norm\[:, None\]"),
        (lambda: per_example.clipped_grad(loss, 1.0, reduce="mean").sensitivity(),
         ValueError, "reduce must be"),
        (lambda: per_example.fair_grad(loss, 2)(PARAMS, BATCH), TypeError,
         "population_ids must be passed"),
        (lambda: per_example.population_grad(loss, 2, microbatch_size=0), ValueError,
         "microbatch_size"),
    ],
)  # fmt: skip
def test_errors(call, kind, words):
    raises_one_sentence((call, kind, words))
