"""How gate and up become what the feed-forward layer's last weight is multiplied with.

Written plainly, that is a product and a kernel that reads all of it and writes half as
much. One kernel of our own does both (`jaxllm.gated_kernel`), each device on its own
rows and columns.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from jaxllm import gated_kernel
from jaxllm.config import ModelConfig
from jaxllm.layers import mlp_pieces, swiglu
from jaxllm.quantized import product
from sharding.partition import Partition
from sharding.target import Target

GateUp = Literal["plain", "mosaic"]
_CAPABILITY = "9.0"  # Hopper, whose matrix units the kernel is written for


def refusal(
    name: GateUp,
    config: ModelConfig,
    partition: Partition,
    dtype: str,
    *,
    phase: Literal["prefill", "decode"],
    tokens: int,
) -> str | None:
    """Returns why gate and up cannot be computed so, None if they can.

    Args:
      name: of the way.
      config: the model as computed.
      partition: how it is split.
      dtype: of activations.
      phase: of the program.
      tokens: that a device works on at once.
    """
    if name == "plain":
        return None
    if name not in get_args(GateUp):
        return f"no gate_up {name!r}; there are {', '.join(get_args(GateUp))}."
    rest = "Use gate_up='plain', which has no such limit."
    pieces = mlp_pieces(config)
    if not partition.sums_stream(phase) or pieces % partition.tensor:
        return (
            f"gate_up {name!r} with rules {partition.rules.name!r} of"
            f" {partition.name}: the kernel is for whole rows and {pieces} pieces of"
            " the hidden width, which `tensor` alone must split. Use the rules"
            f" 'megatron' and a degree that divides {pieces}. {rest}"
        )
    reason = gated_kernel.refusal(
        rows=tokens,
        depth=config.embed_dim,
        piece=config.mlp_dim // pieces,
        dtype=dtype,
    )
    return reason and f"gate_up {name!r} of {tokens} tokens: {reason} {rest}"


def device_refusal(name: GateUp, target: Target) -> str | None:
    """Returns why the devices of `target` cannot run it, None if they can."""
    if name == "plain" or target.platform == "cpu":
        return None
    have = getattr(target.devices[0], "compute_capability", None)
    if target.platform == "cuda" and have in (None, _CAPABILITY):
        return None
    return (
        f"gate_up {name!r} for target {target.name}, devices of platform"
        f" {target.platform}, compute capability {have}: its kernel is for NVIDIA GPUs"
        f" of {_CAPABILITY}. Use gate_up='plain', which has no such limit."
    )


def make_gate(
    config: ModelConfig,
    partition: Partition,
    manual: tuple[str, ...],
    *,
    phase: Literal["prefill", "decode"],
    on_cpu: bool = False,
) -> Callable[[jax.Array, Any], jax.Array]:
    """Returns what makes [B, T, F] of the stream's norm and the weight of gate and up.

    Args:
      config: the model as computed.
      partition: how it is split; `refusal` says what suits.
      manual: axes that an enclosing `jax.shard_map` handles.
      phase: of the program.
      on_cpu: in ordinary operations.
    """
    inner = tuple(axis for axis in partition.axes if axis not in manual)
    spec = functools.partial(partition.rules.spec, phase=phase, keep=inner)
    pieces = mlp_pieces(config) // partition.tensor

    def local(x: jax.Array, weight: Any) -> jax.Array:
        if on_cpu:
            return swiglu(product(x, weight), pieces)
        out = gated_kernel.gated_product(
            x.reshape(-1, x.shape[-1]), weight, pieces=pieces
        )
        return out.reshape(*x.shape[:-1], -1)

    return jax.shard_map(
        local,
        in_specs=(spec(("batch", "seq", "embed")), spec(("embed", "mlp"))),
        out_specs=spec(("batch", "seq", "mlp")),
        axis_names=set(inner),
        check_vma=False,
    )
