"""Imports go one way, and only files that are run define flags."""

import ast
import pathlib
import re
import sys
import tomllib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = ("jaxllm", "sharding", "experiments")

# The longest entry that is a prefix of a module's name says what of ours it may import.
MAY_IMPORT = {
    "jaxllm": {"jaxllm"},
    "sharding": {"jaxllm", "sharding"},
    # Reads any program's HLO, so it can be taken away and used alone.
    "sharding.hlo": {"sharding.hlo"},
    "experiments": {"jaxllm", "sharding", "experiments"},
    # Renders records, wherever they come from; knows no flags and no experiment.
    "experiments.report": {"jaxllm", "sharding", "experiments.report"},
}

MODULES = sorted(
    path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")
)


def _name(path: pathlib.Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _tree(path: pathlib.Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=str(path))


def _imports(tree: ast.Module) -> Iterator[str]:
    """Yields what is imported; `from a import b` as `a.b`, for b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_run(tree: ast.Module) -> bool:
    """Whether the module ends in `if __name__ == "__main__":`."""
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in tree.body
    )


def _base_dependencies() -> set[str]:
    """Returns the import names of `dependencies` in pyproject.toml."""
    import_names = {"absl-py": "absl", "orbax-checkpoint": "orbax"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split("[<>=!;]", line)[0] for line in project["dependencies"]]
    return {import_names.get(name, name) for name in names} | {"jaxlib"}


@pytest.mark.parametrize("path", MODULES, ids=_name)
class TestModule:
    """Holds for every module of every room."""

    def test_imports_only_what_it_may(self, path: pathlib.Path) -> None:
        rule = max((p for p in MAY_IMPORT if _is_within(_name(path), p)), key=len)
        ours = [
            name
            for name in _imports(_tree(path))
            if any(_is_within(name, room) for room in (*ROOMS, "tests"))
        ]
        wrong = [
            name
            for name in ours
            if not any(_is_within(name, allowed) for allowed in MAY_IMPORT[rule])
        ]
        assert not wrong, f"{rule} may import {sorted(MAY_IMPORT[rule])} of ours"

    def test_imports_are_absolute(self, path: pathlib.Path) -> None:
        relative = [
            node.lineno
            for node in ast.walk(_tree(path))
            if isinstance(node, ast.ImportFrom) and node.level
        ]
        assert not relative

    def test_defines_flags_only_where_it_is_run(self, path: pathlib.Path) -> None:
        tree = _tree(path)
        flags = [name for name in _imports(tree) if _is_within(name, "absl.flags")]
        if flags:
            assert _is_run(tree)
        if _is_run(tree):
            assert _name(path).count(".") == 1, "only experiments/*.py are run"
            assert path.parts[0] == "experiments"

    def test_says_what_it_is(self, path: pathlib.Path) -> None:
        assert ast.get_docstring(_tree(path)) or not (ROOT / path).read_text().strip()

    def test_imports_no_heavy_stranger(self, path: pathlib.Path) -> None:
        """Base dependencies only, unless inside a function (then an extra)."""
        known = {*_base_dependencies(), *sys.stdlib_module_names, *ROOMS}
        tops = {
            name.partition(".")[0]
            for statement in _tree(path).body
            if isinstance(statement, ast.Import | ast.ImportFrom)
            for name in _imports(ast.Module([statement], []))
        }
        assert tops <= known


def test_an_experiment_opens_with_a_question() -> None:
    """It is also `--help`."""
    for path in MODULES:
        tree = _tree(path)
        if _is_run(tree):
            first = (ast.get_docstring(tree) or "").partition("\n")[0]
            assert first.endswith("?"), f"{path}: {first!r}"
