"""What a person should look at in a compiled program, with the numbers that say so."""

import dataclasses
from collections.abc import Mapping

from sharding.hlo.memory import Memory
from sharding.hlo.reader import Module
from sharding.hlo.records import Ledger


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """One finding that a person can act on.

    Attributes:
      kind: a short fixed name, such as "weight-gathered".
      what: one sentence, the finding.
      evidence: the numbers and instructions that show it.
      change: what to do about it.
      num_bytes: bytes of one call that the finding is about; findings are ordered by
        them, most first.
      count: executions in one call.
      op_name: JAX's name of the operation, or "".
      source: "file.py:123", or "".
    """

    kind: str
    what: str
    evidence: str
    change: str
    num_bytes: int
    count: int
    op_name: str
    source: str


def find_advice(
    module: Module, ledger: Ledger, memory: Memory, axes: Mapping[str, int] | None
) -> tuple[Advice, ...]:
    """Returns what a person should look at in `module`, most bytes first."""
    return ()
