"""Which resource binds an instruction, and the least time it can take.

The roofline of Williams et al. 2009 with links as a third ceiling. Rates come from
the caller: any object with the attributes of `Rates` will do.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

LIMITS = ("compute", "hbm", "links", "latency")


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
