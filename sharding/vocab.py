"""Embedding and sampling over a vocabulary that is split over devices.

Left to the compiler, looking up a single token in a split table gathers the whole
table. Here every device looks up what it holds and the parts are summed; likewise it
picks its best token, and the best of all is found from one score and one token a
device. Both run inside `jax.shard_map`, over those axes of the vocabulary that are
not yet handled by an enclosing one.
"""

from collections.abc import Callable, Sequence

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
    *,
    axes: Sequence[str],
    inner: Sequence[str],
    rows: Sequence[str],
) -> jax.Array:
    """Returns the most likely token [B] of logits [B, V]; the lowest of equals.

    Args:
      logits: V split over `axes`.
      axes: as for `lookup`.
      inner: as for `lookup`.
      rows: as for `lookup`.
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

    specs = (PartitionSpec(tuple(rows), tuple(inner)),)
    return _map(local, (*inner, *rows), specs, PartitionSpec(tuple(rows)))(logits)


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
