"""Whether what calibrate advises is as good as the best threshold of six.

    python -m benchmarks.advice

Each example trains without a clip, `clipfx.calibrate.suggest` reads the norms, and the
example trains again as it says; where it says to record again, a third time by the
norms of the second run. Beside it a sweep: six thresholds of the global norm, the same
for all examples and chosen without looking. Every seed goes by the norms of its own
run. A run takes seconds to a minute; those that are in `--out` are not repeated.

Examples are smaller than by default, at their default learning rate; of those that
compare rates, at the one that is best without a clip. `outlier_batches` is a scenario
of `benchmarks.spikes`; of `federated` each message of a client is a step.
"""

import functools
import json
import math
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from tqdm import tqdm

import clipfx
from benchmarks import spikes
from clipfx.calibrate.reading import read_run
from examples import (
    _common,
    _grid,
    boosting_loss,
    boxes,
    char_rnn,
    continual,
    diffusion_digits,
    federated,
    gan_digits,
    normalizer_free,
    outliers,
    potential,
    sharp_attention,
    transformer_fsdp,
)

SEEDS = 3
BOUNDS = {"global": clipfx.clip_by_global_norm, "zclip": clipfx.zclip}
SWEEP = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_OUT = flags.DEFINE_string("to", "out/advice.jsonl", "Runs, one a line.")
_ONLY = flags.DEFINE_list("examples", [], "Names; by default all.")


class Run(NamedTuple):
    """Norms `[T]` before the clip, and the score on held-out data, best when small."""

    norms: np.ndarray
    score: float


def run_char_rnn(clip: str, max_norm: float, seed: int) -> Run:
    """SGD at 0.2: bits per character."""
    small = {"steps": 200, "hidden": 128, "batch": 32}
    settings = char_rnn.Settings(max_norm=max_norm, seed=seed, **small)
    history = char_rnn.train(_common.load_text(), clip, 0.2, settings)
    return Run(history.column("norm"), history.held_out)


def run_sharp_attention(clip: str, max_norm: float, seed: int) -> Run:
    """Muon at 0.03: bits per byte."""
    small = {"steps": 200, "length": 32}
    settings = sharp_attention.Settings(max_norm=max_norm, seed=seed, **small)
    history = sharp_attention.train(_common.load_text(), clip, 0.03, settings)
    return Run(history.column("gradient/norm/global"), history.held_out)


def run_diffusion_digits(clip: str, max_norm: float, seed: int) -> Run:
    """Adam at 0.001: the error of the digits predicted."""
    small = {"steps": 2000, "hidden": 128, "batch": 64}
    settings = diffusion_digits.Settings(max_norm=max_norm, seed=seed, **small)
    history = diffusion_digits.train(clip, settings)
    return Run(history.column("norm"), history.held_out)


def run_transformer_fsdp(clip: str, max_norm: float, seed: int) -> Run:
    """AdamW at 0.002: bits per byte."""
    small = {"layers": 1, "length": 32, "dtype": "float32"}
    settings = transformer_fsdp.Settings(seed=seed, **small)
    given: dict[str, Any] = {"clip": clip, "max_norm": max_norm, "save_every": 10**6}
    with tempfile.TemporaryDirectory() as out:
        row = transformer_fsdp.train(
            settings, _common.load_text(), pathlib.Path(out), **given
        )
        (norms,) = read_run(out).norms.values()
    return Run(norms, row["bits/byte"] if row else math.nan)


class Task(NamedTuple):
    """What a small example trains, for any clip.

    Attributes:
      data: From a seed to arrays of training and of held-out data.
      init: From data and a key to parameters.
      draw: From data and a key to a batch.
      loss: Of parameters and a batch.
      rule: The optimizer.
      steps: How many.
      error: Of parameters on held-out data.
    """

    data: Callable[[int], Any]
    init: Callable[[Any, Any], Any]
    draw: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any], Any]
    rule: optax.GradientTransformation
    steps: int
    error: Callable[[Any, Any], Any]


def boosting_task() -> Task:
    """Exponential loss, SGD at 0.0001: the share of held-out rows that are wrong."""
    settings = boosting_loss.Settings()
    table = boosting_loss.load_table(None, None)
    one = lambda *example: boosting_loss.LOSSES["exponential"](
        boosting_loss.margin(*example)
    )
    said = lambda params, data: boosting_loss.margin(
        params, data.test_rows, data.test_labels
    )
    return Task(
        data=lambda seed: boosting_loss.split(*table, settings, seed),
        init=lambda data, key: boosting_loss.init(data.rows.shape[1], settings, key),
        draw=lambda data, key: _pick((data.rows, data.labels), settings.batch, key),
        loss=lambda params, batch: one(params, *batch).mean(),
        rule=optax.sgd(optax.cosine_decay_schedule(1e-4, settings.steps)),
        steps=settings.steps,
        error=lambda params, data: 1 - (said(params, data) > 0).mean(),
    )


def boxes_task() -> Task:
    """-log(IoU), SGD at 0.0003: what is missing of an IoU of 1."""
    settings = boxes.Settings()

    def one(params, image, box):
        return boxes.overlap_loss(boxes.compare(boxes.frame(params, image), box), "log")

    def error(params, data):
        iou = boxes.compare(boxes.frame(params, data.test_images), data.test_boxes).iou
        return 1 - jnp.where(jnp.isfinite(iou), iou, 0).mean()

    return Task(
        data=lambda seed: boxes.make_data(settings, seed),
        init=lambda data, key: boxes.init(settings, key),
        draw=lambda data, key: _pick((data.images, data.boxes), settings.batch, key),
        loss=lambda params, batch: jax.vmap(one, (None, 0, 0))(params, *batch).mean(),
        rule=optax.sgd(optax.cosine_decay_schedule(3e-4, settings.steps), momentum=0.9),
        steps=settings.steps,
        error=error,
    )


def potential_task() -> Task:
    """Lennard-Jones forces, Adam at 0.01: the error of calm clusters."""
    settings = potential.Settings()

    def error(params, data):
        test, calm = data
        each = potential.force_errors(params, test)
        return (each * calm).sum() / calm.sum()

    def data(seed):
        clusters = potential.make_clusters(settings, seed)
        found = potential.split(clusters, "none", settings, seed)
        return found.train, (found.test, found.test.calm(settings.calm))

    return Task(
        data=data,
        init=lambda data, key: potential.init(settings, key),
        draw=lambda data, key: _pick(data[0], settings.batch, key),
        loss=lambda params, batch: jax.vmap(potential.loss, (None, 0))(
            params, batch
        ).mean(),
        rule=optax.adam(optax.cosine_decay_schedule(0.01, settings.steps)),
        steps=settings.steps,
        error=lambda params, data: error(params, data[1]),
    )


def normalizer_free_task() -> Task:
    """Twelve blocks, SGD at 0.03: the share of held-out digits that are wrong."""
    settings = normalizer_free.Settings()
    make = normalizer_free.make_network
    right = lambda params, digits, labels: (
        normalizer_free.apply(params, digits).argmax(-1) == labels
    )
    return Task(
        data=lambda seed: normalizer_free.load_data(),
        init=lambda data, key: make(key, settings.blocks, settings.width),
        draw=lambda data, key: _pick(data[0], settings.batch, key),
        loss=lambda params, batch: normalizer_free.loss_of(params, *batch),
        rule=optax.sgd(0.03, momentum=0.9, nesterov=True),
        steps=settings.steps,
        error=lambda params, data: 1 - right(params, *data[1]).mean(),
    )


def _pick(arrays: Any, size: int, key: Any) -> Any:
    """Rows drawn with replacement."""
    rows = jax.random.randint(key, (size,), 0, len(jax.tree.leaves(arrays)[0]))
    return jax.tree.map(lambda x: x[rows], arrays)


TASKS = {
    "boosting_loss": boosting_task,
    "boxes": boxes_task,
    "potential": potential_task,
    "normalizer_free": normalizer_free_task,
}


@functools.cache
def make_trainer(name: str, clip: str) -> tuple[Task, Callable[..., Any]]:
    """One program for all thresholds and seeds."""
    task = TASKS[name]()

    @jax.jit
    def train(data, max_norm, key):
        tx = optax.chain(BOUNDS[clip](max_norm=max_norm), task.rule)

        def step(learner, key):
            params, state = learner
            grads = jax.grad(task.loss)(params, task.draw(data, key))
            updates, state = tx.update(grads, state, params)
            norm = clipfx.metrics.read(state)["clip0/norm/global"]
            return (optax.apply_updates(params, updates), state), norm

        start, steps = jax.random.split(key)
        params = task.init(data, start)
        keys = jax.random.split(steps, task.steps)
        (params, _), norms = jax.lax.scan(step, (params, tx.init(params)), keys)
        return norms, task.error(params, data)

    return task, train


def run_task(name: str, clip: str, max_norm: float, seed: int) -> Run:
    """One of `TASKS`."""
    task, train = make_trainer(name, clip)
    data = jax.tree.map(jnp.asarray, task.data(seed))
    norms, error = train(data, np.float32(max_norm), jax.random.key(seed))
    return Run(np.asarray(norms), float(error))


def run_outliers(clip: str, max_norm: float, seed: int) -> Run:
    """SGD at 0.003, a tenth of the labels wrong: the share of errors."""
    settings = outliers.Settings(seed=seed)
    data = outliers.load_data(settings.wrong, seed)
    schedule = optax.cosine_decay_schedule(0.003, settings.steps)
    tx = optax.chain(BOUNDS[clip](max_norm=max_norm), optax.sgd(schedule, momentum=0.9))

    def step(learner, batch):
        params, state = learner
        sums, _ = outliers.plain_sum(params, batch)
        grads = jax.tree.map(lambda x: x / batch.where.sum(), sums)
        updates, state = tx.update(grads, state, params)
        norm = clipfx.metrics.read(state)["clip0/norm/global"]
        return (optax.apply_updates(params, updates), state), norm

    epoch = jax.jit(lambda learner, batches: jax.lax.scan(step, learner, batches))
    learner, norms = outliers.start(tx, 1.0, seed)[:2], []
    for batches in outliers.draw_batches(data, settings, seed):
        learner, seen = epoch(learner, batches)
        norms.append(np.asarray(seen))
    said = np.asarray(outliers.predict(learner[0], data.test_images))
    return Run(np.concatenate(norms), float((said != data.test_labels).mean()))


def run_continual(of: str, clip: str, max_norm: float, seed: int) -> Run:
    """SGD at 0.2, clipped in the second task: the share of errors after it."""
    settings = continual.Settings()
    variant = _grid.Variant("global", max_norm, settings.rate, seed)
    (history,) = continual.train([variant], settings, BOUNDS[clip])
    return Run(history.norms, 1 - continual.scores(history, settings.steps)[of])


def run_gan_digits(clip: str, max_norm: float, seed: int) -> Run:
    """Momentum at 0.003, the generator clipped: classes that it does not draw."""
    assert clip == "global"
    variant = _grid.Variant("generator", max_norm, 0.003, seed)
    (history,) = gan_digits.train([variant], gan_digits.Settings())
    return Run(history.norms, 10 - gan_digits.scores(history)["classes"])


def run_federated(spoiled: float, clip: str, max_norm: float, seed: int) -> Run:
    """The server's rate at 10: the share of errors.

    Norms are of messages, many in a round. Of advice to take `zclip` only the bound
    is followed.
    """
    del clip
    settings = federated.Settings()
    method = "none" if max_norm == math.inf else "clip"
    server = federated.Server(*map(np.float32, (max_norm, 10.0, spoiled, 0.0)))
    given = federated.load_data(settings, seed), server, jax.random.key(seed)
    seen = federated.train(*given, method=method, settings=settings)
    sent = np.asarray(seen["norms"]).ravel()
    return Run(sent[sent != 0], 1 - federated.score(seen)["accuracy"])


@functools.cache
def train_on_outlier_batches(clip: str, max_norm: float) -> spikes.Runs:
    """Three seeds at once."""
    scenario = spikes.SCENARIOS["outliers"]
    batches = spikes.make_batches("outliers", scenario.steps, 3)
    tx = spikes.before(BOUNDS[clip](max_norm=max_norm))(scenario.b2)
    with tqdm(total=scenario.steps, desc=f"{clip} {max_norm:g}") as progress:
        return spikes.train(tx, [0.004], batches, 20.0, progress)


def run_outlier_batches(clip: str, max_norm: float, seed: int) -> Run:
    """AdamW at 0.004, of `benchmarks.spikes`: bits per character."""
    runs = train_on_outlier_batches(clip, max_norm)
    return Run(runs.norm[:, 0, seed], float(runs.held_out[0, seed]))


EXAMPLES: dict[str, Callable[[str, float, int], Run]] = {
    "char_rnn": run_char_rnn,
    "outliers": run_outliers,
    "sharp_attention": run_sharp_attention,
    "transformer_fsdp": run_transformer_fsdp,
    "diffusion_digits": run_diffusion_digits,
    "outlier_batches": run_outlier_batches,
    **{name: functools.partial(run_task, name) for name in TASKS},
    "continual": functools.partial(run_continual, "second"),
    "continual, both": functools.partial(run_continual, "both"),
    "gan_digits": run_gan_digits,
    "federated": functools.partial(run_federated, 0.0),
    "federated, spoiled": functools.partial(run_federated, 0.01),
}


class Runs:
    """Those of a file, and new ones that are added to it."""

    def __init__(self, path: pathlib.Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.path, self.known = path, {}
        for line in lines:
            *key, norms, score = json.loads(line)
            self.known[tuple(key)] = Run(np.array(norms, np.float64), score)

    def get(self, example: str, clip: str, max_norm: float, seed: int) -> Run:
        """A run, trained if it is not there."""
        key = (example, clip, max_norm, seed)
        if key not in self.known:
            run = EXAMPLES[example](clip, max_norm, seed)
            norms = [float(f"{x:.6g}") for x in run.norms]
            with self.path.open("a") as file:
                file.write(json.dumps([*key, norms, run.score]) + "\n")
            self.known[key] = run
        return self.known[key]


def follow(runs: Runs, example: str, seed: int) -> tuple[str, float]:
    """What was advised in the end, and the score with it."""
    run = runs.get(example, "global", math.inf, seed)
    said = []
    for _ in range(2):
        found = clipfx.calibrate.suggest(run.norms)
        named = re.fullmatch(r"(\w+)\((?:max_norm=)?([\d.e+-]+)\)", found.begin)
        assert named is not None  # of one group nothing else is advised
        method, max_norm = named.groups()
        clip = {"clip_by_global_norm": "global"}.get(method, method)
        run = runs.get(example, clip, float(max_norm), seed)
        said.append(f"{clip} {max_norm}" if clip != "global" else max_norm)
        if "record again" not in found.advice:
            break
    return ", then ".join(said), run.score


def show(mean: float, deviation: float) -> str:
    """Both, or that most runs diverged."""
    return f"{mean:.4g} ({deviation:.2g})" if math.isfinite(mean) else "diverged"


def compare(runs: Runs, example: str) -> dict[str, str]:
    """A row of the table: means over seeds, and deviations."""
    score = lambda c, seed: runs.get(example, "global", c, seed).score
    scores = {c: [score(c, k) for k in range(SEEDS)] for c in (*SWEEP, math.inf)}
    means = {c: float(np.mean(x)) for c, x in scores.items()}
    best = min(SWEEP, key=lambda c: np.inf if np.isnan(means[c]) else means[c])
    advised = [follow(runs, example, seed) for seed in range(SEEDS)]
    found = [x for _, x in advised]
    spread = lambda x: float(np.std(x, ddof=1))
    noise = math.sqrt(2) * spread(scores[best])
    gap = float(np.mean(found)) - means[best]
    verdict = "within noise" if abs(gap) <= noise else "worse" if gap > 0 else "better"
    return {
        "example": example,
        "no clip": show(means[math.inf], spread(scores[math.inf])),
        **{f"{c:g}": f"{means[c]:.4g}" for c in SWEEP},
        "best of six": show(means[best], spread(scores[best])),
        "advised": show(float(np.mean(found)), spread(found)),
        "": verdict,
        "at": "; ".join(text for text, _ in advised),
    }


def main(argv: list[str]) -> None:
    """Prints the table as Markdown, a row as soon as it is known."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every move
    runs = Runs(pathlib.Path(_OUT.value))
    for k, example in enumerate(_ONLY.value or EXAMPLES):
        row = compare(runs, example)
        if k == 0:
            print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
        print(f"| {' | '.join(row.values())} |", flush=True)
    print(
        "\nScores on held-out data, best when small: means of seeds (deviations). "
        "within noise: the gap to\nthe best of six is at most the root of two times "
        "the deviation of that. at: of each seed."
    )


if __name__ == "__main__":
    app.run(main)
