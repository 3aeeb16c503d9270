"""Shows how a sweep gets on: a bar on a terminal, a line a point elsewhere."""

import time
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from experiments.report import units
from experiments.report.record import Point, Record


class Watch:
    """Follows points as they start and end.

    Args:
      console: where to print.
      total: points that will be evaluated.
    """

    def __init__(self, console: Console, total: int):
        self._console = console
        self._total = total
        self._done = 0
        self._started: dict[str, float] = {}
        self._names: dict[str, str] = {}
        self._bar: Progress | None = None
        if console.is_terminal:
            bar = Progress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.description}", style="dim", markup=False),
                console=console,
                transient=True,
            )
            bar.add_task("", total=total)  # the first, TaskID(0)
            self._bar = bar

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def started(self, point: Point) -> None:
        self._started[point.key] = time.monotonic()
        self._names[point.key] = f"{point.partition} batch {point.batch_size}"
        self._describe()

    def ended(self, point: Point, record: Record) -> None:
        took_s = time.monotonic() - self._started.pop(point.key)
        del self._names[point.key]
        self._done += 1
        if self._bar:
            self._bar.update(TaskID(0), completed=self._done)
            self._describe()
        if record.status == "failed" or not self._bar:
            line = f"[{self._done}/{self._total}] {point}: {_result(record)}"
            text = Text(f"{line} ({units.seconds(took_s)})")
            self._console.print(text, soft_wrap=True)

    def _describe(self) -> None:
        if self._bar:
            self._bar.update(TaskID(0), description=", ".join(self._names.values()))


def _result(record: Record) -> str:
    if record.status != "ok":
        return f"{record.status}: {record.reason}"
    return (
        f"TTFT {units.seconds(record.require('ttft_s'))},"
        f" TPOT {units.seconds(record.require('tpot_s'))}"
    )
