"""Every verdict follows from its rows, and flips when they do."""

import dataclasses
import functools
import html
import json
import pathlib
import re
from typing import Any

import pytest
from rich.console import Console

from experiments.claims import (
    depth,
    findings,
    folder,
    latency,
    measured,
    page,
    points,
    questions,
    rows,
    sweep,
    throughput,
    timed,
)
from experiments.claims.accounting import account, ideal_ttft_s, power_of_two
from experiments.claims.claims import CLAIMS, CROSSOVERS
from experiments.claims.judge import DEPENDS, FAILS, HOLDS, UNKNOWN
from experiments.claims.printed import (
    CASES,
    CHIPS,
    LONG_70B,
    LONG_405B,
    Case,
)
from experiments.claims.programs import priced_as
from experiments.claims.rows import LINKS, MEMORY, RUN, Row, Rows
from experiments.report import validated
from experiments.report.record import PhaseRecord, Record
from experiments.report.store import FILE_NAME, Store, read_records
from experiments.report.workers import Workers
from jaxllm.config import load
from sharding.chips import CHIPS as CHIP_FILES
from sharding.layout import Layout
from sharding.partition import Partition, Workload
from sharding.program import Program
from tests import fakes

ROOT = pathlib.Path(__file__).resolve().parent.parent
MEASURED = ROOT / "docs/records/2026-11-24-h100x2-last"
KEPT = sorted((ROOT / "docs/records").glob("*-paper"))


def row(
    case: Case, chip: str, partition: str, batch: int, ttft: float, tpot: float, **also
) -> Row:
    """Returns a made-up row that took so long; `also` changes its fields."""
    fields: dict[str, Any] = dict.fromkeys(f.name for f in dataclasses.fields(Row))
    links = fields["links"] = also.get("links")
    memory = also.get("memory", "own")
    parts = {"compute": 0.4 * ttft, "hbm": 0.4 * ttft, "tensor links": 0.2 * ttft}
    fields |= dict(
        key=f"{case.name}-{chip}-{partition}-{batch}-{links}-{memory}",
        origin="compiled", whole=False, status="ok",
        model=case.model, target="h100:8", chip=chip,
        memory=memory, rates="published peaks",
        choices="", num_chips=Partition.parse(partition).num_devices,
        partition=partition, rules="megatron", dtype="bfloat16", weights=case.weights,
        kv=case.kv, batch_size=batch, input_len=case.input_len,
        output_len=case.output_len, needed_bytes=10**9, available_bytes=10**10,
        ttft_s=ttft, tpot_s=tpot, ttft_parts_s=parts,
        tpot_parts_s={"hbm": 0.4 * tpot, "tensor links": 0.6 * tpot},
    )  # fmt: skip
    return Row(**{**fields, **also})


def found(judge, *made: Row) -> str:
    return judge(Rows(made)).verdict


def _everywhere(case: Case, *points: tuple[Any, ...], **also: Any) -> list[Row]:
    return [row(case, chip, *point, **also) for chip in CHIPS for point in points]


def test_nothing_is_known_without_rows() -> None:
    for claim in (*CLAIMS, *CROSSOVERS):
        finding = claim.judge(Rows([]))
        # Its closed forms need none.
        assert claim.name == "C11" or finding.verdict == UNKNOWN


@pytest.mark.parametrize(
    ("judge", "case", "others"),
    [
        (latency.c1, LONG_70B, {"tp4": (1.87, 1.67)}),
        (latency.c2, LONG_70B, {"tp2": (3.61, 3.01)}),
        (
            latency.c3,
            LONG_405B,
            {"tp4": (1.89, 1.61), "tp4_pp2": (1.90, 1.62), "tp2": (3.67, 2.81)},
        ),
    ],
    ids=["C1", "C2", "C3"],
)
def test_speedups_hold_within_a_tenth(judge, case: Case, others) -> None:
    fast = ("tp8", 256, 10.0, 0.02)
    slow = [(p, 256, 10.0 * a, 0.02 * b) for p, (a, b) in others.items()]
    right = _everywhere(case, fast, *slow)
    assert found(judge, *right) == HOLDS
    # A fifth more in decode is another number, in the same order.
    off = [dataclasses.replace(r, tpot_s=0.8 * (r.tpot_s or 0)) for r in right[1:]]
    assert found(judge, *_everywhere(case, fast), *[
        r for r in off if r.partition != "tp8"
    ]) == FAILS  # fmt: skip
    one = [row(case, "h100", p, 256, 10.0, 0.02) for p, *_ in slow]
    assert found(judge, *right, *one) == DEPENDS


def test_c4_needs_tp8_to_be_best_in_both() -> None:
    tp8, pp8 = ("tp8", 32, 10.0, 0.02), ("pp8", 32, 11.0, 0.05)
    assert found(latency.c4, *_everywhere(LONG_70B, tp8, pp8)) == HOLDS
    pp8 = ("pp8", 32, 9.0, 0.05)
    assert found(latency.c4, *_everywhere(LONG_70B, tp8, pp8)) == FAILS
    some = [row(LONG_70B, "h100", *tp8), row(LONG_70B, "h100", "pp8", 32, 11, 0.05)]
    assert found(latency.c4, *_everywhere(LONG_405B, tp8, pp8), *some) == DEPENDS


def test_c5_needs_prefill_to_scale_and_decode_to_wait() -> None:
    narrow, wide = ("tp2", 32, 40.0, 0.05), ("tp8", 32, 11.0, 0.02)
    assert found(latency.c5, *_everywhere(LONG_70B, narrow, wide)) == HOLDS
    wide = ("tp8", 32, 20.0, 0.02)
    assert found(latency.c5, *_everywhere(LONG_70B, narrow, wide)) == FAILS


def test_c6_needs_tp2_to_be_slower_than_one_device() -> None:
    times = [("tp1", 100.0), ("tp2", 110.0), ("tp4", 62.0), ("tp8", 32.0)]
    made = _everywhere(LONG_405B, *((p, 32, s, 0.1) for p, s in times))
    assert found(latency.c6, *made) == HOLDS
    made = [dataclasses.replace(r, ttft_s=min(r.ttft_s or 0, 99)) for r in made]
    assert found(latency.c6, *made) == FAILS


def test_c7_needs_shares_within_five_points() -> None:
    made = _everywhere(LONG_70B, *((p, 256, 10.0, 0.1) for p in ("tp2", "tp4", "tp8")))
    assert found(latency.c7, *made) == HOLDS
    parts = {"compute": 7.0, "tensor links": 3.0}
    other = [
        dataclasses.replace(r, ttft_parts_s=parts) if r.partition == "tp8" else r
        for r in made
    ]
    assert found(latency.c7, *other) == FAILS


def test_c8_needs_a_third_of_ttft_in_links() -> None:
    slow = _everywhere(LONG_405B, ("tp8", 32, 10.0, 0.1), links=1.0)
    fast = _everywhere(LONG_405B, ("tp8", 32, 6.6, 0.1), links=2.0)
    assert found(latency.c8, *slow, *fast) == HOLDS
    fast = _everywhere(LONG_405B, ("tp8", 32, 9.0, 0.1), links=2.0)
    assert found(latency.c8, *slow, *fast) == FAILS


def test_c9_needs_hops_under_half_a_percent() -> None:
    made = _everywhere(LONG_405B, ("pp8", 512, 10.0, 0.1), links=0.2)
    assert found(latency.c9, *made) == HOLDS
    parts = {"compute": 9.9, "stage links": 0.1}
    made = [dataclasses.replace(r, ttft_parts_s=parts) for r in made]
    assert found(latency.c9, *made) == FAILS


def test_c10_needs_the_pipeline_to_be_ahead_at_every_batch() -> None:
    ahead = [("pp8", b, 8.0, 0.1) for b in (32, 256)]
    behind = [("tp8", b, 10.0, 0.1) for b in (32, 256)]
    assert found(throughput.c10, *_everywhere(LONG_70B, *ahead, *behind)) == HOLDS
    behind[1] = ("tp8", 256, 7.0, 0.1)
    assert found(throughput.c10, *_everywhere(LONG_70B, *ahead, *behind)) == DEPENDS
    assert found(throughput.c10, *_everywhere(LONG_70B, ahead[1], behind[1])) == FAILS


def test_c10_counts_replicas_on_devices_left_over() -> None:
    one = row(LONG_70B, "h100", "tp2", 32, 10.0, 0.1)
    whole = row(LONG_70B, "h100", "tp8", 32, 10.0, 0.1)
    assert one.node_tokens_per_s == pytest.approx(4 * whole.node_tokens_per_s)


def test_c11_takes_every_groups_cache() -> None:
    finding = throughput.c11(Rows([]))
    assert finding.verdict == FAILS
    # On the paper's chip the printed limits come out with one group's cache alone.
    assert {c.chip for c in finding.cells if c.direction} == {"mi355x"}
    (cell,) = (c for c in finding.cells if c.chip == "mi355x")
    assert "tp1 32 a group with every group's cache and 32 with its own" in cell.text
    assert "pp8 64 a group with every group's cache and 512 with its own" in cell.text


def test_c12_needs_the_memory_to_be_there() -> None:
    alone = ("tp1", 32, 10.0, 0.036)
    deep = ("pp8", 4096, 160.3, 0.1526)
    times = [LONG_405B.output_len - 1]
    made = _everywhere(LONG_405B, alone, deep)
    finding = throughput.c12(Rows(made))
    e2e = [r.require("ttft_s") + times[0] * r.require("tpot_s") for r in made[:2]]
    gain = 16 * e2e[0] / e2e[1]
    printed = [c for c in finding.cells if c.subject.endswith("as printed")]
    assert all(f"throughput {gain:.2f}x" in c.text for c in printed)
    wanting = _everywhere(LONG_405B, deep, memory="any")
    cells = throughput.c12(Rows([*_everywhere(LONG_405B, alone), *wanting])).cells
    assert not any(c.holds for c in cells)
    assert any(c.assumes_memory for c in cells)


def test_c13_compares_with_one_sequence_a_device() -> None:
    alone = row(LONG_70B, "h100", "tp1", 1, 1.0, 0.01)
    e2e_s = 1.0 + 0.01 * (LONG_70B.output_len - 1)
    # A thousandfold batch on eight devices, not one, in 1024 / 8 / 4.2 the time.
    deep = row(LONG_70B, "h100", "pp8", 1024, e2e_s * 1024 / 8 / 4.2 - 1e-6, 1e-9)
    assert found(throughput.c13, alone, deep) == HOLDS
    worse = dataclasses.replace(deep, ttft_s=2 * deep.require("ttft_s"))
    assert found(throughput.c13, alone, worse) == FAILS


def test_c14_needs_latency_and_throughput_to_rise_with_stages() -> None:
    names = ("tp8", "tp4_pp2", "tp2_pp4", "pp8")
    good = [(n, 256, 100.0 - 20 * i, 0.02 + 0.01 * i) for i, n in enumerate(names)]
    assert found(throughput.c14, *_everywhere(LONG_70B, *good)) == HOLDS
    bad = [(n, 256, 100.0, 0.02 + 0.01 * i) for i, n in enumerate(names)]
    assert found(throughput.c14, *_everywhere(LONG_70B, *bad)) == FAILS


def test_crossovers_are_found_where_they_are() -> None:
    def made(last: float) -> list[Row]:
        return _everywhere(
            LONG_405B,
            ("tp8", 1, 1.0, 0.01), ("tp4_pp2", 1, 1.1, 0.02),
            ("tp8", 256, 100.0, 0.1), ("tp4_pp2", 256, last, 0.1),
            ("pp8", 1, 1.2, 0.06), ("pp8", 256, last, 0.1),
        )  # fmt: skip

    for judge in (throughput.hybrid_overtakes, throughput.tensor_or_pipeline):
        assert found(judge, *made(50.0)) == HOLDS
        assert found(judge, *made(150.0)) == FAILS


def test_what_is_short_of_memory_is_marked() -> None:
    made = [
        dataclasses.replace(r, memory="any", needed_bytes=10**12)
        for r in _everywhere(LONG_70B, ("tp8", 256, 10.0, 0.02), ("tp4", 256, 19, 0.03))
    ]
    finding = latency.c1(Rows(made))
    assert all(c.assumes_memory for c in finding.cells)
    assert "†" in finding.because


class TestAccounting:
    """Closed forms of memory, against the paper's and against the programs'."""

    def test_full_pipelines_need_what_the_paper_left_out(self) -> None:
        # 8 groups of 512 sequences of 10,112 positions, 8 bits: 10.7 TB in a node.
        found = account(LONG_405B, CHIP_FILES["mi355x"], "pp8")
        assert 8 * 8 * 512 * found.sequence_bytes == pytest.approx(10.69e12, rel=1e-3)
        free = 8 * (CHIP_FILES["mi355x"].hbm_bytes - found.weights_bytes)
        assert free == pytest.approx(2.27e12, rel=0.01)

    def test_every_partition_of_a_node_holds_as_many(self) -> None:
        for case in CASES:
            held = {
                account(case, CHIP_FILES["h200"], name).sequences
                for name in ("tp8", "tp4_pp2", "tp2_pp4", "pp8")
            }
            assert len(held) == 1

    @pytest.mark.parametrize("name", ["tp1", "tp8", "tp4_pp2", "pp8", "tp2"])
    @pytest.mark.parametrize("case", [LONG_70B, LONG_405B], ids=lambda c: c.name)
    def test_is_what_programs_hold(self, case: Case, name: str) -> None:
        layout = Layout(
            config=load(case.model),
            partition=Partition.parse(name),
            workload=Workload(
                batch_size=64, input_len=case.input_len, output_len=case.output_len
            ),
            layers="scanned",
        )
        bf16 = dataclasses.replace(case, weights="bfloat16", kv="bfloat16")
        closed = account(bf16, CHIP_FILES["mi355x"], name)
        held = layout.device_bytes(layout.named_state().cache)
        # Positions in pieces of 128; stages filled up to the longest.
        assert held == pytest.approx(64 * closed.sequence_bytes, rel=0.03)
        held = layout.device_bytes(layout.named_params())
        assert held == pytest.approx(closed.weights_bytes, rel=0.03)

    def test_eight_bit_products_bring_back_what_the_paper_saw(self) -> None:
        chip = CHIP_FILES["mi355x"]

        def ttft_s(tensor: int, dtype: str = "fp8", links: float = 1) -> float:
            return ideal_ttft_s(LONG_405B, chip, tensor, 32, dtype=dtype, links=links)

        # 2 x 403e9 x 32 x 9428 and attention, at 5,033 TFLOP/s.
        assert ttft_s(1) == pytest.approx(50.6, rel=0.01)
        # 252 all-reduces of 9.89 GB over one link of 76.8 GB/s, half the work each.
        assert ttft_s(2) - ttft_s(1) / 2 == pytest.approx(32.4, rel=0.01)
        assert ttft_s(2) > ttft_s(1)
        assert ttft_s(2, "bf16") < ttft_s(1, "bf16")
        assert ttft_s(8, links=2) / ttft_s(8) == pytest.approx(0.72, abs=0.01)

    def test_powers_of_two(self) -> None:
        assert [power_of_two(n) for n in (0, 1, 31, 32, 870)] == [0, 1, 16, 32, 512]


class TestPrograms:
    """One program answers for many chips, and is compiled once."""

    def test_links_and_memory_are_the_points(self) -> None:
        chip = CHIP_FILES["mi325x"]
        point = fakes.point(context={LINKS: "0.2", MEMORY: "any"})
        priced = priced_as(chip, point)
        assert priced.link_bytes_per_s == pytest.approx(0.2 * chip.link_bytes_per_s)
        assert priced.hbm_bytes > 100 * chip.hbm_bytes
        assert priced_as(chip, fakes.point()) == chip

    def test_is_compiled_once(
        self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        point = fakes.point(
            model="tiny-tied@2", target="cpu:2", chip="h100", partition="tp2",
            num_chips=2, num_devices=2, batch_size=2, input_len=5, output_len=3,
            dtype="float32", layers="unrolled", context={MEMORY: "any"},
        )  # fmt: skip
        asked = [
            dataclasses.replace(point, model=model, chip=chip, context=context)
            for model in ("tiny-tied@2", "tiny-tied@4", "tiny-tied")
            for chip, context in (
                ("h100", point.context),
                ("mi325x", {**point.context, LINKS: "0.001"}),
            )
        ]
        compiled = []
        original = Program.compile
        monkeypatch.setattr(
            Program, "compile",
            lambda self, target: compiled.append(self) or original(self, target),
        )  # fmt: skip
        job = points.Job(points=tuple(asked), folder=tmp_path)
        first = points.answer(job)
        assert first[1].require("ttft_s") > first[0].require("ttft_s")
        assert len(compiled) == 6, "both phases, at three depths, for both chips"
        again = points.answer(job)
        assert len(compiled) == 6, "all are on disk"
        assert [Row.of(r) for r in again] == [Row.of(r) for r in first]

        # Two and four layers say what the program of all eight is.
        made = [r for r in depth.rows_of(first) if r.chip == "mi325x"]
        (carried,) = (r for r in made if not r.whole)
        (whole,) = (r for r in made if r.whole)
        assert carried.twin == whole.twin
        assert (carried.model, whole.memory) == ("tiny-tied", "own")
        for name in ("ttft_s", "tpot_s", "needed_bytes"):
            assert carried.require(name) == pytest.approx(whole.require(name), rel=1e-3)
        assert carried.decode is not None
        assert whole.decode is not None
        assert carried.decode.hbm_bytes == whole.decode.hbm_bytes
        assert carried.decode.wire_bytes == whole.decode.wire_bytes


def _record(name: str, batch: int, **also: Any) -> Record:
    record = fakes.evaluate(fakes.point(partition=name, batch_size=batch, **also))
    assert record.status == "ok"
    return record


def _needs(record: Record, peak_bytes: int, activations_bytes: int = 0) -> Record:
    """Returns `record` with programs that hold so much."""

    def phase(of: PhaseRecord | None) -> PhaseRecord:
        assert of is not None
        memory = dataclasses.replace(
            of.memory, peak_bytes=peak_bytes, activations_bytes=activations_bytes
        )
        return dataclasses.replace(of, memory=memory)

    return dataclasses.replace(
        record,
        needed_bytes=peak_bytes,
        prefill=phase(record.prefill),
        decode=phase(record.decode),
    )


def test_temporaries_do_not_shrink_with_depth() -> None:
    first, second = (
        _record("tp8", 16, model=f"llama-3.1-70b@{n}", context={MEMORY: "any"})
        for n in (2, 4)
    )
    # Arrays of 100 MB a layer; fewer temporaries at four layers than at two.
    (row,) = depth.rows_of(
        [
            _needs(first, 800_000_000, 600_000_000),
            _needs(second, 900_000_000, 500_000_000),
        ]
    )
    assert row.needed_bytes == 80 * 100_000_000 + 500_000_000


def test_what_fits_is_decided_at_full_depth() -> None:
    shallow = [
        _record("tp8", 16, model=f"llama-3.1-70b@{n}", context={MEMORY: "any"})
        for n in (2, 4)
    ]
    # 0.1 and 2.1 GB: 78.1 at eighty layers, of the 85.0 of an H100.
    small = _needs(shallow[0], 100_000_000)
    large = _needs(shallow[1], 2_100_000_000)
    (fits,) = depth.rows_of([large, small])
    assert fits.needed_bytes == 78_100_000_000
    assert (fits.status, fits.memory, fits.model) == ("ok", "own", "llama-3.1-70b")
    large = _needs(large, 2_300_000_000)
    not_there, would = depth.rows_of([small, large])
    assert (not_there.status, not_there.memory) == ("does not fit", "own")
    assert "needs 85.9 GB a device, has 85" in str(not_there.reason)
    assert (would.status, would.memory) == ("ok", "any")
    assert would.key != not_there.key
    assert depth.rows_of([small]) == [], "half a program says nothing"


def test_a_row_is_the_same_from_another_run() -> None:
    record = _record("tp8", 16)
    later = dataclasses.replace(
        record, provenance=dataclasses.replace(record.provenance, commit="1" * 40)
    )
    assert Row.of(later).to_json() == Row.of(record).to_json()
    assert Row.from_json(Row.of(record).to_json()).key == Row.of(record).key
    faster = _record("tp8", 16, context={LINKS: "2.0"})
    assert Row.of(faster).key != Row.of(record).key


def test_rows_do_not_depend_on_their_order(tmp_path: pathlib.Path) -> None:
    records = [_record(name, b) for b in (1, 16) for name in ("tp8", "pp8")]
    folder.keep(tmp_path / "a", records)
    folder.keep(tmp_path / "b", records[::-1])
    texts = [(tmp_path / x / rows.FILE_NAME).read_bytes() for x in "ab"]
    assert texts[0] == texts[1]
    assert json.loads((tmp_path / "a" / folder.MADE_BY).read_text())


def test_a_sweep_goes_on_where_it_was(tmp_path: pathlib.Path) -> None:
    jobs = [points.Job(points=(p,), folder=tmp_path) for p in fakes.points()[:3]]
    console = Console(quiet=True)
    with Workers(1, fakes.no_setup) as workers:
        with Store(tmp_path) as store:
            assert not sweep.sweep(jobs[:1], fake_answer, store, workers, console)
        with Store(tmp_path) as store:
            assert not sweep.sweep(jobs, fake_answer, store, workers, console)
    assert len(read_records(tmp_path)[0]) == 3, "none was done twice"


def fake_answer(job: points.Job) -> list[Record]:
    """Stands in for `points.answer`, in a worker process."""
    return [fakes.evaluate(point) for point in job.points]


def _some_rows() -> Rows:
    made = _everywhere(
        LONG_70B,
        *((p, 256, 10.0, 0.02) for p in ("tp8", "tp4", "tp2", "pp8", "tp4_pp2")),
    )
    made += _everywhere(LONG_405B, ("tp8", 32, 10.0, 0.1), links=1.0)
    return Rows([*made, *_measured()])


@functools.cache
def _measured() -> list[Row]:
    """Returns rows of the committed runs, their predictions as they were recorded."""
    return [
        Row.of(
            dataclasses.replace(
                one.record, context={**one.record.context, RUN: one.folder.name}
            )
        )
        for one in timed.find(ROOT / "docs/records")
    ]


def test_measurements_stand_beside_predictions() -> None:
    made = _some_rows()
    judges = (
        latency.c4, latency.c5, latency.c7, latency.c9, throughput.c10, throughput.c14
    )  # fmt: skip
    for judge in judges:
        cells = judge(made).measured
        assert cells
        assert all(r.origin == "measured" for c in cells for r in c.rows)
        assert len({(c.subject, *c.keys) for c in cells}) == len(cells)


def test_partitions_are_compared_within_a_run() -> None:
    one = _measured()
    for judge in (measured.c4, measured.c5, measured.c10, measured.c14):
        for cell in judge(Rows(one)):
            a, b = cell.rows
            assert (a.run, a.choices, a.input_len) == (b.run, b.choices, b.input_len)
    # Runs of other days, prompts or kernels leave what is said of this one alone.
    few = [row for row in one if row.run == MEASURED.name]
    others = [
        dataclasses.replace(row, **change, ttft_s=1e-3)
        for row in few
        for change in ({"run": "other"}, {"input_len": 2}, {"choices": "overlap=rows"})
        if row.partition == "tp1"
    ]
    assert measured.c5(Rows([*others, *few, *others])) == measured.c5(Rows(few)) != []
    assert len({row.key for row in one}) == len(one)


def test_of_one_question_the_newest_run_counts(tmp_path: pathlib.Path) -> None:
    records, _ = read_records(MEASURED)
    of = {(r.partition, r.batch_size): r for r in records}

    def runs(*times_and_partitions: tuple[str, str, list[str]]) -> set[str]:
        for name, time, partitions in times_and_partitions:
            with Store(tmp_path / name) as store:
                for partition in partitions:
                    made = of[partition, 64]
                    provenance = dataclasses.replace(made.provenance, time=time)
                    store.append(dataclasses.replace(made, provenance=provenance))
        return {one.folder.name for one in timed.find(tmp_path)}

    old = ("z", "2026-11-24T01:00:00Z", ["tp1", "tp2"])
    assert runs(old) == {"z"}
    assert runs(("y", "2026-11-24T02:00:00Z", ["tp1"])) == {"z", "y"}
    newest = ("a", "2026-11-24T03:00:00Z", ["tp1", "tp2", "pp2"])
    assert runs(newest) == {"a"}


def test_what_was_timed_is_predicted_by_todays_rates() -> None:
    found = [
        one
        for one in timed.find(ROOT / "docs/records")
        if one.folder == MEASURED and one.record.partition == "tp2"
    ]
    record = timed.answer(found[0])
    figures = validated.read(validated.PATH)
    for metric in ("ttft", "tpot"):
        (figure,) = (
            f for f in figures
            if f.source == found[0].source and f.metric == metric
            and not f.rates.startswith("published")
        )  # fmt: skip
        predicted = record.require(f"predicted_{metric}_s")
        assert predicted == pytest.approx(figure.predicted_s, rel=0.03)
        parts = getattr(record, f"{metric}_parts_s")
        assert parts.total_s == predicted
    assert record.ttft_s == found[0].record.ttft_s


def test_folders_without_measurements_are_passed_over(tmp_path: pathlib.Path) -> None:
    with Store(tmp_path / "swept") as store:
        store.append(fakes.evaluate(fakes.points()[0]))
    assert timed.find(tmp_path) == []
    with (tmp_path / "swept" / FILE_NAME).open("a") as file:
        file.write('{"schema": 1}\n')
    with pytest.raises(ValueError, match=FILE_NAME):
        timed.find(tmp_path)


def test_page_shows_every_claim_and_question() -> None:
    made = _some_rows()
    text = page.page(made, (("date",), [["today"]]))
    for claim in (*CLAIMS, *CROSSOVERS):
        assert f'id="{claim.name}"' in text
    for answer in questions.answers(made):
        assert answer.question in html.unescape(text)
    keys = set(re.findall(r'href="#row-([^"]+)"', text))
    assert keys <= set(re.findall(r'id="row-([^"]+)"', text)), "every row is there"
    assert keys


def test_page_and_findings_are_safe_to_show() -> None:
    evil = '<script>alert("x")</script>|'
    made = [
        dataclasses.replace(r, reason=evil, chip="h100", status="does not fit",
                            ttft_s=None, tpot_s=None)
        for r in _everywhere(LONG_70B, ("tp8", 256, 10.0, 0.02))
    ]  # fmt: skip
    text = page.page(Rows(made), (("date",), [[evil]]))
    assert evil not in text
    assert "&lt;script&gt;" in text
    for table in re.findall(r"(?:^\|.*\n)+", findings.text(Rows(made), "docs/x"), re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.name)
def test_findings_are_what_the_rows_say(kept: pathlib.Path) -> None:
    text = (ROOT / "docs/findings.md").read_text()
    name = f"docs/records/{kept.name}"
    if name not in text:
        pytest.skip("made from a later run")
    assert text == findings.text(folder.read_rows(kept), name)
