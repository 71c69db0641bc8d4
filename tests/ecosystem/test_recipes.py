"""Recipes of docs/choose.md do what is said of them."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipfx

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "choose.md"
# As users run them; Optax's optimizers mix dtypes.
STANDARD = jax.numpy_dtype_promotion("standard")


def recipe(heading):
    """What the block below a heading defines."""
    text = PAGE.read_text().split("\n## Recipes\n")[1]
    section = text.split(f"\n### {heading}\n")[1].split("\n### ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.M)
    names = {}
    exec("import clipfx, jax, jax.numpy as jnp, optax", names)
    exec(compile(block, heading, "exec"), names)
    return names


def last_of(tx, *grads):
    """The last update, and the state, after some steps."""
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    for g in grads:
        out, state = update(g, state, grads[0])
    return out, state


@STANDARD
def test_around_muon_adamw_is_clipped_and_both_norms_reported():
    names = recipe("Around Muon")
    grads = {"w": jnp.full((4, 4), 2.0), "b": jnp.array([3.0, 4.0])}
    clipped, _ = names["clip"].update(grads, names["clip"].init(grads))
    np.testing.assert_array_equal(clipped["w"], grads["w"])
    np.testing.assert_allclose(clipped["b"], [0.6, 0.8], rtol=1e-6)
    _, state = last_of(names["tx"], grads)
    read = clipfx.metrics.read(state)
    assert read["clip0/norm/muon"] == pytest.approx(8)
    assert read["clip0/norm/adamw"] == pytest.approx(5)


WIDTHS = {16: 3.6, 64: 7.0, 256: 14.4}


@STANDARD
@pytest.mark.parametrize("width", WIDTHS)
def test_behind_muon_a_clip_divides_by_a_constant_of_the_shape(width):
    """Whatever the gradient, over six orders of magnitude, every step is clipped."""
    muon = optax.contrib.muon(1.0, weight_decay=0.0)
    tx = optax.chain(muon, clipfx.clip_by_global_norm(1.0))
    rng, sizes = np.random.default_rng(0), []
    draws = [
        {"w": jnp.asarray(size * rng.normal(size=(width, width)), jnp.float32)}
        for size in (1e-3, 1.0, 1e3, 0.1)
    ]
    state, update = tx.init(draws[0]), jax.jit(tx.update)
    for g in draws:
        _, state = update(g, state, g)
        sizes.append(clipfx.metrics.read(state)["clip0/norm/global"])
    assert clipfx.metrics.read(state)["clip0/clip_rate/global"] == 1
    np.testing.assert_allclose(sizes, WIDTHS[width], rtol=0.05)


@STANDARD
def test_one_layer_starves_all_others():
    # The gradients of a router are noise of norm 5e7, those of the rest a quadratic's.
    clips = {
        "none": optax.identity(),
        "global": clipfx.clip_by_global_norm(1.0),
        "groups": recipe("One layer starves all others")["clip"],
    }
    noise = np.random.default_rng(0).normal(size=(100, 8))
    noise *= 5e7 / np.linalg.norm(noise, axis=1, keepdims=True)

    def loss_after(clip):
        tx = optax.chain(clip, optax.adamw(1e-2, weight_decay=0.0))
        params = {"router": jnp.zeros(8), "mlp": jnp.zeros(8)}

        def step(carry, g):
            params, state = carry
            grads = {"router": g, "mlp": params["mlp"] - 1}
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = params, tx.init(params)
        steps = jax.jit(lambda start, noise: jax.lax.scan(step, start, noise))
        (params, _), _ = steps(start, jnp.asarray(noise, jnp.float32))
        return float(jnp.mean((params["mlp"] - 1) ** 2) / 2)

    losses = {name: loss_after(clip) for name, clip in clips.items()}
    assert losses["none"] == pytest.approx(0.025, abs=0.001)
    assert losses["global"] == pytest.approx(0.10, abs=0.01)
    assert losses["groups"] == pytest.approx(0.004, abs=0.001)


@STANDARD
def test_every_micro_batch_may_be_clipped_or_their_mean():
    names = recipe("Clip every micro-batch")
    grads = [{"w": jnp.array([10.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}]
    step, _ = last_of(names["every"], *grads)
    np.testing.assert_allclose(step["w"], [-0.5, -0.5], rtol=1e-6)
    step, _ = last_of(names["once"].gradient_transformation(), *grads)
    np.testing.assert_allclose(step["w"], [-0.995, -0.0995], rtol=1e-3)


@pytest.mark.full
@STANDARD
def test_bounds_grow_along_the_batch():
    names = recipe("Bounds that grow along the batch")
    factors = np.array([0.2, 1, np.sqrt(3) / 5, 1])
    np.testing.assert_allclose(names["info"].factor[:, 0], factors, rtol=1e-6)
    want = (factors[:, None] * np.asarray(names["batch"])).mean(axis=0)
    np.testing.assert_allclose(names["mean"], want, rtol=2e-6)  # to 2^-20 shorter


@pytest.mark.full
@STANDARD
def test_a_private_step_with_a_soft_adaptive_bound():
    grad, params = recipe("Private, with a soft adaptive bound")["grad"], jnp.zeros(2)
    batch, state = jnp.array([[0.3, 0.4], [3.0, 4.0]] * 2), grad.init(params)
    _, after, info = grad(state, params, batch, where=None)
    assert float(after.threshold[0]) == pytest.approx(1.0)
    sizes = np.asarray(info.norm[:, 0] * info.factor[:, 0])
    np.testing.assert_allclose(sizes[:2], np.tanh([0.5, 5.0]), rtol=1e-4)
    assert (sizes <= 1).all()
    _, later, _ = grad(after, params, batch, where=None)
    assert float(later.threshold[0]) != 1.0  # it adapts


@STANDARD
def test_clipping_without_bias():
    tx = recipe("Clip without bias")["tx"]
    values = np.where(np.random.default_rng(0).random(4000) < 0.1, 10.0, -1.0)
    step = lambda state, g: tx.update(g, state)[::-1]
    start = tx.init(jnp.float32(0))
    _, out = jax.lax.scan(step, start, jnp.asarray(values, jnp.float32))
    assert float(out.mean()) == pytest.approx(-0.1 * values.mean(), abs=0.01)


@STANDARD
@pytest.mark.parametrize("norm", [0.0, 0.0099995, 0.01, 0.0101, 3.0])
def test_the_factor_of_pytorch(norm):
    clip = recipe("PyTorch's factor")["clip"]
    x = np.float32(norm) * np.array([0.6, 0.8], np.float32)
    want = min(1, 0.01 / (norm + 1e-6))
    out, _ = last_of(clip, jnp.asarray(x))
    np.testing.assert_allclose(out, want * x, rtol=1e-6)
    # Without the constant it is longer, by at most a ten-thousandth.
    exact, _ = last_of(clipfx.clip_by_global_norm(0.01), jnp.asarray(x))
    longer = np.asarray(exact)[0] / np.asarray(out)[0] - 1 if norm else 0
    assert longer == pytest.approx(min(1, 0.01 / max(norm, 1e-9)) / want - 1, abs=1e-6)
    assert longer <= 1.01e-4
