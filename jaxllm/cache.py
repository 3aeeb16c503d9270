"""The KV cache: one layer's keys and values, written in place.

Keys and values are [B, K, S, H]: for one sequence and head, positions lie next to
each other, which is how decode reads them. Leading dimensions (pipeline slot,
layer) may be stacked in front; `CacheLayer.index` says which one is meant, so that
a loop carries one buffer and updates it without copying. Either may be stored in 8
bits (`jaxllm.quantized`), with a scale [B, K, S]: what is written is made narrow, what
is read stays so.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxllm.layers import Place, anywhere
from jaxllm.quantized import narrow_like

_TILE = 16

# Dimension names of one layer's keys, and of its values.
CACHE_AXES = ("cache_batch", "kv_heads", "cache_seq", "head_dim")


class KV(NamedTuple):
    """Keys and values, each [..., B, K, S, H], an array or `Quantized`; a pytree."""

    k: Any
    v: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheLayer:
    """One layer of a cache, perhaps inside a stack of them.

    Attributes:
      kv: keys and values with `len(index)` leading dimensions.
      index: where this layer is in the leading dimensions; may be traced.
      row: the first sequence to write to; a micro-batch writes its rows only.
      keep: where True, a write leaves the old contents (an idle pipeline tick); one
        for all, or one for each sequence where positions are.
    """

    kv: KV
    index: tuple[Int[Array, ""] | int, ...] = ()
    row: Int[Array, ""] | int = 0
    keep: Bool[Array, "..."] | None = None

    def read(self) -> KV:
        """Returns this layer's keys and values, each [B, K, S, H]."""

        def take(stack: Array) -> Array:
            for i in self.index:
                stack = lax.dynamic_index_in_dim(stack, i, keepdims=False)
            return stack

        return jax.tree.map(take, self.kv)

    def stored(self, new: KV) -> KV:
        """Returns `new` in the format of this cache."""
        return KV(narrow_like(new.k, self.kv.k), narrow_like(new.v, self.kv.v))

    def write(
        self,
        new: KV,
        position: Int[Array, ""] | Int[Array, " B"] | int,
        place: Place = anywhere,
    ) -> "CacheLayer":
        """Returns the cache with `new` written from `position` on.

        Args:
          new: keys and values, each [b, K, t, H] with b <= B and t <= S; as they come,
            or `stored` already.
          position: of the first of the t; one for all sequences, or one for each
            of all B sequences, in which case t is 1.
          place: pins the layout of the updated stack.
        """
        lead = len(self.index)
        length = new.k.shape[2]

        def put(stack: Array, update: Array) -> Array:
            """Arrays [..., B, K, S, H], or [..., B, K, S] of scales."""
            names = (None,) * lead + CACHE_AXES[: update.ndim]
            update = update.astype(stack.dtype)
            if not isinstance(position, int) and position.ndim == 1:
                return place(self._put_rows(stack, update, position), names)
            size, first = length, position
            most = stack.shape[lead + 2]
            if size == 1:
                # A whole tile of positions is rewritten: for a single one, XLA:TPU
                # keeps the cache in another layout inside loops, and copies it all.
                size = min(_TILE, most)
                first = jnp.minimum(position // size * size, most - size)
            start = (*self.index, self.row, 0, first, *(0,) * (update.ndim - 3))
            start = tuple(jnp.asarray(i, jnp.int32) for i in start)
            update = update.reshape((1,) * lead + update.shape)
            shape = (*update.shape[: lead + 2], size, *update.shape[lead + 3 :])
            update = jnp.broadcast_to(update, shape)
            if self.keep is not None or size != length:
                old = lax.dynamic_slice(stack, start, shape)
                if size != length:
                    here = jnp.arange(size) == position - first
                    here = here.reshape((size,) + (1,) * (update.ndim - lead - 3))
                    here = jnp.broadcast_to(here, shape)
                    update = jnp.where(here, update, old)
                if self.keep is not None:
                    update = jnp.where(self.keep, old, update)
            return place(lax.dynamic_update_slice(stack, update, start), names)

        return dataclasses.replace(
            self, kv=jax.tree.map(put, self.kv, self.stored(new))
        )

    def _put_rows(self, stack: Array, update: Array, position: Array) -> Array:
        if update.shape[2] != 1:
            raise ValueError(
                f"cannot write {update.shape[2]} tokens at one position a sequence;"
                " only one token can be written so. Write a prefix at a common"
                " position."
            )
        rows = jnp.arange(update.shape[0])
        where = (*self.index, rows, slice(None), position)
        update = update[:, :, 0]
        if self.keep is not None:
            keep = self.keep.reshape(-1, *(1,) * (update.ndim - 1))
            update = jnp.where(keep, stack[where], update)
        return stack.at[where].set(update)
