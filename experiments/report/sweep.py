"""A sweep: every point of a question evaluated once, whatever happens on the way."""

from collections.abc import Callable, Sequence

from rich.console import Console

from experiments.report import provenance
from experiments.report.progress import Watch
from experiments.report.record import Point, Record
from experiments.report.store import Store
from experiments.report.workers import Workers


def sweep(
    points: Sequence[Point],
    evaluate: Callable[[Point], Record],
    store: Store,
    workers: Workers,
    console: Console,
) -> list[Record]:
    """Returns the record of every point, evaluating those that `store` lacks.

    A point that failed before is tried again. Each record is on disk before the next
    piece of news is looked at, so whatever ends this process, what was written stays.
    """
    missing = [p for p in points if store.lacks(p)]
    if len(missing) < len(points):
        console.print(
            f"{len(points) - len(missing)} of {len(points)} points are in"
            f" {store.folder} already."
        )
    with Watch(console, len(missing)) as watch:
        for event in workers.run(evaluate, missing):
            if event.kind == "started":
                watch.started(event.item)
                continue
            record = event.value or Record.of(
                event.item,
                provenance.collect(),
                status="failed",
                reason=event.reason,
            )
            store.append(record)
            watch.ended(event.item, record)
    return [store.records[point.key] for point in points]
