"""An answer as tables, the same for a terminal and for a page.

A cell is finished text, with the value that sorts it and, where the text was made
short, all of it.
"""

import dataclasses
from collections.abc import Sequence

from experiments.inspection import names
from experiments.inspection.answer import Answer
from experiments.report import units
from sharding.hlo.advice import Advice
from sharding.hlo.memory import Buffer
from sharding.hlo.records import Collective, Loop
from sharding.hlo.roofline import Bound

# What the time of an instruction is spent on; the words a reader sees.
LIMITS = {"compute": "compute", "hbm": "HBM", "links": "links", "latency": "latency"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """Text to show; `order` sorts a figure, `whole` is what `text` was made from."""

    text: str
    order: float | None = None
    whole: str = ""
    mark: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells under names.

    Attributes:
      figures: columns to align right.
      dispensable: columns that a narrow place goes without, the first one first.
      left_out: rows that there are besides.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    figures: frozenset[str] = frozenset()
    dispensable: tuple[str, ...] = ()
    left_out: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """Advice: (what, file:line, evidence) of each place, and one change for all."""

    places: tuple[tuple[str, ...], ...]
    change: str


_FIGURES = frozenset([
    "count", "each", "total", "wire", "time", "share", "FLOPs", "HBM", "FLOPs/B",
])  # fmt: skip


def size(value: float) -> str:
    """Returns bytes as people read them; below 1 kB exactly."""
    return f"{value:,.0f} B" if abs(value) < 1000 else units.bytes_(value)


def count(value: float) -> str:
    """Returns a number of operations; below 1000 exactly."""
    return f"{value:,.0f}" if abs(value) < 1000 else units.count(value)


def seconds(value: float) -> str:
    """Returns a time; what is no time on any chip only as that."""
    return "< 1 ns" if 0 < value < 1e-9 else units.seconds(value)


def collectives(answer: Answer, limit: int | None = None) -> Table:
    """Returns one row for each collective, those that send most first."""
    rows = sorted(answer.collectives, key=lambda row: -row.wire_bytes)
    columns = ("axis", "kind", "count", "each", "total", "wire", "time")
    return Table(
        columns=(*columns, "line", "loop", "operation"),
        rows=tuple(_collective(answer, row) for row in rows[:limit]),
        figures=_FIGURES,
        dispensable=("total", "each", "loop"),
        left_out=len(rows[limit:]) if limit else 0,
    )


def _collective(answer: Answer, row: Collective) -> tuple[Cell, ...]:
    time_s = answer.link_time_s(row)
    return (
        Cell(text=row.axis),
        Cell(text=row.kind, mark=row.kind),
        Cell(text=_count(row), order=row.count),
        _bytes(row.payload_bytes_each),
        _bytes(row.payload_bytes),
        _bytes(row.wire_bytes),
        Cell(text=seconds(time_s), order=time_s),
        *_where(row),
    )


def instructions(answer: Answer, limit: int | None = None) -> Table:
    """Returns one row for each instruction, by the least time it takes."""
    rows = answer.bounds
    columns = ("time", "share", "limit", "kind", "count", "FLOPs", "HBM", "FLOPs/B")
    return Table(
        columns=(*columns, "line", "loop", "operation", "instruction"),
        rows=tuple(_bound(answer, row) for row in rows[:limit]),
        figures=_FIGURES,
        dispensable=("instruction", "FLOPs/B", "FLOPs", "HBM", "loop"),
        left_out=len(rows[limit:]) if limit else 0,
    )


def _bound(answer: Answer, row: Bound) -> tuple[Cell, ...]:
    share = row.time_s / answer.time_s if answer.time_s else 0.0
    return (
        Cell(text=seconds(row.time_s), order=row.time_s),
        Cell(text=units.percent(share), order=share),
        Cell(text=LIMITS[row.limit], mark=row.limit),
        Cell(text=names.printable(row.opcode)),
        Cell(text=_count(row), order=row.count),
        Cell(text=count(row.flops) if row.flops else "-", order=row.flops),
        _bytes(row.hbm_bytes),
        Cell(text=_each_byte(row.flops_per_byte), order=row.flops_per_byte),
        *_where(row, row.name),
        Cell(text=names.printable(row.name)),
    )


def parts(answer: Answer) -> Table:
    """Returns where the time of the timeline goes, largest first; it adds up."""
    found, total = answer.timeline.parts, answer.timeline.total_s
    rows = sorted(found.items(), key=lambda item: -item[1])
    return Table(
        columns=("time", "share", "part"),
        rows=tuple((*_time(s, total), Cell(text=name)) for name, s in rows if s),
        figures=_FIGURES,
    )


def path(answer: Answer, limit: int | None = None) -> Table:
    """Returns what the critical path is made of."""
    rows, total = answer.path, answer.timeline.total_s
    return Table(
        columns=("time", "share", "limit", "line", "operation"),
        rows=tuple(
            (
                *_time(seconds, total),
                Cell(text=what.limit),
                Cell(text=names.printable(what.source) or "-"),
                Cell(text=names.printable(what.op_name)),
            )
            for what, seconds in rows[:limit]
        ),
        figures=_FIGURES,
        left_out=len(rows[limit:]) if limit else 0,
    )


def _time(value: float, total: float) -> tuple[Cell, Cell]:
    share = value / total if total else 0.0
    return (
        Cell(text=seconds(value), order=value),
        Cell(text=units.percent(share), order=share),
    )


def _each_byte(value: float) -> str:
    if not value:
        return "-"
    return units.digits(value) if value >= 0.01 else "< 0.01"


def buffers(answer: Answer, limit: int | None = None) -> Table:
    """Returns the arrays alive when memory is fullest, equal ones as one row."""
    every = names.groups(answer.analysis.memory.peak, _buffer_key)
    every.sort(key=lambda rows: -sum(row.num_bytes for row in rows))
    columns = ("total", "count", "each", "kind", "array", "line", "operation")
    return Table(
        columns=columns,
        rows=tuple(_buffer(rows) for rows in every[:limit]),
        figures=_FIGURES,
        dispensable=("each", "count"),
        left_out=len(every[limit:]) if limit else 0,
    )


def _buffer_key(row: Buffer) -> tuple[object, ...]:
    is_argument = row.kind == "argument"
    name = names.pattern(row.name) if is_argument else names.pattern(row.op_name)
    return (row.kind, row.shape, row.num_bytes, name, row.source)


def _buffer(rows: Sequence[Buffer]) -> tuple[Cell, ...]:
    first = rows[0]
    name = names.alike([row.name for row in rows]) if _same(rows) else first.name
    op_name = names.alike([row.op_name for row in rows]) if _ops(rows) else ""
    if first.kind == "argument" or not op_name:
        what = Cell(text=names.printable(name), whole=name)
    else:
        what = Cell(text=names.short(op_name), whole=op_name)
    return (
        _bytes(sum(row.num_bytes for row in rows)),
        Cell(text=f"{len(rows):,}", order=len(rows)),
        _bytes(first.num_bytes),
        Cell(text=first.kind, mark=first.kind),
        Cell(text=first.shape),
        Cell(text=first.source),
        what,
    )


def _same(rows: Sequence[Buffer]) -> bool:
    return len({names.pattern(row.name) for row in rows}) == 1


def _ops(rows: Sequence[Buffer]) -> bool:
    return len({names.pattern(row.op_name) for row in rows}) == 1


def loops(answer: Answer, limit: int | None = None) -> Table:
    """Returns the loops of the program in order, those of many layers as one row."""
    every = names.groups(answer.analysis.ledger.loops, _loop_key)
    columns = ("loop", "loops", "iterations", "in one call", "line", "inside")
    return Table(
        columns=(*columns, "operation"),
        rows=tuple(_loop(rows) for rows in every[:limit]),
        figures=frozenset(["loops", "iterations", "in one call"]),
        dispensable=("loops",),
        left_out=len(every[limit:]) if limit else 0,
    )


def _loop_key(loop: Loop) -> tuple[object, ...]:
    inside = names.loop_pattern(loop.enclosing)
    return (loop.trip_count, loop.source, names.pattern(loop.op_name), inside)


def _loop(rows: Sequence[Loop]) -> tuple[Cell, ...]:
    first, executions = rows[0], sum(row.executions for row in rows)
    is_known = first.trip_count is not None
    op_name = names.alike([row.op_name for row in rows])
    return (
        Cell(text=names.printable(first.name if len(rows) == 1 else "while")),
        Cell(text=f"{len(rows):,}", order=len(rows)),
        Cell(
            text=f"{first.trip_count:g}" if is_known else "depends on data",
            order=first.trip_count,
        ),
        Cell(
            text=f"{executions:,}" if is_known else "1 each counted", order=executions
        ),
        Cell(text=names.printable(first.source)),
        Cell(text=names.trips(first.enclosing), whole=first.enclosing),
        Cell(text=names.short(op_name), whole=op_name),
    )


def dumps(answer: Answer) -> Table:
    """Returns the programs of the folder that this one was chosen from."""
    rows = [
        (
            Cell(text="→" if dump.is_chosen else ""),
            Cell(text=names.printable(dump.name)),
            Cell(text=size(dump.size_bytes), order=dump.size_bytes),
        )
        for dump in answer.subject.dumps
    ]
    columns = ("", "program", "text")
    return Table(columns=columns, rows=tuple(rows), figures=frozenset(["text"]))


def totals(answer: Answer) -> list[tuple[str, str, str]]:
    """Returns (name, figure, remark) of what one device does in one call."""
    a, memory = answer.analysis, answer.analysis.memory
    matrix = f"{count(a.matmul_flops)} in matrix products"
    if a.xla_flops is not None:
        matrix += f"; XLA says {count(a.xla_flops)}, loop bodies once"
    rows = [
        ("FLOPs", count(a.flops), matrix),
        ("HBM traffic", size(a.hbm_bytes), _intensity(answer)),
        ("Sent", size(sum(a.wire_bytes.values())), _sent(answer)),
        ("Memory", size(memory.peak_bytes), "; ".join(_held(answer))),
    ]
    if a.roofline:
        parts = [f"{LIMITS[limit]} {seconds(s)}" for limit, s in by_limit(answer) if s]
        rows.append(("Time, at least", seconds(answer.time_s), ", ".join(parts)))
    return rows


def grouped(advice: Sequence[Advice]) -> list[Finding]:
    """Returns what a person should look at; what is changed alike stands together."""
    found: dict[tuple[str, str], list[Advice]] = {}
    for each in advice:
        found.setdefault((each.kind, each.change), []).append(each)
    return [
        Finding(
            places=tuple(
                tuple(map(names.printable, (each.what, each.source, each.evidence)))
                for each in group
            ),
            change=names.printable(change),
        )
        for (_, change), group in found.items()
    ]


def facts(answer: Answer) -> list[str]:
    """Returns what the program is and where it is from, in a few words each."""
    a = answer.analysis
    mesh = " ".join(f"{name}={size}" for name, size in a.axes.items())
    return [
        names.printable(a.name),
        f"{a.num_devices} devices" if a.num_devices > 1 else "1 device",
        *([f"mesh {mesh}"] if mesh else []),
        *map(names.printable, answer.subject.facts),
    ]


def assumed(answer: Answer) -> list[str]:
    """Returns sentences about what the figures take for granted."""
    found = list(answer.analysis.warnings)
    if answer.is_assumed:
        found.append(
            f"times are for {answer.chip.title}: no chip was named; --chip names one"
        )
    if answer.collectives and not answer.analysis.axes:
        found.append(
            "groups are shown as sets of devices: no mesh was named; --mesh names its"
            " axes, as data=2,tensor=4"
        )
    return [names.printable(text) for text in found]


def by_limit(answer: Answer) -> list[tuple[str, float]]:
    """Returns (limit, seconds), in one order everywhere."""
    roofline = answer.analysis.roofline
    found = roofline.time_s if roofline else {}
    return [(limit, found.get(limit, 0.0)) for limit in LIMITS]


def memory(answer: Answer) -> list[tuple[str, int]]:
    """Returns (category, bytes) of what is held at the peak; the sum is the peak."""
    m = answer.analysis.memory
    return [
        ("arguments", m.argument_bytes),
        ("outputs", m.output_bytes - m.alias_bytes),
        ("temporaries", m.temporary_bytes),
        ("constants", m.constant_bytes),
    ]


def _held(answer: Answer) -> list[str]:
    parts = [f"{name} {size(held)}" for name, held in memory(answer) if held]
    alias = answer.analysis.memory.alias_bytes
    donated = [f"outputs in donated arguments {size(alias)}"] if alias else []
    if (xla := xla_peak_bytes(answer)) is not None:
        donated.append(f"XLA says {size(xla)}")
    return [", ".join(parts), *donated]


def xla_peak_bytes(answer: Answer) -> int | None:
    """Returns what XLA itself says is held; None where it was not asked."""
    xla = answer.analysis.memory.xla
    if xla is None:
        return None
    live = xla.argument_bytes + xla.output_bytes - xla.alias_bytes
    return xla.peak_bytes or live + xla.temporary_bytes


def _intensity(answer: Answer) -> str:
    a = answer.analysis
    if not a.hbm_bytes:
        return ""
    each = f"{units.digits(a.flops / a.hbm_bytes)} FLOPs a byte"
    ridge = ridge_flops_per_byte(answer)
    return f"{each}; {answer.chip.name} needs {units.digits(ridge)}" if ridge else each


def ridge_flops_per_byte(answer: Answer) -> float | None:
    """Returns the intensity from which the matrix units of the chip are the limit."""
    roofline = answer.analysis.roofline
    if not roofline or not roofline.flops_per_s:
        return None
    return max(roofline.flops_per_s.values()) / roofline.hbm_bytes_per_s


def _sent(answer: Answer) -> str:
    if not answer.collectives:
        return "no collective"
    return ", ".join(
        f"{axis} {size(sent)}" for axis, sent in answer.analysis.wire_bytes.items()
    )


def _count(row: Collective | Bound) -> str:
    return f"{row.count:,}" + (" an iteration" if row.per_iteration else "")


def _bytes(value: int) -> Cell:
    return Cell(text=size(value) if value else "-", order=value)


def _where(row: Collective | Bound, name: str = "-") -> tuple[Cell, ...]:
    return (
        Cell(text=names.printable(row.source)),
        Cell(text=names.trips(row.loop), whole=row.loop),
        Cell(text=names.short(row.op_name) or names.printable(name), whole=row.op_name),
    )
