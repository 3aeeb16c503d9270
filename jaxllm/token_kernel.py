"""Attention of one new token a sequence over its cache, as one GPU kernel.

A Pallas kernel, compiled by Triton. It reads each key and value of the cache once, in
blocks, as far as its sequence has got; keeps a running softmax (Dao et al. 2022,
arXiv:2205.14135); and writes the new token's key and value in place. Where sequences
and heads are fewer than a GPU has cores, positions are split among programs and their
parts joined by a second, small kernel ("Flash-decoding", Dao et al. 2023).

It takes the product as it comes, perhaps in parts: adding them up, and turning queries
and keys by their position, would else be kernels of their own, each of which takes a
microsecond or two to do next to nothing.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from jaxllm.cache import KV
from jaxllm.triton import PROGRAMS, ROWS, cost, num_bytes

BLOCK = 64  # positions of the cache that a program holds at a time
_MASKED = -1e30
_LOG2_E = math.log2(math.e)


def splits_of(sequences: int, heads: int, length: int, block: int = BLOCK) -> int:
    """Returns among how many programs the positions of one head are split.

    Enough for `PROGRAMS` in all, none with less than a block of a full cache.

    Example:
      >>> splits_of(1, 8, 1152), splits_of(16, 8, 1152), splits_of(64, 8, 1152)
      (18, 3, 1)
    """
    wanted = math.ceil(PROGRAMS / (sequences * heads))
    return max(1, min(wanted, length // block))


def grouped(qkv: Float[Array, "P B N S H"], heads: int) -> Float[Array, "P B K T H"]:
    """Returns heads in groups, each with all its queries, one key and one value.

    With more tensor shards than key/value heads, each head is computed several times.
    """
    parts, batch, count, slots, width = qkv.shape
    if count == heads:
        return qkv
    apart = qkv.reshape(parts, batch, heads, count // heads, slots, width)
    queries = apart[..., :-2, :].reshape(parts, batch, heads, -1, width)
    return jnp.concatenate([queries, apart[..., 0, -2:, :]], axis=-2)


def token_attention(
    qkv: Float[Array, "P B K S H"],
    cos: Float[Array, "B C"],
    sin: Float[Array, "B C"],
    kv: KV,
    positions: Int[Array, " B"],
    keep: Bool[Array, ""] | None = None,
    *,
    block: int = BLOCK,
    splits: int | None = None,
    num_warps: int = 4,
    num_stages: int = 2,
    interpret: bool = False,
) -> tuple[Float[Array, "B K G H"], KV]:
    """Returns attention over the cache and the new token, and the cache with it.

    Args:
      qkv: parts to add up; of each key/value head the queries of the new token, its key
        and its value, S = G + 2, not rotated; G at most 16.
      cos: of the rotary angles of the token.
      sin: of the same.
      kv: the layer's cache, each [B, K, S, H]; updated in place.
      positions: of the new token; later entries of the cache are not read.
      keep: where True, the cache stays as it is (an idle pipeline tick).
      block: positions read at a time.
      splits: programs for one sequence and head; None: `splits_of`.
      num_warps: threads of a program, in warps of 32.
      num_stages: blocks in flight.
      interpret: run as ordinary operations, on any device.

    Raises:
      ValueError: the shapes do not suit the kernel.
    """
    _, batch, heads, slots, width = qkv.shape
    group = slots - 2
    length = kv.k.shape[2]
    if reason := refusal(group=group, width=width, size=kv.k.size):
        raise ValueError(reason)
    parts = splits or splits_of(batch, heads, length, block)
    keep = jnp.asarray(False if keep is None else keep).astype(jnp.int32).reshape(1)
    dtype = kv.k.dtype if parts == 1 else jnp.float32

    turn = pl.BlockSpec((None, width // 2), lambda b, h, part: (b, 0))
    cache = pl.BlockSpec(kv.k.shape, lambda b, h, part: (0, 0, 0, 0))
    result = pl.BlockSpec(
        (None, None, None, ROWS, width), lambda b, h, part: (b, h, part, 0, 0)
    )
    softmax = pl.BlockSpec((None, None, None, ROWS), lambda b, h, part: (b, h, part, 0))
    shape = (batch, heads, parts, group)
    weighed = jax.ShapeDtypeStruct((*shape, width), dtype)
    sums = jax.ShapeDtypeStruct(shape, jnp.float32)
    step = functools.partial(_attend, block=block, parts=parts, group=group)
    keys, values, out, top, total = pl.pallas_call(
        step,
        grid=(batch, heads, parts),
        in_specs=[
            pl.BlockSpec((batch,), lambda b, h, part: (0,)),
            pl.BlockSpec((1,), lambda b, h, part: (0,)),
            pl.BlockSpec(
                (len(qkv), None, None, ROWS, width),
                lambda b, h, part: (0, b, h, 0, 0),
            ),
            *(turn, turn, cache, cache),
        ],
        out_specs=[cache, cache, result, softmax, softmax],
        out_shape=[
            jax.ShapeDtypeStruct(kv.k.shape, kv.k.dtype),
            jax.ShapeDtypeStruct(kv.v.shape, kv.v.dtype),
            *(weighed, sums, sums),
        ],
        input_output_aliases={5: 0, 6: 1},
        compiler_params=plgpu.CompilerParams(
            num_warps=num_warps, num_stages=num_stages
        ),
        name="token_attention",
        metadata=cost(
            matmul_flops=4 * batch * heads * group * length * width,
            other_flops=5 * batch * heads * group * length + 4 * qkv.size,
            # The new key and value are written, beside the cache that is read.
            hbm_bytes=num_bytes(qkv, cos, sin, positions, *kv, weighed, sums, sums)
            + 2 * batch * heads * width * kv.k.dtype.itemsize,
        ),
        interpret=interpret,
    )(positions, keep, qkv, cos, sin, kv.k, kv.v)
    if parts == 1:
        return out[:, :, 0], KV(keys, values)
    joined = _join(out, top, total, kv.k.dtype, interpret=interpret)
    return joined, KV(keys, values)


def refusal(*, group: int, width: int, size: int) -> str | None:
    """Returns why the kernel cannot be used, None if it can.

    Args:
      group: query heads that share a key/value head.
      width: of a head.
      size: elements of one layer's keys on one device.
    """
    if group > ROWS:
        return (
            f"token attention with {group} query heads to a key/value head: the kernel"
            f" holds {ROWS}. Use token_attention='einsum', which has no such limit."
        )
    if width & (width - 1) or width < 16:
        return (
            f"token attention with heads {width} wide: the kernel takes powers of two"
            " from 16 on. Use token_attention='einsum', which has no such limit."
        )
    if size >= 2**31:
        return (
            f"token attention over {size:,} elements of a layer's keys: the kernel"
            " counts them in 32 bits. Use token_attention='einsum', or split further."
        )
    return None


def _attend(
    position_ref: Any,
    keep_ref: Any,
    qkv_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    k_ref: Any,
    v_ref: Any,
    k_out_ref: Any,
    v_out_ref: Any,
    out_ref: Any,
    top_ref: Any,
    total_ref: Any,
    *,
    block: int,
    parts: int,
    group: int,
) -> None:
    """One program: the queries of a head over one part of its positions."""
    b, h, part = (pl.program_id(i) for i in range(3))
    position = position_ref[b]
    width = qkv_ref.shape[-1]
    scale = width**-0.5
    # Blocks reach past the last query: their rows are neither read nor written.
    real = jnp.arange(ROWS) < group
    # Coordinate pairs (i, i + H/2) turn, as in `jaxllm.layers.rotate`.
    column, dtype = jnp.arange(width), k_ref.dtype
    upper = column >= width // 2
    angle = jnp.where(upper, column - width // 2, column)
    pair = jnp.where(upper, column - width // 2, column + width // 2)
    cos, sin = plgpu.load(cos_ref.at[angle]), plgpu.load(sin_ref.at[angle])
    sin = jnp.where(upper, sin, -sin)
    rows, columns, pairs, every = (
        jnp.broadcast_to(x, (ROWS, width))
        for x in (jnp.arange(ROWS)[:, None], column[None], pair[None], real[:, None])
    )
    q = _taken(qkv_ref, (rows, columns), dtype, every) * cos[None]
    q += _taken(qkv_ref, (rows, pairs), dtype, every) * sin[None]
    q = q.astype(dtype)
    new_k = _taken(qkv_ref, (group, column), dtype) * cos
    new_k += _taken(qkv_ref, (group, pair), dtype) * sin
    new_k = new_k.astype(dtype)
    new_v = _taken(qkv_ref, (group + 1, column), dtype).astype(dtype)
    # The new token is the first part's; what is older comes from the cache.
    own = part == 0
    score = jnp.sum(q.astype(jnp.float32) * new_k.astype(jnp.float32)[None], axis=1)
    score = score * (scale * _LOG2_E)
    top = jnp.where(own, score, _MASKED)
    total = jnp.where(own, jnp.ones_like(score), 0.0)
    acc = jnp.where(own, jnp.broadcast_to(new_v[None], q.shape).astype(jnp.float32), 0)

    blocks = pl.cdiv(position, block)
    each = pl.cdiv(blocks, parts)
    first = part * each
    last = jnp.minimum(first + each, blocks)
    offsets = jnp.arange(block)

    def step(i: Array, carry: tuple[Array, Array, Array]):
        top, total, acc = carry
        at = i * block + offsets
        seen = at < position
        here = (b, h, pl.ds(i * block, block))
        k = plgpu.load(k_ref.at[here], mask=seen[:, None], other=0.0)
        scores = plgpu.dot(q, k, trans_b=True) * (scale * _LOG2_E)
        scores = jnp.where(seen[None], scores, _MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        v = plgpu.load(v_ref.at[here], mask=seen[:, None], other=0.0)
        acc = acc * shrink[:, None] + plgpu.dot(weights.astype(v.dtype), v)
        return new_top, total * shrink + jnp.sum(weights, axis=1), acc

    top, total, acc = lax.fori_loop(first, last, step, (top, total, acc))
    if parts == 1:
        acc = acc / total[:, None]
    plgpu.store(out_ref, acc.astype(out_ref.dtype), mask=real[:, None])
    plgpu.store(top_ref, top, mask=real)
    plgpu.store(total_ref, total, mask=real)
    writes = jnp.broadcast_to(own & (keep_ref[0] == 0), new_k.shape)
    plgpu.store(k_out_ref.at[b, h, position], new_k, mask=writes)
    plgpu.store(v_out_ref.at[b, h, position], new_v, mask=writes)


def _taken(
    qkv_ref: Any, at: tuple[Any, Any], dtype: Any, mask: Array | None = None
) -> Array:
    """Returns the sums of all parts at rows and columns, in float32.

    They are rounded to `dtype`, as one product's results are.
    """
    masked = {} if mask is None else {"mask": mask, "other": 0.0}
    total = plgpu.load(qkv_ref.at[(0, *at)], **masked)
    for i in range(1, qkv_ref.shape[0]):
        total += plgpu.load(qkv_ref.at[(i, *at)], **masked)
    return total.astype(dtype).astype(jnp.float32)


def _join(
    out: Array, top: Array, total: Array, dtype: Any, *, interpret: bool
) -> Array:
    """Returns the parts [B, K, P, G, H] of a softmax's average as one, [B, K, G, H]."""
    batch, heads, parts, group, width = out.shape
    shape = jax.ShapeDtypeStruct((batch, heads, group, width), dtype)

    most = pl.next_power_of_2(parts)

    def join(out_ref: Any, top_ref: Any, total_ref: Any, joined_ref: Any) -> None:
        real = jnp.arange(most) < parts
        top = plgpu.load(top_ref, mask=real, other=_MASKED)
        total = plgpu.load(total_ref, mask=real, other=0.0)
        acc = plgpu.load(out_ref, mask=real[:, None], other=0.0)
        share = jnp.exp2(top - jnp.max(top))
        mixed = jnp.sum(acc * share[:, None], axis=0) / jnp.sum(total * share)
        joined_ref[...] = mixed.astype(joined_ref.dtype)

    softmax = pl.BlockSpec((None, None, most, None), lambda b, h, g: (b, h, 0, g))
    return pl.pallas_call(
        join,
        grid=(batch, heads, group),
        in_specs=[
            pl.BlockSpec(
                (None, None, most, None, width), lambda b, h, g: (b, h, 0, g, 0)
            ),
            *(softmax, softmax),
        ],
        out_specs=pl.BlockSpec((None, None, None, width), lambda b, h, g: (b, h, g, 0)),
        out_shape=shape,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        name="join_token_attention",
        metadata=cost(
            matmul_flops=0,
            other_flops=2 * out.size + 4 * top.size,
            hbm_bytes=num_bytes(out, top, total, shape),
        ),
        interpret=interpret,
    )(out, top, total)
