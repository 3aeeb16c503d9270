"""Ways to compute attention: of a prompt, in blocks or by cuDNN, and of one token.

All keep grouped queries grouped: keys and values are never repeated. Scores and
softmax are float32, whatever the inputs are.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxllm.cache import KV
from jaxllm.layers import Place, anywhere
from jaxllm.quantized import wide

# Causal attention [B, T, K, G, H] of queries, keys and values of a whole prompt.
PromptAttention = Callable[[Array, Array, Array], Array]

# Scores of one block of queries against one block of keys are alive at a time.
BLOCK = 512
_CUDNN_VERSION = 91900  # 9.19, of the wheels that jax[cuda13] brings
_MASKED = -1e30  # Finite: the maximum of a fully masked row must not be -inf.


def blocks_of(seq_len: int, most: int = BLOCK) -> tuple[int, int]:
    """Returns into how many blocks a prompt is cut, and positions in each.

    Blocks are equal, at most `most` long (give or take rounding up to a multiple of
    8), and cover the prompt; the last may reach past its end.

    Example:
      >>> blocks_of(2048), blocks_of(9428), blocks_of(100)
      ((4, 512), (19, 504), (1, 100))
    """
    count = math.ceil(seq_len / most)
    if count == 1:
        return 1, seq_len
    return count, math.ceil(seq_len / count / 8) * 8


def causal_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    block: int = BLOCK,
) -> Float[Array, "B T K G H"]:
    """Returns causal attention of a prompt over itself, without T x T scores.

    One loop runs over the pairs of a query block and a key block at or before it,
    and keeps the running maximum, sum and output of the query block (Milakov &
    Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). With n
    blocks of b positions, n (n + 1) / 2 pairs of b x b scores are computed a head;
    pairs above the diagonal are never visited.
    """
    seq_len, scale = q.shape[1], q.shape[-1] ** -0.5
    count, size = blocks_of(seq_len, block)
    # Padding stands behind every query, so the causal mask hides it.
    q, k, v = (_pad_to(x, count * size) for x in (q, k, v))
    batch, _, heads, group, width = q.shape
    rows = (batch, heads, group, size)
    state = (
        jnp.full(rows, _MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, width), jnp.float32),
        jnp.zeros_like(q),
    )
    pairs = np.array([(i, j) for i in range(count) for j in range(i + 1)], np.int32)

    def step(state: tuple[Array, ...], pair: Array) -> tuple[tuple[Array, ...], None]:
        top, total, acc, out = state
        i, j = pair[0], pair[1]
        q_block = lax.dynamic_slice_in_dim(q, i * size, size, axis=1)
        k_block = lax.dynamic_slice_in_dim(k, j * size, size, axis=1)
        v_block = lax.dynamic_slice_in_dim(v, j * size, size, axis=1)
        scores = scale * jnp.einsum(
            "BtKGH,BsKH->BKGts", q_block, k_block, preferred_element_type=jnp.float32
        )
        at = jnp.arange(size)
        seen = (i * size + at)[:, None] >= (j * size + at)[None, :]
        scores = jnp.where(seen[None, None, None], scores, _MASKED)
        first = j == 0
        old_top = jnp.where(first, _MASKED, top)
        top = jnp.maximum(old_top, jnp.max(scores, axis=-1))
        shrink = jnp.where(first, 0.0, jnp.exp(old_top - top))
        weights = jnp.exp(scores - top[..., None])
        total = total * shrink + jnp.sum(weights, axis=-1)
        acc = acc * shrink[..., None] + jnp.einsum(
            "BKGts,BsKH->BKGtH",
            weights.astype(v.dtype),
            v_block,
            preferred_element_type=jnp.float32,
        )
        # Written for every pair; the last of a query block is the one that stays.
        done = jnp.moveaxis((acc / total[..., None]).astype(q.dtype), 3, 1)
        out = lax.dynamic_update_slice_in_dim(out, done, i * size, axis=1)
        return (top, total, acc, out), None

    with jax.named_scope("causal_attention"):
        (_, _, _, out), _ = lax.scan(step, state, jnp.asarray(pairs))
    return out[:, :seq_len]


def cudnn_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
) -> Float[Array, "B T K G H"]:
    """Returns what `causal_attention` does, from one kernel of NVIDIA's cuDNN.

    Scores never leave the chip, and blocks above the diagonal are not computed. It
    needs an NVIDIA GPU, 16-bit inputs, and arrays that are whole: under a mesh, every
    axis of it must be handled by an enclosing `jax.shard_map`. Where no GPU is
    attached it can be compiled for a described one, as a call of a library that is not
    looked for.
    """
    heads = q.reshape(*q.shape[:2], -1, q.shape[-1])
    with jax.named_scope("cudnn_attention"), _cudnn_elsewhere():
        out = jax.nn.dot_product_attention(
            heads, k, v, is_causal=True, implementation="cudnn"
        )
    return out.reshape(q.shape)


@contextlib.contextmanager
def _cudnn_elsewhere() -> Iterator[None]:
    """Keeps JAX from asking the library and the GPU of this machine, if it has none.

    JAX cannot be told for which device it traces: it reads the version of the loaded
    library and the compute capability of the first attached GPU, and refuses shapes
    that they do not take. XLA asks neither before the kernel is to run.
    """
    if jax.default_backend() == "gpu":
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as checks

    answers = {
        "check_cudnn_version": lambda: _CUDNN_VERSION,
        "check_compute_capability": lambda capability: True,
        "is_cuda_compute_capability_equal": lambda capability: False,
    }
    kept = {name: getattr(checks, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(checks, name, answer)
        yield
    finally:
        for name, own in kept.items():
            setattr(checks, name, own)


def _pad_to(x: Array, length: int) -> Array:
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, length - x.shape[1])
    return jnp.pad(x, pad)


def decode_attention(
    q: Float[Array, "B 1 K G H"],
    kv: KV,
    positions: Int[Array, " B"],
    place: Place = anywhere,
) -> Float[Array, "B 1 K G H"]:
    """Returns attention of one new token over the cache, itself included.

    Args:
      q: queries, grouped by the cache's key/value heads.
      kv: the layer's keys and values, each [B, K, S, H], new token written; stored
        in any format.
      positions: of the new token; later cache entries are masked.
      place: pins the scores.
    """
    scores = _token_scores(q, kv, positions, place)
    weights = jax.nn.softmax(scores, axis=-1)
    return _weighed(weights, kv, q.dtype).astype(q.dtype)[:, None]


def last_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, " B"],
) -> Float[Array, "B 1 K G H"]:
    """Returns what `causal_attention` does at one position of each prompt."""
    rows = jnp.take_along_axis(q, positions[:, None, None, None, None], axis=1)
    kv = KV(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
    return decode_attention(rows, kv, positions)


def decode_attention_part(
    q: Float[Array, "B 1 K G H"], kv: KV, positions: Int[Array, " B"]
) -> tuple[Float[Array, "B K G H"], Float[Array, "B K G"], Float[Array, "B K G"]]:
    """Returns what one part of a cache adds to `decode_attention`, in float32.

    Args:
      q: queries, as there.
      kv: keys and values of some positions.
      positions: of the new token, counted from the first of these; where it is
        negative nothing is seen, and the other parts' larger scores leave nothing of
        this one.

    Returns:
      Values weighed by exp(score - top), the top score, and the sum of the weights;
      `join_parts` makes one of several.
    """
    scores = _token_scores(q, kv, positions)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    return _weighed(weights, kv, q.dtype), top, jnp.sum(weights, axis=-1)


def join_parts(
    out: Float[Array, "P *shape H"],
    top: Float[Array, "P *shape"],
    total: Float[Array, "P *shape"],
) -> Float[Array, "*shape H"]:
    """Returns attention over all P parts of a cache ("Flash-decoding", Dao 2023)."""
    share = jnp.exp(top - jnp.max(top, axis=0, keepdims=True))
    total = jnp.sum(total * share, axis=0)
    return jnp.sum(out * share[..., None], axis=0) / total[..., None]


def _token_scores(
    q: Array, kv: KV, positions: Array, place: Place = anywhere
) -> Float[Array, "B K G S"]:
    """Returns the scores of a token's queries, later positions masked."""
    keys, scale = wide(kv.k, q.dtype)
    scores = jnp.einsum(
        "BKGH,BKSH->BKGS", q[:, 0], keys, preferred_element_type=jnp.float32
    )
    scores = place(scores, ("cache_batch", "kv_heads", None, "cache_seq"))
    scores = scores * q.shape[-1] ** -0.5
    if scale is not None:
        scores = scores * scale[:, :, None]
    seen = jnp.arange(keys.shape[2])[None] <= positions[:, None]
    return jnp.where(seen[:, None, None], scores, _MASKED)


def _weighed(
    weights: Float[Array, "B K G S"], kv: KV, dtype: Any
) -> Float[Array, "B K G H"]:
    """Returns the sums of values times `weights`, in float32."""
    values, scale = wide(kv.v, dtype)
    if scale is not None:
        weights = weights * scale[:, :, None]
    return jnp.einsum(
        "BKGS,BKSH->BKGH",
        weights.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
