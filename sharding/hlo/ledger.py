"""HLO text -> Ledger: what one device computes, moves and sends in one call.

    ledger = read_ledger(compiled.as_text(), {"data": 1, "stage": 2, "tensor": 4})
    ledger.flops, ledger.hbm_bytes, ledger.by_axis()

Every loop is multiplied by its trip count. A conditional on a loop's counter takes
the branches it takes, one on data counts as its costliest branch; a loop whose length
depends on data counts as one iteration: its rows are marked `per_iteration`.
`warnings` says where that is so.
Anything the reader does not understand is a ValueError that ends with the
instruction's text.
"""

import dataclasses
from collections.abc import Mapping

from sharding.hlo import custom_calls
from sharding.hlo.aliases import branches
from sharding.hlo.collectives import CollectiveFinder
from sharding.hlo.flops import FlopCounter
from sharding.hlo.groups import AxisNamer
from sharding.hlo.loops import Loop as Loop
from sharding.hlo.loops import Scope, call_args, enter_branches, enter_loop
from sharding.hlo.opcodes import FREE, TRANSFERS, base_opcode
from sharding.hlo.pairs import started_by
from sharding.hlo.reader import Computation, Instruction, Module, read_module
from sharding.hlo.records import Block, Steps, Wait
from sharding.hlo.records import Collective as Collective
from sharding.hlo.records import Cost as Cost
from sharding.hlo.records import Ledger as Ledger
from sharding.hlo.records import Step as Step
from sharding.hlo.source import read_sources
from sharding.hlo.steps import StepMaker, sent
from sharding.hlo.tally import Tally, merge
from sharding.hlo.traffic import TrafficCounter

# Instructions reached by calls before a text is given up, beside ten times its own.
MOST_VISITS = 100_000
_CALLERS = ("async", "call", "custom-call", "fusion")  # opcodes with calls=


def read_ledger(
    text: str | Module,
    axes: Mapping[str, int] | None = None,
    *,
    kernels: Mapping[str, int] | None = None,
    trip_counts: Mapping[str, int] | None = None,
) -> Ledger:
    """Returns the ledger of optimised HLO text.

    Args:
      text: what `compiled.as_text()` returns, for CPU, GPU or TPU; or the module
        that was read from it.
      axes: sizes of the mesh axes by name, in mesh order; device ids in the text
        are positions in `mesh.devices.flat`. None: collectives show device ids.
      kernels: FLOPs of one execution of hand-written kernels that carry no cost
        estimate, by custom call target or by the last part of their op_name.
      trip_counts: of loops whose length depends on data, by `Loop.name`; those not
        named are counted for one iteration, and a name of no loop is a warning.

    Raises:
      ValueError: text that cannot be read, an operation whose cost is not known,
        or `axes` that do not multiply to the program's devices.
    """
    module = text if isinstance(text, Module) else read_module(text)
    namer = AxisNamer(axes)
    if axes and namer.num_devices != module.num_devices > 1:
        raise ValueError(
            f"axes {dict(axes)} are {namer.num_devices} devices, the program runs on"
            f" {module.num_devices}; pass the mesh it was compiled for."
        )
    try:
        walker = _Walker(module, namer, kernels or {}, trip_counts or {})
        walker.walk(module.entry, Scope(), "")
    except RecursionError:
        raise ValueError(
            "computations call each other in a circle, or hundreds deep; compilers do"
            " neither. Pass the text as it was printed."
        ) from None
    return walker.ledger()


class _Walker:
    """Runs through a program as a device would, once for each loop body."""

    def __init__(
        self,
        module: Module,
        namer: AxisNamer,
        kernels: Mapping[str, int],
        trip_counts: Mapping[str, int],
    ):
        self._module = module
        self._trip_counts = trip_counts
        self._flops = FlopCounter(module, kernels)
        self._traffic = TrafficCounter(
            module,
            # TPU numbers its on-chip memories and the host; on GPU 1 is device memory
            # set apart for collectives, and 5 the host.
            (lambda s: s == 0) if module.is_tpu else (lambda s: s != 5),
        )
        self._collectives = CollectiveFinder(module, namer)
        self._sources = read_sources(module)
        self._maker = StepMaker(module, self._flops)
        self._started = ""  # what the walk is inside of, if nothing waits for it yet
        self._tally = Tally()
        self._visited = 0
        size = sum(len(c.instructions) for c in module.computations.values())
        self._most_visits = MOST_VISITS + 10 * size

    def ledger(self) -> Ledger:
        loops = dict.fromkeys(loop.name for loop in self._tally.loops)
        if idle := [name for name in self._trip_counts if name not in loops]:
            self._tally.warnings.append(
                f"no loop {', '.join(idle)}, whose trip count was told; there are:"
                f" {', '.join(loops) or 'none'}."
            )
        return Ledger(
            costs=tuple(self._tally.costs),
            collectives=merge(self._tally.found),
            loops=tuple(self._tally.loops),
            warnings=tuple(dict.fromkeys(self._tally.warnings)),
            steps=tuple(self._tally.steps),
            devices=self._module.num_devices,
            arguments=len(self._module.entry.parameters),
        )

    def _steps(self, computation: Computation, scope: Scope, loop: str) -> Steps:
        """Adds runs of `computation`; returns its steps instead of adding them."""
        outer, self._tally.steps = self._tally.steps, []
        self.walk(computation, scope, loop)
        inner, self._tally.steps = self._tally.steps, outer
        return tuple(inner)

    def walk(self, computation: Computation, scope: Scope, loop: str) -> None:
        """Adds `scope.count` runs of `computation`."""
        if not scope.count:
            return
        self._visited += len(computation.instructions)
        if self._visited > self._most_visits:
            raise ValueError(
                f"reached {self._visited:,} instructions at {computation.name} through"
                " calls, and there are more. Each call is read at its place; calls that"
                " fan out without end are no program of XLA's. Check the text."
            )
        for instruction in computation.instructions:
            try:
                self._step(instruction, computation, scope, loop)
            except (ArithmeticError, LookupError, TypeError) as error:
                raise ValueError(
                    f"the parts do not fit together ({error!r}): {instruction}"
                ) from error

    def _step(
        self,
        instruction: Instruction,
        computation: Computation,
        scope: Scope,
        loop: str,
    ) -> None:
        opcode = base_opcode(instruction)
        if ", calls=" in instruction.rest:
            _check_calls(instruction)
        if opcode == "while":
            self._while(instruction, computation, scope, loop)
        elif opcode == "conditional":
            self._conditional(instruction, computation, scope, loop)
        elif opcode in ("call", "async-start"):
            name = instruction.called("to_apply") or instruction.called("calls")
            called = self._module.called(name, instruction, computation)
            outer = self._started
            if instruction.opcode.endswith("-start"):
                self._started = instruction.name
            self._enter(called, instruction.operands, computation, scope, loop)
            self._started = outer
        elif opcode == "custom-call" and (name := custom_calls.offloaded(instruction)):
            self.walk(self._module.computation(name, instruction), scope, loop)
        elif opcode in TRANSFERS:
            self._transfer(instruction)
        elif opcode in ("", "async-done"):
            if opcode == "":
                _check_done(instruction, computation)
            if not instruction.opcode.endswith("-update"):
                name = started_by(instruction, computation)
                self._tally.steps.append(Wait(name=name))
        elif opcode not in FREE:
            self._run(instruction, computation, scope, loop)

    def _run(
        self,
        instruction: Instruction,
        computation: Computation,
        scope: Scope,
        loop: str,
    ) -> None:
        try:
            self._count(instruction, computation, scope, loop)
        except ValueError as error:
            if str(instruction) in str(error):
                raise
            raise ValueError(f"{error}: {instruction}") from error

    def _count(
        self,
        instruction: Instruction,
        computation: Computation,
        scope: Scope,
        loop: str,
    ) -> None:
        sends: list[Collective] = []
        for found in self._collectives.of(instruction, computation):
            if found.group_size > 1:
                op_name, source = self._where(found.instruction, instruction)
                source = source or self._sources.near(
                    found.instruction, instruction, computation, self._module
                )
                self._tally.found.append(
                    (found, scope.count, op_name, source, loop, scope.per_iteration)
                )
                sends.append(sent(found, op_name, source, loop))
        flops = self._flops.of(instruction, computation)
        hbm_bytes = self._traffic.of(instruction, computation)
        cost = None
        if flops.total or hbm_bytes:
            op_name, source = self._sources.of(instruction)
            cost = Cost(
                name=instruction.name,
                opcode=instruction.opcode,
                computation=computation.name,
                count=scope.count,
                flops=flops.total,
                matmul_flops=flops.matmul,
                hbm_bytes=hbm_bytes,
                op_name=op_name,
                source=source,
                loop=loop,
                per_iteration=scope.per_iteration,
            )
            self._tally.costs.append(cost)
        self._tally.steps += self._maker.of(
            instruction, computation, cost, tuple(sends), self._started
        )

    def _where(self, inner: Instruction, outer: Instruction) -> tuple[str, str]:
        """Returns where a collective is from, or else the fusion that it is in."""
        op_name, source = self._sources.of(inner)
        if inner is not outer and not (op_name and source):
            outer_name, outer_source = self._sources.of(outer)
            return op_name or outer_name, source or outer_source
        return op_name, source

    def _enter(
        self,
        called: Computation,
        operands: tuple[str, ...],
        computation: Computation,
        scope: Scope,
        loop: str,
    ) -> None:
        args = call_args(self._module, computation, operands, scope)
        self.walk(called, dataclasses.replace(scope, args=args), loop)

    def _while(
        self,
        instruction: Instruction,
        computation: Computation,
        scope: Scope,
        loop: str,
    ) -> None:
        trips, body, condition = enter_loop(
            self._module,
            computation,
            instruction,
            scope,
            self._trip_counts.get(instruction.name),
        )
        op_name, source = self._sources.of(instruction)
        record = Loop(
            name=instruction.name,
            trip_count=trips,
            executions=body.count,
            enclosing=loop,
            op_name=op_name,
            source=source,
        )
        self._tally.loops.append(record)
        if trips is None:
            self._tally.warnings.append(
                f"{instruction.name}{f' ({source})' * bool(source)} runs a"
                " data-dependent number of times; one iteration of it is counted."
            )
        steps: Steps = ()
        for key, inner in (("body", body), ("condition", condition)):
            name = instruction.called(key)
            called = self._module.called(name, instruction, computation)
            found = self._steps(called, inner, record.label)
            # Devices that know how often a loop runs do not look at its condition.
            steps += found if key == "body" or trips is None else ()
        times = 1.0 if trips is None else trips
        self._tally.steps.append(Block(label=record.label, times=times, steps=steps))

    def _conditional(
        self,
        instruction: Instruction,
        computation: Computation,
        scope: Scope,
        loop: str,
    ) -> None:
        called = [
            self._module.computation(name, instruction)
            for name in branches(instruction)
        ]
        if not called:
            raise ValueError(f"conditional without branches: {instruction}")
        scopes = enter_branches(
            self._module, computation, instruction, scope, len(called)
        )
        if scopes:
            for branch, inner in zip(called, scopes, strict=True):
                steps = self._steps(branch, inner, loop)
                if steps:
                    share = inner.count / scope.count
                    block = Block(label="", times=share, steps=steps)
                    self._tally.steps.append(block)
            return
        outer, tallies = self._tally, []
        for index, branch in enumerate(called):
            self._tally = Tally()
            operand = instruction.operands[1 + index : 2 + index]
            self._enter(branch, operand, computation, scope, loop)
            tallies.append(self._tally)
        self._tally = outer
        costliest = max(tallies, key=lambda tally: tally.weight)
        self._tally.add(costliest)
        left_out = set().union(*(tally.sends for tally in tallies)) - costliest.sends
        if left_out or len({tally.weight for tally in tallies}) > 1:
            sends = ", ".join(f"{kind} over {axis}" for axis, kind in sorted(left_out))
            self._tally.warnings.append(
                f"{instruction.name} is a conditional; its costliest branch is counted"
                + (f", which leaves out {sends}." if sends else ".")
            )

    def _transfer(self, instruction: Instruction) -> None:
        if instruction.attr("is_host_transfer") != "true":
            raise ValueError(
                f"point-to-point send and recv are not costed yet: {instruction}"
            )


def _check_calls(instruction: Instruction) -> None:
    """Raises ValueError if an instruction that calls nothing names a computation."""
    if not instruction.opcode.startswith(_CALLERS) and instruction.attr("calls"):
        raise ValueError(f"only fusions and calls have calls=: {instruction}")


def _check_done(instruction: Instruction, computation: Computation) -> None:
    """Raises ValueError if what this instruction ends was never seen to start."""
    stem = instruction.opcode.rpartition("-")[0]
    (operand, *_) = computation.operands(instruction)
    # A loop may end what the iteration before started.
    carried = ("get-tuple-element", "bitcast", "copy", "opt-barrier")
    if operand.opcode not in (f"{stem}-start", f"{stem}-update", stem, *carried):
        raise ValueError(
            f"it ends a {stem} that %{operand.name} = {operand.opcode} does not start:"
            f" {instruction}"
        )
