"""What was timed earlier, with what today's code and chip files predict of it."""

import dataclasses
from pathlib import Path
from typing import Any

from experiments.claims.rows import RUN
from experiments.report.record import Record
from experiments.report.store import FILE_NAME, read_records
from experiments.validation import load
from experiments.validation.predict import PHASES, AsMeasured, Measured


def find(root: Path) -> list[Measured]:
    """Returns the measurements in the folders of `root`, each folder one run.

    Of another engine's there is nothing to predict, so they are left out.

    Raises:
      ValueError: a line is no record of this schema.
    """
    folders = sorted(path.parent for path in root.glob(f"*/{FILE_NAME}"))
    return [
        one for folder in folders for one in load.timed(folder, read_records(folder)[0])
    ]


def answer(measured: Measured) -> Record:
    """Returns the record with its predictions made anew, in a worker process.

    They are None where its programs can neither be read nor be written again.
    """
    record = measured.record
    new: dict[str, Any] = {}
    compiler = AsMeasured(measured, record.chip)
    for metric, phase in PHASES.items():
        found = compiler.answer(phase)
        parts = None if found is None else found.parts
        new[f"{metric}_parts_s"] = parts
        new[f"predicted_{metric}_s"] = None if parts is None else parts.total_s
    context = {**record.context, RUN: measured.folder.name}
    return dataclasses.replace(record, context=context, **new)
