"""Integers that a program counts with, as expressions of its loops' carries.

An expression is an int, `("state", k)` for element k of the innermost loop's
carry, `(opcode, *expressions)`, `("tuple", *expressions)`, `("iota",)` or
`("array", *ints)` for a 1-D table of indices, or None: unknown.
"""

import operator
import re
from collections.abc import Callable
from typing import Any

from sharding.hlo.reader import Computation, Instruction, Module
from sharding.hlo.shapes import Shape

Expression = Any
State = dict[int, Expression]  # carried element -> int or constant expression

_MAX_DEPTH = 150  # instructions from a counter back to its constant
_MAX_NODES = 500  # of an expression; a random number generator doubles at each step
_SAME = frozenset([
    "async-done", "bitcast", "broadcast", "convert", "copy", "copy-done",
    "copy-start", "opt-barrier", "reshape", "transpose",
])  # fmt: skip
_OPS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "negate": operator.neg,
    "select": lambda p, a, b: a if p else b,
    "clamp": lambda low, x, high: min(max(low, x), high),
    "shift-left": operator.lshift,
    "shift-right-logical": operator.rshift,
    "shift-right-arithmetic": operator.rshift,
    "divide": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "remainder": lambda a, b: abs(a) % abs(b) * (1 if a >= 0 else -1),
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}


def evaluate(expression: Expression, state: State) -> Expression:
    """Returns `expression` as an int or constant table, or None if unknown."""
    if expression is None or isinstance(expression, int):
        return expression
    op = expression[0]
    if op in ("iota", "array"):
        return expression
    if op == "state":
        return state.get(expression[1])
    if op in ("tuple", "carry"):
        return None
    values = [evaluate(e, state) for e in expression[1:]]
    if op == "at":
        table, index = values
        if table == ("iota",):
            return index
        if table is None or not isinstance(index, int):
            return None
        return table[1 + min(max(index, 0), len(table) - 2)]
    if op == "select" and isinstance(values[0], int):
        return values[1] if values[0] else values[2]
    if not all(isinstance(v, int) for v in values):
        return None
    if op.startswith("shift") and not 0 <= values[1] < 64:
        return None
    try:
        value = int(_OPS[op](*values))
    except (ArithmeticError, ValueError):
        return None
    return value if abs(value) < 1 << 64 else None  # would have wrapped around


class Follower:
    """Builds expressions for instructions of a module."""

    def __init__(self, module: Module):
        self._module = module
        self._depth = 0
        self._seen: dict[tuple[str, str, tuple[Expression, ...]], Expression] = {}

    def elements(
        self,
        computation: Computation,
        name: str,
        args: tuple[Expression, ...],
        size: int,
    ) -> tuple[Expression, ...]:
        """Returns one expression for each of the `size` elements of a tuple."""
        whole = self.expression(computation, name, args)
        return tuple(_element(whole, k) for k in range(size))

    def expression(
        self, computation: Computation, name: str, args: tuple[Expression, ...]
    ) -> Expression:
        key = (computation.name, name, args)
        if key not in self._seen:
            self._seen[key] = None  # a cycle is unknown, and so is a very long chain
            self._depth += 1
            if self._depth < _MAX_DEPTH:
                self._seen[key] = self._build(computation, name, args)
            self._depth -= 1
        return self._seen[key]

    def _build(
        self, computation: Computation, name: str, args: tuple[Expression, ...]
    ) -> Expression:
        found = computation.by_name.get(name)
        if found is None or not _may_count(found.shape):
            return None
        op = found.opcode
        if op == "parameter":
            number = int(found.literal)
            return args[number] if number < len(args) else None
        if op == "constant":
            return _literal(found)
        if op == "iota" and len(found.shape.dims) == 1:
            return ("iota",)
        if not found.operands and op not in ("fusion", "call"):
            return None

        def follow(index: int) -> Expression:
            return self.expression(computation, found.operands[index], args)

        if op in _SAME:
            return follow(0)
        if op == "get-tuple-element":
            return _element(follow(0), int(found.require("index")))
        if op == "tuple":
            return ("tuple", *(follow(k) for k in range(len(found.operands))))
        if op in ("fusion", "call"):
            target = found.called("calls") or found.called("to_apply")
            called = self._module.computation(target, found)
            inner = tuple(follow(k) for k in range(len(found.operands)))
            return self.expression(called, called.root.name, inner)
        if op == "dynamic-slice" and found.shape.size == 1 and len(found.operands) == 2:
            table, index = follow(0), follow(1)
            return None if table is None or index is None else ("at", table, index)
        if op == "compare":
            op = found.require("direction")
        if op in _OPS and found.shape.size == 1:
            parts = tuple(follow(k) for k in range(len(found.operands)))
            if op != "select" and any(p is None for p in parts):
                return None
            return (op, *parts) if _is_small(parts) else None
        return None


def _is_small(parts: tuple[Expression, ...]) -> bool:
    """Whether an expression of these parts can be evaluated again and again."""
    waiting = [part for part in parts if isinstance(part, tuple)]
    for _ in range(_MAX_NODES):
        if not waiting:
            return True
        waiting += (part for part in waiting.pop() if isinstance(part, tuple))
    return False


def _may_count(shape: Shape) -> bool:
    """Whether a value can be part of a loop counter: integers, few of them."""
    if shape.dtype == "tuple":
        return True
    return shape.dtype[0] in "sup" and (shape.size <= 1 or len(shape.dims) == 1)


def _element(whole: Expression, index: int) -> Expression:
    if not isinstance(whole, tuple):
        return whole if index == 0 else None
    if whole[0] == "tuple":
        return whole[1 + index] if index + 1 < len(whole) else None
    if whole[0] == "carry":
        return ("state", index)
    return whole if index == 0 else None


def _literal(constant: Instruction) -> Expression:
    text = constant.literal.strip()
    if constant.shape.size == 1:
        text = text.strip("{} ")
    if text in ("true", "false"):
        return int(text == "true")
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(r"\{[\s\d,\-]+\}", text) and len(constant.shape.dims) == 1:
        return ("array", *(int(n) for n in re.findall(r"-?\d+", text)))
    return None
