"""Plotly figures of one question, as plain dictionaries that a page can embed.

One colour belongs to one partition in every chart of a report, and one to each
part of time and memory. Names from records are escaped here, because Plotly reads
its text as HTML.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from experiments.report import units, validated, words
from experiments.report.frontier import Objective, Question, pareto, partition_order
from experiments.report.record import PhaseRecord, Record

# Ten hues of about equal weight, all readable as a line on white.
_PARTITIONS = (
    "#2563a8", "#d1602d", "#2f8a57", "#a23b72", "#8a6d1d", "#5b4fb0", "#15838c",
    "#b3333b", "#6b7a2a", "#6d5a4e",
)  # fmt: skip
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
_LINKS = ("#d9822b", "#b5489a", "#c9a227", "#7d5fb2", "#4aa3a2")
_TIMES = {
    "compute": "#3f6fb5", "hbm": "#58a3a0", "overhead": "#8c8c8c", "bubble": "#d5d5d5",
}  # fmt: skip
MEMORY_COLOURS = {
    "weights": "#4b6a9b", "KV cache": "#6fae8d", "activations": "#e0a458",
    "other": "#b8b8b8",
}  # fmt: skip
Entry = tuple[str, str]
_INK, _FAINT, _GRID = "#222222", "#6b6b6b", "#e8e8e8"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
_MEASURED = "#b3333b"
_LONG = 1e6
_ROW_PX, _FRAME_PX = 26, 52


def colours(questions: Sequence[Question]) -> dict[str, str]:
    """Returns a colour for each partition named in any of the questions."""
    return colours_of(r.partition for q in questions for r in q.records)


def colours_of(partitions: Iterable[str]) -> dict[str, str]:
    """Returns a colour for each partition by name, in their order."""
    ordered = sorted(set(partitions), key=partition_order)
    return {n: _PARTITIONS[i % len(_PARTITIONS)] for i, n in enumerate(ordered)}


def time_colours(questions: Sequence[Question]) -> dict[str, str]:
    """Returns a colour for each part of time found in any of the questions."""
    found = {
        name
        for q in questions
        for r in q.ok
        for parts in (r.ttft_parts_s, r.tpot_parts_s)
        if parts is not None
        for name, _ in parts.items()
    }
    links = sorted(name for name in found if name.endswith(" links"))
    link_colours = {n: _LINKS[i % len(_LINKS)] for i, n in enumerate(links)}
    every = {"compute": "", "hbm": "", **link_colours, "overhead": "", "bubble": ""}
    return {name: {**_TIMES, **link_colours}[name] for name in every}


def series_legend(question: Question, colour: Mapping[str, str]) -> list[Entry]:
    """Returns (name, colour) of every series with figures."""
    return [
        (label, colour[records[0].partition])
        for label, records in _series(question).items()
    ]


def tradeoff(
    question: Question, objective: Objective, colour: Mapping[str, str]
) -> dict[str, Any]:
    """Returns tokens/s/user against tokens/s/chip, with the frontier."""
    figure = go.Figure()
    best = pareto(question.ok)
    figure.add_scatter(
        x=[r.tokens_per_s_per_user for r in best],
        y=[r.tokens_per_s_per_chip for r in best],
        mode="lines",
        name="frontier",
        line=dict(color="#cfcfcf", width=9),
        hoverinfo="skip",
    )
    for label, records in _series(question).items():
        shade = colour[records[0].partition]
        met = [objective.met(r) for r in records]
        figure.add_scatter(
            x=[r.tokens_per_s_per_user for r in records],
            y=[r.tokens_per_s_per_chip for r in records],
            text=[str(r.batch_size) for r in records],
            customdata=[_hover(question, r) for r in records],
            mode="lines+markers+text",
            name=html.escape(label),
            textfont=dict(size=10, color=["white" if m else shade for m in met]),
            cliponaxis=False,
            line=dict(color=shade, width=1.5),
            marker=dict(
                size=21,
                symbol=[_symbol(question, r) for r in records],
                color=[shade if m else "white" for m in met],
                line=dict(width=1.5, color=[_edge(m, shade) for m in met]),
            ),
            hovertemplate="%{customdata}<extra></extra>",
        )
    if objective.tpot_s is not None:
        _mark(
            figure, "x", 1 / objective.tpot_s, f"TPOT {units.seconds(objective.tpot_s)}"
        )
    figure.update_layout(
        height=440,
        xaxis=log_axis("tokens/s/user", [r.tokens_per_s_per_user for r in question.ok]),
        yaxis=log_axis("tokens/s/chip", [r.tokens_per_s_per_chip for r in question.ok]),
    )
    return finish(figure)


def against_batch(
    question: Question, name: str, objective_s: float | None, colour: Mapping[str, str]
) -> dict[str, Any]:
    """Returns one time, `ttft_s` or `tpot_s`, against the batch size, both log."""
    figure = go.Figure()
    for label, records in _series(question).items():
        figure.add_scatter(
            x=[r.batch_size for r in records],
            y=[1e3 * r.require(name) for r in records],
            customdata=[_hover(question, r) for r in records],
            mode="lines+markers",
            name=html.escape(label),
            line=dict(color=colour[records[0].partition], width=1.5),
            marker=dict(size=7, symbol=[_symbol(question, r) for r in records]),
            hovertemplate="%{customdata}<extra></extra>",
        )
    if objective_s is not None:
        _mark(figure, "y", 1e3 * objective_s, "objective")
    batches = sorted({r.batch_size for r in question.ok})
    values = [1e3 * r.require(name) for r in question.ok]
    figure.update_layout(
        height=300,
        xaxis=dict(
            title="batch", type="log", tickvals=batches, ticktext=[*map(str, batches)]
        ),
        yaxis=log_axis(f"{name.removesuffix('_s').upper()}, ms", values),
    )
    return finish(figure)


def time_parts(
    question: Question, batch_size: int, name: str, colour: Mapping[str, str]
) -> dict[str, Any] | None:
    """Returns stacked bars of `ttft_parts_s` or `tpot_parts_s` at one batch size.

    A dark tick on each bar is its limit; a red dot is what was measured, for the parts
    are then those of the prediction. None if no point has parts.
    """
    records = [
        r
        for r in question.ok
        if r.batch_size == batch_size and getattr(r, name) is not None
    ][::-1]
    if not records:
        return None
    parts = [dict(getattr(r, name).items()) for r in records]
    totals = [getattr(r, name).total_s for r in records]
    times = [r.require(name.replace("_parts", "")) for r in records]
    ends = list(map(max, totals, times))
    size, unit = _time_unit(max(ends))
    labels = _labels(question, records)
    figure = go.Figure()
    for part, shade in colour.items():
        values = [p.get(part, 0.0) for p in parts]
        if not any(values):
            continue
        figure.add_bar(
            y=labels,
            x=[v / size for v in values],
            orientation="h",
            name=html.escape(words.part_name(part)),
            marker=dict(color=shade, line_width=0),
            customdata=[
                f"{html.escape(words.part_name(part))} {units.seconds(v)},"
                f" {units.percent(v / total)}"
                for v, total in zip(values, totals, strict=True)
            ],
            hovertemplate="%{y}: %{customdata}<extra></extra>",
        )
    limits = [r.require(name.replace("parts", "limit")) for r in records]
    figure.add_scatter(
        y=labels,
        x=[limit / size for limit in limits],
        mode="markers",
        marker=dict(symbol="line-ns", size=17, line=dict(color=_INK, width=2)),
        customdata=[
            f"limit {units.seconds(limit)}, reached to {units.percent(limit / total)}"
            for limit, total in zip(limits, totals, strict=True)
        ],
        hovertemplate="%{y}: %{customdata}<extra></extra>",
    )
    if question.measured:
        figure.add_scatter(
            y=labels,
            x=[time / size for time in times],
            mode="markers",
            marker=dict(symbol="circle", size=9, color=_MEASURED),
            customdata=[f"measured {units.seconds(time)}" for time in times],
            hovertemplate="%{y}: %{customdata}<extra></extra>",
        )
    # A dot would cover the beginning of the text.
    space = "  " if question.measured else ""
    texts = [space + units.seconds(time) for time in times]
    write_totals(figure, labels, [end / size for end in ends], texts)
    return _bars(figure, len(records), f"{unit}", 1.22 * max(ends) / size)


def memory(question: Question, batch_size: int) -> dict[str, Any] | None:
    """Returns stacked bars of a device's memory against its capacity, in GB.

    Points that do not fit are included: paler, or only as a figure where the compiler
    did not say what takes how much.
    """
    rows = [
        (r, phase.memory.items() if (phase := fullest(r)) else [])
        for r in question.records
        if r.batch_size == batch_size and r.needed_bytes is not None
    ][::-1]
    if not rows:
        return None
    labels = _labels(question, [r for r, _ in rows])
    figure = go.Figure()
    for category, shade in MEMORY_COLOURS.items():
        values = [dict(parts).get(category, 0) for _, parts in rows]
        figure.add_bar(
            y=labels,
            x=[v / 1e9 for v in values],
            orientation="h",
            name=category,
            marker=dict(
                color=shade,
                opacity=[1.0 if r.status == "ok" else 0.35 for r, _ in rows],
                line_width=0,
            ),
            customdata=[f"{category} {units.bytes_(v)}" for v in values],
            hovertemplate="%{y}: %{customdata}<extra></extra>",
        )
    ends = [sum(size for _, size in parts) for _, parts in rows]
    texts = [
        units.bytes_(r.require("needed_bytes")) + ("" if r.status == "ok" else " ✕")
        for r, _ in rows
    ]
    capacity = max(r.require("available_bytes") for r, _ in rows)
    # A point that needs many times the capacity would hide all the others.
    limit = min(max(*ends, capacity), 2 * capacity)
    write_totals(figure, labels, [min(e, 0.99 * limit) / 1e9 for e in ends], texts)
    figure.add_vline(x=capacity / 1e9, line=dict(color="#b3333b", width=1.5))
    return _bars(figure, len(rows), "GB", 1.25 * limit / 1e9)


def fullest(record: Record) -> PhaseRecord | None:
    """Returns the phase that needs more memory, or None if neither is known."""
    known = [p for p in (record.prefill, record.decode) if p is not None]
    return max(known, key=lambda p: p.memory.peak_bytes, default=None)


def _series(question: Question) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for r in sorted(
        question.ok, key=lambda r: (partition_order(r.partition), r.rules, r.batch_size)
    ):
        found.setdefault(question.label(r), []).append(r)
    return found


def _edge(filled: bool, shade: str) -> str:
    return "white" if filled else shade


def _symbol(question: Question, record: Record) -> str:
    rules = sorted({r.rules for r in question.records})
    return _SYMBOLS[rules.index(record.rules) % len(_SYMBOLS)]


def _labels(question: Question, records: Sequence[Record]) -> list[str]:
    return [html.escape(question.label(r)) + " " for r in records]


def _hover(question: Question, record: Record) -> str:
    r = record
    return (
        f"<b>{html.escape(question.label(r))}</b>, batch {r.batch_size}<br>"
        f"TTFT {units.seconds(r.require('ttft_s'))}, TPOT"
        f" {units.seconds(r.require('tpot_s'))}<br>"
        f"{units.digits(r.require('tokens_per_s_per_user'))} tokens/s/user,"
        f" {units.digits(r.require('tokens_per_s_per_chip'))} tokens/s/chip<br>"
        f"limited by {html.escape(words.part_name(str(r.bottleneck)))}"
        f"{''.join(_slower(record))}"
    )


def _slower(record: Record) -> list[str]:
    """Returns a line for each predicted time on how far it holds."""
    if record.measurement is not None:
        return []
    found = words.bands(record).items()
    if not any(band for _, band in found):
        return [f"<br>{validated.NOT_VALIDATED}"]
    return [
        f"<br>{metric.upper()}: "
        + (
            f"measured slower by {band.cell(record.partition)}"
            if band
            else validated.NOT_VALIDATED
        )
        for metric, band in found
    ]


def _time_unit(value_s: float) -> tuple[float, str]:
    return (1.0, "s") if value_s >= 1 else (1e-3, "ms")


def log_axis(title: str, values: Sequence[float | None]) -> dict[str, Any]:
    """Returns a logarithmic axis with ticks at round values, long ones as "5 M"."""
    known = [v for v in values if v is not None]
    # A little more than the values, for the axis reaches further.
    shown = units.ticks(min(known, default=1) / 1.5, max(known, default=1) * 1.5)
    short = max(known, default=1) >= _LONG
    return dict(
        title=title,
        type="log",
        tickvals=shown,
        ticktext=[units.tick(t, short=short) for t in shown],
    )


def _mark(figure: go.Figure, axis: str, value: float, text: str) -> None:
    """Draws a dashed line across the plot at `value` of a logarithmic axis."""
    other = {"x": "y", "y": "x"}[axis]
    figure.add_shape(
        type="line",
        line=dict(color=_FAINT, width=1, dash="dash"),
        **{f"{axis}0": value, f"{axis}1": value, f"{other}0": 0, f"{other}1": 1},
        **{f"{axis}ref": axis, f"{other}ref": f"{other} domain"},
    )
    # Unlike a shape, an annotation wants the logarithm.
    figure.add_annotation(
        text=text,
        font=dict(color=_FAINT, size=11),
        showarrow=False,
        **{axis: math.log10(value), f"{other}ref": f"{other} domain"},
        **{"y": {"y": 1, "yanchor": "top"}, "x": {"x": 0, "xanchor": "left"}}[other],
        **{f"{axis}anchor": {"x": "left", "y": "bottom"}[axis]},
    )


def write_totals(
    figure: go.Figure,
    labels: Sequence[str],
    ends: Sequence[float],
    texts: Iterable[str],
) -> None:
    """Writes `texts` just behind the bars that end at `ends`."""
    figure.add_scatter(
        y=list(labels),
        x=list(ends),
        mode="text",
        text=[f" {text}" for text in texts],
        textposition="middle right",
        textfont=dict(size=11, color=_INK),
        cliponaxis=False,
        hoverinfo="skip",
        showlegend=False,
    )


def _bars(figure: go.Figure, rows: int, unit: str, end: float) -> dict[str, Any]:
    figure.update_layout(
        barmode="stack",
        bargap=0.28,
        height=_FRAME_PX + _ROW_PX * rows,
        xaxis=dict(range=[0, end], ticksuffix=f" {unit}", nticks=5, fixedrange=True),
        yaxis=dict(showgrid=False, fixedrange=True, ticks=""),
    )
    return finish(figure, margin=dict(l=8, r=8, t=6, b=28), hovermode="closest")


def finish(figure: go.Figure, **layout: Any) -> dict[str, Any]:
    """Returns a figure as a dictionary, in the look of every page."""
    axis: dict[str, Any] = dict(
        gridcolor=_GRID, linecolor="#bbbbbb", zeroline=False, automargin=True,
        title_font_size=13, title_standoff=10,
    )  # fmt: skip
    figure.update_xaxes(showline=True, **axis)
    figure.update_yaxes(**axis)
    common: dict[str, Any] = dict(
        template="none",
        font=dict(family=_FONT, size=12, color=_INK),
        margin=dict(l=8, r=12, t=12, b=8),
        showlegend=False,
        hoverlabel=dict(bgcolor="white", font_color=_INK, align="left"),
        dragmode=False,
        paper_bgcolor="white",
        plot_bgcolor="white",
    )
    figure.update_layout(**{**common, **layout})
    return _plain(figure.to_plotly_json())


def _plain(value: Any) -> Any:
    """Returns lists for tuples and 6 significant digits, to keep the page small."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
