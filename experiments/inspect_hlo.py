r"""What did the compiler do?

Reads the optimised HLO of any JAX program and shows what one device does in one call:
FLOPs, memory traffic and memory held, every collective with its mesh axis, bytes and
source line, and what takes the time at least. Nothing is run.

    python -m experiments.inspect_hlo program.txt --mesh=data=2,tensor=4
    python -m experiments.inspect_hlo dumps/ --module=jit_step --html=step.html
    python -m experiments.inspect_hlo before.txt --diff=after.txt --mesh=tensor=8

A program is a file of `compiled.as_text()`, a file or folder that XLA wrote under
XLA_FLAGS=--xla_dump_to=FOLDER, or `-` for standard input. One of our own is named
instead, and `--diff` then says what changes:

    python -m experiments.inspect_hlo --model=llama-3.1-8b --phase=decode \
        --target=h100:8 --partition=tp8 --diff=partition=tp4_pp2
"""

import functools
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, get_args

import jax
from absl import app, flags
from rich.console import Console

from experiments import command
from experiments.evaluate import too_large
from experiments.inspection import page, record, terminal
from experiments.inspection.answer import Answer, answer
from experiments.inspection.difference import Comparison
from experiments.inspection.inputs import (
    FileQuestion,
    ProgramQuestion,
    Question,
    check,
    parse_mesh,
    parse_numbers,
    read,
)
from experiments.report import provenance, units
from jaxllm.quantized import KVFormat, WeightFormat
from sharding.chips import Chip, find_chip
from sharding.target import prepare_environment
from sharding.trace import write_trace

_HLO = flags.DEFINE_string(
    "hlo", None, "File or folder of HLO; the same as naming it without a flag."
)
_MODULE = flags.DEFINE_string(
    "module", None, "Which program of a folder; without it the largest."
)
_MESH = flags.DEFINE_string("mesh", None, "Axes of its mesh, as data=2,tensor=4.")
_MODEL = flags.DEFINE_string(
    "model", None, "Instead of a file: preset, or path of a config.json."
)
_PARTITION = flags.DEFINE_string("partition", None, "Such as tp8 or tp4_pp2.")
_PHASE = flags.DEFINE_enum("phase", "decode", ["prefill", "decode"], "Of what.")
_TARGET = flags.DEFINE_string("target", "h100:8", "What to compile for.")
_RULES = flags.DEFINE_string("rules", "megatron", "Rule table of the partition.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Sequences.", lower_bound=1)
_INPUT_LEN = flags.DEFINE_integer("input_len", 2048, "Prompt tokens.", lower_bound=1)
_OUTPUT_LEN = flags.DEFINE_integer("output_len", 128, "New tokens.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of activations."
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", None, get_args(WeightFormat), "Stored narrower; default as --dtype."
)
_KV = flags.DEFINE_enum(
    "kv", None, get_args(KVFormat), "Cache stored narrower; default as --dtype."
)
_LAYERS = flags.DEFINE_enum(
    "layers", "auto", ["auto", "unrolled", "scanned"], "How layers are written."
)
_CHIP = flags.DEFINE_string("chip", None, "Whose rates give the least times.")
_KERNELS = flags.DEFINE_string(
    "kernels", None, "FLOPs of kernels that say none, as my_kernel=2000000."
)
_TRIP_COUNTS = flags.DEFINE_string(
    "trip_counts", None, "Lengths of data-dependent loops, as while.5=80."
)
_DIFF = flags.DEFINE_string(
    "diff", None, "Compare with: a file, or what changes, as partition=tp4_pp2."
)
_DIFF_MESH = flags.DEFINE_string("diff_mesh", None, "Its mesh; without it --mesh.")
_TOP = flags.DEFINE_integer("top", 12, "Rows of a table.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Write JSON to this file; - is stdout.")
_HTML = flags.DEFINE_string("html", None, "Write a page to this file.")
_TRACE = flags.DEFINE_string(
    "trace", None, "Write the timeline here; opens in https://ui.perfetto.dev."
)
_OUT = flags.DEFINE_string("out", None, "Write inspect.html and inspect.json here.")

_WIDTH = 110  # of a report that is not printed on a terminal
_OF_FILES = (_HLO, _MODULE, _MESH)
_OF_PROGRAMS = (
    _PARTITION, _PHASE, _TARGET, _RULES, _BATCH_SIZE, _INPUT_LEN, _OUTPUT_LEN, _DTYPE,
    _LAYERS,
)  # fmt: skip


def _question(paths: Sequence[str]) -> Question:
    """Returns what is asked about.

    Raises:
      ValueError: nothing, or several things, or flags that do not belong together.
    """
    paths = [*paths, *([_HLO.value] if _HLO.value else [])]
    asked = [*paths, *([f"--model={_MODEL.value}"] if _MODEL.value else [])]
    if len(asked) != 1:
        found = f"{len(asked)} programs: {', '.join(asked)}" if asked else "no program"
        raise ValueError(
            f"{found}. One is inspected, and --diff names a second. Give a file, a"
            " folder of dumps, - for standard input, or --model."
        )
    if _MODEL.value is None:
        _refuse_idle(_OF_PROGRAMS, f"the file {asked[0]}", "a program of --model")
        mesh = parse_mesh(_MESH.value) if _MESH.value else None
        return FileQuestion(path=asked[0], module=_MODULE.value, mesh=mesh)
    _refuse_idle(_OF_FILES, f"--model={_MODEL.value}", "a file")
    if _PARTITION.value is None:
        raise ValueError(
            f"--model={_MODEL.value} without --partition. A program is of one partition"
            " of its target's devices. Add, for example, --partition=tp8."
        )
    return ProgramQuestion(
        model=_MODEL.value,
        partition=_PARTITION.value,
        phase=_PHASE.value,  # pyright: ignore[reportArgumentType]
        target=_TARGET.value,
        rules=_RULES.value,
        batch_size=_BATCH_SIZE.value,
        input_len=_INPUT_LEN.value,
        output_len=_OUTPUT_LEN.value,
        dtype=_DTYPE.value,
        weights=_WEIGHTS.value,
        kv=_KV.value,
        layers=_LAYERS.value,
    )


def _other(question: Question) -> Question | None:
    """Returns what `question` is compared with, if anything."""
    if _DIFF.value is None:
        if _DIFF_MESH.value is not None:
            raise ValueError(
                f"--diff_mesh={_DIFF_MESH.value} without --diff. It is the mesh of the"
                " program compared with. Add --diff=FILE, or leave it out."
            )
        return None
    is_change = "=" in _DIFF.value and not os.path.exists(_DIFF.value)
    if isinstance(question, ProgramQuestion) and is_change:
        return question.changed(_DIFF.value)
    text = _DIFF_MESH.value or _MESH.value
    mesh = parse_mesh(text) if text else None
    return FileQuestion(path=_DIFF.value, module=None, mesh=mesh)


def _refuse_idle(held: Sequence[flags.FlagHolder], what: str, of: str) -> None:
    """Refuses flags that would change nothing."""
    idle = [f"--{flag.name}={flag.value}" for flag in held if flag.present]
    if idle:
        raise ValueError(
            f"{', '.join(idle)} with {what}: about {of}, not about it. A flag that"
            " would change nothing is refused. Leave it out."
        )


def _files() -> tuple[str | None, str | None]:
    """Returns where to write JSON and HTML, their folders made.

    Raises:
      ValueError: a file cannot be written there.
    """
    out = pathlib.Path(_OUT.value) if _OUT.value else None
    json = _JSON.value or (str(out / "inspect.json") if out else None)
    html = _HTML.value or (str(out / "inspect.html") if out else None)
    for path in (json, html, _TRACE.value):
        if path in (None, "-"):
            continue
        folder = pathlib.Path(path).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cannot make folder {folder}: {error.strerror}. A result is a file in"
                " a folder that can be written. Choose another."
            ) from None
        if os.path.isdir(path) or not os.access(folder, os.W_OK):
            why = "it is a folder" if os.path.isdir(path) else "no permission"
            raise ValueError(
                f"cannot write {path}: {why}. A result is a file in a folder that can"
                " be written. Choose another."
            )
    return json, html


def _tried(wrong: list[str], function: Any, *arguments: Any) -> Any:
    """Returns what `function` does, or adds to `wrong` why it cannot."""
    try:
        return function(*arguments)
    except (ValueError, ModuleNotFoundError) as error:
        wrong.append(str(error))
        return None


def _read(question: Question, chip: Chip | None, known: dict[str, Any]) -> Answer:
    try:
        return answer(read(question), chip, **known)
    except jax.errors.JaxRuntimeError as error:
        exceeded = too_large(str(error))
        if exceeded is None:
            raise
        needed, available = map(units.bytes_, exceeded)
        raise ValueError(
            f"the compiler refused {question}: it needs {needed} of a device that has"
            f" {available}. A program that does not fit is not compiled. Ask for more"
            " devices, or a smaller batch."
        ) from None


def _console(*, is_aside: bool) -> Console:
    """Returns where to print: beside standard output, if that is for JSON."""
    console = Console(stderr=is_aside)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH
    return console


def main(argv: Sequence[str]) -> None:
    """Reads the flags, inspects, and prints."""
    wrong: list[str] = []
    question = _tried(wrong, _question, argv[1:])
    other = _tried(wrong, _other, question) if question else None
    asked = [each for each in (question, other) if each]
    targets = [q.target for q in asked if isinstance(q, ProgramQuestion)]
    chip = _tried(wrong, find_chip, _CHIP.value) if _CHIP.value else None
    known = {
        flag.name: _tried(wrong, parse_numbers, flag.name, flag.value)
        for flag in (_KERNELS, _TRIP_COUNTS)
        if flag.value
    }
    _tried(wrong, prepare_environment, targets)
    for each in asked:
        _tried(wrong, check, each)
    json, html = _tried(wrong, _files) or (None, None)
    if wrong:
        command.refuse(list(dict.fromkeys(wrong)))
    console = _console(is_aside=json == "-")
    try:
        with console.status("Reading what the compiler made"):
            answers = [_read(each, chip, known) for each in asked]
    except ValueError as error:
        sys.exit(str(error))
    # Files first: a reader like `head` may close the terminal's pipe.
    made = provenance.collect()
    if len(answers) == 1:
        found = answers[0]
        values, html_text = record.one(found, made), functools.partial(page.one, found)
    else:
        found = Comparison(before=answers[0], after=answers[1])
        values, html_text = record.two(found, made), functools.partial(page.two, found)
    # Files first: a reader like `head` may close the terminal's pipe.
    if json == "-":
        sys.stdout.write(record.text(values))
    elif json:
        pathlib.Path(json).write_text(record.text(values), encoding="utf-8")
    if html:
        pathlib.Path(html).write_text(html_text(made), encoding="utf-8")
    if _TRACE.value:
        write_trace(answers[0].timeline, _TRACE.value, title=answers[0].subject.title)
    if isinstance(found, Comparison):
        terminal.show_difference(console, found, _TOP.value)
    else:
        terminal.show(console, found, _TOP.value)
    for path in (json, html, _TRACE.value):
        if path and path != "-":
            console.print(f"  {path}", style="dim", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
