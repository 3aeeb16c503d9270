"""The timelines of a point's programs as files for https://ui.perfetto.dev."""

import pathlib
import re

from experiments import evaluate
from experiments.evaluate import COMPILER, Compiler
from experiments.report.record import Point
from sharding.trace import write_trace


def write(
    point: Point, folder: pathlib.Path, compiler: Compiler = COMPILER
) -> list[str]:
    """Writes a trace of each phase of a point that fits; returns their names.

    Raises:
      ValueError: a program holds something that cannot be counted.
      OSError: the folder cannot be written.
    """
    target = compiler.target(point)
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    for phase, program in evaluate.programs(point, target, compiler).items():
        counted = compiler.count(program, target)
        found = evaluate.estimated(program, counted, target)
        words = (
            point.model, point.target, point.chip, point.partition, point.rules,
            f"batch{point.batch_size}", phase,
        )  # fmt: skip
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", "_".join(words)) + ".json"
        write_trace(found.timeline, folder / name, title=f"{point}, {phase}")
        names.append(name)
    return names
