"""Answers every job once, each record on disk before the next is looked at."""

from collections.abc import Callable, Sequence

from rich.console import Console

from experiments.claims.points import Job
from experiments.report import provenance
from experiments.report.progress import Watch
from experiments.report.record import Record
from experiments.report.store import Store
from experiments.report.workers import Workers


def sweep(
    jobs: Sequence[Job],
    answer: Callable[[Job], list[Record]],
    store: Store,
    workers: Workers,
    console: Console,
    *,
    write: Callable[[], object] = lambda: None,
) -> int:
    """Answers the jobs that `store` lacks a point of; returns how many failed.

    Args:
      jobs: in the order in which they are started.
      answer: called in worker processes; see `points.answer`.
      store: where records are and go.
      workers: processes.
      console: where progress is shown.
      write: called now and then, to show what is known so far.
    """
    missing = [job for job in jobs if any(map(store.lacks, job.points))]
    if len(missing) < len(jobs):
        console.print(
            f"{len(jobs) - len(missing)} of {len(jobs)} programs are in {store.folder}"
            " already."
        )
    failed = 0
    with Watch(console, len(missing)) as watch:
        for event in workers.run(answer, missing):
            first = event.item.points[0]
            if event.kind == "started":
                watch.started(first)
                continue
            records = event.value or [
                Record.of(
                    point, provenance.collect(), status="failed", reason=event.reason
                )
                for point in event.item.points
            ]
            failed += not event.value
            for record in records:
                store.append(record)
            watch.ended(first, records[0])
            write()
    return failed
