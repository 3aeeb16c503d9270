"""What the paper plots, redrawn in absolute units from rows.

Every function returns titled Plotly figures, one a chip, and leaves out a chip without
rows. Names from rows are escaped, because Plotly reads its text as HTML.
"""

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from experiments.claims.accounting import account
from experiments.claims.judge import Figure
from experiments.claims.printed import CHIPS, LARGEST_BATCH, LONG_405B, Case
from experiments.claims.rows import Row, Rows
from experiments.report import charts, units
from sharding.chips import CHIPS as CHIP_FILES

PARTS = {
    "compute": "#3f6fb5", "hbm": "#58a3a0", "tensor links": "#d9822b",
    "stage links": "#b5489a", "data links": "#c9a227", "overhead": "#8c8c8c",
    "bubble": "#d5d5d5", "gaps": "#a9a17d",
}  # fmt: skip
_OTHER = "#7d5fb2"
_METRICS = {
    "ttft_s": ("TTFT, s", 1.0),
    "tpot_s": ("TPOT, ms", 1e3),
    "node_tokens_per_s": ("tokens/s of the node", 1.0),
}
ORDER = (
    "tp1", "tp2", "tp4", "tp8", "tp4_pp2", "tp2_pp2", "tp2_pp4", "pp2", "pp4", "pp8",
)  # fmt: skip


def parts(
    rows: Rows,
    case: Case,
    partitions: Sequence[str],
    batch_size: int,
    *,
    phases: Sequence[str] = ("ttft", "tpot"),
    links: Sequence[float | None] = (None,),
) -> list[Figure]:
    """Returns stacked bars of where TTFT and TPOT go, by partition."""
    found = []
    for phase in phases:
        for chip in CHIPS:
            bars = [
                (_label(row), row)
                for name in partitions
                for times in links
                if (row := rows.timed(case, chip, name, batch_size, links=times))
            ]
            if bars:
                title = f"{phase.upper()} on {chip}, {case.name}, batch {batch_size:,}"
                found.append((title, _stacked(bars, phase)))
    return found


def _label(row: Row) -> str:
    links = "" if row.links is None else f" links x {row.links:g}"
    return f"{row.partition}{links}{' †' if row.memory != 'own' else ''}"


def _stacked(bars: Sequence[tuple[str, Row]], phase: str) -> dict[str, Any]:
    totals = [row.require(f"{phase}_s") for _, row in bars]
    size, unit = (1.0, "s") if max(totals) >= 1 else (1e-3, "ms")
    labels = [f"{html.escape(label)} " for label, _ in bars][::-1]
    figure = go.Figure()
    each = [getattr(row, f"{phase}_parts_s") or {} for _, row in bars][::-1]
    names = [*PARTS, *sorted({n for p in each for n in p} - set(PARTS))]
    for name in names:
        values = [p.get(name, 0.0) for p in each]
        if any(values):
            figure.add_bar(
                y=labels,
                x=[value / size for value in values],
                orientation="h",
                name=html.escape(name),
                marker=dict(color=PARTS.get(name, _OTHER), line_width=0),
                customdata=[
                    f"{html.escape(name)} {units.seconds(value)}" for value in values
                ],
                hovertemplate="%{y}: %{customdata}<extra></extra>",
            )
    return _bars(figure, labels, totals[::-1], size, unit, units.seconds)


def _bars(
    figure: go.Figure,
    labels: Sequence[str],
    ends: Sequence[float],
    size: float,
    unit: str,
    say: Any,
) -> dict[str, Any]:
    charts.write_totals(figure, labels, [end / size for end in ends], map(say, ends))
    figure.update_layout(
        barmode="stack",
        bargap=0.28,
        height=52 + 26 * len(labels),
        xaxis=dict(range=[0, 1.25 * max(ends) / size], ticksuffix=f" {unit}", nticks=5),
        yaxis=dict(showgrid=False, ticks=""),
    )
    return charts.finish(figure, margin=dict(l=8, r=8, t=6, b=28))


def lines(
    rows: Rows, case: Case, metric: str, partitions: Sequence[str] = ORDER
) -> list[Figure]:
    """Returns a metric against the batch size, a line a partition, both log."""
    title, scale = _METRICS[metric]
    found = []
    colour = charts.colours_of(ORDER)
    for chip in CHIPS:
        figure, values = go.Figure(), []
        for name in partitions:
            series = [
                row
                for batch in rows.batches(case, chip, name)
                if (row := rows.get(case, chip, name, batch)) is not None
            ]
            if not series:
                continue
            y = [scale * float(getattr(row, metric)) for row in series]
            values += y
            figure.add_scatter(
                x=[row.batch_size for row in series],
                y=y,
                mode="lines+markers",
                name=html.escape(name),
                line=dict(color=colour[name], width=1.5),
                marker=dict(size=7),
                hovertemplate=f"{html.escape(name)}, batch %{{x}}: %{{y:.4g}}"
                "<extra></extra>",
            )
        if not values:
            continue
        batches = sorted({b for p in partitions for b in rows.batches(case, chip, p)})
        figure.update_layout(
            height=300,
            xaxis=dict(
                title="batch of a replica",
                type="log",
                tickvals=batches,
                ticktext=[f"{b:,}" for b in batches],
            ),
            yaxis=charts.log_axis(title, values),
            legend=dict(orientation="h", y=1.15, font_size=11),
        )
        found.append(
            (
                f"{title} on {chip}, {case.name}",
                charts.finish(figure, showlegend=True),
            )
        )
    return found


def swept_links(
    rows: Rows, case: Case, partition: str, batch_size: int, links: Sequence[float]
) -> list[Figure]:
    """Returns TTFT against the rate of the links, a line a chip."""
    figure, values = go.Figure(), []
    for chip, shade in zip(CHIPS, charts.colours_of(CHIPS).values(), strict=True):
        series = [
            row
            for times in links
            if (row := rows.timed(case, chip, partition, batch_size, links=times))
        ]
        y = [row.require("ttft_s") for row in series]
        values += y
        figure.add_scatter(
            x=[row.links for row in series],
            y=y,
            mode="lines+markers",
            name=html.escape(chip),
            line=dict(color=shade, width=1.5),
            hovertemplate=f"{html.escape(chip)}, links x %{{x}}: %{{y:.4g}} s"
            "<extra></extra>",
        )
    if not values:
        return []
    figure.update_layout(
        height=320,
        xaxis=dict(
            title="rate of every link, times its own",
            type="log",
            tickvals=list(links),
            ticktext=[f"{times:g}" for times in links],
        ),
        yaxis=charts.log_axis("TTFT, s", values),
        legend=dict(orientation="h", y=1.15),
    )
    title = f"TTFT of {partition}, {case.name}, batch {batch_size}"
    return [(title, charts.finish(figure, showlegend=True))]


def tradeoff(rows: Rows, case: Case, partitions: Sequence[str]) -> list[Figure]:
    """Returns the node's tokens per second against TPOT, a line a partition."""
    colour = charts.colours_of(ORDER)
    found = []
    for chip in CHIPS:
        figure = go.Figure()
        known: list[Row] = []
        for name in partitions:
            series = [
                row
                for batch in rows.batches(case, chip, name)
                if (row := rows.get(case, chip, name, batch)) is not None
            ]
            known += series
            figure.add_scatter(
                x=[1e3 * row.require("tpot_s") for row in series],
                y=[row.node_tokens_per_s for row in series],
                text=[f"{row.batch_size:,}" for row in series],
                mode="lines+markers+text",
                textposition="top center",
                textfont=dict(size=10, color=colour[name]),
                name=html.escape(name),
                line=dict(color=colour[name], width=1.5),
                hovertemplate=f"{html.escape(name)}, batch %{{text}}: %{{x:.4g}} ms,"
                " %{y:.4g} tokens/s<extra></extra>",
            )
        if not known:
            continue
        figure.update_layout(
            height=330,
            xaxis=charts.log_axis(
                "TPOT, ms", [1e3 * r.require("tpot_s") for r in known]
            ),
            yaxis=charts.log_axis(
                "tokens/s of the node", [r.node_tokens_per_s for r in known]
            ),
            legend=dict(orientation="h", y=1.15, font_size=11),
        )
        found.append((f"{case.name} on {chip}", charts.finish(figure, showlegend=True)))
    return found


def memory(rows: Rows) -> list[Figure]:
    """Returns what a device needs for the printed batches of C11, every group's cache.

    The part of the cache that the printed limits count is darker than the rest.
    """
    del rows  # closed forms
    found = []
    for chip in CHIPS:
        figure = go.Figure()
        accounts = [
            account(LONG_405B, CHIP_FILES[chip], name) for name in LARGEST_BATCH
        ]
        labels = [f"{name} batch {batch} " for name, batch in LARGEST_BATCH.items()][
            ::-1
        ]
        stages = [1, 4, 8]
        one = [
            a.sequence_bytes * batch
            for a, batch in zip(accounts, LARGEST_BATCH.values(), strict=True)
        ]
        series = {
            "weights": ([a.weights_bytes for a in accounts], "#4b6a9b"),
            "KV cache of one group": (one, "#6fae8d"),
            "KV cache of the others": (
                [kv * (p - 1) for kv, p in zip(one, stages, strict=True)],
                "#cfe3d8",
            ),
        }
        for name, (values, shade) in series.items():
            figure.add_bar(
                y=labels,
                x=[value / 1e9 for value in values][::-1],
                orientation="h",
                name=name,
                marker=dict(color=shade, line_width=0),
                customdata=[f"{name} {units.bytes_(v)}" for v in values][::-1],
                hovertemplate="%{y}: %{customdata}<extra></extra>",
            )
        figure.add_vline(
            x=CHIP_FILES[chip].hbm_bytes / 1e9, line=dict(color="#b3333b", width=1.5)
        )
        ends = [sum(v[i] for v, _ in series.values()) for i in range(3)][::-1]
        found.append(
            (
                f"Memory of one {chip} for the printed batches, {LONG_405B.name}",
                _bars(figure, labels, ends, 1e9, "GB", units.bytes_),
            )
        )
    return found
