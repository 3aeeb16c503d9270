"""What kernels for GPUs share: sizes that suit a GPU, and how they say their cost.

They are written in Pallas and compiled by Triton.
"""

import math
from typing import Any

import jax.numpy as jnp

ROWS = 16  # in the smallest product that the matrix units do
CORES = 132  # of an H100
PROGRAMS = 2 * CORES  # small ones, enough to fill a GPU


def cost(*, matmul_flops: int, other_flops: int, hbm_bytes: int) -> dict[str, str]:
    """Returns what one call costs, as the metadata that stays with a kernel in HLO."""
    figures = {
        "matmul_flops": matmul_flops,
        "other_flops": other_flops,
        "hbm_bytes": hbm_bytes,
    }
    return {name: str(value) for name, value in figures.items()}


def num_bytes(*arrays: Any) -> int:
    """Returns the bytes of arrays, or of their shapes."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)
