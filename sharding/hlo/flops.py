"""FLOPs of one instruction, fusions included.

A multiply-add is 2, of complex numbers 8; an arithmetic, logical or comparing
operation 1 for each element it makes, moving data 0. Collectives are 0 here. Loops are
not unrolled here: `while`, `conditional` and top-level `call` are walked by ledger.py.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from sharding.hlo.custom_calls import custom_call_flops
from sharding.hlo.opcodes import (
    COLLECTIVES,
    DATA_MOVEMENT,
    ELEMENTWISE,
    FREE,
    TRANSFERS,
    base_opcode,
)
from sharding.hlo.reader import Computation, Instruction, Module
from sharding.hlo.shapes import Shape
from sharding.hlo.windows import convolution_products, parse_window, reduced_positions


class Flops(NamedTuple):
    """Operations, and how many of them are matrix products and convolutions."""

    total: int = 0
    matmul: int = 0


class FlopCounter:
    """Counts the FLOPs of instructions of one module.

    Args:
      module: the program.
      kernels: FLOPs of custom calls that the caller knows; see custom_calls.py.
    """

    def __init__(self, module: Module, kernels: Mapping[str, int]):
        self._kernels = kernels
        self._module = module
        self._bodies: dict[str, Flops] = {}

    def of_computation(self, computation: Computation) -> Flops:
        """Returns the FLOPs of one run of a fused or applied computation."""
        if computation.name not in self._bodies:
            parts = [self.of(i, computation) for i in computation.instructions]
            self._bodies[computation.name] = Flops(
                sum(p.total for p in parts), sum(p.matmul for p in parts)
            )
        return self._bodies[computation.name]

    def of(self, instruction: Instruction, computation: Computation) -> Flops:
        """Returns the FLOPs of one execution of `instruction`.

        Raises:
          ValueError: an opcode, custom call or attribute that is not known.
        """
        opcode = base_opcode(instruction)
        if opcode in ELEMENTWISE:
            return Flops(sum(leaf.size for leaf in instruction.shape.leaves))
        if opcode == "call":
            return self._applied(instruction)
        if opcode in DATA_MOVEMENT or opcode in FREE or opcode == "":
            return Flops()
        if opcode in COLLECTIVES or opcode in TRANSFERS:
            return Flops()
        if opcode == "fusion":
            name = instruction.called("calls")
            called = self._module.called(name, instruction, computation)
            made = called.root.shape.sizes
            if instruction.opcode == "fusion" and made != instruction.shape.sizes:
                raise ValueError(f"%{name} is no body of: {instruction}")
            return self.of_computation(called)
        operands = [o.shape for o in computation.operands(instruction)]
        out = instruction.shape
        if opcode in ("dot", "ragged-dot", "scaled-dot"):
            contracted = [
                operands[0].dims[d] for d in instruction.ints("lhs_contracting_dims")
            ]
            products = out.size * math.prod(contracted)
            if opcode == "dot":
                _check_dot(instruction, operands[0], operands[1], products)
            flops = operands[0].multiply_add_flops * products
            return Flops(flops, flops)
        if opcode == "convolution":
            products = convolution_products(
                instruction, operands[0].dims, operands[1].dims, out.dims
            )
            flops = operands[0].multiply_add_flops * products
            return Flops(flops, flops)
        if opcode == "custom-call":
            return Flops(*custom_call_flops(instruction, operands, self._kernels))
        return Flops(self._of_applying(opcode, instruction, operands))

    def _applied(self, instruction: Instruction) -> Flops:
        name = instruction.called("to_apply")
        return self.of_computation(self._module.computation(name, instruction))

    def _of_applying(
        self, opcode: str, instruction: Instruction, operands: list[Shape]
    ) -> int:
        """Returns the FLOPs of operations that apply a computation or an algorithm."""
        first = operands[0] if operands else instruction.shape.leaves[0]
        out = instruction.shape.leaves[0]
        if opcode == "map":
            return out.size * self._applied(instruction).total
        if opcode == "reduce":
            return (first.size - out.size) * self._applied(instruction).total
        if opcode == "reduce-window":
            taps, results = 1, 1
            for axis, dim in enumerate(parse_window(instruction.require("window"))):
                taps_here, results_here = reduced_positions(
                    dim, first.dims[axis], out.dims[axis]
                )
                taps, results = taps * taps_here, results * results_here
            return max(taps - results, 0) * self._applied(instruction).total
        if opcode == "select-and-scatter":
            window = parse_window(instruction.require("window"))
            taps = math.prod(dim.size for dim in window)
            return operands[1].size * (taps + 1)
        if opcode == "scatter":
            updates = operands[1 + len(operands) // 2 :]
            return updates[0].size * self._applied(instruction).total
        if opcode == "sort":
            length = first.dims[(instruction.ints("dimensions") or (-1,))[0]]
            depth = max(length - 1, 0).bit_length()  # comparisons: n log2 n
            return first.size * depth * max(self._applied(instruction).total, 1)
        if opcode == "topk":
            return first.size * max(out.dims[-1].bit_length(), 1)
        if opcode == "cholesky":  # n^3 / 3
            return first.size * first.dims[-1] // 3
        if opcode == "triangular-solve":  # n^2 for each right-hand side
            return out.size * first.dims[-1]
        if opcode == "fft":  # 5 n log2 n (Cooley and Tukey 1965)
            length = math.prod(instruction.ints("fft_length"))
            return 5 * out.size * max(length - 1, 0).bit_length()
        if opcode == "rng-bit-generator":
            return instruction.shape.leaves[-1].size
        raise AssertionError(f"opcode {opcode} is in SPECIAL but not costed")


def _check_dot(instruction: Instruction, lhs: Shape, rhs: Shape, products: int) -> None:
    """Raises ValueError unless the sizes are those of a product.

    lhs x rhs has each batch size twice, each contracted size twice, and every other
    size once; the multiply-adds have each once.
    """
    twice = [lhs.dims[d] for d in instruction.ints("lhs_batch_dims")]
    twice += [lhs.dims[d] for d in instruction.ints("lhs_contracting_dims")]
    again = [rhs.dims[d] for d in instruction.ints("rhs_batch_dims")]
    again += [rhs.dims[d] for d in instruction.ints("rhs_contracting_dims")]
    if twice != again or lhs.size * rhs.size != products * math.prod(twice):
        raise ValueError(f"sizes do not fit in instruction: {instruction}")
