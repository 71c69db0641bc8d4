"""Exports are true, layers hold, everything public is documented, doctests run."""

import ast
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys
import types

import jax
import pytest

import clipfx

PACKAGE = pathlib.Path(clipfx.__file__).parent
# A module imports only from those before it.
LAYERS = ["_compat", "_checks", "_tree", "_norms", "_statistics", "responses",
          "thresholds", "snr", "_clip", "_elementwise", "_methods", "_adaptive",
          "_averages", "_power", "_spikes", "_relative", "_steps", "_wrappers",
          "metrics"]  # fmt: skip
NAMESPACES = [clipfx.metrics, clipfx.responses, clipfx.snr, clipfx.thresholds]


def public():
    """Every public function and class, by its full name."""
    for module in [clipfx, *NAMESPACES]:
        for name in module.__all__:
            thing = getattr(module, name)
            if not isinstance(thing, types.ModuleType) and getattr(
                thing, "__module__", ""
            ).startswith("clipfx"):
                yield f"{module.__name__}.{name}", thing


PUBLIC = dict(public())
each = pytest.mark.parametrize("name", PUBLIC)


def test_exports_are_true():
    for module in [clipfx, *NAMESPACES]:
        assert list(module.__all__) == sorted(module.__all__)
        for name in module.__all__:
            assert hasattr(module, name)
    shown = {n for n, x in vars(clipfx).items() if not n.startswith("_")}
    assert shown == set(clipfx.__all__)


def test_layers_hold():
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert files == set(LAYERS)
    for number, layer in enumerate(LAYERS):
        source = ast.parse((PACKAGE / f"{layer}.py").read_text())
        for node in ast.walk(source):
            if isinstance(node, ast.ImportFrom):
                names = [a.name for a in node.names] if node.module == "clipfx" else []
                if (node.module or "").startswith("clipfx."):
                    names = [node.module.split(".")[1]]
            elif isinstance(node, ast.Import):
                names = [a.name.split(".")[1] for a in node.names
                         if a.name.startswith("clipfx.")]  # fmt: skip
                outside = {a.name.split(".")[0] for a in node.names} - {"clipfx"}
                allowed = {"jax", "optax", "numpy", *sys.stdlib_module_names}
                assert outside <= allowed, (layer, outside)
            else:
                continue
            for name in names:
                assert name in LAYERS[:number], f"{layer} imports {name}"


def test_private_interfaces_of_jax_stay_in_compat():
    for path in PACKAGE.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"jax\._src|__version__\s*[<>=]=", text), path
        if path.stem != "_compat":
            assert not re.search(r"manual_axis_type|\.vma\b|jax\.extend", text), path


def test_files_are_rooms_not_halls():
    for path in PACKAGE.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


@each
def test_everything_public_is_documented(name):
    thing = PUBLIC[name]
    doc = inspect.getdoc(thing)
    assert doc, name
    assert doc.splitlines()[0].endswith("."), name
    assert "Reference:" in doc, f"{name} names no source, or that there is none"
    if inspect.isclass(thing):
        for field in thing._fields:
            assert re.search(rf"^  {field}: ", doc, re.M), f"{name}.{field}"
        return
    parameters = inspect.signature(thing).parameters
    for parameter in parameters:
        assert re.search(rf"^  {parameter}: ", doc, re.M), f"{name}({parameter})"
    assert "Returns:" in doc, name
    assert ">>>" in doc, name
    source = inspect.getsource(thing)
    if re.search(r"^    (    )?raise |check_|clip_by_norm\(", source, re.M):
        assert "Raises:" in doc, name
    if "updates" in source or "norm" in parameters:
        assert re.search(r"\[(G|B|L|T|\d|\.\.\.)", doc), f"{name} names no shapes"


def test_every_promise_has_a_test_of_its_name():
    doc = inspect.getdoc(clipfx.clip_by_norm)
    table = doc.split("=\n", 1)[1].split("\n\nArgs:")[0]
    promises = re.findall(r"^(\w+_\w+)  ", table, re.M)
    assert len(promises) > 15
    tests = "".join(p.read_text() for p in pathlib.Path(__file__).parent.glob("*.py"))
    for promise in promises:
        assert re.search(rf"def test_\w*{promise}", tests), promise


@pytest.mark.parametrize(
    "module", ["clipfx", *(f"clipfx.{m.name}" for m in pkgutil.iter_modules([PACKAGE]))]
)
def test_doctests(module):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


def test_import_needs_no_flax():
    """Boxes are recognised where Flax is loaded, and Flax is never loaded for it."""
    code = "import clipfx, sys; print({'flax', 'chex', 'equinox'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded_by_optax = {"chex"} if "chex" in done.stdout else set()
    assert done.stdout.strip() in ("set()", str(loaded_by_optax))


def test_version_and_changelog_agree():
    assert re.fullmatch(r"\d+\.\d+\.\d+", clipfx.__version__)
    assert f"## {clipfx.__version__}" in (PACKAGE / "CHANGELOG.md").read_text()
    assert (PACKAGE / "py.typed").exists()
