"""One HTML file with everything in it, readable offline, on paper and on a phone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline

from experiments.report import charts, tables, units, words
from experiments.report.frontier import Objective, Question


def page(
    questions: Sequence[Question], objective: Objective, notes: Sequence[str]
) -> str:
    """Returns the report as HTML.

    Plotly is inside once, the page loads nothing, and its own policy forbids it to.
    All text is escaped: by the template, and in `charts` for Plotly.
    """
    colour, time_colour = charts.colours(questions), charts.time_colours(questions)
    return render(
        "template.html.j2",
        title=_title(questions),
        notes=notes,
        sections=[
            _section(i, q, objective, colour, time_colour)
            for i, q in enumerate(questions, start=1)
        ],
        time_legend=[(words.part_name(n), c) for n, c in time_colour.items()],
        memory_legend=list(charts.MEMORY_COLOURS.items()),
        metrics=words.METRICS,
        origins=[
            words.ORIGIN[o]
            for o in sorted({r.origin for q in questions for r in q.records})
        ],
    )


def render(template: str, *folders: Path, **values: Any) -> str:
    """Returns the page that a template makes of `values`, with Plotly inside.

    Args:
      template: a file that extends `base.html.j2`.
      folders: where it is, if not here.
      values: what it names.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["is_figure"] = tables.is_figure
    plotly_js = plotly.offline.get_plotlyjs()
    return environment.get_template(template).render(**values, plotly_js=plotly_js)


def _title(questions: Sequence[Question]) -> str:
    models = " and ".join(dict.fromkeys(q.model for q in questions))
    targets = " and ".join(dict.fromkeys(q.target for q in questions))
    return f"How should {targets} share {models}?"


def _section(
    number: int,
    question: Question,
    objective: Objective,
    colour: dict[str, str],
    time_colour: dict[str, str],
) -> dict[str, Any]:
    q = question
    with_figures = [b for b in q.batch_sizes if any(r.batch_size == b for r in q.ok)]
    memory = [(b, charts.memory(q, b)) for b in q.batch_sizes]
    overview = [
        ("tradeoff", charts.tradeoff(q, objective, colour)),
        ("ttft", charts.against_batch(q, "ttft_s", objective.ttft_s, colour)),
        ("tpot", charts.against_batch(q, "tpot_s", objective.tpot_s, colour)),
    ]
    capacity = max((r.available_bytes or 0 for r in q.records), default=0)
    return dict(
        id=f"s{number}",
        title=words.title(q),
        facts=[
            words.size(q),
            q.stored,
            f"{q.input_len:,} tokens in, {q.output_len:,} out",
            f"layers {q.layers}",
            *filter(None, [words.rates(q)]),
            words.outcome(q),
        ],
        headline=words.headline(q),
        best=[(b, words.best(q, b)) for b in q.batch_sizes],
        trust=words.trust(q),
        met_by=words.met_by(q, objective) if objective.given else "",
        legend=charts.series_legend(q, colour),
        objective=objective.given,
        overview=dict(overview) if q.ok else None,
        measured=q.measured,
        **{
            name: [
                (b, figure)
                for b in with_figures
                if (figure := charts.time_parts(q, b, f"{name}_s", time_colour))
            ]
            for name in ("ttft_parts", "tpot_parts")
        },
        memory=[(b, figure) for b, figure in memory if figure is not None],
        capacity=units.bytes_(capacity) if capacity else "",
        points=tables.figures(q, objective) if q.ok else [],
        warnings=tables.warnings(q),
        turned_down=tables.turned_down(q) if q.not_ok else None,
        flops=tables.flops(q),
        collectives=[
            (b, table) for b in q.batch_sizes if (table := tables.collectives(q, b))[1]
        ],
        provenance=tables.provenance(q.records),
    )
