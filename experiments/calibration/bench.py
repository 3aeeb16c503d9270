"""One micro-benchmark on attached devices: compiled, counted, warmed up, timed.

Runs in the process that owns the devices. Everything that can go wrong with one point
is that point's `reason`, and the next one is measured.
"""

import dataclasses
import datetime
import functools
import math
import os
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.calibration import chains, links
from experiments.calibration.points import Point, Size, plan
from experiments.report import provenance
from sharding import guard, kernels, timing
from sharding.chips.calibration import Header, Sample
from sharding.hlo import read_ledger
from sharding.target import parse_target, prepare_environment

SAMPLES = 7
RUN_S = 0.015  # of calls behind each other, between two looks at the clock
SINGLE_CALLS = 3  # runs of one call that a warm-up begins with
LIMIT_S = 60.0  # of one point
_MOST_CALLS = 500
_SHORTENED = 0.95  # a chain with fewer of its links than this was simplified
_LOOK_S = 10.0  # between two looks at who else uses the devices
_PROFILED_CALLS = 3
_NAME_LENGTH = 80  # of a kernel's name that is kept

Clock = Callable[[], float]
# Operands of the last point, for the next may want the same; at most one entry.
_held: dict[object, Any] = {}
_looked: list[float] = [-math.inf]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """What to calibrate.

    Attributes:
      target: "attached" or "cpu:N".
      chip: name or file of the chip that the devices are, or None for what they say.
      size: of the plan; None: "full" for accelerators, "small" for CPUs.
      refuse: do not measure on devices that another process uses.
    """

    target: str
    chip: str | None = None
    size: Size | None = None
    refuse: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """Times of one call, from runs of many.

    Attributes:
      calls: of a run.
      samples_s, warmup_samples_s: time of a run divided by its calls.
      steady: the last two runs of the warm-up took equally long.
    """

    calls: int
    samples_s: tuple[float, ...]
    warmup_samples_s: tuple[float, ...]
    steady: bool


def prepare(target: str) -> None:
    """Sets what JAX reads once, in the process that will own the devices."""
    prepare_environment([target])


def read(ask: Ask) -> tuple[Header, list[Point]]:
    """Returns where and with what is measured, and every point to measure.

    Raises:
      ValueError: the devices are only described, or their chip is not known.
    """
    target = parse_target(ask.target, ask.chip)
    if target.compile_only:
        raise ValueError(
            f"cannot calibrate target {target.name!r}: its devices are described, not"
            " there. Only what is attached runs. Use --target=attached, or cpu:2 to"
            " see how it works."
        )
    gpus = guard.gpus() if target.platform == "cuda" else []
    made = provenance.collect()
    header = Header(
        chip=target.chip.name,
        devices=tuple(device.device_kind for device in target.devices),
        driver=gpus[0].driver if gpus else None,
        versions=provenance.versions_for(target.platform),
        flags=provenance.compiler_flags(),
        command=made.command,
        commit=made.commit + ("+" if made.dirty else ""),
        time=made.time,
    )
    size = ask.size or ("small" if target.platform == "cpu" else "full")
    return header, plan(target.chip.per_device(), target.num_devices, size)


def measure(point: Point, ask: Ask) -> Sample:
    """Returns what was measured of a point, or why nothing was.

    Raises:
      ValueError: another process uses the devices, and `ask` refuses that.
    """
    target = parse_target(ask.target, ask.chip)
    if target.platform == "cuda" and ask.refuse:
        _look()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    sample = Sample(
        name=point.name,
        at=point.at,
        links=point.links,
        slots=0,
        time=now.replace("+00:00", "Z"),
    )
    # A device that hangs would hang this process for ever: its end is noticed.
    watchdog = threading.Timer(LIMIT_S, os._exit, (1,))
    watchdog.daemon = True
    watchdog.start()
    try:
        chain = links.chain_of(point, target.platform)
        return _measure(point, chain, sample, list(target.devices), target.platform)
    except Exception as error:
        _held.clear()
        said = " ".join(str(error).split())[:200]
        return dataclasses.replace(sample, reason=f"{type(error).__name__}: {said}")
    finally:
        watchdog.cancel()


def _measure(
    point: Point,
    chain: chains.Chain,
    sample: Sample,
    devices: list[Any],
    platform: str,
) -> Sample:
    mesh = chain.mesh(devices)
    state, operands = chain.abstract(mesh)
    compiled = chains.compile_chain(chain, mesh, {})
    slots, reason = count(compiled.as_text() or "", chain)
    sample = dataclasses.replace(sample, slots=slots, reason=reason)
    if reason:
        return sample
    holder = [_filled(state, 0)]
    weights = _operands(operands)

    def wait() -> None:
        jax.block_until_ready(holder[0])

    def call() -> None:
        holder[0] = compiled(holder[0], weights)
        if platform == "cpu":
            # Virtual devices share threads: collectives of two calls lock each other.
            wait()

    runs = time_calls(call, wait)
    sample = dataclasses.replace(
        sample,
        calls=runs.calls,
        call_samples_s=runs.samples_s,
        warmup_samples_s=runs.warmup_samples_s,
        steady=runs.steady,
    )
    if point.profile and platform != "cpu":
        return dataclasses.replace(sample, kernels=_profile(call, wait))
    return sample


def count(text: str, chain: chains.Chain) -> tuple[int, str | None]:
    """Returns the kernels of a link of a compiled chain, and what is wrong with it.

    A program that the ledger cannot read is trusted.
    """
    axes = {"other": chain.devices // chain.group, "group": chain.group}
    try:
        ledger = read_ledger(text, axes=axes)
    except ValueError:
        return chain.slots, None
    found = chains.links_found(ledger, chain)
    short = {k: n for k, n in found.items() if n < _SHORTENED * chain.links}
    if not short:
        return chains.slots_found(ledger, chain), None
    words = ", ".join(f"{n:.3g} by its {name}" for name, n in short.items())
    return chain.slots, f"compiled to fewer than {chain.links} links: {words}"


def time_calls(
    call: Callable[[], object],
    wait: Callable[[], object],
    *,
    clock: Clock = time.perf_counter,
    samples: int = SAMPLES,
) -> Runs:
    """Returns the time of a call, from runs of about `RUN_S`, after a warm-up.

    As in `sharding.timing`: the first call loads the program, on a GPU the second
    records its graph; warm-up goes on until two runs differ by less than
    `timing.STEADY`, and every sample is kept.

    Args:
      call: starts one call and need not wait for it.
      wait: returns when all calls are done.
      clock: seconds.
      samples: runs that count.
    """

    def run(calls: int) -> float:
        start = clock()
        for _ in range(calls):
            call()
        wait()
        return (clock() - start) / calls

    warmup = [run(1) for _ in range(SINGLE_CALLS)]
    calls = min(max(round(RUN_S / max(warmup[-1], 1e-9)), 1), _MOST_CALLS)
    warmup += [run(calls), run(calls)]
    while not timing.settled(warmup) and len(warmup) < timing.MAX_WARMUP:
        warmup.append(run(calls))
    return Runs(
        calls=calls,
        samples_s=tuple(run(calls) for _ in range(samples)),
        warmup_samples_s=tuple(warmup),
        steady=timing.settled(warmup),
    )


def _look() -> None:
    """Refuses devices that others use, every now and then.

    Raises:
      ValueError: see `guard.refuse`.
    """
    if time.monotonic() - _looked[0] > _LOOK_S:
        guard.refuse(guard.others({os.getpid()}))
        _looked[0] = time.monotonic()


def _operands(abstract: list[Any]) -> list[Any]:
    key = tuple(map(repr, jax.tree.leaves(abstract)))
    if key not in _held:
        _held.clear()  # first, or both would be in memory at once
        _held[key] = [_filled(each, i + 1) for i, each in enumerate(abstract)]
        jax.block_until_ready(_held[key])
    return _held[key]


def _filled(abstract: Any, seed: int) -> Any:
    """Returns random arrays: products of zeros would take less power, and time."""
    leaves, structure = jax.tree.flatten(abstract)
    keys = jax.random.split(
        jax.random.key(seed, impl="unsafe_rbg"), max(len(leaves), 1)
    )
    made = [
        _filler(leaf.shape, leaf.dtype, leaf.sharding)(key)
        for leaf, key in zip(leaves, keys, strict=False)
    ]
    return jax.tree.unflatten(structure, made)


@functools.lru_cache(maxsize=64)
def _filler(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    def fill(key: jax.Array) -> jax.Array:
        if jnp.issubdtype(dtype, jnp.integer):
            return jax.random.bits(key, shape, jnp.uint8).astype(dtype)
        near = jnp.bfloat16 if jnp.dtype(dtype).itemsize < 4 else dtype
        inputs = shape[-2] if len(shape) > 1 else 1
        values = jax.random.uniform(key, shape, near, -1.0, 1.0)
        return (values * (3 / inputs) ** 0.5).astype(dtype)

    return jax.jit(fill, out_shardings=sharding)


def _profile(
    call: Callable[[], None], wait: Callable[[], None]
) -> dict[str, tuple[int, float]]:
    """Returns the kernels of the first device, the longest in all first."""
    with tempfile.TemporaryDirectory() as scratch:
        with jax.profiler.trace(scratch):
            for _ in range(_PROFILED_CALLS):
                call()
            wait()
        found = list(pathlib.Path(scratch).rglob("*.trace.json.gz"))
        seen = kernels.read_kernels(found[0]) if found else []
    first = [kernel for kernel in seen if kernel.device == seen[0].device]
    return {k.name[:_NAME_LENGTH]: (k.count, k.total_s) for k in first}
