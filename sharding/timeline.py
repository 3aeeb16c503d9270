"""A compiled program on a clock: what runs when, what waits, and for what.

    timeline = lay_out(ledger, chip)
    timeline.total_s, timeline.parts, timeline.busy_s, timeline.path

Steps run in their scheduled order, one after the other, as kernels of one stream do. A
collective that is started goes on beside them until something waits for it; those that
share links follow each other. A copy that is started moves on while kernels leave main
memory idle. A loop is run until two iterations are alike, and multiplied: the cost is
linear in the text, not in what it executes.

It leaves out: what other devices do (all are taken to be alike and in step), kernels
beside each other, and how copies and collectives slow kernels down.
"""

import dataclasses
import math
from collections.abc import Mapping

from sharding.chips import Chip
from sharding.clock import Clock, OnPath, Run, State
from sharding.hlo.ledger import Ledger
from sharding.pricing import Pricer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """One call of a program on one device.

    Attributes:
      total_s: the sum of `parts`.
      parts: "compute", "hbm", such as "tensor links" where they are waited for, and
        "overhead", which the call and the gaps between kernels are.
      busy_s: of each track, "kernels", "copies" and links, hidden or not.
      path: what the critical path is made of, in seconds, longest first.
      kernels, collectives: executions.
      cycles: the sum of what XLA:TPU estimates for each fusion, a second opinion; None
        where the text has none.
      run: all that happened, for a trace.
    """

    total_s: float
    parts: Mapping[str, float]
    busy_s: Mapping[str, float]
    path: Mapping[OnPath, float]
    kernels: float
    collectives: float
    cycles: float | None
    run: Run

    @property
    def idle_s(self) -> dict[str, float]:
        """How long each track does nothing."""
        return {track: self.total_s - busy for track, busy in self.busy_s.items()}


def lay_out(
    ledger: Ledger,
    chip: Chip,
    *,
    dtype: str | None = "bf16",
    call_s: float = 0.0,
    least_s: float = 0.0,
) -> Timeline:
    """Returns one call of the program behind `ledger` on a clock.

    Args:
      ledger: of one device and one call.
      chip: rates of a whole chip; the share of one device is taken here.
      dtype: of the matrix products, e.g. "bf16" or "float32"; None: as they are.
      call_s: of the call, before its first step.
      least_s: that a call takes, whatever it does.

    Raises:
      ValueError: the chip has no rate for `dtype`, a collective's kind is unknown, or
        the ledger has costs and no steps.
    """
    if not ledger.steps and (ledger.costs or ledger.collectives):
        raise ValueError(
            f"a ledger of {len(ledger.costs)} costs and {len(ledger.collectives)}"
            " collectives without steps: when each of them runs is not known. Take one"
            " from sharding.hlo.read_ledger."
        )
    run = Clock(Pricer(chip, dtype)).run(ledger.steps, State(), is_last=True)
    parts, path = dict(run.parts), dict(run.path)
    call_s = max(call_s, least_s - run.seconds)
    parts["overhead"] = parts.get("overhead", 0.0) + call_s
    path[OnPath("overhead", "the call", "")] = call_s
    return Timeline(
        total_s=math.fsum(parts.values()),
        parts=parts,
        busy_s=dict(run.busy_s),
        path=dict(sorted(path.items(), key=lambda item: -item[1])),
        kernels=run.counts[0],
        collectives=run.counts[1],
        cycles=run.cycles or None,
        run=run,
    )
