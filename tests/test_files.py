"""Files of the repository are tidy: what pre-commit checks that ruff does not."""

import json
import pathlib
import subprocess
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
WRITTEN_BY_HAND = {".py", ".md", ".toml", ".yaml", ".ipynb", ".j2", ""}


def _tracked() -> list[pathlib.Path]:
    """Returns the files git tracks, with those about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [
        ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()
    ]


FILES = _tracked()


def _with_suffix(*suffixes: str) -> list:
    return [
        pytest.param(path, id=str(path.relative_to(ROOT)))
        for path in FILES
        if path.suffix in suffixes
    ]


@pytest.mark.parametrize("path", _with_suffix(".toml"))
def test_toml_parses(path: pathlib.Path) -> None:
    tomllib.loads(path.read_text())


@pytest.mark.parametrize("path", _with_suffix(".ipynb"))
def test_notebook_carries_no_outputs(path: pathlib.Path) -> None:
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], f"cell {number} has outputs"
            assert cell["execution_count"] is None, f"cell {number} has been run"


def test_lines_end_without_space_and_files_with_one_newline() -> None:
    untidy = []
    for path in FILES:
        if path.suffix not in WRITTEN_BY_HAND:
            continue
        text = path.read_text()
        if text and (not text.endswith("\n") or text.endswith("\n\n")):
            untidy.append(
                f"{path.relative_to(ROOT)}: ends with no newline, or with more"
            )
        for number, line in enumerate(text.split("\n"), start=1):
            if line != line.rstrip(" \t\r"):
                untidy.append(f"{path.relative_to(ROOT)}:{number}: trailing space")
    assert not untidy


def test_file_is_small() -> None:
    """A large file in git is large for ever; records worth keeping are small."""
    large = [p for p in FILES if p.stat().st_size > 2 * 2**20]
    assert not large, f"over 2 MiB: {large}"
