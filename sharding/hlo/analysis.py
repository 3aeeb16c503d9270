"""Everything there is to know of one compiled program, as one frozen record.

    analysis = analyze(compiled, mesh={"data": 2, "tensor": 4}, chip=chip)
    print(analysis)              # in a notebook, the record shows itself

See docs/inspecting.md.
"""

import dataclasses
from collections.abc import Mapping

from sharding.hlo.advice import Advice
from sharding.hlo.memory import Memory
from sharding.hlo.records import Ledger
from sharding.hlo.render import Rendered, Table
from sharding.hlo.roofline import Roofline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis(Rendered):
    """What ONE device does and holds in ONE call of a program.

    Attributes:
      name: of the HLO module, such as "jit_step".
      num_replicas, num_partitions: devices that the program runs on are their product.
      axes: sizes of the mesh axes in mesh order; {} where none were given, and then
        collectives name device sets.
      ledger: costs, collectives and loops.
      memory: by category, and the buffers alive at the peak.
      roofline: time bounds; None without a chip.
      advice: what to look at, most bytes first.
      xla_flops: what XLA itself counts, loops once; None where it does not say.
    """

    name: str
    num_replicas: int
    num_partitions: int
    axes: Mapping[str, int] = dataclasses.field(hash=False)
    ledger: Ledger
    memory: Memory
    roofline: Roofline | None
    advice: tuple[Advice, ...]
    xla_flops: float | None = None

    @property
    def num_devices(self) -> int:
        return self.num_replicas * self.num_partitions

    @property
    def flops(self) -> int:
        return self.ledger.flops

    @property
    def matmul_flops(self) -> int:
        return self.ledger.matmul_flops

    @property
    def hbm_bytes(self) -> int:
        return self.ledger.hbm_bytes

    @property
    def payload_bytes(self) -> dict[str, int]:
        """Payload of all collectives of one call, by axis."""
        return {
            axis: sum(row.payload_bytes for row in rows)
            for axis, rows in self.ledger.by_axis().items()
        }

    @property
    def wire_bytes(self) -> dict[str, int]:
        """Bytes that one device sends in one call, by axis."""
        return {
            axis: sum(row.wire_bytes for row in rows)
            for axis, rows in self.ledger.by_axis().items()
        }

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the figures assume: lengths of loops, branches taken."""
        return self.ledger.warnings

    def _title(self) -> str:
        return f"{self.name} on {self.num_devices} devices; figures of one device"

    def _tables(self) -> tuple[Table, ...]:
        return ()
