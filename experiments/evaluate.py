"""One point, answered: compiled, read, priced, and set beside its limit.

`plan` multiplies a question out into points and finds everything wrong with it
first; `evaluate` answers one of them. Neither runs the model. Both start JAX, so a
sweep calls them in worker processes, and a notebook after `prepare_environment`.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.report import provenance, units
from experiments.report.record import (
    CollectiveRow,
    MemoryRow,
    PhaseRecord,
    Point,
    Record,
    TimeParts,
    digest,
    metrics,
)
from jaxllm import config as config_lib
from sharding import choices, hlo, limits
from sharding.estimate import Estimate, estimate
from sharding.partition import Partition, Workload, check, parse_partitions
from sharding.program import CompiledProgram, Memory, Phase, Program
from sharding.target import Target, parse_target

# What determines an answer besides the question; hashed into the context of a point.
_CODE = (
    "jaxllm", "sharding", "experiments/evaluate.py", "experiments/report/record.py",
)  # fmt: skip
PHASES: tuple[Phase, Phase] = ("prefill", "decode")
_LIMITS = {"prefill": "ttft_limit_s", "decode": "tpot_limit_s"}
# How XLA:TPU says that a program is too large, since libtpu 0.0.3x.
_TOO_LARGE = re.compile(
    r"\(([\d.]+)([KMGT]?)\) exceeds available \w+ \(([\d.]+)([KMGT]?)\)"
)
_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """What a sweep is asked, as on the command line; every list is multiplied out.

    With `fewer`, a partition may use the first devices of its target alone.
    """

    models: tuple[str, ...]
    targets: tuple[str, ...]
    chip: str | None = None
    partitions: tuple[str, ...] = ("all",)
    rules: tuple[str, ...] = ("megatron",)
    batch_sizes: tuple[int, ...]
    input_len: int
    output_len: int
    dtype: str = "bfloat16"
    weights: str | None = None
    kv: str | None = None
    layers: str = "auto"
    micro_batches: tuple[int | None, ...] = (None,)
    fewer: bool = False


def plan(ask: Ask) -> tuple[list[Point], list[str]]:
    """Returns the points of `ask` and everything wrong with it.

    Opens the targets, so it belongs into a worker process.
    """
    wrong: list[str] = []

    def tried(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, ModuleNotFoundError) as error:
            wrong.append(str(error))
            return None

    configs = {name: tried(config_lib.load, name) for name in ask.models}
    targets = {name: tried(parse_target, name, ask.chip) for name in ask.targets}
    known = [target for target in targets.values() if target]
    for target in {target.chip.name: target for target in known}.values():
        tried(target.chip.matmul_flops_per_s, ask.dtype)
    for rules in ask.rules:
        if tried(parse_partitions, ask.partitions, 1, rules) is None:
            break
    tried(_check_sizes, ask)
    if wrong:
        return [], list(dict.fromkeys(wrong))
    points = [
        Point(
            model=model,
            target=target.name,
            chip=target.chip.name,
            num_chips=used.num_chips,
            num_devices=used.num_devices,
            partition=partition.name,
            rules=rules,
            dtype=ask.dtype,
            weights=ask.weights,
            kv=ask.kv,
            layers=ask.layers,
            batch_size=batch_size,
            input_len=ask.input_len,
            output_len=ask.output_len,
            asked_micro_batches=micro_batches,
            context=_context(configs[model], target, ask.chip),
        )
        for model, target, batch_size, rules, micro_batches in itertools.product(
            ask.models, known, ask.batch_sizes, ask.rules, ask.micro_batches
        )
        for partition in parse_partitions(ask.partitions, target.num_devices, rules)
        for used in [target.first(partition.num_devices) if ask.fewer else target]
    ]
    sizes = {point.num_devices for point in points}
    uses = "at most every device" if ask.fewer else "every device"
    rule = f"A partition uses {uses} of its target once."
    for name in dict.fromkeys(point.partition for point in points):
        if (needed := Partition.parse(name).num_devices) not in sizes:
            have = ", ".join(f"{t.name} has {t.num_devices}" for t in known)
            wrong.append(
                f"partition {name} needs {needed} devices; {have}. {rule} Choose"
                " degrees whose product is that number, or another target."
            )
    return points, wrong


def _check_sizes(ask: Ask) -> None:
    if min(ask.batch_sizes, default=0) < 1:
        raise ValueError(
            f"batch_sizes={list(ask.batch_sizes)}: a batch has at least 1 sequence, and"
            " a sweep at least 1 batch size. Choose positive numbers."
        )


def _context(
    config: config_lib.ModelConfig, target: Target, priced_as: str | None
) -> dict[str, str]:
    """Returns what determines an answer besides the fields of a point."""
    return {
        **({"priced_as": priced_as} if priced_as else {}),
        "code": provenance.code_digest(*_CODE),
        "model": digest(repr(config)),
        "chip": digest(repr(target.chip)),
        "rates": target.chip.rates_from,
        **provenance.versions_for(target.platform),
        **provenance.compiler_flags(),
        **{name: str(value) for name, value in target.compiler_options.items()},
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseAnswer:
    """What became of one phase of a point.

    Attributes:
      phase: "prefill" or "decode".
      status, reason, origin: as in a record.
      needed_bytes, available_bytes: memory of one device, where that was looked at.
      micro_batches: into which prefill is cut; null where nothing was compiled.
      limit_s: the least time; null where nothing was priced.
      record: counts of the compiled program, or null.
      parts: where its time goes, or null.
    """

    phase: str
    status: str = "ok"
    reason: str | None = None
    origin: str = "compiled"
    needed_bytes: int | None = None
    available_bytes: int | None = None
    micro_batches: int | None = None
    limit_s: float | None = None
    record: PhaseRecord | None = None
    parts: TimeParts | None = None


class Compiler:
    """How a point becomes compiled programs; another one may keep or share them."""

    def target(self, point: Point) -> Target:
        """Returns what `point` is compiled for, with the chip that prices it."""
        return parse_target(point.target, point.context.get("priced_as"))

    def choose(self, program: Program, target: Target, layers: str) -> Program:
        """Returns `program` as it is written for `target`."""
        return choices.choose(program, target, layers=layers)

    def compile(self, program: Program, target: Target) -> CompiledProgram:
        return program.compile(target)

    def count(self, program: Program, target: Target) -> "Counted":
        """Returns what `program` does and holds when compiled for `target`.

        Raises:
          ValueError: it holds something that cannot be counted.
        """
        return count(program, self.compile(program, target))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
    """A compiled program as far as its price and its record go.

    Attributes are those of a `CompiledProgram`, with a ledger in place of its text.
    """

    ledger: hlo.Ledger
    memory: Memory
    xla_flops: float | None
    compile_s: float
    ticks: int
    busy_ticks: int


def count(program: Program, compiled: CompiledProgram) -> Counted:
    """Returns what a compiled program does and holds."""
    return Counted(
        ledger=hlo.read_ledger(compiled.text, program.partition.axes),
        memory=compiled.memory,
        xla_flops=compiled.xla_flops,
        compile_s=compiled.compile_s,
        ticks=compiled.ticks,
        busy_ticks=compiled.busy_ticks,
    )


COMPILER = Compiler()


def evaluate(point: Point, compiler: Compiler = COMPILER) -> Record:
    """Returns the record of `point`.

    Raises:
      ValueError: the compiled program holds something that cannot be counted.
    """
    answers: list[PhaseAnswer] = []
    for phase in PHASES:
        answers.append(evaluate_phase(point, phase, compiler))
        if answers[-1].parts is None:
            break
    return join(point, answers)


def asked(point: Point, **devices: Any) -> dict[Phase, Program]:
    """Returns both phases of `point`, not yet written for a target.

    Args:
      point: the question.
      **devices: what `sharding.partition.check` wants to know of them.

    Raises:
      ValueError: the combination cannot work.
    """
    config = config_lib.load(point.model)
    workload = Workload(
        batch_size=point.batch_size,
        input_len=point.input_len,
        output_len=point.output_len,
    )
    partition = Partition.parse(point.partition, point.rules)
    check(config, partition, workload, **devices)
    stored: dict[str, Any] = dict(weights=point.weights, kv=point.kv)
    return {
        phase: Program(
            phase=phase,
            config=config,
            partition=partition,
            workload=workload,
            dtype=point.dtype,
            **stored,
            micro_batches=point.asked_micro_batches,
        )
        for phase in PHASES
    }


def programs(
    point: Point, target: Target, compiler: Compiler = COMPILER
) -> dict[Phase, Program]:
    """Returns both phases of `point`, as best written for `target`.

    Raises:
      ValueError: the combination cannot work.
    """
    both = asked(point, num_devices=target.num_devices, target=target.name)
    return {
        phase: compiler.choose(program, target, point.layers)
        for phase, program in both.items()
    }


def evaluate_phase(
    point: Point, phase: Phase, compiler: Compiler = COMPILER
) -> PhaseAnswer:
    """Returns what becomes of `phase` of `point`, compiled if its arrays fit.

    Raises:
      ValueError: the compiled program holds something that cannot be counted.
    """
    target = compiler.target(point)
    answer = functools.partial(PhaseAnswer, phase=phase)
    try:
        written = programs(point, target, compiler)
    except ValueError as error:
        return answer(status="refused", reason=str(error))
    layout = written["decode"].layout
    available = int(target.chip.per_device().hbm_bytes)
    weights = layout.device_bytes(layout.named_params())
    kv = layout.device_bytes(layout.named_state().cache)
    if weights + kv > available:
        return answer(
            status="does not fit",
            reason=(
                f"Weights {units.bytes_(weights)} and KV cache {units.bytes_(kv)} alone"
                " are too much; nothing was compiled."
            ),
            origin="modelled",
            needed_bytes=weights + kv,
            available_bytes=available,
        )
    answer = functools.partial(
        answer, micro_batches=written["prefill"].prefill_micro_batches
    )
    program = written[phase]
    try:
        counted = compiler.count(program, target)
    except jax.errors.JaxRuntimeError as error:
        exceeded = too_large(str(error))
        if exceeded is None:
            raise
        reason = (
            f"The compiler refused {phase}: weights {units.bytes_(weights)}, KV cache"
            f" {units.bytes_(kv)}, the rest is temporary."
        )
        needed, available = exceeded
        return answer(
            status="does not fit",
            reason=reason,
            needed_bytes=needed,
            available_bytes=available,
        )
    record, parts, limit_s = price_counted(program, counted, target)
    needed = record.memory.peak_bytes
    listed = ", ".join(f"{n} {units.bytes_(b)}" for n, b in record.memory.items())
    return answer(
        status="ok" if needed <= available else "does not fit",
        reason=None if needed <= available else f"{listed}.",
        needed_bytes=needed,
        available_bytes=available,
        limit_s=limit_s,
        record=record,
        parts=parts,
    )


def join(point: Point, answers: Sequence[PhaseAnswer]) -> Record:
    """Returns the record of `point` from those of its phases that were looked at.

    Args:
      point: what was asked.
      answers: of prefill and of decode; fewer only if one has no parts or no room.
    """
    record = functools.partial(Record.of, point, provenance.collect())
    last = answers[-1]
    fields: dict[str, Any] = {"micro_batches": last.micro_batches}
    for answer in answers:
        if answer.record is not None:
            fields[answer.phase] = answer.record
            fields[_LIMITS[answer.phase]] = answer.limit_s
    # Without parts nothing is known of the rest; else the fuller phase decides.
    decisive = last
    if last.parts is not None:
        decisive = max(answers, key=lambda answer: answer.needed_bytes or 0)
    fields |= {
        name: getattr(decisive, name) for name in ("needed_bytes", "available_bytes")
    }
    if decisive.status != "ok":
        return record(
            status=decisive.status,
            reason=decisive.reason,
            origin=decisive.origin,
            **fields,
        )
    prefill, decode = (answer.parts for answer in answers)
    assert prefill is not None
    assert decode is not None
    found = metrics(
        ttft_parts_s=prefill,
        tpot_parts_s=decode,
        batch_size=point.batch_size,
        output_len=point.output_len,
        num_chips=point.num_chips,
    )
    return record(status="ok", **fields, **found)


def price(
    program: Program, compiled: CompiledProgram, target: Target
) -> tuple[PhaseRecord, TimeParts, float]:
    """Returns a phase's record, where its time goes, and its limit in seconds."""
    return price_counted(program, count(program, compiled), target)


def estimated(program: Program, counted: Counted, target: Target) -> Estimate:
    """Returns how long a call of a program should take on the chip of `target`."""
    ticks = dict(ticks=counted.ticks, busy_ticks=counted.busy_ticks)
    idle = program.phase == "prefill"
    return estimate(
        counted.ledger, target.chip, dtype=program.dtype, idle=idle, **ticks
    )


def price_counted(
    program: Program, counted: Counted, target: Target
) -> tuple[PhaseRecord, TimeParts, float]:
    """Returns what `price` does, of a program that was read before."""
    ledger = counted.ledger
    parts = _parts(estimated(program, counted, target))
    device = target.chip.per_device()
    work = limits.work(program)
    limit_s = limits.limit_s(program, target.chip)
    phase = PhaseRecord(
        layers=program.layers,
        flops=ledger.flops,
        hbm_bytes=ledger.hbm_bytes,
        collectives=merged(ledger.collectives),
        memory=MemoryRow(**dataclasses.asdict(counted.memory)),
        compile_s=counted.compile_s,
        closed_form_flops=limits.closed_form_flops(program),
        xla_flops=counted.xla_flops,
        bottleneck=parts.bottleneck,
        pct_of_limit=100 * limit_s / parts.total_s,
        mfu=work.flops / device.matmul_flops_per_s(program.dtype) / parts.total_s,
        mbu=work.hbm_bytes / device.hbm_bytes_per_s / parts.total_s,
        attention=program.attention if program.phase == "prefill" else None,
        unrolled_ticks=program.ticks == "unrolled"
        if program.partition.stage > 1
        else None,
        token_attention=_kernel(program.token_attention, "einsum"),
        residual=_kernel(program.residual, "plain"),
        prompt_residual=_kernel(program.prompt_residual, "plain"),
        overlap=_kernel(program.overlap, "none"),
        last_layer=_kernel(program.last_layer, "all"),
        rotation=_kernel(program.rotation, "joined"),
        compiler_options=dict(program.compiler_options) or None,
        ticks=counted.ticks,
        busy_ticks=counted.busy_ticks,
    )
    return phase, parts, limit_s


def _kernel(name: str, ordinary: str) -> str | None:
    return None if name == ordinary else name


def merged(rows: Sequence[hlo.Collective]) -> tuple[CollectiveRow, ...]:
    """Returns collectives with those of equal kind, size and source as one row.

    An unrolled program has a row for each layer.
    """
    found: dict[tuple[object, ...], CollectiveRow] = {}
    for row in rows:
        key = (row.axis, row.kind, row.group_size, row.payload_bytes_each, row.source)
        before = found.get(key)
        found[key] = CollectiveRow(
            axis=row.axis,
            kind=row.kind,
            count=row.count + (before.count if before else 0),
            payload_bytes=row.payload_bytes + (before.payload_bytes if before else 0),
            payload_bytes_each=row.payload_bytes_each,
            wire_bytes=row.wire_bytes + (before.wire_bytes if before else 0),
            group_size=row.group_size,
            source=row.source,
        )
    return tuple(found.values())


def _parts(found: Estimate) -> TimeParts:
    return TimeParts(
        compute=found.compute_s,
        hbm=found.hbm_s,
        links=dict(found.collective_s),
        overhead=found.overhead_s,
        bubble=found.bubble_s,
    )


def too_large(message: str) -> tuple[int, int] | None:
    """Returns needed and available bytes if that is what XLA complains about."""
    if not (found := _TOO_LARGE.search(message)):
        return None
    needed, needed_unit, available, available_unit = found.groups()
    return (
        int(float(needed) * _BINARY[needed_unit]),
        int(float(available) * _BINARY[available_unit]),
    )
