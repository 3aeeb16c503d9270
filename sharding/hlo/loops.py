"""How often a `while` runs, also where the text does not say.

CPU and GPU write `known_trip_count`; TPU does not. So the scalars that a loop
carries are followed symbolically: their start, what the body makes of them, and
the condition; then the loop is run on those integers alone. Steps other than 1,
bounds carried in from outside, and an inner loop whose bound depends on the
outer counter all come out of that. What cannot be followed is data dependent:
None.
"""

import dataclasses
import re
from collections.abc import Sequence

from sharding.hlo.reader import Computation, Instruction, Module
from sharding.hlo.scalars import Expression, Follower, State, evaluate

_MAX_STEPS = 8192  # iterations run one by one; longer loops need an affine counter
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


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
    follow = Follower(module)
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
    follow = Follower(module)
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
    follow = Follower(module)
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
