"""Compiled programs kept beside the records of a run, to be priced again later.

A file holds a line of JSON, what the compiler said of the program and who made it, and
then its optimised HLO as it came; compressed. The program that was timed is thereby
known for good: a change of the code that writes programs cannot be taken for an error
of the estimate, and no compiler is needed to price it with other rates.
"""

import dataclasses
import json
import lzma
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.report import files
from experiments.report.record import Point, Record, decode
from sharding.program import CompiledProgram, Memory

FOLDER = "programs"
_PRESET = 3  # of lzma: as small as 6, and ten times as fast


def path(folder: Path, point: Point | Record, phase: str) -> Path:
    """Returns where a program of `point` lies, in the `folder` of its record."""
    name = f"{point.partition}_{point.rules}_batch{point.batch_size}_{phase}"
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    return folder / FOLDER / f"{safe}_{point.key}.hlo.xz"


def write(file: Path, compiled: CompiledProgram, made: Mapping[str, Any]) -> None:
    """Writes a program in one step.

    Args:
      file: from `path`.
      compiled: the program.
      made: by which `commit` and `versions`, and whether for `attached` devices.
    """
    figures = {
        field.name: getattr(compiled, field.name)
        for field in dataclasses.fields(compiled)
        if field.name not in ("text", "executable")
    }
    figures["memory"] = dataclasses.asdict(compiled.memory)
    head = json.dumps({"made": dict(made), "compiled": figures})
    text = f"{head}\n{compiled.text}"
    files.replace(file, lzma.compress(text.encode(), preset=_PRESET))


def read(file: Path) -> tuple[CompiledProgram, dict[str, Any]]:
    """Returns a program that `write` wrote, which cannot be run, and how it was made.

    Raises:
      ValueError: the file is damaged.
    """
    try:
        head, _, text = lzma.decompress(file.read_bytes()).decode().partition("\n")
        header = json.loads(head)
        figures, made = header["compiled"], dict(header["made"])
        memory = decode(Memory, figures.pop("memory"), "memory")
        compiled = CompiledProgram(text=text, memory=memory, executable=None, **figures)
    except (lzma.LZMAError, EOFError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"cannot read {file}: {type(error).__name__}, {error}. It holds a compiled"
            " program. Restore it, or remove it to have the program"
            " compiled again by today's code."
        ) from error
    return compiled, made
