"""The records of a ledger: collectives, costs, loops, and what they sum to."""

import dataclasses

from sharding.hlo.loops import Loop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All executions of one HLO collective, or of equal ones, on one device.

    Attributes:
      axis: "tensor", "stage+tensor", or "devices {0,3},{1,2}" where no mesh axes fit.
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all",
        "permute" or "broadcast".
      count: executions in one call, trip counts multiplied.
      payload_bytes: over all executions: what is reduced, scattered, exchanged or
        permuted, or the gathered result.
      wire_bytes: over all executions, sent by one device: 2(n-1)/n of the payload
        for all-reduce, (n-1)/n for all-gather, reduce-scatter and all-to-all, all
        of it for permute and broadcast.
      group_size: n, devices that take part together.
      op_name: JAX's name of the operation, or "".
      source: "file.py:123", or ""; of the first user where it has no line itself.
      loop: enclosing loops, such as "while.5 x80", or "".
      per_iteration: one of these runs a number of times that depends on data, and
        `count` and bytes are for one iteration of it.
    """

    axis: str
    kind: str
    count: int
    payload_bytes: int
    wire_bytes: int
    group_size: int
    op_name: str
    source: str
    loop: str
    per_iteration: bool = False

    @property
    def payload_bytes_each(self) -> int:
        """Payload of one execution."""
        return self.payload_bytes // self.count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """One instruction that runs and is no collective; figures are per execution.

    Attributes:
      count: executions in one call.
      flops: all operations; `matmul_flops` those of products and convolutions.
      hbm_bytes: read and written in main memory.
      per_iteration: as of a Collective.
    """

    name: str
    opcode: str
    computation: str
    count: int
    flops: int
    matmul_flops: int
    hbm_bytes: int
    op_name: str
    source: str
    loop: str = ""
    per_iteration: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ledger:
    """What ONE device does in ONE call of a program.

    Of a loop whose length depends on data, every figure holds one iteration; see
    `data_dependent_loops` and `inside`.
    """

    costs: tuple[Cost, ...]
    collectives: tuple[Collective, ...]
    loops: tuple[Loop, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        return sum(c.count * c.flops for c in self.costs)

    @property
    def matmul_flops(self) -> int:
        return sum(c.count * c.matmul_flops for c in self.costs)

    @property
    def hbm_bytes(self) -> int:
        return sum(c.count * c.hbm_bytes for c in self.costs)

    @property
    def wire_bytes(self) -> int:
        return sum(c.wire_bytes for c in self.collectives)

    @property
    def data_dependent_loops(self) -> tuple[Loop, ...]:
        """Loops that are counted for one iteration."""
        return tuple(loop for loop in self.loops if loop.trip_count is None)

    def inside(self, loop: Loop) -> "Ledger":
        """Returns what is done in the body and condition of `loop`."""
        return Ledger(
            costs=tuple(c for c in self.costs if loop.holds(c.loop)),
            collectives=tuple(c for c in self.collectives if loop.holds(c.loop)),
            loops=tuple(inner for inner in self.loops if loop.holds(inner.enclosing)),
        )

    def by_axis(self) -> dict[str, tuple[Collective, ...]]:
        """Returns the collectives along each axis, in order of appearance."""
        found: dict[str, list[Collective]] = {}
        for collective in self.collectives:
            found.setdefault(collective.axis, []).append(collective)
        return {axis: tuple(rows) for axis, rows in found.items()}

    def largest(self, by: str = "hbm_bytes", limit: int = 20) -> tuple[Cost, ...]:
        """Returns the costs with the most `flops`, `matmul_flops` or `hbm_bytes`."""
        if by not in ("flops", "matmul_flops", "hbm_bytes"):
            raise ValueError(
                f"largest by {by!r}; costs have flops, matmul_flops and hbm_bytes."
            )
        ranked = sorted(self.costs, key=lambda c: -c.count * getattr(c, by))
        return tuple(ranked[:limit])
