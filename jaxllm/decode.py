"""Prefill and one-token decode over a KV cache, on one program.

A pipeline over stages (`sharding.pipeline`) uses the same pieces: the attention of
each phase, the pick of the last prompt position, and greedy sampling.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.attention import causal_attention, decode_attention
from jaxllm.cache import KV, CacheLayer
from jaxllm.config import ModelConfig
from jaxllm.layers import Place, angles_at, anywhere
from jaxllm.model import Attend, Params, Tree, bind_ends, run_blocks

# Rows [B, T, D] of an embedding table [V, D] for tokens [B, T].
Lookup = Callable[[Array, Array], Array]

_CACHED = ("cache_batch", "seq", "kv_heads", "head_dim")


def _for_cache(k: Array, v: Array, kv_heads: int, place: Place) -> KV:
    """Returns [B, T, K, H] keys and values as the cache wants them, [B, K, T, H].

    With more tensor shards than key/value heads, each head is computed several
    times; a cache that is not split over heads keeps one copy.
    """
    repeat = k.shape[2] // kv_heads

    def one(x: Array) -> Array:
        return jnp.swapaxes(place(x[:, :, ::repeat], _CACHED), 1, 2)

    return KV(one(k), one(v))


def prompt_attend(place: Place = anywhere) -> Attend:
    """Returns attention of a whole prompt, which fills the cache from position 0."""

    def attend(q: Array, k: Array, v: Array, cache: CacheLayer):
        out = causal_attention(q, k, v)
        new = _for_cache(k, v, cache.kv.k.shape[-3], place)
        return out, cache.write(new, 0, place)

    return attend


def token_attend(positions: Int[Array, "..."], place: Place = anywhere) -> Attend:
    """Returns attention of one token a sequence, which it appends to the cache.

    Args:
      positions: of the token: one for all sequences, or one each, [B].
      place: pins activations.
    """

    def attend(q: Array, k: Array, v: Array, cache: CacheLayer):
        batch, _, heads, group, width = q.shape
        kv_heads = cache.kv.k.shape[-3]
        cache = cache.write(_for_cache(k, v, kv_heads, place), positions, place)
        grouped = q.reshape(batch, 1, kv_heads, heads // kv_heads * group, width)
        names = ("cache_batch", "seq", "kv_heads", None, "head_dim")
        out = decode_attention(
            place(grouped, names),
            cache.read(),
            jnp.broadcast_to(positions, (batch,)),
            place,
        )
        return out.reshape(q.shape), cache

    return attend


def last_position(
    x: Float[Array, "B T D"], lengths: Int[Array, " B"] | None
) -> Float[Array, "B D"]:
    """Returns the residual stream at the last prompt token of each sequence.

    A masked sum, not a gather: it stays cheap when positions are split over devices.
    """
    count = x.shape[1]
    last = jnp.full((x.shape[0],), count) if lengths is None else lengths
    chosen = jnp.arange(count)[None] == (last - 1)[:, None]
    return jnp.sum(jnp.where(chosen[:, :, None], x, 0), axis=1, dtype=x.dtype)


def whole_table(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Looks tokens up in an embedding table that is not split."""
    return jnp.take(table, tokens, axis=0, mode="clip")


def greedy(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Returns the most likely token; the lowest of equals."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def prefill(
    config: ModelConfig,
    params: Params,
    cache: Tree,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None = None,
    *,
    place: Place = anywhere,
    lookup: Lookup = whole_table,
    row: Int[Array, ""] | int = 0,
) -> tuple[Tree, Float[Array, "B V"]]:
    """Reads prompts into the cache; returns it with the logits of the next token.

    Args:
      config: shape of the model.
      params: its parameters.
      cache: a `KV` for each layer, or one with layers stacked; donate it.
      tokens: prompts, padded at the end.
      lengths: of the prompts; None where all fill T.
      place: pins activations.
      lookup: how tokens are embedded.
      row: first sequence of the cache to fill (a micro-batch fills its rows).
    """
    ends = bind_ends(config, params.ends)
    x = place(lookup(ends.embedding[...], tokens), ("batch", "residual_seq", "embed"))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    x, cache = run_blocks(
        config,
        params.blocks,
        cache,
        x,
        angles_at(positions, config),
        prompt_attend(place),
        place,
        cache_at=CacheLayer(kv=KV(x, x), row=row),
    )
    last = place(last_position(x, lengths), ("batch", "embed"))
    return cache, ends.logits(last, place)


def decode_step(
    config: ModelConfig,
    params: Params,
    cache: Tree,
    tokens: Int[Array, " B"],
    positions: Int[Array, "..."],
    *,
    place: Place = anywhere,
    lookup: Lookup = whole_table,
) -> tuple[Tree, Float[Array, "B V"]]:
    """Runs one token of every sequence; returns the cache and the next logits.

    Args:
      config: shape of the model.
      params: its parameters.
      cache: as for `prefill`; donate it.
      tokens: one a sequence.
      positions: where they stand: one for all sequences, or one each, [B].
      place: pins activations.
      lookup: how tokens are embedded.
    """
    ends = bind_ends(config, params.ends)
    x = lookup(ends.embedding[...], tokens[:, None])
    x = place(x, ("batch", "residual_seq", "embed"))
    where = jnp.broadcast_to(positions, tokens.shape)[:, None]
    x, cache = run_blocks(
        config,
        params.blocks,
        cache,
        x,
        angles_at(where, config),
        token_attend(positions, place),
        place,
    )
    return cache, ends.logits(x[:, 0], place)
