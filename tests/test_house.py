"""How the package is built: arrows go one way, and none in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "soft_jax"
# From the ground up: a module imports its own package and what stands before it.
STOREYS = (
    *("errors", "buckets", "paths", "cache", "hooks", "pytrees", "config", "distributed"),
    *("store", "data"),
    *("models", "methods", "training", "inference", "evaluation", "experiment", "paper"),
)
# Public names and commands: they may import anything.
TOP = ("__init__", "__main__", "commands", "library_commands")


def modules():
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), file


def imported(file):
    """Modules of ours that a file imports, wherever in it, also for types alone."""
    names = {name for name, _ in modules()}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("soft_jax"):
            package = node.module.removeprefix("soft_jax").removeprefix(".")
            for alias in node.names:
                longer = f"{package}.{alias.name}".removeprefix(".")
                yield longer if longer in names else package
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("soft_jax."):
                    yield alias.name.removeprefix("soft_jax.")


def for_types_alone(file):
    """Modules of ours that are imported below `if TYPE_CHECKING`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            for inner in node.body:
                if isinstance(inner, ast.ImportFrom):
                    yield from (
                        f"{inner.module.removeprefix('soft_jax.')}.{a.name}" for a in inner.names
                    )
                    yield inner.module.removeprefix("soft_jax.")


@pytest.mark.parametrize(("name", "file"), list(modules()))
def test_a_module_imports_what_stands_below_it(name, file):
    storey = name.split(".")[0]
    if storey in TOP:
        return
    for other in imported(file):
        theirs = other.split(".")[0]
        if theirs in ("", "__init__"):  # the version
            continue
        assert STOREYS.index(theirs) <= STOREYS.index(storey), f"{name} imports {other}"
    if name == "config":
        assert set(imported(file)) == {"errors"}


def test_no_imports_go_in_a_circle():
    """Also inside a package; what is imported for types alone is not run."""
    graph = {
        name: set(imported(file)) - set(for_types_alone(file)) - {"", name}
        for name, file in modules()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_packages_are_one_level_deep_and_hold_no_names():
    for name, file in modules():
        assert len(name.split(".")) <= 2
        if file.name == "__init__.py" and file.parent != ROOT:
            body = ast.parse(file.read_text()).body
            assert len(body) == 1, f"{name} holds more than its docstring"
