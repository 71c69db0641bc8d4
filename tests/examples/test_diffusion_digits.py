import contextlib
import dataclasses
import io
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from flax import nnx
from tiers import in_tiers

import clipfx
from examples import diffusion_digits
from examples.diffusion_digits import MIXED, VARIANTS, Settings

FEW = ("none", "global")  # each takes a second to compile
SMALL = Settings(variants=FEW, steps=3, batch=4, hidden=8)
RATIOS = clipfx.snr.cosine(diffusion_digits.TIMESTEPS)
GRADS = {"w": jnp.array([3.0, -4.0]), "b": jnp.array([[12.0]])}  # norm 13

# Adam raises a float to the power of its integer count.
standard = jax.numpy_dtype_promotion("standard")


def launch(tmp_path, **given):
    small = dataclasses.asdict(SMALL) | {"out": tmp_path / "out"}
    with standard:
        return runs.launch(diffusion_digits, small | given)


@pytest.fixture(scope="module")
def few_variants(tmp_path_factory):
    """A folder, what was printed, and for each variant the rows of a run of each."""
    folder, printed = tmp_path_factory.mktemp("few"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        rows = launch(folder)
    assert [(row["variant"], row["step"]) for row in rows] == [
        (variant, step) for variant in FEW for step in range(SMALL.steps)
    ]
    of = {v: [row for row in rows if row["variant"] == v] for v in FEW}
    return folder, printed.getvalue(), of


def applied(variant, snr, max_norm=0.1, gamma=5.0, grads=GRADS):
    tx = optax.with_extra_args_support(VARIANTS[variant](max_norm, gamma))
    return tx.update(grads, tx.init(grads), grads, snr=jnp.float32(snr))[0]


@pytest.mark.full
def test_end_to_end(few_variants):
    folder, printed, rows = few_variants
    assert set(rows["none"][0]) == {
        *("variant", "step", "t", "snr", "loss", "norm", "applied")
    }
    for variant in FEW:
        assert any(line.split()[:1] == [variant] for line in printed.splitlines())
    pictures = [folder / "out" / name for name in ("norms.png", "samples.png")]
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_a_variant_given_twice_runs_once(few_variants, tmp_path):
    again = launch(tmp_path, variants=["global", "global"])
    assert again == few_variants[-1]["global"]
    assert all(
        (tmp_path / "out" / name).exists() for name in ("norms.png", "samples.png")
    )


@pytest.mark.full
def test_diverged_run(tmp_path, capsys):
    rows = launch(tmp_path, learning_rate=1e38, variants=["none"])
    assert rows[-1]["loss"] is None
    assert "nan" in capsys.readouterr().out


@pytest.mark.full
def test_variants_share_start_and_batches(few_variants):
    first, *others = few_variants[-1].values()
    for run in others:
        assert [row["t"] for row in run] == [row["t"] for row in first]
        for name in ("loss", "norm"):
            assert run[0][name] == pytest.approx(first[0][name], rel=1e-6)


def test_same_seed_same_batches():
    digits, _ = diffusion_digits.load_data()
    draw = lambda seed: next(
        diffusion_digits.draw_batches(digits, dataclasses.replace(SMALL, seed=seed))
    )
    one, same, other = draw(0), draw(0), draw(1)
    for x, y, z in zip(one, same, other, strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y, z = map(jax.random.key_data, (x, y, z))
        np.testing.assert_array_equal(x, y)
        assert not np.array_equal(x, z)


def test_batches_of_all_steps():
    chunk = diffusion_digits.CHUNK
    settings = dataclasses.replace(SMALL, steps=chunk + 2)
    digits = np.eye(3, dtype=np.float32)
    batches = list(diffusion_digits.draw_batches(digits, settings))
    assert [len(b.t) for b in batches] == [chunk, 2]
    assert batches[0].digits.shape == (chunk, 4, 3)
    keys = np.concatenate([jax.random.key_data(b.key) for b in batches])
    assert len(np.unique(keys, axis=0)) == chunk + 2
    np.testing.assert_array_equal(batches[1].snr, RATIOS[batches[1].t])


@pytest.mark.parametrize("snr", [float(RATIOS[0]), 4.0, 1e-3, float(RATIOS[-1])])
def test_inverse_before_the_weight_is_the_plain_clip(snr):
    one, other = (applied(v, snr) for v in ("inverse_unweighted", "global"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, other)


def test_the_identity_ends_at_the_clamps():
    snr, weigh = jnp.float32(RATIOS[0]), diffusion_digits.weigh()
    clamped = clipfx.clip_by_snr(0.1, weight=clipfx.snr.inverse)
    tx = optax.chain(clamped, weigh)
    updates, _ = tx.update(GRADS, tx.init(GRADS), GRADS, snr=snr)
    # By default 1/SNR is at least 1e-3.
    np.testing.assert_allclose(clipfx.global_norm(updates), 1e-4 * snr, rtol=1e-5)
    np.testing.assert_allclose(
        clipfx.global_norm(applied("inverse_unweighted", snr)), 0.1, rtol=1e-5
    )


# Norm 13; max_norm 0.1, gamma 5.
NORMS = {
    ("none", 1000.0): 13_000,
    ("global", 1000.0): 0.1,
    ("inverse_weighted", 1000.0): 1e-4,
    ("min_snr", 1000.0): 0.5,
    ("min_snr_weighting", 1000.0): 65,
    ("none", 1e-3): 0.013,
    ("global", 1e-3): 0.013,
    ("inverse_weighted", 1e-3): 0.013,
    ("min_snr", 1e-3): 1e-4,
    ("min_snr_weighting", 1e-3): 0.013,
}


@pytest.mark.parametrize("variant, snr, norm", [(*k, v) for k, v in NORMS.items()])
def test_norm_applied(variant, snr, norm):
    updates = applied(variant, snr)
    np.testing.assert_allclose(clipfx.global_norm(updates), norm, rtol=1e-5)
    factors = [np.ravel(updates[key] / GRADS[key]) for key in "wb"]
    np.testing.assert_allclose(np.concatenate(factors), norm / 13, rtol=1e-5)


def first_batch(t):
    digits, _ = diffusion_digits.load_data()
    key = jax.random.key(3)
    return diffusion_digits.Batch(jnp.asarray(digits[:6]), jnp.int32(t), RATIOS[t], key)


def test_weighted_gradient_at_the_first_timestep():
    batch = first_batch(0)
    model = diffusion_digits.Denoiser(8, nnx.Rngs(0))
    loss = diffusion_digits.x0_error
    weighted = lambda model, batch: batch.snr * loss(model, batch)
    slope = nnx.jit(lambda *args: (nnx.grad(weighted)(*args), nnx.grad(loss)(*args)))
    both = slope(model, batch)
    norms = [clipfx.global_norm(grads) for grads in both]
    assert norms[0] / norms[1] == pytest.approx(24_221, rel=1e-3)
    scaled = applied("none", batch.snr, grads=nnx.state(both[1]))
    np.testing.assert_allclose(clipfx.global_norm(scaled), norms[0], rtol=1e-5)


@pytest.mark.parametrize("t", [50, 500])
def test_weighted_loss_is_the_error_of_the_noise(t):
    batch = first_batch(t)
    model = diffusion_digits.Denoiser(8, nnx.Rngs(0))
    signal = batch.snr / (1 + batch.snr)
    noise = jax.random.normal(batch.key, (6, 64))
    noisy = jnp.sqrt(signal) * batch.digits + jnp.sqrt(1 - signal) * noise
    digits = model(noisy, batch.t)
    predicted = (noisy - jnp.sqrt(signal) * digits) / jnp.sqrt(1 - signal)
    error = jnp.square(predicted - noise).mean()
    loss = batch.snr * diffusion_digits.x0_error(model, batch)
    np.testing.assert_allclose(loss, error, rtol=1e-3)


@pytest.mark.full
def test_norms_of_a_run(few_variants):
    column = lambda v, name: np.array([row[name] for row in few_variants[-1][v]])
    norm = column("none", "norm")
    np.testing.assert_allclose(column("none", "applied"), norm, rtol=1e-6)
    limit = np.minimum(column("global", "norm"), SMALL.max_norm)
    np.testing.assert_allclose(column("global", "applied"), limit, rtol=1e-5)


def test_mix():
    batch = first_batch(50)
    mixed = jax.jit(diffusion_digits.mix)(batch)
    assert mixed.t[0] == 50 and len(np.unique(mixed.t)) > 1
    assert mixed.t.min() >= 0 and mixed.t.max() < diffusion_digits.TIMESTEPS
    np.testing.assert_array_equal(mixed.snr, RATIOS[mixed.t])
    np.testing.assert_array_equal(mixed.digits, batch.digits)
    assert len(np.unique(jax.random.key_data(mixed.key), axis=0)) == 6


def test_thresholds_of_examples():
    snr = jnp.array([1e3, 5.0, 0.2])
    limit = MIXED["mixed_min_snr"](0.1, 5.0, snr)
    np.testing.assert_allclose(limit, [0.5, 0.5, 0.02], rtol=1e-6)
    assert jnp.isinf(MIXED["mixed_none"](0.1, 5.0, snr)).all()


@pytest.mark.parametrize("variant", in_tiers(MIXED.keys(), {"mixed_min_snr"}))
def test_mixed_update(variant):
    """As clipping each unweighted gradient, and weighing it then."""
    batch = first_batch(100)
    settings = dataclasses.replace(SMALL, max_norm=0.3)
    model = diffusion_digits.Denoiser(8, nnx.Rngs(0))
    graph, before = nnx.split(diffusion_digits.Denoiser(8, nnx.Rngs(0)))
    step, tx = diffusion_digits.choose(variant, settings, optax.sgd(1.0))
    learner = model, nnx.Optimizer(model, tx, wrt=nnx.Param)
    _, seen = nnx.jit(step)(learner, batch)

    def loss(params, example):
        one = example._replace(digits=example.digits[None])
        return diffusion_digits.x0_error(nnx.merge(graph, params), one)

    mixed = diffusion_digits.mix(batch)
    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(before, mixed)
    norms = jax.vmap(clipfx.global_norm)(grads)
    limit = jnp.inf
    if variant == "mixed_min_snr":
        limit = 0.3 * clipfx.snr.min_snr(mixed.snr)
        assert (norms > limit).sum() > 0
    weights = mixed.snr * jnp.minimum(1, limit / norms)
    mean = jax.tree.map(lambda g: jnp.tensordot(weights, g, 1) / 6, grads)
    moved = jax.tree.map(jnp.subtract, before, nnx.state(model))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), moved, mean
    )
    np.testing.assert_allclose(seen["norm"], mixed.snr[0] * norms[0], rtol=1e-4)
    np.testing.assert_allclose(seen["applied"], weights[0] * norms[0], rtol=1e-4)
    assert seen["t"] == 100


@pytest.mark.full
def test_mixed_run(tmp_path, capsys):
    rows = launch(tmp_path, variants=["mixed_min_snr"])
    assert [row["step"] for row in rows] == [0, 1, 2]
    keys = ("t", "snr", "loss", "norm", "applied")
    assert all(math.isfinite(row[key]) for row in rows for key in keys)
    for row in rows:
        limit = 0.1 * min(row["snr"], SMALL.gamma)
        assert row["applied"] == pytest.approx(min(row["norm"], limit), rel=1e-4)
    assert "\nmixed_min_snr " in capsys.readouterr().out


def history(t, loss, norm=None, applied=None):
    norm = np.ones(len(t)) if norm is None else norm
    applied = norm if applied is None else applied
    names = ("t", "loss", "norm", "applied")
    columns = zip(t, loss, norm, applied, strict=True)
    rows = [dict(zip(names, values, strict=True)) for values in columns]
    return diffusion_digits.History("x", rows, 0.0, np.zeros((1, 64)), 0.0)


def test_spread_over_timesteps():
    t = np.array([0, 0, 900, 999])
    norm = np.array([1.0, 3.0, 8.0, 12.0])
    row = diffusion_digits.summarize(history(t, np.ones(4), norm, norm[::-1]))
    assert row["spread before"] == 5.0
    assert row["spread applied"] == 5.0


def test_spikes():
    rng = np.random.default_rng(0)
    t = np.arange(1000) * 7 % 1000
    loss = (1 + t / 100) * rng.uniform(0.9, 1.1, 1000)  # t matters, and is no spike
    assert diffusion_digits.count_spikes(history(t, loss)) == 0
    loss[[800, 900]] *= [30, math.nan]
    with np.errstate(invalid="ignore"):
        spikes = diffusion_digits.count_spikes(history(t, loss))
    # What is compared with a window that holds the NaN counts as well.
    assert spikes >= 2
    assert diffusion_digits.count_spikes(history(t[:890], loss[:890])) == 1


def test_distance():
    digits, held_out = diffusion_digits.load_data()
    distance = diffusion_digits.sliced_wasserstein
    # A product may round a row by where it stands: 2e-17 on some processors.
    assert distance(held_out, held_out[::-1]) < 1e-15
    assert distance(digits[: len(held_out)], held_out) < 0.1
    moved = distance(held_out + 1, held_out)
    assert moved == pytest.approx(1, rel=0.1)  # along a unit direction: N(0, 1) of 64


def test_data():
    digits, held_out = diffusion_digits.load_data()
    assert len(digits) + len(held_out) == 1797
    assert digits.dtype == held_out.dtype == np.float32
    assert digits.min() == -1 and digits.max() == 1


def test_sample_of_a_perfect_model():
    class Zero(diffusion_digits.Denoiser):
        def __call__(self, noisy, t):
            return jnp.full_like(noisy, 0.5)

    samples = diffusion_digits.sample(Zero(2, nnx.Rngs(0)), jax.random.key(0), 5)
    np.testing.assert_allclose(samples, np.full((5, 64), 0.5), rtol=1e-6)


@pytest.mark.full
def test_learns():
    settings = Settings(steps=250, batch=16, hidden=8, learning_rate=1e-2)
    with standard:
        learned = diffusion_digits.train("global", settings)
    _, held_out = diffusion_digits.load_data()
    model = diffusion_digits.Denoiser(8, nnx.Rngs(0))
    assert learned.held_out < 0.5 * diffusion_digits.evaluate(model, held_out)
    assert learned.samples.shape == held_out.shape


def test_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    message = r"^diffusion_digits: the digits are missing: pip install scikit-learn\.$"
    with pytest.raises(SystemExit, match=message):
        launch(tmp_path)


BAD_FLAGS = {
    "steps": ({"steps": 0}, "--steps must be a whole number of at least 1"),
    "rate": ({"learning_rate": math.nan}, "--learning_rate must be a number greater"),
    "variant": ({"variants": "none,sgd"}, "--variants must be one or more of none, gl"),
}


@pytest.mark.parametrize("given, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flag(tmp_path, given, message):
    with pytest.raises(SystemExit, match=message):
        launch(tmp_path, **given)


def save_images(path, pixels):
    images = np.random.default_rng(0).normal(size=(100, pixels))
    np.savez(path, images=images, labels=np.arange(100) % 10)
    return path


def test_images_that_are_not_square(tmp_path):
    with pytest.raises(SystemExit, match="must be square, and these have 24 pixels"):
        launch(tmp_path, data=save_images(tmp_path / "mine.npz", 24))


@pytest.mark.full
def test_takes_other_images(tmp_path):
    rows = launch(
        tmp_path, data=save_images(tmp_path / "mine.npz", 25), variants="global"
    )
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert (tmp_path / "out" / "samples.png").exists()
