"""An answer on a terminal: totals, collectives, memory, instructions, advice.

The only module here that prints, and only to the `rich.Console` it is given.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from experiments.inspection import difference, names, tables
from experiments.inspection.answer import Answer
from experiments.inspection.difference import Comparison
from experiments.inspection.tables import Cell, Finding, Table
from experiments.report import units

_COLOURS = {
    "compute": "blue", "hbm": "cyan", "links": "magenta", "latency": "yellow",
    "added": "red", "removed": "green",
}  # fmt: skip
# Columns whose text is cut from the left where there is no room.
_PATHS = ("operation", "inside", "instruction")
# Columns that are never wider; of sets of devices the beginning says most.
_WIDEST = {"axis": 20, "array": 26, "line": 24, "program": 60}
_LEAST = 20  # characters of a path, if it has as many
_GAP = 2
_MOST_ADVICE = 8


def show(console: Console, answer: Answer, top: int) -> None:
    """Prints everything about one program, at most `top` rows of a table."""
    heading(console, answer)
    _totals(console, answer)
    advice(console, answer)
    rows = tables.collectives(answer, top)
    section(console, "Collectives", "most sent first; wire is what one device sends")
    if rows.rows:
        table(console, rows)
    else:
        console.print("  none: no device hears of another", style="dim")
    memory = answer.analysis.memory
    if memory.peak:
        at = f", at {names.tail(memory.peak_at, 60)}" if memory.peak_at else ""
        section(console, "Memory", f"{tables.size(memory.peak_bytes)} at its peak{at}")
        table(console, tables.buffers(answer, top))
    if answer.analysis.roofline:
        section(console, "Instructions", f"by least time on {_chip(answer)}")
        table(console, tables.instructions(answer, top))
    section(console, "Timeline", _clock(answer))
    table(console, tables.parts(answer))
    section(console, "Critical path", "what would have to be shorter")
    table(console, tables.path(answer, top))
    loops = tables.loops(answer, top)
    if loops.rows:
        section(console, "Loops", "")
        table(console, loops)
    warnings(console, answer)


def show_difference(console: Console, found: Comparison, top: int) -> None:
    """Prints what differs between two programs, at most `top` rows of a table."""
    console.print()
    console.rule(Text(found.title, style="bold"))
    for label, answer in zip(("before", "after"), found.answers, strict=True):
        console.print(Text(f"{label:>6}: {_facts(answer)}.", style="dim"))
    if found.difference.is_same and not found.lines:
        console.print("\nNothing differs.", style="bold")
        return
    section(console, "Totals", "of one device, one call")
    table(console, difference.totals(found))
    width = min(console.width, 100) - 8
    longest_s = max(answer.time_s for answer in found.answers)
    if longest_s:
        console.print()
        for label, answer in zip(("before", "after"), found.answers, strict=True):
            room = round(width * answer.time_s / longest_s)
            console.print(Text.assemble(f"{label:>6}  ", _pieces(answer, room)))
        console.print(_legend(found.answers))
    section(console, "Collectives that differ", "")
    rows = difference.collectives(found, top)
    if rows.rows:
        table(console, rows)
    else:
        console.print("  none", style="dim")
    rows = difference.lines(found, top)
    if rows.rows:
        section(console, "Lines responsible", f"by least time on {_chip(found.after)}")
        table(console, rows)
    for verb, advice_ in (
        ("New to look at", found.difference.advice_new),
        ("No more to look at", found.difference.advice_gone),
    ):
        if advice_:
            section(console, verb, "")
            _findings(console, tables.grouped(advice_[:_MOST_ADVICE]))
    for answer in found.answers:
        warnings(console, answer)


def heading(console: Console, answer: Answer) -> None:
    """Prints what the program is and where it is from."""
    console.print()
    console.rule(Text(names.printable(answer.subject.title), style="bold"))
    line = f"{_facts(answer)}. One device, one call."
    console.print(Text(line, style="dim"))
    if answer.subject.dumps:
        section(console, "Programs", "--module chooses another")
        table(console, tables.dumps(answer))


def _totals(console: Console, answer: Answer) -> None:
    console.print()
    gap = (0, _GAP, 0, 0)
    out = RichTable(box=None, show_header=False, pad_edge=False, padding=gap)
    out.add_column(no_wrap=True)
    out.add_column(justify="right", no_wrap=True)
    out.add_column(overflow="fold")
    for name, figure, remark in tables.totals(answer):
        out.add_row(name, Text(figure, style="bold"), Text(remark, style="dim"))
    console.print(out)
    if answer.analysis.roofline and answer.time_s:
        console.print(_pieces(answer, min(console.width, 100)))
        console.print(_legend([answer]))


def _facts(answer: Answer) -> str:
    return " · ".join(tables.facts(answer))


def _pieces(answer: Answer, width: int) -> Text:
    """Returns the time bound as one bar, a colour for each limit."""
    bar = Text()
    for limit, time_s in tables.by_limit(answer):
        if time_s:
            cells = max(round(time_s / answer.time_s * width), 1)
            bar.append("█" * cells, _COLOURS[limit])
    return bar


def _legend(answers: Sequence[Answer]) -> Text:
    """Returns what the colours of bars mean, with the shares of each bar."""
    legend = Text()
    times = [dict(tables.by_limit(answer)) for answer in answers]
    for limit, name in tables.LIMITS.items():
        if any(time[limit] for time in times):
            shares = [
                units.percent(time[limit] / answer.time_s) if answer.time_s else "-"
                for time, answer in zip(times, answers, strict=True)
            ]
            legend.append("■ ", _COLOURS[limit])
            legend.append(f"{name} {' → '.join(shares)}   ", "dim")
    return legend


def section(console: Console, name: str, remark: str) -> None:
    """Prints the heading of a part."""
    console.print()
    console.print(Text.assemble((name, "bold"), (f"  {remark}" * bool(remark), "dim")))


def advice(console: Console, answer: Answer) -> None:
    """Prints what a person should look at, the largest first."""
    every = answer.analysis.advice
    if every:
        section(console, "Look at", "most bytes first")
        _findings(console, tables.grouped(every[:_MOST_ADVICE]))
    if (left := len(every) - _MOST_ADVICE) > 0:
        console.print(f"  and {left} smaller", style="dim")


def _findings(console: Console, found: Sequence[Finding]) -> None:
    for number, each in enumerate(found, start=1):
        for k, (what, source, evidence) in enumerate(each.places):
            label = "" if k else f"{number}."
            place = (f"  {source}", "cyan")
            console.print(Text.assemble(f"{label:>3} ", (what, "bold"), place))
            if evidence:
                console.print(Padding(Text(evidence, "dim"), (0, 0, 0, 4)))
        if each.change:
            console.print(Padding(Text(f"→ {each.change}"), (0, 0, 0, 4)))


def warnings(console: Console, answer: Answer) -> None:
    """Prints what the figures assume."""
    found = tables.assumed(answer)
    if found:
        section(console, "Assumed", "")
        for text in found[:_MOST_ADVICE]:
            console.print(Padding(Text(text, "dim"), (0, 0, 0, 2)))
        if (left := len(found) - _MOST_ADVICE) > 0:
            console.print(f"  and {left} more", style="dim")


def table(console: Console, content: Table) -> None:
    """Prints a table in the width there is, the ends of long names kept."""
    shown = _columns(content, console.width)
    out = RichTable(
        box=None, header_style="dim", pad_edge=False, padding=(0, _GAP, 0, 0)
    )
    for i, width in shown.items():
        name = content.columns[i]
        right = "right" if name in content.figures else "left"
        out.add_column(Text(name), justify=right, no_wrap=True, width=width)
    for row in content.rows:
        out.add_row(*(
            _cell(row[i], width, content.columns[i]) for i, width in shown.items()
        ))  # fmt: skip
    console.print(out)
    if content.left_out:
        more = f"  and {content.left_out:,} more; --top shows more"
        console.print(more, style="dim")


def _cell(cell: Cell, width: int, column: str) -> Text:
    text = cell.text
    if column == "axis" and len(text) > width:
        text = f"{text[: width - 1]}…"
    return Text(names.tail(text, width), _COLOURS.get(cell.mark, ""))


def _columns(content: Table, width: int) -> dict[int, int]:
    """Returns the columns that have something to say, and how wide each may be."""
    wanted = {
        i: max(len(name), *(len(row[i].text) for row in content.rows))
        for i, name in enumerate(content.columns)
        if any(row[i].text.strip("-") for row in content.rows)
    }
    for i, size in wanted.items():
        wanted[i] = min(size, _WIDEST.get(content.columns[i], size))
    dispensable = list(content.dispensable)
    while True:
        paths = [i for i in wanted if content.columns[i] in _PATHS]
        rest = sum(wanted[i] for i in wanted if i not in paths)
        room = width - rest - _GAP * len(wanted)
        needed = sum(min(wanted[i], _LEAST) for i in paths)
        if room >= needed or not dispensable:
            break
        name = dispensable.pop(0)
        wanted = {i: w for i, w in wanted.items() if content.columns[i] != name}
    # Short ones get what they want, the others share what is left.
    for done, i in enumerate(sorted(paths, key=lambda i: wanted[i])):
        wanted[i] = max(min(wanted[i], room // (len(paths) - done)), 8)
        room -= wanted[i]
    return wanted


def _clock(answer: Answer) -> str:
    """Returns what is said above the timeline."""
    t, priced = answer.timeline, answer.chip.rates_from
    idle = tables.seconds(t.idle_s.get("kernels", t.total_s))
    said = (
        f"{tables.seconds(t.total_s)} a call by {priced}, {idle} of it no kernel runs;"
    )
    said += f" {t.kernels:,.0f} kernels, {t.collectives:,.0f} collectives"
    if t.cycles:
        said += f"; XLA itself estimates {t.cycles:,.0f} cycles"
    return said


def _chip(answer: Answer) -> str:
    return answer.chip.title + (" (assumed)" if answer.is_assumed else "")
