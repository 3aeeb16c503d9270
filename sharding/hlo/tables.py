"""The tables that an `Analysis` shows of itself; figures are scaled here only."""

from collections.abc import Sequence

from sharding.hlo.advice import Advice
from sharding.hlo.memory import Buffer, Memory
from sharding.hlo.records import Collective, Ledger
from sharding.hlo.render import (
    Table,
    figure_bytes,
    figure_count,
    figure_seconds,
)
from sharding.hlo.roofline import Bound, Roofline


def more(title: str, shown: int, total: int) -> str:
    """Returns the title of a table that may show only its first rows."""
    return f"{title} (first {shown} of {total})" if shown < total else title


def totals(ledger: Ledger, xla_flops: float | None) -> Table:
    """What is computed and moved."""
    rows = [
        ("FLOPs", figure_count(ledger.flops)),
        ("of these matrix products", figure_count(ledger.matmul_flops)),
        ("HBM bytes", figure_bytes(ledger.hbm_bytes)),
        *(
            (f"sent over {axis}", figure_bytes(sum(r.wire_bytes for r in found)))
            for axis, found in ledger.by_axis().items()
        ),
    ]
    if xla_flops is not None:
        rows.append(("FLOPs as XLA counts them, loops once", figure_count(xla_flops)))
    return Table(
        title="In one call",
        columns=("what", "figure"),
        rows=tuple(rows),
        right=frozenset(["figure"]),
    )


def collectives(rows: Sequence[Collective], limit: int = 20) -> Table:
    """Collectives, most bytes sent first."""
    ranked = sorted(rows, key=lambda row: -row.wire_bytes)
    return Table(
        title=more("Collectives", min(limit, len(rows)), len(rows)),
        columns=(
            *("axis", "kind", "count", "payload", "sent"),
            *("source", "op_name", "loop"),
        ),
        rows=tuple(
            (
                row.axis,
                row.kind,
                f"{row.count}{' an iteration' * row.per_iteration}",
                figure_bytes(row.payload_bytes),
                figure_bytes(row.wire_bytes),
                row.source,
                row.op_name,
                row.loop,
            )
            for row in ranked[:limit]
        ),
        right=frozenset(["count", "payload", "sent"]),
    )


def memory(found: Memory) -> Table:
    """Memory by category, ours beside XLA's."""
    xla = found.xla
    pairs: list[tuple[str, int | None, int | None]] = [
        ("arguments", found.argument_bytes, xla and xla.argument_bytes),
        ("outputs", found.output_bytes, xla and xla.output_bytes),
        ("of these in an argument's place", found.alias_bytes, xla and xla.alias_bytes),
        (
            "temporaries at their peak",
            found.temporary_bytes,
            xla and xla.temporary_bytes,
        ),
        ("constants", found.constant_bytes, None),
        ("in all", found.peak_bytes, xla and xla.total_bytes),
    ]
    if xla is not None and xla.peak_bytes is not None:
        pairs.append(("peak as XLA reports it", None, xla.peak_bytes))
    return Table(
        title="Memory",
        columns=("what", "from the text", "XLA's own"),
        rows=tuple(
            (what, *("" if size is None else figure_bytes(size) for size in sizes))
            for what, *sizes in pairs
        ),
        right=frozenset(["from the text", "XLA's own"]),
    )


def peak(found: Memory, limit: int = 10) -> Table:
    """The largest buffers alive at the peak."""
    buffers: tuple[Buffer, ...] = found.peak[:limit]
    title = f"Alive at {found.peak_at}" if found.peak_at else "Alive"
    return Table(
        title=more(title, len(buffers), len(found.peak)),
        columns=("bytes", "kind", "shape", "name", "source", "op_name"),
        rows=tuple(
            (
                figure_bytes(b.num_bytes),
                b.kind,
                b.shape,
                b.name,
                b.source,
                "" if b.op_name == b.name else b.op_name,
            )
            for b in buffers
        ),
        right=frozenset(["bytes"]),
    )


def bounds(roofline: Roofline, limit: int = 10) -> Table:
    """The instructions that take longest."""
    rows: tuple[Bound, ...] = roofline.top[:limit]
    total = roofline.total_s or 1.0
    return Table(
        title=more(
            f"Least time on {roofline.chip}: {figure_seconds(roofline.total_s)}",
            len(rows),
            roofline.num_rows,
        ),
        columns=(
            *("time", "share", "limit", "count", "instruction", "FLOPs/byte"),
            *("source", "op_name", "loop"),
        ),
        rows=tuple(
            (
                figure_seconds(b.time_s),
                f"{100 * b.time_s / total:.0f} %",
                b.limit,
                f"{b.count}{' an iteration' * b.per_iteration}",
                f"{b.name} over {b.axis}" if b.axis else b.name,
                f"{b.flops_per_byte:.3g}" if b.hbm_bytes else "",
                b.source,
                b.op_name,
                b.loop,
            )
            for b in rows
        ),
        right=frozenset(["time", "share", "count", "FLOPs/byte"]),
    )


def advice(found: Sequence[Advice]) -> Table:
    """What to look at."""
    return Table(
        title="Worth a look",
        columns=("bytes", "what", "source", "evidence", "change"),
        rows=tuple(
            (figure_bytes(a.num_bytes), a.what, a.source, a.evidence, a.change)
            for a in found
        ),
        right=frozenset(["bytes"]),
        prose=frozenset(["evidence", "change"]),
    )
