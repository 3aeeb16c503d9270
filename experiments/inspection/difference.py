"""Two answers side by side: totals, collectives that differ, and the lines responsible.

`sharding.hlo.compare` matches collectives; here equal ones of many layers are one row
before that, and all other work is compared by the line of source it comes from.
"""

import dataclasses
import functools
from collections.abc import Callable

from experiments.inspection import names
from experiments.inspection.answer import Answer
from experiments.inspection.tables import Cell, Table, count, seconds, size
from sharding.hlo.diff import Changed, Difference, Figure, compare
from sharding.hlo.render import figure_change

_NOWHERE = "no line"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """What one line of source costs in both programs, (before, after)."""

    source: str
    op_name: str
    time_s: tuple[float, float]
    flops: tuple[int, int]
    hbm_bytes: tuple[int, int]
    wire_bytes: tuple[int, int]

    @property
    def change_s(self) -> float:
        return self.time_s[1] - self.time_s[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two answers, and what differs between them."""

    before: Answer
    after: Answer

    @property
    def answers(self) -> tuple[Answer, Answer]:
        return (self.before, self.after)

    @property
    def title(self) -> str:
        return " → ".join(names.printable(a.subject.title) for a in self.answers)

    @functools.cached_property
    def difference(self) -> Difference:
        """What the library finds, with equal collectives of many layers as one row."""
        merged = [
            dataclasses.replace(
                a.analysis,
                ledger=dataclasses.replace(
                    a.analysis.ledger, collectives=tuple(a.collectives)
                ),
            )
            for a in self.answers
        ]
        return compare(*merged)

    @functools.cached_property
    def lines(self) -> list[Line]:
        """Every line whose work differs, those that change the time most first."""
        found = [_by_line(answer) for answer in self.answers]
        rows = []
        for source in dict.fromkeys([*found[0], *found[1]]):
            pair = [each.get(source, _Work()) for each in found]
            if pair[0] == pair[1]:
                continue
            name = pair[1].op_name or pair[0].op_name
            both = {
                field: (getattr(pair[0], field), getattr(pair[1], field))
                for field in ("time_s", "flops", "hbm_bytes", "wire_bytes")
            }
            rows.append(Line(source=source, op_name=name, **both))
        return sorted(rows, key=lambda line: -abs(line.change_s))


@dataclasses.dataclass
class _Work:
    time_s: float = 0.0
    flops: int = 0
    hbm_bytes: int = 0
    wire_bytes: int = 0
    op_name: str = dataclasses.field(default="", compare=False)


def _by_line(answer: Answer) -> dict[str, _Work]:
    """Returns the work of each line; its name is of what takes longest there."""
    found: dict[str, _Work] = {}
    for row in answer.bounds:  # the longest first
        work = found.setdefault(row.source or _NOWHERE, _Work(op_name=row.op_name))
        work.time_s += row.time_s
        work.flops += row.flops
        work.hbm_bytes += row.hbm_bytes
        work.wire_bytes += row.wire_bytes
    return found


def totals(found: Comparison) -> Table:
    """Returns one row for each figure of both programs."""
    rows = [
        (
            Cell(text=names.printable(figure.name.rpartition(", ")[0] or figure.name)),
            Cell(text=_figure(figure, figure.before)),
            Cell(text=_figure(figure, figure.after)),
            Cell(text=figure_change(figure.before, figure.after), mark=_worse(figure)),
        )
        for figure in found.difference.figures
        if figure.before or figure.after
    ]
    columns = ("", "before", "after", "change")
    return Table(columns=columns, rows=tuple(rows), figures=frozenset(columns[1:]))


def _figure(figure: Figure, value: float) -> str:
    if figure.name.endswith("bytes"):
        return size(value)
    return seconds(value) if figure.name.endswith(", s") else count(value)


def _worse(figure: Figure) -> str:
    """Returns "added" or "removed" where a cost did change."""
    if figure.name.startswith("aliased") or figure.before == figure.after:
        return ""
    return "added" if figure.after > figure.before else "removed"


def collectives(found: Comparison, limit: int | None = None) -> Table:
    """Returns one row for each collective that is not the same in both."""
    rows = found.difference.collectives
    columns = ("", "axis", "kind", "count", "each", "wire", "line", "loop", "operation")
    return Table(
        columns=columns,
        rows=tuple(map(_changed, rows[:limit])),
        figures=frozenset(["count", "each", "wire"]),
        dispensable=("each", "loop"),
        left_out=len(rows[limit:]) if limit else 0,
    )


def _changed(row: Changed) -> tuple[Cell, ...]:
    either, both = row.either, [each for each in (row.before, row.after) if each]
    counts = [f"{each.count:,}" for each in both]
    sizes = [size(each.payload_bytes_each) for each in both]
    wires = [size(each.wire_bytes) for each in both]
    return (
        Cell(text=row.verb, mark=row.verb),
        Cell(text=names.printable(either.axis)),
        Cell(text=either.kind),
        Cell(text=_pair(counts), order=row.count),
        Cell(text=_pair(sizes), order=either.payload_bytes_each),
        Cell(text=_pair(wires), order=row.wire_bytes),
        Cell(text=names.printable(either.source)),
        Cell(text=names.trips(either.loop), whole=either.loop),
        Cell(text=names.short(either.op_name) or "-", whole=either.op_name),
    )


def lines(found: Comparison, limit: int | None = None) -> Table:
    """Returns one row for each line of source whose work differs."""
    rows = found.lines
    columns = ("time", "change", "FLOPs", "HBM", "sent", "line", "operation")
    return Table(
        columns=columns,
        rows=tuple(map(_line, rows[:limit])),
        figures=frozenset(columns[:5]),
        dispensable=("HBM", "FLOPs"),
        left_out=len(rows[limit:]) if limit else 0,
    )


def _line(row: Line) -> tuple[Cell, ...]:
    before, after = row.time_s
    sign = "+" if row.change_s > 0 else "-"
    verb = "added" if row.change_s > 0 else "removed"
    return (
        Cell(text=_pair([seconds(s) for s in row.time_s]), order=after),
        Cell(
            text=f"{sign}{seconds(abs(row.change_s))}" if before != after else "",
            order=row.change_s,
            mark=verb if before != after else "",
        ),
        Cell(text=_both(row.flops, count), order=row.flops[1]),
        Cell(text=_both(row.hbm_bytes, size), order=row.hbm_bytes[1]),
        Cell(text=_both(row.wire_bytes, size), order=row.wire_bytes[1]),
        Cell(text=names.printable(row.source)),
        Cell(text=names.short(row.op_name), whole=row.op_name),
    )


def _both(pair: tuple[int, int], spell: Callable[[float], str]) -> str:
    return (
        _pair([spell(value) if value else "0" for value in pair]) if any(pair) else "-"
    )


def _pair(texts: list[str]) -> str:
    """Returns `a → b`, or the one text where they are equal."""
    return " → ".join(dict.fromkeys(texts))
