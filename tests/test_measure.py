"""Measured records hold what was seen, and a sweep on real devices loses nothing."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest
from rich.console import Console

from experiments import evaluate, timed
from experiments.evaluate import Ask
from experiments.report import folder, kept, store, tables, terminal
from experiments.report.frontier import Objective, questions
from experiments.report.record import Point, Record
from experiments.timed import How
from sharding import guard, timing
from sharding.target import parse_target

# Equal programs share what the compiler made.
pytestmark = pytest.mark.usefixtures("compile_once")

ROOT = pathlib.Path(__file__).resolve().parent.parent
ASK = Ask(
    models=("tiny",),
    targets=("cpu:2",),
    partitions=("tp1", "tp2", "pp2", "dp2"),
    batch_sizes=(2,),
    input_len=6,
    output_len=4,
)
HOW = How(repeats=3, warnings=("somebody else is here",))
PARTITIONS = ("tp1", "tp2", "pp2", "dp2")


def _points(**changes) -> list[Point]:
    points, wrong = timed.plan(dataclasses.replace(ASK, **changes), HOW)
    assert not wrong
    return points


def _point(partition: str = "tp1", **changes) -> Point:
    return next(p for p in _points(**changes) if p.partition == partition)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [timed.measure(point, HOW) for point in _points()]


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_record_is_whole(records: list[Record], partition: str) -> None:
    r = next(r for r in records if r.partition == partition)
    assert (r.status, r.origin, r.reason) == ("ok", "measured", None)
    assert Record.from_json(r.to_json()) == r
    m = r.measurement
    assert m is not None
    assert len(m.ttft_samples_s) == len(m.e2e_samples_s) == HOW.repeats
    assert r.require("ttft_s") in m.ttft_samples_s
    assert r.require("tpot_s") in m.tpot_samples_s
    assert len(m.warmup_samples_s) >= 3
    assert m.calls == (4 if partition == "pp2" else 3)
    assert "somebody else is here" in m.warnings
    assert m.peak_bytes is None
    assert m.peak_reason == "cpu devices keep no count of what is allocated"
    # One device is one chip; tp1 uses one of the two.
    assert r.num_devices == len(m.devices) == (1 if partition == "tp1" else 2)
    rate = r.batch_size * r.output_len / r.require("e2e_s")
    assert math.isclose(r.require("tokens_per_s_per_chip"), rate / r.num_chips)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_prediction_and_limit_stand_beside_it(
    records: list[Record], partition: str
) -> None:
    r = next(r for r in records if r.partition == partition)
    for name, phase in (("ttft", r.prefill), ("tpot", r.decode)):
        parts = getattr(r, f"{name}_parts_s")
        assert math.isclose(parts.total_s, r.require(f"predicted_{name}_s"))
        assert phase is not None
        share = 100 * r.require(f"{name}_limit_s") / r.require(f"{name}_s")
        assert phase.pct_of_limit == pytest.approx(share)


def test_the_same_program_is_predicted_without_running(records: list[Record]) -> None:
    points, _ = evaluate.plan(dataclasses.replace(ASK, partitions=("tp2",)))
    compiled = evaluate.evaluate(points[0])
    r = next(r for r in records if r.partition == "tp2")
    assert r.predicted_tpot_s == compiled.tpot_s
    assert r.decode is not None
    assert compiled.decode is not None
    assert r.decode.collectives == compiled.decode.collectives
    assert compiled.measurement is None


def test_points_of_a_partition_follow_each_other_and_batches_rise() -> None:
    points = _points(partitions=("pp2", "tp1"), batch_sizes=(4, 2))
    order = [(p.partition, p.batch_size) for p in points]
    assert order == [("tp1", 2), ("tp1", 4), ("pp2", 2), ("pp2", 4)]


def test_repeats_are_part_of_the_question() -> None:
    more, _ = timed.plan(ASK, dataclasses.replace(HOW, repeats=4))
    assert {p.key for p in more}.isdisjoint(p.key for p in _points())


def test_a_partition_larger_than_the_target_is_refused() -> None:
    _, wrong = timed.plan(dataclasses.replace(ASK, partitions=("tp4",)), HOW)
    assert "partition tp4 needs 4 devices; cpu:2 has 2" in wrong[0]


def test_described_devices_are_refused() -> None:
    ask = dataclasses.replace(ASK, targets=("v5p:2x2x2",), partitions=("tp1",))
    _, wrong = timed.plan(ask, HOW)
    assert "cannot time on target 'v5p:2x2x2'" in wrong[0]


def test_an_invalid_combination_is_refused() -> None:
    record = timed.measure(_point("dp2", batch_sizes=(3,)), HOW)
    assert record.status == "refused"
    assert "splits batch 3 over data=2" in str(record.reason)


def test_what_runs_out_of_memory_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def runner(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 77 bytes."
        )

    monkeypatch.setattr(timing, "runner", runner)
    record = timed.measure(_point(), HOW)
    assert (record.status, record.origin) == ("does not fit", "measured")
    assert record.require("needed_bytes") > 500_000
    assert "trying to allocate 77 bytes" in str(record.reason)
    assert Record.from_json(record.to_json()) == record


def test_another_error_of_the_device_is_no_lack_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def runner(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: an illegal instruction was met")

    monkeypatch.setattr(timing, "runner", runner)
    with pytest.raises(jax.errors.JaxRuntimeError, match="illegal instruction"):
        timed.measure(_point(), HOW)


@pytest.mark.parametrize(
    ("limit_bytes", "said"),
    [(570_000, "Too much: weights 550 kB"), (588_000, "So says the compiler: weights")],
)
def test_what_the_allocator_may_not_give_is_not_tried(
    monkeypatch: pytest.MonkeyPatch, limit_bytes: int, said: str
) -> None:
    monkeypatch.setattr(timing, "allocated_bytes", lambda *_: limit_bytes)
    record = timed.measure(_point(), HOW)
    assert record.status == "does not fit"
    assert record.available_bytes == limit_bytes
    assert said in str(record.reason)


def test_a_program_that_cannot_be_priced_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def price(*_: object) -> None:
        raise ValueError("unknown custom call 'kernel'")

    monkeypatch.setattr(evaluate, "price", price)
    r = timed.measure(_point(), HOW)
    assert (r.status, r.prefill, r.predicted_tpot_s) == ("ok", None, None)
    assert r.require("tpot_limit_s") > 0
    assert r.measurement is not None
    assert any("unknown custom call" in text for text in r.measurement.warnings)
    _report([r], tmp_path)


def test_a_peak_is_known_if_it_grew(monkeypatch: pytest.MonkeyPatch) -> None:
    target = parse_target("cpu:2")
    monkeypatch.setattr(timing, "allocated_bytes", lambda *_: 2_000_000_000)
    assert timed._peak(target, 1_000_000_000) == (2_000_000_000, None)
    peak, reason = timed._peak(target, 2_000_000_000)
    assert peak is None
    assert "at most 2.00 GB, allocated before" in str(reason)


def test_gpus_of_others_are_refused_or_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = dataclasses.replace(parse_target("cpu:2"), platform="cuda")
    monkeypatch.setattr(guard, "gpus", lambda: [])
    monkeypatch.setattr(guard, "others", lambda _: ["GPU 1 is used by process 99 (x)"])
    with pytest.raises(ValueError, match="GPU 1 is used by process 99"):
        timed._look(target, HOW)
    _, warnings = timed._look(target, dataclasses.replace(HOW, refuse=False))
    assert warnings == [
        *HOW.warnings,
        "nvidia-smi said nothing: other processes may use the GPUs",
        "GPU 1 is used by process 99 (x)",
    ]


def _report(records: list[Record], out: pathlib.Path) -> str:
    with store.Store(out) as opened:
        for record in records:
            opened.append(record)
    (question,) = folder.write(out, Objective())
    console = Console(width=120, record=True, quiet=True)
    terminal.show(console, question, Objective())
    return (out / "report.md").read_text()


def test_reports_show_measured_beside_predicted(
    records: list[Record], tmp_path: pathlib.Path
) -> None:
    text = _report(records, tmp_path)
    assert "| batch | partition | TTFT | spread | predicted | off | limit |" in text
    assert "somebody else is here" in text
    page = (tmp_path / "report.html").read_text()
    assert "as predicted" in page
    assert "measured " in page
    (question,) = questions(records)
    assert (question.num_chips, question.measured) == (2, True)
    _, rows = tables.measured(question, "tpot")
    tp1 = next(r for r in records if r.partition == "tp1")
    off = 100 * (tp1.require("tpot_s") / tp1.require("predicted_tpot_s") - 1)
    assert rows[0][5] == f"{off:+,.0f} %"


def test_reports_do_without_what_draws_the_page(
    records: list[Record], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("experiments.report.html", "experiments.report.charts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("experiments.report.html", raising=False)
    monkeypatch.setitem(sys.modules, "plotly", None)
    _report(records, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pareto.csv",
        "report.md",
        "results.jsonl",
    ]


def test_older_records_are_read(records: list[Record]) -> None:
    points, _ = evaluate.plan(dataclasses.replace(ASK, batch_sizes=(3,)))
    old = evaluate.evaluate(next(p for p in points if p.partition == "dp2"))
    fields = json.loads(old.to_json())
    for name in ("measurement", "predicted_ttft_s", "predicted_tpot_s"):
        assert fields.pop(name) is None
    assert Record.from_json(json.dumps(fields)) == old


def test_exactly_what_was_measured_has_a_measurement(records: list[Record]) -> None:
    with pytest.raises(ValueError, match="exactly what was measured has one"):
        dataclasses.replace(records[0], measurement=None)
    with pytest.raises(ValueError, match="exactly what was measured has one"):
        dataclasses.replace(records[0], origin="compiled")
    with pytest.raises(ValueError, match=r"add up to .* not 5\.0 s"):
        dataclasses.replace(records[0], predicted_tpot_s=5.0)


def test_the_command_times_profiles_and_goes_on(tmp_path: pathlib.Path) -> None:
    ask = [
        sys.executable, "-m", "experiments.measure", "--model=tiny", "--target=cpu:2",
        "--partitions=tp1", "--batch_sizes=2", "--input_len=6", "--output_len=4",
        "--repeats=2", f"--out={tmp_path / 'out'}", f"--profile={tmp_path / 'profile'}",
    ]  # fmt: skip
    first = _run(ask)
    assert "[1/1] tiny cpu:2 tp1 megatron batch 2: TTFT" in first
    assert "peak memory" in first
    names = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert names == [
        "tp1_megatron_batch2.kernels.txt",
        "tp1_megatron_batch2.trace.json.gz",
        "tp1_megatron_batch2.xplane.pb",
    ]
    file = tmp_path / "out" / store.FILE_NAME
    before = file.read_bytes()
    (record,), _ = store.read_records(tmp_path / "out")
    assert record.measurement is not None
    assert len(record.measurement.ttft_samples_s) == 2
    for phase in ("prefill", "decode"):  # what was timed can be priced again
        compiled, made = kept.read(kept.path(tmp_path / "out", record, phase))
        assert compiled.text.startswith("HloModule")
        assert made["attached"]
    # And the cut-off line of a sweep that was killed is seen.
    file.write_bytes(before + before[:-50])
    again = " ".join(_run(ask).split())
    assert "1 of 1 points are in" in again
    assert "its point is done again" in again
    assert file.read_bytes() == before


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout
