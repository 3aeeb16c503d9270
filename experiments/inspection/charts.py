"""Plotly figures of an answer, as plain dictionaries that a page can embed.

Names from HLO are escaped here, because Plotly reads its text as HTML.
"""

import html
import math
import re
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from experiments.inspection import names, tables
from experiments.inspection.answer import Answer
from experiments.report import units
from sharding.hlo.roofline import Bound

# Four hues of about equal weight, readable on white and on near black.
LIMITS = {
    "compute": "#4c7fd0", "hbm": "#2a9d8f", "links": "#d9822b", "latency": "#b9549f",
}  # fmt: skip
MEMORY = {
    "arguments": "#6482b4", "outputs": "#6fae8d", "temporaries": "#e0a458",
    "constants": "#9a9a9a",
}  # fmt: skip
BUFFERS = {
    "argument": MEMORY["arguments"], "output": MEMORY["outputs"],
    "temporary": MEMORY["temporaries"], "constant": MEMORY["constants"],
}  # fmt: skip
KINDS = {
    "all-reduce": "#d9822b", "all-gather": "#b9549f", "reduce-scatter": "#c9a227",
    "all-to-all": "#7d6fc2", "permute": "#4aa3a2", "broadcast": "#8c8c8c",
}  # fmt: skip
# Before and after, where two programs are compared.
SIDES = ("#8a94a3", "#4c7fd0")
# What a page replaces by its own variables, so that a figure follows light and dark.
THEME = {
    "#222223": "--ink", "#6b6b6c": "--faint", "#e6e6e7": "--line", "#fffffe": "--paper",
}  # fmt: skip
_INK, _FAINT, _GRID, _PAPER = THEME
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
_LARGEST_PX, _NAMED, _LISTED = 46, 5, 6
_LEAST_FLOPS_PER_BYTE = 0.01
_PLOT_PX, _LETTER_PX, _LINE_PX, _LEAD_PX = (1080, 380), 5.9, 16, 24
_WORTH_A_NAME = 0.02  # of the time of all points
_ROW_PX, _FRAME_PX = 34, 56

Figure = dict[str, Any]


def roofline(answer: Answer) -> Figure | None:
    """Returns attainable FLOP/s against FLOPs a byte; a point's area is its time.

    Points lie on the roof that binds them. What does next to no arithmetic would
    stretch the axes for nothing, and is one ring at the left end. Collectives are left
    out.
    """
    found = answer.analysis.roofline
    rows = [row for row in answer.bounds if not row.axis and row.time_s]
    if not found or not rows:
        return None
    working = [row for row in rows if _is_working(row)]
    moving = [row for row in rows if not _is_working(row)]
    peaks = dict(found.flops_per_s)
    if vector := answer.chip.per_device().vector_flops_per_s:
        peaks["vector"] = vector
    top = max(peaks.values())
    slope = found.hbm_bytes_per_s
    least = min([row.flops_per_byte for row in working], default=1.0)
    most = max([row.flops_per_byte for row in working], default=1.0)
    left, right = min(least, 1.0) / 8, 30 * max(top / slope, most)
    figure = go.Figure()
    for name, peak in peaks.items():
        dash = "dot" if name == "vector" and len(peaks) > 1 else "solid"
        _roof(figure, [peak / slope, right], [peak, peak], dash)
        _note(figure, right, peak, f"{html.escape(name)} {units.count(peak)}FLOP/s")
    _roof(figure, [left, top / slope], [left * slope, top], "solid")
    moving_s = sum(row.time_s for row in moving)
    largest_s = max(moving_s, *(row.time_s for row in rows))
    if moving:
        _ring(figure, left * 2, left * 2 * slope, moving, _size(moving_s, largest_s))
    for limit, shade in LIMITS.items():
        chosen = [row for row in working if row.limit == limit]
        figure.add_scatter(
            x=[row.flops_per_byte for row in chosen],
            y=[row.flops / row.time_s for row in chosen],
            mode="markers",
            marker=dict(
                size=[_size(row.time_s, largest_s) for row in chosen],
                color=shade,
                opacity=0.75,
                line=dict(color=_PAPER, width=1),
            ),
            customdata=[_hover(answer, row) for row in chosen],
            hovertemplate="%{customdata}<extra></extra>",
        )
    low, high = left * slope / 2, 6 * top
    logs = [math.log10(value) for value in (left, right, low, high)]
    _name_largest(figure, working, (logs[0], logs[1]), (logs[2], logs[3]))
    figure.update_layout(
        height=440,
        xaxis=_log_axis("FLOPs for each byte of memory traffic", left, right, ""),
        yaxis=_log_axis("attainable", low, high, "FLOP/s"),
    )
    return _finish(figure)


def _is_working(row: Bound) -> bool:
    return row.hbm_bytes > 0 and row.flops_per_byte >= _LEAST_FLOPS_PER_BYTE


def _roof(figure: go.Figure, x: list[float], y: list[float], dash: str) -> None:
    line = dict(color=_FAINT, width=1.5, dash=dash)
    figure.add_scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip")


def _ring(
    figure: go.Figure, x: float, y: float, rows: Sequence[Bound], size: float
) -> None:
    """Draws one ring for all instructions that only move data."""
    ranked = sorted(rows, key=lambda row: -row.time_s)
    lines = [
        f"<b>moving data only</b>, {tables.seconds(sum(r.time_s for r in rows))}",
        *(
            f"{tables.seconds(r.time_s)} {_escaped(names.short(r.op_name) or r.name)}"
            for r in ranked[:_LISTED]
        ),
        *([f"and {len(rows) - _LISTED} more"] if len(rows) > _LISTED else []),
    ]
    figure.add_scatter(
        x=[x],
        y=[y],
        mode="markers+text",
        text=["moving data only"],
        textposition="middle right",
        textfont=dict(size=11, color=_FAINT),
        cliponaxis=False,
        marker=dict(
            size=[size],
            color="rgba(42,157,143,0.15)",
            line=dict(color=LIMITS["hbm"], width=2),
        ),
        customdata=["<br>".join(lines)],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _name_largest(
    figure: go.Figure,
    rows: Sequence[Bound],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> None:
    """Writes the names of the points that take longest, below each other if close.

    Ranges are of the logarithmic axes; places are reckoned for a page of full width.
    """
    total_s = sum(row.time_s for row in rows)
    taken: list[tuple[float, float, float]] = []  # left, right, y of names, in pixels
    points: list[float] = []
    for row in sorted(rows, key=lambda row: -row.time_s):
        if len(points) == _NAMED or row.time_s < _WORTH_A_NAME * total_s:
            break
        x, y = math.log10(row.flops_per_byte), math.log10(row.flops / row.time_s)
        if any(abs(x - other) < 0.1 for other in points):
            continue
        points.append(x)
        text = f"{names.short(row.op_name, 24) or row.name} {row.source}"
        at = _PLOT_PX[0] * (x - x_range[0]) / (x_range[1] - x_range[0])
        height = _PLOT_PX[1] * (y_range[1] - y) / (y_range[1] - y_range[0])
        width = _LETTER_PX * len(text)
        is_right = at + _LEAD_PX + width > _PLOT_PX[0]
        left = at - _LEAD_PX - width if is_right else at + _LEAD_PX
        down = 30
        while any(
            left < b and a < left + width and abs(height + down - c) < _LINE_PX
            for a, b, c in taken
        ):
            down += _LINE_PX
        taken.append((left, left + width, height + down))
        figure.add_annotation(
            x=x,
            y=y,
            text=_escaped(text),
            font=dict(size=11, color=_INK),
            showarrow=True,
            arrowhead=0,
            arrowwidth=0.8,
            arrowcolor=_FAINT,
            ax=-_LEAD_PX if is_right else _LEAD_PX,
            ay=down,
            xanchor="right" if is_right else "left",
        )


def links(answers: Sequence[Answer], labels: Sequence[str]) -> Figure | None:
    """Returns what one device sends along each axis, a colour for each kind.

    Args:
      answers: one program, or two to compare.
      labels: of the programs; "" for only one.
    """
    sent = [answer.analysis.wire_bytes for answer in answers]
    every = dict.fromkeys(axis for one in sent for axis in one)
    axes = sorted(every, key=lambda axis: -max(one.get(axis, 0) for one in sent))
    if not axes:
        return None
    figure = go.Figure()
    places = [
        (axis, answer, f"{axis} · {label}" if label else axis)
        for axis in axes
        for answer, label in zip(answers, labels, strict=True)
    ][::-1]
    texts = [_escaped(names.tail(text, 48)) + " " for *_, text in places]
    ends, times = [0.0] * len(places), [0.0] * len(places)
    for kind, shade in KINDS.items():
        sizes = []
        for i, (axis, answer, _) in enumerate(places):
            rows = [r for r in answer.collectives if (r.axis, r.kind) == (axis, kind)]
            sizes.append(sum(row.wire_bytes for row in rows))
            ends[i] += sizes[-1]
            times[i] += sum(map(answer.link_time_s, rows))
        if not any(sizes):
            continue
        figure.add_bar(
            y=list(range(len(places))),
            x=sizes,
            orientation="h",
            marker=dict(color=shade, line_width=0),
            customdata=[f"{kind} {tables.size(size)}" for size in sizes],
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.add_scatter(
        y=list(range(len(places))),
        x=ends,
        mode="text",
        text=[
            f" {tables.size(end)}, {tables.seconds(s)}" if end else " none"
            for end, s in zip(ends, times, strict=True)
        ],
        textposition="middle right",
        textfont=dict(size=12, color=_INK),
        cliponaxis=False,
        hoverinfo="skip",
    )
    high = 1.3 * max(ends)
    figure.update_layout(
        barmode="stack",
        bargap=0.32,
        height=_FRAME_PX + _ROW_PX * len(places),
        xaxis=dict(range=[0, high], **_byte_ticks(high), fixedrange=True),
        yaxis=dict(
            tickvals=list(range(len(places))),
            ticktext=texts,
            showgrid=False,
            fixedrange=True,
            ticks="",
        ),
    )
    return _finish(figure, margin=dict(l=8, r=8, t=6, b=28))


def timeline(answers: Sequence[Answer], labels: Sequence[str]) -> Figure | None:
    """Returns temporaries alive through the schedule, the peak of each marked."""
    if not any(any(a.analysis.memory.timeline_bytes) for a in answers):
        return None
    figure = go.Figure()
    high = 1.25 * max(max(a.analysis.memory.timeline_bytes) for a in answers)
    shades = (MEMORY["temporaries"],) if len(answers) == 1 else SIDES
    for answer, label, shade in zip(answers, labels, shades, strict=True):
        memory = answer.analysis.memory
        sizes = memory.timeline_bytes
        xs = [100 * (i + 0.5) / len(sizes) for i in range(len(sizes))]
        figure.add_scatter(
            x=xs,
            y=list(sizes),
            mode="lines",
            line=dict(color=shade, width=1.8, shape="hvh"),
            fill="tozeroy" if len(answers) == 1 else None,
            customdata=[tables.size(size) for size in sizes],
            hovertemplate="%{customdata} at %{x:.0f} %<extra></extra>",
        )
        peak = max(range(len(sizes)), key=sizes.__getitem__)
        name = names.tail(memory.peak_at, 44)
        figure.add_annotation(
            x=xs[peak],
            y=sizes[peak],
            text=_escaped(f"{label} {tables.size(sizes[peak])}".strip())
            + (f" at {_escaped(name)}" if name else ""),
            font=dict(size=12, color=_INK),
            arrowcolor=_FAINT,
            arrowhead=0,
            arrowwidth=1,
            ax=0,
            ay=-22,
            xanchor="left" if peak < 0.55 * len(sizes) else "right",
        )
    figure.update_layout(
        height=300,
        xaxis=dict(title="through the schedule", ticksuffix=" %", range=[0, 100]),
        yaxis=dict(title="temporaries", range=[0, high], **_byte_ticks(high)),
    )
    return _finish(figure)


def _hover(answer: Answer, row: Bound) -> str:
    where = " · ".join(part for part in (row.source, row.loop) if part)
    share = row.time_s / answer.time_s if answer.time_s else 0.0
    lines = [
        f"<b>{_escaped(names.tail(names.short(row.op_name) or row.name, 70))}</b>",
        _escaped(names.tail(where, 70)),
        f"{tables.seconds(row.time_s)}, {units.percent(share)},"
        f" bound by {tables.LIMITS[row.limit]}; {row.count:,} times",
        f"{units.count(row.flops)} FLOPs, {tables.size(row.hbm_bytes)},"
        f" {units.digits(row.flops_per_byte)} FLOPs a byte",
    ]
    return "<br>".join(line for line in lines if line)


def _escaped(text: str) -> str:
    return html.escape(names.printable(text))


def _size(time_s: float, largest_s: float) -> float:
    """Returns a diameter whose area is in proportion to time, or the least to see."""
    return max(_LARGEST_PX * math.sqrt(time_s / largest_s), 4.0)


def _note(figure: go.Figure, x: float, y: float, text: str) -> None:
    figure.add_annotation(
        x=math.log10(x),
        y=math.log10(y),
        text=text,
        font=dict(size=11, color=_FAINT),
        showarrow=False,
        xanchor="right",
        yanchor="bottom",
    )


def _log_axis(title: str, low: float, high: float, unit: str) -> dict[str, Any]:
    exponents = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    step = max(1, len(exponents) // 7)
    values = [10.0**e for e in exponents][::step]
    return dict(
        title=title,
        type="log",
        range=[math.log10(low), math.log10(high)],
        tickvals=values,
        ticktext=[
            f"{_power(value)}{unit}" if unit else units.tick(value) for value in values
        ],
    )


def _power(value: float) -> str:
    return units.count(value).replace(".00", "").replace(".0", "")


def _byte_ticks(high: float) -> dict[str, Any]:
    step = 10.0 ** math.floor(math.log10(high / 3 or 1))
    step *= next(m for m in (1, 2, 5, 10) if high / (m * step) <= 6)
    values = [i * step for i in range(int(high / step) + 1)]
    texts = [re.sub(r"\.0+ ", " ", tables.size(value)) for value in values]
    return dict(tickvals=values, ticktext=texts)


def _finish(figure: go.Figure, **layout: Any) -> Figure:
    axis: dict[str, Any] = dict(
        gridcolor=_GRID, linecolor=_FAINT, zeroline=False, automargin=True,
        title_font_size=13, title_standoff=10,
    )  # fmt: skip
    figure.update_xaxes(showline=True, **axis)
    figure.update_yaxes(**axis)
    common: dict[str, Any] = dict(
        template="none",
        font=dict(family=_FONT, size=12, color=_INK),
        margin=dict(l=8, r=12, t=12, b=8),
        showlegend=False,
        hovermode="closest",
        hoverlabel=dict(
            bgcolor=_PAPER, font_color=_INK, bordercolor=_FAINT, align="left"
        ),
        dragmode=False,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
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
