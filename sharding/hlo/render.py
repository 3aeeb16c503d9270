"""Records that render themselves: plain tables for a terminal, HTML for a notebook.

A record is a title, some lines and some tables of plain strings; the two methods of
`Rendered` do the rest. Names from HLO reach HTML escaped, always.
"""

import dataclasses
import html
import textwrap
from collections.abc import Sequence

_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_COUNTS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_WIDEST = 60  # characters of a cell in a terminal; HTML shows it all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Cells that are already text.

    Attributes:
      right: columns that hold figures.
      prose: columns of sentences, the last ones; in a terminal they stand below.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[str] = frozenset()
    prose: frozenset[str] = frozenset()

    def text(self) -> str:
        """Returns the table with its title, for a terminal."""
        if self.prose:
            return "\n".join([self.title, *map(self._paragraph, self.rows)])
        rows = [self.columns, *(tuple(map(shorten, row)) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        right = [name in self.right for name in self.columns]
        lines = [
            "  ".join(
                cell.rjust(width) if is_right else cell.ljust(width)
                for cell, width, is_right in zip(row, widths, right, strict=True)
            ).rstrip()
            for row in rows
        ]
        return "\n".join([self.title, *(f"  {line}" for line in lines)])

    def _paragraph(self, row: tuple[str, ...]) -> str:
        cells = list(zip(self.columns, row, strict=True))
        first = "  ".join(cell for name, cell in cells if name not in self.prose)
        below = [" ".join(cell.split()) for name, cell in cells if name in self.prose]
        return "\n".join(
            textwrap.fill(text, 96, initial_indent=indent, subsequent_indent="      ")
            for text, indent in [(first, "  "), *((text, "      ") for text in below)]
            if text
        )

    def html(self) -> str:
        """Returns the table as HTML; every cell is escaped."""
        styles = [
            f"text-align:{'right' if name in self.right else 'left'}"
            for name in self.columns
        ]

        def line(tag: str, cells: Sequence[str]) -> str:
            return "".join(
                f'<{tag} style="{style}">{html.escape(cell)}</{tag}>'
                for cell, style in zip(cells, styles, strict=True)
            )

        body = "".join(f"<tr>{line('td', row)}</tr>" for row in self.rows)
        return (
            f"<table><caption style='text-align:left'>{html.escape(self.title)}"
            f"</caption><thead><tr>{line('th', self.columns)}</tr></thead>"
            f"<tbody>{body}</tbody></table>"
        )


class Rendered:
    """Gives a record `str()` and notebooks `_repr_html_()`."""

    def _title(self) -> str:
        raise NotImplementedError

    def _lines(self) -> Sequence[str]:
        """Returns sentences that stand above the tables."""
        return ()

    def _tables(self) -> Sequence[Table]:
        """Returns the tables that have rows."""
        return ()

    def __str__(self) -> str:
        parts = ["\n".join([self._title(), *self._lines()])]
        return "\n\n".join(parts + [t.text() for t in self._tables() if t.rows])

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in self._lines())
        tables = "".join(t.html() for t in self._tables() if t.rows)
        title = html.escape(self._title())
        return f"<div><p><b>{title}</b></p>{lines}{tables}</div>"


def shorten(text: str) -> str:
    """Returns `text` in one line that fits a terminal's cell, its end kept.

    What tells two op_names or shapes apart usually stands at their end.
    """
    text = " ".join(text.split())
    return text if len(text) <= _WIDEST else "..." + text[3 - _WIDEST :]


def figure_bytes(value: float) -> str:
    """Example: `figure_bytes(1_310_720)` is "1.31 MB", 1 MB being 1e6 bytes."""
    return _scaled(value, _BYTES, "B")


def figure_count(value: float) -> str:
    """Example: `figure_count(1.5e12)` is "1.50 T"."""
    return _scaled(value, _COUNTS, "")


def figure_seconds(value: float) -> str:
    """Example: `figure_seconds(0.00984)` is "9.84 ms"."""
    if value == 0:
        return "0 s"
    scale, unit = next((s for s in _SECONDS if value >= s[0]), _SECONDS[-1])
    return f"{_digits(value / scale)} {unit}"


def figure_change(before: float, after: float) -> str:
    """Returns the change in percent, as a factor where it is large.

    Example:
      >>> [figure_change(200, n) for n in (150, 900, 5, 0, 200)]
      ['-25 %', 'x4.50', '÷40.0', 'gone', '']
    """
    if before == after:
        return ""
    if not before:
        return "new"
    if not after:
        return "gone"
    if after >= 2 * before:
        return f"x{_digits(after / before)}"
    if before >= 20 * after:
        return f"÷{_digits(before / after)}"
    percent = 100 * (after - before) / before
    if abs(percent) < 0.05:
        return "< 0.1 %"
    return f"{percent:+.0f} %" if abs(percent) >= 10 else f"{percent:+.1f} %"


def _scaled(value: float, scales: tuple[tuple[float, str], ...], unit: str) -> str:
    for scale, name in scales:
        if abs(value) >= scale:
            return f"{_digits(value / scale)} {name}"
    return f"{value:g} {unit}".strip()


def _digits(value: float) -> str:
    exponent = int(f"{value:.2e}".partition("e")[2])
    return f"{value:,.{max(2 - exponent, 0)}f}"
