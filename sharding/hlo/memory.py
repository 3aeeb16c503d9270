"""The records of a program's memory: what one device holds, and when it holds most.

Two accounts stand beside each other and are never mixed: ours, followed through the
schedule of the text by `sharding.hlo.liveness`, and XLA's own, where a compiled
program was given. XLA packs buffers into one space, so its temporaries are at least
what is alive; the difference is fragmentation and reuse that we do not see.
"""

import dataclasses
import re

from sharding.hlo.aliases import input_output_alias, leaf_at
from sharding.hlo.footprint import spell_shape
from sharding.hlo.liveness import follow
from sharding.hlo.reader import Module, attribute
from sharding.hlo.schedule import Schedule, Value
from sharding.hlo.source import Sources, read_sources

KINDS = ("argument", "output", "temporary", "constant")

_POINTS = 512  # of a timeline
_DONOR = re.compile(r"\((\d+),")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """One array that one device holds.

    Attributes:
      name: of the instruction that makes it; of an argument its JAX name, if known.
      computation: where that instruction stands.
      shape: as HLO spells it, "bf16[16,640]"; of one leaf where the result is a tuple.
      num_bytes: tiles and padding included, where the layout tells.
      kind: one of `KINDS`.
      op_name: JAX's name of the operation, or "".
      source: "file.py:123", or ""; of the first user where it has no line itself.
    """

    name: str
    computation: str
    shape: str
    num_bytes: int
    kind: str
    op_name: str = ""
    source: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Argument:
    """One parameter of the entry computation.

    Attributes:
      number: of the HLO parameter; JAX leaves out arguments that nothing reads.
      name: JAX's, such as "params['w']", or the instruction's where JAX gave none.
      shape: of one device's part; a tuple's leaves are joined.
      num_bytes: of one device's part, padding included.
      aliased_bytes: of it, what an output takes over (donated, and used).
      is_donated: whether the caller gave it away; None where only the text is known
        and the text does not say.
    """

    number: int
    name: str
    shape: str
    num_bytes: int
    aliased_bytes: int
    is_donated: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaMemory:
    """What XLA says of the same program: `compiled.memory_analysis()`.

    Attributes:
      peak_bytes: as XLA reports it, which on some platforms leaves parts out; None
        where it does not say.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    peak_bytes: int | None = None

    @property
    def total_bytes(self) -> int:
        """Arguments, outputs and temporaries, aliases counted once."""
        results = self.output_bytes - self.alias_bytes
        return self.argument_bytes + results + self.temporary_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """What ONE device holds in main memory during ONE call.

    Attributes:
      argument_bytes: all arguments, for the whole call.
      output_bytes: all results, for the whole call, aliased ones included.
      alias_bytes: results that lie in an argument's place.
      constant_bytes: tables that are part of the program.
      temporary_bytes: most bytes of intermediate results alive at once.
      peak_at: instruction at which they are alive; in a loop or a branch the path to
        it, "while.5 > fusion.3"; "" where there are none.
      peak: every buffer alive at that instruction, the largest first; of an argument
        and the output that takes its place, the argument.
      timeline_bytes: temporaries alive through the entry's schedule, evenly thinned
        to at most 512 points, each the most of its stretch.
      arguments: in the order of their numbers.
      is_scheduled: whether the text states an order of execution; if not, the order
        of its lines is taken.
      xla: XLA's own account, or None where only text is known.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    constant_bytes: int
    temporary_bytes: int
    peak_at: str
    peak: tuple[Buffer, ...]
    timeline_bytes: tuple[int, ...]
    arguments: tuple[Argument, ...]
    is_scheduled: bool
    xla: XlaMemory | None = None

    @property
    def peak_bytes(self) -> int:
        """Arguments, outputs, constants and temporaries, aliases counted once."""
        return (
            self.argument_bytes
            + self.output_bytes
            - self.alias_bytes
            + self.constant_bytes
            + self.temporary_bytes
        )


def find_memory(
    module: Module,
    donated: tuple[bool, ...] | None = None,
    xla: XlaMemory | None = None,
) -> Memory:
    """Returns what one device holds while it runs `module`.

    Args:
      module: the program.
      donated: for each parameter of the entry, whether the caller gave it away.
      xla: XLA's own account, to stand beside.

    Raises:
      ValueError: a computation is not in the text.
    """
    # TPU numbers its on-chip memories and the host; on GPU 5 is the host.
    is_counted = (lambda s: s == 0) if module.is_tpu else (lambda s: s != 5)
    schedule = follow(module, is_counted)
    sources = read_sources(module)
    arguments, alias_bytes = _arguments(module, schedule, sources, donated)
    buffers = [
        _buffer(sources, where, value, "temporary") for where, value in schedule.peak()
    ]
    in_arguments = {
        id(schedule.results[leaf_at(module.entry.root.shape, output)])
        for output, _, _ in input_output_alias(module)
    }
    constants = 0
    for value in schedule.values:
        opcode = value.instruction.opcode
        if value.given >= 0:
            name = arguments[int(value.instruction.literal)].name
            buffers.append(_buffer(sources, schedule, value, "argument", name))
        elif opcode == "constant":
            constants += value.num_bytes
            buffers.append(_buffer(sources, schedule, value, "constant"))
        elif value.is_result and id(value) not in in_arguments:
            buffers.append(_buffer(sources, schedule, value, "output"))
    return Memory(
        argument_bytes=sum(argument.num_bytes for argument in arguments),
        output_bytes=sum(value.num_bytes for value in schedule.results),
        alias_bytes=alias_bytes,
        constant_bytes=constants,
        temporary_bytes=schedule.peak_bytes,
        peak_at=schedule.peak_path(),
        peak=tuple(
            sorted((b for b in buffers if b.num_bytes), key=lambda b: -b.num_bytes)
        ),
        timeline_bytes=_thinned(schedule.live_bytes),
        arguments=arguments,
        is_scheduled="is_scheduled=true" in module.header,
        xla=xla,
    )


def _arguments(
    module: Module,
    schedule: Schedule,
    sources: Sources,
    donated: tuple[bool, ...] | None,
) -> tuple[tuple[Argument, ...], int]:
    """Returns the entry's parameters, and the bytes that outputs take over."""
    header = module.header.partition(",")[2]
    donors = {int(n) for n in _DONOR.findall(attribute(header, "buffer_donor") or "")}
    taken: dict[int, int] = {}
    parameters = module.entry.parameters
    given: dict[int, list[Value]] = {}
    for value in schedule.values:
        if value.given >= 0:
            given.setdefault(int(value.instruction.literal), []).append(value)
    for _, number, index in input_output_alias(module):
        start = leaf_at(parameters[number].shape, index)
        taken[number] = taken.get(number, 0) + given[number][start].num_bytes
    if donated is not None and len(donated) != len(parameters):
        donated = None  # JAX's arguments and the text's are not one to one
    found = []
    for parameter in parameters:
        number = int(parameter.literal)
        is_donated = True if number in donors or number in taken else None
        if donated is not None:
            is_donated = donated[number]
        op_name, _ = sources.of(parameter)
        found.append(
            Argument(
                number=number,
                name=op_name or parameter.name,
                shape=spell_shape(parameter.shape),
                num_bytes=sum(value.num_bytes for value in given.get(number, ())),
                aliased_bytes=taken.get(number, 0),
                is_donated=is_donated,
            )
        )
    return tuple(found), sum(taken.values())


def _buffer(
    sources: Sources, schedule: Schedule, value: Value, kind: str, name: str = ""
) -> Buffer:
    op_name, source = sources.of(value.instruction)
    if kind == "temporary" and not source:
        source = sources.of_user(value.instruction, schedule.computation)
    return Buffer(
        name=name or value.instruction.name,
        computation=schedule.computation.name,
        shape=spell_shape(value.shape),
        num_bytes=value.num_bytes,
        kind=kind,
        op_name=op_name,
        source=source,
    )


def _thinned(values: tuple[int, ...]) -> tuple[int, ...]:
    """Returns at most `_POINTS` values, each the largest of its stretch."""
    step = -(-len(values) // _POINTS) or 1
    return tuple(max(values[k : k + step]) for k in range(0, len(values), step))
