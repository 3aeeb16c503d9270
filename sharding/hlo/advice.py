"""What a person should look at in a compiled program, with the numbers that say so."""

import dataclasses


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
