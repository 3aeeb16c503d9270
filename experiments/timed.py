"""One point, timed: compiled, run on attached devices, set beside what was expected.

`plan` multiplies a question out; `measure` answers one point of it. Both start JAX and
take hold of the devices, so a sweep calls them in one worker process, which keeps a
partition's parameters from point to point.
"""

import dataclasses
import functools
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax
import numpy as np

from experiments import evaluate
from experiments.evaluate import Ask
from experiments.report import kept, provenance, units
from experiments.report.frontier import partition_order
from experiments.report.measurement import Measurement
from experiments.report.record import Point, Record, rates
from jaxllm.model import Params
from sharding import choices, guard, kernels, limits, pace, timing
from sharding.layout import Layout
from sharding.mesh import make_mesh
from sharding.program import CompiledProgram, Program
from sharding.target import Target, parse_target, prepare_environment

# Which figures a phase's time is called by, and where its parts stand.
_NAMES = {"prefill": "ttft", "decode": "tpot"}
_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OUT_OF_MEMORY", re.I)
_PROFILED_CALLS = 3  # of decode
# The devices are ours alone: leave only what NCCL and the driver need for themselves.
_MEMORY_FRACTION = "0.92"
# Parameters of the partition timed last; at most one entry, dropped before the next.
_held: dict[tuple[object, ...], Params] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """How points are timed, the same for all of a sweep.

    Attributes:
      repeats: runs that count.
      refuse: do not time on devices that another process uses.
      warnings: found before this process used a device.
      profile: folder for a JAX profile of each point, or None.
      out: folder of the records, where programs are kept beside them; None keeps none.
      changes: to how programs are written; see `sharding.choices.read_changes`.
    """

    repeats: int
    refuse: bool = True
    warnings: tuple[str, ...] = ()
    profile: str | None = None
    out: str | None = None
    changes: tuple[tuple[str, str], ...] = ()


def prepare(target: str) -> None:
    """Sets what JAX reads once, in the process that will own the devices."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", _MEMORY_FRACTION)
    prepare_environment([target])


def plan(ask: Ask, how: How) -> tuple[list[Point], list[str]]:
    """Returns the points of `ask` in the order to time them, and what is wrong with it.

    Points of one partition follow each other, for they share parameters; batches
    rise, so that each allocates more than those before and its peak shows.
    """
    points, wrong = evaluate.plan(dataclasses.replace(ask, fewer=True))
    if wrong:
        return [], wrong
    target = parse_target(ask.targets[0], ask.chip)
    if target.compile_only:
        return [], [
            f"cannot time on target {target.name!r}: its devices are described, not"
            " there. Only what is attached runs. Use --target=attached or cpu:2, or"
            " experiments.tradeoff for an estimate."
        ]
    gpus = guard.gpus() if target.platform == "cuda" else []
    context = {
        "timed": provenance.code_digest("experiments/timed.py"),
        "devices": target.devices[0].device_kind,
        "repeats": str(how.repeats),
        **({"driver": gpus[0].driver} if gpus else {}),
        **{f"choice {name}": value for name, value in how.changes},
    }
    points.sort(key=lambda p: (partition_order(p.partition), p.rules, p.batch_size))
    return [
        dataclasses.replace(p, context={**p.context, **context}) for p in points
    ], []


def measure(point: Point, how: How) -> Record:
    """Returns the measured record of `point`.

    Raises:
      ValueError: another process uses the devices, and `how` refuses that.
    """
    target = parse_target(point.target, point.context.get("priced_as"))
    target = target.first(point.num_devices)
    record = functools.partial(
        Record.of, point, provenance.collect(), origin="measured"
    )
    try:
        both = evaluate.asked(point)
        prefill, decode = choices.choose_both(
            both["prefill"],
            both["decode"],
            target,
            layers=point.layers,
            changes=dict(how.changes),
        )
    except ValueError as error:
        return record(status="refused", reason=str(error))
    memory: dict[str, Any] = dict(
        available_bytes=timing.allocated_bytes(target.devices, "bytes_limit")
        or int(target.chip.per_device().hbm_bytes)
    )
    layout = decode.layout
    weights = layout.device_bytes(layout.named_params())
    kv = layout.device_bytes(layout.named_state().cache)
    holds = f"weights {units.bytes_(weights)}, KV cache {units.bytes_(kv)}"
    if weights + kv > memory["available_bytes"]:
        memory["needed_bytes"] = weights + kv
        reason = f"Too much: {holds}; nothing was run."
        return record(status="does not fit", reason=reason, **memory)
    target, placed = _placed(target, prefill)
    try:
        compiled = prefill.compile(target), decode.compile(target)
        memory["needed_bytes"] = max(c.memory.peak_bytes for c in compiled)
        if memory["needed_bytes"] > memory["available_bytes"]:
            # Not tried: if one device runs out, others may wait for it for ever.
            reason = f"So says the compiler: {holds}, the rest is temporary."
            return record(status="does not fit", reason=reason, **memory)
        answer = _timed(point, how, target, placed, (prefill, decode), compiled)
    except jax.errors.JaxRuntimeError as error:
        if not _OUT_OF_MEMORY.search(str(error)):
            raise
        said = " ".join(str(error).split())[:300]
        reason = f"Out of memory: {holds}, the rest is temporary. {said}"
        return record(status="does not fit", reason=reason, **memory)
    return record(status="ok", **{**memory, **answer})


def _timed(
    point: Point,
    how: How,
    target: Target,
    placed: tuple[str, ...],
    programs: tuple[Program, Program],
    compiled: tuple[CompiledProgram, CompiledProgram],
) -> dict[str, Any]:
    """Returns the fields of a record with figures."""
    before, warnings = _look(target, how)
    prefill, decode = programs
    layout = decode.layout
    mesh = make_mesh(target.mesh_devices(decode.partition.shape))
    params = _params(point, layout, target)
    generate = timing.runner(*compiled, layout, mesh, params)
    calls = timing.decode_calls(layout, point.output_len)
    first_peak = timing.allocated_bytes(target.devices, "peak_bytes_in_use")
    found = timing.measure(
        generate, output_len=point.output_len, calls=calls, repeats=how.repeats
    )
    busy = guard.while_running(functools.partial(generate, calls)) if before else []
    held = timing.allocated_bytes(target.devices, "bytes_in_use")
    peak, peak_reason = _peak(target, first_peak)
    if how.profile:
        _profile(pathlib.Path(how.profile), point, generate)
    if how.out:
        _keep(pathlib.Path(how.out), point, compiled)
    del generate  # and with it the decode state

    answer: dict[str, Any] = dict(
        micro_batches=prefill.prefill_micro_batches,
        **rates(
            ttft_s=found.ttft_s,
            tpot_s=found.tpot_s,
            batch_size=point.batch_size,
            output_len=point.output_len,
            num_chips=point.num_chips,
        ),
    )
    answer |= _expected(prefill, compiled[0], target, found.ttft_s, warnings)
    answer |= _expected(decode, compiled[1], target, found.tpot_s, warnings)
    ttft_parts, tpot_parts = answer.get("ttft_parts_s"), answer.get("tpot_parts_s")
    if ttft_parts and tpot_parts:
        total = ttft_parts.plus(tpot_parts, point.output_len - 1)
        answer["bottleneck"] = total.bottleneck
    measurement = Measurement.of(
        found,
        engine="jaxllm",
        devices=tuple(device.device_kind for device in target.devices),
        driver=point.context.get("driver"),
        devices_placed=placed or None,
        held_bytes=held,
        peak_bytes=peak,
        peak_reason=peak_reason,
        devices_before=before,
        devices_busy=tuple(map(str, busy)),
        warnings=warnings,
    )
    return dict(**answer, measurement=measurement)


def _placed(target: Target, prefill: Program) -> tuple[Target, tuple[str, ...]]:
    """Returns `target` with its slowest devices where there is least to do.

    That is the last stage, of pipelines with a short last layer; and where each is.
    """
    partition = prefill.partition
    is_even = partition.stage == 1 or prefill.last_layer == "all"
    if is_even or target.platform == "cpu":  # whose devices are one
        return target, ()
    found = _paces(target.devices)
    target = pace.slowest_last(target, partition, found)
    grid = target.mesh_devices(partition.shape)
    return target, tuple(
        f"stage {at[1]}: device {device.id}, pace {found[device]:.3f}"
        for at, device in np.ndenumerate(grid)
    )


@functools.cache
def _paces(devices: tuple[jax.Device, ...]) -> dict[jax.Device, float]:
    """Returns the paces of `devices`, measured once in a process."""
    return dict(zip(devices, pace.paces(devices), strict=True))


def _look(target: Target, how: How) -> tuple[tuple[str, ...], list[str]]:
    """Returns what GPUs do before a point, and warnings; see `How.refuse`."""
    warnings = list(how.warnings)
    if target.platform != "cuda":
        return (), warnings
    if not (seen := guard.gpus()):
        warnings.append("nvidia-smi said nothing: other processes may use the GPUs")
    found = guard.others({os.getpid()})
    if how.refuse:
        guard.refuse(found)
    return tuple(map(str, seen)), [*warnings, *found]


def _params(point: Point, layout: Layout, target: Target) -> Params:
    """Returns random parameters of a point's partition, made once."""
    key = (
        point.model, point.target, point.partition, point.rules, point.dtype,
        point.weights, layout.layers, target.devices,
    )  # fmt: skip
    if key not in _held:
        _held.clear()  # first, or both would be in memory at once
        mesh = make_mesh(target.mesh_devices(layout.partition.shape))
        _held[key] = jax.block_until_ready(timing.random_params(layout, mesh))
    return _held[key]


def _peak(target: Target, before: int | None) -> tuple[int | None, str | None]:
    """Returns the most allocated by this point, or why it is not known."""
    now = timing.allocated_bytes(target.devices, "peak_bytes_in_use")
    if now is None or before is None:
        return None, f"{target.platform} devices keep no count of what is allocated"
    if now > before:
        return now, None
    return None, (
        f"at most {units.bytes_(now)}, allocated before in the same process, whose peak"
        " cannot be set back"
    )


def _expected(
    program: Program,
    compiled: CompiledProgram,
    target: Target,
    measured_s: float,
    warnings: list[str],
) -> dict[str, Any]:
    """Returns a phase's limit, prediction and counts; adds to `warnings` if it cannot.

    A program that holds something unknown to the ledger is timed all the same: times
    need the devices again, predictions do not.
    """
    name = _NAMES[program.phase]
    limit = {f"{name}_limit_s": limits.limit_s(program, target.chip)}
    try:
        phase, parts, _ = evaluate.price(program, compiled, target)
    except Exception as error:
        kind = type(error).__name__
        warnings.append(f"no prediction of {program.phase}, {kind}: {error}")
        return limit
    # Shares of the peaks are of the time as measured.
    faster = parts.total_s / measured_s
    scaled = {
        share: value * faster
        for share in ("pct_of_limit", "mfu", "mbu")
        if (value := getattr(phase, share)) is not None
    }
    return {
        **limit,
        f"{name}_parts_s": parts,
        f"predicted_{name}_s": parts.total_s,
        program.phase: dataclasses.replace(phase, **scaled),
    }


def _keep(
    folder: pathlib.Path,
    point: Point,
    compiled: tuple[CompiledProgram, CompiledProgram],
) -> None:
    """Writes the programs that were timed, for `experiments.validate`."""
    made = provenance.collect()
    how = {"attached": True, "commit": made.commit, "versions": dict(made.versions)}
    for phase, program in zip(evaluate.PHASES, compiled, strict=True):
        kept.write(kept.path(folder, point, phase), program, how)


def _profile(folder: pathlib.Path, point: Point, generate: Any) -> None:
    """Writes a JAX profile of one prefill and a few decode steps.

    Three files: NAME.trace.json.gz for Perfetto, NAME.xplane.pb for XProf, and what
    kernels they show in NAME.kernels.txt, tab-separated.
    """
    name = f"{point.partition}_{point.rules}_batch{point.batch_size}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        with jax.profiler.trace(scratch):
            generate(_PROFILED_CALLS)
        for suffix in ("trace.json.gz", "xplane.pb"):
            (found,) = pathlib.Path(scratch).rglob(f"*.{suffix}")
            shutil.copy(found, folder / f"{name}.{suffix}")
    seen = kernels.read_kernels(folder / f"{name}.trace.json.gz")
    (folder / f"{name}.kernels.txt").write_text(kernels.as_text(seen))
