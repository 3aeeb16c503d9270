"""Steps: instructions in their scheduled order, with what their time depends on."""

import re
from collections.abc import Iterator

from sharding.hlo import custom_calls, pairs
from sharding.hlo.collectives import Found
from sharding.hlo.flops import FlopCounter
from sharding.hlo.opcodes import COLLECTIVES, base_opcode
from sharding.hlo.products import ProductFinder, is_given
from sharding.hlo.reader import Computation, Instruction, Module
from sharding.hlo.records import Collective, Cost, Kernel, Step, Wait

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ONE_QUERY = 1


class StepMaker:
    """Makes the steps of one module.

    Args:
      module: the program.
      flops: what counts its FLOPs.
    """

    def __init__(self, module: Module, flops: FlopCounter):
        self._module = module
        self._products = ProductFinder(module, flops)

    def of(
        self,
        instruction: Instruction,
        computation: Computation,
        cost: Cost | None,
        sends: tuple[Collective, ...],
        started: str,
    ) -> Iterator[Step | Wait]:
        """Yields the step that an instruction is, and the wait that it may end with.

        Args:
          instruction: what runs.
          computation: where it stands.
          cost: of one execution.
          sends: likewise.
          started: the name under which it was started elsewhere, or "".
        """
        end = name = ""
        if instruction.opcode == "fusion" and self._module.is_tpu:
            end, name = pairs.chain(self._module, instruction)
        is_beside = bool(
            started or end == "start" or instruction.opcode.endswith("-start")
        )
        is_library = bool(sends) and instruction.opcode != "custom-call"
        cycles = _CYCLES.search(instruction.rest)
        if cost or sends:
            yield Step(
                name=started or name or instruction.name,
                cost=cost,
                products=self._products.of(instruction, computation)
                if cost and cost.matmul_flops
                else (),
                attention=_attention(instruction),
                kernel=_kernel(instruction, computation),
                is_cold=cost is not None and _is_cold(instruction, computation, cost),
                sends=sends,
                is_beside=is_beside,
                is_kernel=not (is_beside or is_library),
                cycles=int(cycles[1]) if cycles else None,
            )
        if end == "done":
            yield Wait(name=name)


def sent(found: Found, op_name: str, source: str, loop: str) -> Collective:
    """Returns one execution of a collective."""
    return Collective(
        axis=found.axis,
        kind=found.kind,
        count=1,
        payload_bytes=found.payload_bytes,
        wire_bytes=found.wire_bytes,
        group_size=found.group_size,
        op_name=op_name,
        source=source,
        loop=loop,
    )


def _attention(instruction: Instruction) -> str:
    """Returns which phase's attention a library's kernel computes, or ""."""
    if instruction.opcode != "custom-call":
        return ""
    if not custom_calls.target(instruction).startswith("__cudnn$fmha"):
        return ""
    # Queries, [B, T, N, H] or [B, N, T, H]: one token has one of them.
    out = instruction.shape.leaves[0].dims
    return "decode" if _ONE_QUERY in out[1:3] else "prefill"


def _kernel(instruction: Instruction, computation: Computation) -> Kernel | None:
    """Returns which of the kernels of `records.Kernel` a custom call is, or None."""
    if instruction.opcode != "custom-call":
        return None
    if not (name := custom_calls.kernel_name(instruction)):
        return None
    dims = [operand.shape.dims for operand in computation.operands(instruction)]
    match name, dims:
        case "split_product", [(m, k), (_, n)]:
            return Kernel(name=name, sizes=(m, k, n))
        case "add", [(rows, _), (parts, _, _), *_]:
            return Kernel(name=name, sizes=(rows, parts))
        case (("token_attention" | "join_token_attention"), _):
            return Kernel(name=name)
    return None


def _is_cold(instruction: Instruction, computation: Computation, cost: Cost) -> bool:
    """Whether most of what it moves is read from arrays that came in."""
    given = sum(
        min(operand.shape.num_bytes, cost.hbm_bytes)
        for operand in computation.operands(instruction)
        if operand.shape.dtype != "tuple" and is_given(computation, operand.name)
    )
    return base_opcode(instruction) not in COLLECTIVES and 2 * given > cost.hbm_bytes
