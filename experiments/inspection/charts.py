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
INK, FAINT, GRID, PAPER = THEME
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
_ROW_PX, _FRAME_PX = 34, 56

Figure = dict[str, Any]


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
    texts = [escaped(names.tail(text, 48)) + " " for *_, text in places]
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
        textfont=dict(size=12, color=INK),
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
    return finish(figure, margin=dict(l=8, r=8, t=6, b=28))


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
            text=escaped(f"{label} {tables.size(sizes[peak])}".strip())
            + (f" at {escaped(name)}" if name else ""),
            font=dict(size=12, color=INK),
            arrowcolor=FAINT,
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
    return finish(figure)


def escaped(text: str) -> str:
    """Returns `text` as Plotly shows it literally."""
    return html.escape(names.printable(text))


def _byte_ticks(high: float) -> dict[str, Any]:
    step = 10.0 ** math.floor(math.log10(high / 3 or 1))
    step *= next(m for m in (1, 2, 5, 10) if high / (m * step) <= 6)
    values = [i * step for i in range(int(high / step) + 1)]
    texts = [re.sub(r"\.0+ ", " ", tables.size(value)) for value in values]
    return dict(tickvals=values, ticktext=texts)


def finish(figure: go.Figure, **layout: Any) -> Figure:
    """Returns `figure` in the look that all share, as a plain dictionary."""
    axis: dict[str, Any] = dict(
        gridcolor=GRID, linecolor=FAINT, zeroline=False, automargin=True,
        title_font_size=13, title_standoff=10,
    )  # fmt: skip
    figure.update_xaxes(showline=True, **axis)
    figure.update_yaxes(**axis)
    common: dict[str, Any] = dict(
        template="none",
        font=dict(family=_FONT, size=12, color=INK),
        margin=dict(l=8, r=12, t=12, b=8),
        showlegend=False,
        hovermode="closest",
        hoverlabel=dict(bgcolor=PAPER, font_color=INK, bordercolor=FAINT, align="left"),
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
