"""The roofline plot: what binds each instruction, and how much of the time it takes.

Williams et al. 2009: under the slope memory is the limit, under a flat roof arithmetic.
"""

import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from experiments.inspection import names, tables
from experiments.inspection.answer import Answer
from experiments.inspection.charts import (
    FAINT,
    INK,
    LIMITS,
    PAPER,
    Figure,
    escaped,
    finish,
)
from experiments.report import units
from sharding.hlo.roofline import Bound

_LARGEST_PX, _NAMED, _LISTED = 46, 5, 6
_LEAST_FLOPS_PER_BYTE = 0.01
_PLOT_PX, _LETTER_PX, _LINE_PX, _LEAD_PX = (1080, 380), 5.9, 16, 24
_NARROW = 0.5  # of that width a name must still fit
_WORTH_A_NAME = 0.02  # of the time of all points


def plot(answer: Answer) -> Figure | None:
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
                line=dict(color=PAPER, width=1),
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
    return finish(figure)


def _is_working(row: Bound) -> bool:
    return row.hbm_bytes > 0 and row.flops_per_byte >= _LEAST_FLOPS_PER_BYTE


def _roof(figure: go.Figure, x: list[float], y: list[float], dash: str) -> None:
    line = dict(color=FAINT, width=1.5, dash=dash)
    figure.add_scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip")


def _ring(
    figure: go.Figure, x: float, y: float, rows: Sequence[Bound], size: float
) -> None:
    """Draws one ring for all instructions that only move data."""
    ranked = sorted(rows, key=lambda row: -row.time_s)
    lines = [
        f"<b>moving data only</b>, {tables.seconds(sum(r.time_s for r in rows))}",
        *(
            f"{tables.seconds(r.time_s)} {escaped(names.short(r.op_name) or r.name)}"
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
        textfont=dict(size=11, color=FAINT),
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
        is_right = at * _NARROW + _LEAD_PX + width > _PLOT_PX[0] * _NARROW
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
            text=escaped(text),
            font=dict(size=11, color=INK),
            showarrow=True,
            arrowhead=0,
            arrowwidth=0.8,
            arrowcolor=FAINT,
            ax=-_LEAD_PX if is_right else _LEAD_PX,
            ay=down,
            xanchor="right" if is_right else "left",
        )


def _hover(answer: Answer, row: Bound) -> str:
    where = " · ".join(part for part in (row.source, row.loop) if part)
    share = row.time_s / answer.time_s if answer.time_s else 0.0
    lines = [
        f"<b>{escaped(names.tail(names.short(row.op_name) or row.name, 70))}</b>",
        escaped(names.tail(where, 70)),
        f"{tables.seconds(row.time_s)}, {units.percent(share)},"
        f" bound by {tables.LIMITS[row.limit]}; {row.count:,} times",
        f"{units.count(row.flops)} FLOPs, {tables.size(row.hbm_bytes)},"
        f" {units.digits(row.flops_per_byte)} FLOPs a byte",
    ]
    return "<br>".join(line for line in lines if line)


def _size(time_s: float, largest_s: float) -> float:
    """Returns a diameter whose area is in proportion to time, or the least to see."""
    return max(_LARGEST_PX * math.sqrt(time_s / largest_s), 4.0)


def _note(figure: go.Figure, x: float, y: float, text: str) -> None:
    figure.add_annotation(
        x=math.log10(x),
        y=math.log10(y),
        text=text,
        font=dict(size=11, color=FAINT),
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
