"""Everything there is to know of one compiled program, as one frozen record.

    analysis = analyze(compiled, mesh={"data": 2, "tensor": 4}, chip=chip)
    print(analysis)              # in a notebook, the record shows itself

See docs/inspecting.md.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from sharding.hlo import tables
from sharding.hlo.advice import Advice, find_advice
from sharding.hlo.ledger import read_ledger
from sharding.hlo.memory import Memory, find_memory
from sharding.hlo.programs import Program, axis_sizes, check_devices, load
from sharding.hlo.reader import read_module
from sharding.hlo.records import Collective, Ledger
from sharding.hlo.render import Rendered, Table
from sharding.hlo.roofline import Rates, Roofline, find_roofline

_NAME = re.compile(r"HloModule ([^,\s]+).*", re.DOTALL)


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
      warnings: what the figures assume, such as lengths of loops and branches taken.
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
    warnings: tuple[str, ...]
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

    def _title(self) -> str:
        return f"{self.name} on {self.num_devices} devices; figures are of one device"

    def _lines(self) -> tuple[str, ...]:
        return tuple(f"Note: {warning}" for warning in self.warnings)

    def _tables(self) -> tuple[Table, ...]:
        bounds = () if self.roofline is None else (tables.bounds(self.roofline),)
        return (
            tables.totals(self.ledger, self.xla_flops),
            tables.collectives(self.ledger.collectives),
            tables.memory(self.memory),
            tables.peak(self.memory),
            *bounds,
            tables.advice(self.advice),
        )


def analyze(
    program: Program,
    mesh: Any = None,
    chip: Rates | None = None,
    *,
    kernels: Mapping[str, int] | None = None,
    trip_counts: Mapping[str, int] | None = None,
    collective_time_s: Callable[[Collective], float] | None = None,
    top: int = 100,
) -> Analysis:
    """Returns what a compiled program does, holds and sends, on one device.

    Args:
      program: a compiled JAX function, the text of optimised HLO, the path of a file
        that --xla_dump_to wrote (text or .hlo.pb), or the bytes of an HloProto.
      mesh: a jax Mesh, or sizes of the axes in mesh order, {"data": 2, "tensor": 4}.
        None: the mesh that a compiled function's arguments lie on, if it is one; else
        collectives name device sets.
      chip: rates of one device, for time bounds; None: no bounds.
      kernels: FLOPs of hand-written kernels; see `read_ledger`.
      trip_counts: of loops whose length depends on data; see `read_ledger`.
      collective_time_s: prices collectives; see `find_roofline`.
      top: instructions kept in `roofline.top`.

    Raises:
      TypeError: `program` or `mesh` is nothing of the above.
      ValueError: the program cannot be read, has an operation whose cost is not
        known, or runs on another number of devices than `mesh` has.
    """
    loaded = load(program)
    module = read_module(loaded.text)
    axes = axis_sizes(mesh)
    if axes is not None:
        check_devices(axes, module.num_replicas, module.num_partitions)
    elif loaded.axes and math.prod(loaded.axes.values()) == module.num_devices:
        axes = dict(loaded.axes)
    name = _NAME.sub(r"\1", module.header) or "program"
    ledger = read_ledger(module, axes, kernels=kernels, trip_counts=trip_counts)
    try:
        memory = find_memory(module, loaded.donated, loaded.xla_memory)
        advice = find_advice(module, ledger, memory, axes)
        roofline = None
        if chip is not None:
            roofline = find_roofline(
                ledger, module, chip, collective_time_s=collective_time_s, limit=top
            )
    except (ArithmeticError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(
            f"the parts of {name} do not fit together ({error!r}). Pass the text as it"
            " was printed."
        ) from error
    warnings = ledger.warnings
    if not memory.is_scheduled:
        warnings += (
            "the text states no order of execution (is_scheduled=true): it is not what"
            " a device runs, and the order of its lines stands in.",
        )
    return Analysis(
        name=name,
        num_replicas=module.num_replicas,
        num_partitions=module.num_partitions,
        axes=axes or {},
        ledger=ledger,
        memory=memory,
        roofline=roofline,
        advice=advice,
        warnings=warnings,
        xla_flops=loaded.xla_flops,
    )
