"""The figures that are committed: error bands of reports, a page of docs, a test.

What is written here is what `experiments.validate` found with the records of this
repository, so that reports need nothing else and a test sees when predictions move.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments.report import provenance, validated
from experiments.report.validated import Figure
from experiments.validation import described, tables
from experiments.validation.described import Pair

RECORDS = provenance.ROOT / "docs" / "records"
PAGE = provenance.ROOT / "docs" / "validation.md"
_BEGIN = "<!-- {}: python -m experiments.validate --write -->"
_END = "<!-- end -->"


def write(figures: Sequence[Figure], pairs: Sequence[Pair]) -> list[Path]:
    """Writes what was found of every committed record; returns where to.

    Args:
      figures: times.
      pairs: programs.
    """
    made = provenance.collect()
    versions = {"python": made.python, **made.versions, "time": made.time}
    validated.write(validated.PATH, figures, versions)
    text = PAGE.read_text(encoding="utf-8")
    text = replaced(text, "figures", tables.as_markdown(figures))
    text = replaced(text, "programs", described.as_markdown(pairs))
    PAGE.write_text(text, encoding="utf-8")
    return [validated.PATH, PAGE]


def replaced(page: str, name: str, found: str) -> str:
    """Returns a page of docs with `found` between the two marks of `name`.

    Raises:
      ValueError: it has no such marks.
    """
    mark = _BEGIN.format(name)
    before, begin, rest = page.partition(mark)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(
            f"cannot write {name} into {PAGE.name}: it lacks {mark!r} or {_END!r}."
            " They say what is replaced. Put both on lines of their own."
        )
    return f"{before}{begin}\n\n{found}\n\n{end}{after}"
