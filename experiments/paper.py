r"""Which claims about TP and PP hold, once programs are compiled and memory counted?

Re-tests the claims C1 to C14 of arXiv:2603.05692, which simulated Llama-3.1-70B and
405B on eight GPUs from formulas: compiles every partition on its prompts and batches,
once for all chips, prices the programs as h100, h200, mi325x and mi355x, and says of
each claim whether it holds, with the rows behind it. Nothing is run.

    python -m experiments.paper --out=runs/paper

A program that was compiled is not compiled again, so the same command goes on where it
was stopped, and prices everything anew when a chip's rates have changed. The page of
rows kept earlier takes no compiler:

    python -m experiments.paper --rows=docs/records/2026-11-30-paper \
        --out=runs/paper --findings=docs/findings.md
"""

import functools
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from absl import app, flags
from rich.console import Console

from experiments import command
from experiments.claims import folder, points, timed
from experiments.claims.sweep import sweep
from experiments.report import units
from experiments.report.store import Store
from experiments.report.workers import Workers
from sharding.target import prepare_environment

_OUT = flags.DEFINE_string("out", "runs/paper", "Folder of results, programs, page.")
_ROWS = flags.DEFINE_string("rows", None, "Make the page from these rows instead.")
_KEEP = flags.DEFINE_string("keep", None, "Also write compact rows into this folder.")
_FINDINGS = flags.DEFINE_string("findings", None, "Also write Markdown to this file.")
_MEASURED = flags.DEFINE_string(
    "measured", "docs/records", "Folder of records of earlier measurements."
)
_FIRST = flags.DEFINE_integer(
    "first", None, "Only so many programs, of those most claims rest on.", 1
)
_JOBS = flags.DEFINE_integer(
    "jobs", None, "Compiles at a time; default one a core.", lower_bound=1
)


def _sweep(out: pathlib.Path, console: Console) -> int:
    """Answers what is missing and keeps the rows; returns how many jobs failed."""
    asked = tuple(points.specs())
    found = timed.find(pathlib.Path(_MEASURED.value))
    # JAX starts in the workers only.
    setup = functools.partial(prepare_environment, points.targets(asked))
    with Workers(_JOBS.value or os.cpu_count() or 1, setup) as workers:
        question = points.Question(specs=asked, folder=out / "programs")
        with console.status("Reading the question"):
            *_, planned = workers.run(points.jobs, [question])
        if planned.value is None:
            sys.exit(f"Nothing was started. {planned.reason}")
        jobs = planned.value[: _FIRST.value]
        with Store(out) as store:
            failed = sweep(jobs, points.answer, store, workers, console)
            wanted = {point.key for job in jobs for point in job.points}
            records = [r for r in store.records.values() if r.key in wanted]
        with console.status(f"Predicting {len(found)} measured points again"):
            events = list(workers.run(timed.answer, found))
    records += [event.value for event in events if event.kind == "finished"]
    for event in events:
        if event.kind == "broke":
            console.print(f"No prediction of {event.item}: {event.reason}")
            failed += 1
    folder.keep(out, records)
    return failed


def main(argv: Sequence[str]) -> None:
    """Reads the flags, sweeps, and writes the pages."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    console = command.console()
    out = pathlib.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    start, failed = time.monotonic(), 0
    try:
        if _ROWS.value is None:
            failed = _sweep(out, console)
        rows = pathlib.Path(_ROWS.value or out)
        folder.write_page(rows, out)
        if _KEEP.value:
            folder.copy(rows, pathlib.Path(_KEEP.value))
        if _FINDINGS.value:
            name = _KEEP.value or _ROWS.value or _OUT.value
            folder.write_findings(rows, pathlib.Path(_FINDINGS.value), name)
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. The same command goes on from what is in {out}.")
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    for line in folder.verdicts(rows):
        console.print(line, markup=False, soft_wrap=True)
    took = units.seconds(time.monotonic() - start)
    console.print(f"{out / folder.PAGE}, in {took}")
    if failed:
        sys.exit(f"{failed} programs failed; the same command tries them again.")


if __name__ == "__main__":
    app.run(main)
