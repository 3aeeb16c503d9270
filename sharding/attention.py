"""Attention by name: how it is computed, where it can be, how it is mapped.

Of prompts, and of one new token over its cache.

A kernel from a library is opaque to the compiler, which can neither split it nor look
into it: it is mapped over the mesh, so that it sees the arrays of one device.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm import token_kernel
from jaxllm.attention import (
    PromptAttention,
    blocks_of,
    causal_attention,
    cudnn_attention,
    decode_attention_part,
    join_parts,
)
from jaxllm.cache import CACHE_AXES, KV, CacheLayer
from jaxllm.config import ModelConfig
from jaxllm.decode import TokenAttention, for_token
from jaxllm.layers import Place
from sharding.rules import AxisRules
from sharding.target import Target

Attention = Literal["blocks", "cudnn"]
Token = Literal["einsum", "triton"]

_QUERIES = ("cache_batch", "seq", "heads", None, "head_dim")
_KEYS = ("cache_batch", "seq", "heads", "head_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to compute it.

    Attributes:
      function: on arrays; of one device if `is_opaque`.
      is_opaque: the compiler cannot split it.
      platforms: whose devices it is for; None if it is made of ordinary operations,
        which every target has.
      dtypes: of activations; None for all.
      max_head_dim: widest head; None for all.
      tile: queries, and keys, whose scores are computed together; None: as
        `jaxllm.attention.blocks_of` says.
    """

    function: PromptAttention
    is_opaque: bool = False
    platforms: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    max_head_dim: int | None = None
    tile: int | None = None

    def scores(self, seq_len: int) -> int:
        """Returns the scores computed for one head of a prompt of `seq_len` tokens.

        Squares at and below the diagonal; those above it are skipped.
        """
        count, size = blocks_of(seq_len)
        if self.tile is not None:
            size = min(self.tile, seq_len)
            count = math.ceil(seq_len / size)
        return count * (count + 1) // 2 * size * size


# cuDNN takes heads of up to 256 on a Hopper GPU and 128 before, in multiples of 8.
KERNELS: dict[Attention, Kernel] = {
    "blocks": Kernel(function=causal_attention),
    "cudnn": Kernel(
        function=cudnn_attention,
        is_opaque=True,
        platforms=("cuda",),
        dtypes=("bfloat16", "float16"),
        max_head_dim=128,
        tile=128,
    ),
}


def refusal(
    name: Attention, config: ModelConfig, dtype: str, target: Target | None = None
) -> str | None:
    """Returns why attention `name` cannot be used, None if it can.

    Args:
      name: of the attention.
      config: the model.
      dtype: of activations.
      target: where it would run, if that is known.
    """
    if name not in KERNELS:
        return (
            f"no attention {name!r}; there are {', '.join(KERNELS)}. Choose one of"
            " them."
        )
    kernel, width = KERNELS[name], config.head_dim
    rest = "Use attention='blocks', which has no such limit."
    if kernel.dtypes and jnp.dtype(dtype).name not in kernel.dtypes:
        return (
            f"attention {name!r} in {dtype}: its kernel takes"
            f" {' and '.join(kernel.dtypes)} only. {rest}"
        )
    if kernel.max_head_dim and (width > kernel.max_head_dim or width % 8):
        return (
            f"attention {name!r} with heads {width} wide: its kernel takes multiples of"
            f" 8 up to {kernel.max_head_dim}. {rest}"
        )
    if target is None or kernel.platforms is None:
        return None
    if target.platform not in kernel.platforms:
        return (
            f"attention {name!r} for target {target.name}, devices of platform"
            f" {target.platform}: its kernel is of a library for"
            f" {', '.join(kernel.platforms)} alone. {rest}"
        )
    return None


def prompt_attention(
    name: Attention, rules: AxisRules, axes: Sequence[str], manual: Sequence[str]
) -> PromptAttention:
    """Returns attention `name` of a whole prompt, for use in a partitioned program.

    An opaque kernel is mapped over every axis that no enclosing `jax.shard_map`
    handles, those of size 1 included: JAX puts a kernel with partitioning rules of its
    own (`custom_partitioning`, as cuDNN's) in place as it is only where all axes of
    the mesh are manual.

    Args:
      name: of the attention.
      rules: how prompts and heads are split.
      axes: of the mesh.
      manual: those of `axes` that an enclosing `jax.shard_map` handles.
    """
    kernel = KERNELS[name]
    if not kernel.is_opaque:
        return kernel.function
    inner = tuple(axis for axis in axes if axis not in manual)
    queries = rules.spec(_QUERIES, phase="prefill", keep=inner)
    keys = rules.spec(_KEYS, phase="prefill", keep=inner)
    return jax.shard_map(
        kernel.function,
        in_specs=(queries, keys, keys),
        out_specs=queries,
        axis_names=set(inner),
        check_vma=False,
    )


def token_refusal(
    name: Token,
    config: ModelConfig,
    *,
    is_apart: bool,
    is_whole: bool,
    is_wide: bool = True,
    size: int,
) -> str | None:
    """Returns why attention `name` of one token cannot be used, None if it can.

    Args:
      name: of the attention; not "einsum".
      config: the model as computed.
      is_apart: each layer's cache is an array of its own.
      is_whole: a device holds all positions of the sequences and heads it holds.
      is_wide: the cache has the dtype of activations.
      size: elements of one layer's keys on one device.
    """
    rest = "Use token_attention='einsum', which has no such limit."
    if name != "triton":
        return f"no token attention {name!r}; there are einsum, triton. Choose one."
    if not is_apart:
        return (
            "token attention 'triton' with a cache in stacks: the kernel writes to an"
            f" array a layer and slot. Unroll layers and ticks. {rest}"
        )
    if not is_whole:
        return (
            "token attention 'triton' with positions split over devices: the kernel"
            f" reads all positions of a sequence. Choose other rules. {rest}"
        )
    if not is_wide:
        return (
            "token attention 'triton' with a cache in 8 bits: the kernel reads keys and"
            " values of the dtype of its queries. Use token_attention='einsum', or"
            " kv=None."
        )
    return token_kernel.refusal(
        group=config.group_size, width=config.head_dim, size=size
    )


def token_attention(
    name: Token,
    rules: AxisRules,
    axes: Sequence[str],
    manual: Sequence[str],
    *,
    interpret: bool = False,
) -> TokenAttention | None:
    """Returns attention `name` of one token, for use in a partitioned program.

    None stands for ordinary operations, which the compiler splits. A kernel is mapped
    as in `prompt_attention`, whose arguments these are.

    Args:
      name: of the attention.
      rules: how sequences and heads are split.
      axes: of the mesh.
      manual: those of `axes` that an enclosing `jax.shard_map` handles.
      interpret: run the kernel as ordinary operations, where there is no GPU.
    """
    if name == "einsum":
        return None
    inner = tuple(axis for axis in axes if axis not in manual)
    spec = functools.partial(rules.spec, phase="decode", keep=inner)
    heads = ("cache_batch", "kv_heads", None, "head_dim")
    turns = spec(("cache_batch", None))
    cached: Any = KV(*[cast(Any, spec(CACHE_AXES))] * 2)

    def attend(
        qkv: jax.Array, angles: jax.Array, cache: CacheLayer, positions: jax.Array
    ):
        parts = qkv.reshape(-1, *qkv.shape[-5:])[:, :, 0]
        keep = jnp.asarray(False if cache.keep is None else cache.keep)
        out, kv = mapped(
            token_kernel.grouped(parts, cache.kv.k.shape[1]),
            jnp.cos(angles[:, 0]),
            jnp.sin(angles[:, 0]),
            cache.kv,
            jnp.broadcast_to(positions, parts.shape[1:2]),
            keep,
        )
        return out[:, None], dataclasses.replace(cache, kv=kv)

    mapped = jax.shard_map(
        functools.partial(token_kernel.token_attention, interpret=interpret),
        in_specs=(
            spec((None, *heads)),
            turns,
            turns,
            cached,
            spec(("cache_batch",)),
            spec(()),
        ),
        out_specs=(spec(heads), cached),
        axis_names=set(inner),
        check_vma=False,
    )
    return attend


def split_attention(
    rules: AxisRules, axes: Sequence[str], manual: Sequence[str], place: Place
) -> TokenAttention:
    """Returns attention of one token over a cache whose positions are split.

    Each device writes if the position is one of its own, attends to those it holds,
    and sends each peer the heads that are the peer's. The compiler, which cannot know
    whose a position is, would gather the whole cache to write one. Ordinary operations,
    mapped as in `prompt_attention`, whose arguments these are; `place` pins what comes
    before.
    """
    inner = tuple(axis for axis in axes if axis not in manual)
    spec = functools.partial(rules.spec, phase="decode", keep=inner)
    split, heads = (
        tuple(axis for axis in rules.axes_of(name, "decode") if axis in inner)
        for name in ("cache_seq", "heads")
    )
    # Else every device needs all heads, or those of another split.
    to_peers = heads == split

    def attend_local(
        q: Any, new: KV, kv: KV, positions: Any, keep: Any, index: Any
    ) -> tuple[jax.Array, KV]:
        length = kv.k.shape[len(index) + 2]
        here = positions - lax.axis_index(split) * length
        elsewhere = (here < 0) | (here >= length)
        layer = CacheLayer(kv=kv, index=index, keep=keep | elsewhere)
        layer = layer.write(new, jnp.clip(here, 0, length - 1))
        where = jnp.broadcast_to(here, q.shape[:1])
        out, *sums = decode_attention_part(q, layer.read(), where)
        # One message: it takes as long as its latency.
        part = jnp.concatenate([out, *(x[..., None] for x in sums)], axis=-1)
        part = part.reshape(q.shape[0], -1, part.shape[-1])
        if to_peers:
            peers = lax.axis_size(split)
            apart = part.reshape(part.shape[0], peers, -1, part.shape[-1])
            parts = lax.all_to_all(apart, split, split_axis=1, concat_axis=0)
        else:
            parts = lax.all_gather(part, split)
        done = join_parts(parts[..., :-2], parts[..., -2], parts[..., -1])
        return done.astype(q.dtype)[:, None], layer.kv

    def attend(
        qkv: jax.Array, angles: jax.Array, cache: CacheLayer, positions: jax.Array
    ):
        q, new = for_token(qkv, angles, cache.kv.k.shape[-3], place)
        lead = len(cache.index)
        specs = jax.tree.map(
            lambda x: spec(((None,) * lead + CACHE_AXES)[: x.ndim]), cache.kv
        )
        mapped = jax.shard_map(
            attend_local,
            in_specs=(
                spec(("cache_batch", None, "kv_heads", None, "head_dim")),
                spec(("cache_batch", "kv_heads", None, "head_dim")),
                specs,
                spec(("cache_batch",) * positions.ndim),
                spec(()),
                spec(()),
            ),
            out_specs=(
                spec(("cache_batch", None, "heads" if to_peers else None, "head_dim")),
                specs,
            ),
            axis_names=set(inner),
            check_vma=False,
        )
        keep = jnp.asarray(False if cache.keep is None else cache.keep)
        index = tuple(jnp.asarray(i, jnp.int32) for i in cache.index)
        out, kv = mapped(q, new, cache.kv, positions, keep, index)
        return out, dataclasses.replace(cache, kv=kv)

    return attend
