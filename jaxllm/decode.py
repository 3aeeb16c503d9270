"""Prefill and one-token decode over a KV cache, on one program.

A pipeline over stages (`sharding.pipeline`) uses the same pieces: the attention of
each phase, the pick of the last prompt position, and sampling.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.attention import (
    PromptAttention,
    causal_attention,
    decode_attention,
    last_attention,
)
from jaxllm.cache import CACHE_AXES, KV, CacheLayer
from jaxllm.config import ModelConfig
from jaxllm.layers import Place, Rotate, angles_at, anywhere, rotate, turned
from jaxllm.model import (
    Attend,
    LastLayer,
    Params,
    Steps,
    Tree,
    Turn,
    bind_ends,
    run_blocks,
)

# Rows [B, T, D] of an embedding table [V, D] for tokens [B, T].
Lookup = Callable[[Array, Array], Array]

# Attention of one token: queries, keys and values, as an `Attend` gets them, angles, a
# layer's cache and positions; returns heads, [B, 1, K, G, H] or with both dimensions of
# heads in one, and the cache with it.
TokenAttention = Callable[[Array, Array, CacheLayer, Array], tuple[Array, CacheLayer]]

_CACHED = ("cache_batch", "seq", "kv_heads", "head_dim")


def _for_cache(
    k: Array, v: Array, kv_heads: int, place: Place, length: int | None = None
) -> KV:
    """Returns [B, T, K, H] keys and values as the cache wants them, [B, K, T, H].

    With more tensor shards than key/value heads, each head is computed several
    times; a cache that is not split over heads keeps one copy. With `length`, zeros
    follow up to so many positions, and these are placed, not the heads.
    """
    repeat = k.shape[2] // kv_heads

    def one(x: Array) -> Array:
        x = x[:, :, ::repeat]
        if length is None:
            return jnp.swapaxes(place(x, _CACHED), 1, 2)
        x = jnp.swapaxes(x, 1, 2)
        x = jnp.pad(x, [(0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)])
        return place(x, CACHE_AXES)

    return KV(one(k), one(v))


def prompt_attend(
    place: Place = anywhere,
    attention: PromptAttention = causal_attention,
    *,
    rotate: Rotate = rotate,
    fill: bool = False,
) -> Attend:
    """Returns attention of a whole prompt, which fills the cache from position 0.

    Args:
      place: pins activations.
      attention: of the prompt over itself.
      rotate: turns queries and keys.
      fill: write zeros behind the prompt, up to the cache's end. Where positions are
        split over devices, a part of them cannot be written without gathering all.
    """

    def attend(qkv: Array, angles: Array, cache: CacheLayer):
        q, k, v = turned(qkv, angles, rotate)
        *_, kv_heads, length, _ = cache.kv.k.shape
        kept = _for_cache(k, v, kv_heads, place, length if fill else None)
        return attention(q, k, v), cache.write(kept, 0, place)

    return attend


def token_attend(
    positions: Int[Array, "..."],
    place: Place = anywhere,
    attention: TokenAttention | None = None,
) -> Attend:
    """Returns attention of one token a sequence, which it appends to the cache.

    Args:
      positions: of the token: one for all sequences, or one each, [B].
      place: pins activations.
      attention: what writes and reads the cache; None: `write_then_attend`.
    """

    def attend(qkv: Array, angles: Array, cache: CacheLayer):
        *_, batch, _, heads, slots, width = qkv.shape
        step = attention or functools.partial(write_then_attend, place=place)
        out, cache = step(qkv, angles, cache, positions)
        return out.reshape(batch, 1, heads, slots - 2, width), cache

    return attend


def for_token(
    qkv: Float[Array, "B 1 N S H"],
    angles: Float[Array, "B 1 P"],
    kv_heads: int,
    place: Place = anywhere,
) -> tuple[Float[Array, "B 1 K G H"], KV]:
    """Returns rotated queries grouped by the cache's heads, and what to write there."""
    q, k, v = turned(qkv, angles)
    batch, _, heads, group, width = q.shape
    grouped = q.reshape(batch, 1, kv_heads, heads // kv_heads * group, width)
    names = ("cache_batch", "seq", "kv_heads", None, "head_dim")
    return place(grouped, names), _for_cache(k, v, kv_heads, place)


def write_then_attend(
    qkv: Float[Array, "B 1 N S H"],
    angles: Float[Array, "B 1 P"],
    cache: CacheLayer,
    positions: Int[Array, "..."],
    *,
    place: Place = anywhere,
) -> tuple[Float[Array, "B 1 K G H"], CacheLayer]:
    """Returns attention over the cache, in which the new token is written first."""
    q, new = for_token(qkv, angles, cache.kv.k.shape[-3], place)
    cache = cache.write(new, positions, place)
    where = jnp.broadcast_to(positions, q.shape[:1])
    return decode_attention(q, cache.read(), where, place), cache


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is picked from its scores.

    Attributes:
      temperature: divides the scores; 0 takes the most likely token.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: of these, keep the fewest most likely ones that together have this
        probability (Holtzman et al. 2019, arXiv:1904.09751).

    Raises:
      ValueError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        rules = {
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
        }
        for name, (good, rule) in rules.items():
            if not good:
                raise ValueError(
                    f"{name}={getattr(self, name)} of sampling must be {rule}. Choose"
                    " such a value."
                )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling()


def pick(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    seeds: Array,
    positions: Int[Array, "..."],
) -> Int[Array, " B"]:
    """Returns one token a sequence, drawn from what `sampling` keeps.

    A draw is the largest score after adding Gumbel noise (Maddison et al. 2014,
    arXiv:1411.0030), which is a function of seed, position and token alone: a
    sequence gets the same text in any batch and under any partition.

    Args:
      logits: scores of every token.
      sampling: what to keep; not greedy.
      seeds: uint32, one a sequence.
      positions: where the token will stand: one for all sequences, or one each.
    """
    scores = logits / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = jax.lax.top_k(scores, sampling.top_k)[0][:, -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if sampling.top_p < 1:
        ranked = jnp.sort(scores, axis=-1, descending=True)
        chance = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(chance, axis=-1) - chance
        kept = jnp.where(before < sampling.top_p, ranked, jnp.inf)
        least = jnp.min(kept, axis=-1, keepdims=True)
        scores = jnp.where(scores < least, -jnp.inf, scores)

    def noise(seed: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, scores.shape[1:], scores.dtype)

    where = jnp.broadcast_to(positions, seeds.shape)
    return greedy(scores + jax.vmap(noise)(seeds, where))


def prefill(
    config: ModelConfig,
    params: Params,
    cache: Tree,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None = None,
    *,
    place: Place = anywhere,
    lookup: Lookup = whole_table,
    attention: PromptAttention = causal_attention,
    rotate: Rotate = rotate,
    row: Int[Array, ""] | int = 0,
    steps: Steps | None = None,
    turn: Turn | None = None,
    fill: bool = False,
    only_last: bool = False,
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
      attention: of the prompt over itself.
      rotate: turns queries and keys.
      row: first sequence of the cache to fill (a micro-batch fills its rows).
      steps: parts of each block as kernels; see `jaxllm.model`.
      turn: runs two halves of the sequences in turns; see `run_blocks`.
      fill: write behind prompts too; see `prompt_attend`.
      only_last: of the last layer, compute keys and values of all positions, and the
        rest, which nothing but the head reads, of the last position alone.
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
        prompt_attend(place, attention, rotate=rotate, fill=fill),
        place,
        cache_at=CacheLayer(kv=KV(x, x), row=row),
        steps=steps,
        turn=turn,
        last=last_layer(tokens, lengths, place, rotate=rotate, fill=fill)
        if only_last
        else None,
    )
    last = x[:, 0] if only_last else last_position(x, lengths)
    return cache, ends.logits(place(last, ("batch", "embed")), place)


def last_layer(
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None,
    place: Place,
    *,
    rotate: Rotate,
    fill: bool,
    when: Bool[Array, ""] | None = None,
) -> LastLayer:
    """Returns the last block of prompts of which the last position is asked for.

    Arguments are those of `prefill` and, `when`, of `LastLayer`.
    """
    batch, count = tokens.shape
    where = jnp.full((batch,), count) if lengths is None else lengths
    attention = functools.partial(last_attention, positions=where - 1)
    return LastLayer(
        attend=prompt_attend(place, attention, rotate=rotate, fill=fill),
        pick=lambda x: last_position(x, lengths)[:, None],
        when=when,
    )


def decode_step(
    config: ModelConfig,
    params: Params,
    cache: Tree,
    tokens: Int[Array, " B"],
    positions: Int[Array, "..."],
    *,
    place: Place = anywhere,
    lookup: Lookup = whole_table,
    attention: TokenAttention | None = None,
    steps: Steps | None = None,
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
      attention: of the token over the cache; see `token_attend`.
      steps: parts of each block as kernels; see `jaxllm.model`.
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
        token_attend(positions, place, attention),
        place,
        steps=steps,
    )
    return cache, ends.logits(x[:, 0], place)
