"""HBM bytes of one instruction: what it must read and write once.

Each result says how much of each operand it needs: an elementwise operation one
element for one, a slice only the slice, a product everything. Demands run
backwards through a fusion to its parameters. A result that updates a slice of a
buffer in place (dynamic-update-slice, scatter) writes the slice and leaves the
rest alone. Arrays in another memory space (VMEM, SMEM, host) are not HBM
traffic. The local traffic of collectives is not counted here.
"""

from collections.abc import Callable, Iterator

from sharding.hlo import custom_calls
from sharding.hlo.aliases import output_to_operand
from sharding.hlo.opcodes import (
    COLLECTIVES,
    DATA_MOVEMENT,
    ELEMENTWISE,
    FREE,
    TRANSFERS,
    base_opcode,
)
from sharding.hlo.reader import Computation, Instruction, Module
from sharding.hlo.shapes import Shape, to_bytes

_SLICES = frozenset(["slice", "dynamic-slice", "gather"])
_ONE_TO_ONE = (ELEMENTWISE | DATA_MOVEMENT) - _SLICES - {"dynamic-update-slice", "pad"}
# A buffer seen through these is still the same buffer.
_ALIASES = frozenset(["bitcast", "get-tuple-element"])
# A fusion that only re-cuts a collective's result adds nothing of its own.
_RECUTS = frozenset([
    "bitcast", "convert", "copy", "dynamic-slice", "reshape", "slice", "transpose",
])  # fmt: skip

Demand = dict[str, list[int]]  # instruction -> elements needed of each leaf


class TrafficCounter:
    """Counts the HBM bytes of instructions of one module.

    Args:
      module: the program.
      is_hbm: whether a memory space number is the device's main memory.
    """

    def __init__(self, module: Module, is_hbm: Callable[[int], bool]):
        self._module = module
        self._is_hbm = is_hbm
        self._bodies: dict[tuple[str, bool], tuple[list[list[int]], list[int]]] = {}

    def of(self, instruction: Instruction, computation: Computation) -> int:
        """Returns the HBM bytes that one execution of `instruction` moves.

        Raises:
          ValueError: an opcode that is not known, or an undefined operand.
        """
        opcode = base_opcode(instruction)
        if opcode in FREE or opcode in COLLECTIVES or opcode in TRANSFERS or not opcode:
            return 0
        if opcode == "custom-call":
            if custom_calls.is_free(instruction):
                return 0
            if (stated := custom_calls.stated_bytes(instruction)) is not None:
                return stated
        demand: Demand = {}
        writes = self._result(instruction, computation, demand, outermost=True)
        total = 0
        for shape, count in zip(self._results(instruction), writes, strict=True):
            total += self._bytes(shape, count)
        for name, counts in demand.items():
            if name == instruction.name:
                continue
            leaves = computation.by_name[name].shape.leaves
            for shape, count in zip(leaves, counts, strict=True):
                total += self._bytes(shape, min(count, shape.size))
        return total

    def _bytes(self, shape: Shape, count: int) -> int:
        return to_bytes(count, shape.dtype) if self._is_hbm(shape.space) else 0

    def _results(self, instruction: Instruction) -> tuple[Shape, ...]:
        """Returns the arrays that `instruction` writes."""
        shape = instruction.shape
        if instruction.opcode == "custom-call":
            return custom_calls.results(instruction)
        if instruction.opcode == "copy-start":  # (destination, source, context)
            return shape.elements[0].leaves
        if instruction.opcode.endswith("-start") and len(shape.elements) > 1:
            return shape.elements[1].leaves  # ((operands), results, context)
        return shape.leaves

    def _result(
        self,
        instruction: Instruction,
        computation: Computation,
        demand: Demand,
        *,
        outermost: bool = False,
    ) -> list[int]:
        """Adds what a computation's result needs; returns elements written a leaf."""
        opcode = base_opcode(instruction) or instruction.opcode
        operands = computation.operands(instruction)
        if opcode in COLLECTIVES and not outermost:
            self._need_all(computation, operands, demand, skip_parameters=True)
            return [0] * len(instruction.shape.leaves)
        if opcode == "fusion":
            called = self._module.computation(instruction.called("calls"), instruction)
            reads, writes = self._body(called)
            for operand, counts in zip(operands, reads, strict=True):
                _add(demand, operand, counts)
            return writes
        if opcode == "tuple":
            return [
                count
                for operand in operands
                for count in self._result(operand, computation, demand)
            ]
        if opcode == "parameter":
            return [0] * len(instruction.shape.leaves)  # handed through
        if opcode in _RECUTS and not outermost and self._cuts(operands[0], computation):
            return self._result(operands[0], computation, demand)
        if opcode == "bitcast" and self._in_place(operands[0], computation):
            return self._result(operands[0], computation, demand)
        if opcode in ("dynamic-update-slice", "scatter"):
            buffer = operands[0]
            if outermost or self._is_buffer(buffer, computation):
                return [
                    self._update(opcode, instruction, computation, demand, outermost)
                ]
        counts = [leaf.size for leaf in self._results(instruction)]
        if not outermost:
            _add(demand, instruction, counts)
            return counts
        for name, needed in self._needs(instruction, computation, None):
            _add(demand, computation.by_name[name], needed)
        return counts

    def _update(
        self,
        opcode: str,
        instruction: Instruction,
        computation: Computation,
        demand: Demand,
        outermost: bool,
    ) -> int:
        """Adds what an update in place needs; returns the elements it writes."""
        operands = computation.operands(instruction)
        if opcode == "scatter":
            updates = operands[1 + len(operands) // 2]
        else:
            updates = operands[1]
        self._need_all(computation, operands[1:], demand)
        written = updates.shape.size
        if opcode == "scatter":  # combined with what is there
            _add(demand, operands[0], [min(written, operands[0].shape.size)])
        if not outermost:  # updates before this one, to the same buffer
            buffer = operands[0]
            while buffer.opcode == "bitcast" or self._is_recut(buffer):
                buffer = computation.operands(buffer)[0]
            written += sum(self._result(buffer, computation, demand))
        return written

    def _cuts(self, instruction: Instruction, computation: Computation) -> bool:
        """Whether this is a collective, seen through copies and slices."""
        while base_opcode(instruction) not in COLLECTIVES:
            if instruction.opcode not in _RECUTS | {"get-tuple-element"}:
                return False
            instruction = computation.operands(instruction)[0]
        return True

    def _in_place(self, instruction: Instruction, computation: Computation) -> bool:
        """Whether this is an update of a buffer that came in as a parameter."""
        while instruction.opcode in _ALIASES:
            instruction = computation.operands(instruction)[0]
        if instruction.opcode == "fusion":
            called = self._module.computation(instruction.called("calls"), instruction)
            return self._in_place(called.root, called)
        if instruction.opcode not in ("dynamic-update-slice", "scatter"):
            return False
        return self._is_buffer(computation.operands(instruction)[0], computation)

    def _is_buffer(self, instruction: Instruction, computation: Computation) -> bool:
        """Whether this is a parameter, perhaps already updated in place."""
        while instruction.opcode in _ALIASES or self._is_recut(instruction):
            instruction = computation.operands(instruction)[0]
        if instruction.opcode == "parameter":
            return True
        return self._in_place(instruction, computation)

    def _is_recut(self, instruction: Instruction) -> bool:
        """Whether this is a fusion that sees its operand in other tiles, in place."""
        if instruction.opcode != "fusion" or output_to_operand(instruction) != [
            ((), 0, ())
        ]:
            return False
        called = self._module.computation(instruction.called("calls"), instruction)
        return called.root.opcode == "copy" and len(called.instructions) == 2

    def _body(self, computation: Computation) -> tuple[list[list[int]], list[int]]:
        """Returns what a fusion reads of each parameter, and writes, in elements."""
        key = (computation.name, True)
        if key not in self._bodies:
            demand: Demand = {}
            writes = self._result(computation.root, computation, demand)
            self._propagate(computation, demand)
            self._bodies[key] = (self._of_parameters(computation, demand), writes)
        return self._bodies[key]

    def _propagate(self, computation: Computation, demand: Demand) -> None:
        """Pushes demands from results back to parameters, users before definitions."""
        for instruction in reversed(computation.instructions):
            counts = demand.get(instruction.name)
            if counts is None or instruction.opcode == "parameter":
                continue
            leaves = instruction.shape.leaves
            capped = [min(c, leaf.size) for c, leaf in zip(counts, leaves, strict=True)]
            for name, needed in self._needs(instruction, computation, capped):
                _add(demand, computation.by_name[name], needed)

    def _of_parameters(
        self, computation: Computation, demand: Demand
    ) -> list[list[int]]:
        return [
            [
                min(count, leaf.size)
                for count, leaf in zip(
                    demand.get(p.name, [0] * len(p.shape.leaves)),
                    p.shape.leaves,
                    strict=True,
                )
            ]
            for p in computation.parameters
        ]

    def _needs(
        self,
        instruction: Instruction,
        computation: Computation,
        counts: list[int] | None,
    ) -> Iterator[tuple[str, list[int]]]:
        """Yields what making `counts` elements of each leaf takes of each operand."""
        opcode = base_opcode(instruction) or instruction.opcode
        operands = computation.operands(instruction)
        if opcode in ("parameter", "constant", "iota") or not operands:
            return
        size = sum(leaf.size for leaf in self._results(instruction))
        count = size if counts is None else sum(counts)
        if opcode == "get-tuple-element":
            yield operands[0].name, _leaf_counts(instruction, operands[0], count)
        elif opcode == "tuple":
            at = 0
            for operand in operands:
                width = len(operand.shape.leaves)
                full = [leaf.size for leaf in operand.shape.leaves]
                yield operand.name, full if counts is None else counts[at : at + width]
                at += width
        elif opcode in _SLICES:
            yield operands[0].name, [count]
            for index in operands[1:]:
                yield index.name, [index.shape.size]
        elif opcode == "dynamic-update-slice":
            update = operands[1].shape.size
            yield operands[0].name, [max(count - update, 0)]
            yield operands[1].name, [min(count, update)]
            for index in operands[2:]:
                yield index.name, [1]
        elif opcode in _ONE_TO_ONE or opcode in ("bitcast", "pad"):
            for operand in operands:
                needed = min(count, operand.shape.size)
                if opcode in ("bitcast", "bitcast-convert") and size:
                    needed = -(-count * operand.shape.size // size)
                yield operand.name, [needed]
        elif opcode == "reduce":
            of_result = instruction.shape.leaves[0].size
            share = min(count, of_result)
            for operand in operands:
                whole = operand.shape.size
                yield operand.name, [-(-whole * share // max(of_result, 1))]
        elif opcode == "fusion":
            called = self._module.computation(instruction.called("calls"), instruction)
            yield from self._through_fusion(operands, called, counts)
        else:
            for operand in operands:
                yield operand.name, [leaf.size for leaf in operand.shape.leaves]

    def _through_fusion(
        self,
        operands: tuple[Instruction, ...],
        called: Computation,
        counts: list[int] | None,
    ) -> Iterator[tuple[str, list[int]]]:
        demand: Demand = {}
        leaves = called.root.shape.leaves
        _add(demand, called.root, counts or [leaf.size for leaf in leaves])
        self._propagate(called, demand)
        reads = self._of_parameters(called, demand)
        for operand, needed in zip(operands, reads, strict=True):
            yield operand.name, needed

    def _need_all(
        self,
        computation: Computation,
        operands: tuple[Instruction, ...],
        demand: Demand,
        *,
        skip_parameters: bool = False,
    ) -> None:
        for operand in operands:
            source = operand
            while source.opcode in _ALIASES:
                source = computation.operands(source)[0]
            if skip_parameters and source.opcode == "parameter":
                continue
            _add(demand, operand, [leaf.size for leaf in operand.shape.leaves])


def _add(demand: Demand, instruction: Instruction, counts: list[int]) -> None:
    old = demand.get(instruction.name)
    demand[instruction.name] = (
        counts if old is None else [a + b for a, b in zip(old, counts, strict=True)]
    )


def _leaf_counts(element: Instruction, whole: Instruction, count: int) -> list[int]:
    """Returns the demand on a tuple of which only one element is wanted."""
    index = int(element.require("index"))
    counts: list[int] = []
    for k, part in enumerate(whole.shape.elements):
        full = [leaf.size for leaf in part.leaves]
        counts += (
            ([count] if len(full) == 1 else full) if k == index else [0] * len(full)
        )
    return counts
