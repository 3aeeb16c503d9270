"""What a person should look at in a compiled program, with the numbers that say so.

    kind                 finding                                  from what size on
    weight-gathered      an all-gather of an argument             1 % of the arguments
    not-aliased          donated, but no output takes its place   1 %
    argument-copied      an argument, or slices of it, copied     1 % and 1 MiB
    cache-copied         likewise a donated one                   1 % and 1 MiB
    widened-copy         an argument kept in a wider float type   1 % and 1 MiB
    constant-captured    a constant inside the program            1 MiB
    could-be-scattered   an all-reduce of which each device       1 MiB a call
                         reads its own slice only
    gathered-again       an all-gather of what was just           1 MiB a call
                         reduce-scattered
    operand-repeated     one array several times in a collective  1 MiB a call
    not-overlapped       nothing is computed meanwhile            1 MiB each
    unknown-loop         a loop whose length depends on data      any

Bytes are those of one call, equal findings on one line of source added up. What the
program must do is no finding; whether a finding is intended, a person decides.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping

from sharding.hlo.collectives import CollectiveFinder, Found
from sharding.hlo.groups import AxisNamer
from sharding.hlo.memory import Memory
from sharding.hlo.opcodes import COLLECTIVES, base_opcode
from sharding.hlo.origins import MOVES, Origin, Origins, Place, trace
from sharding.hlo.reader import Instruction, Module
from sharding.hlo.records import Ledger
from sharding.hlo.render import figure_bytes
from sharding.hlo.shapes import ELEMENT_BITS, Shape
from sharding.hlo.source import Sources, read_sources

SHARE = 0.01  # of the arguments' bytes
LARGE_BYTES = 1 << 20

_INDEX = re.compile(r"\[\d+\]")
_FLOATS = ("f8", "bf16", "f16", "f32", "f64")
_CHANGES = {
    "weight-gathered": "In training this may be fully sharded data parallelism. If not,"
    " shard the argument the way it is used, or constrain the activation beside it so"
    " that the partitioner moves that instead.",
    "argument-copied": "Hand it in with the layout and dtype it is used in; keep each"
    " layer's weights an array of its own rather than slices of a stack that a scan"
    " copies; donate what the program replaces.",
    "cache-copied": "Keep it one array a layer and update it in place; if a scan slices"
    " it, carry it whole or unroll the loop.",
    "not-aliased": "An output takes its place only with the same shape, dtype and"
    " sharding. Return it so, set out_shardings, or do not donate it.",
    "widened-copy": "Multiply in the narrow type and accumulate wide"
    " (preferred_element_type), convert after slicing, or apply scales to what comes"
    " out of the product. Some CPUs have no narrow products; then this is the"
    " compiler's.",
    "constant-captured": "Pass the array as an argument instead of closing over it.",
    "could-be-scattered": "Constrain the result to be sharded where it is made"
    " (with_sharding_constraint), or use lax.psum_scatter.",
    "gathered-again": "Together they are an all-reduce. Keep what lies between them"
    " sharded, or drop the constraint that scatters.",
    "operand-repeated": "Several uses asked for the same array before XLA combined"
    " them. Constrain it once and use that value everywhere.",
    "not-overlapped": "Make the next computation independent of it (split the batch,"
    " or overlap by hand), or send less. Small steps cannot hide it.",
    "unknown-loop": "Figures are of one iteration. Give its length:"
    " analyze(..., trip_counts={NAME: N}).",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """One finding that a person can act on.

    Attributes:
      kind: a short fixed name, such as "weight-gathered".
      what: one sentence, the finding.
      evidence: the numbers and instructions that show it.
      change: what to do about it.
      num_bytes: bytes of one call that the finding is about; findings are ordered by
        them, most first.
      count: executions in one call.
      op_name: JAX's name of the operation, or "".
      source: "file.py:123", or "".
    """

    kind: str
    what: str
    evidence: str
    change: str
    num_bytes: int
    count: int
    op_name: str
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Finding:
    """One instruction that matters, before equal ones are added up."""

    kind: str
    what: str
    place: Place
    num_bytes: int
    count: int


def find_advice(
    module: Module, ledger: Ledger, memory: Memory, axes: Mapping[str, int] | None
) -> tuple[Advice, ...]:
    """Returns what a person should look at in `module`, most bytes first.

    Args:
      module: the program.
      ledger: of the program.
      memory: of the program.
      axes: sizes of the mesh axes by name, or None.
    """
    sources = read_sources(module)
    share = SHARE * memory.argument_bytes
    least = collections.defaultdict(lambda: float(LARGE_BYTES))
    least["weight-gathered"] = share
    for kind in ("argument-copied", "cache-copied", "widened-copy"):
        least[kind] = max(share, LARGE_BYTES)
    advice = _merge(_Search(module, ledger, memory, axes).findings(), sources, least)
    for argument in memory.arguments:
        lost = argument.num_bytes - argument.aliased_bytes
        if argument.is_donated and lost > share:
            name = f"{argument.name} {argument.shape}"
            evidence = f"{figure_bytes(lost)} of {figure_bytes(argument.num_bytes)}"
            evidence += " are in no output's place"
            what = f"{name} is donated in vain"
            advice.append(_advice("not-aliased", what, evidence, lost, 1))
    for loop in ledger.loops:
        if loop.trip_count is None:
            what = f"{loop.name} runs a number of times that depends on data"
            where = (loop.executions, loop.op_name, loop.source)
            advice.append(_advice("unknown-loop", what, loop.label, 0, *where))
    return tuple(sorted(advice, key=lambda a: -a.num_bytes))


def _advice(
    kind: str,
    what: str,
    evidence: str,
    num_bytes: int,
    count: int,
    op_name: str = "",
    source: str = "",
) -> Advice:
    return Advice(
        kind=kind,
        what=what,
        evidence=evidence,
        change=_CHANGES[kind],
        num_bytes=num_bytes,
        count=count,
        op_name=op_name,
        source=source,
    )


def _merge(
    findings: Iterator[_Finding], sources: Sources, least: Mapping[str, float]
) -> list[Advice]:
    """Returns one advice for findings of one kind, sentence and line."""
    rows: dict[tuple[str, str, str], list[_Finding]] = {}
    for finding in findings:
        instruction = finding.place.instruction
        _, source = sources.of(instruction)
        source = source or sources.of_user(instruction, finding.place.computation)
        rows.setdefault((finding.kind, finding.what, source), []).append(finding)
    advice = []
    for (kind, what, source), found in rows.items():
        total = sum(f.num_bytes for f in found)
        if total < least[kind] or not total:
            continue
        largest = max(found, key=lambda f: f.num_bytes)
        times = sum(f.count for f in found)
        evidence = f"{figure_bytes(total)} in {times} run{'s' * (times > 1)} of "
        if len(found) > 1:
            evidence += f"{len(found)} instructions, such as "
        evidence += f"%{largest.place.instruction.name}"
        op_name, _ = sources.of(largest.place.instruction)
        advice.append(_advice(kind, what, evidence, total, times, op_name, source))
    return advice


class _Search:
    """Looks at every instruction that runs."""

    def __init__(
        self,
        module: Module,
        ledger: Ledger,
        memory: Memory,
        axes: Mapping[str, int] | None,
    ):
        executions: dict[str, int] = collections.defaultdict(int)
        for loop in ledger.loops:
            executions[loop.name] += loop.executions
        self._module = module
        self._memory = memory
        self._origins = Origins(module, executions)
        self._finder = CollectiveFinder(module, AxisNamer(axes))
        self._working = {
            (cost.computation, cost.name)
            for cost in ledger.costs
            if cost.hbm_bytes or cost.flops
        }
        # CPUs have no asynchronous collectives, so there nothing can be overlapped.
        self._is_async = module.is_tpu or any(
            i.opcode.endswith("-start") and base_opcode(i) in COLLECTIVES
            for computation in module.computations.values()
            for i in computation.instructions
        )

    def findings(self) -> Iterator[_Finding]:
        for place in self._origins.places():
            opcode = place.instruction.opcode
            if base_opcode(place.instruction) in COLLECTIVES:
                yield from self._collective(place)
            elif opcode == "fusion":
                yield from self._fusion(place)
            elif opcode in MOVES and opcode != "bitcast":
                origin = place.operands[0][0] if place.operands[0] else None
                shape = place.computation.by_name[place.instruction.operands[0]].shape
                yield from self._copied(place, origin, place.instruction.shape, shape)
            elif opcode == "constant":
                size = place.instruction.shape.num_bytes
                if size >= LARGE_BYTES:
                    what = f"a constant of {figure_bytes(size)} is part of the program"
                    yield self._found("constant-captured", what, place, size)

    def _found(self, kind: str, what: str, place: Place, num_bytes: int) -> _Finding:
        return _Finding(
            kind=kind,
            what=what,
            place=place,
            num_bytes=num_bytes * place.count,
            count=place.count,
        )

    def _name(self, origin: Origin) -> str:
        """Returns an argument's name, layers of one stack alike."""
        number = int(origin[1]) if origin else 0
        return _INDEX.sub("[*]", self._memory.arguments[number].name)

    def _copied(
        self, place: Place, origin: Origin, made: Shape, read: Shape
    ) -> Iterator[_Finding]:
        """A move of an argument into main memory."""
        if origin is None or origin[0] != "argument":
            return
        is_hbm = made.space == 0 if self._module.is_tpu else made.space != 5
        if not is_hbm or made.dtype == "tuple":
            return
        name = self._name(origin)
        bits, bits_read = (ELEMENT_BITS.get(s.dtype, 0) for s in (made, read))
        if bits > bits_read and made.dtype.startswith(_FLOATS):
            what = f"{name} is kept as {made.dtype} beside its {read.dtype}"
            yield self._found("widened-copy", what, place, made.num_bytes)
        elif self._memory.arguments[int(origin[1])].is_donated:
            what = f"{name}, donated, is copied"
            yield self._found("cache-copied", what, place, made.num_bytes)
        else:
            done = "copied" if bits == bits_read else f"converted to {made.dtype}"
            what = f"{name} is {done}"
            yield self._found("argument-copied", what, place, made.num_bytes)

    def _fusion(self, place: Place) -> Iterator[_Finding]:
        fusion = place.instruction
        called = self._module.computation(fusion.called("calls"), fusion)
        for number, made in zip(
            self._origins.moved(called), fusion.shape.leaves, strict=False
        ):
            if number is not None and place.operands[number]:
                read = called.parameters[number].shape
                yield from self._copied(place, place.operands[number][0], made, read)
        inside = self._finder.inside(called.name)
        for found in self._finder.of(fusion, place.computation) if inside else ():
            where = next(w for i, w in inside if i is found.instruction)
            if found.kind == "all-gather":
                source = trace(where, where.operands(found.instruction)[0])
                if source.opcode == "parameter" and where is called:
                    leaves = place.operands[int(source.literal)]
                    yield from self._gathered(place, found, leaves[0])

    def _collective(self, place: Place) -> Iterator[_Finding]:
        instruction = place.instruction
        found = next(iter(self._finder.of(instruction, place.computation)))
        if found.group_size < 2:
            return
        if found.kind == "all-gather":
            origins = dict(zip(instruction.operands, place.operands, strict=True))
            total = found.payload_bytes
            shapes = {n: place.computation.by_name[n].shape for n in origins}
            whole = sum(shape.num_bytes for shape in shapes.values()) or 1
            for name, leaves in origins.items():
                share = dataclasses.replace(
                    found, payload_bytes=total * shapes[name].num_bytes // whole
                )
                yield from self._gathered(place, share, leaves[0] if leaves else None)
        elif found.kind == "all-reduce":
            yield from self._scatterable(place, found)
        repeats = len(instruction.operands) - len(set(instruction.operands))
        if repeats:
            seen = collections.Counter(instruction.operands)
            extra = sum(
                (times - 1) * place.computation.by_name[name].shape.num_bytes
                for name, times in seen.items()
            )
            what = f"{repeats} of {len(instruction.operands)} operands of one"
            what += f" {found.kind} over {found.axis} are listed again"
            yield self._found("operand-repeated", what, place, extra)
        yield from self._exposed(place, found)

    def _gathered(
        self, place: Place, found: Found, origin: Origin
    ) -> Iterator[_Finding]:
        if origin is None:
            return
        if origin[0] == "argument":
            what = f"{self._name(origin)} is gathered over {found.axis}"
            yield self._found("weight-gathered", what, place, found.payload_bytes)
        elif origin[0] == "reduce-scatter":
            what = f"what was reduce-scattered is at once gathered over {found.axis}"
            yield self._found("gathered-again", what, place, found.payload_bytes)

    def _scatterable(self, place: Place, found: Found) -> Iterator[_Finding]:
        """An all-reduce of which every reader takes a slice of 1 / group size."""
        whole = max((leaf.size for leaf in place.instruction.shape.leaves), default=0)
        names, sliced = [place.instruction.name], False
        seen: set[str] = set()
        while names:
            name = names.pop()
            if name == place.computation.root.name or name in seen:
                return
            seen.add(name)
            for user in place.computation.users.get(name, ()):
                if user.opcode.endswith("-done") or user.opcode in (
                    "bitcast", "get-tuple-element", "reshape", "convert",
                ):  # fmt: skip
                    names.append(user.name)
                elif self._takes_slice(user, name, whole // found.group_size):
                    sliced = True
                else:
                    return
        if sliced:
            what = f"each device reads 1/{found.group_size} of an all-reduce over"
            what += f" {found.axis}"
            yield self._found("could-be-scattered", what, place, found.payload_bytes)

    def _takes_slice(self, user: Instruction, name: str, size: int) -> bool:
        if user.opcode == "dynamic-slice":
            return user.operands[0] == name and user.shape.size <= size
        if user.opcode != "fusion" or user.operands.count(name) != 1:
            return False
        called = self._module.computation(user.called("calls"), user)
        inner = called.parameters[user.operands.index(name)].name
        readers = called.users.get(inner, ())
        return bool(readers) and all(self._takes_slice(r, inner, size) for r in readers)

    def _exposed(self, place: Place, found: Found) -> Iterator[_Finding]:
        """A large collective that nothing is computed beside."""
        if not self._is_async or found.payload_bytes < LARGE_BYTES:
            return
        instruction = place.instruction
        if instruction.opcode.endswith("-start"):
            lines = place.computation.instructions
            for at in range(place.line + 1, len(lines)):
                line = lines[at]
                if (place.computation.name, line.name) in self._working:
                    return
                if instruction.name in line.operands:
                    break
        what = f"nothing is computed beside this {found.kind} over {found.axis}"
        yield self._found("not-overlapped", what, place, found.payload_bytes)
