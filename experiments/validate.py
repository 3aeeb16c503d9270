r"""How far are predictions from what was measured?

Reads measured records, prices the programs that were timed with today's code and chip
files, and sets each prediction beside its measurement: difference, mean and worst
error by phase and kind of partition, and whether the order of partitions is the
measured one. Programs are kept beside their records; where they are not, today's code
writes them again, for the same devices described. No accelerator is needed.

    python -m experiments.validate --records=docs/records --out=runs/validation

`--programs` also sets each program that was timed beside the same one compiled with no
device: FLOPs, bytes, collectives.

`--out` gets `validation.html`. `--write` puts the figures into this repository: error
bands of reports, docs/validation.md and what a test compares with. `--check` fails
where the mean error has moved by more than 3 points from them.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags
from rich.console import Console

from experiments import command
from experiments.report import provenance, terminal, validated
from experiments.report.validated import Figure
from experiments.report.workers import Workers
from experiments.validation import (
    committed,
    described,
    load,
    predict,
    summary,
    tables,
)
from experiments.validation.predict import Measured
from sharding.target import prepare_environment

_RECORDS = flags.DEFINE_string(
    "records", "docs/records", "Folder of measured records, or of such folders."
)
_OUT = flags.DEFINE_string("out", "runs/validation", "Folder of the page.")
_JSON = flags.DEFINE_string("json", None, "File for every figure, as JSON.")
_CHIP = flags.DEFINE_string(
    "chip", None, "Price as this chip: a name, NAME@published or a file."
)
_PROGRAMS = flags.DEFINE_boolean(
    "programs", False, "Also compare programs with those compiled with no device."
)
_JOBS = flags.DEFINE_integer(
    "jobs", None, "Compiles at a time; default one a core.", lower_bound=1
)
_WRITE = flags.DEFINE_boolean("write", False, "Commit the figures to this repository.")
_CHECK = flags.DEFINE_boolean("check", False, "Fail if MAPE moved by over 3 points.")


def _refuse(wrong: str) -> NoReturn:
    sys.exit(f"Nothing was validated. {wrong}")


def _workers(measured: Sequence[Measured]) -> Workers:
    # JAX starts in the workers only.
    targets = {one.record.target for one in measured} - {"attached"}
    setup = functools.partial(prepare_environment, sorted(targets))
    return Workers(_JOBS.value or os.cpu_count() or 1, setup)


def _each(
    function: Callable[[Measured], Any],
    measured: Sequence[Measured],
    workers: Workers,
    console: Console,
) -> tuple[list[Any], list[str]]:
    """Returns what `function` finds for each point, in order, and all notes."""
    found, notes = dict[int, Any](), dict[str, None]()
    for event in workers.run(function, measured):
        if event.kind == "started":
            continue
        console.print(f"  {event.item}", style="dim", highlight=False)
        if event.kind == "broke":
            notes[f"No prediction of {event.item}: {event.reason}"] = None
            continue
        found[id(event.item.record)] = event.value
        notes |= dict.fromkeys(event.value.notes)
    order = [id(one.record) for one in measured]
    return [found[name] for name in order if name in found], list(notes)


def _compare(
    measured: Sequence[Measured], workers: Workers, console: Console
) -> tuple[list[described.Pair], list[str]]:
    """Returns programs that ran beside those compiled with no device, and notes."""
    ran = [one for one in measured if one.record.target == "attached"]
    console.print(f"{len(ran)} points, their programs compiled with no device:")
    found, notes = _each(described.compare, ran, workers, console)
    pairs = [pair for one in found for pair in one.pairs]
    if pairs:
        console.print()
        console.rule("[bold]Programs that ran, and compiled with no device[/]")
        for table in (described.work(pairs), described.collectives(pairs)):
            console.print(terminal.table(table, group_by=0))
        console.print(described.headline(pairs), style="bold")
    for note in notes:
        console.print(note, style="dim")
    return pairs, notes


def _show(console: Console, figures: Sequence[Figure], notes: Sequence[str]) -> None:
    for title, group in tables.titles(figures):
        console.print()
        console.rule(f"[bold]{title}[/]")
        console.print(terminal.table(tables.points(group), group_by=0))
        console.print(terminal.table(tables.errors(group), group_by=0))
        if ranked := summary.rankings(group):
            console.print(terminal.table(tables.orders(ranked), group_by=0))
        console.print(tables.headline(group), style="bold")
    for note in notes:
        console.print(note, style="dim")


def _json(
    figures: Sequence[Figure], pairs: Sequence[described.Pair], notes: Sequence[str]
) -> str:
    """Returns everything that was found, one object."""
    found = [
        {**dataclasses.asdict(f), "difference_percent": 100 * f.difference}
        for f in figures
    ]
    groups = [
        {**dataclasses.asdict(s), "mape_percent": 100 * s.mape}
        for s in summary.summaries(figures)
    ]
    orders = [
        {
            **dataclasses.asdict(r),
            "agrees": r.agrees,
            "pairs": r.pairs,
            "regret_percent": 100 * r.regret,
        }
        for r in summary.rankings(figures)
    ]
    made = dataclasses.asdict(provenance.collect())
    return json.dumps(
        dict(
            schema=validated.SCHEMA,
            figures=found,
            errors=groups,
            orders=orders,
            programs=[dataclasses.asdict(pair) for pair in pairs],
            notes=list(notes),
            provenance=made,
        ),
        indent=1,
    )


def _page(
    out: pathlib.Path, figures: Sequence[Figure], notes: Sequence[str]
) -> pathlib.Path | None:
    """Writes the page; returns where, or None where what draws it is not installed."""
    try:
        from experiments.validation import page
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "plotly"):
            raise
        return None
    path = out / "validation.html"
    path.write_text(page.page(figures, notes, provenance.collect()), encoding="utf-8")
    return path


def main(argv: Sequence[str]) -> None:
    """Reads the flags, predicts, and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    console = command.console()
    records, out = pathlib.Path(_RECORDS.value), pathlib.Path(_OUT.value)
    if (_WRITE.value or _CHECK.value) and (
        _CHIP.value or records.resolve() != committed.RECORDS
    ):
        _refuse(
            f"--write and --check with --records={records} --chip={_CHIP.value}: the"
            f" committed figures are of {committed.RECORDS} at the chips' own rates."
            " Leave both flags out, or validate without --write and --check."
        )
    try:
        measured, notes = load.measured(records)
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        _refuse(str(error))
    console.print(f"{len(measured)} measured points, predicted again:")
    try:
        todo = functools.partial(
            predict.predict, chip=_CHIP.value, both_rates=_WRITE.value
        )
        with _workers(measured) as workers:
            found, more = _each(todo, measured, workers, console)
            figures = [f for one in found for f in one.figures]
            _show(console, figures, [*notes, *more])
            pairs = list[described.Pair]()
            if _PROGRAMS.value or _WRITE.value:
                pairs, others = _compare(measured, workers, console)
                more += [note for note in others if note not in more]
    except KeyboardInterrupt:
        sys.exit("\nStopped; nothing was written.")
    notes += more
    if not figures:
        sys.exit("No point could be predicted.")
    written = [path for path in [_page(out, figures, notes)] if path]
    if _JSON.value:
        written.append(pathlib.Path(_JSON.value))
        written[-1].write_text(_json(figures, pairs, notes) + "\n", encoding="utf-8")
    if _WRITE.value:
        if len(found) < len(measured):
            sys.exit("Nothing was committed, for some points have no prediction.")
        written += committed.write(figures, pairs)
    for path in written:
        console.print(f"  {path}", style="dim", highlight=False, soft_wrap=True)
    if _CHECK.value:
        moved = summary.drifts(figures, validated.read(validated.PATH))
        for text in moved:
            console.print(f"Moved: {text}.", style="bold")
        if moved:
            sys.exit("Run python -m experiments.validate --write if that is wanted.")


if __name__ == "__main__":
    app.run(main)
