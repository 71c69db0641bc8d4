"""`python -m clipfx.calibrate RUN`: what the norms of a run say about its clip."""

import argparse
import json
import math
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from clipfx.calibrate.reading import UnreadableRun, read_run
from clipfx.calibrate.report import page
from clipfx.calibrate.suggest import study


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table, or with `--json` the same for programs; returns the exit status.

    0, or 1 if there are no norms to be had from RUN, or too few. `argparse` exits with
    2 where arguments are wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m clipfx.calibrate",
        description="First settings of a clip, from the gradient norms of a run.",
    )
    parser.add_argument(
        "run",
        help="metrics.jsonl, CSV, .npy or .npz, TensorBoard events, an Orbax "
        "checkpoint with clipfx.record_norms(), an offline run of Weights & Biases; or "
        "the folder of one",
    )
    parser.add_argument("--key", help="the column of norms, or where several begin")
    parser.add_argument(
        "--run", type=int, default=1, dest="number", help="which, if RUN holds several"
    )
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[0.01, 0.05, 0.1],
        help="shares of steps to clip, as 0.05 for five percent",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--html", metavar="FILE", help="a page with pictures besides")
    given = parser.parse_args(arguments)
    for rate in given.rates:
        if not 0 < rate < 1:
            parser.error(
                f"--rates takes shares in (0, 1), got {rate:g}; for five percent write "
                "0.05."
            )
    try:
        run = read_run(given.run, given.key, given.number)
        found, replays = study(run.norms, given.rates)
    except UnreadableRun as error:
        print(error, file=sys.stderr)
        return 1
    except ValueError as error:  # too few, or negative
        print(f"{given.run}: {error}", file=sys.stderr)
        return 1
    if given.html:
        text = page(str(run.source), run.norms, found, replays, run.notes)
        try:
            pathlib.Path(given.html).write_text(text, encoding="utf-8")
        except OSError as error:
            print(f"{given.html} cannot be written: {error.strerror}.", file=sys.stderr)
            return 1
    if given.json:
        seen = {"source": str(run.source), "notes": run.notes, **_plain(found)}
        print(json.dumps(seen, indent=2, allow_nan=False))
    else:
        print("\n".join([str(run.source), *run.notes, "", str(found)]))
    return 0


def _plain(x: Any) -> Any:
    """Named tuples as dicts, and null for what JSON has no number for."""
    if isinstance(x, tuple) and hasattr(x, "_asdict"):
        return {name: _plain(value) for name, value in x._asdict().items()}
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    if isinstance(x, tuple | list):
        return [_plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)
