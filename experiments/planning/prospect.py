"""What a candidate may still come to, and what became of it."""

import dataclasses
from typing import Literal

from experiments.planning.space import Candidate
from experiments.report.frontier import Objective

Fate = Literal[
    "refused", "does not fit", "failed", "limit", "predicted", "batch", "beaten",
    "done", "open",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prospect:
    """The best that a candidate may still come to, or, if `exact`, what it does."""

    ttft_s: float
    tpot_s: float
    output_tokens_per_s: float
    tokens_per_s_per_chip: float
    exact: bool

    def misses(self, objective: Objective) -> list[tuple[str, float]]:
        """Returns (figure, how many times too bad) for what is not met, worst first."""
        o = objective
        found = [
            ("ttft_s", self.ttft_s / o.ttft_s if o.ttft_s else 0.0),
            ("tpot_s", self.tpot_s / o.tpot_s if o.tpot_s else 0.0),
            (
                "output_tokens_per_s",
                (o.output_tokens_per_s or 0.0) / self.output_tokens_per_s,
            ),
        ]
        missed = [(name, times) for name, times in found if times > 1]
        return sorted(missed, key=lambda item: -item[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a candidate, and because of which figure or other candidate.

    Attributes:
      fate: "limit": at its limits it misses the objective; "predicted": as predicted;
        "batch": judged by a smaller batch of its family; "beaten": another is better
        than its prospect; "done": it meets the objective; "open": not looked into.
      missed: the figure, e.g. "ttft_s".
      by: the other candidate.
      reason: in words, where it is an answer's.
    """

    fate: Fate
    missed: str = ""
    by: Candidate | None = None
    reason: str = ""
