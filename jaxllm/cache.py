"""The KV cache: one layer's keys and values, written in place.

Keys and values are [B, K, S, H]: for one sequence and head, positions lie next to
each other, which is how decode reads them. Leading dimensions (pipeline slot,
layer) may be stacked in front; `CacheLayer.index` says which one is meant, so that
a loop carries one buffer and updates it without copying.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxllm.layers import Place, anywhere

_TILE = 16

# Dimension names of one layer's keys, and of its values.
CACHE_AXES = ("cache_batch", "kv_heads", "cache_seq", "head_dim")


class KV(NamedTuple):
    """Keys and values, each [..., B, K, S, H]; a pytree."""

    k: Array
    v: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheLayer:
    """One layer of a cache, perhaps inside a stack of them.

    Attributes:
      kv: keys and values with `len(index)` leading dimensions.
      index: where this layer is in the leading dimensions; may be traced.
      row: the first sequence to write to; a micro-batch writes its rows only.
      keep: where True, a write leaves the old contents (an idle pipeline tick).
    """

    kv: KV
    index: tuple[Int[Array, ""] | int, ...] = ()
    row: Int[Array, ""] | int = 0
    keep: Bool[Array, ""] | None = None

    def read(self) -> KV:
        """Returns this layer's keys and values, each [B, K, S, H]."""

        def take(stack: Array) -> Array:
            for i in self.index:
                stack = lax.dynamic_index_in_dim(stack, i, keepdims=False)
            return stack

        return jax.tree.map(take, self.kv)

    def write(
        self,
        new: KV,
        position: Int[Array, ""] | Int[Array, " B"] | int,
        place: Place = anywhere,
    ) -> "CacheLayer":
        """Returns the cache with `new` written from `position` on.

        Args:
          new: keys and values, each [b, K, t, H] with b <= B and t <= S.
          position: of the first of the t; one for all sequences, or one for each
            of all B sequences, in which case t is 1.
          place: pins the layout of the updated stack.
        """
        names = (None,) * len(self.index) + CACHE_AXES

        def put(stack: Array, update: Array) -> Array:
            update = update.astype(stack.dtype)
            if not isinstance(position, int) and position.ndim == 1:
                return place(self._put_rows(stack, update, position), names)
            size, first = update.shape[2], position
            if size == 1:
                # A whole tile of positions is rewritten: for a single one, XLA:TPU
                # keeps the cache in another layout inside loops, and copies it all.
                size = min(_TILE, stack.shape[-2])
                first = jnp.minimum(position // size * size, stack.shape[-2] - size)
            start = (*self.index, self.row, 0, first, 0)
            start = tuple(jnp.asarray(i, jnp.int32) for i in start)
            shape = (1,) * len(self.index) + update.shape[:2] + (size, update.shape[3])
            update = jnp.broadcast_to(
                update.reshape(shape[:-2] + update.shape[2:]), shape
            )
            if self.keep is not None or size != new.k.shape[2]:
                old = lax.dynamic_slice(stack, start, shape)
                if size != new.k.shape[2]:
                    here = jnp.arange(size) == position - first
                    update = jnp.where(
                        here.reshape((1,) * (len(shape) - 2) + (size, 1)), update, old
                    )
                if self.keep is not None:
                    update = jnp.where(self.keep, old, update)
            return place(lax.dynamic_update_slice(stack, update, start), names)

        return dataclasses.replace(self, kv=jax.tree.map(put, self.kv, new))

    def _put_rows(
        self, stack: Array, update: Float[Array, "B K 1 H"], position: Array
    ) -> Array:
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
            update = jnp.where(self.keep, stack[where], update)
        return stack.at[where].set(update)
