"""C10 to C14: claims about throughput, and the memory that it rests on."""

import itertools
from collections.abc import Sequence

from experiments.claims import measured
from experiments.claims.accounting import account, power_of_two
from experiments.claims.judge import Cell, Finding, close, missing, subject, verdict
from experiments.claims.latency import HYBRIDS, LONG, PIPELINES, TENSOR
from experiments.claims.printed import (
    CASES,
    CHIPS,
    LARGEST_BATCH,
    LONG_405B,
    NODE_DEVICES,
    PP8_GAIN,
    PP8_TIMES,
    Case,
)
from experiments.claims.rows import Row, Rows
from experiments.report import units
from sharding.chips import CHIPS as CHIP_FILES


def c10(rows: Rows) -> Finding:
    """PP gives more throughput than TP and hybrids at every batch size."""
    cells = []
    for case in CASES:
        for chip in CHIPS:
            for batch in rows.batches(case, chip, "pp8"):
                cells += _most_throughput(rows, case, chip, batch)
    return verdict(
        cells,
        on="the batch and the chip",
        measured=measured.c10(rows),
        why="At equal batches of a replica, devices left over running more replicas;"
        f" tried at batch {_tried(cells)}.",
    )


def _tried(cells: Sequence[Cell]) -> str:
    sizes = sorted({row.batch_size for cell in cells for row in cell.rows})
    return ", ".join(f"{size:,}" for size in sizes) or "none"


def _most_throughput(rows: Rows, case: Case, chip: str, batch: int) -> list[Cell]:
    """Returns the cell of one batch size, if TP and hybrids were tried there."""
    found = _fitting(rows, case, chip, batch)
    pipelines = [row for row in found if row.partition in PIPELINES]
    others = [row for row in found if row.partition in (*TENSOR[1:], *HYBRIDS)]
    if not pipelines or not others:
        return []
    pipeline, other = (
        max(group, key=lambda row: row.node_tokens_per_s)
        for group in (pipelines, others)
    )
    gain = pipeline.node_tokens_per_s / other.node_tokens_per_s
    return [
        Cell(
            chip=chip,
            subject=subject(case, batch),
            holds=gain > 1,
            text=(
                f"{pipeline.partition} {_rate(pipeline)}, {other.partition}"
                f" {_rate(other)}: {gain:.2f}x"
            ),
            rows=(pipeline, other),
        )
    ]


def _fitting(rows: Rows, case: Case, chip: str, batch: int) -> list[Row]:
    names = (*TENSOR, *PIPELINES, *HYBRIDS)
    found = [rows.get(case, chip, name, batch) for name in names]
    return [row for row in found if row is not None and row.ok]


def _rate(row: Row) -> str:
    return f"{units.digits(row.node_tokens_per_s)} tokens/s"


def c11(rows: Rows) -> Finding:
    """405B holds 32 a device unpartitioned, 256 under PP4, 512 under PP8."""
    cells = []
    for chip in CHIPS:
        found = {
            name: account(LONG_405B, CHIP_FILES[chip], name) for name in LARGEST_BATCH
        }
        alone = {n: power_of_two(a.group_alone) for n, a in found.items()}
        every = {n: power_of_two(a.group) for n, a in found.items()}
        most = max(rows.batches(LONG_405B, chip, "pp8"), default=0)
        row = rows.get(LONG_405B, chip, "pp8", most)
        cells.append(
            Cell(
                chip=chip,
                subject=LONG_405B.name,
                holds=every == LARGEST_BATCH,
                direction=alone == LARGEST_BATCH,
                text=", ".join(
                    f"{name} {every[name]:,} a group with every group's cache and"
                    f" {alone[name]:,} with its own alone (printed {printed})"
                    for name, printed in LARGEST_BATCH.items()
                )
                + (f"; compiled, {most:,} in flight fit pp8" if most else ""),
                rows=() if row is None else (row,),
            )
        )
    return verdict(
        cells,
        on="the chip",
        why="A stage holds the cache of every group in flight. On mi355x the printed"
        " limits are those of one group's cache.",
    )


def c12(rows: Rows) -> Finding:
    """405B: PP8 has 16x the batch of data parallel, 1.35x its throughput."""
    printed = PP8_TIMES
    cells = []
    for chip in CHIPS:
        alone = rows.timed(LONG_405B, chip, "tp1", 32)
        for batch, memory in ((4096, "as printed"), (None, "what fits")):
            what = f"{LONG_405B.name}, {memory}"
            if batch is None:
                batch = max(rows.batches(LONG_405B, chip, "pp8"), default=0)
            deep = rows.timed(LONG_405B, chip, "pp8", batch)
            if alone is None or deep is None:
                own = [
                    rows.get(LONG_405B, chip, "tp1", 32),
                    rows.get(LONG_405B, chip, "pp8", batch),
                ]
                cells.append(missing(chip, what, *own))
                continue
            found = dict(
                batch=batch / (32 * NODE_DEVICES),
                throughput=deep.node_tokens_per_s / alone.node_tokens_per_s,
                prefill=deep.require("ttft_s") / alone.require("ttft_s"),
                decode=deep.require("tpot_s") / alone.require("tpot_s"),
            )
            cells.append(
                Cell(
                    chip=chip,
                    subject=what,
                    holds=all(close(found[n], printed[n]) for n in printed)
                    and deep.memory == alone.memory == "own",
                    direction=found["throughput"] > 1,
                    text=", ".join(
                        f"{name} {found[name]:.2f}x (printed {printed[name]}x)"
                        for name in printed
                    )
                    + _needed(deep),
                    rows=(alone, deep),
                )
            )
    return verdict(cells, on="memory")


def _needed(row: Row) -> str:
    if row.memory == "own" or row.needed_bytes is None:
        return ""
    return f"; needs {units.bytes_(row.needed_bytes)} a device"


def c13(rows: Rows) -> Finding:
    """PP8 at a large batch gives 4.2 to 44 times no parallelism at batch 1."""
    cells = []
    for case in CASES:
        batch, printed = PP8_GAIN[case.name]
        for chip in CHIPS:
            alone = rows.timed(case, chip, "tp1", 1)
            deep = rows.timed(case, chip, "pp8", batch)
            what = subject(case, batch)
            if alone is None or deep is None:
                own = [rows.get(case, chip, "tp1", 1)]
                own.append(rows.get(case, chip, "pp8", batch))
                cells.append(missing(chip, what, *own))
                continue
            gain = deep.node_tokens_per_s / alone.node_tokens_per_s
            cells.append(
                Cell(
                    chip=chip,
                    subject=what,
                    holds=close(gain, printed),
                    direction=gain > 1,
                    text=(
                        f"{_rate(deep)} against {_rate(alone)}: {gain:.1f}x (printed"
                        f" {printed}x){_needed(deep)}"
                    ),
                    rows=(deep, alone),
                )
            )
    return verdict(cells, on="chip, prompts and memory")


def c14(rows: Rows) -> Finding:
    """TP degree is the knob of latency, PP depth that of throughput."""
    cells = []
    for case in LONG:
        for chip in CHIPS:
            for batch in (32, 256):
                cells.append(_knobs(rows, case, chip, batch))
    return verdict(
        cells,
        on="the batch and the chip",
        measured=measured.c14(rows),
        why="A knob: over tp8, tp4_pp2, tp2_pp4 and pp8, TPOT grows and throughput"
        " grows with the number of stages.",
    )


def _knobs(rows: Rows, case: Case, chip: str, batch: int) -> Cell:
    what = subject(case, batch)
    names = ("tp8", "tp4_pp2", "tp2_pp4", "pp8")
    found = [rows.get(case, chip, name, batch) for name in names]
    if any(row is not None and not row.ok for row in found):
        found = [rows.timed(case, chip, name, batch) for name in names]
    known = [row for row in found if row is not None]
    if len(known) < len(names):
        return missing(chip, what, *known)
    latency = [row.require("tpot_s") for row in known]
    rate = [row.node_tokens_per_s for row in known]
    return Cell(
        chip=chip,
        subject=what,
        holds=_rises(latency) and _rises(rate),
        direction=latency[0] == min(latency) and rate[-1] > rate[0],
        text=", ".join(
            f"{row.partition} TPOT {units.seconds(row.require('tpot_s'))}, {_rate(row)}"
            for row in known
        ),
        rows=tuple(known),
    )


def _rises(values: Sequence[float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))


def hybrid_overtakes(rows: Rows) -> Finding:
    """Whether a TP x PP hybrid overtakes pure TP as the batch grows."""
    cells = []
    for case in LONG:
        for chip in CHIPS:
            ratios: dict[int, tuple[Row, Row]] = {}
            for batch in rows.batches(case, chip, "tp8"):
                hybrid = rows.get(case, chip, "tp4_pp2", batch)
                pure = rows.get(case, chip, "tp8", batch)
                if hybrid is not None and hybrid.ok and pure is not None:
                    ratios[batch] = (hybrid, pure)
            if len(ratios) < 2:
                cells.append(missing(chip, case.name))
                continue
            gains = {
                batch: hybrid.node_tokens_per_s / pure.node_tokens_per_s
                for batch, (hybrid, pure) in ratios.items()
            }
            first, *_, last = gains.values()
            cells.append(
                Cell(
                    chip=chip,
                    subject=case.name,
                    holds=first < 1 < last,
                    direction=last > first,
                    text="tp4_pp2 over tp8, tokens/s: "
                    + ", ".join(f"{g:.2f}x at {b:,}" for b, g in gains.items()),
                    rows=tuple(row for pair in ratios.values() for row in pair),
                )
            )
    return verdict(cells, on="chip and prompts")


def tensor_or_pipeline(rows: Rows) -> Finding:
    """TP8 against PP8 on a 405B node: 5.6x one way in latency, 1.5x the other."""
    cells = []
    for chip in CHIPS:
        both = sorted(
            set(rows.batches(LONG_405B, chip, "tp8"))
            & set(rows.batches(LONG_405B, chip, "pp8"))
        )
        if not both:
            cells.append(missing(chip, LONG_405B.name))
            continue
        few, many = both[0], both[-1]
        pair = {
            batch: [rows.get(LONG_405B, chip, name, batch) for name in ("tp8", "pp8")]
            for batch in (few, many)
        }
        known = [row for found in pair.values() for row in found if row is not None]
        (tp_few, pp_few), (tp_many, pp_many) = known[:2], known[-2:]
        latency = pp_few.require("tpot_s") / tp_few.require("tpot_s")
        gain = pp_many.node_tokens_per_s / tp_many.node_tokens_per_s
        cells.append(
            Cell(
                chip=chip,
                subject=LONG_405B.name,
                holds=latency > 1 and gain > 1,
                direction=latency > 1,
                text=(
                    f"TPOT of pp8 {latency:.1f}x that of tp8 at batch {few:,}"
                    f" (published 5.6x); tokens/s of pp8 {gain:.2f}x at {many:,}"
                    " (published 1.5x)"
                ),
                rows=tuple(known),
            )
        )
    return verdict(cells, on="chip")
