"""The loss of boosting on data with wrong labels, with and without a clip.

    python -m examples.boosting_loss
    python -m examples.boosting_loss --data=table.csv --label=outcome --spoiled=0

The exponential loss of AdaBoost, exp(-m) at margin m, has a gradient that grows
exponentially with how wrong an example is told to be: what is mislabelled, or far out,
outweighs all the rest. A small network learns which tumours are benign, scikit-learn's
breast cancer data, from rows of which one in ten has the wrong label and one in fifty
was written down in a wrong unit, ten times too large; held-out rows are as they were.
`global` clips the gradient of a batch, `per_example` that of each row. So do the same
with the logistic loss, whose gradient in m is bounded: the other remedy.

CSV files have a line of names, numbers, and a column of two labels, the last one or
--label; .npz files have numbers `x` [rows, columns] and labels `y` [rows].

Each method is shown at its best rate, by the mean over five seeds, and +- is their
standard deviation. By default, in the share of held-out rows that are right:

                   none            global          per_example
    exponential    0.772 +- 0.09   0.944 +- 0.02   0.965 +- 0.01
    logistic       0.953 +- 0.01   0.952 +- 0.01   0.965 +- 0.01

Without a clip the exponential loss diverges with some seed at all rates above 1e-4,
where it learns too little. A clip of the batch saves it, and one of each row makes the
loss not matter: what remains of a gradient at the threshold is its direction. Rows
differ between seeds more than these two clips do; with no seed is `global` ahead.
"""

import csv
import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import clipfx
from clipfx import per_example
from examples import _common, _run, _sweep

METHODS = {"none": "C0", "global": "C1", "per_example": "C2"}  # and their colours
# Of the margin; negative where the label is not what the network says.
LOSSES = {
    "exponential": lambda m: jnp.exp(-m),
    "logistic": lambda m: jax.nn.softplus(-m),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that all runs share; each is a flag of the same name."""

    loss: tuple[str, ...] = _run.flag(tuple(LOSSES), "Losses to compare.", among=LOSSES)
    clip: tuple[str, ...] = _run.flag(
        tuple(METHODS), "Methods to compare.", among=METHODS
    )
    rates: tuple[float, ...] = _run.flag(
        (1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0), "Learning rates.", above=0
    )
    max_norm: float = _run.flag(1.0, "Threshold of both clips.", above=0)
    wrong: float = _run.flag(0.1, "Fraction of wrong labels.", least=0, below=0.5)
    spoiled: float = _run.flag(
        0.02, "Fraction of rows in a wrong unit, ten times too large.", least=0, most=1
    )
    width: int = _run.flag(32, "Hidden units.", least=1)
    steps: int = _run.flag(1500, "Training steps of each run.", least=1)
    batch: int = _run.flag(32, "Batch size.", least=1)
    data: str | None = _run.flag(None, "A .csv or .npz file of your own.")
    label: str | None = _run.flag(None, "Name of the column of labels in a .csv file.")
    runs: int = _run.flag(5, "Random seeds of each variant.", least=1)
    seed: int = _run.flag(0, "First random seed.", least=0)


class Data(NamedTuple):
    """Rows `[n, columns]` to train on, labels 1 or -1 `[n]`; and those held out."""

    rows: Any
    labels: Any
    test_rows: Any
    test_labels: Any


def load_table(path: str | None, label: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows, and labels 1 and -1, the larger one of two in a file being 1.

    Raises:
      ValueError: If it is no table of finite numbers with two labels.
    """
    if path is None:
        from sklearn.datasets import load_breast_cancer

        rows, labels = map(np.asarray, load_breast_cancer(return_X_y=True))
    else:
        read = {".csv": _read_csv, ".npz": _read_npz}.get(pathlib.Path(path).suffix)
        if read is None:
            raise ValueError(f"--data must be a .csv or a .npz file, got {path!r}.")
        rows, labels = read(path, label)
    kinds, index = np.unique(labels, return_inverse=True)
    if len(kinds) != 2:
        raise ValueError(f"{path!r} must have two labels, got {len(kinds)}.")
    if rows.ndim != 2 or len(rows) != len(labels) or not np.isfinite(rows).all():
        raise ValueError(
            f"{path!r} must have one row of finite numbers for each label, got rows of "
            f"shape {rows.shape} for {len(labels)} labels."
        )
    return rows, 2.0 * index.reshape(-1) - 1


def _read_csv(path: str, label: str | None) -> tuple[np.ndarray, np.ndarray]:
    with open(path, newline="", encoding="utf-8") as file:
        names, *lines = [line for line in csv.reader(file) if line] or [[]]
    if label is not None and label not in names:
        raise ValueError(f"{path!r} has no column {label!r}.")
    if any(len(line) != len(names) for line in lines):
        raise ValueError(f"{path!r} has lines of different length.")
    at = names.index(label) if label is not None else len(names) - 1
    try:
        rows = [[float(x) for x in line[:at] + line[at + 1 :]] for line in lines]
    except ValueError as error:
        raise ValueError(f"{path!r} must hold numbers: {error}.") from None
    return np.array(rows), np.array([line[at] for line in lines])


def _read_npz(path: str, label: str | None) -> tuple[np.ndarray, np.ndarray]:
    del label
    with np.load(path) as file:
        if not {"x", "y"} <= {*file}:
            raise ValueError(f"{path!r} must hold arrays x and y, got {[*file]}.")
        return np.asarray(file["x"], float), file["y"]


def split(rows: np.ndarray, labels: np.ndarray, settings: Settings, seed: int) -> Data:
    """Holds a third out, scales by what is right, and spoils the rest."""
    rng = np.random.default_rng(seed)
    test, rest = np.split(rng.permutation(len(labels)), [len(labels) // 3])
    rows = (rows - rows[rest].mean(0)) / np.maximum(rows[rest].std(0), 1e-6)
    chosen = lambda share: rng.permutation(len(rest)) < round(share * len(rest))
    mine = np.where(chosen(settings.spoiled)[:, None], 10, 1) * rows[rest]
    told = np.where(chosen(settings.wrong), -1, 1) * labels[rest]
    return Data(*(x.astype(np.float32) for x in (mine, told, rows[test], labels[test])))


def init(columns: int, settings: Settings, key: Any) -> Any:
    """Weights of a network with one hidden layer."""
    shapes = {"in": (columns, settings.width), "out": (settings.width,)}
    keys = dict(zip(shapes, jax.random.split(key), strict=True))
    weights = {
        k: jax.random.normal(keys[k], s) / s[0] ** 0.5 for k, s in shapes.items()
    }
    return weights | {"bias": jnp.zeros(settings.width), "offset": jnp.zeros(())}


def margin(params: Any, row: Any, label: Any) -> jax.Array:
    """What the network says `[...]` of rows `[..., columns]`, times the label."""
    hidden = jax.nn.relu(row @ params["in"] + params["bias"])
    return label * (hidden @ params["out"] + params["offset"])


@functools.partial(jax.jit, static_argnames=("loss", "method", "settings"))
def train(
    data: Data, rate: Any, key: Any, *, loss: str, method: str, settings: Settings
) -> dict[str, jax.Array]:
    """Trains one network.

    Returns:
      Held-out `accuracy`, the norm of the gradient of each step `[steps]`, that of a
      batch as the optimizer's chain gets it, and whether the end is `finite`.
    """
    one = lambda params, row, label: LOSSES[loss](margin(params, row, label))
    bounded = per_example.clipped_grad(one, settings.max_norm, batch_argnums=(1, 2))
    limit = settings.max_norm if method == "global" else np.inf
    tx = optax.chain(
        clipfx.clip_by_global_norm(limit),
        optax.sgd(optax.cosine_decay_schedule(1.0, settings.steps)),
        optax.scale(rate),
    )

    def step(carry, key):
        params, state = carry
        pick = jax.random.randint(key, (settings.batch,), 0, len(data.labels))
        batch = data.rows[pick], data.labels[pick]
        if method == "per_example":
            grads = optax.tree.scale(1 / settings.batch, bounded(params, *batch)[0])
        else:
            grads = jax.grad(lambda p: one(p, *batch).mean())(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), optax.tree.norm(grads)

    params = init(data.rows.shape[1], settings, jax.random.fold_in(key, 0))
    keys = jax.random.split(jax.random.fold_in(key, 1), settings.steps)
    (params, _), norms = jax.lax.scan(step, (params, tx.init(params)), keys)
    said = margin(params, data.test_rows, data.test_labels)
    return {
        "accuracy": (said > 0).mean(),  # 0 if it is NaN
        "norms": norms,
        "finite": jnp.isfinite(said).all(),
    }


def plot(rows: Sequence[dict[str, Any]], norms: Sequence[np.ndarray]) -> Figure:
    """Accuracy over rates; and norms over steps, of the first seed at the best rate."""
    of = {id(row): norm for row, norm in zip(rows, norms, strict=True)}
    figure = Figure(figsize=(9, 4), layout="constrained")
    accuracy, steps = figure.subplots(1, 2)
    styles = dict(zip(LOSSES, ("-", ":"), strict=True))
    for (loss,), some in _sweep.groups(rows, ("loss",)).items():
        style = {"ls": styles[loss], "marker": "o", "ms": 4}
        _sweep.draw_over(accuracy, some, "rate", "accuracy", METHODS, **style)
        for (method,), own in _sweep.groups(some, ("method",)).items():
            first = _sweep.best(own, ("rate",), "accuracy")[0]
            if loss == "exponential":
                color, label = METHODS[method], f"{method}, rate {first['rate']:g}"
                steps.plot(of[id(first)], color=color, lw=0.7, alpha=0.8, label=label)
    accuracy.set(
        xlabel="learning rate (dotted: logistic loss)",
        ylabel="held-out accuracy",
        xscale="log",
        ylim=(0.5, 1.0),
    )
    accuracy.legend(*_first_of_each(accuracy), loc="lower left")
    steps.set(xlabel="step", ylabel="norm of the gradient", yscale="log")
    steps.set_title("exponential loss, before a global clip", fontsize=10)
    if steps.lines:
        steps.legend()
    return figure


def _first_of_each(axes: Any) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    first = {
        label: handle
        for handle, label in reversed([*zip(handles, labels, strict=True)])
    }
    return [*first.values()][::-1], [*first][::-1]


def run(settings: Settings, out: _run.Out) -> None:
    """Trains with every loss, method and rate; prints and writes what came out."""
    rows, labels = load_table(settings.data, settings.label)
    if len(labels) < 6:
        raise ValueError(f"{len(labels)} rows are too few to learn from.")
    seeds = range(settings.seed, settings.seed + settings.runs)
    data = {seed: split(rows, labels, settings, seed) for seed in seeds}
    runs = _sweep.every(
        loss=settings.loss, method=settings.clip, rate=settings.rates, seed=seeds
    )
    norms = []
    progress = tqdm(runs, desc="runs")
    known: set[Any] = set()
    for row in progress:
        seen, seconds = _sweep.timed(
            train, known,
            data[row["seed"]], np.float32(row["rate"]), jax.random.key(row["seed"]),
            loss=row["loss"], method=row["method"], settings=settings,
        )  # fmt: skip
        norms.append(np.asarray(seen["norms"]))
        row |= {
            "accuracy": float(seen["accuracy"]),
            "median norm": float(np.median(norms[-1])),
            "largest norm": float(norms[-1].max()),
            "diverged": not bool(seen["finite"]),
            "ms/step": 1000 * seconds / settings.steps,
        }
        note = f"{row['loss']}, {row['method']}, rate {row['rate']:g}: "
        progress.set_postfix_str(note + f"{row['accuracy']:.3f} right", refresh=False)
    by = ("loss", "method")
    shown = ("accuracy", "median norm", "largest norm", "ms/step")
    table = _sweep.compared(runs, by, ("rate",), "accuracy", shown)
    print("\n" + _common.format_table([*table]))
    print(
        "accuracy: of held-out rows, 0 where a run diverged; norms: of the gradient of "
        "a batch,\nbefore a global clip; ms/step: of a training, after compiling; +-: "
        "standard deviation\nover seeds. rate: the one with the best accuracy."
    )
    for (loss, method), own in _sweep.groups(runs, by).items():
        lost = sorted({row["rate"] for row in own if row["diverged"]})
        if lost:
            print(f"{loss}, {method}: some run diverged at rate {lost[0]:g} and above.")
    out.jsonl([*runs, *_sweep.norms_by_step(runs, norms, by, "accuracy")])
    out.figure(plot(runs, norms), "boosting_loss.png")


if __name__ == "__main__":
    _run.main(run, Settings)
