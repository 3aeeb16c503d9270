"""Reports say what the records say, escape what they quote, and load nothing."""

import csv
import dataclasses
import html.parser
import io
import json
import math
import pathlib
import re

import pytest
from rich.console import Console

from experiments.report import (
    charts,
    folder,
    frontier,
    store,
    tables,
    terminal,
    units,
    words,
)
from experiments.report import html as html_report
from experiments.report.frontier import Objective, Question, questions
from experiments.report.record import Record
from tests import fakes

RECORDS = [fakes.evaluate(point) for point in fakes.points()]
H100, V5P = questions(RECORDS)
NONE = Objective()
NASTY = "<script>alert('&\"')</script>|evil"


def _at(user: float, chip: float, **changes) -> Record:
    """Returns a record at a place of the trade-off plot."""
    record = fakes.evaluate(fakes.point(**changes))
    return dataclasses.replace(
        record, tokens_per_s_per_user=user, tokens_per_s_per_chip=chip
    )


class TestFrontier:
    """Nothing on it is beaten, and everything off it is."""

    def test_hand_made(self) -> None:
        places = [(10, 1), (9, 5), (9, 4), (8, 5), (2, 8), (1, 8), (5, 6), (4, 3)]
        best = frontier.pareto([_at(x, y) for x, y in places])
        found = [(r.tokens_per_s_per_user, r.tokens_per_s_per_chip) for r in best]
        assert found == [(2, 8), (5, 6), (9, 5), (10, 1)]

    def test_equal_points_count_once(self) -> None:
        assert len(frontier.pareto([_at(3, 3), _at(3, 3)])) == 1

    def test_points_without_figures_are_not_on_it(self) -> None:
        assert frontier.pareto(H100.not_ok) == []

    def test_every_other_point_is_beaten(self) -> None:
        best = frontier.pareto(H100.ok)

        def place(r: Record) -> tuple[float, float]:
            return r.require("tokens_per_s_per_user"), r.require(
                "tokens_per_s_per_chip"
            )

        for record in H100.ok:
            x, y = place(record)
            beaten = any(
                a >= x and b >= y and (a, b) != (x, y) for a, b in map(place, best)
            )
            assert beaten != (record in best)


def test_objective_is_met_only_by_points_with_figures() -> None:
    objective = Objective.of_ms(ttft_ms=1000, tpot_ms=20)
    met = [r for r in H100.records if objective.met(r)]
    assert met
    assert all(r.require("ttft_s") <= 1 and r.require("tpot_s") <= 0.02 for r in met)
    assert not any(objective.met(r) for r in H100.not_ok)


def test_near_ones_are_named_with_the_winner() -> None:
    best, near, far = (_at(x, 1, batch_size=b) for x, b in ((100, 1), (96, 2), (90, 4)))
    winner = frontier.most([far, near, best], "tokens_per_s_per_user")
    assert winner is not None
    assert winner.record == best
    assert [(r, round(d, 3)) for r, d in winner.near] == [(near, 0.04)]


def test_questions_are_told_apart_and_sorted() -> None:
    assert [q.target for q in (H100, V5P)] == ["h100:8", "v5p:2x2x2"]
    assert len(H100.records) == len(V5P.records) == len(RECORDS) / 2
    batches = [r.batch_size for r in H100.records]
    assert batches == sorted(batches)
    assert H100.label(H100.records[0]) == "tp8"
    both = [fakes.evaluate(fakes.point(rules=r)) for r in ("megatron", "sequence")]
    (question,) = questions(both)
    assert question.label(both[1]) == "tp8 sequence"


def test_stored_formats_are_questions_of_their_own() -> None:
    record = H100.records[0]
    narrow = dataclasses.replace(record, weights="int8", kv="fp8")
    found = questions([record, narrow])
    assert [q.stored for q in found] == [
        "bfloat16", "bfloat16, weights int8, KV cache fp8",
    ]  # fmt: skip


@pytest.mark.parametrize("question", [H100, V5P], ids=lambda q: q.target)
def test_answer_names_the_winners(question: Question) -> None:
    for batch in question.batch_sizes:
        ok = [r for r in question.ok if r.batch_size == batch]
        ttft, tpot, rate = words.best(question, batch)
        fastest = min(ok, key=lambda r: r.require("ttft_s"))
        assert (ttft.name, ttft.figure) == (
            fastest.partition,
            units.seconds(fastest.require("ttft_s")),
        )
        assert tpot.name == min(ok, key=lambda r: r.require("tpot_s")).partition
        most = max(ok, key=lambda r: r.require("output_tokens_per_s"))
        assert rate.name == most.partition
        assert rate.limit == f"limited by {words.part_name(str(most.bottleneck))}"


def test_answer_of_nothing_is_said() -> None:
    (question,) = questions(H100.not_ok)
    assert words.headline(question) == "On h100:8 none of 5 points has an answer."
    page = html_report.page([question], Objective(ttft_s=1.0), [])
    assert "none has an answer at all" in page


@pytest.mark.parametrize(
    ("render", "value", "text"),
    [
        (units.seconds, 0.00984, "9.84 ms"),
        (units.seconds, 0.9996, "1.00 s"),
        (units.seconds, 0.0, "0 s"),
        (units.bytes_, 141_107_412_992, "141 GB"),
        (units.bytes_, 999_999, "1.00 MB"),
        (units.count, 1.5e12, "1.50 T"),
        (units.percent, 0.853, "85 %"),
    ],
)
def test_units(render, value: float, text: str) -> None:
    assert render(value) == text


def _figures(page: str) -> list[dict]:
    """Returns the charts of a page, as its script would read them."""
    found: list[dict] = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs) -> None:
            if figure := dict(attrs).get("data-figure"):
                found.append(json.loads(figure))

    Reader().feed(re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))
    return found


class TestPage:
    """The HTML report."""

    page = html_report.page([H100, V5P], Objective(ttft_s=2.0, tpot_s=0.03), ["a note"])

    def test_loads_nothing(self) -> None:
        """No tag points outside, and the page's own policy would refuse it."""
        outside: list[str] = []

        class Reader(html.parser.HTMLParser):
            def handle_starttag(self, tag, attrs) -> None:
                loads = ("src", "href", "action", "data", "srcset", "poster")
                values = [str(value) for name, value in attrs if name in loads]
                outside.extend(v for v in values if not v.startswith("#"))

        ours = re.sub(r"<script>.*?</script>", "", self.page, flags=re.DOTALL)
        Reader().feed(ours)
        assert outside == []
        assert not re.search(r"@import|url\(|https?://", ours)
        assert "default-src 'none'" in ours

    def test_holds_plotly_once(self) -> None:
        assert self.page.count("plotly.js v") == 1

    def test_opens_with_the_answer(self) -> None:
        text = re.sub(r"<(script|style)>.*?</\1>", "", self.page, flags=re.DOTALL)
        text = re.sub(r"<[^>]*>", " ", text)
        assert text.index(words.headline(H100)) < text.index(
            "Latency against throughput"
        )

    def test_has_every_chart_of_every_target(self) -> None:
        # Three over all batches; then prefill, decode and memory of each batch.
        assert len(_figures(self.page)) == 2 * (3 + 3 * 3)

    def test_names_every_turned_down_point(self) -> None:
        for record in H100.not_ok:
            assert record.reason is not None
            assert record.reason.partition(":")[0] in self.page

    def test_escapes_what_it_quotes(self) -> None:
        ok, no = H100.ok[0], H100.not_ok[0]
        records = [
            dataclasses.replace(ok, model=NASTY, partition=NASTY, rules=NASTY),
            dataclasses.replace(no, model=NASTY, partition="tp8", reason=NASTY),
        ]
        asked = questions(records)
        page = html_report.page(asked, NONE, [NASTY])
        plotly_less = re.sub(r"<script>/\*.*?</script>", "", page, flags=re.DOTALL)
        assert "<script>alert" not in plotly_less
        assert "&lt;script&gt;alert" in plotly_less
        names = [trace.get("name", "") for f in _figures(page) for trace in f["data"]]
        assert "<script>" not in "".join(names)
        assert NASTY not in tables.markdown_report(asked, NONE, [])


def test_stacked_bars_are_as_long_as_the_time() -> None:
    colour = charts.time_colours([H100])
    for name in ("ttft_parts_s", "tpot_parts_s"):
        figure = charts.time_parts(H100, 16, name, colour)
        assert figure is not None
        bars = [trace for trace in figure["data"] if trace["type"] == "bar"]
        unit_s = 1.0 if figure["layout"]["xaxis"]["ticksuffix"] == " s" else 1e-3
        totals = [
            unit_s * sum(parts) for parts in zip(*(b["x"] for b in bars), strict=True)
        ]
        records = [r for r in H100.ok if r.batch_size == 16][::-1]
        assert [b["y"] for b in bars] == [[f"{r.partition} " for r in records]] * len(
            bars
        )
        for total, record in zip(totals, records, strict=True):
            assert math.isclose(total, getattr(record, name).total_s, rel_tol=1e-4)


def test_memory_shows_what_does_not_fit() -> None:
    figure = charts.memory(H100, 16)
    assert figure is not None
    assert "dp8 " in figure["data"][0]["y"]
    assert figure["layout"]["shapes"][0]["x0"] == 80


def test_a_partition_keeps_its_colour_everywhere() -> None:
    colour = charts.colours([H100, V5P])
    assert len(set(colour.values())) == len(colour)
    for chart in (
        charts.tradeoff(H100, NONE, colour),
        charts.tradeoff(V5P, NONE, colour),
    ):
        for trace in chart["data"][1:]:
            assert trace["line"]["color"] == colour[trace["name"]]


def test_csv_has_every_point_unscaled() -> None:
    rows = list(csv.DictReader(io.StringIO(tables.csv_text([H100, V5P], NONE))))
    assert len(rows) == len(RECORDS)
    assert float(rows[0]["ttft_s"]) == H100.records[0].ttft_s
    assert {r["status"] for r in rows} == {"ok", "does not fit", "refused"}
    marked = [r for r in rows if r["on_frontier"] == "True"]
    assert len(marked) == sum(len(frontier.pareto(q.ok)) for q in (H100, V5P))


def test_markdown_tables_have_equal_rows() -> None:
    text = tables.markdown_report([H100, V5P], Objective(tpot_s=0.02), ["a note"])
    table: list[str] = []
    for line in [*text.split("\n"), ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table}) <= 1
        table = []


@pytest.mark.parametrize("width", [60, 80, 140])
def test_terminal_shows_points_frontier_and_reasons(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    terminal.show(console, H100, Objective(tpot_s=0.02))
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "A tp8" in text
    assert "B tp4_pp2" in text
    assert re.search("[\u2801-\u28ff]", text), "the frontier is drawn"
    assert "not divisible" in " ".join(text.split())
    plot = terminal.scatter(H100, width=width)
    assert all(len(line) <= width for line in plot[:-1])


def test_terminal_plots_one_point() -> None:
    (question,) = questions([fakes.evaluate(fakes.point())])
    assert "A" in "".join(line.plain for line in terminal.scatter(question, width=60))


def test_folder_is_made_from_its_records_alone(tmp_path: pathlib.Path) -> None:
    lines = [record.to_json() for record in RECORDS]
    (tmp_path / store.FILE_NAME).write_text("\n".join(lines))  # no end of line
    asked = folder.write(tmp_path, NONE)
    assert sum(len(q.records) for q in asked) == len(RECORDS) - 1
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*folder.REPORTS, store.FILE_NAME]
    )
    assert "was cut off" in (tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match="no records in"):
        folder.write(tmp_path / "empty", NONE)
