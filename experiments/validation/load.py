"""Finds the measured records in a folder of results."""

from collections.abc import Iterable
from pathlib import Path

from experiments.report import store, validated
from experiments.report.record import Record
from experiments.validation.predict import Measured


def measured(root: Path) -> tuple[list[Measured], list[str]]:
    """Returns the measured records under `root`, and what was left out of them.

    Of one point measured more than once the newest record counts.

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
    newest = latest(found)
    if not newest:
        raise ValueError(
            f"cannot validate the records of {root}: 0 of {total} records are"
            f" measured. A prediction is compared with a time that was taken. {rest}"
        )
    if older := len(found) - len(newest):
        notes.append(f"{older} older measurements of the same points are left out.")
    return newest, notes


def timed(folder: Path, records: Iterable[Record]) -> list[Measured]:
    """Returns those `records` of a folder that say how fast our programs ran."""
    return [
        Measured(record=record, folder=folder)
        for record in records
        if record.measurement is not None
        and record.status == "ok"
        and record.measurement.engine == "jaxllm"
    ]


def latest(found: Iterable[Measured]) -> list[Measured]:
    """Returns the newest measurement of each point."""
    newest = dict[tuple[object, ...], Measured]()
    for one in found:
        key = _question(one.record)
        if key not in newest or _time(newest[key]) <= _time(one):
            newest[key] = one
    return list(newest.values())


def _question(record: Record) -> tuple[object, ...]:
    """Returns what was measured: every input but versions and code.

    Of the code only how it wrote the programs.
    """
    r = record
    own = (getattr(r, "weights", None), getattr(r, "kv", None))
    return (
        r.model, r.chip, r.num_devices, r.partition, r.rules, r.dtype, *own, r.layers,
        r.batch_size, r.input_len, r.output_len, r.asked_micro_batches,
        validated.choices_of(r),
        *(getattr(r.prefill, how, None) for how in validated.WRITING),
        *(getattr(r.decode, how, None) for how in validated.WRITING),
    )  # fmt: skip


def _time(one: Measured) -> str:
    return one.record.provenance.time
