"""Loops and loggers of other libraries in docs/logging.md, and docs/adapters.md."""

import contextlib
import importlib
import json
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import snippets
from trees import enable_x64
from zoo import lenient

import clipfx

WATCH = "Loops that hide the state"


@pytest.fixture(autouse=True)
def as_users(tmp_path, monkeypatch):
    """In a folder of their own, without the strictest rules that JAX has."""
    monkeypatch.chdir(tmp_path)
    with lenient(), warnings.catch_warnings():
        warnings.simplefilter("default")  # theirs
        yield


@pytest.fixture
def keras_names(monkeypatch):
    """Keras numbers its layers, here and in the next test, from the start."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="keras is not installed")
    keras.utils.clear_session()
    yield
    keras.utils.clear_session()


new_names = pytest.mark.usefixtures("keras_names")


def needs(*libraries):
    for library in libraries:
        pytest.importorskip(library, reason=f"{library} is not installed")


def steps_of(rows, group="global"):
    return sorted(row[f"clip0/steps/{group}"] for row in rows)


# ------------------------------------------------------------- docs/logging.md


def test_weights_and_biases(tmp_path):
    needs("wandb")
    from clipfx.calibrate.reading import UnreadableRun, read_run

    names = snippets.run("logging", "Logging", "Weights & Biases")
    norms, until = {}, time.monotonic() + 60
    while not norms and time.monotonic() < until:  # another process writes it
        with contextlib.suppress(UnreadableRun):
            norms = read_run(tmp_path / "runs").norms
        time.sleep(0.1)
    last = clipfx.metrics.read(names["opt_state"])
    assert norms["encoder"] == pytest.approx([last["clip0/norm/encoder"]])


def test_clu(tmp_path):
    needs("clu", "tensorflow", "tensorboard")
    from clipfx.calibrate.reading import read_run

    names = snippets.run("logging", "Logging", "CLU")
    norms = read_run(tmp_path / "runs" / "clu").norms
    last = clipfx.metrics.read(names["opt_state"])
    assert norms["encoder"] == pytest.approx([last["clip0/norm/encoder"]])


def test_haiku():
    needs("haiku")
    row = snippets.run("logging", "Haiku")["row"]
    assert row["clip0/norm/mlp/_/linear_0"] > 0


@new_names
def test_keras():
    row = snippets.run("logging", "Keras")["row"]
    assert len([key for key in row if "/norm/" in key]) == 2
    assert all(row[key] > 0 for key in row if "/norm/" in key)


def test_numpyro():
    needs("numpyro")
    names = snippets.run("logging", WATCH, "NumPyro")
    jax.effects_barrier()
    assert steps_of(names["rows"]) == [*range(1, 51)]
    assert names["row"]["clip0/norm/global"] > 0
    assert names["row"]["clip0/steps/global"] == 50


def test_numpyro_passes_the_loss():
    needs("numpyro")
    names = snippets.run("logging", WATCH, "NumPyro")
    tx = clipfx.skip_spikes(names["tx"])
    svi = names["SVI"](names["model"], names["svi"].guide, tx, names["Trace_ELBO"]())
    result = svi.run(jax.random.key(0), 2, jnp.arange(5.0), progress_bar=False)
    assert clipfx.metrics.read(result.state.optim_state)["clip0/norm/loss"] > 0


def test_optimistix():
    needs("optimistix")
    names = snippets.run("logging", "Optimistix")
    np.testing.assert_allclose(names["solution"].value, 3, atol=1e-3)
    assert names["row"]["clip0/clipped/global"] > 0


def test_a_skipped_step_looks_like_convergence_to_optimistix():
    needs("optimistix")
    optx = importlib.import_module("optimistix")
    tx = clipfx.skip_spikes(optax.adam(0.1), max_norm=1.0)
    bowl = lambda y, args: jnp.sum((y - 3.0) ** 2)
    solver = optx.OptaxMinimiser(tx, rtol=1e-6, atol=1e-6)
    solution = optx.minimise(bowl, solver, jnp.zeros(2), max_steps=1000)
    assert solution.result == optx.RESULTS.successful  # where it began
    np.testing.assert_array_equal(solution.value, 0)
    assert int(solution.state.opt_state.skipped) > 0


def test_gpjax():
    needs("gpjax")
    with enable_x64(True):
        names = snippets.run("logging", WATCH, "GPJax")
    assert steps_of(names["rows"]) == [*range(1, 21)]


def test_flowjax():
    needs("flowjax")
    names = snippets.run("logging", WATCH, "FlowJAX")
    assert steps_of(names["rows"]) == [1, 2]  # one batch of 180 an epoch


# ------------------------------------------------------------ docs/adapters.md


@new_names
def test_keras_optimizer(tmp_path):
    names = snippets.run("adapters", "A Keras optimizer")
    keras, x, seen = names["keras"], names["x"], names["history"].history
    first, *_ = [key.split("/norm/")[1] for key in seen if "/norm/" in key]
    assert seen[f"clip0/steps/{first}"] == [2, 4, 6]
    assert seen[f"clip0/target_norm/{first}"] == pytest.approx([0.1] * 3, rel=1e-5)
    assert seen["loss"][-1] < seen["loss"][0]

    def fresh(**kwargs):
        layers = [keras.layers.Dense(16), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((8,)), *layers])
        model.compile(names["Optax"](names["tx"], **kwargs), loss="mse")
        model.optimizer.build(model.trainable_variables)
        return model

    # Weights and state are saved together, and loaded into a new model.
    names["model"].save_weights(tmp_path / "all.weights.h5")
    again = fresh()
    again.load_weights(tmp_path / "all.weights.h5")
    counts = lambda model: [
        number
        for name, number in clipfx.metrics.read(model.optimizer.state).items()
        if "/steps/" in name
    ]
    assert counts(again) == [6, 6]
    # The mean of two batches is clipped once.
    twice = fresh(gradient_accumulation_steps=2)
    twice.fit(x, x[:, :1], epochs=1, batch_size=16, verbose=0)
    assert counts(twice) == [2, 2]


@new_names
def test_keras_optimizer_takes_the_steps_of_optax():
    names = snippets.run("adapters", "A Keras optimizer")
    keras, x = names["keras"], names["x"]
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile(names["Optax"](names["tx"]), loss="mse")
    kernel, bias = [v.value for v in model.trainable_variables]
    params = {"dense": {"kernel": jnp.array(kernel), "bias": jnp.array(bias)}}
    loss = lambda p: jnp.mean(
        (x @ p["dense"]["kernel"] + p["dense"]["bias"] - x[:, :1]) ** 2
    )
    state = names["tx"].init(params)
    for _ in range(2):
        updates, state = names["tx"].update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    model.fit(x, x[:, :1], epochs=2, batch_size=64, shuffle=False, verbose=0)
    np.testing.assert_allclose(
        model.trainable_variables[0].value, params["dense"]["kernel"], atol=1e-5
    )


def test_levanter():
    needs("levanter", "jmp")
    import draccus
    import haliax as hax
    import jmp
    from levanter.callbacks import StepInfo
    from levanter.tracker.tracker import DictTracker
    from levanter.trainer_state import TrainerState

    names = snippets.run("adapters", "Levanter")
    given = {"type": "clipped_adamw", "max_norm": 0.5}
    tx = draccus.decode(names["OptimizerConfig"], given).build(100)
    model = hax.nn.Linear.init(
        hax.Axis("i", 8), hax.Axis("o", 2), key=jax.random.key(0)
    )
    kind = {"key": jax.random.key(0), "is_trainable": True, "mp": jmp.get_policy("f32")}
    state = TrainerState.init(tx, model, **kind)
    grads = jax.tree.map(jnp.ones_like, state.trainable_model)
    state, _ = state.take_step(grads, loss=jnp.float32(2), key=jax.random.key(1))
    with names["levanter"].tracker.current_tracker(DictTracker()) as tracker:
        names["log_clips"](StepInfo(state, 2.0, 0.1))
    seen = tracker.metrics["step_0"]
    assert seen["clip0/norm/loss"] == 2
    assert seen["clip1/target_norm/global"] == pytest.approx(0.5, rel=1e-5)


def test_tunix():
    needs("tunix")
    names = snippets.run("adapters", "Tunix")
    logger = names["trainer"].metrics_logger
    history = lambda name: logger.get_metric_history("", name, "train")
    ours, theirs = history("clip0/norm/global"), history("grad_norm")
    np.testing.assert_allclose(ours[:2], theirs[1:], rtol=1e-5)
    np.testing.assert_allclose(history("clip0/target_norm/global"), 0.1, rtol=1e-5)


def test_maxtext(tmp_path, monkeypatch):
    needs("maxtext", "pathwaysutils")
    from maxtext.optimizers import optimizers
    from maxtext.trainers.pre_train import train
    from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR

    # What the snippet replaces is put back behind the test.
    monkeypatch.setattr(optimizers, "get_optimizer", optimizers.get_optimizer)
    monkeypatch.setattr(train, "train_step", train.train_step)
    snippets.run("adapters", "MaxText")
    settings = {
        "run_name": "tiny", "base_output_directory": tmp_path, "steps": 2,
        "hardware": "cpu", "dataset_type": "synthetic", "attention": "dot_product",
        "gradient_clipping_threshold": 0, "metrics_file": tmp_path / "metrics.jsonl",
        "base_emb_dim": 16, "base_mlp_dim": 32, "base_num_query_heads": 2,
        "base_num_kv_heads": 2, "base_num_decoder_layers": 2, "head_dim": 8,
        "vocab_size": 64, "max_target_length": 16, "per_device_batch_size": 1,
        "enable_checkpointing": False, "enable_goodput_recording": False,
        "monitor_goodput": False, "skip_jax_distributed_system": True,
    }  # fmt: skip
    flags = [f"{name}={value}" for name, value in settings.items()]
    train.main(["", f"{MAXTEXT_CONFIGS_DIR}/base.yml", *flags])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert row["clip0/target_norm/global"] == pytest.approx(0.5, rel=1e-5)
        theirs = row["learning/raw_grad_norm"]
        assert row["clip0/norm/global"] == pytest.approx(theirs, rel=1e-4)
    assert len(lines) == 2
