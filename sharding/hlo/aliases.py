"""Which arrays lie in one place: aliases as the text states them, and in fusions."""

import re

from sharding.hlo.opcodes import ELEMENTWISE
from sharding.hlo.reader import Computation, Instruction, Module, attribute
from sharding.hlo.shapes import Shape

# Write into their first operand.
UPDATES = frozenset(["dynamic-update-slice", "scatter"])
# Read each element of an operand where they write one.
ELEMENTWISE_MOVES = ELEMENTWISE | {"bitcast-convert", "convert", "copy"}

_ALIASING = re.compile(r"\{([\d,\s]*)\}:\s*\((\d+),\s*\{([\d,\s]*)\}")

# (index of an output, number of an operand or parameter, index in that).
Alias = tuple[tuple[int, ...], int, tuple[int, ...]]


def leaf_at(shape: Shape, index: tuple[int, ...]) -> int:
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


def branches(instruction: Instruction) -> list[str]:
    """Returns the names of the computations that a conditional chooses from."""
    listed = (instruction.attr("branch_computations") or "{}")[1:-1].split(",")
    names = [name.strip().lstrip("%") for name in listed if name.strip()]
    pair = ("true_computation", "false_computation")
    return names or [n for key in pair if (n := instruction.called(key))]


def output_to_operand(
    instruction: Instruction,
) -> list[Alias]:
    """Returns (output index, operand number, index in it) of what writes in place."""
    if "output_to_operand_aliasing=" not in instruction.rest:
        return []
    return parse_aliasing(instruction.attr("output_to_operand_aliasing") or "")


def parse_aliasing(text: str) -> list[Alias]:
    """Returns the triples that "{ {1}: (3, {}, may-alias) }" spells."""

    def ints(part: str) -> tuple[int, ...]:
        return tuple(int(n) for n in part.replace(" ", "").split(",") if n)

    found = _ALIASING.findall(text)
    return [(ints(output), int(number), ints(index)) for output, number, index in found]


def input_output_alias(
    module: Module,
) -> list[Alias]:
    """Returns (output index, parameter number, index in it) of what is donated."""
    header = module.header.partition(",")[2]
    found = parse_aliasing(attribute(header, "input_output_alias") or "")
    return [each for each in found if each[1] < len(module.entry.parameters)]


def updated_parameters(called: Computation) -> dict[int, int]:
    """Returns, for results of a fusion that update a parameter in place, which."""
    root = called.root
    results = called.operands(root) if root.opcode == "tuple" else (root,)
    found: dict[int, int] = {}
    for leaf, result in enumerate(results):
        is_update = False
        while result.opcode in UPDATES or result.opcode == "bitcast":
            is_update |= result.opcode in UPDATES
            result = called.operands(result)[0]
        if is_update and result.opcode == "parameter":
            found[leaf] = int(result.literal)
    return found


def elementwise_parameters(called: Computation) -> frozenset[int]:
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
        keeps = (
            fine.get(instruction.name, True) and instruction.opcode in ELEMENTWISE_MOVES
        )
        for name in instruction.operands:
            operand = called.by_name.get(name)
            same = operand is not None and operand.shape.dims == instruction.shape.dims
            fine[name] = fine.get(name, True) and keeps and same
    return frozenset(
        int(p.literal) for p in called.parameters if fine.get(p.name, False)
    )
