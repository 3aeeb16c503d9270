"""If nothing meets an objective: which single change would."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from experiments.evaluate import Ask, PhaseAnswer
from experiments.planning import space
from experiments.planning.search import Aim, Search
from experiments.planning.space import Candidate
from experiments.report import units
from experiments.report.frontier import NEAR, Objective
from sharding.chips import CHIPS, Chip
from sharding.target import GPUS, MAX_GPUS

_MOST_CHIPS = 64
Propose = Callable[[Ask], tuple[list[Candidate], list[str]]]
Solve = Callable[[Search], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one change.

    Attributes:
      title: the kind of change, e.g. "other chip".
      words: what it came to.
      found: the point that meets the objective after it, or None.
      relaxes: it asks for less, rather than giving more.
    """

    title: str
    words: str
    found: Candidate | None = None
    relaxes: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Try:
    """One thing to try: what to ask instead, and how to call it."""

    title: str
    label: str
    ask: Ask


def relaxations(
    candidates: Sequence[Candidate],
    objective: Objective,
    answers: dict[str, PhaseAnswer],
    solve: Solve,
) -> Iterator[Outcome]:
    """Yields, for each bound, what it would have to be for the others to be met.

    To within `NEAR`: a search for the last percent would compile much for little.
    """
    bounds: tuple[tuple[str, Aim, str], ...] = (
        ("ttft_s", "ttft", "longer TTFT"),
        ("tpot_s", "tpot", "longer TPOT"),
        ("output_tokens_per_s", "tokens", "fewer tokens/s"),
    )
    for name, aim, title in bounds:
        if (asked := getattr(objective, name)) is None:
            continue
        rest = dataclasses.replace(objective, **{name: None})
        search = Search(candidates, rest, aim=aim, answers=answers, within=-NEAR)
        solve(search)
        if not (best := search.best()):
            yield Outcome(title=title, words="no value of it would do alone")
            continue
        needed = getattr(search.prospect(best[0]), name)
        show = units.digits if aim == "tokens" else units.seconds
        figure = f"{title.split()[-1]} of {show(needed)} instead of {show(asked)}"
        yield Outcome(
            title=title,
            words=(
                f"{figure} ({100 * (needed / asked - 1):+.0f} %) would do, with"
                f" {best[0].family} at batch {best[0].batch_size}"
            ),
            found=best[0],
            relaxes=True,
        )


def tries(ask: Ask) -> Iterator[list[Try]]:
    """Yields kinds of change, each a list from the smallest step to the largest."""
    if ask.batch_sizes:
        smaller = [b for b in space.batch_sizes() if b < min(ask.batch_sizes)]
        if smaller:
            asked = dataclasses.replace(ask, batch_sizes=tuple(smaller))
            yield [Try(title="smaller batch", label="a smaller batch", ask=asked)]
    yield [
        Try(title="fewer bits", label=label, ask=dataclasses.replace(ask, **changed))
        for label, changed in _fewer_bits(ask)
    ]
    yield [
        Try(
            title="more devices",
            label=name,
            ask=dataclasses.replace(ask, targets=(name,)),
        )
        for name in _larger(ask.targets[0])
    ]
    yield [
        Try(
            title="other chip",
            label=f"{label}",
            ask=dataclasses.replace(ask, targets=(target,), chip=chip),
        )
        for label, target, chip in _faster(ask.targets[0], ask.chip)
    ]


def tried(
    kind: Sequence[Try],
    objective: Objective,
    propose: Propose,
    solve: Solve,
    answers: dict[str, PhaseAnswer],
) -> Outcome | None:
    """Returns the outcome of one kind of change: its first step that does, or none."""
    said: list[str] = []
    for step in kind:
        candidates, wrong = propose(step.ask)
        if wrong:
            said.append(f"{step.label}: {wrong[0]}")
            continue
        search = Search(candidates, objective, answers=answers, enough=True)
        solve(search)
        if best := search.best():
            found = search.prospect(best[0])
            said.append(
                f"{step.label}: {best[0].family} at batch {best[0].batch_size} has TTFT"
                f" {units.seconds(found.ttft_s)}, TPOT {units.seconds(found.tpot_s)}"
                f" and {units.digits(found.output_tokens_per_s)} tokens/s"
            )
            words = "; ".join(said)
            return Outcome(title=step.title, words=words, found=best[0])
        fates = {v.fate for _, v in search.verdicts().values()}
        compiled = fates & {"predicted", "batch", "open"}
        said.append(
            f"{step.label} {'does not' if compiled else 'cannot, at its limits'}"
        )
    return Outcome(title=kind[0].title, words="; ".join(said)) if said else None


def out_of_reach(ask: Ask) -> list[Outcome]:
    """Returns the changes that nothing can be tried for, and why."""
    name = ask.targets[0]
    if _larger(name):
        return []
    words = f"{name} has the most devices of its kind that are modelled"
    return [Outcome(title="more devices", words=words)]


def targets(ask: Ask) -> list[str]:
    """Returns every target that a change may need."""
    steps = [step for kind in tries(ask) for step in kind]
    return sorted({name for step in steps for name in step.ask.targets})


def _fewer_bits(ask: Ask) -> list[tuple[str, dict[str, str]]]:
    """Returns narrower ways to store weights and cache than what was asked."""
    steps = [
        ("weights in int8", {"weights": "int8"}),
        ("weights in int4", {"weights": "int4"}),
        ("cache in int8", {"kv": "int8"}),
        ("weights and cache in int8", {"weights": "int8", "kv": "int8"}),
    ]
    return [
        (label, changed)
        for label, changed in steps
        if all(getattr(ask, name) is None for name in changed)
    ]


def _larger(target: str) -> list[str]:
    """Returns targets of the same chip with twice and four times the chips."""
    kind, _, text = target.partition(":")
    if kind not in CHIPS or CHIPS[kind].kind == "cpu":
        return []
    sizes = [int(size) for size in text.split("x")]
    most = MAX_GPUS if kind in GPUS else _MOST_CHIPS
    found: list[str] = []
    for _ in range(2):
        shortest = sizes.index(min(sizes))
        sizes[shortest] *= 2
        total = 1
        for size in sizes:
            total *= size
        if total <= most:
            found.append(f"{kind}:{'x'.join(map(str, sizes))}")
    return found


def _faster(target: str, priced: str | None) -> list[tuple[str, str, str | None]]:
    """Returns (label, target, chip to price as) of chips with more of anything."""
    kind, _, text = target.partition(":")
    now = CHIPS.get(priced or kind)
    if now is None or now.kind == "cpu":
        return []

    def better(chip: Chip) -> bool:
        return (
            chip.flops_per_s["bf16"] > now.flops_per_s["bf16"]
            or chip.hbm_bytes_per_s > now.hbm_bytes_per_s
            or chip.hbm_bytes > now.hbm_bytes
        )

    found = []
    for name, chip in sorted(
        CHIPS.items(), key=lambda item: item[1].flops_per_s["bf16"]
    ):
        if chip.kind != now.kind or name == now.name or not better(chip):
            continue
        if chip.kind == "tpu":
            if chip.topology == now.topology:
                found.append((f"{name}:{text}", f"{name}:{text}", None))
        elif name in GPUS:
            found.append((f"{name}:{text}", f"{name}:{text}", None))
        else:
            says = f"{text} x {name}, priced from {kind} programs"
            if now.calibrated and not chip.calibrated:
                says += " at published peaks"
            found.append((says, target, name))
    return found
