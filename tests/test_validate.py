"""Predictions beside measurements: errors are counted right, and do not move unseen."""

import csv
import dataclasses
import io
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from experiments import evaluate
from experiments.evaluate import Ask
from experiments.report import html as html_report
from experiments.report import kept, store, tables, terminal, validated, words
from experiments.report.frontier import Objective, questions
from experiments.report.measurement import Measurement
from experiments.report.record import Record
from experiments.report.validated import Figure
from experiments.validation import (
    committed,
    described,
    load,
    page,
    predict,
    summary,
)
from experiments.validation import tables as found_tables
from experiments.validation.predict import Measured
from tests import fakes

# Equal programs share what the compiler made.
pytestmark = [
    pytest.mark.usefixtures("compile_once"),
    # Said by jax 0.12 when it compiles a kernel for a GPU; see docs/performance.md.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is depr"),
]

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMITTED = validated.read(validated.PATH)
PEAKS = "published peaks"


def _figure(**changes: Any) -> Figure:
    """Returns a made-up figure, tp8 of 70B at batch 16 unless changed."""
    fields: dict[str, Any] = dict(
        metric="tpot", model="llama-3.1-70b", chip="h100", rates=PEAKS,
        partition="tp8", rules="megatron", dtypes="bfloat16", layers="unrolled",
        asked_micro_batches=None, choices="", kernels="", num_chips=8, batch_size=16,
        input_len=2048, output_len=128, measured_s=0.010, spread=0.0, predicted_s=0.008,
        recorded_s=0.009, source="somewhere",
    )  # fmt: skip
    return Figure(**{**fields, **changes})


class TestCommitted:
    """What reports, docs and this test stand on is what the code says today."""

    measured, _ = load.measured(committed.RECORDS)

    def test_is_of_every_measured_record(self) -> None:
        now = {
            (one.source, metric, one.record.require(f"{metric}_s"))
            for one in self.measured
            for metric in validated.METRICS
        }
        assert {(f.source, f.metric, f.measured_s) for f in COMMITTED} == now

    def test_predictions_have_not_moved(self) -> None:
        """Of each run's partitions the least and largest batch; --check does all."""
        by_partition: dict[tuple[str, str], list[Measured]] = {}
        for one in self.measured:
            run = one.folder.name, one.record.partition
            by_partition.setdefault(run, []).append(one)
        figures, notes = list[Figure](), list[str]()
        for group in by_partition.values():
            group.sort(key=lambda one: one.record.batch_size)
            for one in group if len(group) == 1 else (group[0], group[-1]):
                found = predict.predict(one)
                figures += found.figures
                notes += found.notes
        assert len(figures) > 3 * len(by_partition)
        # Each program is kept beside its record.
        assert {note.partition(" for described")[0] for note in notes} == {
            "Programs of 2026-11-23-h100x2 were compiled after it, from the same commit"
            " and versions,"
        }
        moved = summary.drifts(figures, COMMITTED)
        assert moved == [], "if wanted, run: python -m experiments.validate --write"

    def test_stands_in_the_docs(self) -> None:
        text = committed.PAGE.read_text()
        found = found_tables.as_markdown(COMMITTED)
        assert committed.replaced(text, "figures", found) == text

    @pytest.mark.parametrize("run", ["2026-11-23-h100x2", "2026-11-23-h100x2-kernels"])
    def test_programs_need_no_device(self, run: str) -> None:
        """Collectives are those of the programs that ran, to the last, and FLOPs.

        Other versions of jax write a few hundred FLOPs of billions otherwise.
        """
        (least,) = (
            one
            for one in self.measured
            if (one.record.partition, one.record.batch_size) == ("tp2", 1)
            and one.folder.name == run
        )
        found = described.compare(least)
        assert len(found.pairs) == 2
        for pair in found.pairs:
            assert pair.same_collectives
            assert pair.described.flops == pytest.approx(
                pair.ran.flops, rel=1e-6 if run.endswith("-kernels") else 0, abs=0
            )
        text = committed.PAGE.read_text()
        assert described.sent(found.pairs[0].ran)
        for row in described.work(found.pairs)[1]:
            assert " | ".join(row) in text


class TestErrors:
    """MAPE, worst and drift, by hand."""

    def test_closed_form(self) -> None:
        figures = [
            _figure(predicted_s=0.008),
            _figure(predicted_s=0.011, batch_size=64),
            _figure(predicted_s=0.013, partition="pp8"),
        ]
        found = {s.kind: s for s in summary.summaries(figures)}
        assert found["all"].mape == pytest.approx((0.2 + 0.1 + 0.3) / 3)
        assert found["all"].bias == pytest.approx((-0.2 + 0.1 + 0.3) / 3)
        assert found["all"].worst.partition == "pp8"
        assert found["tensor"].mape == pytest.approx(0.15)
        assert (found["tensor"].points, found["pipeline"].points) == (2, 1)

    @pytest.mark.parametrize(("moved", "is_told"), [(0.029, False), (0.031, True)])
    def test_drift_over_three_points_is_told(self, moved: float, is_told: bool) -> None:
        was = [_figure(), _figure(metric="ttft")]
        now = [_figure(predicted_s=0.01 * (0.8 - moved)), was[1]]
        told = summary.drifts(now, was)
        assert bool(told) == is_told
        if told:
            assert told[0].startswith(
                "MAPE of TPOT, all, h100, published peaks is 23.1"
            )

    def test_what_is_not_committed_is_told(self) -> None:
        told = summary.drifts([_figure(rates="measured today")], [_figure()])
        assert "1 of 1 figures are not in the committed ones" in told[0]
        assert "h100, measured today" in told[0]
        assert summary.drifts([_figure(measured_s=0.02)], [_figure()])

    def test_each_measurement_of_a_point_counts(self) -> None:
        twice = [
            _figure(measured_s=s, source=f"run, 2026-11-{day}")
            for s, day in ((0.010, 23), (0.016, 24))
        ]
        found = summary.summaries(twice)[0]
        assert (found.points, found.mape) == (2, pytest.approx((0.2 + 0.5) / 2))
        (band,) = validated.bands(twice).values()
        assert (band.low, band.high) == pytest.approx((0.25, 1.0))
        assert summary.drifts(twice, twice) == []


class TestOrder:
    """Which partition is faster, and how sure a measurement is of it."""

    def _ranking(self, *times: tuple[str, float, float, float]) -> summary.Ranking:
        (found,) = summary.rankings(
            [
                _figure(partition=p, measured_s=m, predicted_s=q, spread=spread)
                for p, m, q, spread in times
            ]
        )
        return found

    def test_right(self) -> None:
        found = self._ranking(
            ("tp8", 1, 0.8, 0), ("pp8", 3, 1.7, 0), ("tp1", 2, 1.6, 0)
        )
        assert found.agrees
        assert found.measured == found.predicted == "tp8 < tp1 < pp8"
        assert summary.agreement([found]) == (
            "1 of 1 orders agree, 3 of 3 pairs that can be told apart. To choose by"
            " prediction costs 0.0 % on average, 0.0 % at most"
        )

    def test_wrong_and_equal(self) -> None:
        found = self._ranking(("tp8", 1, 0.9, 0), ("pp8", 2, 0.8, 0))
        assert (found.agrees, found.wrong) == (False, (("tp8", "pp8"),))
        assert not self._ranking(("tp8", 1, 0.9, 0), ("pp8", 2, 0.9, 0)).agrees

    def test_regret_is_what_choosing_by_prediction_costs(self) -> None:
        """Whatever else is wrong behind the partition that is predicted best."""
        right = self._ranking(("tp8", 1, 1, 0), ("pp8", 3, 3, 0), ("tp1", 2, 4, 0))
        wrong = self._ranking(("tp8", 1, 3, 0), ("pp8", 1.5, 4, 0), ("tp1", 1.1, 2, 0))
        assert (right.agrees, right.regret) == (False, 0.0)
        assert wrong.regret == pytest.approx(0.1)
        # Of two that are predicted equal it may be the worse one.
        assert self._ranking(("tp8", 1, 1, 0), ("pp8", 2, 1, 0)).regret == 1.0
        assert summary.agreement([right, wrong]).endswith(
            " To choose by prediction costs 5.0 % on average, 10.0 % at most"
        )
        headings, rows = found_tables.orders([right, wrong])
        assert headings[-1] == "regret %"
        assert [row[-1] for row in rows] == ["0.0", "10.0"]

    def test_regret_of_throughput_is_in_chip_seconds(self) -> None:
        points = [("tp8", 8, 0.010, 0.010), ("tp4", 4, 0.015, 0.030)]
        figures = [
            _figure(metric=m, partition=p, num_chips=n, measured_s=s, predicted_s=q)
            for p, n, s, q in points
            for m in validated.METRICS
        ]
        found = {r.by: r.regret for r in summary.rankings(figures)}
        assert found["tokens/s/chip"] == pytest.approx(8 * 0.010 / (4 * 0.015) - 1)

    def test_a_tie_within_the_spread_may_go_either_way(self) -> None:
        found = self._ranking(("tp8", 1, 0.9, 0.01), ("pp8", 1.009, 0.8, 0))
        assert (found.agrees, found.pairs) == (True, 0)
        assert found.measured == "tp8 = pp8"
        assert "1 more within the measured spread" in summary.agreement([found])
        assert not self._ranking(("tp8", 1, 0.9, 0.01), ("pp8", 1.011, 0.8, 0)).agrees

    def test_throughput_counts_chips(self) -> None:
        """Half as many chips for less than twice the time."""
        points = [("tp8", 8, 0.010), ("tp4", 4, 0.015)]
        figures = [
            _figure(metric=m, partition=p, num_chips=n, measured_s=s, predicted_s=s)
            for p, n, s in points
            for m in validated.METRICS
        ]
        found = {r.by: r.measured for r in summary.rankings(figures)}
        assert found == {
            "ttft": "tp8 < tp4", "tpot": "tp8 < tp4", "tokens/s/chip": "tp4 > tp8",
        }  # fmt: skip

    def _run(self, name: str, time: str, *partitions: str, **also: Any) -> list[Figure]:
        """Returns a run whose partitions are named fastest first."""
        predicted_s = {"tp8": 1, "tp1": 2, "tp2": 3, "pp8": 4}
        return [
            _figure(
                partition=p,
                measured_s=s,
                predicted_s=predicted_s[p],
                source=f"{name}, {time}",
                **also,
            )
            for s, p in enumerate(partitions, start=1)
        ]

    def test_a_newer_run_of_the_same_partitions_supersedes(self) -> None:
        """However its programs are written, and wherever it stands."""
        written = {"kernels": "triton", "spread": 0.5}
        older = self._run("b", "2026-11-23", "pp8", "tp8")
        newer = self._run("a", "2026-11-24", "tp8", "tp1", "pp8", **written)
        for figures in (older + newer, newer + older):
            found = summary.rankings(figures)
            assert [(r.run, r.superseded) for r in found] == [("a", False), ("b", True)]
            assert summary.agreement(found) == (
                "1 of 1 orders agree, 2 of 2 pairs that can be told apart (1 more"
                " within the measured spread); with older runs 1 of 2 orders, 2 of 3"
                " pairs. To choose by prediction costs 0.0 % on average, 0.0 % at most"
            )
            headings, rows = found_tables.orders(found)
            assert headings[1] == "run"
            assert [row[1] for row in rows] == ["a", "b (older run)"]

    @pytest.mark.parametrize(
        ("partitions", "also"),
        [
            (("tp8",), {}),
            (("tp8", "pp8"), {}),
            (("tp8", "pp8", "tp2"), {}),
            (("tp8", "pp8", "tp1"), {"batch_size": 64}),
            (("tp8", "pp8", "tp1"), {"input_len": 4096}),
            (("tp8", "pp8", "tp1"), {"rules": "sequence"}),
            (("tp8", "pp8", "tp1"), {"metric": "ttft"}),
            (("tp8", "pp8", "tp1"), {"choices": "residual=plain"}),
            (("tp8", "pp8", "tp1"), {"rates": "measured today"}),
        ],
    )
    def test_a_newer_run_of_fewer_or_others_does_not(
        self, partitions: tuple[str, ...], also: dict[str, Any]
    ) -> None:
        older = self._run("older", "2026-11-23", "tp8", "tp1", "pp8")
        newer = self._run("newer", "2026-11-24", *partitions, **also)
        found = summary.rankings(older + newer)
        assert "older" in [r.run for r in found]
        assert not any(r.superseded for r in found)
        assert "older" not in summary.agreement(found)

    def test_points_that_differ_in_more_are_not_compared(self) -> None:
        assert (
            summary.rankings([_figure(), _figure(partition="pp8", input_len=1)]) == []
        )


class TestBand:
    """What a report may say of a prediction's error."""

    figures = (
        _figure(predicted_s=0.010 / 1.24, batch_size=1),
        _figure(predicted_s=0.010 / 1.31, batch_size=64),
    )
    known = validated.bands(figures)

    def _record(self, **changes: Any) -> Record:
        context = {"rates": PEAKS, **changes.pop("context", {})}
        return fakes.evaluate(fakes.point(context=context, **changes))

    def test_says_how_much_slower_and_on_what_it_stands(self) -> None:
        band = validated.band(self._record(), "tpot", self.known)
        assert band is not None
        assert band.cell("tp8") == "+24 to +31 %"
        assert band.cell("tp4") == "+24 to +31 % (tp8)"
        assert band.sentence == (
            "measured programs of this kind were 24-31 % slower on this chip: 2 points"
            " (llama-3.1-70b, tp8, batch 1 to 64, input 2,048)"
        )

    @pytest.mark.parametrize(
        ("predicted_s", "found"),
        [
            ((0.0125, 0.0125), "20 % faster"),
            ((0.0125, 0.008), "20 % faster to 25 % slower"),
        ],
    )
    def test_names_the_direction(self, predicted_s: Any, found: str) -> None:
        figures = [_figure(predicted_s=s) for s in predicted_s]
        (band,) = validated.bands(figures).values()
        assert f"were {found} on this chip" in band.sentence

    @pytest.mark.parametrize(
        "changes",
        [
            dict(chip="h200"),
            dict(partition="tp4_pp2"),
            dict(rules="sequence"),
            dict(dtype="float32"),
            dict(layers="scanned"),
            dict(context={"rates": "measured on 2 x H100"}),
            dict(context={"rates": ""}),
            dict(context={"rates": PEAKS, "choice residual": "plain"}),
        ],
    )
    def test_is_of_its_kind_alone(self, changes: dict[str, Any]) -> None:
        record = dataclasses.replace(self._record(), **changes)
        assert validated.band(record, "tpot", self.known) is None
        assert validated.band(self._record(), "ttft", self.known) is None

    def test_other_attention_is_another_program(self) -> None:
        figures = [_figure(metric="ttft", kernels="cudnn")]
        record, known = self._record(), validated.bands(figures)
        assert record.prefill is not None
        for attention, found in (("cudnn", True), ("blocks", False)):
            prefill = dataclasses.replace(record.prefill, attention=attention)
            written = dataclasses.replace(record, prefill=prefill)
            assert bool(validated.band(written, "ttft", known)) == found

    def test_stands_in_every_report(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(validated, "committed", lambda: self.known)
        (question,) = questions([self._record(), self._record(partition="pp8")])
        sentence = self.known[self.figures[0].alike].sentence
        console = Console(width=150, file=io.StringIO(), color_system=None)
        terminal.show(console, question, Objective())
        printed = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
        text = tables.markdown_report([question], Objective(), [])
        shown = html_report.page([question], Objective(), [])
        for report in (" ".join(printed.split()), text, " ".join(shown.split())):
            assert sentence in report
            assert "+24 to +31 %" in report
            assert "TTFT of tensor; TTFT and TPOT of pipeline" in report
        assert "TPOT: measured slower by +24 to +31 %" in shown
        rows = list(
            csv.DictReader(io.StringIO(tables.csv_text([question], Objective())))
        )
        assert [row["tpot_slower_points"] for row in rows] == ["2", ""]
        assert float(rows[0]["tpot_slower_high"]) == pytest.approx(0.31)

    def test_without_one_says_so_once(self) -> None:
        (question,) = questions([self._record(chip="v5p")])
        assert words.trust(question) == [
            ("error", "not validated here: nothing like it was measured.")
        ]
        headings, _ = tables.points(question, Objective())
        assert "measured slower by" not in headings

    def test_a_damaged_file_is_refused(self, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "validation.json"
        validated.write(path, self.figures, {})
        assert tuple(validated.read(path)) == self.figures
        path.write_text(path.read_text().replace('"tpot"', "7"))
        with pytest.raises(ValueError, match=r"figure\.metric is 7.*--write"):
            validated.read(path)


def _measured(record: Record, **changes: Any) -> Record:
    """Returns `record` as if it had been timed, as fast as it was predicted."""
    measurement = Measurement(
        engine="jaxllm", devices=("cpu", "cpu"), driver=None, calls=3,
        warmup_samples_s=(), ttft_samples_s=(), e2e_samples_s=(), tpot_samples_s=(),
        ttft_spread=0.01, tpot_spread=0.01, ttft_drift=1.0, tpot_drift=1.0,
        held_bytes=None, peak_bytes=None, peak_reason="none", devices_before=(),
        devices_busy=(), settings={}, warnings=(),
    )  # fmt: skip
    fields: dict[str, Any] = dict(
        origin="measured",
        measurement=measurement,
        predicted_ttft_s=record.ttft_s,
        predicted_tpot_s=record.tpot_s,
    )
    return dataclasses.replace(record, **{**fields, **changes})


def _folder(path: pathlib.Path, *records: Record) -> pathlib.Path:
    path.mkdir(parents=True)
    (path / store.FILE_NAME).write_text("".join(f"{r.to_json()}\n" for r in records))
    return path


class TestRecords:
    """Which records count, and what is said of a folder without any."""

    made_up = fakes.evaluate(fakes.point())

    def test_every_measurement_counts(self, tmp_path: pathlib.Path) -> None:
        record = _measured(self.made_up)
        later = dataclasses.replace(
            record,
            key="later",
            provenance=dataclasses.replace(record.provenance, time="2026-02-02"),
        )
        _folder(tmp_path / "b", record)
        _folder(tmp_path / "a", later, self.made_up)
        found, notes = load.measured(tmp_path)
        assert [one.record for one in found] == [later, record]
        assert found[0].source == "a, 2026-02-02"
        assert notes == []

    def test_nothing_to_validate_is_refused(self, tmp_path: pathlib.Path) -> None:
        with pytest.raises(ValueError, match=r"no such folder.*experiments\.measure"):
            load.measured(tmp_path / "missing")
        with pytest.raises(ValueError, match=r"0 files called results\.jsonl"):
            load.measured(tmp_path)
        _folder(tmp_path / "a", self.made_up)
        with pytest.raises(ValueError, match="0 of 1 records are measured"):
            load.measured(tmp_path)

    def test_another_schema_is_refused(self, tmp_path: pathlib.Path) -> None:
        folder = _folder(tmp_path / "a", _measured(self.made_up))
        file = folder / store.FILE_NAME
        file.write_text(file.read_text() + '{"schema": 2}\n')
        with pytest.raises(ValueError, match=r"line 2 of .* schema 2 was found"):
            load.measured(tmp_path)

    def test_unknown_devices_are_refused(self, tmp_path: pathlib.Path) -> None:
        record = _measured(self.made_up)
        record = dataclasses.replace(record, target="attached", num_devices=8)
        with pytest.raises(ValueError, match=r"ran on 8 x cpu, .* h100, h200"):
            predict.predict(Measured(record=record, folder=tmp_path))


@pytest.fixture(scope="module")
def tiny() -> Record:
    """A record of a real program, made up to be measured."""
    points, wrong = evaluate.plan(
        Ask(
            models=("tiny",),
            targets=("cpu:2",),
            partitions=("tp2",),
            batch_sizes=(2,),
            input_len=6,
            output_len=4,
            layers="scanned",
        )
    )
    assert not wrong
    return _measured(evaluate.evaluate(points[0]))


def _keep(one: Measured) -> None:
    """Keeps the programs of a record beside it, as they are when they are timed."""
    compiler = predict.AsMeasured(one, "cpu")
    point = predict.point_of(one.record, compiler.name)
    target = compiler.target(point)
    for phase, program in evaluate.programs(point, target, compiler).items():
        compiled = compiler.compile(program, target)
        file = kept.path(one.folder, one.record, phase)
        kept.write(file, compiled, {"attached": True})
        read, made = kept.read(file)
        assert read == dataclasses.replace(compiled, executable=None)
        assert made == {"attached": True}


class TestAgain:
    """A program is priced as it was kept, or written again."""

    def test_kept_or_compiled_it_is_the_same(
        self, tiny: Record, tmp_path: pathlib.Path
    ) -> None:
        one = Measured(record=tiny, folder=tmp_path)
        again = predict.predict(one)
        assert [f.difference for f in again.figures] == [0.0, 0.0]
        assert "today's code wrote them again" in again.notes[0]
        _keep(one)
        from_kept = predict.predict(one)
        assert from_kept.figures == again.figures
        assert from_kept.notes == ()
        file = kept.path(tmp_path, tiny, "decode")
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(ValueError, match=r"cannot read .*_decode_.*Restore it"):
            predict.predict(one)

    def test_what_needs_its_devices_is_left_out(
        self, tiny: Record, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sharding.program.refusal", lambda *_: None)
        assert tiny.prefill is not None
        record = dataclasses.replace(
            tiny, prefill=dataclasses.replace(tiny.prefill, attention="cudnn")
        )
        found = predict.predict(Measured(record=record, folder=tmp_path))
        assert [f.metric for f in found.figures] == ["tpot"]
        assert "ran with attention 'cudnn', which is not compiled" in found.notes[0]


def test_page_loads_nothing_and_escapes() -> None:
    nasty = "<script>alert('&\"')</script>"
    figures = [
        _figure(metric=m, batch_size=b, rules=nasty, model=nasty, source=nasty)
        for m in validated.METRICS
        for b in (1, 16)
    ]
    text = page.page(figures, [nasty], fakes.MADE)
    ours = re.sub(r"<script>/\*.*?</script>", "", text, flags=re.DOTALL)
    assert "<script>alert" not in ours
    assert not re.search(r"@import|url\(|https?://", ours)
    assert ours.count('class="chart"') == 4
    assert found_tables.percent(-0.2) == "-20.0 %"


def test_the_command_answers(tiny: Record, tmp_path: pathlib.Path) -> None:
    records = _folder(tmp_path / "records", tiny)
    _keep(Measured(record=tiny, folder=records))
    command = [
        sys.executable, "-m", "experiments.validate", f"--records={records}",
        f"--out={tmp_path / 'out'}", f"--json={tmp_path / 'found.json'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "TTFT is predicted with a mean error of 0.0 %" in " ".join(
        done.stdout.split()
    )
    assert (tmp_path / "out" / "validation.html").is_file()
    found = json.loads((tmp_path / "found.json").read_text())
    assert [f["difference_percent"] for f in found["figures"]] == [0.0, 0.0]
