"""Ways to compute attention: over a prompt in blocks, and of one token over a cache.

Both keep grouped queries grouped: keys and values are never repeated. Scores and
softmax are float32, whatever the inputs are.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxllm.cache import KV
from jaxllm.layers import Place, anywhere

# Scores of one block of queries against one block of keys are alive at a time.
BLOCK = 512
_MASKED = -1e30  # Finite: the maximum of a fully masked row must not be -inf.


def causal_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    block: int = BLOCK,
) -> Float[Array, "B T K G H"]:
    """Returns causal attention of a prompt over itself, without T x T scores.

    Queries are taken a block at a time; for each, a loop over the blocks of keys at
    or before it keeps a running maximum, sum and output (Milakov & Gimelshein 2018,
    arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). Blocks after the query
    block are never computed, so the work is T (T + block) / 2 scores a head. A last
    block that is not full is computed at its own size.
    """
    seq_len = q.shape[1]
    scale = q.shape[-1] ** -0.5
    out = []
    for start in range(0, seq_len, block):
        stop = min(start + block, seq_len)
        q_block = q[:, start:stop]
        # The block on the diagonal is masked; those before it are not.
        inside = jnp.tril(jnp.ones((stop - start, stop - start), bool))
        state = _first_block(q_block, k[:, start:stop], v[:, start:stop], inside, scale)
        if start:
            state = _earlier_blocks(state, q_block, k, v, start // block, block, scale)
        _, total, acc = state
        out.append((acc / total[..., None]).astype(q.dtype))
    # B K G T H back to B T K G H.
    return jnp.concatenate([jnp.moveaxis(o, 3, 1) for o in out], axis=1)


def _scores(q: Array, k: Array, scale: float) -> Float[Array, "B K G t s"]:
    scores = jnp.einsum("BtKGH,BsKH->BKGts", q, k, preferred_element_type=jnp.float32)
    return scores * scale


def _weighted(weights: Array, v: Array) -> Float[Array, "B K G t H"]:
    return jnp.einsum(
        "BKGts,BsKH->BKGtH",
        weights.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )


def _first_block(
    q: Array, k: Array, v: Array, inside: Array, scale: float
) -> tuple[Array, Array, Array]:
    scores = _scores(q, k, scale)
    scores = jnp.where(inside[None, None, None], scores, _MASKED)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    return top, jnp.sum(weights, axis=-1), _weighted(weights, v)


def _earlier_blocks(
    state: tuple[Array, Array, Array],
    q: Array,
    k: Array,
    v: Array,
    count: int,
    block: int,
    scale: float,
) -> tuple[Array, Array, Array]:
    def step(
        state: tuple[Array, Array, Array], i: Array
    ) -> tuple[tuple[Array, Array, Array], None]:
        top, total, acc = state
        k_block = lax.dynamic_slice_in_dim(k, i * block, block, axis=1)
        v_block = lax.dynamic_slice_in_dim(v, i * block, block, axis=1)
        scores = _scores(q, k_block, scale)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top[..., None])
        total = total * shrink + jnp.sum(weights, axis=-1)
        acc = acc * shrink[..., None] + _weighted(weights, v_block)
        return (new_top, total, acc), None

    state, _ = lax.scan(step, state, jnp.arange(count))
    return state


def decode_attention(
    q: Float[Array, "B 1 K G H"],
    kv: KV,
    positions: Int[Array, " B"],
    place: Place = anywhere,
) -> Float[Array, "B 1 K G H"]:
    """Returns attention of one new token over the cache, itself included.

    Args:
      q: queries, grouped by the cache's key/value heads.
      kv: the layer's keys and values, each [B, K, S, H], new token written.
      positions: of the new token; later cache entries are masked.
      place: pins the scores, so that a cache split over positions stays split.
    """
    scores = jnp.einsum(
        "BKGH,BKSH->BKGS", q[:, 0], kv.k, preferred_element_type=jnp.float32
    )
    scores = place(scores, ("cache_batch", "kv_heads", None, "cache_seq"))
    scores = scores * q.shape[-1] ** -0.5
    seen = jnp.arange(kv.k.shape[2])[None] <= positions[:, None]
    scores = jnp.where(seen[:, None, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(kv.v.dtype)
    out = jnp.einsum(
        "BKGS,BKSH->BKGH", weights, kv.v, preferred_element_type=jnp.float32
    )
    return out.astype(q.dtype)[:, None]
