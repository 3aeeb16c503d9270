"""Cells of what was timed, which stand beside the verdicts on what was compiled.

Partitions are compared within one run, of programs that were asked to be written alike:
what differs is the partition.
"""

from collections.abc import Iterator

from experiments.claims.judge import Cell
from experiments.claims.rows import Row, Rows
from experiments.report import units

_SAME = (
    "run", "choices", "model", "chip", "rules", "dtype", "weights", "kv", "batch_size",
    "input_len", "output_len", "asked_micro_batches",
)  # fmt: skip


def c4(rows: Rows) -> list[Cell]:
    """Whether tp2 was faster than pp2 in both phases."""
    return [
        _cell(
            (tensor, pipeline),
            f"{_times(tensor)}; {_times(pipeline)}",
            holds=tensor.require("ttft_s") <= pipeline.require("ttft_s")
            and tensor.require("tpot_s") <= pipeline.require("tpot_s"),
        )
        for tensor, pipeline in _beside(rows, "tp2", "pp2")
    ]


def c5(rows: Rows) -> list[Cell]:
    """How many times faster two devices were than one."""
    cells = []
    for one, two in _beside(rows, "tp1", "tp2"):
        ttft, tpot = (
            one.require(name) / two.require(name) for name in ("ttft_s", "tpot_s")
        )
        text = f"tp1 to tp2: TTFT {ttft:.2f}x, TPOT {tpot:.2f}x of 2x"
        cells.append(_cell((one, two), text, holds=ttft >= 0.8 * 2 and tpot < ttft))
    return cells


def c7(rows: Rows) -> list[Cell]:
    """The predicted share of all-reduces, beside what prefill took."""
    return [
        _cell(
            (row,),
            f"tp2: predicted {units.seconds(row.predicted_ttft_s)}, of which"
            f" all-reduces {units.seconds(row.ttft_parts_s.get('tensor links', 0.0))};"
            f" measured {units.seconds(row.require('ttft_s'))}",
        )
        for row in rows.measured
        if row.partition == "tp2" and row.ttft_parts_s and row.predicted_ttft_s
    ]


def c9(rows: Rows) -> list[Cell]:
    """The predicted time of hops between stages, beside what prefill took."""
    return [
        _cell(
            (row,),
            f"{_times(row)}; predicted stage links"
            f" {units.seconds(row.ttft_parts_s.get('stage links', 0.0))}",
        )
        for row in rows.measured
        if row.partition == "pp2" and row.ttft_parts_s
    ]


def c10(rows: Rows) -> list[Cell]:
    """Whether pp2 gave more tokens a second than tp2."""
    cells = []
    for tensor, pipeline in _beside(rows, "tp2", "pp2"):
        gain = pipeline.tokens_per_s / tensor.tokens_per_s
        text = (
            f"pp2 {units.digits(pipeline.tokens_per_s)} tokens/s, tp2"
            f" {units.digits(tensor.tokens_per_s)}: {gain:.2f}x"
        )
        cells.append(_cell((pipeline, tensor), text, holds=gain > 1))
    return cells


def c14(rows: Rows) -> list[Cell]:
    """Whether tp2 had the shorter TPOT and pp2 the higher throughput."""
    cells = []
    for tensor, pipeline in _beside(rows, "tp2", "pp2"):
        texts = [
            f"{row.partition} TPOT {units.seconds(row.require('tpot_s'))},"
            f" {units.digits(row.tokens_per_s)} tokens/s"
            for row in (tensor, pipeline)
        ]
        holds = (
            tensor.require("tpot_s") < pipeline.require("tpot_s")
            and tensor.tokens_per_s < pipeline.tokens_per_s
        )
        cells.append(_cell((tensor, pipeline), "; ".join(texts), holds=holds))
    return cells


def _beside(rows: Rows, first: str, second: str) -> Iterator[tuple[Row, Row]]:
    """Yields two partitions of the same question, measured in the same run."""
    seconds = {_question(r): r for r in rows.measured if r.partition == second}
    for row in rows.measured:
        other = seconds.get(_question(row))
        if row.partition == first and other is not None:
            yield row, other


def _question(row: Row) -> tuple[object, ...]:
    return tuple(getattr(row, name) for name in _SAME)


def _cell(rows: tuple[Row, ...], text: str, *, holds: bool | None = None) -> Cell:
    devices, row = max(r.num_chips for r in rows), rows[0]
    parts = [row.model, f"batch {row.batch_size:,}", f"{row.input_len:,} in"]
    return Cell(
        chip=f"{devices} x {row.chip}",
        subject=", ".join([*parts, *filter(None, row.choices.split(","))]),
        holds=holds,
        text=text,
        rows=rows,
    )


def _times(row: Row) -> str:
    predicted = ""
    if row.predicted_ttft_s is not None and row.predicted_tpot_s is not None:
        predicted = (
            f" (predicted {units.seconds(row.predicted_ttft_s)},"
            f" {units.seconds(row.predicted_tpot_s)})"
        )
    return (
        f"{row.partition} TTFT {units.seconds(row.require('ttft_s'))}, TPOT"
        f" {units.seconds(row.require('tpot_s'))}{predicted}"
    )
