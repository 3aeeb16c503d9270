"""A calibration finds the rates that are there, and times nothing that is not."""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import pytest
from rich.console import Console

from experiments.calibration import bench, chains, curves, links, run
from experiments.calibration.bench import Ask
from experiments.calibration.points import BYTES, Point, plan
from experiments.report.workers import Event
from sharding import rates
from sharding.chips import CHIPS, load_calibrated
from sharding.chips.calibration import Sample
from sharding.target import parse_target
from tests import fakes

H100 = CHIPS["h100"].published()
FULL = plan(H100, 2, "full")
CPU = Ask(target="cpu:2", size="tiny")
SLOTS = {"matmul": 2, "split": 2, "token": 3, "apart": 9, "call": 0}
OURS = ("split", "add", "token")
CALL_S, GAP_S = 12e-6, 2e-6


@dataclasses.dataclass
class Device:
    """Runs calls in no time but that of its own clock.

    Attributes:
      call_s: what a call takes.
      now_s: its clock; calls end at `done_s`.
    """

    call_s: float
    now_s: float = 0.0
    done_s: float = 0.0
    calls: int = 0

    def call(self) -> None:
        self.calls += 1
        loading = 50.0 if self.calls < 3 else 1.0
        self.done_s = max(self.done_s, self.now_s) + loading * self.call_s

    def wait(self) -> None:
        self.now_s = self.done_s

    def clock(self) -> float:
        return self.now_s


def _work_s(point: Point) -> float:
    """Returns what one link takes on a device of known rates."""
    at: dict[str, Any] = dict(point.at)
    match point.name:
        case "copy" | "read" | "scores":
            return at["bytes"] / 2.5e12
        case "vector":
            return at["flops"] / 50e12
        case "matmul":
            weights, item = BYTES[at["weights"]], BYTES[at["dtype"]]
            m, n, k = at["m"], at["n"], at["k"]
            moved = m * k * item + k * n * weights + m * n * max(item, 2)
            peak = H100.matmul_flops_per_s(at["dtype"])
            return 1.25 * max(2 * m * n * k / peak, moved / 3.35e12)
        case "split":
            m, n, k = at["m"], at["n"], at["k"]
            return 1.5 * 2 * (m * k + k * n + m * n) / 3.35e12
        case "add":
            return 1e-6 + at["parts"] * 0.25e-6
        case "attention" | "token":
            return 2 * max(at["flops"] / 989.4e12, at["bytes"] / 3.35e12)
        case "collective" | "apart":
            more_s = 9e-6 if point.name == "apart" else 0
            more_s += 1e-3 if at["by"] == "nccl" else 0
            return 5e-6 + at["wire"] / 200e9 + more_s
    return 0.0


def _measured(point: Point, ask: Ask) -> Sample:
    """Stands for `bench.measure`: its timing, on a device of known rates."""
    slots = SLOTS.get(point.name, 1)
    device = Device(CALL_S + point.links * (slots * GAP_S + _work_s(point)))
    runs = bench.time_calls(device.call, device.wait, clock=device.clock)
    return Sample(
        name=point.name,
        at=point.at,
        links=point.links,
        slots=slots,
        calls=runs.calls,
        call_samples_s=runs.samples_s,
        warmup_samples_s=runs.warmup_samples_s,
        steady=runs.steady,
    )


class InProcess:
    """Stands for `Workers`: no process, and dies where it is told to."""

    def __init__(self, jobs: int, setup: Callable[[], object]):
        del jobs, setup

    def run(
        self, function: Callable[[Any], Any], items: Sequence[Any]
    ) -> Iterator[Event]:
        for item in items:
            try:
                yield Event(kind="finished", item=item, value=function(item))
            except RuntimeError as error:
                yield Event(kind="broke", item=item, reason=f"at guard.py: {error}")
            except ArithmeticError as error:
                yield Event(kind="broke", item=item, reason=str(error))

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def calibrate(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    """Returns `run.calibrate` of two H100 of known rates."""
    monkeypatch.setattr(run, "Workers", InProcess)
    monkeypatch.setattr(bench, "read", lambda ask: (fakes.CALIBRATED, FULL))
    monkeypatch.setattr(bench, "measure", _measured)
    console = Console(quiet=True)
    return functools.partial(
        run.calibrate, Ask(target="attached"), tmp_path, 1e9, console
    )


def test_known_rates_come_back(calibrate: Any) -> None:
    outcome = calibrate()
    assert (outcome.done, outcome.failed, outcome.left) == (len(FULL), (), 0)
    chip = load_calibrated(outcome.path)
    near = functools.partial(pytest.approx, rel=2e-3)  # of times of six digits
    assert rates.kernel_gap_s(chip) == near(GAP_S)
    assert rates.call_overhead_s(chip, devices=2) == near(CALL_S)
    assert rates.collective_gap_s(chip) == near(9e-6)
    assert rates.memory_s(chip, 3e8) == near(3e8 / 2.5e12)
    assert rates.vector_s(chip, 1e9) == near(1e9 / 50e12)
    for m in (1, 7, 300, 5000):
        for n in (3072, 20000):
            point = Point(
                name="matmul",
                at={"dtype": "bf16", "weights": "bf16", "m": m, "k": 4096, "n": n},
                links=1,
            )
            found = rates.matmul_s(chip, m, n, 4096, "bf16")
            assert found == pytest.approx(_work_s(point), rel=0.01)
    for kind, wire in (("all-reduce", 1e6), ("all-gather", 5e5), ("permute", 1e6)):
        found = rates.collective_s(chip, kind, 2, 1e6, wire)
        assert found == near(5e-6 + wire / 200e9)
    found = rates.attention_s(chip, 5e10, 3e7, phase="prefill")
    assert found == near(2 * 5e10 / 989.4e12)
    assert [text for _, text, _ in curves.facts(chip)][:2] == ["2.50 TB/s"] * 2


def test_a_stopped_run_goes_on(calibrate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def measure(point: Point, ask: Ask) -> Sample:
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(point.key)
        return _measured(point, ask)

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        calibrate()
    monkeypatch.setattr(bench, "measure", _measured)
    outcome = calibrate()
    assert outcome.done == len(FULL)
    lines = [json.loads(line) for line in outcome.path.read_text().splitlines()]
    assert [line.get("name") for line in lines[1:6]] == [k.split()[0] for k in seen]
    assert len(lines) == 1 + len(FULL)  # nothing twice


def test_a_budget_leaves_the_last_points_for_next_time(calibrate: Any) -> None:
    ticks = iter(range(10**6))
    calibrate.keywords["clock"] = lambda: 1e8 * next(ticks)
    outcome = calibrate()
    assert (outcome.done, outcome.left) == (10, len(FULL) - 10)
    found = load_calibrated(outcome.path).calibrated
    assert found is not None
    assert [s.key for s in found.samples] == [p.key for p in FULL[:10]]


def test_a_process_that_dies_costs_its_point(
    calibrate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(point: Point, ask: Ask) -> Sample:
        if point.key == FULL[2].key:
            raise ArithmeticError("ended by SIGABRT")
        return _measured(point, ask)

    monkeypatch.setattr(bench, "measure", measure)
    outcome = calibrate()
    assert outcome.failed == ((str(FULL[2]), "ended by SIGABRT"),)
    assert outcome.done == len(FULL) - 1
    monkeypatch.setattr(bench, "measure", _measured)
    assert calibrate().failed == ()  # tried again


def test_devices_of_others_stop_it(
    calibrate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(point: Point, ask: Ask) -> Sample:
        raise RuntimeError("cannot time on these devices")

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(ValueError, match="cannot time on these devices"):
        calibrate()


def test_other_conditions_are_another_file(
    calibrate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate.keywords["clock"] = iter([0, 0, 2e9]).__next__
    calibrate()
    del calibrate.keywords["clock"]
    other = dataclasses.replace(
        fakes.CALIBRATED, versions={"jax": "0.12.0"}, time="later"
    )
    monkeypatch.setattr(bench, "read", lambda ask: (other, FULL))
    with pytest.raises(ValueError, match=r"versions \{'jax': '0\.11\.2'\} -> .*0\.12"):
        calibrate()


def test_more_devices_of_the_same_kind_continue_a_file(
    calibrate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate()
    four = dataclasses.replace(
        fakes.CALIBRATED, devices=2 * fakes.CALIBRATED.devices, time="later"
    )
    points = plan(H100, 4, "full")
    new = {point.key for point in points} - {point.key for point in FULL}
    assert all("devices=4" in key for key in new)
    monkeypatch.setattr(bench, "read", lambda ask: (four, points))
    outcome = calibrate()
    assert (outcome.done, outcome.left) == (len(points), 0)
    found = load_calibrated(outcome.path).calibrated
    assert found is not None
    assert [len(header.devices) for header in found.headers] == [2, 4]
    assert len(found.samples) == len(FULL) + len(new)
    assert str(found).startswith("measured on 2 and 4 x NVIDIA H100 80GB HBM3, ")
    calibrate()  # there is nothing to do, nor to say
    again = load_calibrated(outcome.path).calibrated
    assert again is not None
    assert again.digest == found.digest


def test_runs_wait_once_and_keep_every_sample() -> None:
    device = Device(call_s=1e-3)
    runs = bench.time_calls(device.call, device.wait, clock=device.clock, samples=4)
    assert runs.calls == 15  # of 1 ms, in a run of 15 ms
    assert runs.samples_s == pytest.approx((1e-3,) * 4)
    assert runs.warmup_samples_s[:2] == pytest.approx((50e-3, 50e-3))
    assert runs.steady


def test_a_device_that_never_settles_is_said_to() -> None:
    device = Device(call_s=1.0)

    def call() -> None:
        device.call_s *= 1.2
        device.call()

    runs = bench.time_calls(call, device.wait, clock=device.clock)
    assert not runs.steady
    assert len(runs.warmup_samples_s) == 10


def test_the_plan_is_ordered_by_worth_and_nothing_is_twice() -> None:
    names = list(dict.fromkeys(point.name for point in FULL))
    assert names[:3] == ["kernel", "call", "matmul"]
    assert len({point.key for point in FULL}) == len(FULL)
    rows = {p.at["m"] for p in FULL if p.name == "matmul"}
    assert {1, 16, 64, 256, 1024, 16384} <= rows
    cold = [p for p in FULL if p.name == "matmul" and p.at["dtype"] == "bf16"]
    for point in cold:
        chain = links.chain_of(point, "cuda")
        once = BYTES[str(point.at["weights"])] * int(point.at["k"]) * int(point.at["n"])
        # Four times an H100's last cache lie between two uses of the same weights.
        assert chain.distinct * once > 190e6
    assert max(point.links for point in FULL if point.name != "kernel") <= 96


def test_groups_are_powers_of_two_of_the_devices() -> None:
    groups = {
        n: {p.at["group"] for p in plan(H100, n, "full") if p.name == "collective"}
        for n in (1, 2, 6, 8)
    }
    assert groups == {1: set(), 2: {2}, 6: {2}, 8: {2, 4, 8}}
    asked = [p.at["group"] for p in plan(H100, 8, "full") if p.name == "apart"]
    assert asked == sorted(asked, reverse=True)


def _one_of_each() -> list[Point]:
    """Returns a point of every benchmark and kind, three links long.

    Of one token's attention the one with the fewest caches, as long as it is.
    """
    found: dict[tuple[Any, ...], Point] = {}
    for point in FULL:
        at = point.at
        if at.get("implementation") == "cudnn" or point.name == "vector":
            continue  # one needs its library to be lowered, one takes seconds to
        kinds = (at.get(name) for name in ("kind", "by", "implementation", "dtype"))
        key = (point.name, at.get("weights"), at.get("devices"), *kinds)
        if point.name == "token":
            if at["B"] == 256:
                found.setdefault(key, point)
        elif at.get("m") == 64 or point.name != "matmul":
            found.setdefault(key, dataclasses.replace(point, links=3))
    return list(found.values())


@pytest.mark.parametrize("point", _one_of_each(), ids=str)
def test_xla_gpu_leaves_every_link_in_the_chain(point: Point) -> None:
    """Compiled for H100s that are not there, and counted."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    ours = point.name in OURS or point.at.get("by") == "triton"
    if ours and jax.__version_info__ >= (0, 12):
        pytest.skip("Pallas wants a GPU, or to be told of one")
    target = parse_target("h100:2")
    chain = links.chain_of(point, "cuda")
    mesh = chain.mesh(target.devices)
    text = chains.compile_chain(chain, mesh, target.compiler_options).as_text()
    slots, reason = bench.count(text, chain)
    assert reason is None
    wanted = {"kernel": 1, "copy": 1, "matmul": 2, "collective": 1, "apart": 9}
    if ours:  # jax 0.10 cuts the addresses out in every link
        assert slots <= 3
    else:
        assert slots == wanted.get(point.name, slots)
    if point.at.get("kind") == "all-reduce":
        # 8 KB: XLA's own kernel, unless told not to.
        own = "TRITON_ONE_SHOT" in text
        assert own == (point.at["by"] == "xla")


@pytest.mark.parametrize(
    "index",
    [
        next(i for i, p in enumerate(plan(CHIPS["cpu"], 2, "tiny")) if p.name == name)
        for name in ("kernel", "call", "read", "matmul", "collective", "attention")
    ],
)
def test_attached_devices_are_timed(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "RUN_S", 1e-3)
    _, points = bench.read(CPU)
    sample = bench.measure(points[index], CPU)
    assert sample.reason is None
    assert sample.key == points[index].key
    assert len(sample.call_samples_s) == bench.SAMPLES
    assert min(sample.call_samples_s) > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}Z", sample.time)


def test_a_chain_that_was_shortened_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Links of plain arithmetic are one kernel."""
    made = links.chain_of

    def plain(point: Point, platform: str) -> chains.Chain:
        found = made(point, platform)
        return dataclasses.replace(found, looped=False, link=lambda x, _: x * 0.5 + 1)

    monkeypatch.setattr(links, "chain_of", plain)
    point = Point(name="copy", at={"bytes": 4096}, links=8)
    sample = bench.measure(point, CPU)
    assert sample.call_samples_s == ()
    assert sample.reason == "compiled to fewer than 8 links: 1 by its hbm_bytes"


def test_what_goes_wrong_is_the_reason_of_its_point() -> None:
    point = Point(name="attention", at={"implementation": "magic"}, links=1)
    assert "KeyError: 'B'" in str(bench.measure(point, CPU).reason)


def test_described_devices_are_refused() -> None:
    pytest.importorskip("jax_plugins.xla_cuda13")
    with pytest.raises(ValueError, match=r"cannot calibrate target 'h100:2'"):
        bench.read(Ask(target="h100:2"))


def test_runs_are_drawn_when_they_ended() -> None:
    """A device that halves its clock while large products run."""
    sample = Sample(
        name="matmul",
        at={"dtype": "bf16", "weights": "bf16", "m": 4096, "k": 1000, "n": 1000},
        links=10,
        slots=2,
        calls=5,
        warmup_samples_s=(0.9, 0.06, 0.01, 0.004, 0.004),
        call_samples_s=(0.004, 0.008, 0.008),
    )
    chip = fakes.calibrated(H100, sample)
    titles = {chart.title: chart for chart in curves.charts_of(chip)}
    chart = titles["Products of many rows, as time goes on"]
    (line,) = chart.lines
    assert line.name == "4,096 rows, [1000, 1000]"
    assert [x for x, *_ in line.points] == pytest.approx([990, 1010, 1030, 1070, 1110])
    tflop = 2 * 4096 * 1e6 * 10 / 1e12
    assert [y for _, y, _ in line.points] == pytest.approx(
        [tflop / 0.004] * 3 + [tflop / 0.008] * 2
    )


def test_the_page_shows_every_curve(calibrate: Any) -> None:
    chip = load_calibrated(calibrate().path)
    titles = [chart.title for chart in curves.charts_of(chip)]
    assert titles[:2] == ["Memory", "Products in bf16: weights read"]
    assert "Attention of one token" in titles
    page = curves.page(chip)
    assert "measured on 2 x NVIDIA H100 80GB HBM3" in page
    assert page.count('class="chart"') == len(titles)
