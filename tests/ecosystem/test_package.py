"""Exports are true, layers hold, everything public is documented, doctests run."""

import ast
import doctest
import graphlib
import importlib
import inspect
import pathlib
import re
import subprocess
import sys
import types

import jax
import optax
import pytest
from tiers import in_tiers

import clipfx
from clipfx.methods import clip_by_norm

_TESTS = pathlib.Path(__file__).parents[1]
PACKAGE = pathlib.Path(clipfx.__file__).parent
# What stands in a row imports only from rows above it, and within it in no circle.
LAYERS = [
    ("_compat", "_types"),
    ("_core",),
    ("responses", "thresholds", "snr", "metrics"),
    ("methods",),
    ("wrappers", "diagnose"),
    ("per_example.engine",),
    ("per_example",),
    ("privacy",),
    ("states",),
    ("plots",),
    ("calibrate",),
    ("__main__",),
]
NAMESPACES = [clipfx.calibrate, clipfx.diagnose, clipfx.metrics, clipfx.per_example,
              clipfx.plots, clipfx.privacy, clipfx.responses, clipfx.snr,
              clipfx.thresholds]  # fmt: skip


def modules():
    """Every module by its name within the package, and its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), path


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
# What examples may use without importing it.
AT_HAND = {"clipfx": clipfx, "jax": jax, "jnp": jax.numpy, "optax": optax}
each = pytest.mark.parametrize("name", PUBLIC)


def test_exports_are_true():
    for module in [clipfx, *NAMESPACES]:
        assert list(module.__all__) == sorted(module.__all__)
        for name in module.__all__:
            assert hasattr(module, name)
    shown = {n for n, x in vars(clipfx).items() if not n.startswith("_")}
    assert shown - {"methods", "wrappers"} == set(clipfx.__all__)


def imports(path):
    """The modules of the package that a file imports, and packages from elsewhere."""
    known = {name.removesuffix(".__init__") for name, _ in modules()}
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package, _, module = (node.module or "").partition(".")
            if package != "clipfx":
                continue
            each = {f"{module}.{alias.name}".strip(".") for alias in node.names}
            inside |= (each & known) or {module}
    return inside, outside


def layer(module):
    """The number of its row, by the longest name that it begins with."""
    rows = {name: k for k, row in enumerate(LAYERS) for name in row}
    owner = max((n for n in rows if f"{module}.".startswith(f"{n}.")), key=len)
    return rows[owner]


def test_layers_hold():
    files = {name: path for name, path in modules() if path.stem != "__init__"}
    graph = {}
    for name, path in files.items():
        inside, outside = imports(path)
        allowed = {"jax", "optax", "numpy", *sys.stdlib_module_names}
        if name == "privacy.accounting":  # inside of a function
            allowed.add("dp_accounting")
        if name.startswith("plots."):
            allowed.add("matplotlib")  # where a function needs it
        assert outside <= allowed, (name, outside)
        for other in inside:
            assert layer(other) <= layer(name), f"{name} imports {other}"
        graph[name] = inside
    graphlib.TopologicalSorter(graph).prepare()  # raises where there is a circle


def test_private_interfaces_of_jax_stay_in_compat():
    for _, path in modules():
        text = path.read_text()
        assert not re.search(r"jax\._src|__version__\s*[<>=]=", text), path
        if path.stem != "_compat":
            assert not re.search(r"manual_axis_type|\.vma\b|jax\.extend", text), path


def test_files_are_rooms_not_halls():
    for _, path in modules():
        source = ast.parse(path.read_text())
        doc = sum(
            node.end_lineno - node.lineno
            for node in ast.walk(source)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        )
        assert len(path.read_text().splitlines()) - doc <= 400, path


@each
def test_everything_public_is_documented(name):
    thing = PUBLIC[name]
    doc = inspect.getdoc(thing)
    assert doc, name
    assert doc.splitlines()[0].endswith("."), name
    assert "Reference:" in doc, f"{name} names no source, or that there is none"
    if inspect.isclass(thing):
        fields = getattr(thing, "_fields", None) or thing.__dataclass_fields__
        for field in fields:
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
    tests = "".join(p.read_text() for p in _TESTS.rglob("*.py"))
    for promise in promises:
        assert re.search(rf"def test_\w*{promise}", tests), promise


DOCUMENTED = [f"clipfx.{name}".removesuffix(".__init__") for name, _ in modules()]
# Those whose examples compile most are left to the full tier.
SLOW = "per_example|privacy|state|fair|stacked|responses|agc|skip"
QUICK = {x for x in DOCUMENTED if not re.search(SLOW, x)}


@pytest.mark.parametrize("module", in_tiers(DOCUMENTED, QUICK))
def test_doctests(module):
    importlib.import_module(module)
    # Not the function of that name that a package shows.
    runner, found = doctest.DocTestRunner(), sys.modules[module]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for test in _Finder().find(found, module, extraglobs=AT_HAND):
            runner.run(test)
    assert runner.summarize().failed == 0


class _Finder(doctest.DocTestFinder):
    """Finds examples of decorated functions too."""

    def _from_module(self, module, object):
        return super()._from_module(module, inspect.unwrap(object))


def test_doctests_of_decorated_functions_are_found():
    names = {test.name for test in _Finder().find(clip_by_norm, "file")}
    assert {"file.clip_by_norm", "file.tree_clip"} <= names


def test_import_needs_no_flax():
    """Boxes are recognised where Flax is loaded, and Flax is never loaded for it."""
    names = "{'flax', 'chex', 'equinox', 'matplotlib'}"
    code = f"import clipfx, sys; print({names} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded_by_optax = {"chex"} if "chex" in done.stdout else set()
    assert done.stdout.strip() in ("set()", str(loaded_by_optax))


def test_version_and_changelog_agree():
    assert re.fullmatch(r"\d+\.\d+\.\d+", clipfx.__version__)
    assert f"## {clipfx.__version__}" in (PACKAGE / "CHANGELOG.md").read_text()
    citation = (_TESTS.parent / "CITATION.cff").read_text()
    assert f"\nversion: {clipfx.__version__}\n" in citation
    assert (PACKAGE / "py.typed").exists()
