"""What exists stands in the docs, and what the docs name exists."""

import ast
import dataclasses
import pathlib
import re
import shlex

import pytest

from experiments.report.measurement import Measurement
from experiments.report.record import PhaseRecord, Record
from jaxllm.config import PRESETS
from sharding.chips import CHIPS
from sharding.tensor import RULES

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
]


def _page(name: str) -> str:
    return (ROOT / name).read_text()


def _each_page():
    return pytest.mark.parametrize(
        "page", PAGES, ids=lambda page: str(page.relative_to(ROOT))
    )


def _experiments() -> list[str]:
    return sorted(
        path.stem
        for path in (ROOT / "experiments").glob("*.py")
        if "__main__" in path.read_text()
    )


def _commands(page: pathlib.Path) -> list[list[str]]:
    """Returns the words of every line of shell in a page, continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("name", RULES)
def test_rule_table_is_documented(name: str) -> None:
    assert f"`{name}`" in _page("docs/partitions.md")


@pytest.mark.parametrize("name", CHIPS)
def test_chip_is_documented_with_its_figures(name: str) -> None:
    c = CHIPS[name]
    cells = [
        f"`{name}`",
        c.title,
        f"{c.flops_per_s['bf16'] / 1e12:.4g}",
        f"{c.hbm_bytes / 1e9:.4g}",
        f"{c.hbm_bytes_per_s / 1e12:.4g}",
        f"{c.links} x {c.link_bytes_per_s / 1e9:.4g}",
        c.topology,
        f"{c.devices_per_chip}",
    ]
    assert f"| {' | '.join(cells)} |" in _page("docs/targets.md")


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_documented_with_its_sizes(name: str) -> None:
    c = PRESETS[name]
    sizes = [c.num_layers, c.embed_dim, c.num_heads, c.num_kv_heads]
    sizes += [c.head_dim, c.mlp_dim, c.vocab_size]
    row = f"| `{name}` | {' | '.join(map(str, sizes))} |"
    assert row in _page("docs/concepts.md")


@pytest.mark.parametrize("name", _experiments())
def test_experiment_is_documented(name: str) -> None:
    assert f"experiments/{name}.py" in _page("README.md")


@pytest.mark.parametrize("record", [Record, PhaseRecord, Measurement])
def test_record_field_is_documented(record: type) -> None:
    page = _page("docs/records.md")
    names = [field.name for field in dataclasses.fields(record)]
    assert [name for name in names if f"`{name}`" not in page] == []


@_each_page()
def test_commands_exist(page: pathlib.Path) -> None:
    targets = re.findall(r"^([a-z]+):", _page("Makefile"), flags=re.MULTILINE)
    for words in _commands(page):
        if words[0] == "make":
            assert [w for w in words[1:] if "=" not in w and w not in targets] == []
        if "-m" in words and words[words.index("-m") + 1].startswith("experiments."):
            module = words[words.index("-m") + 1]
            path = ROOT / f"{module.replace('.', '/')}.py"
            assert path.is_file(), f"{module} does not exist"
            asked = {w[2:].partition("=")[0] for w in words if w.startswith("--")}
            assert asked <= _flags(path)


def _flags(path: pathlib.Path) -> set[str]:
    """Returns the names of the absl flags that a file defines."""
    calls = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)
    ]
    return {
        ast.literal_eval(call.args[0])
        for call in calls
        if ast.unparse(call.func).startswith("flags.DEFINE_")
    }


def test_the_demo_uses_flags_that_exist() -> None:
    recipe = re.search(
        r"-m experiments\.tradeoff(.*?)\n\n", _page("Makefile"), re.DOTALL
    )
    assert recipe
    asked = set(re.findall(r"--([a-z_]+)=", recipe[1]))
    assert asked <= _flags(ROOT / "experiments/tradeoff.py")


@pytest.mark.parametrize("page", ["docs/partitions.md", "docs/ledger.md"])
def test_example_runs(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", _page(page), re.DOTALL)
    assert blocks
    exec("\n".join(blocks), {"__name__": page})


@_each_page()
def test_links_to_files_resolve(page: pathlib.Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in _anchors(path)):
            broken.append(link)
    assert not broken


def _anchors(page: pathlib.Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in words}
