"""The report on a terminal: the answer, a Pareto plot, tables, what was turned down.

The only module here that prints, and only to the `rich.Console` it is given.
"""

import itertools
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from experiments.report import folder, store, tables, units, words
from experiments.report.frontier import (
    Objective,
    Question,
    pareto,
    partition_order,
)
from experiments.report.record import Record

_COLOURS = (
    "blue", "red", "green", "magenta", "dark_orange", "cyan", "yellow4",
    "deep_pink2", "spring_green4", "purple",
)  # fmt: skip
# Columns that a narrow console goes without, the first first.
_DISPENSABLE = ("limited by", "% of limit", "tokens/s", "memory", "frontier")
_DISPENSABLE_OF_MEASURED = ("limit", "spread", "tokens/s")
# Bit of each of a braille character's 2 x 4 dots, [row][column]; U+2800 is empty.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_LONG = 40  # characters; more are words


def show(console: Console, question: Question, objective: Objective) -> None:
    """Prints one question's report."""
    console.print()
    console.rule(f"[bold]{escape(words.title(question))}[/], {words.size(question)}")
    q = question
    rates = f"; {words.rates(q)}" if words.rates(q) else ""
    console.print(
        f"{q.stored}, {q.input_len:,} tokens in, {q.output_len:,} out{rates};"
        f" {words.outcome(q)}.",
        style="dim",
    )
    if question.ok:
        console.print()
        for line in scatter(question, width=min(console.width, 100)):
            console.print(line, no_wrap=True, overflow="crop")
        console.print()
        for content in tables.figures(question, objective):
            console.print(_fitting(console, content))
    if (warnings := tables.warnings(question))[1]:
        console.print("[bold]Warnings[/]")
        console.print(table(warnings))
    if question.not_ok:
        console.print("\n[bold]Without an answer, and why[/]")
        console.print(table(tables.turned_down(question)))
    console.print()
    console.print(Text(words.headline(question), style="bold"))
    for name, sentence in words.answers(question, objective):
        console.print(Text.assemble((f"{name}: ", "bold"), sentence))
    for name, sentence in words.trust(question):
        console.print(Text.assemble((f"{name}: ", "bold dim"), (sentence, "dim")))


def show_files(console: Console, out: Path) -> None:
    """Prints where the files are and how to see them again."""
    console.print()
    for name in (*folder.REPORTS, store.FILE_NAME):
        if not (out / name).exists():
            continue
        console.print(f"  {out / name}", style="dim", highlight=False, soft_wrap=True)
    command = shlex.join(["python", "-m", "experiments.show", f"--out={out}"])
    console.print(Text.assemble("To see this again: ", (command, "bold")))


def scatter(question: Question, *, width: int = 80, height: int = 18) -> list[Text]:
    """Returns a plot of tokens/s/user against tokens/s/chip, both logarithmic.

    A partition is a letter; points of one partition are its batch sizes. The
    frontier is the dotted line, braille dots two by four to a character.
    """
    labels = series(question)
    best = pareto(question.ok)
    margin = 9
    columns, rows = width - margin - 1, height
    x_of = _scale([_x(r) for r in question.ok], columns)
    y_of = _scale([_y(r) for r in question.ok], rows)
    cells = [[0] * columns for _ in range(rows)]
    for a, b in itertools.pairwise(best):
        _line(cells, (x_of(_x(a)), y_of(_y(a))), (x_of(_x(b)), y_of(_y(b))))
    marks: dict[tuple[int, int], tuple[str, str]] = {}
    keys = {r.key for r in best}
    # The frontier's own letters are drawn last, so none is hidden.
    for r in sorted(question.ok, key=lambda r: r.key in keys):
        i = labels.index(question.label(r))
        style = _COLOURS[i % len(_COLOURS)] + (" bold" if r.key in keys else "")
        place = (rows - 1 - int(y_of(_y(r)) * rows), int(x_of(_x(r)) * columns))
        marks[place] = (_letter(i), style)
    xs, ys = [_x(r) for r in question.ok], [_y(r) for r in question.ok]
    ticks = {rows - 1 - int(y_of(v) * rows): v for v in units.ticks(min(ys), max(ys))}
    lines = [Text("tokens/s/chip", style="dim")]
    for row in range(rows):
        name = units.tick(ticks[row]) if row in ticks else ""
        line = Text(f"{name:>{margin - 2}} {'┤' if row in ticks else '│'}", style="dim")
        line.append("".join(chr(0x2800 + d) if d else " " for d in cells[row]))
        for (marked, column), (letter, style) in marks.items():
            if marked == row:
                at = margin + column
                line = Text.assemble(line[:at], (letter, style), line[at + 1 :])
        lines.append(line)
    axis, names = ["─"] * columns, [" "] * (columns + margin)
    for value in units.ticks(min(xs), max(xs)):
        column, name = int(x_of(value) * columns), units.tick(value)
        start = margin + column - len(name) // 2
        if column >= columns or start + len(name) > len(names):
            continue
        axis[column] = "┬"
        names[start : start + len(name)] = name
    lines.append(Text(" " * (margin - 1) + "└" + "".join(axis), style="dim"))
    lines.append(Text("".join(names), style="dim"))
    lines.append(Text(f"{'tokens/s/user':>{width - 1}}", style="dim"))
    legend = Text("  ")
    for i, label in enumerate(labels):
        legend.append(f"{_letter(i)} {label}   ", _COLOURS[i % len(_COLOURS)])
    legend.append("⠒⠒ frontier", "dim")
    lines.append(legend)
    return lines


def series(question: Question) -> list[str]:
    """Returns the names of the series with figures, in the order of partitions."""
    found = {question.label(r): partition_order(r.partition) for r in question.ok}
    return sorted(found, key=lambda label: (found[label], label))


def _fitting(console: Console, content: tables.Table) -> Table:
    """Returns the table without the columns that the console has no room for."""
    out, wide = table(content, group_by=0), console.options.update(max_width=1000)
    dispensable = _DISPENSABLE_OF_MEASURED if "off" in content[0] else _DISPENSABLE
    for i in range(1, len(dispensable) + 1):
        if console.measure(out, options=wide).maximum <= console.width:
            break
        out = table(content, group_by=0, drop=set(dispensable[:i]))
    return out


def table(
    content: tables.Table,
    *,
    group_by: int | None = None,
    drop: set[str] | None = None,
) -> Table:
    """Returns a table laid out for a terminal.

    Args:
      content: headings and rows.
      group_by: column whose changes start a new group of rows.
      drop: headings of columns to leave out.
    """
    headings, rows = content
    kept = [i for i, name in enumerate(headings) if name not in (drop or ())]
    out = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for i in kept:
        figures = all(tables.is_figure(row[i]) for row in rows)
        # What is long enough to be words may be broken, figures never.
        long = i == kept[-1] or max((len(row[i]) for row in rows), default=0) > _LONG
        out.add_column(
            Text(headings[i]),
            justify="right" if figures and headings[i] != "frontier" else "left",
            no_wrap=not long,
            overflow="fold",
        )
    for previous, row in zip([None, *rows], rows, strict=False):
        if group_by is not None and previous and previous[group_by] != row[group_by]:
            out.add_section()
        out.add_row(*(Text(row[i]) for i in kept))
    return out


def _letter(i: int) -> str:
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"[i % 52]


def _x(record: Record) -> float:
    return record.require("tokens_per_s_per_user")


def _y(record: Record) -> float:
    return record.require("tokens_per_s_per_chip")


def _scale(values: Sequence[float], cells: int):
    """Returns value -> place in [0, 1), logarithmic, half a cell free at both ends."""
    low, high = math.log(min(values)), math.log(max(values))
    if high - low < 0.1:
        low, high = low - 0.35, high + 0.35
    edge = 0.5 / cells * (high - low)
    low, high = low - edge, high + edge
    return lambda value: min((math.log(value) - low) / (high - low), 1 - 1e-9)


def _line(
    cells: list[list[int]], start: tuple[float, float], end: tuple[float, float]
) -> None:
    """Draws a line of braille dots between two places in [0, 1) x [0, 1)."""
    rows, columns = len(cells), len(cells[0])
    steps = 2 * (rows * 4 + columns * 2)
    for i in range(steps + 1):
        x = start[0] + (end[0] - start[0]) * i / steps
        y = start[1] + (end[1] - start[1]) * i / steps
        dot_x, dot_y = int(x * columns * 2), rows * 4 - 1 - int(y * rows * 4)
        cells[dot_y // 4][dot_x // 2] |= _DOTS[dot_y % 4][dot_x % 2]
