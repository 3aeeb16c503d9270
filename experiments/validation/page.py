"""One HTML file that shows how good predictions are, readable offline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.report import html, units, validated
from experiments.report.charts import colours_of
from experiments.report.record import Provenance
from experiments.report.validated import Figure
from experiments.validation import charts, summary, tables


def page(
    figures: Sequence[Figure], notes: Sequence[str], provenance: Provenance
) -> str:
    """Returns the page; see `experiments.report.html.page` for what it may load."""
    p = provenance
    versions = ", ".join(f"{name} {version}" for name, version in p.versions.items())
    changed = " (with uncommitted changes)" if p.dirty else ""
    made_by = [
        ["command", p.command],
        ["commit", p.commit + changed],
        ["versions", f"python {p.python}, {versions}"],
        ["made (UTC)", p.time],
        ["records", "; ".join(dict.fromkeys(f.source for f in figures))],
    ]
    return html.render(
        "page.html.j2",
        Path(__file__).parent,
        title="How far are predictions from measurements?",
        notes=notes,
        sections=[
            _section(f"s{i}", title, group)
            for i, (title, group) in enumerate(tables.titles(figures), start=1)
        ],
        near=units.percent(charts.NEAR),
        words=tables.WORDS,
        made_by=(("what", "value"), made_by),
    )


def _section(name: str, title: str, figures: Sequence[Figure]) -> dict[str, Any]:
    rankings = summary.rankings(figures)
    colour = colours_of(f.partition for f in figures)
    by_metric = [
        (metric.upper(), group)
        for metric in validated.METRICS
        if (group := [f for f in figures if f.metric == metric])
    ]
    return dict(
        id=name,
        title=title,
        headline=tables.headline(figures),
        legend=[*colour.items()],
        scatter=[(m, charts.scatter(group, colour)) for m, group in by_metric],
        by_batch=[(m, charts.by_batch(group, colour)) for m, group in by_metric],
        errors=tables.errors(figures),
        orders=tables.orders(rankings),
        agreement=tables.agreed(rankings),
        points=tables.points(figures),
    )
