"""Two programs side by side: what was added, what went, and the lines responsible.

    difference = compare(analyze(before), analyze(after))
    print(difference)            # in a notebook, the record shows itself

Collectives are matched from the strictest likeness to the loosest, each row once:
axis and kind always, then op_name, source line and payload; op_name and payload (the
line moved); payload (the operation was renamed); op_name (the size changed). What is
left was removed or added.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from sharding.hlo.advice import Advice
from sharding.hlo.analysis import Analysis
from sharding.hlo.records import Collective
from sharding.hlo.render import (
    Rendered,
    Table,
    figure_bytes,
    figure_change,
    figure_count,
    figure_seconds,
)

_LIKENESS: tuple[Callable[[Collective], tuple], ...] = (
    lambda r: (r.axis, r.kind, r.payload_bytes_each, r.op_name, r.source),
    lambda r: (r.axis, r.kind, r.payload_bytes_each, r.op_name),
    lambda r: (r.axis, r.kind, r.payload_bytes_each),
    lambda r: (r.axis, r.kind, r.op_name),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of both programs, such as FLOPs; the unit ends its name."""

    name: str
    before: float
    after: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changed:
    """Collectives of one axis, kind, size and line in both programs.

    Attributes:
      before: None where it was added.
      after: None where it was removed.
    """

    before: Collective | None
    after: Collective | None

    @property
    def verb(self) -> str:
        """What happened to it: "added", "removed" or "changed"."""
        if self.before is None:
            return "added"
        return "removed" if self.after is None else "changed"

    @property
    def either(self) -> Collective:
        """The row after, or before where there is none after."""
        found = self.after or self.before
        assert found is not None
        return found

    @property
    def count(self) -> int:
        """Executions more in one call, negative where fewer."""
        return _count(self.after) - _count(self.before)

    @property
    def wire_bytes(self) -> int:
        """Bytes sent more in one call, negative where fewer."""
        return _wire(self.after) - _wire(self.before)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference(Rendered):
    """What changed from one program to another, of one device and one call.

    Attributes:
      before, after: names of the programs.
      figures: totals of both, changed or not.
      by_axis: count of collectives by (axis, kind) where they differ.
      collectives: those that are not the same, most changed bytes first.
      advice_gone, advice_new: findings of one program only, by kind and sentence.
    """

    before: str
    after: str
    figures: tuple[Figure, ...]
    by_axis: tuple[tuple[str, str, int, int], ...]
    collectives: tuple[Changed, ...]
    advice_gone: tuple[Advice, ...]
    advice_new: tuple[Advice, ...]

    @property
    def is_same(self) -> bool:
        """Whether no figure and no collective differs."""
        return not self.collectives and all(f.before == f.after for f in self.figures)

    def _title(self) -> str:
        return f"{self.before} (before) and {self.after} (after), of one device"

    def _lines(self) -> tuple[str, ...]:
        return ("Nothing differs.",) if self.is_same else ()

    def _tables(self) -> tuple[Table, ...]:
        figures = Table(
            title="In one call",
            columns=("what", "before", "after", "change"),
            rows=tuple(
                (
                    f.name,
                    _figure(f, f.before),
                    _figure(f, f.after),
                    figure_change(f.before, f.after),
                )
                for f in self.figures
            ),
            right=frozenset(["before", "after", "change"]),
        )
        axes = Table(
            title="Collectives by axis",
            columns=("axis", "kind", "before", "after"),
            rows=tuple((a, k, str(old), str(new)) for a, k, old, new in self.by_axis),
            right=frozenset(["before", "after"]),
        )
        return figures, axes, self._changes(), self._findings()

    def _changes(self) -> Table:
        return Table(
            title="Collectives that differ",
            columns=("", "axis", "kind", "count", "sent", "source", "op_name", "loop"),
            rows=tuple(
                (
                    c.verb,
                    c.either.axis,
                    c.either.kind,
                    f"{c.count:+d}",
                    f"{'+' if c.wire_bytes > 0 else ''}{figure_bytes(c.wire_bytes)}",
                    c.either.source,
                    c.either.op_name,
                    c.either.loop,
                )
                for c in self.collectives
            ),
            right=frozenset(["count", "sent"]),
        )

    def _findings(self) -> Table:
        rows = [("gone", a) for a in self.advice_gone]
        rows += [("new", a) for a in self.advice_new]
        return Table(
            title="Worth a look",
            columns=("", "bytes", "what", "source"),
            rows=tuple(
                (w, figure_bytes(a.num_bytes), a.what, a.source) for w, a in rows
            ),
            right=frozenset(["bytes"]),
        )


def compare(before: Analysis, after: Analysis) -> Difference:
    """Returns what changed from one program to the other.

    Args:
      before: made with the same mesh and chip as the other; axes go by their names.
      after: likewise.
    """
    olds, news = before.ledger.collectives, after.ledger.collectives
    counts = [
        (axis, kind, _number(olds, axis, kind), _number(news, axis, kind))
        for axis, kind in dict.fromkeys((r.axis, r.kind) for r in (*olds, *news))
    ]
    gone, new = (
        {(a.kind, a.what): a for a in analysis.advice} for analysis in (before, after)
    )
    return Difference(
        before=before.name,
        after=after.name,
        figures=_figures(before, after),
        by_axis=tuple(row for row in counts if row[2] != row[3]),
        collectives=_match(olds, news),
        advice_gone=tuple(a for key, a in gone.items() if key not in new),
        advice_new=tuple(a for key, a in new.items() if key not in gone),
    )


def _number(rows: Iterable[Collective], axis: str, kind: str) -> int:
    return sum(r.count for r in rows if (r.axis, r.kind) == (axis, kind))


def _figures(before: Analysis, after: Analysis) -> tuple[Figure, ...]:
    both = (before, after)

    def figure(name: str, of: Callable[[Analysis], float]) -> Figure:
        return Figure(name=name, before=of(before), after=of(after))

    axes = dict.fromkeys(axis for a in both for axis in a.wire_bytes)
    sent = [
        figure(f"sent over {axis}, bytes", lambda a, x=axis: a.wire_bytes.get(x, 0))
        for axis in axes
    ]
    bounds = [a.roofline for a in both]
    time = []
    if bounds[0] is not None and bounds[1] is not None:
        time = [
            Figure(
                name="least time, s", before=bounds[0].total_s, after=bounds[1].total_s
            )
        ]
    return (
        figure("FLOPs", lambda a: a.flops),
        figure("FLOPs of matrix products", lambda a: a.matmul_flops),
        figure("HBM, bytes", lambda a: a.hbm_bytes),
        *sent,
        figure("arguments, bytes", lambda a: a.memory.argument_bytes),
        figure("outputs, bytes", lambda a: a.memory.output_bytes),
        figure("aliased, bytes", lambda a: a.memory.alias_bytes),
        figure("temporaries, bytes", lambda a: a.memory.temporary_bytes),
        figure("peak memory, bytes", lambda a: a.memory.peak_bytes),
        *time,
    )


def _figure(figure: Figure, value: float) -> str:
    if figure.name.endswith("bytes"):
        return figure_bytes(value)
    return figure_seconds(value) if figure.name.endswith(", s") else figure_count(value)


def _match(
    before: Sequence[Collective], after: Sequence[Collective]
) -> tuple[Changed, ...]:
    """Returns the rows that are not the same in both."""
    olds, news = list(before), list(after)
    changed: list[Changed] = []
    for likeness in _LIKENESS:
        waiting: dict[tuple, list[Collective]] = {}
        for row in news:
            waiting.setdefault(likeness(row), []).append(row)
        unmatched = []
        for old in olds:
            found = waiting.get(likeness(old))
            if not found:
                unmatched.append(old)
                continue
            new = found.pop(0)
            if (old.count, old.wire_bytes) != (new.count, new.wire_bytes):
                changed.append(Changed(before=old, after=new))
        olds, news = unmatched, [row for rows in waiting.values() for row in rows]
    changed += [Changed(before=old, after=None) for old in olds]
    changed += [Changed(before=None, after=new) for new in news]
    return tuple(sorted(changed, key=lambda c: -abs(c.wire_bytes)))


def _count(row: Collective | None) -> int:
    return row.count if row else 0


def _wire(row: Collective | None) -> int:
    return row.wire_bytes if row else 0
