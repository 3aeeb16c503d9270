"""A plan's answer is that of the whole sweep, for a part of its work."""

import dataclasses
import pathlib
import random
from collections.abc import Mapping, Sequence

import pytest
from rich.console import Console

from experiments import evaluate
from experiments.evaluate import Ask, PhaseAnswer
from experiments.planning import answer as answers
from experiments.planning import changes, space, work
from experiments.planning.search import SLACK, Aim, Search
from experiments.planning.space import Candidate
from experiments.report.frontier import Objective
from experiments.report.record import Point, Record, TimeParts
from experiments.report.store import read_records
from experiments.report.workers import Event, Workers
from sharding.chips import CHIPS
from sharding.partition import Partition, all_partitions
from sharding.program import Phase
from sharding.target import parse_target
from tests import fakes

ROOT = pathlib.Path(__file__).resolve().parent.parent
PHASES = evaluate.PHASES
BATCHES = (1, 2, 4, 8, 16, 32)


def _seconds(time_s: float, **fields) -> PhaseAnswer:
    """Returns an answer that takes `time_s`, all of it one part."""
    parts = TimeParts(compute=time_s, hbm=0, links={}, overhead=0, bubble=0)
    return PhaseAnswer(phase="", parts=parts, **fields)


def _world(seed: int) -> tuple[list[Candidate], dict[str, PhaseAnswer]]:
    """Returns random candidates, and what would become of each program.

    A family's times rise with the batch, from a share of what physics allows that does
    not rise; now and then something does not fit.
    """
    draw = random.Random(seed)
    candidates, truth = [], {}
    for family in range(6):
        share = {phase: draw.uniform(0.4, 1) for phase in PHASES}
        step = {"prefill": draw.uniform(0.01, 0.1), "decode": draw.uniform(1e-4, 1e-3)}
        fixed = {phase: draw.uniform(1, 20) * step[phase] for phase in PHASES}
        holds = draw.choice((8, 16, 32, 64))
        for batch in BATCHES:
            point = fakes.point(partition=f"tp{family + 1}", batch_size=batch)
            least_s = {p: fixed[p] + batch * step[p] for p in PHASES}
            keys = {p: f"{family} {batch} {p}" for p in PHASES}
            for phase in PHASES:
                share[phase] *= draw.uniform(0.9, 1)
                truth[keys[phase]] = _seconds(least_s[phase] / share[phase])
                if batch > holds and phase == "decode":
                    truth[keys[phase]] = _seconds(
                        least_s[phase] / share[phase],
                        status="does not fit",
                        reason="too much",
                        needed_bytes=batch,
                        available_bytes=holds,
                    )
            candidates.append(
                Candidate(
                    point=point,
                    family=f"family {family}",
                    keys=keys,
                    forms=dict.fromkeys(PHASES, ""),
                    least_s=least_s,
                )
            )
    draw.shuffle(candidates)
    return candidates, truth


def _solve(search: Search, truth: Mapping[str, PhaseAnswer], jobs: int = 1) -> None:
    """Runs a search on answers that are known, `jobs` at a time."""
    running = []
    while True:
        while len(running) < jobs and (task := search.next()) is not None:
            running.append(task)
        if not running:
            return
        task = running.pop(0)
        search.learn(task, truth[task.key])


def _everything(
    candidates: Sequence[Candidate], objective: Objective, truth: dict, aim: Aim
) -> Search:
    """Returns a search that knows all answers: the exhaustive sweep."""
    return Search(candidates, objective, aim=aim, answers=dict(truth))


OBJECTIVES = [
    Objective(ttft_s=1.0, tpot_s=0.02),
    Objective(tpot_s=0.01),
    Objective(ttft_s=2.0, output_tokens_per_s=500),
    Objective(ttft_s=1e-3),  # which nothing meets
]


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_best_is_that_of_the_exhaustive_sweep(
    objective: Objective, jobs: int
) -> None:
    compiled = total = 0
    for seed in range(40):
        candidates, truth = _world(seed)
        search = Search(candidates, objective)
        _solve(search, truth, jobs)
        whole = _everything(candidates, objective, truth, "tokens")
        best = {search.value(c) for c in search.best()}
        assert best == {whole.value(c) for c in whole.best()}, f"seed {seed}"
        compiled += search.compiled
        total += len(truth)
        # Whatever was not compiled is accounted for.
        assert "open" not in {v.fate for _, v in search.verdicts().values()}
    assert compiled < 0.3 * total


@pytest.mark.parametrize("aim", ["ttft", "tpot", "frontier"])
def test_other_aims_also_find_what_the_sweep_finds(aim: Aim) -> None:
    compiled = total = 0
    for seed in range(40):
        candidates, truth = _world(seed)
        objective = Objective(output_tokens_per_s=300)
        search = Search(candidates, objective, aim=aim)
        _solve(search, truth)
        whole = _everything(candidates, objective, truth, aim)
        found, best = search.best(), whole.best()
        assert [search.value(c) for c in found] == [whole.value(c) for c in best]
        compiled += search.compiled
        total += len(truth)
    assert compiled < 0.7 * total


def test_a_prospect_is_never_worse_than_what_comes() -> None:
    """The property that pruning stands on, with whatever is known so far."""
    for seed in range(20):
        candidates, truth = _world(seed)
        search = Search(candidates, Objective(ttft_s=1.0, tpot_s=0.02))
        known = dict(random.Random(seed).sample(sorted(truth.items()), len(truth) // 3))
        search.answers.update(known)
        whole = _everything(candidates, Objective(), truth, "tokens")
        for candidate in candidates:
            may, will = search.prospect(candidate), whole.prospect(candidate)
            assert may.ttft_s <= will.ttft_s * (1 + 1e-12)
            assert may.tpot_s <= will.tpot_s * (1 + 1e-12)
            assert may.tokens_per_s_per_chip >= will.tokens_per_s_per_chip * (1 - 1e-12)


def _points_of(folder: str) -> list[Record]:
    records, _ = read_records(ROOT / "docs/records" / folder)
    return [r for r in records if r.status == "ok" and r.prefill and r.decode]


@pytest.fixture(scope="module")
def demo() -> list[tuple[Record, Candidate]]:
    """The committed demo: every record with the candidate of its point."""
    found = []
    for record in _points_of("2026-11-30-demo"):
        names = [field.name for field in dataclasses.fields(Point)]
        point = Point(**{name: getattr(record, name) for name in names})
        target = parse_target(point.target)
        made = space._candidate(
            point, f"{point.partition}", evaluate.programs(point, target), target
        )
        found.append((record, made))
    return found


def test_no_committed_prediction_is_below_its_bound(
    demo: list[tuple[Record, Candidate]],
) -> None:
    assert len(demo) > 25
    for record, candidate in demo:
        where = f"{record.target} {record.partition} batch {record.batch_size}"
        ttft_s, tpot_s = record.require("ttft_s"), record.require("tpot_s")
        assert candidate.least_s["prefill"] <= ttft_s, where
        assert candidate.least_s["decode"] <= tpot_s, where
        # And a bound is worth having: nearer than what physics allows any program.
        assert candidate.least_s["prefill"] >= 0.55 * ttft_s, where
        # What was measured does not reach the peaks that bounds are made of.
        near = 0.65 if CHIPS[record.chip].calibrated is None else 0.58
        assert candidate.least_s["decode"] >= near * tpot_s, where
        assert candidate.held_bytes <= record.require("needed_bytes"), where


def test_larger_batches_come_no_nearer_to_their_limits(
    demo: list[tuple[Record, Candidate]],
) -> None:
    """What a smaller batch says of a larger one; the rule that is not proved."""
    compared = 0
    for record, candidate in demo:
        for larger, other in demo:
            alike = (record.target, record.partition) == (
                larger.target,
                larger.partition,
            )
            if not alike or larger.batch_size <= record.batch_size:
                continue
            for phase, name in (("prefill", "ttft_s"), ("decode", "tpot_s")):
                if candidate.forms[phase] != other.forms[phase]:
                    continue
                near = candidate.least_s[phase] / record.require(name)
                nearer = other.least_s[phase] / larger.require(name)
                assert nearer <= near * (1 + SLACK), (record.partition, phase)
                compared += 1
    assert compared > 20


ASK = Ask(
    models=("tiny",),
    targets=("cpu:4",),
    rules=space.RULES,
    batch_sizes=(1, 4, 8),
    input_len=16,
    output_len=4,
    dtype="float32",
)


def test_the_space_holds_every_program_once() -> None:
    found, wrong = space.propose(ASK)
    assert not wrong
    points = {(c.point.partition, c.point.rules) for c in found}
    assert {name for name, _ in points} == {p.name for p in _four()}
    # A rule table that only differs along an axis of size 1 is no other table.
    assert ("pp4", "kv_seq") not in points
    assert ("tp4", "two_d") not in points
    assert ("dp2_tp2", "two_d") in points
    # Decode of `sequence` is decode of `megatron`, and is compiled once.
    by_name = {(c.family, c.batch_size): c for c in found}
    plain, split = by_name["tp4 megatron", 4], by_name["tp4 sequence", 4]
    assert plain.keys["decode"] == split.keys["decode"]
    assert plain.keys["prefill"] != split.keys["prefill"]
    # Another number of micro-batches is another prefill and the same decode.
    own, twice = (by_name[f"pp4 megatron{cut}", 8] for cut in ("", _TWICE))
    assert twice.point.asked_micro_batches == 8
    assert own.keys["decode"] == twice.keys["decode"]
    assert own.keys["prefill"] != twice.keys["prefill"]
    keys = [tuple(c.keys.values()) for c in found if c.keys]
    assert len(set(keys)) == len(keys)


_TWICE = " twice the micro-batches"


def _four() -> tuple[Partition, ...]:
    return all_partitions(4)


def test_batches_of_a_question_end_where_nothing_holds_them() -> None:
    ask = dataclasses.replace(
        ASK, models=("llama-3.1-70b",), targets=("cpu:8",), chip="h100",
        batch_sizes=(), input_len=2048, dtype="bfloat16", partitions=("tp8", "pp8"),
    )  # fmt: skip
    found, _ = space.propose(ask, cut=False)
    sizes = sorted({c.batch_size for c in found})
    fits = [c.batch_size for c in found if c.refused is None]
    # 8 x 85 GB less 141 GB of weights, and about 0.7 GB a sequence: 700 to 800.
    assert max(fits) in (512, 768)
    assert sizes == list(space.batch_sizes(sizes[-1]))
    assert sizes[-1] == space.batch_sizes()[space.batch_sizes().index(max(fits)) + 1]


SMALL = dataclasses.replace(
    ASK, targets=("cpu:2",), partitions=("tp2", "pp2"), rules=("megatron",),
    batch_sizes=(1, 4), layers="scanned",
)  # fmt: skip


@pytest.fixture(scope="module")
def swept() -> dict[str, PhaseAnswer]:
    """What becomes of every program of a small question, by its key."""
    found, _ = space.propose(SMALL)
    return {
        key: evaluate.evaluate_phase(candidate.point, phase)
        for candidate in found
        if candidate.refused is None
        for phase in PHASES
        for key in [candidate.keys[phase]]
    }


class Known(Workers):
    """Workers that look answers up, so that nothing is compiled a second time.

    What is not known fails, as if the compiler had died of it.
    """

    def __init__(self, answers: Mapping[str, PhaseAnswer]):
        super().__init__(1, fakes.no_setup)
        self.answers = answers

    def run(self, function, items):
        for item in items:
            yield Event(kind="finished", item=item, value=function(item))

    def follow(self, function, following):
        while (item := following()) is not None:
            yield Event(kind="started", item=item)
            value = self.answers.get(item.key)
            kind = "broke" if value is None else "finished"
            yield Event(kind=kind, item=item, value=value, reason="not known")


def _plan(
    ask: Ask, objective: Objective, out: pathlib.Path, known: dict[str, PhaseAnswer]
) -> work.Plan:
    quiet = Console(quiet=True)
    with Known(known) as workers:
        return work.plan(ask, objective, workers=workers, out=out, console=quiet)


def test_a_plan_of_real_programs_finds_what_the_sweep_finds(
    swept: dict[str, PhaseAnswer], tmp_path: pathlib.Path
) -> None:
    found, _ = space.propose(SMALL)
    whole = Search(found, Objective(), answers=dict(swept))
    times = sorted({whole.prospect(c).tpot_s for c in found if not c.refused})
    for i, tpot_s in enumerate(times):
        objective = Objective(tpot_s=tpot_s)
        done = _plan(SMALL, objective, tmp_path / str(i), swept)
        all_of_it = _everything(found, objective, swept, "tokens")
        (chosen,), (best,) = done.search.best(), all_of_it.best()
        assert chosen.point == best.point
        assert done.search.compiled <= len(swept)
        # As `evaluate` would have it.
        record = done.search.record(chosen)
        assert record is not None
        assert record.tpot_s == swept[chosen.keys["decode"]].parts.total_s  # pyright: ignore
        assert "experiments.measure" in done.answer.commands[0]
        assert f"--partitions={chosen.point.partition}" in done.answer.commands[0]


def test_bounds_hold_for_programs_compiled_here(swept: dict[str, PhaseAnswer]) -> None:
    found, _ = space.propose(SMALL)
    compared = 0
    for candidate in found:
        for phase, key in candidate.keys.items():
            parts = swept[key].parts
            assert parts is not None
            assert candidate.least_s[phase] <= parts.total_s, (candidate.family, phase)
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize(
    ("name", "rules", "phase"),
    [
        ("tp4", "sequence", "prefill"),
        ("tp4", "kv_seq", "decode"),
        ("dp2_tp2", "two_d", "prefill"),
        ("tp2_pp2", "megatron", "decode"),
    ],
)
def test_bounds_hold_for_programs_of_described_gpus(
    name: str, rules: str, phase: Phase
) -> None:
    """There kernels and collectives follow each other, and their bounds add up."""
    ask = dataclasses.replace(
        ASK, targets=("h100:4",), partitions=(name,), rules=(rules,), batch_sizes=(8,),
        input_len=64, dtype="bfloat16",
    )  # fmt: skip
    (candidate,), _ = space.propose(ask, cut=False)
    found = evaluate.evaluate_phase(candidate.point, phase)
    assert found.parts is not None
    assert candidate.least_s[phase] <= found.parts.total_s
    assert candidate.least_s[phase] >= 0.3 * found.parts.total_s


def test_files_and_a_second_time(
    swept: dict[str, PhaseAnswer], tmp_path: pathlib.Path
) -> None:
    objective = Objective(tpot_s=1.0)
    done = _plan(SMALL, objective, tmp_path, swept)
    files = work.write(done, tmp_path)
    assert {"plan.html", "report.html"} <= set(files)
    text = (tmp_path / "plan.html").read_text()
    assert done.answer.headline in text
    # The same question again compiles nothing, and a cut-off line is done again.
    assert _plan(SMALL, objective, tmp_path, {}).search.compiled == 0
    kept = tmp_path / "phases.jsonl"
    data = kept.read_bytes()
    kept.write_bytes(data[:-30])
    assert _plan(SMALL, objective, tmp_path, swept).search.compiled == 1
    assert kept.read_bytes().count(b"\n") == data.count(b"\n")


def test_a_missed_objective_says_what_would_do(
    swept: dict[str, PhaseAnswer], tmp_path: pathlib.Path
) -> None:
    found, _ = space.propose(SMALL)
    whole = Search(found, Objective(), answers=dict(swept))
    ok = [whole.prospect(c) for c in found if not c.refused]
    least_s = min(p.tpot_s for p in ok)
    objective = Objective(tpot_s=0.8 * least_s, ttft_s=10.0)
    done = _plan(SMALL, objective, tmp_path, swept)
    assert not done.answer.is_met
    rows = {row[0]: row for row in done.answer.changes[1]}
    assert rows["longer TPOT"][1] == "yes"
    assert "(+25 %) would do" in rows["longer TPOT"][2]
    assert rows["longer TTFT"][1:] == ["no", "no value of it would do alone"]
    assert rows["fewer bits"][1] == "no"
    assert "most devices" in rows["more devices"][2]
    assert "It takes one change: TPOT of" in done.answer.headline


def test_changes_are_for_what_was_asked() -> None:
    ask = dataclasses.replace(ASK, targets=("h100:4",), batch_sizes=(8, 16))
    titles = {
        kind[0].title: [t.label for t in kind] for kind in changes.tries(ask) if kind
    }
    assert titles["more devices"] == ["h100:8"]
    assert titles["other chip"][0] == "h200:4"
    assert (
        "4 x b200, priced from h100 programs at published peaks" in titles["other chip"]
    )
    assert titles["smaller batch"] == ["a smaller batch"]
    assert titles["fewer bits"][:2] == ["weights in int8", "weights in int4"]
    tpu = dataclasses.replace(ASK, targets=("v5p:2x2x2",), batch_sizes=())
    titles = {
        kind[0].title: [t.label for t in kind] for kind in changes.tries(tpu) if kind
    }
    assert titles["more devices"] == ["v5p:4x2x2", "v5p:4x4x2"]
    assert "smaller batch" not in titles


def test_ties_and_what_binds_are_told() -> None:
    candidates, truth = _world(3)
    record = fakes.evaluate(fakes.point())
    for key, found in truth.items():
        phase = key.rpartition(" ")[2]
        truth[key] = dataclasses.replace(
            found, phase=phase, record=getattr(record, phase), limit_s=1.0,
            needed_bytes=found.needed_bytes or 1, micro_batches=1,
            available_bytes=found.available_bytes or 2,
        )  # fmt: skip
    search = Search(candidates, OBJECTIVES[0], within=0.05)
    _solve(search, truth)
    (best,) = search.best()
    found = answers.answer(search, [], [])
    assert answers.name(best) in found.headline
    named = dict(found.paragraphs)
    larger = [b for b in BATCHES if b > best.batch_size]
    assert f"batch {larger[0]} it" in named["What binds"]
    assert f"{len(candidates)} candidates" in named["Searched"]
    rows = {row[0] for row in found.families[1]}
    assert rows == {c.family for c in candidates}
