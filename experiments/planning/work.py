"""A plan from question to answer: candidates, search, changes, records, page."""

import dataclasses
import functools
import shlex
from pathlib import Path

from rich.console import Console

from experiments.evaluate import Ask
from experiments.planning import answer as answers
from experiments.planning import changes, space
from experiments.planning.answer import Answer
from experiments.planning.cache import Cache
from experiments.planning.changes import Outcome
from experiments.planning.search import Search
from experiments.planning.solve import solve
from experiments.planning.space import Candidate
from experiments.report import files, folder, provenance
from experiments.report.frontier import Objective
from experiments.report.store import Store
from experiments.report.workers import Workers

PAGE = "plan.html"
_VERIFIED = 3
# Without an objective every batch has its place on the frontier.
FRONTIER_BATCHES = (1, 4, 16, 64, 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A question that was answered.

    Attributes:
      ask: with every default filled in.
      objective: what must be met.
      search: finished.
      answer: in words and tables.
    """

    ask: Ask
    objective: Objective
    search: Search
    answer: Answer


def plan(
    ask: Ask,
    objective: Objective,
    *,
    workers: Workers,
    out: Path,
    console: Console,
    with_changes: bool = True,
    cut: bool = True,
) -> Plan:
    """Returns the answer to `ask`, having compiled what can win and nothing else.

    What was compiled is in `out`, so the same question goes on where it was stopped.

    Args:
      ask: of one model and one target; no batch sizes stand for all that fit.
      objective: bounds that a point must meet; none asks for the frontier.
      workers: processes that compile.
      out: folder of the answers and the page.
      console: where progress is shown.
      with_changes: if nothing meets the objective, look for one change that would.
      cut: of pipelines, also try half and twice the micro-batches.

    Raises:
      ValueError: something is wrong with the question, all of it in one message.
    """
    if not objective.given and not ask.batch_sizes:
        ask = dataclasses.replace(ask, batch_sizes=FRONTIER_BATCHES)

    def propose(asked: Ask) -> tuple[list[Candidate], list[str]]:
        function = functools.partial(space.propose, cut=cut)
        *_, event = workers.run(function, [asked])
        return event.value or ([], [event.reason])

    with console.status("Reading the question"):
        candidates, wrong = propose(ask)
    if wrong:
        raise ValueError("\n".join(wrong))
    with Cache(out) as cache:
        aim = "tokens" if objective.given else "frontier"
        search = Search(candidates, objective, aim=aim, answers=cache.answers)
        run = functools.partial(solve, workers=workers, cache=cache, console=console)
        run(search)
        outcomes: list[Outcome] = []
        if with_changes and objective.given and not search.best():
            outcomes += changes.relaxations(candidates, objective, cache.answers, run)
            for kind in changes.tries(ask):
                found = changes.tried(kind, objective, propose, run, cache.answers)
                outcomes += [found] if found else []
            outcomes += changes.out_of_reach(ask)
    best = sorted(search.best(), key=search.value, reverse=True)
    commands = [command(c) for c in best[:_VERIFIED]]
    found = answers.answer(search, outcomes, commands)
    return Plan(ask=ask, objective=objective, search=search, answer=found)


def command(candidate: Candidate) -> str:
    """Returns the command that measures a candidate where its devices are attached."""
    p = candidate.point
    asked: dict[str, object] = {
        "model": p.model, "partitions": p.partition, "rules": p.rules,
        "batch_sizes": p.batch_size, "input_len": p.input_len,
        "output_len": p.output_len, "dtype": p.dtype,
    }  # fmt: skip
    for name in ("weights", "kv"):
        if value := getattr(p, name):
            asked[name] = value
    if p.asked_micro_batches is not None:
        asked["micro_batches"] = p.asked_micro_batches
    flags = [f"--{name}={value}" for name, value in asked.items()]
    return shlex.join(["python", "-m", "experiments.measure", *flags])


def write(done: Plan, out: Path) -> list[str]:
    """Writes the page, and the records with their report; returns the files' names."""
    with Store(out) as store:
        for candidate, verdict in done.search.verdicts().values():
            if verdict.fate not in ("done", "predicted"):
                continue
            record = done.search.record(candidate)
            if record is not None and store.lacks(candidate.point):
                store.append(record)
        kept = bool(store.records)
    if kept:
        folder.write(out, done.objective)
    more = [name for name in folder.REPORTS if (out / name).exists()]
    try:
        from experiments.planning import page
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "plotly"):
            raise
        return more
    text = page.page(
        done.ask, done.objective, done.search, done.answer, provenance.collect(), more
    )
    files.replace(out / PAGE, text)
    return [PAGE, *more]
