"""What has been counted so far while a program is walked, and rows made of it."""

import collections
from collections.abc import Iterable

from sharding.hlo.collectives import Found
from sharding.hlo.loops import Loop
from sharding.hlo.records import Block, Collective, Cost, Step, Wait

# To choose the costliest branch of a conditional: FLOPs that take as long as a
# byte, near H100's 989e12 / 3.35e12 and v5p's 459e12 / 2.77e12; and bytes of HBM that
# take as long as one on a link, near H100's 3.35e12 / 450e9 and v5p's 2.77e12 / 300e9.
_FLOPS_PER_BYTE = 256
_HBM_BYTES_PER_WIRE_BYTE = 8


class Tally:
    """What has been counted so far."""

    def __init__(self) -> None:
        self.costs: list[Cost] = []
        self.found: list[tuple[Found, int, str, str, str, bool]] = []
        self.loops: list[Loop] = []
        self.warnings: list[str] = []
        self.steps: list[Step | Wait | Block] = []

    def add(self, other: "Tally") -> None:
        self.steps += other.steps
        self.costs += other.costs
        self.found += other.found
        self.loops += other.loops
        self.warnings += other.warnings

    @property
    def weight(self) -> float:
        """Bytes moved, FLOPs put on the same scale; compares branches."""
        work = sum(
            c.count * (c.hbm_bytes + c.flops / _FLOPS_PER_BYTE) for c in self.costs
        )
        sent = sum(count * f.wire_bytes for f, count, *_ in self.found)
        return work + _HBM_BYTES_PER_WIRE_BYTE * sent

    @property
    def sends(self) -> set[tuple[str, str]]:
        """Axis and kind of what is sent."""
        return {(found.axis, found.kind) for found, *_ in self.found}


def merge(
    found: Iterable[tuple[Found, int, str, str, str, bool]],
) -> tuple[Collective, ...]:
    """Returns one row for collectives that differ in nothing but their name."""
    rows: dict[tuple, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for each, count, *where in found:
        key = (each.axis, each.kind, each.group_size, each.payload_bytes)
        row = rows[(*key, *where)]
        row[0] += count
        row[1] += count * each.payload_bytes
        row[2] += count * each.wire_bytes
    return tuple(
        Collective(
            axis=axis,
            kind=kind,
            count=count,
            payload_bytes=payload,
            wire_bytes=wire,
            group_size=size,
            op_name=op_name,
            source=source,
            loop=loop,
            per_iteration=per_iteration,
        )
        for (axis, kind, size, _, op_name, source, loop, per_iteration), (
            count,
            payload,
            wire,
        ) in rows.items()
    )
