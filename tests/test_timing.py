"""Times are what the clock says, and every sample of them is kept."""

import functools
import gzip
import itertools
import json
import math
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxllm.config import PRESETS
from sharding import guard, kernels, timing
from sharding.layout import Layout
from sharding.mesh import make_mesh
from sharding.partition import Partition, Workload
from sharding.program import CompiledProgram, Phase, Program
from sharding.run import generate
from sharding.target import Target, parse_target
from sharding.timing import Run

TINY = PRESETS["tiny"]
PHASES: tuple[Phase, Phase] = ("prefill", "decode")
OUTPUT_LEN = 5


def _program(name: str, batch_size: int, phase: Phase) -> tuple[Target, Program, Mesh]:
    partition = Partition.parse(name)
    target = parse_target("cpu:8").first(partition.num_devices)
    program = Program(
        phase=phase,
        config=TINY,
        partition=partition,
        workload=Workload(batch_size=batch_size, input_len=6, output_len=OUTPUT_LEN),
        dtype="float32",
    )
    return target, program, make_mesh(target.mesh_devices(partition.shape))


@functools.cache
def _compiled(
    name: str, batch_size: int
) -> tuple[CompiledProgram, CompiledProgram, Layout, Mesh]:
    (target, prefill, _), (_, decode, mesh) = (
        _program(name, batch_size, phase) for phase in PHASES
    )
    return prefill.compile(target), decode.compile(target), decode.layout, mesh


def _scripted(
    times: list[tuple[float, float]], seen: list[int]
) -> Callable[[int], Run]:
    """Returns a generation that takes the times given, TTFT and E2E, in turn."""
    following = iter(times)

    def generate(calls: int) -> Run:
        seen.append(calls)
        ttft_s, e2e_s = next(following)
        return Run(ttft_s=ttft_s, e2e_s=e2e_s, tokens=np.array([7]))

    return generate


def test_tpot_is_what_is_left_over_the_other_tokens() -> None:
    steady = [(0.5, 1.0)] * 3
    seen: list[int] = []
    generate = _scripted([*steady, (2.0, 12.0), (3.0, 23.0), (1.0, 7.0)], seen)
    found = timing.measure(generate, output_len=11, calls=10, repeats=3)
    assert seen == [8, 8, 8, 10, 10, 10], "warm-up runs are short"
    assert found.ttft_samples_s == (2.0, 3.0, 1.0)
    assert found.e2e_samples_s == (12.0, 23.0, 7.0)
    assert found.tpot_samples_s == pytest.approx((1.0, 2.0, 0.6))
    assert (found.ttft_s, found.tpot_s) == (2.0, 1.0)
    assert found.warmup_samples_s == (1.0, 1.0, 1.0)


def test_warm_up_goes_on_until_two_runs_are_equal() -> None:
    times = [9.0, 5.0, 3.0, 2.0, 1.98, 1.0]
    found = timing.measure(
        _scripted([(0.5, t) for t in times], []), output_len=2, calls=1, repeats=1
    )
    assert found.warmup_samples_s == (9.0, 5.0, 3.0, 2.0, 1.98)
    assert found.e2e_samples_s == (1.0,)
    assert found.warnings == ()


def test_what_never_settles_is_timed_and_warned_of() -> None:
    times = [(1.0, 2.0**i) for i in range(11)]
    found = timing.measure(_scripted(times, []), output_len=2, calls=1, repeats=1)
    assert len(found.warmup_samples_s) == 10
    assert found.warnings == (
        "not steady after 10 warm-up runs, the last of 1.28e+05, 2.56e+05, 5.12e+05 ms",
    )


def test_throttling_shows_as_drift() -> None:
    slower = [(1.0, 11.0 + (0.6 if i >= 3 else 0.0)) for i in range(6)]
    generate = _scripted([(1.0, 2.0)] * 3 + slower, [])
    found = timing.measure(generate, output_len=11, calls=10, repeats=6)
    assert timing.drift(found.tpot_samples_s) == pytest.approx(1.06)
    assert timing.drift(found.ttft_samples_s) == 1
    # Half of the samples are off, which is spread too.
    assert any("TPOT samples spread over 5.8 %" in text for text in found.warnings)
    slowly = [(1.0, 11.0 + 0.08 * i) for i in range(12)]
    generate = _scripted([(1.0, 2.0)] * 3 + slowly, [])
    found = timing.measure(generate, output_len=11, calls=10, repeats=12)
    assert found.warnings == ("TPOT of later runs is +4.7 % from earlier ones",)


def test_different_tokens_are_warned_of() -> None:
    tokens = itertools.count()

    def generate(calls: int) -> Run:
        return Run(ttft_s=1.0, e2e_s=2.0, tokens=np.array([next(tokens)]))

    found = timing.measure(generate, output_len=2, calls=1, repeats=2)
    assert found.warnings == ("equal runs ended in different tokens",)


@pytest.mark.parametrize(
    ("partition", "batch_size", "calls"),
    # A full pipeline is one call behind; one group of sequences is not.
    [("tp1", 2, 4), ("pp2", 2, 5), ("pp2", 1, 4)],
)
def test_a_run_ends_in_the_tokens_of_generate(
    partition: str, batch_size: int, calls: int
) -> None:
    prefill, decode, layout, mesh = _compiled(partition, batch_size)
    params = timing.random_params(layout, mesh)
    assert timing.decode_calls(layout, OUTPUT_LEN) == calls
    once = timing.runner(prefill, decode, layout, mesh, params, seed=3)
    found = timing.measure(once, output_len=OUTPUT_LEN, calls=calls, repeats=2)
    assert found.same_tokens
    assert all(0 < t < e for t, e in zip(*_samples(found), strict=True))

    prompts = np.random.default_rng(3).integers(TINY.vocab_size, size=(batch_size, 6))
    state = layout.zeros(layout.named_state(), mesh)
    steps = generate(prefill, decode, layout, params, state, prompts.astype(np.int32))
    *_, (last, _) = itertools.islice(steps, OUTPUT_LEN)
    ahead = timing.run.leads(layout)
    # Sequences that lead have gone one token further.
    assert np.array_equal(once(calls).tokens[~ahead], last[~ahead])
    assert np.array_equal(once(OUTPUT_LEN - 1).tokens[ahead], last[ahead])


def _samples(found: timing.Timing) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return found.ttft_samples_s, found.e2e_samples_s


def test_the_clock_is_read_at_the_start_the_first_and_the_last_token() -> None:
    prefill, decode, layout, mesh = _compiled("tp1", 2)
    params = timing.random_params(layout, mesh)
    clock = iter([10.0, 10.5, 13.5]).__next__
    once = timing.runner(prefill, decode, layout, mesh, params, clock=clock)
    found = once(4)
    assert (found.ttft_s, found.e2e_s) == (0.5, 3.5)


@pytest.mark.parametrize("partition", ["tp1", "tp2", "pp2"])
def test_random_parameters_lie_where_they_should(partition: str) -> None:
    _, program, mesh = _program(partition, 2, "decode")
    params = timing.random_params(program.layout, mesh)
    wanted = program.layout.abstract(program.layout.named_params(), mesh)
    assert jax.tree.structure(params) == jax.tree.structure(wanted)
    for found, want in zip(*map(jax.tree.leaves, (params, wanted)), strict=True):
        assert (found.shape, found.dtype) == (want.shape, want.dtype)
        assert found.sharding == want.sharding
        host = np.asarray(found)
        assert np.isfinite(host).all()
        assert host.any()


def test_memory_is_that_of_the_fullest_device_or_unknown() -> None:
    class Device:
        def __init__(self, stats: dict[str, int] | None):
            self.memory_stats = lambda: stats

    def held(*stats: dict[str, int] | None) -> int | None:
        devices: list = [Device(s) for s in stats]
        return timing.allocated_bytes(devices, "bytes_in_use")

    assert held({"bytes_in_use": 3}, {"bytes_in_use": 5}) == 5
    assert held({"bytes_in_use": 3}, None) is None
    assert timing.allocated_bytes(jax.devices()[:2], "bytes_in_use") is None


def test_spread_of_equal_samples_is_nothing() -> None:
    assert timing.spread([2.0] * 5) == 0
    assert math.isclose(timing.spread([1.0, 2.0, 3.0]), 0.5)


_GPUS = (
    "0, GPU-a, NVIDIA H100, 580.1, {busy}, {used}, 1980, 1980, 120.5, 31, {why}\n"
    "1, GPU-b, NVIDIA H100, 580.1, 0, 4, 345, 1980, [N/A], 29, 0x1\n"
)


def _smi(
    processes: str = "", busy: int = 0, used: int = 4, why: str = "0x0"
) -> guard.Ask:
    def ask(arguments) -> str:
        if "compute-apps" in arguments[0]:
            return processes
        return _GPUS.format(busy=busy, used=used, why=why)

    return ask


def test_idle_gpus_are_timed() -> None:
    assert guard.before_start(_smi()) == []
    guard.refuse([])
    first, second = guard.gpus(_smi(why="0x0000000000000024"))
    assert first.slowed_by == ("power cap", "hot (software)")
    assert "1980 of 1980 MHz, 120 W" in str(first)
    assert math.isnan(second.power_w), "unknown is not zero"


@pytest.mark.parametrize(
    ("smi", "said"),
    [
        (_smi("4242, GPU-b, /usr/bin/python3, -u\n"), "GPU 1 is used by process 4242"),
        (_smi(busy=37), "GPU 0 is 37 % busy"),
        (_smi(used=5000), "GPU 0 has 5.2 GB in use"),
    ],
)
def test_gpus_of_others_are_refused(smi: guard.Ask, said: str) -> None:
    found = guard.before_start(smi)
    assert len(found) == 1
    with pytest.raises(ValueError, match=f"cannot time .*{said}.*--if_busy=warn"):
        guard.refuse(found)


def test_our_own_process_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    smi = _smi("17, GPU-a, python\n99, GPU-b, python\n", busy=90, used=70_000)
    assert guard.others({17, 99}, smi) == []
    assert guard.others({17}, smi) == ["GPU 1 is used by process 99 (python)"]
    # A GPU that we cannot see may be used.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert guard.others({17}, smi) == []
    assert len(guard.gpus(smi)) == 1


def test_no_driver_means_no_gpus() -> None:
    assert guard.gpus(lambda _: "") == []
    assert guard.before_start(lambda _: "") == []


def test_kernels_of_a_profile_are_counted_once(tmp_path: pathlib.Path) -> None:
    def named(what: str, name: str, **where: int) -> dict:
        return {"ph": "M", "name": what, "args": {"name": name}, **where}

    def ran(name: str, dur: float, **where: int) -> dict:
        return {"ph": "X", "name": name, "ts": 1, "dur": dur, **where}

    events = [
        named("process_name", "/device:GPU:0", pid=1),
        named("thread_name", "Stream #13(Compute)", pid=1, tid=13),
        named("thread_name", "XLA Ops", pid=1, tid=99),
        named("process_name", "/host:CPU", pid=7),
        named("thread_name", "Stream of thoughts", pid=7, tid=1),
        ran("gemm", 2.5, pid=1, tid=13),
        ran("all_reduce", 28, pid=1, tid=13),
        ran("gemm", 3.5, pid=1, tid=13),
        ran("gemm", 2.5, pid=1, tid=99),
        ran("python", 1000, pid=7, tid=1),
    ]
    file = tmp_path / "a.trace.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    found = kernels.read_kernels(file)
    assert [(k.name, k.count) for k in found] == [("all_reduce", 1), ("gemm", 2)]
    assert found[1].total_s == pytest.approx(6e-6)
    assert "/device:GPU:0\t2\t6.0\t3.00\tgemm\n" in kernels.as_text(found)
