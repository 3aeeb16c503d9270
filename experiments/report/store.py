"""The results file: records appended one line each, safe against being killed.

A sweep killed at any moment leaves whole lines and at most one cut-off last line.
Reading drops that line and says so; opening for writing also cuts it off.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Self

from experiments.report.lines import Lines
from experiments.report.record import Point, Record

FILE_NAME = "results.jsonl"


def read_records(folder: Path) -> tuple[list[Record], str | None]:
    """Returns the records of a folder in the order written, and what was dropped.

    The second value is None, or the cut-off last line of a killed sweep.

    Raises:
      ValueError: a complete line is not a record of this schema.
    """
    path = folder / FILE_NAME
    data = path.read_bytes() if path.exists() else b""
    *lines, rest = data.split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(Record.from_json(line.decode()))
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(
                f"cannot read line {number} of {path}: {error} Every complete line"
                " is one record; remove that line, or use another folder."
            ) from error
    return records, rest.decode(errors="replace") if rest else None


class Store:
    """Appends records to `folder/results.jsonl`; one process at a time.

    Attributes:
      records: by key, the newest of each; failed ones included.
      dropped: the cut-off last line found on opening, or None.

    Raises:
      ValueError: another process has the folder open, or see `read_records`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lines = Lines(folder / FILE_NAME)
        self.dropped = self._lines.dropped
        try:
            records, _ = read_records(folder)
        except ValueError:
            self._lines.close()
            raise
        self.records = newest(records)

    def lacks(self, point: Point) -> bool:
        """Whether `point` has no record yet, or one of a failure to be tried again."""
        record = self.records.get(point.key)
        return record is None or record.status == "failed"

    def append(self, record: Record) -> None:
        """Writes one record; it is on disk when this returns."""
        self._lines.append(record.to_json())
        self.records.pop(record.key, None)
        self.records[record.key] = record

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()


def newest(records: Iterable[Record]) -> dict[str, Record]:
    """Returns records by key; a later one replaces an earlier one of the same key."""
    found: dict[str, Record] = {}
    for record in records:
        found.pop(record.key, None)  # so that the order stays the one written
        found[record.key] = record
    return found


def current(records: Iterable[Record]) -> tuple[list[Record], int]:
    """Returns the records to report, and how many older ones were left out.

    Records of one question (model, target, chip, dtype and lengths) that were made
    by different code, versions or compiler flags are not comparable: only those
    made like the newest one of that question are kept.
    """
    kept = list(newest(records).values())
    context = {_question(r): r.context for r in kept}
    chosen = [r for r in kept if r.context == context[_question(r)]]
    return chosen, len(kept) - len(chosen)


def _question(record: Record) -> tuple[object, ...]:
    return (
        record.model, record.target, record.chip, record.dtype, record.weights,
        record.kv, record.input_len, record.output_len, record.layers,
    )  # fmt: skip
