"""The norms that a run has left in files, of all kinds but Orbax without its package.

JSON lines, CSV, NumPy's arrays, TensorBoard, Orbax, Weights & Biases: each becomes
columns of numbers by name, of which those that look like norms are chosen. Only
checkpoints take JAX to be read.
"""

import csv
import difflib
import importlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from clipfx.calibrate import records

# A norm before the clip, as `clipfx.metrics.read` names it: clip, then group.
_OURS = re.compile(r"(?P<clip>.+)/norm/(?P<group>.+)")
# And as others do, the best first.
_THEIRS = [
    re.compile(rf"(.*[/._ -])?{name}", re.IGNORECASE)
    for name in (r"grad(ient)?s?[/._ -]?norm", r"grad_2\.0_norm_total", "gnorm",
                 r"(global|total)[/._ -]?norm", "norm")
]  # fmt: skip
# Norms of something else, thresholds, and one number for many steps.
_NO_GRADIENT = re.compile(
    r"(^|[/._ -])(batch|clipped|group|largest|layer|max|mean|median|min|params?|"
    r"parameters?|peak|std|updates?|weights?)[/._ -]",
    re.IGNORECASE,
)
_PRIVATE = re.compile(r"(.*[/.])?noise[_ -]multiplier", re.IGNORECASE)
_READABLE = (
    "metrics.jsonl, CSV, .npy or .npz, TensorBoard events, an Orbax checkpoint, an "
    "offline run of Weights & Biases, or the folder of one"
)


class UnreadableRun(ValueError):  # noqa: N818, it is what there is, not what happened
    """Says in one sentence why there are no norms to be had."""


class Run(NamedTuple):
    """Norms of a run.

    Attributes:
      source: The file that they are from.
      norms: From groups to float64 `[T]`, NaN where a step has none.
      notes: Sentences on how they were chosen.
    """

    source: pathlib.Path
    norms: dict[str, np.ndarray]
    notes: tuple[str, ...]


class _Table(NamedTuple):
    """Columns of equal length, NaN where a row has none; text by row; notes."""

    columns: dict[str, np.ndarray]
    labels: list[str]
    notes: list[str]


def read_run(path: str | pathlib.Path, key: str | None = None, number: int = 1) -> Run:
    """Finds the norms of a run.

    Args:
      path: A file or a folder.
      key: The column to take, or the beginning of the names of several, one for each
        group; None for what looks like norms before a clip.
      number: Of the run, from 1, where a file holds several.

    Raises:
      UnreadableRun: If there is nothing to read, or no norm in it.
    """
    path = pathlib.Path(path)
    try:
        source, read = _kind(path)
        table = read(source)
    except OSError as error:
        why = error.strerror or str(error)
        raise UnreadableRun(f"{path} cannot be read: {why}.") from None
    if not table.columns:
        raise UnreadableRun(f"{source} holds no numbers; expected {_READABLE}.")
    columns, notes = _one_run(table, key, number, source)
    names, note = _choose(columns, key, source)
    norms = {group: columns[name] for group, name in names.items()}
    # Rows without a norm are of something else, unless none of them has one.
    logged = ~np.isnan([*norms.values()]).all(axis=0)
    if logged.any():
        norms = {group: x[logged] for group, x in norms.items()}
    clipped = _clip_rate(columns, [*names.values()])
    return Run(source, norms, (*table.notes, *notes, *note, *clipped))


def _kind(path: pathlib.Path) -> tuple[pathlib.Path, Any]:
    """The file that has the metrics, and what reads it."""
    if not path.exists():
        raise UnreadableRun(f"{path} does not exist; expected {_READABLE}.")
    if path.is_dir():
        for pattern, read in _IN_FOLDERS:
            found = sorted(path.rglob(pattern))
            if found:  # of TensorBoard a folder is a run, in one file or more
                return found[0].parent if read is _tensorboard else found[0], read
        if _checkpoint(path):
            return path, _orbax
        raise UnreadableRun(
            f"{path} holds no file that is known; expected {_READABLE}."
        )
    if "tfevents" in path.name:
        return path, _tensorboard
    read = _BY_SUFFIX.get(path.suffix.lower())
    if read is None:
        raise UnreadableRun(
            f"{path} is of no kind that is known; expected {_READABLE}."
        )
    return path, read


# ------------------------------------------------------------------ to columns


def _table(rows: Iterable[Mapping[str, Any]], notes: list[str]) -> _Table:
    """Columns of whatever rows have; other than numbers becomes NaN."""
    rows = [*rows]
    names = dict.fromkeys(name for row in rows for name in row)
    number = lambda x: np.nan if isinstance(x, bool) else _number(x)
    columns = {
        name: np.array([number(row.get(name)) for row in rows], np.float64)
        for name in names
    }
    known = {name: x for name, x in columns.items() if not np.isnan(x).all()}
    bad = {"nan", "inf", "-inf", "infinity"}
    for name in names:  # columns of nothing but NaN are numbers too
        if any(str(row.get(name)).lower() in bad for row in rows):
            known.setdefault(name, columns[name])
    first = lambda row: next((x for x in row.values() if isinstance(x, str) and
                              np.isnan(_number(x))), "")  # fmt: skip
    return _Table(known, [first(row) for row in rows], notes)


def _number(x: Any) -> float:
    try:
        return float(x)
    except (TypeError, ValueError, OverflowError):
        return np.nan


def _json_lines(path: pathlib.Path) -> _Table:
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = _json(text)
    if isinstance(whole, dict):  # of one line, or of Hugging Face's Trainer
        whole = whole.get("log_history", [whole])
    if isinstance(whole, list):
        rows = [row for row in whole if isinstance(row, dict)]
        bad = 0
    else:
        lines = [_json(line) for line in text.splitlines() if line.strip()]
        rows = [row for row in lines if isinstance(row, dict)]
        bad = len(lines) - len(rows)
    if not rows:
        raise UnreadableRun(
            f"{path} holds no line of JSON; expected an object on each."
        )
    notes = [f"{bad} lines of {path} are no JSON and were left out."] if bad else []
    return _table(rows, notes)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _csv(path: pathlib.Path) -> _Table:
    text = path.read_text(encoding="utf-8-sig", errors="replace").replace("\0", "")
    start = text.partition("\n")[0]
    delimiter = max("\t;,", key=start.count)
    try:
        lines = [
            row for row in csv.reader(text.splitlines(), delimiter=delimiter) if row
        ]
    except csv.Error as error:
        raise UnreadableRun(f"{path} is no CSV: {error}.") from None
    if not lines:
        raise UnreadableRun(f"{path} is empty; expected a line of names, then numbers.")
    head, rows = lines[0], lines[1:]
    if not any(np.isnan(_number(x)) for x in head):  # numbers without names
        head, rows = [f"column {k}" for k in range(len(head))], lines
        head = ["norm"] if len(head) == 1 else head
    return _table((dict(zip(head, row, strict=False)) for row in rows), [])


def _numpy(path: pathlib.Path) -> _Table:
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else None
        arrays = {"norm": loaded} if arrays is None else arrays
        columns = {}
        for name, x in arrays.items():
            x = np.asarray(x, np.float64)
            if x.ndim == 2:
                columns |= {f"{name}/{k}": x[:, k] for k in range(x.shape[1])}
            elif x.ndim == 1:
                columns[name] = x
    # Damaged files end in many ways within `zipfile`, `struct` and `ast`.
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UnreadableRun(
            f"{path} holds no array of numbers; write it with np.save(path, norms)."
        ) from None
    sizes = {len(x) for x in columns.values()}
    if len(sizes) > 1:
        raise UnreadableRun(
            f"{path} holds arrays of {len(sizes)} lengths; expected one entry a step."
        )
    return _Table(columns, [], [])


def _tensorboard(path: pathlib.Path) -> _Table:
    files = [path] if path.is_file() else sorted(path.glob("*tfevents*"))
    rows: dict[int, dict[str, float]] = {}
    for file in files:  # later ones go on from a checkpoint, and count
        for tag, step, value in records.tensorboard_scalars(file.read_bytes()):
            rows.setdefault(step, {})[tag] = value
    return _table([rows[step] for step in sorted(rows)], [])


def _wandb(path: pathlib.Path) -> _Table:
    return _table(records.wandb_rows(path.read_bytes()), [])


def _checkpoint(path: pathlib.Path) -> pathlib.Path | None:
    """The newest checkpoint with a tree, of a folder or in one."""
    newest = sorted((x for x in path.iterdir() if x.name.isdigit()),
                    key=lambda x: int(x.name))[-1:]  # fmt: skip
    places = [path, *newest, *(x for y in newest for x in sorted(y.iterdir()))]
    return next((x for x in places if (x / "_METADATA").exists()), None)


def _orbax(path: pathlib.Path) -> _Table:
    # States are JAX's; what is read of other files is not.
    from clipfx.calibrate.history import history

    try:
        checkpoint: Any = importlib.import_module("orbax.checkpoint")
    except ImportError:
        raise UnreadableRun(
            f"{path} is a checkpoint of Orbax, which is not installed; python -m pip "
            "install orbax-checkpoint."
        ) from None
    place = _checkpoint(path)
    try:
        with checkpoint.StandardCheckpointer() as reader:
            found = history(reader.restore(place.absolute() if place else path))
    # Orbax fails in ways of every storage that it knows.
    except Exception as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise UnreadableRun(f"{path} cannot be restored by Orbax: {why}.") from None
    if not found:
        raise UnreadableRun(
            f"{path} remembers no norms; put clipfx.record_norms() in front of the "
            "optimizer that is saved."
        )
    columns = {"/norm/".join(name.split("/", 1)): x for name, x in found.items()}
    size = min(map(len, columns.values()))
    return _Table({name: x[-size:] for name, x in columns.items()}, [], [])


_IN_FOLDERS = [
    ("metrics.jsonl", _json_lines),
    ("*.jsonl", _json_lines),
    ("*.csv", _csv),
    ("*.np[yz]", _numpy),
    ("*tfevents*", _tensorboard),
    ("*.wandb", _wandb),
]
_BY_SUFFIX = {
    ".csv": _csv, ".json": _json_lines, ".jsonl": _json_lines, ".npy": _numpy,
    ".npz": _numpy, ".tsv": _csv, ".wandb": _wandb,
}  # fmt: skip


# ------------------------------------------------------------------- to norms


def _choose(
    columns: Mapping[str, Any], key: str | None, source: pathlib.Path
) -> tuple[dict[str, str], list[str]]:
    """From groups to columns, and what was left aside."""
    if key is not None:
        if key in columns:
            return {key: key}, []
        start = key.rstrip("/") + "/"
        within = {x.removeprefix(start): x for x in columns if x.startswith(start)}
        if within:
            return within, []
        near = difflib.get_close_matches(key, columns, 3, 0.3) or [*columns][:5]
        raise UnreadableRun(f"{source} has no {key!r}; it has {', '.join(near)}.")
    ours = [match for name in columns if (match := _OURS.fullmatch(name))]
    if ours:
        clips = list(dict.fromkeys(match["clip"] for match in ours))
        groups = {m["group"]: m[0] for m in ours if m["clip"] == clips[0]}
        more = ", ".join(f"{clip}/norm" for clip in clips[1:])
        note = f"These are of {clips[0]}/norm; --key takes {more}." if more else ""
        return groups, [note] if note else []
    for pattern in _THEIRS:
        names = [x for x in columns if _is_theirs(x, pattern)]
        groups = [x for x in columns if x.startswith("norm/")]
        if names:
            return {names[0]: names[0]}, []
        if groups and pattern is _THEIRS[-1]:
            return {x.removeprefix("norm/"): x for x in groups}, []
    if any(map(_PRIVATE.fullmatch, columns)):
        raise UnreadableRun(
            f"{source} is of private training and has no norms, which would tell of "
            "the examples: take a threshold from public data, or one that adapts "
            "within the same epsilon, as clipfx.privacy.quantile does."
        )
    some = ", ".join([*columns][:8])
    raise UnreadableRun(
        f"{source} has no column that looks like a gradient norm, but {some}; name one "
        "with --key."
    )


def _is_theirs(name: str, pattern: re.Pattern) -> bool:
    return bool(pattern.fullmatch(name)) and not _NO_GRADIENT.search(name)


def _is_norm(name: str, key: str | None) -> bool:
    if key is not None:
        return name == key or name.startswith(key.rstrip("/") + "/")
    theirs = any(_is_theirs(name, pattern) for pattern in _THEIRS)
    return theirs or name.startswith("norm/") or _OURS.fullmatch(name) is not None


def _one_run(
    table: _Table, key: str | None, number: int, source: pathlib.Path
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The columns of one run; where steps of norms begin again the next follows."""
    size = len(next(iter(table.columns.values())))
    steps = table.columns.get("step", np.full(size, np.nan))
    norms = [x for name, x in table.columns.items() if _is_norm(name, key)]
    known = np.flatnonzero(~np.isnan(steps) & (~np.isnan(norms)).any(axis=0))
    steps = steps[known]
    highest = np.maximum.accumulate(steps)
    back = (steps[1:] <= steps[:1]) & (highest[:-1] > steps[1:])
    again = known[1:][back]
    bounds = [0, *again.tolist(), size]
    if not 0 < number < len(bounds):
        raise UnreadableRun(
            f"{source} holds {len(bounds) - 1} runs, got number {number}; they count "
            "from 1."
        )
    if not len(again):
        return table.columns, []
    here = slice(*bounds[number - 1 : number + 1])
    label = (table.labels[[known[0], *again][number - 1] :] or [""])[0]
    note = (
        f"It holds {len(again) + 1} runs; these are the norms of number {number}"
        f"{f' ({label})' if label else ''}, --run takes others."
    )
    columns = {name: x[here] for name, x in table.columns.items()}
    return {name: x for name, x in columns.items() if not np.isnan(x).all()}, [note]


def _clip_rate(columns: Mapping[str, np.ndarray], names: list[str]) -> list[str]:
    """A note where norms are of a run that was clipped."""
    ours = [name for name in names if _OURS.fullmatch(name)]
    rates = [columns.get(name.replace("/norm/", "/clip_rate/")) for name in ours]
    last = [x[~np.isnan(x)][-1:] for x in rates if x is not None]
    worst = max((float(x[0]) for x in last if len(x)), default=0.0)
    if worst == 0:
        return []
    return [
        f"This run was clipped in {worst:.0%} of its steps; without a clip the norms "
        "would be others."
    ]
