"""A folder of rows, and the pages made from it."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.claims import findings, page
from experiments.claims.claims import CLAIMS, CROSSOVERS
from experiments.claims.depth import rows_of
from experiments.claims.rows import FILE_NAME, Rows, read, write
from experiments.report import files
from experiments.report.record import Provenance, Record, decode
from experiments.report.tables import Table

MADE_BY = "provenance.json"
PAGE = "paper.html"


def keep(folder: Path, records: Iterable[Record]) -> None:
    """Writes the rows of `records`, and beside them who made them, once each."""
    kept = [record for record in records if record.status != "failed"]
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / FILE_NAME, rows_of(kept))
    made = sorted({_plain(record.provenance) for record in kept})
    lines = ",\n".join(made)
    (folder / MADE_BY).write_text(f"[\n{lines}\n]\n")


def _plain(provenance: Provenance) -> str:
    """Returns JSON without the time of each record."""
    fields = dataclasses.asdict(provenance)
    return json.dumps({**fields, "time": provenance.time[:10]}, sort_keys=True)


def read_rows(folder: Path) -> Rows:
    """Returns the rows of a folder.

    Raises:
      ValueError: there are none.
    """
    found = read(folder / FILE_NAME)
    if not found:
        raise ValueError(
            f"no rows in {folder / FILE_NAME}. A page is made from the rows of a sweep."
            " Run experiments.paper with --out first, or name its folder in --rows."
        )
    return Rows(found)


def provenance(folder: Path) -> Table:
    """Returns who made the rows of a folder."""
    path = folder / MADE_BY
    made = json.loads(path.read_text()) if path.exists() else []
    found = [decode(Provenance, item, "provenance") for item in made]
    return (
        ("date", "commit", "versions", "command"),
        [
            [
                p.time,
                p.commit[:12] + (", with changes" if p.dirty else ""),
                ", ".join(f"{n} {v}" for n, v in sorted(p.versions.items())),
                p.command,
            ]
            for p in found
        ],
    )


def write_page(rows: Path, out: Path, notes: Sequence[str] = ()) -> None:
    """Writes the page of `rows` into `out`, replaced in one step."""
    text = page.page(read_rows(rows), provenance(rows), notes)
    files.replace(out / PAGE, text)


def write_findings(rows: Path, path: Path, name: str) -> None:
    """Writes the Markdown of the rows in a folder, called `name`, into `path`."""
    path.write_text(findings.text(read_rows(rows), name))


def copy(rows: Path, to: Path) -> None:
    """Copies the rows of a folder, and who made them, to be kept."""
    to.mkdir(parents=True, exist_ok=True)
    for name in (FILE_NAME, MADE_BY):
        (to / name).write_bytes((rows / name).read_bytes())


def verdicts(rows: Path) -> list[str]:
    """Returns a line a claim, for a terminal."""
    found = read_rows(rows)
    return [
        f"{claim.name:4} {finding.verdict:14} {finding.because}"
        for claim in (*CLAIMS, *CROSSOVERS)
        for finding in [claim.judge(found)]
    ]
