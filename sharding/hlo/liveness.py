"""Which buffers are alive when: follows a scheduled program once, line by line.

The lines of a scheduled computation are its order of execution. A buffer is alive
from the instruction that makes it to the last that reads it. The rules for what
shares a buffer are those of XLA's buffer assignment:

    bitcast, tuple, get-tuple-element, -done     another name for the same buffers
    while                                        carries in place, through its body
    dynamic-update-slice, scatter, fusions       write into their operand
      that end in one, output_to_operand_aliasing
    elementwise operations, all-reduce-start     take over an operand of the same size
      (on TPU all-reduce), sort, fusions of      and order that nothing reads later
      the first
    conditional, call, async-start               write their results where the caller
                                                 wants them

A called computation is followed once; the most it holds is added where it is called,
of a conditional's branches the largest. Temporaries that fit where an output of the
program is yet to be written are put there. Buffers in other memory spaces count
nothing.
"""

from collections.abc import Callable, Iterator, Sequence

from sharding.hlo.aliases import (
    ELEMENTWISE_MOVES,
    UPDATES,
    branches,
    elementwise_parameters,
    leaf_at,
    output_to_operand,
    updated_parameters,
)
from sharding.hlo.footprint import minor_to_major, padded_bytes
from sharding.hlo.reader import Computation, Instruction, Module
from sharding.hlo.schedule import Schedule, Value, first_leaves, lend_outputs

_SAME = frozenset([
    "add-dependency", "async-update", "bitcast", "domain", "optimization-barrier",
    "opt-barrier",
])  # fmt: skip
_NOT_A_USE = frozenset(["bitcast", "get-tuple-element", "tuple"])
_TAKES_OVER = ELEMENTWISE_MOVES | {"all-reduce-start", "sort"}


def follow(module: Module, is_counted: Callable[[int], bool]) -> Schedule:
    """Returns the schedule of the entry computation.

    Args:
      module: the program.
      is_counted: whether a memory space number is the memory that is asked about.

    Raises:
      ValueError: a computation is not in the text.
    """
    return _Follower(module, is_counted).schedule(module.entry)


class _Follower:
    """Follows each computation of a module once."""

    def __init__(self, module: Module, is_counted: Callable[[int], bool]):
        self._module = module
        self._is_counted = is_counted
        self._schedules: dict[str, Schedule] = {}
        self._fusions: dict[str, tuple[dict[int, int], frozenset[int]]] = {}

    def schedule(self, computation: Computation) -> Schedule:
        if computation.name not in self._schedules:
            self._schedules[computation.name] = self._follow(computation)
        return self._schedules[computation.name]

    def _follow(self, computation: Computation) -> Schedule:
        leaves: dict[str, Sequence[Value]] = {}
        made: list[Value] = []
        calls: dict[int, Schedule] = {}
        shared: list[tuple[int, Value, Value]] = []  # line, taken, taken over by
        offsets = first_leaves(computation)
        for line, instruction in enumerate(computation.instructions):
            opcode = instruction.opcode
            operands = [leaves[name] for name in instruction.operands]
            if opcode == "parameter":
                start = offsets[instruction.name]
                found = self._make(instruction, line, start)
                made += found
            elif opcode in _NOT_A_USE or opcode in _SAME or opcode.endswith("-done"):
                found = _renamed(computation, instruction, operands)
            else:
                callee = self._callee(instruction)
                if callee:
                    calls[line] = callee
                found = self._make(instruction, line)
                self._place(computation, instruction, callee, operands, found)
                made += [v for v in found if v.born == line and v.given < 0]
                shared += self._takeable(computation, line, operands, found)
            leaves[instruction.name] = found
            if opcode not in _NOT_A_USE:
                for values in operands:
                    for value in values:
                        value.last = line
        results = tuple(leaves[computation.root.name])
        for value in results:
            value.is_result = True
            value.last = len(computation.instructions) - 1
        is_entry = computation is self._module.entry
        settled: set[int] = set()  # takers; what is taken ends a line earlier
        for line, old, new in shared:
            free = old.last == line and old.is_temporary
            if free and id(new) not in settled and (is_entry or not new.is_result):
                old.last = line - 1
                settled.add(id(new))
        schedule = Schedule(
            computation=computation, values=tuple(made), results=results, calls=calls
        )
        if is_entry and not self._module.is_tpu:
            lend_outputs(self._module, schedule)
        return schedule

    def _make(
        self, instruction: Instruction, line: int, given: int = -1
    ) -> list[Value]:
        """Returns a new buffer for each leaf of an instruction's shape."""
        values = []
        for k, leaf in enumerate(instruction.shape.leaves):
            size = padded_bytes(leaf) if self._is_counted(leaf.space) else 0
            index = given + k if given >= 0 else -1
            values.append(Value(instruction, leaf, size, line, index))
        return values

    def _callee(self, instruction: Instruction) -> Schedule | None:
        """Returns the computation run here that holds most, or None."""
        opcode = instruction.opcode
        if opcode == "while":
            names = [instruction.called("body"), instruction.called("condition")]
        elif opcode == "conditional":
            names = branches(instruction)
        elif opcode in ("call", "async-start"):
            names = [instruction.called("to_apply") or instruction.called("calls")]
        else:
            return None
        found = [
            self.schedule(self._module.computation(name, instruction)) for name in names
        ]
        return max(found, key=lambda schedule: schedule.peak_bytes, default=None)

    def _place(
        self,
        computation: Computation,
        instruction: Instruction,
        callee: Schedule | None,
        operands: list[Sequence[Value]],
        found: list[Value],
    ) -> None:
        """Replaces results in `found` by the operands whose place they take."""
        opcode = instruction.opcode
        if opcode == "while":
            found[:] = operands[0]
        elif opcode in UPDATES and len(found) == 1:
            found[0] = operands[0][0]
        elif opcode == "copy-start":
            found[1] = operands[0][0]
        elif opcode.endswith("-start") and len(instruction.shape.elements) > 1:
            self._place_started(instruction, operands, found)
        elif opcode == "send":
            found[: len(operands[0])] = operands[0]
        elif opcode == "fusion":
            called = self._module.computation(instruction.called("calls"), instruction)
            for leaf, number in self._fusion(called)[0].items():
                if operands[number]:
                    found[leaf] = operands[number][0]
        elif callee and opcode == "call":
            given = [value for values in operands for value in values]
            for k, result in enumerate(callee.results):
                if 0 <= result.given < len(given):
                    found[k] = given[result.given]
        elif callee and opcode == "conditional":
            for index, name in enumerate(branches(instruction)):
                branch = self.schedule(self._module.computation(name, instruction))
                given = operands[1 + index] if index + 1 < len(operands) else ()
                for k, result in enumerate(branch.results):
                    if 0 <= result.given < len(given):
                        found[k] = given[result.given]
        for output, number, index in output_to_operand(instruction):
            place = leaf_at(instruction.shape, output)
            if number >= len(operands):
                continue
            source = computation.by_name[instruction.operands[number]].shape
            found[place] = operands[number][leaf_at(source, index)]

    def _place_started(
        self,
        instruction: Instruction,
        operands: list[Sequence[Value]],
        found: list[Value],
    ) -> None:
        """An asynchronous pair's first element is its operands."""
        if instruction.opcode.startswith("all-reduce"):
            return  # its elements are results
        given = [value for values in operands for value in values]
        count = min(len(instruction.shape.elements[0].leaves), len(given))
        found[:count] = given[:count]

    def _takeable(
        self,
        computation: Computation,
        line: int,
        operands: list[Sequence[Value]],
        found: list[Value],
    ) -> Iterator[tuple[int, Value, Value]]:
        """Yields the operands whose buffer a result may take over if they end here."""
        instruction = computation.instructions[line]
        opcode = instruction.opcode
        if opcode == "fusion":
            called = self._module.computations[instruction.called("calls") or ""]
            numbers: Sequence[int] = sorted(self._fusion(called)[1])
        elif opcode in _TAKES_OVER or (opcode == "all-reduce" and self._module.is_tpu):
            numbers = range(len(operands))
        elif opcode == "custom-call" and "__cublas$" in instruction.rest:
            numbers = (2,)  # the matrix that is added to the product
        else:
            return
        for value in found:
            if value.born != line or not value.num_bytes:
                continue
            for number in numbers:
                if number >= len(operands):
                    continue
                seen = computation.by_name[instruction.operands[number]].shape.leaves
                for old, leaf in zip(operands[number], seen, strict=True):
                    same_order = minor_to_major(leaf) == minor_to_major(value.shape)
                    if old.num_bytes == value.num_bytes and same_order:
                        yield line, old, value

    def _fusion(self, called: Computation) -> tuple[dict[int, int], frozenset[int]]:
        """Returns result -> parameter it updates, and those read where written."""
        if called.name not in self._fusions:
            self._fusions[called.name] = (
                updated_parameters(called),
                elementwise_parameters(called),
            )
        return self._fusions[called.name]


def _renamed(
    computation: Computation, instruction: Instruction, operands: list[Sequence[Value]]
) -> Sequence[Value]:
    """Returns the buffers of an instruction that only names others."""
    opcode = instruction.opcode
    if opcode == "tuple":
        return [value for values in operands for value in values]
    if not operands:
        raise ValueError(f"nothing to name in instruction: {instruction}")
    whole = computation.by_name[instruction.operands[0]].shape
    count = len(instruction.shape.leaves)
    if opcode == "get-tuple-element":
        start = leaf_at(whole, (int(instruction.require("index")),))
        return operands[0][start : start + count]
    if opcode.endswith("-done") and len(whole.elements) > 1:
        first = opcode in ("copy-done", "recv-done", "send-done", "all-reduce-done")
        start = 0 if first else len(whole.elements[0].leaves)
        if opcode == "send-done":
            start = len(operands[0]) - count  # a token
        return operands[0][start : start + count]
    return operands[0]
