"""Answer: one inspected program, its price, and its rows ready to be shown."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.inspection import names
from experiments.inspection.inputs import Subject
from sharding import rates
from sharding.chips import CHIPS, Chip
from sharding.estimate import collective_time_s
from sharding.hlo.analysis import Analysis, analyze
from sharding.hlo.programs import load
from sharding.hlo.records import Collective
from sharding.hlo.roofline import Bound
from sharding.timeline import OnPath, Timeline, lay_out

# What a program is priced as where neither it nor the caller says, by its compiler.
_USUAL = {"cpu": "cpu", "gpu": "h100", "tpu": "v5p"}
_TPU = re.compile(r"\{[\d,]*:T\(\d")  # tiled layouts
_GPU = re.compile(
    r"fingerprint_before_lhs|gpu_backend_config|\"__(cublas|cudnn|gpu|triton)|\"xla\.pdl"
)
_EVERY = 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What the compiler did to one program.

    Attributes:
      subject: what was asked.
      analysis: what the library says of it.
      chip: whose rates price it.
      is_assumed: nobody named the chip; it is a usual one of the program's platform.
    """

    subject: Subject
    analysis: Analysis
    chip: Chip
    is_assumed: bool = False

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """Collectives that differ at most in the numbers of their names, as one row."""
        every = names.groups(self.analysis.ledger.collectives, _collective_key)
        return [_one_collective(rows) for rows in every]

    @functools.cached_property
    def bounds(self) -> list[Bound]:
        """Likewise instructions by the least time they take, longest first."""
        roofline = self.analysis.roofline
        every = names.groups(roofline.top if roofline else (), _bound_key)
        return sorted(map(_one_bound, every), key=lambda row: -row.time_s)

    @property
    def time_s(self) -> float:
        """The sum of all bounds: instructions follow each other."""
        roofline = self.analysis.roofline
        return sum(roofline.time_s.values()) if roofline else 0.0

    @functools.cached_property
    def timeline(self) -> Timeline:
        """One call on a clock, as a prediction and not as a bound."""
        ledger, device = self.analysis.ledger, self.chip.per_device()
        call_s = rates.call_overhead_s(device, devices=ledger.devices)
        return lay_out(ledger, self.chip, dtype=None, call_s=call_s)

    @functools.cached_property
    def path(self) -> list[tuple[OnPath, float]]:
        """What the critical path is made of, equal layers as one, longest first."""
        every = names.groups(self.timeline.path.items(), _path_key)
        summed = [
            (
                rows[0][0]._replace(op_name=names.alike([w.op_name for w, _ in rows])),
                sum(seconds for _, seconds in rows),
            )
            for rows in every
        ]
        return sorted((row for row in summed if row[1]), key=lambda row: -row[1])

    def link_time_s(self, row: Collective) -> float:
        """Returns how long all executions of `row` take at least."""
        return collective_time_s(row, self.chip.per_device())


def answer(
    subject: Subject,
    chip: Chip | None = None,
    *,
    kernels: Mapping[str, int] | None = None,
    trip_counts: Mapping[str, int] | None = None,
) -> Answer:
    """Returns what the compiler did to `subject`.

    Args:
      subject: one program.
      chip: prices it; None takes the one it was compiled for, or, if nobody said, a
        usual one of its platform.
      kernels: FLOPs of hand-written kernels, as `sharding.hlo.analyze` takes them.
      trip_counts: of data-dependent loops, likewise.

    Raises:
      ValueError: the program holds something that cannot be read or counted.
    """
    priced = chip or subject.chip or CHIPS[_USUAL[_platform(subject.program)]]
    device = priced.per_device()
    return Answer(
        subject=subject,
        analysis=analyze(
            subject.program,
            subject.axes,
            device,
            kernels=kernels,
            trip_counts=trip_counts,
            collective_time_s=lambda row: collective_time_s(row, device),
            top=_EVERY,
        ),
        chip=priced,
        is_assumed=chip is None and subject.chip is None,
    )


def _platform(program: Any) -> str:
    """Returns which compiler wrote `program`, by what only it writes."""
    text = load(program).text
    if _TPU.search(text):
        return "tpu"
    return "gpu" if _GPU.search(text) else "cpu"


def _collective_key(row: Collective) -> tuple[object, ...]:
    each = (row.axis, row.kind, row.group_size, row.payload_bytes_each)
    where = (names.pattern(row.op_name), row.source, names.loop_pattern(row.loop))
    return (*each, *where, row.per_iteration)


def _one_collective(rows: Sequence[Collective]) -> Collective:
    return dataclasses.replace(
        rows[0],
        count=sum(row.count for row in rows),
        payload_bytes=sum(row.payload_bytes for row in rows),
        wire_bytes=sum(row.wire_bytes for row in rows),
        op_name=names.alike([row.op_name for row in rows]),
        loop=_one_loop([row.loop for row in rows]),
    )


def _path_key(row: tuple[OnPath, float]) -> tuple[object, ...]:
    what, _ = row
    return (what.limit, names.pattern(what.op_name), what.source)


def _bound_key(row: Bound) -> tuple[object, ...]:
    each = (row.opcode, row.limit, row.axis, row.dtype, row.flops // row.count)
    each += (row.matmul_flops // row.count, row.hbm_bytes // row.count)
    each += (row.wire_bytes // row.count,)
    where = (names.pattern(row.op_name), row.source, names.loop_pattern(row.loop))
    return (*each, *where, row.per_iteration)


def _one_bound(rows: Sequence[Bound]) -> Bound:
    return dataclasses.replace(
        rows[0],
        name=_one_loop([row.name for row in rows]),
        time_s=sum(row.time_s for row in rows),
        count=sum(row.count for row in rows),
        flops=sum(row.flops for row in rows),
        matmul_flops=sum(row.matmul_flops for row in rows),
        hbm_bytes=sum(row.hbm_bytes for row in rows),
        wire_bytes=sum(row.wire_bytes for row in rows),
        op_name=names.alike([row.op_name for row in rows]),
        loop=_one_loop([row.loop for row in rows]),
    )


def _one_loop(labels: Sequence[str]) -> str:
    """Returns the one label, or what is equal in several."""
    found = dict.fromkeys(labels)
    return next(iter(found if len(found) == 1 else map(names.loop_pattern, found)))
