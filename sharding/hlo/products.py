"""The matrix products inside an instruction, by their sizes.

How long a product takes depends on its shape, which a fusion hides: XLA fuses what is
around it, swaps the operands, and cuts long sums into a batch of shorter ones.
"""

import math

from sharding.hlo.flops import FlopCounter
from sharding.hlo.reader import Computation, Instruction, Module
from sharding.hlo.records import Product
from sharding.hlo.shapes import ELEMENT_BITS, Shape

# An array seen through these is still the same one, perhaps in another dtype.
_SAME = frozenset([
    "bitcast", "convert", "copy", "get-tuple-element", "opt-barrier", "reshape",
    "transpose",
])  # fmt: skip
_CALLERS = ("call", "fusion", "map")


class ProductFinder:
    """Finds the products of the instructions of one module.

    Args:
      module: the program.
      flops: what counts them.
    """

    def __init__(self, module: Module, flops: FlopCounter):
        self._module = module
        self._flops = flops

    def of(
        self, instruction: Instruction, computation: Computation
    ) -> tuple[Product, ...]:
        """Returns the products that one execution of `instruction` makes.

        A product that cannot be told from its sizes, as of a convolution over windows,
        is left out; its FLOPs are in the cost all the same.
        """
        called = instruction.called("calls") or instruction.called("to_apply")
        opcode = instruction.opcode.removesuffix("-start")
        if opcode not in _CALLERS or not called:
            given = [is_given(computation, name) for name in instruction.operands[:2]]
            found = self._product(instruction, computation, given)
            return (found,) if found else ()
        inner = self._module.computation(called, instruction)
        outside = [is_given(computation, name) for name in instruction.operands]
        parameters = {p.name: k for k, p in enumerate(inner.parameters)}
        products: list[Product] = []
        for each in inner.instructions:
            if each.opcode in _CALLERS:
                products += self.of(each, inner)
            elif self._flops.of(each, inner).matmul:
                roots = [source(inner, name).name for name in each.operands[:2]]
                places = [parameters.get(root) for root in roots]
                given = [
                    k is not None and k < len(outside) and outside[k] for k in places
                ]
                if found := self._product(each, inner, given):
                    products.append(found)
        if len(products) == 1:
            return (_joined(products[0], self._summed(instruction, computation)),)
        return tuple(products)

    def _product(
        self, instruction: Instruction, computation: Computation, given: list[bool]
    ) -> Product | None:
        """Returns [m, k] @ [k, n] of a product of two arrays.

        Each size follows from those of the arrays, for the multiply-adds have every
        size once: b m n k = m x (b k n) = n x (b m k) = k x (b m n).
        """
        flops = self._flops.of(instruction, computation).matmul
        operands = computation.operands(instruction)[:2]
        if not flops or len(operands) < 2 or instruction.opcode == "custom-call":
            target = instruction.string("custom_call_target")
            if not flops or len(operands) < 2 or not target.startswith("__cublas$"):
                return None
        lhs, rhs = operands[0].shape, operands[1].shape
        out = instruction.shape.leaves[0]
        multiply_adds = flops / lhs.multiply_add_flops
        m, n, k = (multiply_adds / max(s.size, 1) for s in (rhs, lhs, out))
        batch = multiply_adds / (m * n * k)
        sizes = [round(x) for x in (batch, m, n, k)]
        if min(sizes) < 1 or math.prod(sizes) != multiply_adds:
            return None
        batch, m, n, k = sizes
        weights = operands[1]
        if given == [True, False] or (given[0] == given[1] and lhs.size > rhs.size):
            weights, m, n = operands[0], n, m
        bits = ELEMENT_BITS[_stored_dtype(computation, weights)]
        wide = max((lhs, rhs), key=lambda shape: ELEMENT_BITS[shape.dtype])
        return Product(
            batch=batch,
            m=m,
            n=n,
            k=k,
            dtype=wide.dtype,
            weight_bytes=batch * k * n * bits // 8,
        )

    def _summed(self, instruction: Instruction, computation: Computation) -> int:
        """Returns over how many of a batch the only user of a result sums it up."""
        users = computation.users.get(instruction.name, [])
        if len(users) != 1 or len(instruction.shape.leaves) != 1:
            return 1
        (user,) = users
        if user.opcode == "fusion":
            where = self._module.computation(user.called("calls"), user)
            at = where.parameters[user.operands.index(instruction.name)].name
        else:
            where, at = computation, instruction.name
        for each in where.instructions:
            if each.opcode == "reduce" and at == source(where, each.operands[0]).name:
                return _times(where.by_name[each.operands[0]].shape, each)
        return 1


def source(computation: Computation, name: str) -> Instruction:
    """Returns the instruction that made the array called `name`."""
    found = computation.by_name[name]
    while found.opcode in _SAME and found.operands:
        found = computation.by_name[found.operands[0]]
    return found


def _stored_dtype(computation: Computation, array: Instruction) -> str:
    """Returns the dtype of an array where it came from.

    Of a loop's carry or another tuple, that of the element that is taken from it.
    """
    dtype = array.shape.dtype
    while array.opcode in _SAME and array.operands:
        array = computation.by_name[array.operands[0]]
        if array.shape.dtype in ELEMENT_BITS:
            dtype = array.shape.dtype
    return dtype


def is_given(computation: Computation, name: str) -> bool:
    """Whether an array came in from outside, such as weights and the cache."""
    return source(computation, name).opcode == "parameter"


def _times(shape: Shape, reduce: Instruction) -> int:
    """Returns how many values a sum makes one of, unless over the last dimension."""
    dims = reduce.ints("dimensions")
    if not dims or max(dims) == len(shape.dims) - 1:
        return 1
    return math.prod(shape.dims[d] for d in dims)


def _joined(product: Product, times: int) -> Product:
    """Returns a product whose sum over k was cut into `times` of its batch."""
    if times == 1 or product.batch % times:
        return product
    return Product(
        batch=product.batch // times,
        m=product.m,
        n=product.n,
        k=product.k * times,
        dtype=product.dtype,
        weight_bytes=product.weight_bytes,
    )
