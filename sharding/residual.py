"""Where the parts of a product meet: summed over devices, added, normed.

Written plainly, the compiler puts an all-reduce there, and a few kernels behind it. One
kernel of our own does all three (`jaxllm.norm_kernel`): of a decoded token the numbers
are so few that every kernel and every pause counts, of a prompt so many that every pass
over them does.
"""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxllm import norm_kernel
from jaxllm.config import ModelConfig
from jaxllm.model import Steps
from jaxllm.norm_kernel import Mailbox, add_and_norm
from jaxllm.product_kernel import MOST_ROWS, split_product
from jaxllm.quantized import product
from sharding.partition import Partition

Residual = Literal["plain", "triton", "triton_split"]
PromptResidual = Literal["plain", "triton"]

# What one device may send at once to more than one peer. Every peer gets all of it, in
# one step: for few bytes that is faster than a ring, whose every step waits for the one
# before. To one peer a ring sends as much.
MOST_BYTES = 4 * 2**20
MOST_MAILBOX_BYTES = 2**31 - 1


def refusal(
    name: Residual,
    config: ModelConfig,
    partition: Partition,
    tokens: int,
    phase: Literal["prefill", "decode"] = "decode",
) -> str | None:
    """Returns why residual `name` cannot be used, None if it can.

    Args:
      name: of the residual; not "plain".
      config: the model as computed.
      partition: how it is split.
      tokens: that a device works on at once.
      phase: "prefill", whose choice is `PromptResidual`, or "decode".
    """
    option, values = {
        "prefill": ("prompt_residual", get_args(PromptResidual)),
        "decode": ("residual", get_args(Residual)),
    }[phase]
    rest = f"Use {option}='plain', which has no such limit."
    if name not in values:
        return f"no {option} {name!r}; there are {', '.join(values)}. Choose one."
    if name == "triton_split" and tokens > MOST_ROWS:
        return (
            f"residual {name!r} of {tokens} tokens: its products are of {MOST_ROWS}"
            " rows at most. Use residual='triton', which has no such limit."
        )
    if not partition.sums_stream(phase):
        return (
            f"{option} {name!r} with rules {partition.rules.name!r} of"
            f" {partition.name}: the kernel sums over `tensor`, which must split heads"
            f" and MLP and nothing else. Use the rules 'megatron'. {rest}"
        )
    sent = tokens * config.embed_dim * 2 * (partition.tensor - 1)
    if partition.tensor > 2 and sent > MOST_BYTES:
        return (
            f"{option} {name!r} of {tokens} tokens over {partition.tensor} devices:"
            f" each would send {sent:,} bytes at once, above {MOST_BYTES:,}. {rest}"
        )
    box = Mailbox.of(peers=partition.tensor, rows=tokens, width=config.embed_dim)
    if box.num_bytes > MOST_MAILBOX_BYTES:
        return (
            f"{option} {name!r} of {tokens} tokens over {partition.tensor} devices:"
            f" {box.num_bytes:,} bytes would hold what peers send, above"
            f" {MOST_MAILBOX_BYTES:,}, to which 32 bits can point. {rest}"
        )
    return norm_kernel.refusal(width=config.embed_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mailboxes:
    """The memory into which devices write to each other.

    Attributes:
      shape: of each.
      addresses: [data, stage, tensor, 2], low and high 32 bits; zeros where nothing
        runs.
      arrays: the memory, one array a device, alive as long as this is.
    """

    shape: Mailbox
    addresses: np.ndarray
    arrays: tuple[jax.Array, ...] = ()


@functools.cache
def make_mailboxes(shape: Mailbox, mesh: Mesh) -> Mailboxes:
    """Returns mailboxes on the devices of `mesh`, made once and kept.

    JAX lets the GPUs of a process reach each other's memory. Devices that are only
    described have none: their addresses are 0.

    Args:
      shape: of each.
      mesh: axes data, stage and tensor.
    """
    addresses = np.zeros((*mesh.devices.shape, 2), np.uint32)
    if mesh.devices.flat[0] not in jax.devices():
        return Mailboxes(shape=shape, addresses=addresses.view(np.int32))
    empty = np.zeros(shape.num_bytes // 4, np.int32)
    arrays = [jax.device_put(empty, device) for device in mesh.devices.flat]
    jax.block_until_ready(arrays)
    for where, array in zip(np.ndindex(mesh.devices.shape), arrays, strict=True):
        pointer = array.unsafe_buffer_pointer()
        addresses[where] = pointer % 2**32, pointer // 2**32
    return Mailboxes(
        shape=shape, addresses=addresses.view(np.int32), arrays=tuple(arrays)
    )


def kernel_steps(
    config: ModelConfig,
    partition: Partition,
    manual: tuple[str, ...],
    mailboxes: Mailboxes | None,
    *,
    phase: Literal["prefill", "decode"] = "decode",
    split: bool = False,
    whole: bool = True,
    on_cpu: bool = False,
) -> Steps:
    """Returns the parts of a block that end in, or begin from, the residual stream.

    Args:
      config: the model.
      partition: how it is split; `refusal` says what suits.
      manual: axes that an enclosing `jax.shard_map` handles.
      mailboxes: None with one tensor device, and where kernels are interpreted.
      phase: of the program.
      split: multiply by `split_product`, but for gate and up, which fill a GPU.
      whole: add up the parts of queries, keys and values, which attention does not.
      on_cpu: run kernels as ordinary operations, and sum by `psum` before.
    """
    inner = tuple(axis for axis in partition.axes if axis not in manual)
    spec = functools.partial(partition.rules.spec, phase=phase, keep=inner)
    mapped = functools.partial(jax.shard_map, axis_names=set(inner), check_vma=False)
    tensor = partition.tensor
    stream = spec(("batch", "residual_seq", "embed"))

    def multiply(x: jax.Array, weight: Any) -> jax.Array:
        """Returns the product [B T, N] of [B, T, D], perhaps in parts [P, B T, N]."""
        if split:
            return split_product(_flat(x), weight, interpret=on_cpu)
        return _flat(product(x, weight))

    def join_local(x: Any, hidden: Any, weight: Any, scale: Any) -> tuple[Any, Any]:
        part = multiply(hidden, weight)
        peers: dict[str, Any] = {}
        if tensor > 1 and on_cpu:
            wide = part.astype(jnp.float32).reshape(-1, *_flat(x).shape).sum(0)
            part = lax.psum(wide, "tensor").astype(x.dtype)
        elif tensor > 1:
            assert mailboxes is not None
            groups = partition.num_devices // tensor
            here = jnp.asarray(mailboxes.addresses)[
                lax.axis_index("data"), lax.axis_index("stage")
            ]
            peers = {
                "mailbox": mailboxes.shape,
                "me": lax.axis_index("tensor"),
                "addresses": here,
                "groups": f"[{groups},{tensor}]<=[{partition.num_devices}]",
            }
        total, normed = add_and_norm(
            _flat(x), part, scale, config.norm_eps, interpret=on_cpu, **peers
        )
        return jax.tree.map(lambda y: y.reshape(x.shape), (total, normed))

    def join(x: Any, hidden: Any, name: str, weight: Any, scale: Any):
        return mapped(
            join_local,
            in_specs=(
                stream,
                spec(("batch", "seq", name)),
                spec((name, "embed")),
                None if scale is None else spec(("embed",)),
            ),
            out_specs=(stream, None if scale is None else stream),
        )(x, hidden, weight, scale)

    def project_local(x: jax.Array, weight: Any) -> jax.Array:
        parts = multiply(x, weight)
        if whole:
            parts = parts.sum(0).astype(x.dtype)
        return parts[..., None, :]

    project = mapped(
        project_local,
        in_specs=(spec(("batch", "seq", "embed")), spec(("embed", "heads"))),
        out_specs=spec((*(() if whole else (None,)), "batch", "seq", "heads")),
    )
    return Steps(project=project if split else product, join=join)


def _flat(x: jax.Array) -> jax.Array:
    """Returns [B, T, N] as [B T, N]."""
    return x.reshape(-1, x.shape[-1])
