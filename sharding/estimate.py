"""How long a compiled program should take: its timeline in parts that sum to it.

    estimate(read_ledger(compiled.as_text(), axes), chip).parts()

Steps are priced by `sharding.pricing` and put on a clock by `sharding.timeline`. Priced
by published peaks it is near a limit: it ranks partitions and says what limits each. Of
a chip that was calibrated, `sharding.rates` knows how long things take.
"""

import dataclasses
import math
from collections.abc import Mapping

from sharding import rates
from sharding.chips import Chip
from sharding.clock import Repeated, Run
from sharding.hlo.ledger import Collective, Ledger
from sharding.hlo.records import Block, Step, Steps
from sharding.timeline import Timeline, lay_out

_LINKS = " links"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Where the time of one call goes; the parts are the total.

    Attributes:
      compute_s: kernels bound by arithmetic.
      hbm_s: kernels bound by memory, and copies that are waited for.
      collective_s: exposed communication: waiting for collectives, by mesh axis.
      overhead_s: of the call itself, and between kernels.
      bubble_s: ticks of a pipeline in which a stage has nothing useful to do.
      timeline: behind these figures; the bubble is inside of its other parts.
    """

    compute_s: float
    hbm_s: float
    collective_s: Mapping[str, float] = dataclasses.field(hash=False)
    overhead_s: float
    bubble_s: float
    timeline: Timeline = dataclasses.field(compare=False, repr=False)

    def parts(self) -> dict[str, float]:
        """Returns every part by name, e.g. "hbm" and "tensor links", in seconds."""
        links = {f"{axis}{_LINKS}": s for axis, s in self.collective_s.items()}
        return {
            "compute": self.compute_s,
            "hbm": self.hbm_s,
            **links,
            "overhead": self.overhead_s,
            "bubble": self.bubble_s,
        }

    @property
    def total_s(self) -> float:
        return math.fsum(self.parts().values())

    @property
    def bottleneck(self) -> str:
        """The name of the largest part."""
        parts = self.parts()
        return max(parts, key=lambda name: parts[name])


def estimate(
    ledger: Ledger,
    chip: Chip,
    *,
    dtype: str = "bf16",
    ticks: int = 1,
    busy_ticks: int = 1,
    idle: bool = False,
) -> Estimate:
    """Returns how long one call of the program behind `ledger` should take.

    The time is that of its timeline, and the overhead of a call before it, or as much
    more as the host needs to start one; all that the host needs if the devices wait for
    it. Stages run idle ticks like any other; so of a
    loop over ticks, or of everything where there is none, the share that is not busy
    is moved from the other parts to `bubble_s`.

    Args:
      ledger: of one device and one call.
      chip: rates of a whole chip; the share of one device is taken here.
      dtype: of the matrix products, e.g. "bf16" or "float32".
      ticks: equal steps that the program runs.
      busy_ticks: those in which a stage works on real data.
      idle: nothing runs when the call is made, as before a prompt; else the host is
        ahead, and starts it while the call before still runs.

    Raises:
      ValueError: the chip has no rate for `dtype`, a collective's kind is unknown,
        the ledger has no steps, or there are more busy ticks than ticks.
    """
    if not 1 <= busy_ticks <= ticks:
        raise ValueError(
            f"cannot estimate ticks={ticks} with busy_ticks={busy_ticks}. A stage works"
            " in at least one tick and at most in all. Pass 1 <= busy_ticks <= ticks."
        )
    device, devices = chip.per_device(), ledger.devices
    call_s = rates.call_overhead_s(device, devices=devices)
    host_s = rates.dispatch_s(device, arguments=ledger.arguments, devices=devices)
    timeline = lay_out(
        ledger,
        chip,
        dtype=dtype,
        call_s=call_s + (host_s if idle else 0.0),
        least_s=host_s,
    )
    parts = dict(timeline.parts)
    empty = (ticks - busy_ticks) / ticks
    looped = _tick_loops(timeline.run, ticks) if empty else []
    wasted = looped or [timeline.run.parts]
    bubble: list[float] = []
    for run in wasted if empty else ():
        for name, seconds in run.items():
            parts[name] -= empty * seconds
            bubble.append(empty * seconds)
    links = {
        name.removesuffix(_LINKS): max(seconds, 0.0)
        for name, seconds in parts.items()
        if name.endswith(_LINKS)
    }
    return Estimate(
        compute_s=parts.get("compute", 0.0),
        hbm_s=parts.get("hbm", 0.0),
        collective_s=links,
        overhead_s=parts["overhead"],
        bubble_s=math.fsum(bubble),
        timeline=timeline,
    )


def collective_time_s(row: Collective, chip: Chip) -> float:
    """Returns the time of all executions of one collective on one device.

    Args:
      row: the collective, of one device.
      chip: the rates of that device, from `Chip.per_device`.

    Raises:
      ValueError: the kind of collective is unknown.
    """
    n = max(row.count, 1)
    each = row.kind, row.group_size, row.payload_bytes / n, row.wire_bytes / n
    return row.count * rates.collective_s(chip, *each)


def _tick_loops(run: Run, ticks: int) -> list[dict[str, float]]:
    """Returns the parts of the outermost loops of so many ticks that hand something on.

    The activations of a tick go to the next stage by a permute.
    """
    found: list[dict[str, float]] = []
    for span in run.spans:
        if not isinstance(span.what, Repeated):
            continue
        block, runs = span.what
        if block.times == ticks and _permutes(block.steps):
            parts: dict[str, float] = {}
            for each, times in runs:
                for name, seconds in each.parts.items():
                    parts[name] = parts.get(name, 0.0) + seconds * times
            found.append(parts)
    return found


def _permutes(steps: Steps) -> bool:
    for step in steps:
        if isinstance(step, Block) and _permutes(step.steps):
            return True
        if isinstance(step, Step) and any(s.kind == "permute" for s in step.sends):
            return True
    return False
