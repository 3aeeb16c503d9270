"""What could be chosen: every candidate of a question, with the least it can take.

A candidate is a point and what is known of it without compiling: whether it can work,
what it holds, and the least times of its phases. Those that come to programs compiled
already for another have the same keys, so nothing is compiled twice. `propose` opens
targets, so it belongs into a worker process.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from experiments import evaluate
from experiments.evaluate import Ask, PhaseAnswer
from experiments.planning import bounds
from experiments.report import units
from experiments.report.record import Point, digest
from sharding.partition import Partition
from sharding.program import Phase, Program
from sharding.rules import AxisRules
from sharding.target import Target, parse_target

# Rule tables that are searched unless others are named. `replicated` is the baseline
# that repeats work: never better than `megatron` with the same devices.
RULES = ("megatron", "sequence", "two_d", "kv_seq")
MAX_BATCH_SIZE = 4096
# Of the micro-batches that a program would choose.
_SHARES = {"": 1.0, "half the micro-batches": 0.5, "twice the micro-batches": 2.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One point of the search.

    Attributes:
      point: what would be evaluated.
      family: everything but the batch, in words.
      keys: of the program of each phase; equal programs have equal keys.
      forms: how the program of each phase is written, see `sharding.choices`.
      least_s: no prediction of a phase is below this.
      held_bytes: weights and cache of one device.
      available_bytes: memory of one device.
      refused: why it cannot work or does not fit, which needs no compiler; or None.
    """

    point: Point
    family: str
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    forms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    least_s: Mapping[str, float] = dataclasses.field(default_factory=dict)
    held_bytes: int = 0
    available_bytes: int = 0
    refused: PhaseAnswer | None = None

    @property
    def batch_size(self) -> int:
        return self.point.batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One program to compile."""

    point: Point
    phase: Phase
    key: str

    def __str__(self) -> str:
        return f"{self.point} {self.phase}"


def answer(task: Task) -> PhaseAnswer:
    """Returns what becomes of a task's program; for a worker process."""
    return evaluate.evaluate_phase(task.point, task.phase)


def batch_sizes(largest: int = MAX_BATCH_SIZE) -> tuple[int, ...]:
    """Returns powers of two and the numbers half way between them.

    Example:
      >>> batch_sizes(16)
      (1, 2, 4, 6, 8, 12, 16)
    """
    powers = [2**i for i in range(largest.bit_length())]
    between = [3 * power // 2 for power in powers if power > 2]
    return tuple(sorted(b for b in {*powers, *between} if b <= largest))


def propose(ask: Ask, cut: bool = True) -> tuple[list[Candidate], list[str]]:
    """Returns the candidates of `ask` and everything wrong with it.

    Without batch sizes, all of `batch_sizes()` up to those whose caches no partition
    can hold.

    Args:
      ask: of one model and one target.
      cut: of pipelines, also try half and twice the micro-batches.
    """
    sizes = ask.batch_sizes or batch_sizes()
    points, wrong = evaluate.plan(dataclasses.replace(ask, batch_sizes=sizes))
    if wrong:
        return [], wrong
    target = parse_target(ask.targets[0], ask.chip)
    points = _without_alike_rules(points)
    found: list[Candidate] = []
    for _, group in itertools.groupby(points, key=lambda point: point.batch_size):
        alike = [c for point in group for c in _candidates(point, target, cut)]
        found += alike
        if not ask.batch_sizes and all(c.refused for c in alike):
            break
    return _without_twins(found), []


def _candidates(point: Point, target: Target, cut: bool) -> list[Candidate]:
    """Returns the candidates that a point stands for: one for each number of cuts."""
    family = f"{point.partition} {point.rules}"
    try:
        written = evaluate.programs(point, target)
    except ValueError as error:
        answer = PhaseAnswer(phase="prefill", status="refused", reason=str(error))
        return [Candidate(point=point, family=family, refused=answer)]
    chosen = written["prefill"].prefill_micro_batches
    found = []
    for words, share in _SHARES.items():
        asked = point
        if share != 1.0:
            if not cut or not _can_cut(written["prefill"].partition):
                continue
            asked = dataclasses.replace(point, asked_micro_batches=int(chosen * share))
            if not asked.asked_micro_batches:
                continue
            try:
                written = evaluate.programs(asked, target)
            except ValueError:
                continue  # not a way to cut this batch
        found.append(_candidate(asked, f"{family} {words}".strip(), written, target))
    return found


def _can_cut(partition: Partition) -> bool:
    """Whether a prompt's micro-batches are worth a choice, and free to choose.

    Of one stage they only bound memory; rows that a data axis splits come in one way.
    """
    shared = partition.data > 1 and "data" not in partition.manual_axes
    return partition.stage > 1 and not shared


def _candidate(
    point: Point, family: str, written: Mapping[Phase, Program], target: Target
) -> Candidate:
    held = bounds.holdings(written["decode"].layout)
    available = int(target.chip.per_device().hbm_bytes)
    refused = None
    if held.total_bytes > available:
        weights = held.blocks_bytes + held.ends_bytes
        refused = PhaseAnswer(
            phase="prefill",
            status="does not fit",
            reason=(
                f"Weights {units.bytes_(weights)} and KV cache"
                f" {units.bytes_(held.kv_bytes)} alone are too much; nothing was"
                " compiled."
            ),
            origin="modelled",
            needed_bytes=held.total_bytes,
            available_bytes=available,
        )
    return Candidate(
        point=point,
        family=family,
        keys={phase: _key(point, program) for phase, program in written.items()},
        forms={
            phase: f"{program.layers} {program.ticks} {program.attention}"
            for phase, program in written.items()
        },
        least_s={
            phase: bounds.least_s(program, target, held)
            for phase, program in written.items()
        },
        held_bytes=held.total_bytes,
        available_bytes=available,
        refused=refused,
    )


def _key(point: Point, program: Program) -> str:
    """Returns what tells the program of a point from others, as it is compiled.

    Rows of a rule table over axes of size 1 do not matter, nor, to a program that
    reads one position, how a prompt's positions are split, or how it is cut.
    """
    prefill = program.phase == "prefill"
    tables = {phase: _rows(program.partition, phase) for phase in evaluate.PHASES}
    if not prefill:
        tables = {phase: {**t, "residual_seq": ()} for phase, t in tables.items()}
    rules = AxisRules(name="", table=tables["prefill"], decode=tables["decode"])
    partition = Partition(**program.partition.axes, rules=rules)
    alike = dataclasses.replace(
        program,
        partition=partition,
        micro_batches=program.prefill_micro_batches if prefill else None,
    )
    known = (alike, point.target, point.chip, sorted(point.context.items()))
    return digest(repr(known))


def _without_alike_rules(points: Sequence[Point]) -> list[Point]:
    """Returns points whose rule table, over the axes that there are, is a new one."""
    first: dict[str, str] = {}
    kept = []
    for point in points:
        partition = Partition.parse(point.partition, point.rules)
        rows = repr([_rows(partition, phase) for phase in evaluate.PHASES])
        name = first.setdefault(f"{point.partition} {rows}", point.rules)
        kept += [point] if name == point.rules else []
    return kept


def _rows(partition: Partition, phase: str) -> dict[str, tuple[str, ...]]:
    """Returns a partition's rule table without axes of size 1, which do not matter."""
    sizes, rules = partition.axes, partition.rules
    return {
        name: tuple(axis for axis in rules.axes_of(name, phase) if sizes[axis] > 1)
        for name in rules.table
    }


def _without_twins(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns the first of all candidates that come to the same programs."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for candidate in candidates:
        key = tuple(candidate.keys.values())
        if key and key in seen:
            continue
        seen.add(key)
        kept.append(candidate)
    return kept
