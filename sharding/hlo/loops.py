"""How often a `while` runs, also where the text does not say.

CPU and GPU write `known_trip_count`; TPU does not. So the scalars that a loop
carries are followed symbolically: their start, what the body makes of them, and
the condition; then the loop is run on those integers alone. Steps other than 1,
bounds carried in from outside, and an inner loop whose bound depends on the
outer counter all come out of that. What cannot be followed is data dependent:
None.

An expression is an int, `("state", k)` for element k of the innermost loop's
carry, `(opcode, *expressions)`, `("tuple", *expressions)`, `("iota",)` or
`("array", *ints)` for a 1-D table of indices, or None: unknown.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from sharding.hlo.reader import Computation, Instruction, Module
from sharding.hlo.shapes import Shape

Expression = Any
State = dict[int, Expression]  # carried element -> int or constant expression

_MAX_STEPS = 8192  # iterations run one by one; longer loops need an affine counter
_MAX_DEPTH = 150  # instructions from a counter back to its constant
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """One `while` of the program, as executed in one call.

    Attributes:
      name: of the instruction.
      trip_count: iterations each time it is entered (the mean, where an inner
        loop's bound follows the outer counter); None: it depends on data, and one
        iteration is counted for each time it is entered.
      executions: iterations that are counted in one call, all enclosing loops
        multiplied.
      enclosing: label of the loops around it, "" at the top.
      op_name: JAX's name of the loop, or "".
      source: "file.py:123", or "".
    """

    name: str
    trip_count: float | None
    executions: int
    enclosing: str
    op_name: str = ""
    source: str = ""

    def holds(self, label: str) -> bool:
        """Whether `label`, of a cost or collective, is of this loop or one inside."""
        return label == self.label or label.startswith(f"{self.label} > ")

    @property
    def label(self) -> str:
        """For example "while.5 x80", after the loops around it."""
        times = "per iteration" if self.trip_count is None else f"x{self.trip_count:g}"
        own = f"{self.name} {times}"
        return f"{self.enclosing} > {own}" if self.enclosing else own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """What is known where a computation runs.

    Attributes:
      args: an expression for each parameter of the computation.
      states: the innermost loop's carry, once for each execution, as far as
        known; a single one stands for all where they are too many or unknown.
      count: executions of the computation in one call.
      per_iteration: `count` is for one iteration of a loop around it, whose length
        depends on data.
    """

    args: tuple[Expression, ...] = ()
    states: tuple[State, ...] = ({},)
    count: int = 1
    per_iteration: bool = False


def enter_loop(
    module: Module,
    computation: Computation,
    loop: Instruction,
    scope: Scope,
    told: int | None = None,
) -> tuple[float | None, Scope, Scope]:
    """Returns the trip count of `loop` and the scopes of its body and condition.

    Args:
      module: the program.
      computation: where `loop` stands.
      loop: a `while` instruction.
      scope: of `computation`.
      told: the trip count if neither the text nor following the loop gives one.

    Raises:
      ValueError: a computation it calls is not in the text.
    """
    body = module.computation(loop.called("body"), loop)
    condition = module.computation(loop.called("condition"), loop)
    size = len(loop.shape.elements) or 1
    carry = ("carry", size)
    follow = _Follower(module)
    start = follow.elements(computation, loop.operands[0], scope.args, size)
    step = follow.elements(body, body.root.name, (carry,), size)
    test = follow.expression(condition, condition.root.name, (carry,))
    runs: dict[tuple[Expression, ...], tuple[State, ...] | int | None] = {}
    firsts = [tuple(evaluate(e, outer) for e in start) for outer in scope.states]
    for first in firsts:
        if first not in runs:
            runs[first] = _run(first, step, test)
    lengths = [_length(runs[first]) for first in firsts]
    known = _KNOWN.search(loop.rest)
    trips: float | None = None
    if None not in lengths:
        trips = sum(n for n in lengths if n is not None) / len(firsts)
    if known and trips != int(known[1]):
        trips = int(known[1])
        runs = dict.fromkeys(runs)
    if trips is None:
        trips = told
    states: tuple[State, ...] = ()
    if trips is not None and trips * len(firsts) <= _MAX_STEPS:
        found = (runs[first] for first in firsts)
        states = tuple(s for run in found if isinstance(run, tuple) for s in run)
    if not states:  # what does not change is all there is to know
        fixed = [k for k in range(size) if step[k] == ("state", k)]
        states = ({k: firsts[0][k] for k in fixed if firsts[0][k] is not None},)
    count = scope.count if trips is None else round(trips * scope.count)
    tests = scope.count if trips is None else count + scope.count
    inside = Scope(
        args=(carry,),
        states=states,
        count=count,
        per_iteration=scope.per_iteration or trips is None,
    )
    return trips, inside, dataclasses.replace(inside, count=tests)


def _length(run: tuple[State, ...] | int | None) -> int | None:
    return len(run) if isinstance(run, tuple) else run


def call_args(
    module: Module, computation: Computation, operands: Sequence[str], scope: Scope
) -> tuple[Expression, ...]:
    """Returns expressions for `operands`, to be the scope of a called computation."""
    follow = _Follower(module)
    return tuple(follow.expression(computation, name, scope.args) for name in operands)


def enter_branches(
    module: Module,
    computation: Computation,
    conditional: Instruction,
    scope: Scope,
    number: int,
) -> tuple[Scope, ...] | None:
    """Returns the scope of each branch, or None where data decides between them.

    XLA puts what only the first or last iteration of a loop does into a conditional
    on its counter.

    Args:
      module: the program.
      computation: where `conditional` stands.
      conditional: the instruction.
      scope: of `computation`.
      number: of branches; the first of two is taken when a predicate is true.
    """
    follow = _Follower(module)
    chooser = conditional.operands[0]
    choice = follow.expression(computation, chooser, scope.args)
    taken: list[list[State]] = [[] for _ in range(number)]
    is_predicate = computation.by_name[chooser].shape.dtype == "pred"
    for state in scope.states:
        value = evaluate(choice, state)
        if not isinstance(value, int):
            return None
        index = 1 - bool(value) if is_predicate else value
        taken[index if 0 <= index < number else -1].append(state)
    return tuple(
        dataclasses.replace(
            scope,
            args=call_args(
                module, computation, conditional.operands[1 + k : 2 + k], scope
            ),
            states=tuple(states),
            count=round(scope.count * len(states) / len(scope.states)),
        )
        for k, states in enumerate(taken)
    )


def _run(
    first: tuple[Expression, ...],
    step: tuple[Expression, ...],
    test: Expression,
) -> tuple[State, ...] | int | None:
    """Returns the carry before each iteration; or their number; or None."""
    state = {k: e for k, e in enumerate(first) if e is not None}
    if evaluate(test, state) is None:
        return None
    closed = _affine(state, step, test)
    if closed is not None and closed > _MAX_STEPS:
        return closed
    moving = [k for k in state if step[k] != ("state", k)]
    states: list[State] = []
    while True:
        again = evaluate(test, state)
        if again is None:
            return None
        if not again:
            return tuple(states)
        if len(states) >= _MAX_STEPS:
            return None
        states.append(state)
        state = dict(state)
        for k in moving:
            value = evaluate(step[k], states[-1])
            if value is None:
                state.pop(k, None)
            else:
                state[k] = value


def _affine(state: State, step: tuple[Expression, ...], test: Expression) -> int | None:
    """Returns the trip count of `for (i = a; i < b; i += c)`, else None."""
    if not (isinstance(test, tuple) and test[0] in ("LT", "LE", "GT", "GE", "NE")):
        return None
    counter, bound = test[1], evaluate(test[2], state)
    if not (isinstance(counter, tuple) and counter[0] == "state"):
        return None
    start, move = state.get(counter[1]), step[counter[1]]
    if not (isinstance(move, tuple) and move[0] in ("add", "subtract")):
        return None
    by = next((m for m in move[1:] if isinstance(m, int)), 0)
    by = -by if move[0] == "subtract" else by
    if counter not in move or (move[0] == "subtract" and move[1] != counter):
        return None
    if not (by and isinstance(start, int) and isinstance(bound, int)):
        return None
    distance = (bound - start) * (1 if by > 0 else -1)
    if test[0] == "NE":
        return distance // abs(by) if distance >= 0 == distance % by else None
    if (test[0] in ("LT", "LE")) != (by > 0):
        return None
    return max(0, -(-(distance + (test[0] in ("LE", "GE"))) // abs(by)))


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


class _Follower:
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
            return (op, *parts)
        return None


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
