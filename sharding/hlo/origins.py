"""Where a value comes from: the argument, or the reduce-scatter, that it is a piece of.

Only moves are followed: a value keeps its origin through copies, conversions, slices,
reshapes and transposes, in fusions of nothing else, into loops that hand it on, and
through updates in place. Anything computed has none.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from sharding.hlo import custom_calls
from sharding.hlo.aliases import UPDATES, branches, leaf_at
from sharding.hlo.reader import Computation, Instruction, Module
from sharding.hlo.shapes import ELEMENT_BITS

MOVES = frozenset([
    "bitcast", "convert", "copy", "dynamic-slice", "optimization-barrier",
    "opt-barrier", "reshape", "slice", "transpose",
])  # fmt: skip

# ("argument", number of an entry parameter), ("reduce-scatter", its name), or None.
Origin = tuple[str, int | str] | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """An instruction that runs, with the origins of what it reads.

    Attributes:
      line: of `instruction` in `computation`.
      count: executions in one call.
      operands: for each operand, the origins of its leaves.
    """

    computation: Computation
    instruction: Instruction
    line: int
    count: int
    operands: tuple[Sequence[Origin], ...]


class Origins:
    """Walks through a program as it runs, each computation once.

    Args:
      module: the program.
      executions: iterations of each loop in one call, by the name of its `while`.
    """

    def __init__(self, module: Module, executions: Mapping[str, int]):
        self._module = module
        self._executions = executions
        self._seen: set[str] = set()
        self._fusions: dict[str, tuple[int | None, ...]] = {}
        self._kept: dict[str, tuple[bool, ...]] = {}

    def places(self) -> Iterator[Place]:
        """Yields every instruction that runs, callers before what they call."""
        given: list[Origin] = [
            ("argument", int(parameter.literal))
            for parameter in self._module.entry.parameters
            for _ in parameter.shape.leaves
        ]
        yield from self._walk(self._module.entry, given, 1)

    def moved(self, called: Computation) -> tuple[int | None, ...]:
        """Returns for each result of a fusion the parameter it is a piece of.

        Perhaps times a scale, where the parameter is stored in 8 bits or fewer.
        """
        if called.name not in self._fusions:
            root = called.root
            results = called.operands(root) if root.opcode == "tuple" else (root,)
            sources = [_unscaled(called, trace(called, r)) for r in results]
            self._fusions[called.name] = tuple(
                int(s.literal) if s.opcode == "parameter" else None for s in sources
            )
        return self._fusions[called.name]

    def _walk(
        self, computation: Computation, given: Sequence[Origin], count: int
    ) -> Iterator[Place]:
        if computation.name in self._seen:
            return
        self._seen.add(computation.name)
        origins: dict[str, Sequence[Origin]] = {}
        at = 0
        for parameter in computation.parameters:
            width = len(parameter.shape.leaves)
            found = tuple(given[at : at + width])
            origins[parameter.name] = found + (None,) * (width - len(found))
            at += width
        inner: list[tuple[Computation, Sequence[Origin], int]] = []
        for line, instruction in enumerate(computation.instructions):
            if instruction.opcode == "parameter":
                continue
            operands = tuple(origins.get(name, ()) for name in instruction.operands)
            yield Place(
                computation=computation,
                instruction=instruction,
                line=line,
                count=count,
                operands=operands,
            )
            inner += self._calls(instruction, operands, count)
            origins[instruction.name] = self._result(computation, instruction, operands)
        for called, arguments, times in inner:
            yield from self._walk(called, arguments, times)

    def _calls(
        self,
        instruction: Instruction,
        operands: tuple[Sequence[Origin], ...],
        count: int,
    ) -> Iterator[tuple[Computation, Sequence[Origin], int]]:
        opcode = instruction.opcode
        if opcode == "while":
            body = self._module.computation(instruction.called("body"), instruction)
            times = self._executions.get(instruction.name, count)
            yield body, self._carried(body, operands[0]), times
        elif opcode == "conditional":
            for index, name in enumerate(branches(instruction)):
                branch = self._module.computation(name, instruction)
                yield (
                    branch,
                    operands[1 + index] if index + 1 < len(operands) else (),
                    count,
                )
        elif opcode in ("call", "async-start"):
            name = instruction.called("to_apply") or instruction.called("calls")
            flat = [origin for leaves in operands for origin in leaves]
            yield self._module.computation(name, instruction), flat, count
        elif opcode == "custom-call" and (name := custom_calls.offloaded(instruction)):
            yield self._module.computation(name, instruction), (), count

    def _carried(self, body: Computation, start: Sequence[Origin]) -> list[Origin]:
        """Returns the origins of a loop's carry that hold in every iteration."""
        kept: list[Origin] = []
        elements = body.root.shape.elements
        for element, same in zip(elements, self._keeps(body), strict=False):
            for leaf in range(len(kept), len(kept) + len(element.leaves)):
                kept.append(start[leaf] if same and leaf < len(start) else None)
        return kept + [None] * (len(start) - len(kept))

    def _keeps(self, body: Computation) -> tuple[bool, ...]:
        """Returns for each element of a carry if it is kept or updated."""
        if body.name not in self._kept:
            self._kept[body.name] = ()
            sources = [self._stored(body, name) for name in body.root.operands]
            self._kept[body.name] = tuple(
                source.opcode == "get-tuple-element"
                and body.by_name[source.operands[0]].opcode == "parameter"
                and int(source.require("index")) == k
                for k, source in enumerate(sources)
                if body.root.opcode == "tuple"
            )
        return self._kept[body.name]

    def _stored(self, computation: Computation, name: str) -> Instruction:
        """Returns the value in whose place `name` lies or of which it is a piece."""
        found = computation.by_name[name]
        while True:
            if found.opcode in MOVES or found.opcode in UPDATES:
                found = computation.by_name[found.operands[0]]
                continue
            whole, index = found, 0
            if found.opcode == "get-tuple-element":
                whole = computation.by_name[found.operands[0]]
                index = int(found.require("index"))
            source: str | None = None
            if whole.opcode == "fusion":
                called = self._module.computation(whole.called("calls"), whole)
                number = self._updated(called, index)
                source = None if number is None else whole.operands[number]
            elif whole.opcode == "while":
                body = self._module.computation(whole.called("body"), whole)
                start = computation.by_name[whole.operands[0]]
                if start.opcode == "tuple" and any(
                    self._keeps(body)[index : index + 1]
                ):
                    source = start.operands[index]
            if source is None:
                return found
            found = computation.by_name[source]

    def _updated(self, called: Computation, index: int) -> int | None:
        """Returns the parameter that a result of a fusion is, or updates, or None."""
        results = called.root.operands if called.root.opcode == "tuple" else None
        if results is not None and index >= len(results):
            return None
        source = self._stored(called, results[index] if results else called.root.name)
        return int(source.literal) if source.opcode == "parameter" else None

    def _result(
        self,
        computation: Computation,
        instruction: Instruction,
        operands: tuple[Sequence[Origin], ...],
    ) -> Sequence[Origin]:
        opcode = instruction.opcode
        width = len(instruction.shape.leaves)
        if opcode == "tuple":
            return [origin for leaves in operands for origin in leaves]
        if opcode == "get-tuple-element" and operands:
            whole = computation.by_name[instruction.operands[0]].shape
            at = leaf_at(whole, (int(instruction.require("index")),))
            return operands[0][at : at + width]
        if opcode in ("reduce-scatter", "reduce-scatter-start"):
            return [("reduce-scatter", instruction.name)] * width
        if opcode == "copy-start":
            return [*operands[0], *operands[0], None]
        if opcode.endswith("-done") and operands:
            return (
                (*operands[0][-width:],) if width > 1 else (operands[0] or (None,))[:1]
            )
        if opcode == "while" and operands:
            body = self._module.computation(instruction.called("body"), instruction)
            return self._carried(body, operands[0])
        if (opcode in MOVES or opcode in UPDATES) and operands:
            return operands[0]
        if opcode == "fusion":
            called = self._module.computation(instruction.called("calls"), instruction)
            numbers = [self._updated(called, k) for k in range(width)]
            return [
                operands[n][0] if n is not None and operands[n] else None
                for n in numbers
            ]
        return [None] * width


def trace(computation: Computation, instruction: Instruction) -> Instruction:
    """Returns what `instruction` is a piece of: the first value that is no move."""
    while instruction.opcode in MOVES:
        instruction = computation.operands(instruction)[0]
    return instruction


def _unscaled(computation: Computation, instruction: Instruction) -> Instruction:
    """Returns the narrow parameter that `instruction` multiplies, or else itself."""
    if instruction.opcode == "multiply":
        for operand in computation.operands(instruction):
            source = trace(computation, operand)
            bits = ELEMENT_BITS.get(source.shape.dtype, 0)
            if source.opcode == "parameter" and 1 < bits <= 8:
                return source
    return instruction
