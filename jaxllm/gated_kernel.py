"""Gate and up with what follows them, as one GPU kernel: SwiGLU in their product.

A Pallas kernel for Hopper's matrix units, compiled by Mosaic GPU. An ordinary product
writes gate and up to memory, and another kernel reads both and writes half as much.
Here a tile of gate and the same columns of up are multiplied side by side, and what
leaves the chip is silu(gate) times up.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxllm.triton import CORES, cost_scope, num_bytes

_GROUPS = 2  # warpgroups that multiply; a third one fetches
_SWIZZLE = 128  # bytes
_WIDE = _SWIZZLE // 2  # numbers of 16 bits in them
_FETCHING_REGISTERS = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What a core holds at a time; the fastest on an H100 of 17 tried.

    Attributes:
      rows: of the activation, in each of two warpgroups.
      columns: of gate, and of up.
      depth: of both, in one step.
      num_steps: in flight; (2 rows + 2 columns) x depth x 2 bytes each.
      band: columns of tiles that are worked through row by row, for the cache's sake.
    """

    rows: int = 64
    columns: int = 128
    depth: int = _WIDE
    num_steps: int = 4
    band: int = 8


TILE = Tile()


def refusal(*, rows: int, depth: int, piece: int, dtype: str) -> str | None:
    """Returns why there is no kernel for a product, None if there is one.

    Args:
      rows: of the activation.
      depth: its columns.
      piece: columns of gate that follow each other.
      dtype: of all of them.
    """
    wanted = {
        "rows": (rows, _GROUPS * TILE.rows),
        "columns of the activation": (depth, TILE.depth),
        "columns of gate that follow each other": (piece, TILE.columns),
    }
    for name, (have, whole) in wanted.items():
        if have % whole:
            return f"{have} {name} are no multiple of {whole}, of which its tiles are."
    if dtype != "bfloat16":
        return f"it multiplies bfloat16, and this is {dtype}."
    return None


def gated_product(
    x: Float[Array, "B D"], weight: Float[Array, "D N"], *, pieces: int
) -> Float[Array, "B F"]:
    """Returns silu(gate) times up of `x`, each rounded as an ordinary product is.

    Args:
      x: activations.
      weight: of N = 2 F columns: piece by piece the gate's, then up's.
      pieces: into which each of both is cut.

    Raises:
      ValueError: shapes or dtype are not those of its tiles.
    """
    (rows, depth), hidden = x.shape, weight.shape[1] // 2
    piece = hidden // pieces
    if reason := refusal(rows=rows, depth=depth, piece=piece, dtype=str(x.dtype)):
        raise ValueError(f"gated product: {reason} Use an ordinary product.")
    shape = jax.ShapeDtypeStruct((rows, hidden), x.dtype)
    kernel = plgpu.kernel(
        functools.partial(_kernel, piece=piece, tile=TILE),
        out_type=shape,
        grid=(CORES,),
        grid_names=("core",),
        num_threads=_GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
    scope = cost_scope(
        matmul_flops=4 * rows * depth * hidden,
        other_flops=4 * rows * hidden,
        hbm_bytes=num_bytes(x, weight, shape),
    )
    with jax.named_scope("gated_product"), jax.named_scope(scope):
        return kernel(x, weight)


def _kernel(x: Any, weight: Any, out: Any, *, piece: int, tile: Tile) -> None:
    """Runs on every core: works through its share of the tiles of `out`."""
    (rows, depth), columns = x.shape, out.shape[1]
    height = _GROUPS * tile.rows
    down, across = rows // height, columns // tile.columns
    transforms = (
        plgpu.TilingTransform((8, _WIDE)),
        plgpu.SwizzleTransform(_SWIZZLE),
    )

    def block(shape: tuple[int, int], index: Callable[[Any], Any]) -> Any:
        return plgpu.BlockSpec(
            shape, index, transforms=transforms, memory_space=plgpu.SMEM
        )

    def pipeline(body: Callable[..., Any], context: Callable[..., Any]) -> Any:
        columns_of = block((tile.depth, tile.columns), lambda k: (k, 0))
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(depth // tile.depth,),
            in_specs=[
                block((height, tile.depth), lambda k: (0, k)),
                columns_of,
                columns_of,
            ],
            memory_registers=_FETCHING_REGISTERS,
            max_concurrent_steps=tile.num_steps,
            num_compute_wgs=_GROUPS,
            wg_axis="group",
            compute_context=context,
        )

    def nothing(*_: Any, **__: Any) -> None: ...

    any_columns = weight.at[:, pl.ds(0, tile.columns)]
    held = pipeline(nothing, nothing).get_allocations(x, any_columns, any_columns)

    @functools.partial(
        pl.run_scoped,
        held=held,
        staged=plgpu.SMEM(
            (_GROUPS, 2, tile.rows, _WIDE), out.dtype, transforms=transforms
        ),
        collective_axes="group",
    )
    def _(held: Any, staged: Any) -> None:
        group = lax.axis_index("group")

        @plgpu.nd_loop((down * across,), collective_axes="core")
        def _(loop: Any) -> None:
            row, column = plgpu.planar_snake(
                loop.index[0], (down, across), 0, tile.band
            )
            each = piece // tile.columns
            gate_at = column // each * 2 * piece + column % each * tile.columns
            first_row = row * height

            def multiply(_: Any, left: Any, gates: Any, ups: Any, sums: Any) -> Any:
                mine = left.at[pl.ds(group * tile.rows, tile.rows)]
                plgpu.wgmma(sums[0], mine, gates)
                plgpu.wgmma(sums[1], mine, ups)
                plgpu.wgmma_wait(0)
                return sums

            def around(run: Callable[..., Any]) -> None:
                sums = plgpu.WGMMAAccumulatorRef((tile.rows, tile.columns), jnp.float32)

                @functools.partial(pl.run_scoped, gate=sums, up=sums)
                def _(gate: Any, up: Any) -> None:
                    run((gate, up))
                    wide = [
                        y[...].astype(out.dtype).astype(jnp.float32) for y in (gate, up)
                    ]
                    hidden = wide[0] / (1.0 + jnp.exp(-wide[0])) * wide[1]
                    store(hidden.astype(out.dtype))

            def store(hidden: Array) -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                rows_at = pl.ds(first_row + group * tile.rows, tile.rows)
                for i in range(tile.columns // _WIDE):
                    here = staged.at[group, i % 2]
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    here[...] = hidden[:, i * _WIDE : (i + 1) * _WIDE]
                    plgpu.commit_smem()
                    columns_at = pl.ds(column * tile.columns + i * _WIDE, _WIDE)
                    plgpu.copy_smem_to_gmem(here, out.at[rows_at, columns_at])

            pipeline(multiply, around)(
                x.at[pl.ds(first_row, height), :],
                weight.at[:, pl.ds(gate_at, tile.columns)],
                weight.at[:, pl.ds(gate_at + piece, tile.columns)],
                allocations=held,
            )

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
