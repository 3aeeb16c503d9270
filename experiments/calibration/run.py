"""Runs a calibration: one point after the other, each on disk before the next."""

import dataclasses
import functools
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from experiments.calibration import bench
from experiments.calibration.bench import Ask
from experiments.calibration.points import Point
from experiments.report import units
from experiments.report.lines import Lines
from experiments.report.workers import Workers
from sharding.chips.calibration import (
    Header,
    Sample,
    header_line,
    read_calibration,
    sample_line,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run left behind.

    Attributes:
      path: the file of samples, which is a chip.
      done: points that are in it and have times.
      failed: points that were tried and have none, with the reason.
      left: points for which there was no time.
    """

    path: pathlib.Path
    done: int
    failed: tuple[tuple[str, str], ...]
    left: int


class Samples:
    """The file of samples: opened, continued, appended to.

    Args:
      path: the file; made with `header` if it is not there.
      header: of this run.

    Raises:
      ValueError: the file was made under other conditions, or is no calibration, or
        another process writes to it.
    """

    def __init__(self, path: pathlib.Path, header: Header):
        self._lines = Lines(path)
        try:
            self.by_key = self._read(path, header)
        except ValueError:
            self._lines.close()
            raise

    def _read(self, path: pathlib.Path, header: Header) -> dict[str, Sample]:
        """Returns the samples of the file, whose last header is now `header`."""
        if not self._lines.texts:
            self._lines.append(header_line(header))
            return {}
        found = read_calibration(path)
        before, now = found.header.conditions, header.conditions
        other = [f"{k} {before[k]} -> {now[k]}" for k in now if before[k] != now[k]]
        if other:
            raise ValueError(
                f"cannot continue {path}: {'; '.join(other)}. The samples of one file"
                " are made under the same conditions. Choose another --out, or remove"
                " the file."
            )
        if found.headers[-1].devices != header.devices:
            self._lines.append(header_line(header))
        return {sample.key: sample for sample in found.samples}

    def lacks(self, point: Point) -> bool:
        """Whether a point has no times yet."""
        found = self.by_key.get(point.key)
        return found is None or found.reason is not None

    def append(self, sample: Sample) -> None:
        """Writes one sample; it is on disk when this returns."""
        self._lines.append(sample_line(sample))
        self.by_key[sample.key] = sample

    def close(self) -> None:
        self._lines.close()


def calibrate(
    ask: Ask,
    out: pathlib.Path,
    budget_s: float,
    console: Console,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Returns what was measured within a budget and written to a file in `out`.

    Points that the file has are not measured again, failed ones are; a process that
    dies costs its point.

    Raises:
      ValueError: the devices cannot be measured, or the file belongs to others.
    """
    start = clock()
    with Workers(1, functools.partial(bench.prepare, ask.target)) as workers:
        header, points = _news(workers, bench.read, ask)
        path = out / f"{header.chip}.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        if ask.chip and ask.chip.endswith(".toml"):
            beside = out / f"{header.chip}.toml"
            if not beside.exists():
                shutil.copy(ask.chip, beside)
        samples = Samples(path, header)
        try:
            missing = [point for point in points if samples.lacks(point)]
            if len(missing) < len(points):
                console.print(f"{len(points) - len(missing)} points are in {path}.")
            with _Watch(console, len(missing)) as watch:
                for point in missing:
                    if clock() - start > budget_s:
                        break
                    watch.starts(point)
                    sample = _measured(workers, point, ask)
                    samples.append(sample)
                    watch.ends(sample)
            wanted = {point.key: str(point) for point in points}
            found = {k: s for k, s in samples.by_key.items() if k in wanted}
            return Outcome(
                path=path,
                done=sum(not sample.reason for sample in found.values()),
                failed=tuple(
                    (wanted[k], s.reason) for k, s in found.items() if s.reason
                ),
                left=len(wanted) - len(found),
            )
        finally:
            samples.close()


def _news(workers: Workers, function: Callable[[Any], Any], item: Any) -> Any:
    *_, event = workers.run(function, [item])
    if event.kind == "broke":
        raise ValueError(event.reason)
    return event.value


def _measured(workers: Workers, point: Point, ask: Ask) -> Sample:
    """Returns the sample of a point, even if the process died of it.

    Raises:
      ValueError: another process uses the devices.
    """
    *_, event = workers.run(functools.partial(bench.measure, ask=ask), [point])
    if event.kind != "broke":
        return event.value
    if "guard.py" in event.reason:
        raise ValueError(event.reason)
    return Sample(
        name=point.name, at=point.at, links=point.links, slots=0, reason=event.reason
    )


class _Watch:
    """Shows how it gets on: a bar on a terminal, a line a point elsewhere."""

    def __init__(self, console: Console, total: int):
        self._console = console
        self._total = total
        self._done = 0
        self._bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}", style="dim", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "_Watch":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def starts(self, point: Point) -> None:
        self._started = time.monotonic()
        self._bar.update(self._task, description=str(point))

    def ends(self, sample: Sample) -> None:
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        took = units.seconds(time.monotonic() - self._started)
        if sample.reason or not self._console.is_terminal:
            said = (
                sample.reason or f"{units.seconds(sample.call_s / sample.links)} a link"
            )
            line = f"[{self._done}/{self._total}] {sample.key}: {said} ({took})"
            self._console.print(Text(line), soft_wrap=True)
