"""Embedding and sampling over a vocabulary that is split over devices.

Left to the compiler, looking up a single token in a split table gathers the whole
table. Here every device looks up what it holds and the parts are summed; likewise it
picks its best token, and the best of all is found from one score and one token a
device. Both run inside `jax.shard_map`, over those axes of the vocabulary that are
not yet handled by an enclosing one.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxllm.decode import greedy


def lookup(
    table: jax.Array,
    tokens: jax.Array,
    *,
    axes: Sequence[str],
    inner: Sequence[str],
    wide: bool,
) -> jax.Array:
    """Returns the rows [B, T, D] of `table` for `tokens` [B, T].

    Args:
      table: [V, D], V split over `axes`.
      tokens: the same on every device of `axes`.
      axes: mesh axes that split the vocabulary, larger pieces first.
      inner: those of `axes` that no enclosing `shard_map` handles.
      wide: add in float32, see `sharding.pipeline.Pipeline`.
    """
    if not axes:
        return jnp.take(table, tokens, axis=0, mode="clip")

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        index = tokens - lax.axis_index(tuple(axes)) * table.shape[0]
        mine = (index >= 0) & (index < table.shape[0])
        found = jnp.take(table, jnp.where(mine, index, 0), axis=0, mode="clip")
        found = jnp.where(mine[:, :, None], found, 0)
        if wide:
            return lax.psum(found.astype(jnp.float32), tuple(axes)).astype(table.dtype)
        return lax.psum(found, tuple(axes))

    return _map(local, inner, PartitionSpec(tuple(inner)))(table, tokens)


def sample(
    logits: jax.Array, *, axes: Sequence[str], inner: Sequence[str]
) -> jax.Array:
    """Returns the most likely token [B] of logits [B, V]; the lowest of equals.

    Args:
      logits: V split over `axes`.
      axes: as for `lookup`.
      inner: as for `lookup`.
    """
    if not axes:
        return greedy(logits)

    def local(logits: jax.Array) -> jax.Array:
        best = greedy(logits)
        score = jnp.max(logits, axis=-1)
        token = best + lax.axis_index(tuple(axes)).astype(jnp.int32) * logits.shape[-1]
        scores = lax.all_gather(score, tuple(axes))
        tokens = lax.all_gather(token, tuple(axes))
        winner = greedy(scores.T)
        return jnp.take_along_axis(tokens, winner[None], axis=0)[0]

    return _map(local, inner, PartitionSpec(None, tuple(inner)))(logits)


def _map(local, inner: Sequence[str], first: PartitionSpec):
    """Returns `local` over the axes `inner`, its first argument split as `first`."""
    if not inner:
        return local

    @functools.wraps(local)
    def mapped(*args: jax.Array) -> jax.Array:
        specs = (first, *(PartitionSpec() for _ in args[1:]))
        return jax.shard_map(
            local,
            in_specs=specs,
            out_specs=PartitionSpec(),
            axis_names=set(inner),
            check_vma=False,
        )(*args)

    return mapped
