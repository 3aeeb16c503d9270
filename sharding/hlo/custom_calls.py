"""FLOPs and traffic of calls into libraries, by target name.

A target that is in no table here stops the reader: a kernel that nobody has
costed must not count as nothing.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from sharding.hlo.reader import Instruction
from sharding.hlo.shapes import Shape
from sharding.hlo.windows import convolution_products

# Annotations, aliases and ids: nothing runs.
FREE_TARGETS = frozenset([
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone",
    "AsyncCollectiveStart", "ConcatBitcast", "DeviceId", "GetSharding",
    "LayoutConstraint", "PrepareAsyncCallDone", "PrepareAsyncCallStart",
    "SPMDFullToShardShape", "SPMDShardToFullShape", "ShardBarrierFrom",
    "ShardBarrierTo", "Sharding", "SliceId",
    "annotate_device_placement", "xla.sdy.FuncResultSharding",
    "xla.sdy.GlobalToLocalShape", "xla.sdy.LocalToGlobalShape",
])  # fmt: skip

# Bytes move, nothing is computed by the device: a callback is the host's work.
MOVE_TARGETS = frozenset([
    "GatherScatterIndicesBitpacked", "MoveToDevice", "MoveToHost", "PadRealToStatic",
    "PadToStatic", "PinToDevice", "PinToDeviceSram", "PinToHost", "SliceToDynamic",
    "X64Combine", "X64SplitHigh", "X64SplitLow", "ZeroCrop",
    "cu_lu_pivots_to_permutation", "dce_sink_gpu_ffi", "xla_buffer_python_cpu_callback",
    "xla_buffer_python_gpu_callback",
    "xla_ffi_partitioned_python_cpu_callback",
    "xla_ffi_partitioned_python_gpu_callback", "xla_ffi_python_cpu_callback",
    "xla_ffi_python_gpu_callback",
])  # fmt: skip

_GEMM = re.compile(
    r"__cublas\$(gemm|lt\$(matmul|groupedMatmul)(\$f8|\$mx)?)|__onednn\$matmul"
)
_FMHA = re.compile(r"__cudnn\$fmha\w*")
_TILE = 128  # rows and columns of the scores that an attention kernel makes at a time
_FACTOR = re.compile(
    r"(?P<cholesky>Cholesky|CompactWyHelper|InvertDiagBlocks\w+|lapack_[sdcz]potrf_ffi"
    r"|cusolver_potrf_ffi)"
    r"|(?P<lu>Lu(?:Real|Complex)?Decomposition\w*|lapack_[sdcz]getrf_ffi|cusolver_getrf_ffi)"
    r"|(?P<qr>Qr|QrDecompositionBlock|lapack_[sdcz](?:geqrf|geqp3|orgqr|ungqr)_ffi"
    r"|cusolver_(?:geqrf|orgqr)_ffi|ProductOfElementaryHouseholderReflectors)"
    r"|(?P<eigh>EighTpu|lapack_[sdcz](?:syevd|heevd)_ffi|cusolver_syevd_ffi)"
    r"|(?P<tridiagonal>lapack_[sdcz](?:sytrd|hetrd)_ffi|cusolver_sytrd_ffi)"
    r"|(?P<eig>lapack_[sdcz](?:geev|gees)_ffi|cusolver_geev_ffi)"
    r"|(?P<hessenberg>lapack_[sdcz]gehrd_ffi)"
    r"|(?P<svd>lapack_[sdcz](?:gesdd|gesvd)_ffi|cusolver_gesvd[jp]?_ffi)"
    r"|(?P<times_q>lapack_[sdcz](?:ormqr|unmqr)_ffi|cusolver_ormqr_ffi)"
    r"|(?P<solve>TriangularSolve|__cublas\$triangularSolve|lapack_[sdcz]trsm_ffi|blas_[sdcz]trsm)"
)
# n^3 of a square matrix, by Golub and Van Loan, Matrix Computations, 4th edition:
# eigenvalues and vectors (8.3.5), and a tridiagonal (8.3.1), of a symmetric matrix;
# the real Schur form (7.5.6) and Hessenberg form (7.4.3) of any other.
_SQUARE = {"eigh": 9, "tridiagonal": 4 / 3, "eig": 25, "hessenberg": 10 / 3}
# Operations for each element, as of a mean, a variance, a difference and a quotient.
_PER_ELEMENT = {"__cudnn$norm": 8, "__onednn$layernorm": 8, "__onednn$softmax": 5}
_TRITON = "__gpu$xla.gpu.triton"
_STATED = ("matmul_flops", "other_flops", "hbm_bytes")
_METADATA = re.compile(r'serialized_metadata = "((?:[^"\\]|\\.)*)"')
_KERNEL_NAME = re.compile(r'", name = "(\w+)"')
_KERNELS = ("tpu_custom_call", "mosaic_gpu_v2", "mosaic_gpu", _TRITON)


def target(instruction: Instruction) -> str:
    """Returns the `custom_call_target` of a custom call."""
    return instruction.string("custom_call_target")


def offloaded(instruction: Instruction) -> str | None:
    """Returns the computation that a call to another core of the chip runs, or None.

    TPU hands gathers and collectives to its SparseCores so, under a target that
    names no kernel.
    """
    called = re.findall(r"%?([\w.\-]+)", instruction.attr("called_computations") or "")
    if instruction.attr("async_execution_thread") is None or len(called) != 1:
        return None
    return called[0]


def stated_bytes(instruction: Instruction) -> int | None:
    """Returns the HBM bytes that a kernel says it moves; None if it says nothing."""
    stated = _stated(instruction)
    return stated["hbm_bytes"] if stated else None


def kernel_name(instruction: Instruction) -> str:
    """Returns what a Triton kernel is called where it is written, or ""."""
    if target(instruction) != _TRITON:
        return ""
    found = _KERNEL_NAME.search(instruction.rest)
    return found[1] if found else ""


def is_free(instruction: Instruction) -> bool:
    """Returns whether this custom call moves and computes nothing."""
    return target(instruction) in FREE_TARGETS


def results(instruction: Instruction) -> tuple[Shape, ...]:
    """Returns the arrays that a custom call writes, scratch space left out."""
    leaves = instruction.shape.leaves
    name = target(instruction)
    if name.startswith(("__cublas$", "__cudnn$")) and len(leaves) > 1:
        return leaves[:-1]
    return leaves


def custom_call_flops(
    instruction: Instruction, operands: list[Shape], kernels: Mapping[str, int]
) -> tuple[int, int]:
    """Returns `(FLOPs, of these in matrix products)`.

    Args:
      instruction: the call.
      operands: the shapes it reads.
      kernels: FLOPs of one execution of kernels that the caller knows, by target or
        by the last part of their op_name.

    Raises:
      ValueError: the target is not known, or carries no cost.
    """
    name = target(instruction)
    if name in FREE_TARGETS or name in MOVE_TARGETS:
        return 0, 0
    out = instruction.shape.leaves[0]
    op_name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.rest)
    for key in (name, op_name[1].rpartition("/")[2] if op_name else ""):
        if key in kernels:
            return kernels[key], kernels[key]
    if _GEMM.fullmatch(name):
        return _gemm(instruction, operands, out)
    if _FMHA.fullmatch(name):
        return _fmha(instruction)
    if name.startswith("__cudnn$conv"):
        return _conv(instruction, name, operands, out)
    if name in ("TopK", "__gpu$TopK", "PartialReduce"):
        depth = max(out.dims[-1].bit_length(), 1)  # n log2 k
        return operands[0].size * depth, 0
    if name in _PER_ELEMENT:
        return operands[0].size * _PER_ELEMENT[name], 0
    if match := _FACTOR.fullmatch(name):
        return _factorisation(match.lastgroup or "", operands), 0
    if name == "tpu_custom_call" and instruction.name.startswith("ragged-dot-metadata"):
        return sum(leaf.size for leaf in instruction.shape.leaves), 0  # indices
    if stated := _stated(instruction):
        products = stated["matmul_flops"]
        return products + stated["other_flops"], products
    if name in _KERNELS:
        cost = _find(_config(instruction), "cost_estimate")
        if cost:
            flops = int(cost.get("flops", 0))
            return flops + int(cost.get("transcendentals", 0)), flops
    raise ValueError(
        f"custom call {name!r} has no known cost; add it to"
        " sharding/hlo/custom_calls.py, give the kernel a cost estimate, or name it in"
        f" `kernels`: {instruction}"
    )


def stated_collective(instruction: Instruction) -> tuple[str, str, int] | None:
    """Returns kind, replica groups and payload bytes of a kernel's own collective.

    None if the kernel says of none; see `_metadata`.
    """
    metadata = _metadata(instruction)
    if "collective" not in metadata:
        return None
    payload = int(metadata["payload_bytes"])
    return metadata["collective"], metadata["replica_groups"], payload


def _stated(instruction: Instruction) -> dict[str, int] | None:
    """Returns what one execution of a kernel costs, if it says so: all of `_STATED`."""
    metadata = _metadata(instruction)
    try:
        return {key: int(metadata[key]) for key in _STATED}
    except (ValueError, KeyError, TypeError):
        return None


def _metadata(instruction: Instruction) -> dict[str, Any]:
    """Returns what a Triton kernel says of itself.

    A Pallas kernel for GPUs loses its cost estimate on the way to HLO and keeps its
    `metadata`. Ours has the figures of `_STATED`, and where devices exchange data,
    `collective` (its opcode), `replica_groups` and `payload_bytes`.
    """
    found = _METADATA.search(instruction.rest)
    if target(instruction) != _TRITON or not found:
        return {}
    try:
        metadata = json.loads(re.sub(r"\\(22|5C)", _unescape, found[1]))
    except ValueError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _unescape(match: re.Match[str]) -> str:
    return chr(int(match[1], 16))


def _factorisation(kind: str, operands: list[Shape]) -> int:
    """Returns FLOPs as in Golub and Van Loan, Matrix Computations, 4th edition."""
    first = operands[0]
    rows, columns = first.dims[-2:]
    long, short = max(rows, columns), min(rows, columns)
    if kind == "eigh" and len(operands) == 4:  # TPU passes the quarters of the matrix
        return int(_SQUARE[kind] * first.size * columns * 8)
    if kind in _SQUARE:
        return int(_SQUARE[kind] * first.size * columns)
    if kind == "svd":  # 14 m n^2 + 8 n^3, section 8.6.3
        return first.size // long * short * (14 * long + 8 * short)
    if kind == "times_q":  # 2 n k (2 m - k) for k reflections of n columns, 5.1.6
        return operands[-1].size // rows * 2 * columns * (2 * rows - columns)
    if kind == "cholesky":  # n^3 / 3, section 4.2; so is a triangle's inverse, and the
        # triangle of the compact WY form of n reflections, section 5.1.7
        return first.size * columns // 3
    if kind == "lu":  # 2 n^3 / 3, section 3.2
        return first.size * 2 * columns // 3
    if kind == "qr":  # 2 n^2 (m - n / 3) of the longer and shorter side, section 5.2
        return first.size // long * 2 * short * (3 * long - short) // 3
    return operands[1].size * columns  # n^2 for each right-hand side, section 3.1


def _gemm(
    instruction: Instruction, operands: list[Shape], out: Shape
) -> tuple[int, int]:
    config = _config(instruction)
    dims = _find(config, "dot_dimension_numbers")
    if dims is not None:
        axes = [int(d) for d in dims.get("lhs_contracting_dimensions", ())]
        contracted = math.prod(operands[0].dims[a] for a in axes)
    else:  # oneDNN: the last, or last but one, axis of the left operand
        transposed = bool(_find(config, "transpose_a"))
        contracted = operands[0].dims[-2 if transposed else -1]
    flops = out.multiply_add_flops * out.size * contracted
    epilogue = str(_find(config, "epilogue") or "DEFAULT")
    extra = out.size * (epilogue.count("_") + 1 if epilogue != "DEFAULT" else 0)
    beta = _find(config, "beta")
    extra += out.size if beta else 0
    return flops + extra, flops


def _fmha(instruction: Instruction) -> tuple[int, int]:
    """Attention: 2 products forward, 5 backward, of H multiply-adds a score.

    What is executed is counted: all B N T S scores, but of a causal square the tiles at
    and below its diagonal, n (n + 1) / 2 of n^2, for kernels skip those above it (Dao
    2023, arXiv:2307.08691, section 3.1). That is a little more than the half that the
    mask leaves: 56 % at 1024 tokens.
    """
    config = _config(instruction)
    shape = _find(config, "intermediate_tensor_shape") or {}
    sizes = [int(d) for d in shape.get("dimensions", ())]
    heads = instruction.shape.leaves[0].dims
    if not sizes or not heads:
        raise ValueError(f"no score sizes in the config of instruction: {instruction}")
    backward = "Backward" in target(instruction)
    scores = math.prod(sizes)
    causal = str(_find(config, "mask_type") or "").endswith("CAUSAL")
    if causal and sizes[-1] == sizes[-2] > _TILE:
        tiles = -(-sizes[-1] // _TILE)
        scores = math.prod(sizes[:-2]) * _TILE**2 * tiles * (tiles + 1) // 2
    products = 2 * scores * heads[-1] * (5 if backward else 2)
    softmax = 5 * scores  # scale, max, subtract, exponential, sum
    return products + softmax, products


def _conv(
    instruction: Instruction, name: str, operands: list[Shape], out: Shape
) -> tuple[int, int]:
    # Labels and window are those of the forward convolution lhs, rhs -> out.
    lhs, rhs, result = operands[0], operands[1], out
    if name == "__cudnn$convBackwardInput":
        lhs, rhs, result = out, operands[1], operands[0]
    elif name == "__cudnn$convBackwardFilter":
        lhs, rhs, result = operands[0], out, operands[1]
    flops = 2 * convolution_products(instruction, lhs.dims, rhs.dims, result.dims)
    extra = out.size if "Bias" in name else 0
    return flops + extra, flops


def _config(instruction: Instruction) -> Any:
    text = instruction.attr("backend_config") or ""
    if text.startswith('"'):
        text = instruction.string("backend_config")
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _find(config: Any, key: str) -> Any:
    """Returns the first value under `key` anywhere in nested dicts, else None."""
    if isinstance(config, dict):
        if key in config:
            return config[key]
        for value in config.values():
            if isinstance(value, dict) and (found := _find(value, key)) is not None:
                return found
    return None
