"""Plotly figures of validation: predicted over measured, and error by batch.

A colour is a partition's in every chart of a section, however its programs are
written; a line is one run's.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from experiments.report import charts, units
from experiments.report.validated import Figure
from experiments.validation.tables import percent

_FAINT, _DIAGONAL = "#6b6b6b", "#b8b8b8"
NEAR = 0.1  # the grey stripe


def scatter(figures: Sequence[Figure], colour: Mapping[str, str]) -> dict[str, Any]:
    """Returns predicted over measured times; on the diagonal they are equal.

    Args:
      figures: of one metric.
      colour: of each partition.
    """
    drawing = go.Figure()
    times = [1e3 * t for f in figures for t in (f.measured_s, f.predicted_s)]
    low, high = min(times) / 1.4, max(times) * 1.4
    drawing.add_scatter(
        x=[low, high, high, low],
        y=[low * (1 + NEAR), high * (1 + NEAR), high * (1 - NEAR), low * (1 - NEAR)],
        fill="toself",
        mode="lines",
        line_width=0,
        fillcolor="#ededed",
        hoverinfo="skip",
    )
    drawing.add_scatter(
        x=[low, high],
        y=[low, high],
        mode="lines",
        line=dict(color=_DIAGONAL, width=1),
        hoverinfo="skip",
    )
    for group in _series(figures):
        drawing.add_scatter(
            x=[1e3 * f.measured_s for f in group],
            y=[1e3 * f.predicted_s for f in group],
            text=[str(f.batch_size) for f in group],
            **_marks(group, colour),
        )
    metric = figures[0].metric.upper()
    drawing.update_layout(
        height=400,
        xaxis=charts.log_axis(f"measured {metric}, ms", times),
        yaxis=charts.log_axis(f"predicted {metric}, ms", times),
    )
    return charts.finish(drawing)


def by_batch(figures: Sequence[Figure], colour: Mapping[str, str]) -> dict[str, Any]:
    """Returns the difference of each prediction against the batch, by partition.

    Args:
      figures: of one metric.
      colour: of each partition.
    """
    drawing = go.Figure()
    drawing.add_hrect(
        y0=-100 * NEAR, y1=100 * NEAR, fillcolor="#ededed", line_width=0, layer="below"
    )
    drawing.add_hline(y=0, line=dict(color=_DIAGONAL, width=1))
    for group in _series(figures):
        marks = _marks(group, colour)
        drawing.add_scatter(
            x=[f.batch_size for f in group],
            y=[100 * f.difference for f in group],
            **{**marks, "mode": "lines+markers", "marker": dict(size=8)},
            line=dict(color=marks["marker"]["color"], width=1.5),
        )
    batches = sorted({f.batch_size for f in figures})
    worst = max(15.0, *(115 * abs(f.difference) for f in figures))
    drawing.update_layout(
        height=300,
        xaxis=dict(
            title="batch", type="log", tickvals=batches, ticktext=[*map(str, batches)]
        ),
        yaxis=dict(
            title=f"difference of {figures[0].metric.upper()}",
            ticksuffix=" %",
            range=[-worst, worst],
        ),
    )
    return charts.finish(drawing)


def _series(figures: Sequence[Figure]) -> list[list[Figure]]:
    """Returns the figures of each partition in each run, by batch."""
    groups: dict[tuple[str, str], list[Figure]] = {}
    for f in sorted(figures, key=lambda f: f.batch_size):
        groups.setdefault((f.label, f.run), []).append(f)
    return [*groups.values()]


def _marks(group: Sequence[Figure], colour: Mapping[str, str]) -> dict[str, Any]:
    return dict(
        mode="markers+text",
        name=html.escape(group[0].label),
        textposition="bottom right",
        textfont=dict(size=10, color=_FAINT),
        cliponaxis=False,
        customdata=[
            f"<b>{html.escape(f.label)}</b>, batch {f.batch_size}<br>"
            f"measured {units.seconds(f.measured_s)}, predicted"
            f" {units.seconds(f.predicted_s)}<br>{percent(f.difference)}<br>"
            f"{html.escape(f.run)}"
            for f in group
        ],
        hovertemplate="%{customdata}<extra></extra>",
        marker=dict(size=9, color=colour[group[0].partition]),
    )
