"""Halves of one operation: what is started here, and what waits for it there.

Most are a pair of instructions, copy-start.1 and copy-done.1. XLA:TPU also has pairs of
fusions, async-collective-start and -done, and others between them that hand it on.
"""

import re

from sharding.hlo.opcodes import COLLECTIVES
from sharding.hlo.reader import Computation, Instruction, Module

_CHAIN = re.compile(r'chain_id="?(\w+)')
# A loop may hand on what the iteration before started.
_HANDED_ON = frozenset([
    "bitcast", "copy", "get-tuple-element", "opt-barrier", "parameter", "while",
])  # fmt: skip


def started_by(instruction: Instruction, computation: Computation) -> str:
    """Returns the name of what a -done ends, "" where it was started elsewhere."""
    (operand, *_) = computation.operands(instruction)
    while operand.opcode.endswith("-update"):
        (operand, *_) = computation.operands(operand)
    return "" if operand.opcode in _HANDED_ON else operand.name


def chain(module: Module, fusion: Instruction) -> tuple[str, str]:
    """Returns "start", "done" or "", and the name of a chain that a fusion is of.

    Raises:
      ValueError: what it calls is not in the text.
    """
    called = module.computation(fusion.called("calls"), fusion)
    for end in ("Start", "Done"):
        if any(f'"AsyncCollective{end}"' in i.rest for i in called.instructions):
            ids = [
                found[1]
                for i in called.instructions
                if i.opcode in COLLECTIVES
                and (found := _CHAIN.search(i.attr("frontend_attributes") or ""))
            ]
            return end.lower(), f"chain {ids[0] if ids else ''}"
    return "", ""
