"""How long a compiled program should take: its ledger priced by a chip.

A first estimate, close to a limit: every instruction runs at the published peak of
whatever binds it, and collectives wait for each other. It is meant to rank
partitions and to say what limits each, not to predict a clock.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping

from sharding import rates
from sharding.chips import Chip
from sharding.hlo.ledger import Collective, Ledger


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Where the time of one call goes; the parts are the total.

    Attributes:
      compute_s: instructions bound by arithmetic.
      hbm_s: instructions bound by memory.
      collective_s: collectives, by mesh axis.
      overhead_s: of the call itself.
      bubble_s: ticks of a pipeline in which a stage has nothing useful to do.
    """

    compute_s: float
    hbm_s: float
    collective_s: Mapping[str, float] = dataclasses.field(hash=False)
    overhead_s: float
    bubble_s: float

    def parts(self) -> dict[str, float]:
        """Returns every part by name, e.g. "hbm" and "tensor links", in seconds."""
        links = {f"{axis} links": s for axis, s in self.collective_s.items()}
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
) -> Estimate:
    """Returns how long one call of the program behind `ledger` should take.

    Each instruction takes the time of its slowest resource, as in the roofline of
    Williams et al. 2009, and instructions follow each other:

        T = max(matmul_flops / flops_per_s, other_flops / vector_flops_per_s,
                hbm_bytes / hbm_bytes_per_s)

    Other FLOPs run at the matrix rate where a chip's vector rate is unknown. To the
    sum come `collective_time_s` of every collective and the overhead of the call. Of
    a pipeline's equal ticks, the share that is not busy is moved from every part but
    the overhead to `bubble_s`.

    It leaves out: how far real kernels stay below the peaks, time between kernels,
    overlap of collectives with computation and with each other, and two collectives
    that want the same link.

    Args:
      ledger: of one device and one call.
      chip: rates of a whole chip; the share of one device is taken here.
      dtype: of the matrix products, e.g. "bf16" or "float32".
      ticks: equal steps that the program runs.
      busy_ticks: those in which a stage works on real data.

    Raises:
      ValueError: the chip has no rate for `dtype`, a collective's kind is unknown, or
        there are more busy ticks than ticks.
    """
    if not 1 <= busy_ticks <= ticks:
        raise ValueError(
            f"cannot estimate ticks={ticks} with busy_ticks={busy_ticks}. A stage works"
            " in at least one tick and at most in all. Pass 1 <= busy_ticks <= ticks."
        )
    device = chip.per_device()
    matmul_flops_per_s = device.matmul_flops_per_s(dtype)
    vector_flops_per_s = device.vector_flops_per_s or matmul_flops_per_s
    compute: list[float] = []
    hbm: list[float] = []
    for cost in ledger.costs:
        arithmetic_s = max(
            cost.matmul_flops / matmul_flops_per_s,
            (cost.flops - cost.matmul_flops) / vector_flops_per_s,
        )
        memory_s = cost.hbm_bytes / device.hbm_bytes_per_s
        if arithmetic_s > memory_s:
            compute.append(cost.count * arithmetic_s)
        else:
            hbm.append(cost.count * memory_s)
    links: dict[str, list[float]] = defaultdict(list)
    for row in ledger.collectives:
        links[row.axis].append(collective_time_s(row, device))

    busy = busy_ticks / ticks
    work = [math.fsum(compute), math.fsum(hbm), *map(math.fsum, links.values())]
    return Estimate(
        compute_s=work[0] * busy,
        hbm_s=work[1] * busy,
        collective_s={
            axis: seconds * busy for axis, seconds in zip(links, work[2:], strict=True)
        },
        overhead_s=device.call_overhead_s,
        bubble_s=math.fsum(work) * (ticks - busy_ticks) / ticks,
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
