"""Records as rows: the tables every report shows, CSV for others, and Markdown.

A table is `(headings, rows)` of finished strings; terminal, Markdown and HTML
lay out the same ones. CSV keeps full precision and unscaled units.
"""

import csv
import io
import re
from collections.abc import Sequence

from experiments.report import units, validated, words
from experiments.report.frontier import Objective, Question, pareto
from experiments.report.record import PhaseRecord, Record

Table = tuple[Sequence[str], list[list[str]]]
_DATED = re.compile(r"\d{4}-\d\d-\d\d")

_CSV_FIELDS = (
    "model", "target", "chip", "num_chips", "partition", "rules", "dtype", "weights",
    "kv", "layers", "batch_size", "input_len", "output_len", "micro_batches", "status",
    "ttft_s",
    "tpot_s", "e2e_s", "output_tokens_per_s", "tokens_per_s_per_user",
    "tokens_per_s_per_chip", "ttft_limit_s", "tpot_limit_s", "bottleneck",
    "needed_bytes", "available_bytes", "reason", "origin", "predicted_ttft_s",
    "predicted_tpot_s",
)  # fmt: skip
# How much slower than predicted measured programs of a point's kind were, and how many
# points that stands on; empty where nothing measured is like it.
_CSV_BANDS = tuple(
    f"{metric}_{figure}"
    for metric in validated.METRICS
    for figure in ("slower_low", "slower_high", "slower_points")
)


def phases(record: Record) -> list[tuple[str, PhaseRecord]]:
    """Returns the (name, phase) pairs that `record` has."""
    both = (("prefill", record.prefill), ("decode", record.decode))
    return [(name, phase) for name, phase in both if phase is not None]


def figures(question: Question, objective: Objective) -> list[Table]:
    """Returns the tables of points with figures."""
    if question.measured:
        return [measured(question, "ttft"), measured(question, "tpot")]
    return [points(question, objective)]


def measured(question: Question, name: str) -> Table:
    """Returns one row for each measured point: `name`, "ttft" or "tpot", and beside it.

    `off` is how much longer it took than predicted. TPOT comes with the throughput,
    and with the most that was allocated, or ">" and what is held between calls.
    """
    headings = [
        "batch", "partition", name.upper(), "spread", "predicted", "off", "limit",
        "% of limit",
    ]  # fmt: skip
    if name == "tpot":
        headings += ["tokens/s", "peak memory"]
    rows = []
    for r in question.ok:
        if (m := r.measurement) is None:
            continue
        time_s, limit_s = r.require(f"{name}_s"), r.require(f"{name}_limit_s")
        predicted_s = getattr(r, f"predicted_{name}_s")
        row = [
            str(r.batch_size),
            question.label(r),
            units.seconds(time_s),
            units.percent(getattr(m, f"{name}_spread")),
            _or_dash(predicted_s, units.seconds),
            _more(time_s, predicted_s),
            units.seconds(limit_s),
            f"{100 * limit_s / time_s:.0f}",
        ]
        if name == "tpot":
            held = _or_dash(m.held_bytes, lambda held: f">{units.bytes_(held)}")
            peak = held if m.peak_bytes is None else units.bytes_(m.peak_bytes)
            row += [units.digits(r.require("output_tokens_per_s")), peak]
        rows.append(row)
    return headings, rows


def warnings(question: Question) -> Table:
    """Returns one row for each warning about measured times, with the points."""
    found: dict[str, dict[str, list[str]]] = {}
    for r in question.ok:
        for text in r.measurement.warnings if r.measurement else ():
            by_series = found.setdefault(" ".join(text.split()), {})
            by_series.setdefault(question.label(r), []).append(str(r.batch_size))
    rows = [[_points(by_series), text] for text, by_series in found.items()]
    return ["points, at batch", "warning"], rows


def points(question: Question, objective: Objective) -> Table:
    """Returns one row for each point with figures; a star marks the frontier.

    Beside a time stands its error band, where any time of the question has one.
    """
    found = {r.key: words.bands(r) for r in question.ok}
    has_bands = any(any(bands.values()) for bands in found.values())
    time = ["% of limit", "limited by"] + ["measured slower by"] * has_bands
    headings = [
        "batch", "partition", "TTFT", *time, "TPOT", *time, "tokens/s", "/user",
        "/chip", "memory", "frontier",
    ]  # fmt: skip
    if objective.given:
        headings.append("objective")
    best = {r.key for r in pareto(question.ok)}
    rows = []
    for r in question.ok:
        prefill, decode = r.prefill, r.decode
        assert prefill is not None
        assert decode is not None
        needed = r.require("needed_bytes")
        row = [
            str(r.batch_size),
            question.label(r),
            units.seconds(r.require("ttft_s")),
            f"{prefill.pct_of_limit:.0f}",
            words.part_name(prefill.bottleneck or ""),
            *_band(r, found[r.key]["ttft"], has_bands),
            units.seconds(r.require("tpot_s")),
            f"{decode.pct_of_limit:.0f}",
            words.part_name(decode.bottleneck or ""),
            *_band(r, found[r.key]["tpot"], has_bands),
            units.digits(r.require("output_tokens_per_s")),
            units.digits(r.require("tokens_per_s_per_user")),
            units.digits(r.require("tokens_per_s_per_chip")),
            units.percent(needed / r.require("available_bytes")),
            "★" if r.key in best else "",
        ]
        if objective.given:
            row.append("met" if objective.met(r) else "missed")
        rows.append(row)
    return headings, rows


def turned_down(question: Question) -> Table:
    """Returns one row for each reason why points have no figures, with the points."""
    batches: dict[tuple[str, str], dict[str, list[str]]] = {}
    for r in question.not_ok:
        by_series = batches.setdefault((r.status, words.reason_line(r)), {})
        by_series.setdefault(question.label(r), []).append(str(r.batch_size))
    rows = [
        [status, _points(by_series), why]
        for (status, why), by_series in sorted(batches.items())
    ]
    return ["status", "points, at batch", "why"], rows


def flops(question: Question) -> Table:
    """Returns our FLOPs beside the closed form and XLA's own figure."""
    headings = [
        "batch", "partition", "phase", "FLOPs", "closed form", "ours / closed form",
        "XLA's own", "ours / XLA's", "HBM bytes", "MFU", "MBU", "compiled in",
    ]  # fmt: skip
    rows = []
    for r in question.records:
        for name, p in phases(r):
            rows.append(
                [
                    str(r.batch_size),
                    question.label(r),
                    name,
                    units.count(p.flops),
                    _or_dash(p.closed_form_flops, units.count),
                    _ratio(p.flops, p.closed_form_flops),
                    _or_dash(p.xla_flops, units.count),
                    _ratio(p.flops, p.xla_flops),
                    units.bytes_(p.hbm_bytes),
                    _or_dash(p.mfu, units.percent),
                    _or_dash(p.mbu, units.percent),
                    units.seconds(p.compile_s),
                ]
            )
    return headings, rows


def collectives(question: Question, batch_size: int) -> Table:
    """Returns one row for each collective of each partition at `batch_size`."""
    headings = [
        "partition", "phase", "axis", "kind", "devices", "count", "payload each",
        "payload", "wire", "from",
    ]  # fmt: skip
    rows = []
    for r in question.records:
        if r.batch_size != batch_size:
            continue
        for name, phase in phases(r):
            for c in sorted(phase.collectives, key=lambda c: -c.wire_bytes):
                rows.append(
                    [
                        question.label(r),
                        name,
                        c.axis,
                        c.kind,
                        str(c.group_size),
                        f"{c.count:,}",
                        units.bytes_(c.payload_bytes_each),
                        units.bytes_(c.payload_bytes),
                        units.bytes_(c.wire_bytes),
                        c.source,
                    ]
                )
    return headings, rows


def provenance(records: Sequence[Record]) -> Table:
    """Returns what made the records; a value that varies lists each of its values."""
    found: dict[str, list[str]] = {}
    for record in records:
        p = record.provenance
        state = " (with uncommitted changes)" if p.dirty else ""
        pairs = {
            "command": p.command,
            "commit": p.commit + state,
            "python": p.python,
            **p.versions,
            **{f"flag {name}": value for name, value in p.flags.items()},
            "rates of the chip": record.context.get("rates", ""),
            "layers": record.layers,
            "micro-batches of prefill": str(record.micro_batches or "-"),
        }
        for name, value in pairs.items():
            values = found.setdefault(name, [])
            if value and value not in values:
                values.append(value)
    times = [r.provenance.time for r in records]
    found["made (UTC)"] = [f"{min(times)} to {max(times)}"] if times else []
    rows = [[name, ", ".join(values)] for name, values in found.items() if values]
    return ["what", "value"], rows


def csv_text(questions: Sequence[Question], objective: Objective) -> str:
    """Returns every point as CSV, with `on_frontier` and `meets_objective`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = ["on_frontier", "meets_objective"]
    writer.writerow([*_CSV_FIELDS, *_CSV_BANDS, *ends])
    for question in questions:
        best = {r.key for r in pareto(question.ok)}
        for r in question.records:
            marks = [r.key in best, objective.met(r) if objective.given else ""]
            slower: list[object] = []
            for band in words.bands(r).values():
                slower += [band.low, band.high, len(band.figures)] if band else [""] * 3
            fields = [getattr(r, name) for name in _CSV_FIELDS]
            writer.writerow(fields + slower + marks)
    return out.getvalue()


def markdown(table: Table) -> str:
    """Returns a table as Markdown, figures aligned to the right."""
    headings, rows = table
    lines = [[_cell(c) for c in row] for row in [list(headings), *rows]]
    right = [all(is_figure(row[i]) for row in rows) for i in range(len(headings))]
    rule = ["--:" if r else "---" for r in right]
    return "\n".join(f"| {' | '.join(row)} |" for row in [lines[0], rule, *lines[1:]])


def markdown_report(
    questions: Sequence[Question], objective: Objective, notes: Sequence[str]
) -> str:
    """Returns the whole report as Markdown: answers, tables, definitions."""
    out = ["# How should the accelerators share the model?", ""]
    out += [f"> {_cell(note)}\n" for note in notes]
    for q in questions:
        out += [f"## {_cell(words.title(q))}", ""]
        out += [f"{_cell(words.headline(q))} {words.outcome(q)}.", ""]
        out += [f"- **{k}**: {_cell(v)}" for k, v in words.answers(q, objective)]
        out += [f"- **{k}**: {_cell(v)}" for k, v in words.trust(q)]
        if q.ok:
            for table in figures(q, objective):
                out += ["", "### Points", "", markdown(table)]
        if (table := warnings(q))[1]:
            out += ["", "### Warnings", "", markdown(table)]
        if q.not_ok:
            out += ["", "### Without an answer, and why", "", markdown(turned_down(q))]
        out += ["", "### FLOPs and bytes of one device", "", markdown(flops(q)), ""]
        for batch in q.batch_sizes:
            table = collectives(q, batch)
            if table[1]:
                out += [f"### Collectives at batch {batch}", "", markdown(table), ""]
        out += ["### Made by", "", markdown(provenance(q.records)), ""]
    out += ["## What the figures mean", ""]
    out += [f"- **{name}**: {text}" for name, text in words.METRICS]
    origins = sorted({r.origin for q in questions for r in q.records})
    out += ["", *(words.ORIGIN[origin] for origin in origins), ""]
    return "\n".join(out)


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("<", "&lt;").replace(">", "&gt;")


def is_figure(text: str) -> bool:
    """Whether a cell is a number, to be aligned with those above and below it.

    Example:
      >>> is_figure("+3 %"), is_figure(">18.1 GB"), is_figure("-"), is_figure("tp2")
      (True, True, True, False)
      >>> is_figure("2026-11-28-h200x2")
      False
    """
    if _DATED.match(text):
        return False
    return text.lstrip("+-<>")[:1].isdigit() or text in ("", "-")


def _points(batches: dict[str, list[str]]) -> str:
    """Example: `_points({"tp2": ["1", "16"]})` is "tp2 at 1, 16"."""
    return "; ".join(f"{name} at {', '.join(b)}" for name, b in batches.items())


def _band(record: Record, band: validated.Band | None, is_shown: bool) -> list[str]:
    """Returns the cell of an error band, or none where that column is not shown."""
    text = band.cell(record.partition) if band else validated.NOT_VALIDATED
    return [text] if is_shown else []


def _or_dash(value, render) -> str:
    return "-" if value is None else render(value)


def _more(found: float, expected: float | None) -> str:
    """Example: `_more(1.21, 1.1)` is "+10 %"."""
    return f"{100 * (found / expected - 1):+,.0f} %" if expected else "-"


def _ratio(ours: float, theirs: float | None) -> str:
    return f"{ours / theirs:.3f}" if theirs else "-"
