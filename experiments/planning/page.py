"""The answer to a plan on a terminal, and as one HTML file readable offline."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from experiments.evaluate import Ask
from experiments.planning.answer import Answer
from experiments.planning.search import Search
from experiments.planning.space import Candidate
from experiments.report import charts, terminal, units
from experiments.report import html as pages
from experiments.report.frontier import Objective
from experiments.report.record import Provenance

_MOST_ROWS = 16  # on a terminal
_FILLED = {"done"}
_SHOWN = ("done", "predicted", "beaten", "open", "batch", "limit")


def title(ask: Ask, objective: Objective) -> str:
    """Returns the question in one line."""
    priced = f" priced as {ask.chip}" if ask.chip else ""
    what = f"How should {ask.targets[0]}{priced} share {ask.models[0]}"
    if not objective.given:
        return f"{what}?"
    bounds = [
        f"{name} ≤ {units.seconds(value)}"
        for name, value in (("TTFT", objective.ttft_s), ("TPOT", objective.tpot_s))
        if value is not None
    ]
    if objective.output_tokens_per_s is not None:
        bounds.append(
            f"at least {units.digits(objective.output_tokens_per_s)} tokens/s"
        )
    return f"{what} with {', '.join(bounds)}?"


def facts(ask: Ask) -> list[str]:
    """Returns what was asked besides the title."""
    return [
        f"{ask.input_len:,} tokens in, {ask.output_len:,} out",
        ask.dtype,
        *([f"weights {ask.weights}"] if ask.weights else []),
        *([f"cache {ask.kv}"] if ask.kv else []),
        f"rules {', '.join(ask.rules)}",
        f"partitions {', '.join(ask.partitions)}",
    ]


def show(console: Console, ask: Ask, objective: Objective, answer: Answer) -> None:
    """Prints the answer."""
    console.print()
    console.rule(f"[bold]{escape(title(ask, objective))}[/]")
    console.print(Text("; ".join(facts(ask)), style="dim"))
    console.print()
    console.print(Text(answer.headline, style="bold"))
    for name, text in answer.paragraphs:
        console.print(Text.assemble((f"{name}: ", "bold"), text))
    if answer.best[1]:
        console.print("\n[bold]The best[/]")
        console.print(terminal.table(answer.best))
    if answer.changes[1]:
        console.print("\n[bold]One change at a time[/]")
        console.print(terminal.table(answer.changes))
    console.print("\n[bold]The best of each partition and rule table[/]")
    headings, rows = answer.families
    console.print(terminal.table((headings, rows[:_MOST_ROWS])))
    if len(rows) > _MOST_ROWS:
        console.print(f"and {len(rows) - _MOST_ROWS} more, on the page", style="dim")
    if answer.commands:
        console.print("\n[bold]To verify by measurement, on the machine itself[/]")
        for command in answer.commands:
            console.print(Text(f"  {command}"), soft_wrap=True)


def page(
    ask: Ask,
    objective: Objective,
    search: Search,
    answer: Answer,
    made: Provenance,
    more: Sequence[str],
) -> str:
    """Returns the answer as HTML, made by `made`, with links to `more` files."""
    return pages.render(
        "plan.html.j2",
        Path(__file__).parent,
        title=title(ask, objective),
        facts=facts(ask),
        answer=answer,
        figure=chart(search),
        colours=legend(search),
        provenance=[
            ("command", made.command),
            ("commit", made.commit + (" (with uncommitted changes)" * made.dirty)),
            *made.versions.items(),
            ("made (UTC)", made.time),
        ],
        more=more,
    )


def chart(search: Search) -> dict[str, Any]:
    """Returns tokens/s/user against tokens/s/chip of all that could be looked into.

    What was compiled is where it is predicted; what was not stands at the corner that
    it cannot pass, smaller and pale.
    """
    found = [
        (candidate, verdict)
        for candidate, verdict in search.verdicts().values()
        if candidate.refused is None and verdict.fate in _SHOWN
    ]
    colour = charts.colours_of(c.point.partition for c, _ in found)
    figure = go.Figure()
    groups: dict[tuple[str, bool], list[tuple[Candidate, str]]] = {}
    for candidate, verdict in found:
        exact = search.prospect(candidate).exact
        key = (candidate.point.partition, exact)
        groups.setdefault(key, []).append((candidate, verdict.fate))
    for (partition, exact), pairs in sorted(groups.items(), key=lambda g: g[0][1]):
        shade = colour[partition]
        prospects = [search.prospect(c) for c, _ in pairs]
        figure.add_scatter(
            x=[1 / p.tpot_s for p in prospects],
            y=[p.tokens_per_s_per_chip for p in prospects],
            mode="markers+text" if exact else "markers",
            text=[str(c.batch_size) for c, _ in pairs] if exact else None,
            textfont=dict(
                size=10,
                color=["white" if fate in _FILLED else shade for _, fate in pairs],
            ),
            name=html.escape(partition),
            opacity=1.0 if exact else 0.35,
            customdata=[_hover(search, c) for c, _ in pairs],
            hovertemplate="%{customdata}<extra></extra>",
            marker=dict(
                size=21 if exact else 6,
                color=[
                    shade if f in _FILLED or not exact else "white" for _, f in pairs
                ],
                line=dict(width=1.5 if exact else 0, color=shade),
            ),
            showlegend=False,
        )
    prospects = [search.prospect(c) for c, _ in found]
    if (tpot_s := search.objective.tpot_s) is not None:
        figure.add_vline(x=1 / tpot_s, line=dict(color="#6b6b6b", width=1, dash="dash"))
    figure.update_layout(
        height=460,
        xaxis=charts.log_axis("tokens/s/user", [1 / p.tpot_s for p in prospects]),
        yaxis=charts.log_axis(
            "tokens/s/chip", [p.tokens_per_s_per_chip for p in prospects]
        ),
    )
    return charts.finish(figure)


def legend(search: Search) -> list[tuple[str, str]]:
    """Returns (partition, colour) of the chart."""
    names = [c.point.partition for c in search.candidates if c.refused is None]
    return list(charts.colours_of(names).items())


def _hover(search: Search, candidate: Candidate) -> str:
    found = search.prospect(candidate)
    figures = ", ".join(
        f"{label} {'' if search.is_known(candidate, name) else 'at least '}"
        f"{units.seconds(getattr(found, name))}"
        for label, name in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"))
    )
    most = "" if found.exact else "at most "
    return (
        f"<b>{html.escape(candidate.family)}</b>, batch {candidate.batch_size}<br>"
        f"{figures}<br>{most}{units.digits(found.tokens_per_s_per_chip)} tokens/s/chip"
    )
