"""Products of a few rows with a large weight, as one GPU kernel and sums of parts.

A Pallas kernel, compiled by Triton. Such a product takes as long as its weight takes to
read, so the weight is cut along both its dimensions into as many pieces as keep all of
a GPU reading. What pieces of the same columns give is left apart, for whatever comes
next to add up on the way in: a kernel less.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from jaxllm.triton import CORES, PROGRAMS, ROWS, cost, num_bytes

MOST_ROWS = 64  # more are no longer read at the pace of the weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program holds at a time.

    Attributes:
      rows: of the activation, all there are and more.
      columns: of the weight.
      depth: rows of the weight.
      num_warps: threads of a program, in warps of 32.
      num_stages: pieces of the weight in flight.
    """

    rows: int
    columns: int = 64
    depth: int = 64
    num_warps: int = 4
    num_stages: int = 3


def tile_of(rows: int) -> Tile:
    """Returns a tile that holds `rows`, the fastest on an H100 of those tried.

    A stage takes (rows + columns) x depth x 2 of a core's 227 KB: six programs of up to
    16 rows fit into a core, or one of 64.
    """
    if rows <= ROWS:
        return Tile(rows=ROWS)
    return Tile(rows=pl.next_power_of_2(rows), depth=128, num_stages=4)


def parts_of(rows: int, depth: int, columns: int, tile: Tile | None = None) -> int:
    """Returns into how many parts the depth of a product is cut.

    Enough for `PROGRAMS` in all; of tiles with many rows, of which a core holds one,
    for no second turn. But the parts of the result must stay small beside the weight:
    written and read once, at most an eighth of it.

    Example:
      >>> parts_of(1, 2048, 4096), parts_of(16, 2048, 4096), parts_of(1, 4096, 28672)
      (5, 4, 1)
    """
    tile = tile or tile_of(rows)
    across = math.ceil(columns / tile.columns)
    wanted = CORES // across if tile.rows > ROWS else math.ceil(PROGRAMS / across)
    pieces = math.ceil(depth / tile.depth)
    most = max(1, min(wanted, pieces, depth // (32 * rows)))
    return math.ceil(pieces / math.ceil(pieces / most))  # none of them empty


def split_product(
    x: Float[Array, "B D"],
    weight: Float[Array, "D N"],
    *,
    parts: int | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float[Array, "P B N"]:
    """Returns `x` times `weight` in float32, in parts to be added up.

    Args:
      x: a few rows.
      weight: what they are multiplied with.
      parts: P; None: `parts_of`.
      tile: what a program holds; None: `tile_of`.
      interpret: run as ordinary operations, on any device.

    Raises:
      ValueError: more rows than the kernel is for.
    """
    (rows, depth), columns = x.shape, weight.shape[1]
    if rows > MOST_ROWS:
        raise ValueError(
            f"split product of {rows} rows: the kernel holds {MOST_ROWS}, and more of"
            " them are no longer read at the pace of the weight. Use an ordinary"
            " product."
        )
    tile = tile or tile_of(rows)
    count = parts or parts_of(rows, depth, columns, tile)
    shape = jax.ShapeDtypeStruct((count, rows, columns), jnp.float32)
    steps = math.ceil(math.ceil(depth / tile.depth) / count)

    def multiply(x_ref: Any, weight_ref: Any, out_ref: Any) -> None:
        column = pl.program_id(0) * tile.columns + jnp.arange(tile.columns)
        part, row = pl.program_id(1), jnp.arange(tile.rows)
        inside, real = column < columns, row < rows

        def step(i: Array, acc: Array) -> Array:
            first = (part * steps + i) * tile.depth
            deep = first + jnp.arange(tile.depth) < depth
            left = plgpu.load(
                x_ref.at[:, pl.ds(first, tile.depth)],
                mask=real[:, None] & deep[None],
                other=0.0,
            )
            right = plgpu.load(
                weight_ref.at[pl.ds(first, tile.depth), :],
                mask=deep[:, None] & inside[None],
                other=0.0,
            )
            return acc + plgpu.dot(left, right)

        acc = jnp.zeros((tile.rows, tile.columns), jnp.float32)
        acc = lax.fori_loop(0, steps, step, acc)
        plgpu.store(out_ref, acc, mask=real[:, None] & inside[None])

    padded = steps * count * tile.depth
    return pl.pallas_call(
        multiply,
        grid=(math.ceil(columns / tile.columns), count),
        in_specs=[
            pl.BlockSpec((tile.rows, padded), lambda n, part: (0, 0)),
            pl.BlockSpec((padded, tile.columns), lambda n, part: (0, n)),
        ],
        out_specs=pl.BlockSpec(
            (None, tile.rows, tile.columns), lambda n, part: (part, 0, n)
        ),
        out_shape=shape,
        compiler_params=plgpu.CompilerParams(
            num_warps=tile.num_warps, num_stages=tile.num_stages
        ),
        name="split_product",
        metadata=cost(
            matmul_flops=2 * rows * depth * columns,
            other_flops=0,
            hbm_bytes=num_bytes(x, weight, shape),
        ),
        interpret=interpret,
    )(x, weight)
