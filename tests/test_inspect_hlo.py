"""The inspector says what the ledger says, quotes safely, and refuses clearly."""

import dataclasses
import gzip
import html.parser
import io
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from experiments.inspection import inputs, names, page, record, tables, terminal
from experiments.inspection.answer import Answer, answer
from experiments.inspection.difference import Comparison
from experiments.inspection.dumps import list_dumps
from experiments.inspection.inputs import FileQuestion, ProgramQuestion
from experiments.report import provenance
from sharding.chips import CHIPS
from sharding.hlo import read_ledger

ROOT = pathlib.Path(__file__).resolve().parent.parent
HLO = ROOT / "tests" / "data" / "hlo"
AXES = {"data": 2, "tensor": 4}
# What could break out of a tag, an attribute, a script, a template or a terminal.
NASTY = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>'{{ 7 * 6301 }}{% raw %}%{y}"
)
ESCAPE = "\x1b]0;owned\x07"


def _lay(mesh: Mesh, shape: Sequence[int], *axes: str | None) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def _compiled(*, rows: bool) -> Any:
    """Returns 5 layers on data=2, tensor=4; `rows` splits w_out as it should be."""
    devices = np.array(jax.devices()[:8]).reshape(2, 4)
    mesh = Mesh(devices, tuple(AXES), axis_types=(AxisType.Auto,) * 2)

    def step(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            hidden = jnp.maximum(x @ w["in"], 0.0)
            return x + hidden @ w["out"], None

        return jax.lax.scan(layer, x, weights)[0]

    split = ("tensor", None) if rows else (None, "tensor")
    weights = {
        "in": _lay(mesh, (5, 64, 96), None, None, "tensor"),
        "out": _lay(mesh, (5, 96, 64), None, *split),
    }
    return jax.jit(step).lower(weights, _lay(mesh, (48, 64), "data")).compile()


@pytest.fixture(scope="module")
def texts() -> tuple[str, str]:
    """The program as its author wrote it, and as it should be."""
    return _compiled(rows=False).as_text(), _compiled(rows=True).as_text()


@pytest.fixture(scope="module")
def folder(
    texts: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """Holds both as XLA names its dumps, beside what else it writes."""
    out = tmp_path_factory.mktemp("dumps")
    for name, text in (
        ("module_0003.jit_step.cpu_after_optimizations.txt", texts[0]),
        ("module_0007.jit_step.cpu_after_optimizations.txt", texts[1]),
        ("module_0008.jit_f.sm_9.0a_gpu_after_optimizations.txt", texts[1]),
        ("module_0009.jit_g.cl_93.after_optimizations.txt", texts[1]),
        ("module_0003.jit_step.before_optimizations.txt", "no"),
        ("module_0003.jit_step.cpu_after_optimizations-buffer-assignment.txt", "no"),
        ("module_0009.jit_g.cl_93.after_optimizations_after_buffer_assignment.txt", ""),
    ):
        (out / name).write_text(text)
    return out


def _inspect(text: str, folder: pathlib.Path, **changes: Any) -> Answer:
    path = folder / "program.txt"
    path.write_text(text)
    question = FileQuestion(path=str(path), mesh=AXES)
    subject = dataclasses.replace(inputs.read(question), **changes)
    return answer(subject, CHIPS["h100"])


@pytest.fixture(scope="module")
def found(texts: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Answer:
    return _inspect(texts[0], tmp_path_factory.mktemp("found"))


def _record(found: Answer) -> dict[str, Any]:
    return json.loads(record.text(record.one(found, provenance.collect([""]))))


def test_json_has_the_fields_of_a_phase(texts: tuple[str, str], found: Answer) -> None:
    ledger, values = read_ledger(texts[0], AXES), _record(found)
    assert values["flops"] == ledger.flops > 0
    assert values["hbm_bytes"] == ledger.hbm_bytes > 0
    names_ = ("axis", "kind", "count", "payload_bytes", "wire_bytes", "source", "loop")
    assert [[row[n] for n in names_] for row in values["collectives"]] == [
        [getattr(row, n) for n in names_] for row in ledger.collectives
    ]
    # Closed form: 5 layers gather the hidden rows of a replica, 24 x 96 floats.
    gathered = [r for r in values["collectives"] if r["payload_bytes_each"] == 9216]
    assert [(r["axis"], r["kind"], r["count"]) for r in gathered] == [
        ("tensor", "all-gather", 5)
    ]
    assert values["matmul_flops"] == 5 * 2 * 2 * 24 * 64 * 96 // 4
    memory = values["memory"]
    arguments = 4 * (2 * 5 * 64 * 96 // 4 + 24 * 64)
    assert memory["argument_bytes"] == arguments < memory["peak_bytes"]
    assert values["xla_flops"] is None  # only the text is known
    assert values["provenance"]["commit"]


def test_a_program_of_ours_has_the_memory_of_its_record() -> None:
    question = ProgramQuestion(
        model="tiny", partition="tp4", phase="decode", target="cpu:4",
        rules="megatron", batch_size=4, input_len=16, output_len=4, dtype="float32",
        layers="scanned",
    )  # fmt: skip
    inputs.check(question)
    subject = inputs.read(question)
    values = _record(answer(subject))
    assert subject.memory is not None
    assert values["memory"] == dataclasses.asdict(subject.memory)
    assert set(values["memory"]) >= {"weights_bytes", "kv_bytes", "peak_bytes"}
    assert values["xla_flops"] > 0
    assert values["axes"] == {"data": 1, "stage": 1, "tensor": 4}
    assert {row["axis"] for row in values["collectives"]} == {"tensor"}
    changed = question.changed("partition=dp2_tp2,batch_size=8")
    assert (changed.partition, changed.batch_size) == ("dp2_tp2", 8)


def test_equal_instructions_are_one_row(found: Answer) -> None:
    roofline = found.analysis.roofline
    assert roofline is not None
    for name in ("time_s", "flops", "hbm_bytes", "count"):
        before = sum(getattr(row, name) for row in roofline.top)
        assert sum(getattr(row, name) for row in found.bounds) == pytest.approx(before)
    assert len(roofline.top) == roofline.num_rows >= len(found.bounds)
    wire = sum(row.wire_bytes for row in found.collectives)
    assert wire == found.analysis.ledger.wire_bytes


@pytest.mark.parametrize("width", [80, 100, 120])
def test_terminal_fits(found: Answer, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    terminal.show(console, found, top=5)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    for part in ("all-gather", "mesh data=2 tensor=4", "test_inspect_hlo.py:"):
        assert part in text


class Page(html.parser.HTMLParser):
    """Collects what a browser would run or load, and the figures."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.figures: list[Any] = []
        self.words: list[str] = []
        self.policy = ""
        self._raw = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name.startswith("on") or name in ("src", "srcdoc"):
                self.handlers.append(f"{name}={value}")
            if name == "data-figure":
                self.figures.append(json.loads(value or ""))
            if (tag, name) == ("meta", "content") and "script-src" in (value or ""):
                self.policy = value or ""
        self._raw = tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.words.append(data)


def _page(found: Answer) -> Page:
    return Page(page.one(found, provenance.collect(["inspect_hlo"])))


def test_page_is_whole(found: Answer) -> None:
    shown = _page(found)
    assert shown.tags.count("script") == 2
    assert not shown.handlers
    assert "default-src 'none'" in shown.policy
    assert "unsafe-inline'; img" in shown.policy  # of styles only
    assert shown.policy.count("sha256-") == 2
    assert len(shown.figures) == 3  # links, roofline, timeline
    text = " ".join(shown.words)
    for heading in ("Collectives", "Instructions", "Memory", "Loops", "Made by"):
        assert heading in text
    assert "test_inspect_hlo.py:" in text


@pytest.fixture(scope="module")
def compared(
    texts: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Comparison:
    folder = tmp_path_factory.mktemp("compared")
    before, after = (_inspect(text, folder, title=text[:9]) for text in texts)
    return Comparison(before=before, after=after)


def test_difference_names_the_lines(compared: Comparison) -> None:
    verbs = {(r.verb, r.either.kind) for r in compared.difference.collectives}
    assert verbs == {("removed", "all-gather"), ("added", "all-reduce")}
    wire = [a.analysis.ledger.wire_bytes for a in compared.answers]
    lines = compared.lines
    sent = [sum(line.wire_bytes[side] for line in lines) for side in (0, 1)]
    assert wire[1] - wire[0] == sent[1] - sent[0] != 0
    times = [answer.time_s for answer in compared.answers]
    change_s = sum(line.change_s for line in lines)
    assert change_s == pytest.approx(times[1] - times[0])
    values = json.loads(
        record.text(record.two(compared, provenance.collect(["inspect_hlo"])))
    )
    assert values["figures"]["FLOPs"][0] == values["before"]["flops"]
    assert {row["verb"] for row in values["collectives"]} == {"added", "removed"}


def test_difference_is_shown(compared: Comparison) -> None:
    shown = Page(page.two(compared, provenance.collect(["inspect_hlo"])))
    assert shown.tags.count("script") == 2
    assert len(shown.figures) == 2  # links, timeline
    text = " ".join(shown.words)
    for words in ("removed", "added", "Lines responsible", "test_inspect_hlo.py:"):
        assert words in text
    for width in (80, 120):
        console = Console(width=width, record=True, file=io.StringIO())
        terminal.show_difference(console, compared, top=5)
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        assert "removed" in text


def test_a_program_does_not_differ_from_itself(found: Answer) -> None:
    same = Comparison(before=found, after=found)
    assert same.difference.is_same
    assert not same.lines
    console = Console(width=80, record=True, file=io.StringIO())
    terminal.show_difference(console, same, top=5)
    assert "Nothing differs" in console.export_text()


@pytest.mark.parametrize("name", sorted(path.name for path in HLO.glob("*.hlo")))
def test_shows_programs_of_every_compiler(name: str) -> None:
    found = answer(inputs.read(FileQuestion(path=str(HLO / name))))
    usual = {"cpu": "cpu", "v5p": "v5p", "v5e": "v5p", "h100": "h100", "h200": "h100"}
    assert found.chip.name == usual[name.split(".")[1]]
    assert found.is_assumed
    assert any("no chip was named" in text for text in tables.assumed(found))
    assert _page(found).tags.count("script") == 2
    terminal.show(Console(width=100, file=io.StringIO()), found, top=3)


def _nasty(text: str) -> str:
    """Returns the program with hostile names wherever a name can stand."""
    quoted = NASTY.replace("\\", "\\\\").replace('"', '\\"') + ESCAPE
    text = re.sub(r'op_name="[^"]*"', lambda _: f'op_name="{quoted}"', text)
    text = re.sub(r'(?m)^(\d+) "[^"]*\.py"', lambda m: f'{m[1]} "{quoted}"', text)
    return text


def test_names_cannot_inject(texts: tuple[str, str], tmp_path: pathlib.Path) -> None:
    hostile = _inspect(
        _nasty(texts[0]), tmp_path, title=NASTY + ESCAPE, facts=(NASTY + ESCAPE,)
    )
    clean = _page(_inspect(texts[0], tmp_path))
    shown = _page(hostile)
    assert shown.tags.count("script") == clean.tags.count("script") == 2
    assert shown.tags.count("img") == 0
    assert not shown.handlers
    text = " ".join(shown.words)
    assert "<script>alert(1)</script>" in text  # as words
    assert "{{ 7 * 6301 }}" in text
    assert "44107" not in text
    both = Page(
        page.two(
            Comparison(before=_inspect(texts[0], tmp_path), after=hostile),
            provenance.collect([NASTY]),
        )
    )
    assert both.tags.count("script") == 2
    assert both.tags.count("img") == 0
    assert not both.handlers
    for figure in (*shown.figures, *both.figures):
        written = json.dumps(figure)
        assert "<script" not in written
        assert "<img" not in written
    console = Console(width=110, record=True, file=io.StringIO())
    terminal.show(console, hostile, top=20)
    assert "\x1b" not in console.export_text()
    assert "\x07" not in console.export_text()


def test_short_names_keep_what_tells_them_apart() -> None:
    long = "jit(f)/while/body/closed_call/attention/BTD,DN->BTN/dot_general"
    for width in range(8, 60):
        short = names.short(long, width)
        assert len(short) <= width
        assert short.removeprefix("…") in names.short(long)
    assert names.alike(["l_0/w_1", "l_1/w_1", "l_9/w_1"]) == "l_*/w_1"


def test_axes_are_called_what_jax_lets_them_be_called() -> None:
    named = inputs.parse_mesh("data+fsdp=2, pod/x y=4,模型=1")
    assert list(named.items()) == [("data+fsdp", 2), ("pod/x y", 4), ("模型", 1)]


def test_a_folder_lists_its_programs(
    texts: tuple[str, str], folder: pathlib.Path
) -> None:
    every = {dump.name for dump in list_dumps(folder)}
    assert every == {
        "module_0003.jit_step", "module_0007.jit_step", "module_0008.jit_f",
        "module_0009.jit_g",
    }  # fmt: skip
    largest = max(list_dumps(folder), key=lambda dump: dump.size_bytes)
    subject = inputs.read(FileQuestion(path=str(folder), mesh=AXES))
    assert [dump.name for dump in subject.dumps if dump.is_chosen] == [largest.name]
    chosen = inputs.read(FileQuestion(path=str(folder), module="jit_g"))
    assert chosen.program == texts[1]
    listed = tables.dumps(answer(subject))
    assert len(listed.rows) == 4
    with pytest.raises(ValueError, match=r"names 2 programs .*module_0003.jit_step"):
        inputs.check(FileQuestion(path=str(folder), module="jit_step"))


# Arguments, and what the answer must name: the value, the facts, what to do.
REFUSED = {
    "no program": ([], r"no program\. One is inspected.*Give a file"),
    "two programs": (["a.txt", "--model=tiny"], r"2 programs: a.txt, --model=tiny"),
    "no such file": (["{folder}/progam.txt"], r"no file .*progam.txt.*Give one of"),
    "module": (["{folder}", "--module=jit_h"], r"no program 'jit_h'.*did you mean"),
    "module of a file": (["{file}", "--module=jit_f"], r"--module=jit_f with the file"),
    "mesh": (["{file}", "--mesh=data:2"], r"cannot read 'data:2' .*data=2,tensor=4"),
    "mesh twice": (["{file}", "--mesh=a=2,a=4"], r"cannot read 'a=4'.*each name once"),
    "chip": (["{file}", "--chip=h10"], r"no chip 'h10': did you mean h100\?"),
    "partition": (
        ["--model=tiny", "--partition=tq8"], r"cannot read 'tq8'.*such as tp4_pp2",
    ),
    "no partition": (["--model=tiny"], r"--model=tiny without --partition.*tp8"),
    "model": (
        ["--model=lama", "--partition=tp8"], r"unknown model 'lama'.*Presets are",
    ),
    "target": (
        ["--model=tiny", "--partition=tp8", "--target=h10:8"], r"did you mean h100\?",
    ),
    "rules": (
        ["--model=tiny", "--partition=tp8", "--rules=megatrn"], r"Did you mean meg",
    ),
    "devices": (
        ["--model=tiny", "--partition=tp4", "--target=cpu:8"], r"needs 4 dev.*has 8",
    ),
    "idle": (["{file}", "--partition=tp8"], r"--partition=tp8 with the file.*Leave it"),
    "idle mesh": (
        ["--model=tiny", "--partition=tp8", "--mesh=a=8"], r"--mesh=a=8 with --model",
    ),
    "diff": (["{file}", "--diff={folder}/b.txt"], r"no file .*b.txt"),
    "diff change": (
        ["--model=tiny", "--partition=tp8", "--target=cpu:8", "--diff=partitin=tp4"],
        r"cannot read 'partitin=tp4'.*did you mean partition\?",
    ),
    "diff number": (
        ["--model=tiny", "--partition=tp8", "--target=cpu:8", "--diff=batch_size=x"],
        r"'x' is no number of at least 1.*batch_size=16",
    ),
    "diff mesh": (["{file}", "--diff_mesh=a=2"], r"--diff_mesh=a=2 without --diff"),
    "kernels": (["{file}", "--kernels=f"], r"cannot read 'f' in --kernels=f"),
    "trip counts": (["{file}", "--trip_counts=while=x"], r"cannot read 'while=x'"),
    "html": (["{file}", "--html={folder}"], r"cannot write .*it is a folder"),
    "json": (["{file}", "--json={file}/x"], r"cannot make folder"),
}  # fmt: skip

# Answers one command line after the other; each alone would start JAX again.
ANSWERS = """
import json, sys
from absl import flags
from experiments import inspect_hlo
answers = []
for arguments in json.load(sys.stdin):
    for name in list(flags.FLAGS):
        flags.FLAGS[name].unparse()
    try:
        inspect_hlo.main(flags.FLAGS(["inspect_hlo", *arguments]))
        answers.append("")
    except SystemExit as stop:
        answers.append(str(stop))
    except flags.Error as error:
        answers.append(str(error))
print("ANSWERS" + json.dumps(answers))
"""


def _run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "110"},
    )


@pytest.mark.slow
def test_what_cannot_be_answered_is_refused_first(
    texts: tuple[str, str], folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "program.txt"
    file.write_text(texts[0])
    places = {"folder": str(folder), "file": str(file)}
    asked = [[a.format(**places) for a in words] for words, _ in REFUSED.values()]
    asked += [["--phase=prefil"], ["--top=0"], ["--dtype=bf61"], ["--layers=rolled"]]
    done = _run("-c", ANSWERS, stdin=json.dumps(asked))
    assert "ANSWERS" in done.stdout, done.stderr
    answers = json.loads(done.stdout.rpartition("ANSWERS")[2])
    for (name, (_, expected)), said in zip(REFUSED.items(), answers, strict=False):
        assert said.startswith("Nothing was started. 1 to put right"), (name, said)
        assert re.search(expected, said), (name, said)
    for said in answers[len(REFUSED) :]:
        assert "flag --" in said
    assert len(answers) == len(asked)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("module @jit_f { }", "StableHLO.*as_text"),
        ("what is this", "no line that begins with HloModule"),
        ("HloModule m\nENTRY %e (p: f32[]) -> f32[] {\n", "ends inside"),
    ],
)
def test_other_text_is_refused(
    text: str, expected: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=expected):
        _inspect(text, tmp_path)


def test_reads_what_is_compressed(
    texts: tuple[str, str], found: Answer, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "program.txt.gz"
    path.write_bytes(gzip.compress(texts[0].encode()))
    read = answer(inputs.read(FileQuestion(path=str(path), mesh=AXES)))
    assert read.analysis.ledger == found.analysis.ledger
    path.write_bytes(b"\x7fELF\0\0\0")
    with pytest.raises(ValueError, match=r"holds no program.*ELF"):
        answer(inputs.read(FileQuestion(path=str(path))))


@pytest.mark.slow
def test_difference_of_two_of_our_programs(tmp_path: pathlib.Path) -> None:
    done = _run(
        "-m", "experiments.inspect_hlo", "--model=tiny", "--target=cpu:4",
        "--partition=tp4", "--diff=partition=dp2_tp2,layers=scanned",
        "--batch_size=4", "--input_len=16", "--output_len=4", f"--out={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "inspect.json").read_text())
    assert values["before"]["axes"] == {"data": 1, "stage": 1, "tensor": 4}
    assert values["after"]["axes"] == {"data": 2, "stage": 1, "tensor": 2}
    assert "layers scanned" in values["after"]["facts"]
    assert "tp4 on cpu:4 → decode of tiny, dp2_tp2" in done.stdout
    assert Page((tmp_path / "inspect.html").read_text()).figures


@pytest.mark.slow
def test_standard_input_to_json_and_page(
    texts: tuple[str, str], tmp_path: pathlib.Path
) -> None:
    done = _run(
        "-m", "experiments.inspect_hlo", "-", "--mesh=data=2,tensor=4", "--chip=v5e",
        "--json=-", f"--html={tmp_path / 'new' / 'page.html'}",
        f"--trace={tmp_path / 'trace' / 'step.json'}", stdin=texts[0],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)  # and nothing else
    assert values["flops"] == read_ledger(texts[0], AXES).flops
    assert values["chip"] == "v5e"
    assert "all-gather" in done.stderr
    shown = json.loads((tmp_path / "trace" / "step.json").read_text())["traceEvents"]
    lasts_us = max(event["ts"] + event["dur"] for event in shown if event["ph"] == "X")
    assert lasts_us == pytest.approx(1e6 * values["timeline"]["total_s"], rel=1e-3)
    assert Page((tmp_path / "new" / "page.html").read_text()).figures
