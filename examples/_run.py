"""What every example does around its training: flags, results, errors.

An example has a frozen dataclass `Settings` whose fields are `flag(...)`, a function
`run(settings, out)`, and at its end `main(run, Settings)`.
"""

import dataclasses
import difflib
import itertools
import json
import logging
import math
import operator
import os
import pathlib
import sys
import tempfile
import textwrap
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from matplotlib.figure import Figure

from examples import _common

SETTINGS = "settings.json"
_KINDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    bool: ("true or false", ""),
}
_TESTS = {
    "least": operator.ge,
    "most": operator.le,
    "above": operator.gt,
    "below": operator.lt,
}
_WORDS = {
    "least": "of at least",
    "most": "of at most",
    "above": "greater than",
    "below": "less than",
}


def flag(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    among: Collection[Any] | None = None,
    resumes: bool = False,
) -> Any:
    """A field of a dataclass of settings that is a flag of the same name.

    Its type is int, float, str or bool, a tuple of one of the first three (given as a
    list with commas, each value once; empty only if the default is), or one of these
    and None.

    Args:
      default: Its value if it is not given.
      help: A sentence.
      least: The smallest value.
      most: The largest; `math.inf` allows infinity, which is no value otherwise.
      above: All values are greater.
      below: All values are smaller.
      among: The values there are.
      resumes: Whether a run in the same directory may go on with another value. An
        example with such a flag resumes what is there, and has no `--overwrite`.
    """
    limits = {"least": least, "most": most, "above": above, "below": below}
    about = {"help": help, "among": among, "resumes": resumes, "limits": limits}
    return dataclasses.field(default=default, metadata={"flag": about})


class Out:
    """The directory of results of one run.

    It is there from the beginning, and `settings.json` in it from the first file on.

    Attributes:
      folder: The directory.
      wrote: Names of what was written.
    """

    def __init__(self, folder: pathlib.Path, record: dict[str, Any]):
        self.folder, self.record = folder, record
        self.wrote: list[str] = []

    def path(self, name: str) -> pathlib.Path:
        """Where to write the file, or directory, of a name."""
        if not self.wrote:
            # Whole at once: other processes of the run may be reading it.
            part = self.folder / f".{SETTINGS}.{os.getpid()}"
            part.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
            part.replace(self.folder / SETTINGS)
        self.wrote += [name] if name not in self.wrote else []
        return self.folder / name

    def jsonl(
        self, rows: Iterable[dict[str, Any]], name: str = "metrics.jsonl"
    ) -> None:
        """Writes one JSON object a line; null for what is not finite."""
        _common.write_jsonl(self.path(name), rows)

    def figure(self, figure: Figure, name: str) -> None:
        """Writes a picture as PNG."""
        figure.savefig(self.path(name), format="png", dpi=120)


Run = Callable[[Any, Out], None]


def main(run: Run, kind: type) -> None:
    """The command of an example: `launch`, in a terminal that stays quiet."""
    be_quiet()
    # Absl's own flags keep their defaults.
    parse = lambda argv: flags.FLAGS(argv[:1]) and argv
    app.run(lambda argv: launch(run, kind, argv[1:]), flags_parser=parse)


def launch(run: Run, kind: type, arguments: Sequence[str]) -> None:
    """Runs an example with what was given in the command line.

    Args:
      run: From settings and `Out`; prints and writes what came of it.
      kind: The dataclass of settings.
      arguments: Flags, without the name of the program.

    Raises:
      SystemExit: With one sentence (status 1) if a flag, data or the directory is wrong
        or a package is missing; with status 0 for `--help`.
    """
    module = sys.modules[run.__module__]
    name = pathlib.Path(module.__file__ or "").stem
    try:
        values = define_flags(kind, name)
        rest = parse(values, arguments)
        if values["help"].value:
            print(_help(module.__doc__ or "", values))
            raise SystemExit(0)
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}: flags begin with --.")
        given = {f.name: values[f.name].value for f in _fields(kind)}
        settings = kind(**given)
        folder = pathlib.Path(values["out"].value or "")
        replaces = "overwrite" in values and bool(values["overwrite"].value)
        out = _open(folder, name, settings, replaces)
        run(settings, out)
    except ImportError as error:
        # Messages of Python name a module, those of others what to install too.
        is_bare = isinstance(error, ModuleNotFoundError)
        hint = ": pip install -e '.[examples]'." if is_bare else ""
        raise SystemExit(f"{name}: {error}{hint}") from None
    except OSError as error:
        of = f"cannot open {error.filename!r}: " if error.filename else ""
        raise SystemExit(f"{name}: {of}{error.strerror or error}.") from None
    except ValueError as error:
        raise SystemExit(f"{name}: {error}") from None
    if out.wrote:
        *most, last = out.wrote
        names = f"{', '.join(most)} and {last}" if most else last
        print(f"\nWrote {names} to {out.folder}.")


# ------------------------------------------------------------------------------ flags


class _Parser(flags.ArgumentParser):
    """From a text, or a value that it stands for, to a value that is allowed."""

    def __init__(self, field: dataclasses.Field[Any], kind: Any):
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            (kind,) = set(typing.get_args(kind)) - {types.NoneType}
        self.several = typing.get_origin(kind) is tuple
        self.kind = typing.get_args(kind)[0] if self.several else kind
        self.name, self.may_be_empty = field.name, field.default == ()
        self.among, limits = (field.metadata["flag"][x] for x in ("among", "limits"))
        self.limits = {key: end for key, end in limits.items() if end is not None}

    def parse(self, argument: Any) -> Any:
        """The value; `flags.IllegalFlagValueError` if that is none."""
        try:
            if not self.several:
                return self._one(argument)
            each = argument.split(",") if isinstance(argument, str) else argument
            each = [] if argument == "" else each
            found = tuple(dict.fromkeys(map(self._one, each)))
            if found or self.may_be_empty:
                return found
        except (ValueError, OverflowError):
            pass
        text = argument if isinstance(argument, str) else f"{argument}"
        raise flags.IllegalFlagValueError(
            f"--{self.name} must be {self.rule}, got {text!r}."
        )

    def _one(self, given: Any) -> Any:
        x: Any
        if self.kind is bool:
            x = {"true": True, "false": False}.get(str(given).lower())
        else:
            x = given.strip() if self.kind is str else self.kind(given)
        if self.among is not None:
            fits = x in self.among
        elif self.kind in (int, float):
            ends = [(_TESTS[key], end) for key, end in self.limits.items()]
            fits = all(test(x, end) for test, end in ends)
            fits &= math.isfinite(x) or x == self.limits.get("most")
        else:
            fits = x is not None
        if not fits:
            raise ValueError
        return x

    @property
    def rule(self) -> str:
        """What values there are, in words."""
        if self.among is not None:
            known = ", ".join(map(str, self.among))
            return f"one {'or more ' if self.several else ''}of {known}"
        one, several = _KINDS[self.kind]
        what = f"one or more {several}" if self.several else one
        match self.limits:
            case {"least": low, "most": high} if high < math.inf:
                return f"{what} from {low:g} to {high:g}"
            case {"above": low, "below": high}:
                return f"{what} between {low:g} and {high:g}"
        ends = [
            f"{_WORDS[key]} {end:g}"
            for key, end in self.limits.items()
            if end < math.inf
        ]
        inf = ", or inf" if math.inf in self.limits.values() else ""
        return " ".join([what, " and ".join(ends)]).strip() + inf


def _fields(kind: type) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(kind) if "flag" in f.metadata]


def define_flags(kind: type, name: str) -> flags.FlagValues:
    """The flags of a dataclass of settings, and `--out`, `--overwrite` and `--help`.

    They are this call's own: several examples may be loaded in one process.
    """
    values, kinds = flags.FlagValues(), typing.get_type_hints(kind)
    for field in _fields(kind):
        parser, about = _Parser(field, kinds[field.name]), field.metadata["flag"]
        told = about["help"]
        if about["among"] is not None:
            told = f"{told.removesuffix('.')}: {', '.join(map(str, about['among']))}."
        flags.DEFINE(
            parser, field.name, field.default, told, values,
            boolean=parser.kind is bool,
        )  # fmt: skip
    flags.DEFINE_string("out", f"out/{name}", "Directory of results.", values)
    if not _resumes(kind):
        told = "Replace the results of other settings in --out."
        flags.DEFINE_bool("overwrite", False, told, values)
    flags.DEFINE_bool("help", False, "Show this text.", values, short_name="h")
    return values


def parse(values: flags.FlagValues, arguments: Sequence[str]) -> list[str]:
    """Sets flags; gives what is none. A `ValueError` is one sentence."""
    try:
        return values(["", *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, [*values])
        hint = f"did you mean --{near[0]}?" if near else "--help shows those there are."
        raise ValueError(f"there is no flag --{error.flagname}: {hint}") from None
    except flags.Error as error:
        raise ValueError(f"{str(error).removesuffix('.')}.") from None


def _help(doc: str, values: flags.FlagValues) -> str:
    lines = [doc.strip(), "", "Flags, with their defaults:", ""]
    for name in values:
        item = values[name]
        left = f"--{name}={'...' if item.default is None else _text(item.default)}"
        if item.boolean:
            left = f"--no{name}" if item.default else f"--{name}"
        told = textwrap.wrap(item.help or "", 58)
        told = ["", *told] if len(left) > 26 else told
        both = itertools.zip_longest([left], told, fillvalue="")
        if len(name) > 1:  # -h is --help
            lines += [f"  {a:26}  {b}".rstrip() for a, b in both]
    return "\n".join(lines)


def _text(value: Any) -> str:
    """A value as in the command line."""
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


# ------------------------------------------------------------- directory and terminal


def _resumes(kind: type) -> bool:
    return any(f.metadata["flag"]["resumes"] for f in _fields(kind))


def _plain(value: Any) -> Any:
    """As JSON has it; what is not finite as text."""
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    strange = isinstance(value, float) and not math.isfinite(value)
    return str(value) if strange else value


def _open(folder: pathlib.Path, name: str, settings: Any, replaces: bool) -> Out:
    """The directory of a run; `ValueError` if it holds that of other settings."""
    known = dataclasses.asdict(settings)
    record = {"example": name} | {key: _plain(x) for key, x in known.items()}
    there = _difference(folder, record, settings)
    if there and not replaces:
        other = "delete it" if _resumes(type(settings)) else "--overwrite it"
        raise ValueError(f"{folder} holds {there}: give another --out, or {other}.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write to {str(folder)!r}: {error.strerror}."
        ) from None
    return Out(folder, record)


def _difference(folder: pathlib.Path, record: dict[str, Any], settings: Any) -> str:
    """What other run a directory holds, in words; empty if none."""
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "a run" if (folder / "metrics.jsonl").exists() else ""
    if found.get("example") != record["example"]:
        return f"a run of {found.get('example')}"
    may = {f.name for f in _fields(type(settings)) if f.metadata["flag"]["resumes"]}
    names = [k for k in record if k not in may and record[k] != found.get(k)]
    told = lambda row: " ".join(f"--{k}={_text(row.get(k))}" for k in names)
    return f"a run with {told(found)}, this has {told(record)}" if names else ""


def be_quiet() -> None:
    """Leaves the terminal to the example: no warnings, and no news of devices."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    absl_logging.set_verbosity(absl_logging.ERROR)
    for name in ("jax", "orbax"):
        logging.getLogger(name).setLevel(logging.ERROR)
