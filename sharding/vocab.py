"""Embedding and sampling over a vocabulary that is split over devices.

Left to the compiler, looking up a single token in a split table gathers the whole
table. Here every device looks up what it holds and the parts are summed; likewise it
picks its best token, and the best of all is found from one score and one token a
device. Both run inside `jax.shard_map`, over those axes of the vocabulary that are
not yet handled by an enclosing one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxllm.decode import Sampling, greedy, pick


def lookup(
    table: jax.Array,
    tokens: jax.Array,
    *,
    axes: Sequence[str],
    inner: Sequence[str],
    rows: Sequence[str],
    wide: bool,
) -> jax.Array:
    """Returns the rows [B, T, D] of `table` for `tokens` [B, T].

    Args:
      table: [V, D], V split over `axes`.
      tokens: the same on every device of `axes`.
      axes: mesh axes that split the vocabulary, larger pieces first.
      inner: those of `axes` that no enclosing `shard_map` handles.
      rows: other such axes, which split B.
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

    whole = PartitionSpec(tuple(rows))
    specs = (PartitionSpec(tuple(inner)), whole)
    return _map(local, (*inner, *rows), specs, whole)(table, tokens)


def sample(
    logits: jax.Array,
    seeds: Any,
    positions: jax.Array,
    *,
    sampling: Sampling,
    vocab_size: int,
    axes: Sequence[str],
    inner: Sequence[str],
    rows: Sequence[str],
) -> jax.Array:
    """Returns the next token [B] from logits [B, V].

    Greedy: the lowest of equals, found from one score and one token a device. Else
    scores are gathered, and every device draws the same.

    Args:
      logits: V split over `axes`, perhaps filled up beyond `vocab_size`.
      seeds: [B] uint32; not looked at if greedy.
      positions: where the token will stand, [] or [B]; likewise.
      sampling: how to pick.
      vocab_size: tokens there are.
      axes: as for `lookup`.
      inner: as for `lookup`.
      rows: as for `lookup`.
    """
    if not axes:
        if sampling.is_greedy:
            return greedy(logits)
        return pick(logits, sampling, seeds, positions)

    def best(logits: jax.Array) -> jax.Array:
        size = logits.shape[-1]
        first = lax.axis_index(tuple(axes)).astype(jnp.int32) * size
        if vocab_size % size:  # The last pieces hold what fills the vocabulary up.
            real = first + jnp.arange(size, dtype=jnp.int32) < vocab_size
            logits = jnp.where(real[None], logits, -jnp.inf)
        local = greedy(logits)
        scores = lax.all_gather(jnp.max(logits, axis=-1), tuple(axes))
        tokens = lax.all_gather(local + first, tuple(axes))
        winner = greedy(scores.T)
        return jnp.take_along_axis(tokens, winner[None], axis=0)[0]

    def draw(logits: jax.Array, seeds: jax.Array, positions: jax.Array) -> jax.Array:
        every = lax.all_gather(logits, tuple(axes), axis=1, tiled=True)
        return pick(every[:, :vocab_size], sampling, seeds, positions)

    row = PartitionSpec(tuple(rows))
    scores = PartitionSpec(tuple(rows), tuple(inner))
    if sampling.is_greedy:
        return _map(best, (*inner, *rows), (scores,), row)(logits)
    positions = jnp.broadcast_to(positions, seeds.shape)
    return _map(draw, (*inner, *rows), (scores, row, row), row)(
        logits, seeds, positions
    )


def _map(
    local: Callable[..., jax.Array],
    axes: Sequence[str],
    in_specs: tuple[PartitionSpec, ...],
    out_specs: PartitionSpec,
) -> Callable[..., jax.Array]:
    """Returns `local` mapped over `axes`, or as it is if there are none."""
    if not axes:
        return local
    return jax.shard_map(
        local,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(axes),
        check_vma=False,
    )
