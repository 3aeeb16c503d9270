"""What runs while devices sum: a prompt's rows in two halves, each in its turn.

Two products of each block end in an all-reduce, and what follows needs the sum. Of a
prompt these sums are long. They need no matrix units, and what follows one half of the
sequences does not need the sum of the other half: so one half is computed while the
other is summed, see `jaxllm.model.Block.in_turns`.

The order is in the data. A turn's product and the sum of the turn before pass one
barrier, and only behind it are sums begun and the next turn's inputs there. XLA:GPU
(jaxlib 0.10.2 to 0.12.0) keeps barriers until it has scheduled a program; between the
start and the end of each all-reduce it finds the other half's products to run, and
gives the all-reduce a stream of its own. With halves left to themselves, it runs some
of them one after the other.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.config import ModelConfig
from jaxllm.model import Turn, param_axes
from jaxllm.quantized import WeightFormat, product
from sharding.partition import Partition

Overlap = Literal["none", "rows"]


def refusal(name: Overlap, partition: Partition, rows: int) -> str | None:
    """Returns why overlap `name` of a prompt cannot be, None if it can.

    Args:
      name: of the overlap; not "none".
      partition: how the model is split.
      rows: sequences that a replica reads at once.
    """
    if name not in get_args(Overlap):
        known = ", ".join(get_args(Overlap))
        return f"no overlap {name!r}; there are {known}. Choose one."
    if partition.tensor == 1 or not partition.sums_stream("prefill"):
        return (
            f"overlap {name!r} with rules {partition.rules.name!r} of"
            f" {partition.name}: there is no sum over `tensor` to hide. Blocks must end"
            " in one, of a whole residual stream. Use a tensor degree above 1 and the"
            " rules 'megatron', or overlap='none'."
        )
    if rows % 2:
        return (
            f"overlap {name!r} of {rows} sequences at once: they are run in two equal"
            " halves. Choose a batch, or micro-batches, of an even number, or"
            " overlap='none'."
        )
    return None


def make_turn(
    config: ModelConfig,
    partition: Partition,
    manual: tuple[str, ...],
    *,
    weights: WeightFormat | None = None,
    wide: bool = False,
) -> Turn:
    """Returns what ends a turn: a product, and its sum over `tensor` behind a barrier.

    Args:
      config: the model as computed.
      partition: how it is split; `refusal` says what suits.
      manual: axes that an enclosing `jax.shard_map` handles.
      weights: format of the blocks' matrices.
      wide: add in float32, see `sharding.pipeline.Pipeline`.
    """
    inner = tuple(axis for axis in partition.axes if axis not in manual)

    def spec(names: tuple[str | None, ...]) -> jax.sharding.PartitionSpec:
        return partition.rules.spec(names, phase="prefill", keep=inner)

    block = param_axes(config, weights).blocks
    names = {"heads": block["attention"]["w_out"], "mlp": block["mlp"]["w_down"]}
    stream = spec(("batch", "residual_seq", "embed"))

    def local(x: jax.Array, weight: Any, other: jax.Array) -> tuple[Any, Any]:
        part, other = lax.optimization_barrier((product(x, weight), other))
        total = lax.psum(part.astype(jnp.float32) if wide else part, "tensor")
        return total.astype(part.dtype), other

    def turn(
        x: jax.Array, name: str, weight: Any, other: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        weight_spec = jax.tree.map(
            spec, names[name], is_leaf=lambda leaf: isinstance(leaf, tuple)
        )
        return jax.shard_map(
            local,
            in_specs=(spec(("batch", "seq", name)), weight_spec, stream),
            out_specs=(stream, stream),
            axis_names=set(inner),
            check_vma=False,
        )(x, weight, other)

    return turn
