"""Which resource binds an instruction, and the least time it can take.

The roofline of Williams et al. 2009 with links as a third ceiling. Rates come from
the caller: any object with the attributes of `Rates` will do.
"""

import dataclasses
import heapq
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from sharding.hlo.reader import Computation, Instruction, Module
from sharding.hlo.records import Collective, Cost, Ledger
from sharding.hlo.shapes import ELEMENT_BITS

LIMITS = ("compute", "hbm", "links", "latency")

_PRODUCTS = frozenset([
    "convolution", "custom-call", "dot", "ragged-dot", "scaled-dot",
])  # fmt: skip
# What `Rates.flops_per_s` calls the dtypes of HLO; f16 runs at the rate of bf16.
_RATES = {"bf16": "bf16", "f16": "bf16", "f32": "fp32", "s8": "int8", "u8": "int8"}


class Rates(Protocol):
    """What one device can do at most; `sharding.chips.Chip` is such an object.

    Attributes:
      name: for reports.
      flops_per_s: peak of the matrix units by dtype: bf16, fp32, fp8, int8.
      vector_flops_per_s: everything else, or None: as fast as the matrix units.
      hbm_bytes_per_s: of main memory.
      links: that leave the device; `link_bytes_per_s` is of one, in one direction.
      collective_latency_s: of a collective with nothing to send.
    """

    @property
    def name(self) -> str: ...
    @property
    def flops_per_s(self) -> Mapping[str, float]: ...
    @property
    def vector_flops_per_s(self) -> float | None: ...
    @property
    def hbm_bytes_per_s(self) -> float: ...
    @property
    def links(self) -> int: ...
    @property
    def link_bytes_per_s(self) -> float: ...
    @property
    def collective_latency_s(self) -> float: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """The least time of one instruction, over all its executions in one call.

    Instructions that differ in nothing but their name and place in the program are
    one row. A collective is a row too, of what it sends.

    Attributes:
      name: of the first such instruction; of a collective its kind.
      opcode: as printed; of a collective its kind.
      limit: which of `LIMITS` the time is of.
      time_s: of all executions, one after the other.
      count: executions in one call.
      flops, hbm_bytes, wire_bytes: of all executions.
      dtype: of its matrix products, as in `Rates.flops_per_s`; "" without any.
      axis: of a collective, else "".
      per_iteration: figures are for one iteration of a data-dependent loop.
    """

    name: str
    opcode: str
    limit: str
    time_s: float
    count: int
    flops: int
    matmul_flops: int
    hbm_bytes: int
    wire_bytes: int
    dtype: str
    axis: str
    op_name: str
    source: str
    loop: str
    per_iteration: bool = False

    @property
    def flops_per_byte(self) -> float:
        """Arithmetic intensity: FLOPs for each byte of main memory; 0 without bytes."""
        return self.flops / self.hbm_bytes if self.hbm_bytes else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """The time bounds of a program on one kind of device.

    Attributes:
      chip: name of the rates.
      flops_per_s: rates of the dtypes that the program multiplies, for the plot's roof.
      hbm_bytes_per_s: likewise.
      time_s: sum of all bounds by limit; instructions follow each other.
      top: the rows that take longest, longest first.
      num_rows: rows in all, of which `top` are the first.
    """

    chip: str
    flops_per_s: Mapping[str, float] = dataclasses.field(hash=False)
    hbm_bytes_per_s: float
    time_s: Mapping[str, float] = dataclasses.field(hash=False)
    top: tuple[Bound, ...]
    num_rows: int

    @property
    def total_s(self) -> float:
        return sum(self.time_s.values())


def find_roofline(
    ledger: Ledger,
    module: Module,
    chip: Rates,
    *,
    collective_time_s: Callable[[Collective], float] | None = None,
    limit: int = 100,
) -> Roofline:
    """Returns the least time of every instruction of `ledger` on `chip`.

        T = max(matmul_flops / flops_per_s, other_flops / vector_flops_per_s,
                hbm_bytes / hbm_bytes_per_s)
        T = count * latency + wire_bytes / (links * link_bytes_per_s)    of collectives

    It leaves out how far kernels stay below the peaks, time between them, and what
    overlaps. A product of a dtype that the chip has no matrix rate for runs at the
    vector rate. An instruction's own latency is not known; "latency" is of
    collectives whose messages take less time than their start.

    Args:
      ledger: of `module`.
      module: where the dtypes of products are looked up.
      chip: rates of one device.
      collective_time_s: prices a row of collectives in place of the second formula,
        by someone who knows how the devices are wired.
      limit: rows kept in `top`.
    """
    products = _Products(module)
    rows: dict[tuple, list[Any]] = {}
    for cost in ledger.costs:
        dtype = products.dtype_of(cost) if cost.matmul_flops else ""
        work = (cost.flops, cost.matmul_flops, cost.hbm_bytes, cost.per_iteration)
        key = (cost.opcode, dtype, cost.op_name, cost.source, cost.loop, *work)
        row = rows.setdefault(key, [cost, dtype, 0])
        row[2] += cost.count
    bounds = [_bound(cost, count, dtype, chip) for cost, dtype, count in rows.values()]
    bounds += [_links_bound(row, chip, collective_time_s) for row in ledger.collectives]
    times: dict[str, list[float]] = {name: [] for name in LIMITS}
    for bound in bounds:
        times[bound.limit].append(bound.time_s)
    used = {bound.dtype for bound in bounds} & set(chip.flops_per_s)
    return Roofline(
        chip=chip.name,
        flops_per_s={dtype: chip.flops_per_s[dtype] for dtype in sorted(used)},
        hbm_bytes_per_s=chip.hbm_bytes_per_s,
        time_s={name: math.fsum(seconds) for name, seconds in times.items()},
        top=tuple(heapq.nlargest(limit, bounds, key=lambda bound: bound.time_s)),
        num_rows=len(bounds),
    )


def _bound(cost: Cost, count: int, dtype: str, chip: Rates) -> Bound:
    slowest = min(chip.flops_per_s.values())
    vector = chip.vector_flops_per_s or slowest
    matrix = chip.flops_per_s.get(dtype, vector)
    compute_s = max(
        cost.matmul_flops / matrix, (cost.flops - cost.matmul_flops) / vector
    )
    hbm_s = cost.hbm_bytes / chip.hbm_bytes_per_s
    return Bound(
        name=cost.name,
        opcode=cost.opcode,
        limit="compute" if compute_s > hbm_s else "hbm",
        time_s=count * max(compute_s, hbm_s),
        count=count,
        flops=count * cost.flops,
        matmul_flops=count * cost.matmul_flops,
        hbm_bytes=count * cost.hbm_bytes,
        wire_bytes=0,
        dtype=dtype,
        axis="",
        op_name=cost.op_name,
        source=cost.source,
        loop=cost.loop,
        per_iteration=cost.per_iteration,
    )


def _links_bound(
    row: Collective, chip: Rates, time_s: Callable[[Collective], float] | None
) -> Bound:
    latency_s = row.count * chip.collective_latency_s
    bytes_s = row.wire_bytes / (chip.links * chip.link_bytes_per_s)
    total_s = time_s(row) if time_s else latency_s + bytes_s
    return Bound(
        name=row.kind,
        opcode=row.kind,
        limit="links" if total_s > 2 * latency_s else "latency",
        time_s=total_s,
        count=row.count,
        flops=0,
        matmul_flops=0,
        hbm_bytes=0,
        wire_bytes=row.wire_bytes,
        dtype="",
        axis=row.axis,
        op_name=row.op_name,
        source=row.source,
        loop=row.loop,
        per_iteration=row.per_iteration,
    )


class _Products:
    """Finds the dtype that an instruction multiplies, in fusions too."""

    def __init__(self, module: Module):
        self._module = module
        self._fusions: dict[str, str] = {}

    def dtype_of(self, cost: Cost) -> str:
        computation = self._module.computations[cost.computation]
        return self._of(computation.by_name[cost.name], computation)

    def _of(self, instruction: Instruction, computation: Computation) -> str:
        """Returns the rate's name of the operands; the wider where they differ."""
        called = instruction.called("calls") or instruction.called("to_apply")
        if instruction.opcode in ("fusion", "call", "map") and called:
            if called not in self._fusions:
                inner = self._module.computation(called, instruction)
                names = [self._of(i, inner) for i in inner.instructions]
                self._fusions[called] = next(filter(None, names), "")
            return self._fusions[called]
        if instruction.opcode not in _PRODUCTS:
            return ""
        operands = computation.operands(instruction)[:2]
        leaves = [leaf for o in operands for leaf in o.shape.leaves] or [
            *instruction.shape.leaves
        ]
        dtypes = sorted(leaves, key=lambda leaf: -ELEMENT_BITS[leaf.dtype])
        dtype = dtypes[0].dtype
        return _RATES.get(dtype, "fp8" if dtype.startswith("f8") else dtype)
