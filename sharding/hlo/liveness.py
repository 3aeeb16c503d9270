"""Which buffers are alive when: follows a scheduled program once, line by line.

The lines of a scheduled computation are its order of execution. A buffer is alive
from the instruction that makes it to the last that reads it. The rules for what
shares a buffer are those of XLA's buffer assignment:

    bitcast, tuple, get-tuple-element, -done     another name for the same buffers
    while                                        carries in place, through its body
    dynamic-update-slice, scatter, fusions       write into their operand
      that end in one, output_to_operand_aliasing
    elementwise operations, all-reduce-start,    take over an operand of the same size
      sort, fusions of the first                 and order that nothing reads later
    conditional, call, async-start               write their results where the caller
                                                 wants them

A called computation is followed once; the most it holds is added where it is called,
of a conditional's branches the largest. Temporaries that fit where an output of the
program is yet to be written are put there. Buffers in other memory spaces count
nothing.
"""

import dataclasses
import heapq
import re
from collections.abc import Callable, Iterator, Sequence

from sharding.hlo.footprint import minor_to_major, padded_bytes
from sharding.hlo.opcodes import ELEMENTWISE
from sharding.hlo.reader import Computation, Instruction, Module
from sharding.hlo.shapes import Shape

_SAME = frozenset([
    "add-dependency", "async-update", "bitcast", "domain", "optimization-barrier",
    "opt-barrier",
])  # fmt: skip
_NOT_A_USE = frozenset(["bitcast", "get-tuple-element", "tuple"])
_UPDATES = frozenset(["dynamic-update-slice", "scatter"])
_ELEMENTWISE = ELEMENTWISE | {"bitcast-convert", "convert", "copy"}
_TAKES_OVER = _ELEMENTWISE | {"all-reduce-start", "sort"}
_ALIASING = re.compile(r"\{([\d,\s]*)\}:\s*\((\d+),\s*\{([\d,\s]*)\}")


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
      live_bytes: temporaries alive at each line, called computations included.
      calls: at lines that call others, the one that holds most.
    """

    computation: Computation
    values: tuple[Value, ...]
    results: tuple[Value, ...]
    live_bytes: tuple[int, ...]
    calls: dict[int, "Schedule"]

    @property
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


def follow(module: Module, is_counted: Callable[[int], bool]) -> Schedule:
    """Returns the schedule of the entry computation.

    Args:
      module: the program.
      is_counted: whether a memory space number is the memory that is asked about.

    Raises:
      ValueError: a computation or an operand is not in the text.
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
        offsets, at = {}, 0
        for parameter in computation.parameters:
            offsets[parameter.name] = at
            at += len(parameter.shape.leaves)
        for line, instruction in enumerate(computation.instructions):
            opcode = instruction.opcode
            try:
                operands = [leaves[name] for name in instruction.operands]
            except KeyError as error:
                raise ValueError(
                    f"operand {error} is not defined in %{computation.name}:"
                    f" {instruction}"
                ) from None
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
        if is_entry and not self._module.is_tpu:
            _lend_outputs(made, results)
        return Schedule(
            computation=computation,
            values=tuple(made),
            results=results,
            live_bytes=_live_bytes(computation, made, calls),
            calls=calls,
        )

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
        elif opcode in _UPDATES and len(found) == 1:
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
        for output, number, index in aliasing(instruction):
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
        elif opcode in _TAKES_OVER:
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
                _updated_parameters(called),
                _elementwise_parameters(called),
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


def leaf_at(shape: Shape, index: Sequence[int]) -> int:
    """Returns which leaf of `shape` is the first at a tuple index."""
    at = 0
    for k in index:
        at += _starts(shape)[k]
        shape = shape.elements[k]
    return at


def _starts(shape: Shape) -> list[int]:
    """Returns the first leaf of each element of a tuple."""
    cached = shape.__dict__.get("_starts")
    if cached is None:
        cached, at = [], 0
        for element in shape.elements:
            cached.append(at)
            at += len(element.leaves)
        shape.__dict__["_starts"] = cached
    return cached


def _lend_outputs(made: list[Value], results: tuple[Value, ...]) -> None:
    """Puts temporaries, the largest first, where outputs are yet to be written.

    Outputs have their place from the start, and XLA:CPU and XLA:GPU use it.
    """
    outputs = {id(v): v for v in results if v.given < 0 and v.num_bytes}
    places = [
        (output, [(output.born, output.last)])
        for output in heapq.nlargest(32, outputs.values(), key=lambda v: v.num_bytes)
    ]
    free = (v for v in made if v.is_temporary and v.num_bytes) if places else ()
    for value in heapq.nlargest(4096, free, key=lambda v: v.num_bytes):
        for output, taken in places:
            fits = value.num_bytes <= output.num_bytes
            if fits and all(value.last < a or b < value.born for a, b in taken):
                taken.append((value.born, value.last))
                value.is_lodged = True
                break


def _live_bytes(
    computation: Computation, made: list[Value], calls: dict[int, Schedule]
) -> tuple[int, ...]:
    change = [0] * (len(computation.instructions) + 1)
    for value in made:
        if value.num_bytes and value.is_temporary:
            change[value.born] += value.num_bytes
            change[value.last + 1] -= value.num_bytes
    live, total = [], 0
    for line in range(len(computation.instructions)):
        total += change[line]
        live.append(total + (calls[line].peak_bytes if line in calls else 0))
    return tuple(live)


def branches(instruction: Instruction) -> list[str]:
    """Returns the names of the computations that a conditional chooses from."""
    listed = (instruction.attr("branch_computations") or "{}")[1:-1].split(",")
    names = [name.strip().lstrip("%") for name in listed if name.strip()]
    pair = ("true_computation", "false_computation")
    return names or [n for key in pair if (n := instruction.called(key))]


def aliasing(
    instruction: Instruction,
) -> list[tuple[tuple[int, ...], int, tuple[int, ...]]]:
    """Returns (output index, operand number, index in it) of what writes in place."""
    if "output_to_operand_aliasing=" not in instruction.rest:
        return []
    return parse_aliasing(instruction.attr("output_to_operand_aliasing") or "")


def parse_aliasing(text: str) -> list[tuple[tuple[int, ...], int, tuple[int, ...]]]:
    """Returns the triples that "{ {1}: (3, {}, may-alias) }" spells."""

    def ints(part: str) -> tuple[int, ...]:
        return tuple(int(n) for n in part.replace(" ", "").split(",") if n)

    found = _ALIASING.findall(text)
    return [(ints(output), int(number), ints(index)) for output, number, index in found]


def _updated_parameters(called: Computation) -> dict[int, int]:
    """Returns, for results of a fusion that update a parameter in place, which."""
    root = called.root
    results = called.operands(root) if root.opcode == "tuple" else (root,)
    found: dict[int, int] = {}
    for leaf, result in enumerate(results):
        is_update = False
        while result.opcode in _UPDATES or result.opcode == "bitcast":
            is_update |= result.opcode in _UPDATES
            result = called.operands(result)[0]
        if is_update and result.opcode == "parameter":
            found[leaf] = int(result.literal)
    return found


def _elementwise_parameters(called: Computation) -> frozenset[int]:
    """Returns the parameters that only elementwise operations lead to the root."""
    root = called.root
    fine: dict[str, bool] = {root.name: True}
    if root.opcode == "tuple":
        fine.update(dict.fromkeys(root.operands, True))
    for instruction in reversed(called.instructions):
        if instruction.opcode in ("parameter", "constant"):
            continue
        if instruction is root and root.opcode == "tuple":
            continue
        keeps = fine.get(instruction.name, True) and instruction.opcode in _ELEMENTWISE
        for name in instruction.operands:
            operand = called.by_name.get(name)
            same = operand is not None and operand.shape.dims == instruction.shape.dims
            fine[name] = fine.get(name, True) and keeps and same
    return frozenset(
        int(p.literal) for p in called.parameters if fine.get(p.name, False)
    )
