"""An answer as JSON: the fields of one phase of a record, and everything behind them.

`flops`, `hbm_bytes`, `collectives`, `memory` and `xla_flops` mean what they mean in
`results.jsonl` (docs/records.md). Names end in their unit; unknown is null.
"""

import dataclasses
import json
from typing import Any

from experiments.inspection.answer import Answer
from experiments.inspection.difference import Comparison
from experiments.report.record import Provenance

SCHEMA = 1


def one(answer: Answer, provenance: Provenance) -> dict[str, Any]:
    """Returns one program as plain values."""
    a, roofline = answer.analysis, answer.analysis.roofline
    held = dataclasses.asdict(a.memory)
    for name in ("peak", "arguments", "timeline_bytes", "xla"):
        del held[name]
    held["peak_bytes"] = a.memory.peak_bytes
    subject = answer.subject
    memory = dataclasses.asdict(subject.memory) if subject.memory else held
    return {
        "schema": SCHEMA,
        "origin": "compiled",
        "title": subject.title,
        "facts": list(subject.facts),
        "name": a.name,
        "num_devices": a.num_devices,
        "axes": dict(a.axes),
        "chip": answer.chip.name,
        "chip_is_assumed": answer.is_assumed,
        "flops": a.flops,
        "matmul_flops": a.matmul_flops,
        "hbm_bytes": a.hbm_bytes,
        "xla_flops": a.xla_flops,
        "time_s": dict(roofline.time_s) if roofline else None,
        "timeline": _timeline(answer),
        "collectives": [
            {**dataclasses.asdict(row), "payload_bytes_each": row.payload_bytes_each}
            for row in a.ledger.collectives
        ],
        "memory": memory,
        "schedule": {
            **held,
            "peak": [dataclasses.asdict(buffer) for buffer in a.memory.peak],
            "arguments": [dataclasses.asdict(each) for each in a.memory.arguments],
        },
        "xla_memory": dataclasses.asdict(a.memory.xla) if a.memory.xla else None,
        "instructions": [dataclasses.asdict(row) for row in answer.bounds],
        "loops": [dataclasses.asdict(loop) for loop in a.ledger.loops],
        "advice": [dataclasses.asdict(each) for each in a.advice],
        "warnings": list(a.warnings),
        "provenance": dataclasses.asdict(provenance),
    }


def _timeline(answer: Answer) -> dict[str, Any]:
    t = answer.timeline
    return {
        "rates": answer.chip.rates_from,
        "total_s": t.total_s,
        "parts_s": dict(t.parts),
        "busy_s": dict(t.busy_s),
        "idle_s": t.idle_s,
        "kernels": t.kernels,
        "collectives": t.collectives,
        "xla_cycles": t.cycles,
        "critical_path": [
            {**what._asdict(), "seconds": seconds} for what, seconds in answer.path
        ],
    }


def two(found: Comparison, provenance: Provenance) -> dict[str, Any]:
    """Returns two programs and what differs, as plain values."""
    different = found.difference
    return {
        "schema": SCHEMA,
        "figures": {f.name: [f.before, f.after] for f in different.figures},
        "collectives": [
            {
                "verb": row.verb,
                "before": dataclasses.asdict(row.before) if row.before else None,
                "after": dataclasses.asdict(row.after) if row.after else None,
            }
            for row in different.collectives
        ],
        "lines": [dataclasses.asdict(line) for line in found.lines],
        "advice_new": [dataclasses.asdict(each) for each in different.advice_new],
        "advice_gone": [dataclasses.asdict(each) for each in different.advice_gone],
        "before": one(found.before, provenance),
        "after": one(found.after, provenance),
    }


def text(values: dict[str, Any]) -> str:
    """Returns `values` as JSON that ends in a line feed."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
