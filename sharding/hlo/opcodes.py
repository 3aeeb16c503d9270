"""What kind of work each HLO opcode is. An opcode in no table is an error."""

from sharding.hlo.reader import Instruction

# No bytes move when these run: names, pointers, control flow whose bodies count.
FREE = frozenset([
    "add-dependency", "after-all", "async-done", "async-start", "async-update",
    "bitcast", "call", "conditional", "constant", "domain", "get-dimension-size",
    "get-tuple-element", "opt-barrier", "optimization-barrier", "parameter",
    "partition-id", "replica-id", "set-dimension-size", "trace", "tuple", "while",
])  # fmt: skip

# Bytes move, nothing is computed.
DATA_MOVEMENT = frozenset([
    "bitcast-convert", "broadcast", "concatenate", "convert", "copy",
    "dynamic-reshape", "dynamic-slice", "dynamic-update-slice", "gather", "infeed",
    "iota", "outfeed", "pad", "reshape", "reverse", "rng-get-and-update-state",
    "slice", "transpose",
])  # fmt: skip

# One operation for each element of the result.
ELEMENTWISE = frozenset([
    "abs", "acos", "acosh", "add", "and", "asin", "asinh", "atan2", "atanh", "cbrt",
    "ceil", "clamp", "compare", "complex", "cosh", "cosine", "count-leading-zeros",
    "divide", "erf", "exponential", "exponential-minus-one", "floor", "imag",
    "is-finite", "log", "log-plus-one", "logistic", "maximum", "minimum", "mulhi",
    "multiply", "multiply-add", "negate", "not", "or", "popcnt", "population-count",
    "power", "real", "reduce-precision", "remainder", "rng", "round-nearest-afz",
    "round-nearest-even", "rsqrt", "select", "shift-left", "shift-right-arithmetic",
    "shift-right-logical", "sign", "sine", "sinh", "sqrt", "stochastic-convert",
    "subtract", "tan", "tanh", "xor",
])  # fmt: skip

# Costed one by one in flops.py.
SPECIAL = frozenset([
    "cholesky", "convolution", "custom-call", "dot", "fft", "fusion", "map",
    "ragged-dot", "reduce", "reduce-window", "rng-bit-generator", "scaled-dot",
    "scatter", "select-and-scatter", "sort", "topk", "triangular-solve",
])  # fmt: skip

COLLECTIVES = {
    "all-reduce": "all-reduce",
    "all-gather": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "permute",
    "collective-broadcast": "broadcast",
}

# Host transfers and the point-to-point calls of pipelined permutes.
TRANSFERS = frozenset([
    "send", "recv",
])  # fmt: skip

_KNOWN = FREE | DATA_MOVEMENT | ELEMENTWISE | SPECIAL | TRANSFERS | set(COLLECTIVES)


def base_opcode(instruction: Instruction) -> str:
    """Returns the opcode without "-start"; "" for the "-done" half of a pair.

    Raises:
      ValueError: the opcode is not known.
    """
    opcode = instruction.opcode
    if opcode in _KNOWN:
        return opcode
    stem, _, suffix = opcode.rpartition("-")
    if stem in _KNOWN and suffix in ("start", "done", "update"):
        return stem if suffix == "start" else ""
    raise ValueError(
        f"opcode {opcode!r} is not known, so its cost is not: {instruction}"
        " Add it to a table in sharding/hlo/opcodes.py."
    )
