"""The metrics of a run that may be killed: JSON lines, TensorBoard, a progress bar."""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2
from tqdm import tqdm

from examples import _common

# Classes of protocol buffers are made when they are imported.
_events: Any = event_pb2
_summaries: Any = summary_pb2


METRICS = "metrics.jsonl"
RESUMES = "resumes.txt"  # steps, one a line


class Log:
    """One row for each step, in order, whatever happened in between.

    A row is in the file before its step can be part of a checkpoint; rows of steps
    that no checkpoint holds are taken out when the run goes on, and written again.
    """

    def __init__(self, directory: pathlib.Path, first: int, steps: int):
        """Goes on at step `first` of `steps`."""
        path = directory / METRICS
        kept = [row for row in read_rows(directory) if row.get("step", first) < first]
        if [row["step"] for row in kept] != list(range(first)):
            tqdm.write(f"{path} does not hold all of the first {first} steps.")
        whole = path.with_suffix(".part")
        _common.write_jsonl(whole, kept)
        whole.replace(path)
        if first:
            with (directory / RESUMES).open("a") as file:
                file.write(f"{first}\n")
        self._file = path.open("a", encoding="utf-8")
        # Not `SummaryWriter`: what its thread has yet to write, its `flush` leaves out.
        board = directory / "tensorboard" / "events"
        board.parent.mkdir(exist_ok=True)
        self._board = EventsWriter(str(board), f".{os.getpid()}")
        self._show(
            first, session_log=_events.SessionLog(status=_events.SessionLog.START)
        )
        self._bar = tqdm(total=steps, initial=first, desc="train")

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds the row of a step; `step` and floats by name."""
        self._file.write(_common.json_line(row))
        self._file.flush()
        values = [
            _summaries.Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step" and math.isfinite(value)
        ]
        self._show(row["step"], summary=_summaries.Summary(value=values))
        note = f"loss {row['loss']:.3f}, norm {row['norm']:.3g}"
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update()

    def _show(self, step: int, **what: Any) -> None:
        event = _events.Event(wall_time=time.time(), step=step, **what)
        self._board.write_event(event)

    def sync(self) -> None:
        """Returns when all rows are on the disk."""
        self._board.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Writes what is left."""
        self._bar.close()
        self._board.close()
        self._file.close()


def resumes_of(directory: pathlib.Path) -> list[int]:
    """The steps that a run was resumed at."""
    path = directory / RESUMES
    return [*map(int, path.read_text().split())] if path.exists() else []


def read_rows(directory: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a run, up to the first that is torn."""
    path, rows = directory / METRICS, []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows
