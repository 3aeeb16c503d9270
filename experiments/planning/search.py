"""Branch and bound: which program to compile next, and when there is none left.

A candidate's prospect is the best that it may still come to: predicted times where its
programs were compiled, and where not, times that no prediction is below. Whoever
cannot meet the objective with that, or cannot beat what was found, is not compiled.

Two rules need no compiler, and one looks at neighbours:

    limit         no prediction is below `planning.bounds`
    memory        weights and cache alone are larger than a device
    batch         of one family and one form, a larger batch comes no nearer to its
                  limit than a smaller one did, by more than `SLACK`; and if the smaller
                  does not fit by more than that, the larger does not

The first two cannot lose the best point. The third could, if a compiler made a much
better program for a larger batch; tests hold it against every record.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from experiments import evaluate
from experiments.evaluate import PHASES, PhaseAnswer
from experiments.planning.prospect import Fate, Prospect, Verdict
from experiments.planning.space import Candidate, Task
from experiments.report import record
from experiments.report.frontier import NEAR, Objective
from sharding.program import Phase

SLACK = NEAR
# A first guess of prospect / prediction, to try what will probably do before the rest.
_USUAL = {"prefill": 0.7, "decode": 0.9}
Aim = Literal["tokens", "ttft", "tpot", "frontier"]


class Search:
    """Looks for the best of `candidates`.

    Args:
      candidates: in any order.
      objective: what a point must meet.
      aim: "tokens": most tokens/s/chip. "ttft", "tpot": the least of it. "frontier":
        every point that none beats in both tokens/s/user and tokens/s/chip.
      answers: of programs by key; what is learnt is added.
      enough: stop at the first point that meets the objective, and where none is
        likely to: a question of whether, not of which.
      within: also look into what may come within this share of the best; if negative,
        pass over what could only be better by less.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        objective: Objective,
        *,
        aim: Aim = "tokens",
        answers: dict[str, PhaseAnswer] | None = None,
        enough: bool = False,
        within: float = 0.0,
    ):
        self.candidates = tuple(candidates)
        self.objective = objective
        self.aim: Aim = aim
        self.answers = {} if answers is None else answers
        self.compiled = 0
        self._enough = enough
        self._within = within
        self._running: dict[str, Task] = {}
        self._families: dict[str, list[Candidate]] = {}
        for candidate in self.candidates:
            self._families.setdefault(candidate.family, []).append(candidate)

    def next(self) -> Task | None:
        """Returns the program to compile next, or None if none is needed for now."""
        found = self.best()
        if self._enough and found:
            return None
        likely = self._likelihoods()
        open_ = [c for c in self.candidates if self._verdict(c, found).fate == "open"]
        open_.sort(key=lambda c: self._rank(c, likely))
        for ahead in (False, True):
            for candidate in open_:
                task = self._task(candidate, likely, ahead=ahead)
                if task is not None:
                    self._running[task.key] = task
                    return task
        return None

    def _task(
        self,
        candidate: Candidate,
        likely: Mapping[tuple[str, str], float],
        *,
        ahead: bool,
    ) -> Task | None:
        """Returns what to compile of a candidate now, or None.

        While one of its programs is being compiled, the other waits for what that
        says; unless there is nothing else to do (`ahead`) and it is likely to be asked
        for. Of a family that will probably be too slow, one batch at a time.
        """
        probable = not self._guess(candidate, likely).misses(self.objective)
        if not probable and (self._enough or self._is_family_running(candidate)):
            return None
        for phase in self._order():
            key = candidate.keys[phase]
            if key in self.answers:
                continue
            if key not in self._running:
                return Task(point=candidate.point, phase=phase, key=key)
            if not (ahead and probable):
                return None
        return None

    def learn(self, task: Task, answer: PhaseAnswer) -> None:
        """Takes note of what became of a task."""
        self._running.pop(task.key, None)
        self.answers[task.key] = answer
        self.compiled += 1

    def best(self) -> list[Candidate]:
        """Returns the points found that nothing found beats, the best first."""
        met = [c for c in self.candidates if self._is_met(c)]
        if self.aim != "frontier":
            return sorted(met, key=self.value, reverse=True)[:1]
        met.sort(key=lambda c: self._user_and_chip(c), reverse=True)
        kept: list[Candidate] = []
        for c in met:
            if not kept or self._user_and_chip(c)[1] > self._user_and_chip(kept[-1])[1]:
                kept.append(c)
        return kept

    def verdicts(self) -> dict[str, tuple[Candidate, Verdict]]:
        """Returns every candidate with what became of it, by the key of its point."""
        best = self.best()
        return {c.point.key: (c, self._verdict(c, best)) for c in self.candidates}

    def prospect(self, candidate: Candidate) -> Prospect:
        """Returns the best that `candidate` may still come to; it is not refused."""
        return self._prospect(
            candidate, lambda phase: self._least_s(candidate, phase)[0]
        )

    def is_known(self, candidate: Candidate, figure: str) -> bool:
        """Whether `figure` of the prospect is a prediction, and not only a bound."""
        phase = _PHASE_OF.get(figure)
        answer = self._answer(candidate, phase) if phase else None
        return answer is not None and answer.parts is not None

    def value(self, candidate: Candidate) -> float:
        """Returns how good a candidate may still be; more is better."""
        found = self.prospect(candidate)
        return {
            "tokens": found.tokens_per_s_per_chip,
            "frontier": found.tokens_per_s_per_chip,
            "ttft": -found.ttft_s,
            "tpot": -found.tpot_s,
        }[self.aim]

    def record(self, candidate: Candidate) -> record.Record | None:
        """Returns the record of a candidate whose answer is known, or None."""
        if candidate.refused is not None:
            return evaluate.join(candidate.point, [candidate.refused])
        known = [self._answer(candidate, phase) for phase in PHASES]
        answers = [a for a in known if a is not None]
        final = [a for a in answers if a.parts is None]
        if final:
            return evaluate.join(candidate.point, [final[0]])
        if len(answers) == len(PHASES):
            return evaluate.join(candidate.point, answers)
        return None

    def _answer(self, candidate: Candidate, phase: str) -> PhaseAnswer | None:
        return self.answers.get(candidate.keys.get(phase, ""))

    def _prospect(
        self, candidate: Candidate, unknown_s: Callable[[str], float]
    ) -> Prospect:
        seconds: dict[str, float] = {}
        exact = True
        for phase in PHASES:
            answer = self._answer(candidate, phase)
            if answer is not None and answer.parts is not None:
                seconds[phase] = answer.parts.total_s
            else:
                seconds[phase], exact = unknown_s(phase), False
        point = candidate.point
        found = record.rates(
            ttft_s=seconds["prefill"],
            tpot_s=seconds["decode"],
            batch_size=point.batch_size,
            output_len=point.output_len,
            num_chips=point.num_chips,
        )
        return Prospect(
            ttft_s=seconds["prefill"],
            tpot_s=seconds["decode"],
            output_tokens_per_s=found["output_tokens_per_s"],
            tokens_per_s_per_chip=found["tokens_per_s_per_chip"],
            exact=exact,
        )

    def _verdict(self, candidate: Candidate, best: Sequence[Candidate]) -> Verdict:
        known = [candidate.refused, *(self._answer(candidate, p) for p in PHASES)]
        for answer in known:
            if answer is not None and answer.status != "ok":
                fate: Fate = answer.status  # pyright: ignore[reportAssignmentType]
                return Verdict(fate=fate, reason=answer.reason or "")
        prospect = self.prospect(candidate)
        if missed := prospect.misses(self.objective):
            return self._missing(candidate, prospect, missed[0][0])
        if prospect.exact:
            return Verdict(fate="done")
        if (smaller := self._too_large(candidate)) is not None:
            return Verdict(fate="batch", missed="needed_bytes", by=smaller)
        for other in best:
            if self._beats(other, candidate):
                return Verdict(fate="beaten", by=other)
        return Verdict(fate="open")

    def _missing(
        self, candidate: Candidate, prospect: Prospect, missed: str
    ) -> Verdict:
        """Returns the verdict on a candidate that cannot meet the objective."""
        phase = _PHASE_OF.get(missed)
        if prospect.exact or (phase and self._answer(candidate, phase)):
            return Verdict(fate="predicted", missed=missed)
        alone = self._prospect(candidate, lambda phase: candidate.least_s[phase])
        if alone.misses(self.objective):
            return Verdict(fate="limit", missed=missed)
        by = next(
            other
            for name in PHASES
            if (other := self._least_s(candidate, name)[1]) is not None
        )
        return Verdict(fate="batch", missed=missed, by=by)

    def _least_s(
        self, candidate: Candidate, phase: str
    ) -> tuple[float, Candidate | None]:
        """Returns the least time of a phase, and whose prediction says so, if any's."""
        least_s, by = candidate.least_s[phase], None
        for other in self._families[candidate.family]:
            answer = self._answer(other, phase)
            if (
                other.batch_size >= candidate.batch_size
                or answer is None
                or answer.parts is None
                or other.forms[phase] != candidate.forms[phase]
            ):
                continue
            times = answer.parts.total_s / other.least_s[phase]
            raised_s = candidate.least_s[phase] * times / (1 + SLACK)
            if raised_s > least_s:
                least_s, by = raised_s, other
        return least_s, by

    def _too_large(self, candidate: Candidate) -> Candidate | None:
        """Returns a smaller batch of the family that is far from fitting, or None."""
        for other in self._families[candidate.family]:
            if other.batch_size >= candidate.batch_size:
                continue
            for phase in PHASES:
                answer = self._answer(other, phase)
                if answer is None or answer.status != "does not fit":
                    continue
                needed, available = answer.needed_bytes, answer.available_bytes
                if needed and available and needed > available * (1 + SLACK):
                    return other
        return None

    def _beats(self, other: Candidate, candidate: Candidate) -> bool:
        if self.aim == "frontier":
            ours, theirs = self._user_and_chip(other), self._user_and_chip(candidate)
            share = 1 - self._within
            return all(a >= b * share for a, b in zip(ours, theirs, strict=True))
        least = self.value(other)
        return self.value(candidate) <= least - self._within * abs(least)

    def _user_and_chip(self, candidate: Candidate) -> tuple[float, float]:
        found = self.prospect(candidate)
        return 1 / found.tpot_s, found.tokens_per_s_per_chip

    def _is_met(self, candidate: Candidate) -> bool:
        answers = [self._answer(candidate, phase) for phase in PHASES]
        if candidate.refused or not all(a and a.status == "ok" for a in answers):
            return False
        return not self.prospect(candidate).misses(self.objective)

    def _is_family_running(self, candidate: Candidate) -> bool:
        keys = {k for c in self._families[candidate.family] for k in c.keys.values()}
        return not keys.isdisjoint(self._running)

    def _order(self) -> tuple[Phase, ...]:
        """Returns the phases of a candidate, first the one that says more about it."""
        if self.aim == "tpot" and self.objective.ttft_s is None:
            return ("decode", "prefill")
        return ("prefill", "decode")

    def _likelihoods(self) -> dict[tuple[str, str], float]:
        """Returns prospect / prediction by phase and family, "" for all families."""
        seen: dict[tuple[str, str], list[float]] = {}
        for c in self.candidates:
            for phase in PHASES:
                answer = self._answer(c, phase)
                if answer is None or answer.parts is None or c.refused:
                    continue
                share = c.least_s[phase] / answer.parts.total_s
                seen.setdefault((phase, ""), []).append(share)
                seen.setdefault((phase, c.family), []).append(share)
        return {name: statistics.median(shares) for name, shares in seen.items()}

    def _guess(
        self, candidate: Candidate, likely: Mapping[tuple[str, str], float]
    ) -> Prospect:
        """Returns what a candidate will probably come to; nothing is decided by it."""

        def guess(phase: str) -> float:
            usual = likely.get((phase, ""), _USUAL[phase])
            return candidate.least_s[phase] / likely.get(
                (phase, candidate.family), usual
            )

        return self._prospect(candidate, guess)

    def _rank(
        self, candidate: Candidate, likely: Mapping[tuple[str, str], float]
    ) -> tuple[float, float]:
        """Returns a sort key: what will probably meet the objective, best first."""
        guess = self._guess(candidate, likely)
        missed = guess.misses(self.objective)
        if missed:
            return missed[0][1], 0.0
        return 0.0, -{
            "tokens": guess.tokens_per_s_per_chip,
            "frontier": guess.tokens_per_s_per_chip / guess.tpot_s,
            "ttft": 1 / guess.ttft_s,
            "tpot": 1 / guess.tpot_s,
        }[self.aim]


_PHASE_OF = {"ttft_s": "prefill", "tpot_s": "decode"}
