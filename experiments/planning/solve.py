"""Runs a search with worker processes, tells how it gets on, and keeps every answer."""

import time

from rich.console import Console
from rich.text import Text

from experiments.evaluate import PhaseAnswer
from experiments.planning import space
from experiments.planning.cache import Cache
from experiments.planning.search import Search
from experiments.planning.space import Task
from experiments.report import units
from experiments.report.workers import Workers


def solve(search: Search, workers: Workers, cache: Cache, console: Console) -> None:
    """Compiles what `search` asks for until it asks no more."""
    started: dict[str, float] = {}
    with console.status("") as status:
        for event in workers.follow(space.answer, search.next):
            task: Task = event.item
            if event.kind == "started":
                started[task.key] = time.monotonic()
                if console.is_terminal:
                    status.update(Text(f"{_standing(search)}; compiling {_name(task)}"))
                continue
            answer = event.value
            if answer is None:
                answer = PhaseAnswer(
                    phase=task.phase, status="failed", reason=event.reason
                )
            else:
                cache.add(task.key, answer)
            search.learn(task, answer)
            took_s = time.monotonic() - started.pop(task.key)
            if not console.is_terminal or answer.status == "failed":
                line = f"{_name(task)}: {_result(answer)} ({units.seconds(took_s)})"
                console.print(Text(f"{line}; {_standing(search)}"), soft_wrap=True)


def _name(task: Task) -> str:
    p = task.point
    cut = f" M{p.asked_micro_batches}" if p.asked_micro_batches else ""
    return f"{task.phase} of {p.partition} {p.rules}{cut} batch {p.batch_size}"


def _result(answer: PhaseAnswer) -> str:
    if answer.parts is None or answer.status != "ok":
        return f"{answer.status}: {answer.reason}"
    return units.seconds(answer.parts.total_s)


def _standing(search: Search) -> str:
    """Returns how far the search is, e.g. "7 open"."""
    found = search.verdicts().values()
    left = [c for c, verdict in found if verdict.fate == "open"]
    best = search.best()
    if not best or search.aim == "frontier":
        return f"{len(left)} candidates open"
    name = f"{best[0].family} batch {best[0].batch_size}"
    return f"best so far {name}; {len(left)} candidates could still be better"
