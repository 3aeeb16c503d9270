"""The records of a program's memory: what one device holds, and when it holds most.

Two accounts stand beside each other and are never mixed: ours, followed through the
schedule of the text by `sharding.hlo.liveness`, and XLA's own, where a compiled
program was given. XLA packs buffers into one space, so its temporaries are at least
what is alive; the difference is fragmentation and reuse that we do not see.
"""

import dataclasses

KINDS = ("argument", "output", "temporary", "constant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """One array that one device holds.

    Attributes:
      name: of the instruction that makes it; of an argument its JAX name, if known.
      computation: where that instruction stands.
      shape: as HLO spells it, "bf16[16,640]"; of one leaf where the result is a tuple.
      num_bytes: tiles and padding included, where the layout tells.
      kind: one of `KINDS`.
      op_name: JAX's name of the operation, or "".
      source: "file.py:123", or "".
    """

    name: str
    computation: str
    shape: str
    num_bytes: int
    kind: str
    op_name: str = ""
    source: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Argument:
    """One parameter of the entry computation.

    Attributes:
      number: of the HLO parameter; JAX leaves out arguments that nothing reads.
      name: JAX's, such as "params['w']", or the instruction's where JAX gave none.
      shape: of one device's part; a tuple's leaves are joined.
      num_bytes: of one device's part, padding included.
      aliased_bytes: of it, what an output takes over (donated, and used).
      is_donated: whether the caller gave it away; None where only the text is known
        and the text does not say.
    """

    number: int
    name: str
    shape: str
    num_bytes: int
    aliased_bytes: int
    is_donated: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaMemory:
    """What XLA says of the same program: `compiled.memory_analysis()`.

    Attributes:
      peak_bytes: None where this XLA does not say.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    peak_bytes: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """What ONE device holds in main memory during ONE call.

    Attributes:
      argument_bytes: all arguments, for the whole call.
      output_bytes: all results, for the whole call, aliased ones included.
      alias_bytes: results that lie in an argument's place.
      constant_bytes: tables that are part of the program.
      temporary_bytes: most bytes of intermediate results alive at once.
      peak_at: instruction at which they are alive; in a loop or a branch the path to
        it, "while.5 > fusion.3"; "" where there are none.
      peak: every buffer alive at that instruction, the largest first.
      timeline_bytes: temporaries alive through the entry's schedule, evenly thinned
        to at most 512 points, each the most of its stretch.
      arguments: in the order of their numbers.
      is_scheduled: whether the text states an order of execution; if not, the order
        of its lines is taken.
      xla: XLA's own account, or None where only text is known.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    constant_bytes: int
    temporary_bytes: int
    peak_at: str
    peak: tuple[Buffer, ...]
    timeline_bytes: tuple[int, ...]
    arguments: tuple[Argument, ...]
    is_scheduled: bool
    xla: XlaMemory | None = None

    @property
    def peak_bytes(self) -> int:
        """Arguments, outputs, constants and temporaries, aliases counted once."""
        return (
            self.argument_bytes
            + self.output_bytes
            - self.alias_bytes
            + self.constant_bytes
            + self.temporary_bytes
        )
