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
from sharding.program import CompiledProgram, Phase, Program
from sharding.target import Target, parse_target

# What determines an answer besides the question; hashed into the context of a point.
_CODE = (
    "jaxllm", "sharding", "experiments/evaluate.py", "experiments/report/record.py",
)  # fmt: skip
_PHASES: tuple[Phase, Phase] = ("prefill", "decode")
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
    layers: str = "auto"
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
            layers=ask.layers,
            batch_size=batch_size,
            input_len=ask.input_len,
            output_len=ask.output_len,
            context=_context(configs[model], target, ask.chip),
        )
        for model, target, batch_size, rules in itertools.product(
            ask.models, known, ask.batch_sizes, ask.rules
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
        **provenance.versions_for(target.platform),
        **provenance.compiler_flags(),
        **{name: str(value) for name, value in target.compiler_options.items()},
    }


def evaluate(point: Point) -> Record:
    """Returns the record of `point`.

    Raises:
      ValueError: the compiled program holds something that cannot be counted.
    """
    target = parse_target(point.target, point.context.get("priced_as"))
    config = config_lib.load(point.model)
    record = functools.partial(Record.of, point, provenance.collect())
    workload = Workload(
        batch_size=point.batch_size,
        input_len=point.input_len,
        output_len=point.output_len,
    )
    partition = Partition.parse(point.partition, point.rules)
    try:
        check(
            config,
            partition,
            workload,
            num_devices=target.num_devices,
            target=target.name,
        )
        prefill, decode = (
            Program(
                phase=phase,
                config=config,
                partition=partition,
                workload=workload,
                dtype=point.dtype,
            )
            for phase in _PHASES
        )
    except ValueError as error:
        return record(status="refused", reason=str(error))
    prefill, decode = (
        choices.choose(program, target, layers=point.layers)
        for program in (prefill, decode)
    )

    memory: dict[str, Any] = dict(available_bytes=target.chip.per_device().hbm_bytes)
    layout = decode.layout
    weights = layout.device_bytes(layout.named_params())
    kv = layout.device_bytes(layout.named_state().cache)
    if weights + kv > memory["available_bytes"]:
        memory["needed_bytes"] = weights + kv
        reason = (
            f"Weights {units.bytes_(weights)} and KV cache {units.bytes_(kv)} alone are"
            " too much; nothing was compiled."
        )
        return record(status="does not fit", reason=reason, origin="modelled", **memory)

    phases: dict[str, Any] = {"micro_batches": prefill.prefill_micro_batches}
    times: dict[str, TimeParts] = {}
    for program in (prefill, decode):
        try:
            compiled = program.compile(target)
        except jax.errors.JaxRuntimeError as error:
            exceeded = too_large(str(error))
            if exceeded is None:
                raise
            needed, memory["available_bytes"] = exceeded
            memory["needed_bytes"] = needed
            reason = (
                f"The compiler refused {program.phase}: weights"
                f" {units.bytes_(weights)}, KV cache {units.bytes_(kv)}, the rest is"
                " temporary."
            )
            return record(status="does not fit", reason=reason, **phases, **memory)
        phase, times[program.phase], limit_s = price(program, compiled, target)
        phases[program.phase] = phase
        name = {"prefill": "ttft_limit_s", "decode": "tpot_limit_s"}[program.phase]
        phases[name] = limit_s

    fullest = max((phases[p].memory for p in _PHASES), key=lambda m: m.peak_bytes)
    memory["needed_bytes"] = fullest.peak_bytes
    if fullest.peak_bytes > memory["available_bytes"]:
        parts = ", ".join(f"{name} {units.bytes_(b)}" for name, b in fullest.items())
        return record(status="does not fit", reason=f"{parts}.", **phases, **memory)
    found = metrics(
        ttft_parts_s=times["prefill"],
        tpot_parts_s=times["decode"],
        batch_size=point.batch_size,
        output_len=point.output_len,
        num_chips=target.num_chips,
    )
    return record(status="ok", **phases, **memory, **found)


def price(
    program: Program, compiled: CompiledProgram, target: Target
) -> tuple[PhaseRecord, TimeParts, float]:
    """Returns a phase's record, where its time goes, and its limit in seconds."""
    ledger = hlo.read_ledger(compiled.text, program.partition.axes)
    ticks = dict(ticks=compiled.ticks, busy_ticks=compiled.busy_ticks)
    parts = _parts(estimate(ledger, target.chip, dtype=program.dtype, **ticks))
    device = target.chip.per_device()
    work = limits.work(program)
    limit_s = limits.limit_s(program, target.chip)
    phase = PhaseRecord(
        layers=program.layers,
        flops=ledger.flops,
        hbm_bytes=ledger.hbm_bytes,
        collectives=merged(ledger.collectives),
        memory=MemoryRow(**dataclasses.asdict(compiled.memory)),
        compile_s=compiled.compile_s,
        closed_form_flops=limits.closed_form_flops(program),
        xla_flops=compiled.xla_flops,
        bottleneck=parts.bottleneck,
        pct_of_limit=100 * limit_s / parts.total_s,
        mfu=work.flops / device.matmul_flops_per_s(program.dtype) / parts.total_s,
        mbu=work.hbm_bytes / device.hbm_bytes_per_s / parts.total_s,
        attention=program.attention if program.phase == "prefill" else None,
        unrolled_ticks=program.ticks == "unrolled"
        if program.partition.stage > 1
        else None,
        **ticks,
    )
    return phase, parts, limit_s


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
