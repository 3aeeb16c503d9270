"""What was timed earlier, with what today's code and chip files predict of it."""

import dataclasses
from pathlib import Path
from typing import Any

from experiments.claims.rows import RUN
from experiments.report import validated
from experiments.report.record import Record
from experiments.report.store import FILE_NAME, read_records
from experiments.validation import load
from experiments.validation.predict import PHASES, AsMeasured, Measured


def find(root: Path) -> list[Measured]:
    """Returns the measurements in the folders of `root`, each folder one run.

    Of one question the newest run counts: an older one only where it timed a partition
    that no newer one did. Of another engine's there is nothing to predict, so they are
    left out.

    Raises:
      ValueError: a line is no record of this schema.
    """
    folders = sorted(path.parent for path in root.glob(f"*/{FILE_NAME}"))
    runs = [load.timed(folder, read_records(folder)[0]) for folder in folders]
    runs.sort(key=lambda run: max((_time(one) for one in run), default=""))
    newer: dict[tuple[object, ...], list[set[str]]] = {}
    found: list[Measured] = []
    for run in reversed(runs):
        asked: dict[tuple[object, ...], list[Measured]] = {}
        for one in run:
            asked.setdefault(_question(one.record), []).append(one)
        for question, beside in asked.items():
            partitions = {one.record.partition for one in beside}
            before = newer.setdefault(question, [])
            if not any(partitions <= others for others in before):
                found += beside
            before.append(partitions)
    return found


def _question(record: Record) -> tuple[object, ...]:
    """Returns all that was asked but the partition."""
    r = record
    return (
        r.model, r.chip, r.rules, r.dtype, r.weights, r.kv, r.layers, r.batch_size,
        r.input_len, r.output_len, r.asked_micro_batches, validated.choices_of(r),
    )  # fmt: skip


def _time(one: Measured) -> str:
    return one.record.provenance.time


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
