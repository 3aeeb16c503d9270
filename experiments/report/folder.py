"""A folder of results and the reports in it, all made from `results.jsonl`."""

from collections.abc import Sequence
from pathlib import Path

from experiments.report import files, store, tables
from experiments.report.frontier import Objective, Question, questions
from experiments.report.record import Record

REPORTS = ("report.html", "report.md", "pareto.csv")


def read(folder: Path) -> tuple[list[Record], list[str]]:
    """Returns the records to report, and what a reader must know was left out.

    Raises:
      ValueError: there are none, or a line is not a record.
    """
    records, dropped = store.read_records(folder)
    chosen, older = store.current(records)
    if not chosen:
        raise ValueError(
            f"no records in {folder / store.FILE_NAME}. A report is made from a"
            " sweep's results; run experiments.tradeoff with this --out first."
        )
    notes = []
    if older:
        notes.append(
            f"{older} older records of these questions, made by other code, versions"
            f" or compiler flags, are in {store.FILE_NAME} and left out here."
        )
    if dropped is not None:
        notes.append(
            f"The last line of {store.FILE_NAME} was cut off and is left out; the"
            " same sweep does that point again."
        )
    return chosen, notes


def write(folder: Path, objective: Objective) -> list[Question]:
    """Makes every report of `folder` from its records; returns what they answer.

    A report is replaced in one step, so a reader never sees half of one. The page is
    left out where the packages that draw it are not installed, as on a machine that
    only measures.
    """
    records, notes = read(folder)
    asked = questions(records)
    texts = {
        "report.html": _page(asked, objective, notes),
        "report.md": tables.markdown_report(asked, objective, notes),
        "pareto.csv": tables.csv_text(asked, objective),
    }
    for name, text in texts.items():
        if text is not None:
            files.replace(folder / name, text)
    return asked


def _page(
    asked: Sequence[Question], objective: Objective, notes: Sequence[str]
) -> str | None:
    try:
        from experiments.report import html
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "plotly"):
            raise
        return None
    return html.page(asked, objective, notes)
