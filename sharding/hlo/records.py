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
class Product:
    """`batch` matrix products [m, k] @ [k, n], each with its own [k, n].

    Attributes:
      dtype: of the wider operand, as HLO calls it.
      weight_bytes: of all [k, n] as they are stored.
    """

    batch: int
    m: int
    n: int
    k: int
    dtype: str
    weight_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """What a kernel of this project works on, for those that a calibration times.

    Attributes:
      name: "split_product", "add", "token_attention" or "join_token_attention".
      sizes: m, k, n of a split product; rows and parts of what is added; else none.
    """

    name: str
    sizes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One instruction that takes time, at its place in the schedule.

    Attributes:
      name: of the instruction; a `Wait` for it has the same.
      cost: what it computes and moves; None if it only sends.
      products: the matrix products in it.
      attention: "prefill" or "decode" if it is a library's fused attention.
      kernel: which of this project's kernels it is; None: none of those that are timed.
      is_cold: most of what it reads came into the program, as weights do.
      sends: the collectives that it is or holds, of one execution.
      is_beside: it starts here, and what follows does not wait for it.
      is_kernel: of the program's own stream; else the collectives' library or an
        engine that copies runs it.
      cycles: what XLA:TPU thinks that it takes.
    """

    name: str
    cost: Cost | None
    products: tuple[Product, ...] = ()
    attention: str = ""
    kernel: Kernel | None = None
    is_cold: bool = False
    sends: tuple[Collective, ...] = ()
    is_beside: bool = False
    is_kernel: bool = True
    cycles: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wait:
    """What follows needs the result of a `Step` that was started.

    Attributes:
      name: of the step; "" for the one that was started first, where a loop hands
        it on.
    """

    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Steps that run `times` in a row each time they are come to.

    Attributes:
      label: of the loop, as `Loop.label`; "" for a branch.
      times: the mean, so of a branch the share of times that it is taken.
    """

    label: str
    times: float
    steps: "Steps"


Steps = tuple[Step | Wait | Block, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ledger:
    """What ONE device does in ONE call of a program.

    Of a loop whose length depends on data, every figure holds one iteration; see
    `data_dependent_loops` and `inside`.

    Attributes:
      steps: all of it in the order in which it was scheduled.
      devices: that the program runs on.
      arguments: arrays that a call is given.
    """

    costs: tuple[Cost, ...]
    collectives: tuple[Collective, ...]
    loops: tuple[Loop, ...] = ()
    warnings: tuple[str, ...] = ()
    steps: Steps = ()
    devices: int = 1
    arguments: int = 1

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
            steps=_inside(self.steps, loop),
            devices=self.devices,
            arguments=self.arguments,
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


def _inside(steps: Steps, loop: Loop) -> Steps:
    """Returns the steps of `loop`, as often as they run each time it is entered."""
    found: list[Step | Wait | Block] = []
    for step in steps:
        if isinstance(step, Block):
            is_it = step.label == loop.label
            found += [step] if is_it else _inside(step.steps, loop)
    return tuple(found)
