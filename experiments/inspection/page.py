"""One HTML file about one program, or about the difference of two.

Everything is inside, also Plotly. The page loads nothing and runs only its own
scripts: its policy names them by digest, so that a name from HLO could not start one
even if it came through unescaped.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline

from experiments.inspection import charts, difference, names, roofline, tables
from experiments.inspection.answer import Answer
from experiments.inspection.difference import Comparison
from experiments.report import units
from experiments.report.record import Provenance

_SIDES = ("before", "after")
_MOST_ADVICE = 40
_MOST_ROWS = 400  # of a table; what is left out is said


def one(answer: Answer, provenance: Provenance) -> str:
    """Returns the page about one program."""
    a = answer.analysis
    return _render(
        "program.html.j2",
        title=names.printable(answer.subject.title),
        facts=tables.facts(answer),
        totals=tables.totals(answer),
        time_bar=time_bar(answer),
        memory_bar=memory_bar(answer),
        peak=tables.size(a.memory.peak_bytes),
        findings=tables.grouped(a.advice[:_MOST_ADVICE]),
        links=charts.links([answer], [""]),
        link_legend=_kinds([answer]),
        collectives=tables.collectives(answer, _MOST_ROWS),
        roofline=roofline.plot(answer),
        limits=[(tables.LIMITS[n], charts.LIMITS[n]) for n in ("compute", "hbm")],
        chip=answer.chip.title,
        is_assumed=answer.is_assumed,
        instructions=tables.instructions(answer, _MOST_ROWS),
        timeline=charts.timeline([answer], [""]),
        buffers=tables.buffers(answer, _MOST_ROWS),
        loops=tables.loops(answer, _MOST_ROWS),
        assumed=tables.assumed(answer),
        provenance=made_by(provenance),
    )


def two(found: Comparison, provenance: Provenance) -> str:
    """Returns the page about the difference of two programs."""
    longest_s = max(answer.time_s for answer in found.answers)
    largest = max(answer.analysis.memory.peak_bytes for answer in found.answers)
    return _render(
        "difference.html.j2",
        title=found.title,
        is_same=found.difference.is_same and not found.lines,
        sides=[
            dict(
                name=name,
                title=names.printable(answer.subject.title),
                facts=tables.facts(answer),
                chip=answer.chip.title,
                time_bar=time_bar(answer),
                time_scale=answer.time_s / longest_s if longest_s else 1,
                memory_bar=memory_bar(answer),
                memory_scale=answer.analysis.memory.peak_bytes / max(largest, 1),
                assumed=tables.assumed(answer),
            )
            for name, answer in zip(_SIDES, found.answers, strict=True)
        ],
        totals=difference.totals(found),
        links=charts.links(found.answers, _SIDES),
        link_legend=_kinds(found.answers),
        collectives=difference.collectives(found, _MOST_ROWS),
        lines=difference.lines(found, _MOST_ROWS),
        timeline=charts.timeline(found.answers, _SIDES),
        side_legend=list(zip(_SIDES, charts.SIDES, strict=True)),
        new=tables.grouped(found.difference.advice_new[:_MOST_ADVICE]),
        gone=tables.grouped(found.difference.advice_gone[:_MOST_ADVICE]),
        provenance=made_by(provenance),
    )


def time_bar(answer: Answer) -> list[dict[str, Any]]:
    """Returns (name, figure, share, colour) of every limit of the time."""
    return [
        _piece(
            tables.LIMITS[limit],
            time_s,
            answer.time_s,
            tables.seconds(time_s),
            charts.LIMITS[limit],
        )
        for limit, time_s in tables.by_limit(answer)
        if time_s
    ]


def memory_bar(answer: Answer) -> list[dict[str, Any]]:
    """Returns (name, figure, share, colour) of every category held at the peak."""
    peak = answer.analysis.memory.peak_bytes
    return [
        _piece(name, held, peak, tables.size(held), charts.MEMORY[name])
        for name, held in tables.memory(answer)
        if held
    ]


def made_by(provenance: Provenance) -> list[tuple[str, str]]:
    """Returns (name, text) of what a page was made with."""
    p = provenance
    return [
        ("code", p.commit + (" with changes" if p.dirty else "")),
        ("versions", ", ".join(f"{k} {v}" for k, v in p.versions.items())),
        *[(name, text) for name, text in p.flags.items()],
        ("command", p.command),
        ("time", p.time),
    ]


def _piece(
    name: str, size: float, total: float, figure: str, colour: str
) -> dict[str, Any]:
    share = size / total if total else 0.0
    percent = units.percent(share) if share >= 0.001 else "< 0.1 %"
    return dict(name=name, figure=figure, share=share, percent=percent, colour=colour)


def _kinds(answers: Sequence[Answer]) -> list[tuple[str, str]]:
    found = {row.kind for answer in answers for row in answer.collectives}
    return [(kind, shade) for kind, shade in charts.KINDS.items() if kind in found]


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["marks"] = {**charts.LIMITS, **charts.KINDS, **charts.BUFFERS}
    environment.filters["tail"] = names.tail
    scripts = [plotly.offline.get_plotlyjs()]
    scripts.append((Path(__file__).parent / "page.js").read_text(encoding="utf-8"))
    return environment.get_template(template).render(
        **values,
        scripts=scripts,
        digests=[_digest(script) for script in scripts],
        theme=charts.THEME,
    )


def _digest(script: str) -> str:
    found = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(found).decode()}'"
