"""The figures that are committed: error bands of reports, a page of docs, a test.

What is written here is what `experiments.validate` found with the records of this
repository, so that reports need nothing else and a test sees when predictions move.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments.report import provenance, validated
from experiments.report.validated import Figure
from experiments.validation import tables

RECORDS = provenance.ROOT / "docs" / "records"
PAGE = provenance.ROOT / "docs" / "validation.md"
_BEGIN, _END = (
    "<!-- figures: python -m experiments.validate --write -->",
    "<!-- end -->",
)


def write(figures: Sequence[Figure]) -> list[Path]:
    """Writes the figures of every committed record; returns where to."""
    made = provenance.collect()
    versions = {"python": made.python, **made.versions, "time": made.time}
    validated.write(validated.PATH, figures, versions)
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_figures(text, figures), encoding="utf-8")
    return [validated.PATH, PAGE]


def with_figures(page: str, figures: Sequence[Figure]) -> str:
    """Returns a page of docs with these figures between its two marks.

    Raises:
      ValueError: it has no such marks.
    """
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(
            f"cannot write figures into {PAGE.name}: it lacks {_BEGIN!r} or {_END!r}."
            " They say what is replaced. Put both on lines of their own."
        )
    return f"{before}{begin}\n\n{tables.as_markdown(figures)}\n\n{end}{after}"
