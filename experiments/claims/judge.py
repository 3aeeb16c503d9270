"""What a verdict is made of: cells, one a chip and model, each with its rows.

holds            in every cell
does not hold    in none
depends on ...   on the chip, the batch, or on memory that is not there
not known        no row was made yet
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from experiments.claims.printed import Case
from experiments.claims.rows import ANY_MEMORY, Row, Rows

HOLDS, FAILS, DEPENDS, UNKNOWN = "holds", "does not hold", "depends", "not known"
Figure = tuple[str, dict[str, Any]]
# Engines differ by 5 to 25 % on one machine: a ratio within a tenth is the same.
CLOSE = 0.10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """What was found on one chip.

    Attributes:
      chip: whose rates, or what was measured.
      subject: model and prompts, or partition and batch.
      holds: whether the claim does; None where it cannot be told.
      text: figures, in words.
      rows: what the text is from.
      direction: whether at least the order is the paper's.
    """

    chip: str
    subject: str
    holds: bool | None
    text: str
    rows: tuple[Row, ...] = ()
    direction: bool | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of its rows, each once."""
        return tuple(dict.fromkeys(row.key for row in self.rows))

    @property
    def assumes_memory(self) -> bool:
        """Whether a point does not fit, and was priced with the memory it needs."""
        return any(row.memory == ANY_MEMORY for row in self.rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """The verdict on one claim, and why.

    Attributes:
      verdict: "holds", "does not hold", "depends" or "not known".
      because: one sentence or two.
      cells: predictions, by chip.
      measured: cells of what was timed, which stand beside the verdict.
    """

    verdict: str
    because: str
    cells: tuple[Cell, ...]
    measured: tuple[Cell, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every row behind the verdict, each once."""
        cells = (*self.cells, *self.measured)
        return tuple({row.key: row for cell in cells for row in cell.rows}.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim of the paper.

    Attributes:
      name: "C1" to "C14".
      printed: what the paper says, in our words.
      judge: from rows to a finding.
      figures: from rows to titled Plotly figures; none without rows.
      caption: of the figures.
    """

    name: str
    printed: str
    judge: Callable[[Rows], Finding]
    figures: Callable[[Rows], list[Figure]]
    caption: str


def verdict(
    cells: Sequence[Cell], *, on: str, measured: Sequence[Cell] = (), why: str = ""
) -> Finding:
    """Returns the finding that `cells` add up to.

    Args:
      cells: of predictions.
      on: what it depends on, if cells differ.
      measured: cells to stand beside them.
      why: appended to what is said of every verdict.
    """
    known = [cell for cell in cells if cell.holds is not None]
    yes = [cell for cell in known if cell.holds]
    both = tuple(cells), tuple(measured)
    if not known:
        return Finding(
            verdict=UNKNOWN,
            because="No point of it has times yet.",
            cells=both[0],
            measured=both[1],
        )
    if len(yes) == len(known):
        word, because = HOLDS, f"In all of {len(known)} cases."
    elif not yes:
        word, because = FAILS, f"In none of {len(known)} cases."
        toward = [cell for cell in known if cell.direction]
        if toward:
            some = "all" if len(toward) == len(known) else f"{len(toward)}"
            because += f" The order is the paper's in {some} of them, the size is not."
    else:
        word = DEPENDS
        because = (
            f"Depends on {on}: it holds in {len(yes)} of {len(known)} cases,"
            f" {_where(known)}."
        )
    assumed = sum(cell.assumes_memory for cell in known)
    if assumed:
        because += (
            f" {assumed} {'cases rest' if assumed > 1 else 'case rests'} on memory that"
            " the node does not have (†)."
        )
    return Finding(
        verdict=word,
        because=f"{because} {why}".strip(),
        cells=both[0],
        measured=both[1],
    )


def _where(cells: Sequence[Cell]) -> str:
    """Returns how many cells hold, told apart by what tells them apart best.

    That is the chip or a part of the subject, as the batch: whichever leaves the
    fewest cells among others that went the other way.
    """
    told = [(cell.chip, *cell.subject.split(", ")) for cell in cells]
    sortings = []
    for i in range(min(map(len, told))):
        groups: dict[str, list[bool]] = {}
        for parts, cell in zip(told, cells, strict=True):
            groups.setdefault(parts[i], []).append(bool(cell.holds))
        astray = sum(min(sum(g), len(g) - sum(g)) for g in groups.values())
        sortings.append((astray, i, groups))
    *_, groups = min(sortings)
    return "; ".join(
        f"{name}: {sum(group)} of {len(group)}"
        for name, group in groups.items()
        if any(group)
    )


def close(found: float, printed: float) -> bool:
    """Whether a ratio is the printed one within a tenth."""
    return abs(found / printed - 1) <= CLOSE


def missing(chip: str, subject: str, *rows: Row | None) -> Cell:
    """Returns the cell of a question whose rows are not all there, and why."""
    reasons = [row.reason for row in rows if row is not None and row.reason]
    return Cell(
        chip=chip,
        subject=subject,
        holds=None,
        text=reasons[0] if reasons else "not computed",
        rows=tuple(row for row in rows if row is not None),
    )


def subject(case: Case, batch_size: int) -> str:
    """Returns the name of a case at a batch size."""
    return f"{case.name}, batch {batch_size:,}"
