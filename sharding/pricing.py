"""What each step of a program costs on a chip, before anything overlaps."""

import dataclasses
import math

from sharding import rates
from sharding.chips import Chip
from sharding.hlo.records import Cost, Product, Step

# What chips call the matrix rates of narrow dtypes; wider ones run as the program's.
_NARROW = {"s8": "int8", "u8": "int8"}
_WIDE = {"bf16": "bf16", "f16": "bf16", "f32": "fp32"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """One execution of a step.

    Attributes:
      seconds: from its first to its last moment.
      memory_s: of these, those in which main memory is busy.
      gap_s: that follow before anything else can start.
      limit: what it waits for: "compute", "hbm", or such as "tensor links".
    """

    seconds: float
    memory_s: float
    gap_s: float
    limit: str


class Pricer:
    """Prices steps on one device of a chip.

    A kernel takes the time of its slowest resource, as in the roofline of Williams et
    al. 2009; of a calibrated chip, as much longer as its products took when measured at
    their shapes. A collective takes that of its links, or of its own work if longer.

    Args:
      chip: a whole chip; the share of one device is taken here.
      dtype: of the program's matrix products, e.g. "bf16" or "float32", whatever
        they were made of since; None: each product's own.

    Raises:
      ValueError: the chip has no rate for `dtype`.
    """

    def __init__(self, chip: Chip, dtype: str | None):
        self.chip = chip.per_device()
        self._published = self.chip.published()
        self._dtype = dtype
        self._slowest = min(self.chip.flops_per_s, key=self.chip.matmul_flops_per_s)
        if dtype is not None:
            self.chip.matmul_flops_per_s(dtype)
        self._known: dict[tuple[object, ...], Price] = {}
        self._gap_s = rates.kernel_gap_s(self.chip)
        self._collective_gap_s = rates.collective_gap_s(self.chip)

    def price(self, step: Step) -> Price:
        """Returns what one execution of `step` costs.

        Raises:
          ValueError: a kind of collective is not known.
        """
        cost = step.cost
        work = (cost.flops, cost.matmul_flops, cost.hbm_bytes) if cost else ()
        sent = [(s.kind, s.axis, s.group_size, s.payload_bytes, s.wire_bytes)
                for s in step.sends]  # fmt: skip
        key = (*work, step.products, step.attention, step.kernel, step.is_cold)
        key += (step.is_kernel, *sent)
        if key not in self._known:
            self._known[key] = self._price(step)
        return self._known[key]

    def _price(self, step: Step) -> Price:
        seconds, memory_s, limit = 0.0, 0.0, "hbm"
        if step.cost:
            seconds, memory_s, limit = self._kernel(step, step.cost)
        by_axis: dict[str, float] = {}
        for row in step.sends:
            each = row.kind, row.group_size, row.payload_bytes, row.wire_bytes
            taken = rates.collective_s(self.chip, *each, in_kernel=step.is_kernel)
            by_axis[row.axis] = by_axis.get(row.axis, 0.0) + taken
        if by_axis and math.fsum(by_axis.values()) >= seconds:
            seconds = math.fsum(by_axis.values())
            limit = f"{max(by_axis, key=lambda axis: by_axis[axis])} links"
        gap_s = self._gap_s if step.is_kernel else 0.0
        if step.sends and not step.is_kernel:
            gap_s = self._collective_gap_s
        return Price(seconds=seconds, memory_s=memory_s, gap_s=gap_s, limit=limit)

    def _kernel(self, step: Step, cost: Cost) -> tuple[float, float, str]:
        """Returns seconds, seconds in memory, and what limits a kernel."""
        rate = self._rate(step.products[0].dtype if step.products else "bf16")
        product_s = cost.matmul_flops / self.chip.matmul_flops_per_s(rate)
        vector_s = rates.vector_s(self.chip, cost.flops - cost.matmul_flops)
        ideal_s = cost.hbm_bytes / self.chip.hbm_bytes_per_s
        limit = "compute" if max(product_s, vector_s) > ideal_s else "hbm"
        if step.kernel:
            own_s = rates.own_kernel_s(
                self.chip, step.kernel, cost.matmul_flops, cost.hbm_bytes
            )
            if own_s is not None:
                return own_s, min(own_s, ideal_s), limit
        if step.attention:
            work = cost.matmul_flops, cost.hbm_bytes
            fused_s = rates.attention_s(self.chip, *work, phase=step.attention)
            return max(fused_s, vector_s), min(fused_s, ideal_s), limit
        if step.products:
            longer = self._longer(step.products)
            seconds = max(max(product_s, ideal_s) * longer, vector_s)
            return seconds, min(seconds, ideal_s * longer), limit
        memory_s = rates.memory_s(self.chip, cost.hbm_bytes, cold=step.is_cold)
        limit = "compute" if max(product_s, vector_s) > memory_s else "hbm"
        return max(product_s, vector_s, memory_s), memory_s, limit

    def _longer(self, products: tuple[Product, ...]) -> float:
        """Returns how many times longer than at the peaks products take."""
        if self.chip.calibrated is None:
            return 1.0
        measured, ideal = (
            math.fsum(self._product_s(chip, p) for p in products)
            for chip in (self.chip, self._published)
        )
        return measured / ideal if ideal else 1.0

    def _product_s(self, chip: Chip, p: Product) -> float:
        dtype = self._rate(p.dtype)
        if p.batch > 1:
            return rates.scores_s(chip, p.batch, p.m, p.n, p.k, dtype)
        weights = p.weight_bytes
        return rates.matmul_s(chip, p.m, p.n, p.k, dtype, weight_bytes=weights)

    def _rate(self, dtype: str) -> str:
        """Returns the dtype whose matrix rate products of an HLO dtype have."""
        narrow = "fp8" if dtype.startswith("f8") else _NARROW.get(dtype)
        if narrow and narrow in self.chip.flops_per_s:
            return narrow
        own = _WIDE.get(dtype, self._slowest)
        return self._dtype or (own if own in self.chip.flops_per_s else self._slowest)
