"""What to inspect: a file of HLO, a dump folder, standard input, or our own program.

`check` refuses a question before anything long is done; `read` answers it with a
`Subject`: one optimised program, and what is known besides.
"""

import dataclasses
import difflib
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.inspection.dumps import Dump, choose, list_dumps
from experiments.report import units
from jaxllm import config as config_lib
from sharding import choices
from sharding.chips import Chip
from sharding.hlo.programs import refuse_other_text
from sharding.partition import Partition, Workload
from sharding.partition import check as check_partition
from sharding.program import Memory, Phase, Program
from sharding.target import Target, parse_target

STDIN = "-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileQuestion:
    """A program that somebody compiled.

    Attributes:
      path: of a text, a .hlo.pb, or a folder of dumps; "-" is standard input.
      module: which program of a folder; None is the largest.
      mesh: sizes of the mesh axes by name; None names no axes.
    """

    path: str
    module: str | None = None
    mesh: Mapping[str, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramQuestion:
    """A program of ours, to be compiled."""

    model: str
    partition: str
    phase: Phase
    target: str
    rules: str
    batch_size: int
    input_len: int
    output_len: int
    dtype: str
    layers: str
    weights: str | None = None
    kv: str | None = None

    def changed(self, text: str) -> "ProgramQuestion":
        """Returns this question with other answers, "partition=tp8,layers=scanned".

        Raises:
          ValueError: a name is no attribute, or its value of the wrong kind.
        """
        values: dict[str, str | int] = {}
        known = [field.name for field in dataclasses.fields(self)]
        for part in text.split(","):
            name, equals, value = part.partition("=")
            if not equals or name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(
                    f"cannot read {part!r} in --diff={text}: {hint}There are"
                    f" {', '.join(known)}. A difference is a file, or what changes in"
                    " the program asked for. Write it like partition=tp8."
                )
            values[name] = value
            if isinstance(getattr(self, name), int):
                if not re.fullmatch(r"[1-9]\d*", value):
                    raise ValueError(
                        f"cannot read {part!r} in --diff={text}: {value!r} is no number"
                        " of at least 1. A size is a whole number. Write it like"
                        f" {name}={getattr(self, name)}."
                    )
                values[name] = int(value)
        return dataclasses.replace(self, **values)  # pyright: ignore[reportArgumentType]


Question = FileQuestion | ProgramQuestion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """One optimised program, and what is known besides.

    Attributes:
      title: a few words that tell it from others.
      facts: where it is from, one sentence part each.
      program: what `sharding.hlo.analyze` takes: compiled, its text, or a path.
      axes: sizes of the mesh axes by name; None where nobody said.
      chip: what it was compiled for; None where nobody said.
      memory: by what it is for; None where only the program is known.
      dumps: the programs of a folder that this one was chosen from, if from several.
    """

    title: str
    facts: tuple[str, ...]
    program: Any = dataclasses.field(repr=False)
    axes: Mapping[str, int] | None
    chip: Chip | None = None
    memory: Memory | None = None
    dumps: tuple[Dump, ...] = ()


def parse_mesh(text: str) -> dict[str, int]:
    """Returns the axes of `data=2,tensor=4`, in order.

    Raises:
      ValueError: it is not written like that.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([^\s=](?:[^=]*[^\s=])?)=([1-9]\d*)\s*", part)
        if not match or match[1] in axes:
            raise ValueError(
                f"cannot read {part!r} in mesh {text!r}; an axis is a name and the"
                " number of devices along it, each name once, in the order of the mesh."
                " Write it like data=2,tensor=4."
            )
        axes[match[1]] = int(match[2])
    return axes


def parse_numbers(flag: str, text: str) -> dict[str, int]:
    """Returns the numbers of `while.5=80,while.7=3`, by name.

    Raises:
      ValueError: it is not written like that.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = part.rpartition("=")
        if not equals or not name.strip() or not re.fullmatch(r"\d+", value.strip()):
            raise ValueError(
                f"cannot read {part!r} in --{flag}={text}; it is names and whole"
                " numbers. Write it like NAME=NUMBER,NAME=NUMBER."
            )
        found[name.strip().lstrip("%")] = int(value)
    return found


def check(question: Question) -> None:
    """Refuses a question that cannot be answered, before anything long is done.

    Raises:
      ValueError: with what was asked, the facts, the rule and what to change.
      ModuleNotFoundError: the compiler for a target is not installed.
    """
    if isinstance(question, ProgramQuestion):
        _program(question)
    else:
        _find(question)


def read(question: Question) -> Subject:
    """Returns what `question` asks about, compiled or read.

    Raises:
      ValueError: as `check`, or the file is no program.
      ModuleNotFoundError: the compiler for a target is not installed.
    """
    if isinstance(question, FileQuestion):
        return _read_file(question)
    q = question
    program, target = _program(q)
    compiled = program.compile(target)
    facts = (
        f"{q.batch_size} sequences, {q.input_len:,} tokens in, {q.output_len:,} out",
        f"rules {q.rules}",
        q.dtype,
        *([f"weights {q.weights}"] if q.weights else []),
        *([f"cache {q.kv}"] if q.kv else []),
        f"layers {program.layers}",
        *([f"ticks {program.ticks}"] if program.partition.stage > 1 else []),
        *([f"attention {program.attention}"] if q.phase == "prefill" else []),
        f"compiled in {units.seconds(compiled.compile_s)}",
    )
    return Subject(
        title=f"{q.phase} of {q.model}, {q.partition} on {q.target}",
        facts=facts,
        program=compiled.executable,
        axes=program.partition.axes,
        chip=target.chip,
        memory=compiled.memory,
    )


def _program(question: ProgramQuestion) -> tuple[Program, Target]:
    """Returns the program asked for, abstract, and what to compile it for."""
    q = question
    for name, value, known in (
        ("phase", q.phase, ("prefill", "decode")),
        ("layers", q.layers, ("auto", "unrolled", "scanned")),
        ("dtype", q.dtype, ("bfloat16", "float16", "float32")),
    ):
        if value not in known:
            raise ValueError(
                f"no {name} {value!r}; it is one of {', '.join(known)}. Choose one."
            )
    config = config_lib.load(q.model)
    partition = Partition.parse(q.partition, q.rules)
    workload = Workload(
        batch_size=q.batch_size, input_len=q.input_len, output_len=q.output_len
    )
    target = parse_target(q.target)
    stored: dict[str, Any] = dict(weights=q.weights, kv=q.kv)
    check_partition(
        config,
        partition,
        workload,
        num_devices=target.num_devices,
        target=target.name,
    )
    program = Program(
        phase=q.phase,
        config=config,
        partition=partition,
        workload=workload,
        dtype=q.dtype,
        **stored,
    )
    return choices.choose(program, target, layers=q.layers), target


def _read_file(question: FileQuestion) -> Subject:
    path, every = _find(question)
    try:
        data = path.read_bytes() if path else sys.stdin.buffer.read()
    except OSError as error:
        raise ValueError(
            f"cannot read {path}: {error.strerror}. A program is a file that can be"
            " read. Give another, or change its permissions."
        ) from None
    title = path.name if path else "standard input"
    facts: list[str] = []
    program: Any = path or data
    if b"\0" not in data:  # else a proto, or compressed
        program = text = data.decode("utf-8", errors="replace")
        refuse_other_text(text, title)
        facts.append(f"{len(text.splitlines()):,} lines")
    if every:
        chosen = "the largest of" if question.module is None else "one of"
        facts.append(f"{chosen} {len(every)} programs in {question.path}")
    return Subject(
        title=title,
        facts=tuple(facts),
        program=program,
        axes=question.mesh,
        dumps=tuple(
            dataclasses.replace(dump, is_chosen=dump.path == path) for dump in every
        ),
    )


def _find(question: FileQuestion) -> tuple[pathlib.Path | None, Sequence[Dump]]:
    """Returns the file to read, and all there were to choose from; None is stdin."""
    path = pathlib.Path(question.path)
    if question.path != STDIN and path.is_dir():
        every = list_dumps(path)
        return choose(path, question.module).path, every if len(every) > 1 else ()
    if question.path != STDIN and not path.is_file():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        near = difflib.get_close_matches(path.name, [p.name for p in beside], 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"no file {str(path)!r}: {hint}A program is a file of compiled.as_text(), a"
            " .hlo.pb, a folder of --xla_dump_to, or - for standard input. Give one of"
            " these."
        )
    if question.module is not None:
        what = "standard input" if question.path == STDIN else f"the file {path}"
        raise ValueError(
            f"--module={question.module} with {what}, which holds one program. A module"
            " is chosen from a folder of dumps. Leave --module out, or give the folder."
        )
    return (None if question.path == STDIN else path), ()
