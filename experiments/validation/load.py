"""Finds the measured records in a folder of results."""

from collections.abc import Iterable
from pathlib import Path

from experiments.report import store
from experiments.report.record import Record
from experiments.validation.predict import Measured


def measured(root: Path) -> tuple[list[Measured], list[str]]:
    """Returns the measured records under `root`, and what was left out of them.

    Raises:
      ValueError: there is no such folder, no file of records in it or none that was
        measured, or a line is no record of this schema.
    """
    rest = (
        "Give the folder that experiments.measure wrote with --out, or one that holds"
        " several of them."
    )
    if not root.is_dir():
        raise ValueError(
            f"cannot validate the records of {root}: there is no such folder. Measured"
            f" records are read from the {store.FILE_NAME} of a folder. {rest}"
        )
    paths = sorted(root.rglob(store.FILE_NAME))
    if not paths:
        raise ValueError(
            f"cannot validate the records of {root}: it holds 0 files called"
            f" {store.FILE_NAME}. Measured records are read from them. {rest}"
        )
    total, found, notes = 0, list[Measured](), list[str]()
    for path in paths:
        records, dropped = store.read_records(path.parent)
        if dropped is not None:
            notes.append(f"The last line of {path} was cut off and is left out.")
        total += len(records)
        found += timed(path.parent, records)
    if not found:
        raise ValueError(
            f"cannot validate the records of {root}: 0 of {total} records are"
            f" measured. A prediction is compared with a time that was taken. {rest}"
        )
    return found, notes


def timed(folder: Path, records: Iterable[Record]) -> list[Measured]:
    """Returns those `records` of a folder that say how fast our programs ran."""
    return [
        Measured(record=record, folder=folder)
        for record in records
        if record.measurement is not None
        and record.status == "ok"
        and record.measurement.engine == "jaxllm"
    ]
