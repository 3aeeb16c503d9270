"""Products of a few rows with a large weight, as one GPU kernel and sums of parts.

A Pallas kernel, compiled by Triton. Such a product takes as long as its weight takes to
read, so the weight is cut along both its dimensions into as many pieces as keep all of
a GPU reading. What pieces of the same columns give is left apart, for whatever comes
next to add up on the way in: a kernel less.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from jaxllm.triton import PROGRAMS, ROWS, cost, num_bytes

COLUMNS = 128  # of the weight, that a program holds at a time
DEPTH = 128  # rows of the weight, likewise


def parts_of(rows: int, depth: int, columns: int) -> int:
    """Returns into how many parts the depth of a product is cut.

    Enough for `PROGRAMS` in all, but the parts of the result must stay small beside the
    weight: written and read once, at most an eighth of it.

    Example:
      >>> parts_of(1, 2048, 4096), parts_of(16, 2048, 4096), parts_of(1, 4096, 28672)
      (8, 4, 2)
    """
    wanted = math.ceil(PROGRAMS / math.ceil(columns / COLUMNS))
    pieces = math.ceil(depth / DEPTH)
    most = max(1, min(wanted, pieces, depth // (32 * rows)))
    return math.ceil(pieces / math.ceil(pieces / most))  # none of them empty


def split_product(
    x: Float[Array, "B D"],
    weight: Float[Array, "D N"],
    *,
    parts: int | None = None,
    num_warps: int = 4,
    num_stages: int = 4,
    interpret: bool = False,
) -> Float[Array, "P B N"]:
    """Returns `x` times `weight` in float32, in parts to be added up.

    Args:
      x: a few rows.
      weight: what they are multiplied with.
      parts: P; None: `parts_of`.
      num_warps: threads of a program, in warps of 32.
      num_stages: pieces of the weight in flight.
      interpret: run as ordinary operations, on any device.

    Raises:
      ValueError: more rows than the kernel is for.
    """
    (rows, depth), columns = x.shape, weight.shape[1]
    if rows > ROWS:
        raise ValueError(
            f"split product of {rows} rows: the kernel holds {ROWS}, and more of them"
            " are no longer read at the pace of the weight. Use an ordinary product."
        )
    count = parts or parts_of(rows, depth, columns)
    shape = jax.ShapeDtypeStruct((count, rows, columns), jnp.float32)
    steps = math.ceil(math.ceil(depth / DEPTH) / count)

    def multiply(x_ref: Any, weight_ref: Any, out_ref: Any) -> None:
        column = pl.program_id(0) * COLUMNS + jnp.arange(COLUMNS)
        part, row = pl.program_id(1), jnp.arange(ROWS)
        inside, real = column < columns, row < rows

        def step(i: Array, acc: Array) -> Array:
            first = (part * steps + i) * DEPTH
            deep = first + jnp.arange(DEPTH) < depth
            left = plgpu.load(
                x_ref.at[:, pl.ds(first, DEPTH)],
                mask=real[:, None] & deep[None],
                other=0.0,
            )
            right = plgpu.load(
                weight_ref.at[pl.ds(first, DEPTH), :],
                mask=deep[:, None] & inside[None],
                other=0.0,
            )
            return acc + plgpu.dot(left, right)

        acc = lax.fori_loop(0, steps, step, jnp.zeros((ROWS, COLUMNS), jnp.float32))
        plgpu.store(out_ref, acc, mask=real[:, None] & inside[None])

    padded = steps * count * DEPTH
    return pl.pallas_call(
        multiply,
        grid=(math.ceil(columns / COLUMNS), count),
        in_specs=[
            pl.BlockSpec((ROWS, padded), lambda n, part: (0, 0)),
            pl.BlockSpec((padded, COLUMNS), lambda n, part: (0, n)),
        ],
        out_specs=pl.BlockSpec((None, ROWS, COLUMNS), lambda n, part: (part, 0, n)),
        out_shape=shape,
        compiler_params=plgpu.CompilerParams(
            num_warps=num_warps, num_stages=num_stages
        ),
        name="split_product",
        metadata=cost(
            matmul_flops=2 * rows * depth * columns,
            other_flops=0,
            hbm_bytes=num_bytes(x, weight, shape),
        ),
        interpret=interpret,
    )(x, weight)
