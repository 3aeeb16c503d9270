"""The buffers of a program over its lines, and the most that is alive at once."""

import bisect
import dataclasses
import functools
import heapq
import itertools
from collections.abc import Iterator

from sharding.hlo.aliases import input_output_alias, leaf_at
from sharding.hlo.reader import Computation, Instruction, Module
from sharding.hlo.shapes import Shape

_LENT = 32  # outputs whose place is lent
_LODGED = 1 << 16  # temporaries that are considered for them


class Value:
    """One buffer: made at `born`, last read at `last`, positions in a schedule."""

    __slots__ = (
        "born",
        "given",
        "instruction",
        "is_lodged",
        "is_result",
        "last",
        "num_bytes",
        "shape",
    )

    def __init__(
        self,
        instruction: Instruction,
        shape: Shape,
        num_bytes: int,
        born: int,
        given: int = -1,
    ):
        self.instruction = instruction
        self.shape = shape
        self.num_bytes = num_bytes
        self.born = born
        self.last = born
        self.given = given  # leaf of the computation's parameters, or -1
        self.is_result = False  # lies where the caller wants it
        self.is_lodged = False  # lies where an output will be

    @property
    def is_temporary(self) -> bool:
        """Whether the computation itself must find room for it."""
        is_constant = self.instruction.opcode == "constant"
        is_placed = self.is_result or self.is_lodged or self.given >= 0
        return not (is_placed or is_constant)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """The buffers of one computation over its lines.

    Attributes:
      values: every buffer made here.
      results: the buffers that the root's leaves lie in.
      calls: at lines that call others, the one that holds most.
    """

    computation: Computation
    values: tuple[Value, ...]
    results: tuple[Value, ...]
    calls: dict[int, "Schedule"]

    @functools.cached_property
    def live_bytes(self) -> tuple[int, ...]:
        """Temporaries alive at each line, called computations included."""
        lines = len(self.computation.instructions)
        change = [0] * (lines + 1)
        for value in self.values:
            if value.num_bytes and value.is_temporary:
                change[value.born] += value.num_bytes
                change[value.last + 1] -= value.num_bytes
        alive = itertools.accumulate(change[:lines])
        calls = self.calls
        return tuple(
            total + (calls[line].peak_bytes if line in calls else 0)
            for line, total in enumerate(alive)
        )

    @functools.cached_property
    def peak_bytes(self) -> int:
        return max(self.live_bytes, default=0)

    @property
    def peak_line(self) -> int:
        """The first line at which most is alive."""
        return self.live_bytes.index(self.peak_bytes) if self.live_bytes else 0

    def peak(self) -> Iterator[tuple["Schedule", Value]]:
        """Yields the temporaries alive at the peak, those of callees too."""
        at = self.peak_line
        for value in self.values:
            if value.is_temporary and value.born <= at <= value.last:
                yield self, value
        if at in self.calls:
            yield from self.calls[at].peak()

    def peak_path(self) -> str:
        """Returns "while.5 > fusion.3", the line of the peak through its callers."""
        if not self.peak_bytes:
            return ""
        at = self.peak_line
        name = self.computation.instructions[at].name
        inner = self.calls[at].peak_path() if at in self.calls else ""
        return f"{name} > {inner}" if inner else name


def lend_outputs(module: Module, schedule: Schedule) -> None:
    """Puts temporaries, the largest first, where outputs are yet to be written.

    An output has its place from the start; one that takes over a donated argument,
    once that is read for the last time. XLA:CPU and XLA:GPU use it till then.
    """
    if all(value.given >= 0 for value in schedule.results):
        return
    spans: dict[int, tuple[int, int]] = {}  # value -> first and last moment
    free: list[Value] = []
    moments = _flatten(schedule, 0, spans, free)
    arguments = {value.given: value for value in schedule.values if value.given >= 0}
    starts = first_leaves(module.entry)
    read_until: dict[int, int] = {}
    for output, number, index in input_output_alias(module):
        parameter = module.entry.parameters[number]
        argument = arguments[starts[parameter.name] + leaf_at(parameter.shape, index)]
        result = schedule.results[leaf_at(module.entry.root.shape, output)]
        read_until[id(result)] = spans[id(argument)][1]
    outputs = {id(v): v for v in schedule.results if v.given < 0 and v.num_bytes}
    never = moments + 1
    places = [
        (
            v.num_bytes,
            [(-1, read_until.get(id(v), -1)), (spans[id(v)][0], never), (never, never)],
        )
        for v in heapq.nlargest(_LENT, outputs.values(), key=lambda v: v.num_bytes)
    ]
    for value in heapq.nlargest(_LODGED, free, key=lambda v: v.num_bytes):
        span = spans[id(value)]
        for num_bytes, taken in places:
            after = bisect.bisect(taken, span)
            is_free = taken[after - 1][1] < span[0] and span[1] < taken[after][0]
            if value.num_bytes <= num_bytes and is_free:
                taken.insert(after, span)
                value.is_lodged = True
                break


def _flatten(
    schedule: Schedule, now: int, spans: dict[int, tuple[int, int]], free: list[Value]
) -> int:
    """Numbers the moments of a schedule and those it calls; returns the next one.

    Adds each value's first and last moment to `spans`, temporaries to `free`.
    """
    begins, ends = [], []
    for line in range(len(schedule.computation.instructions)):
        begins.append(now)
        now += 1
        if line in schedule.calls:
            now = _flatten(schedule.calls[line], now, spans, free)
        ends.append(now - 1)
    for value in schedule.values:
        if id(value) not in spans:  # else called from elsewhere before
            spans[id(value)] = begins[value.born], ends[value.last]
            if value.is_temporary and value.num_bytes:
                free.append(value)
    schedule.__dict__.pop("live_bytes", None)  # to be counted anew
    schedule.__dict__.pop("peak_bytes", None)
    return now


def first_leaves(computation: Computation) -> dict[str, int]:
    """Returns the first leaf of each parameter among those of all."""
    offsets, at = {}, 0
    for parameter in computation.parameters:
        offsets[parameter.name] = at
        at += len(parameter.shape.leaves)
    return offsets
