"""Stages and micro-batches: prefill and decode as one `jax.shard_map` program.

Every stage runs the same program on its own layers; activations move to the next
stage by `ppermute` once a tick. At tick t, stage s works on item t - s, so all stages
are busy once the pipeline is full.

Prefill takes micro-batches of whole sequences: M of them take M + S - 1 ticks.
Decode keeps G = S groups of sequences in flight, one a stage, for ever: stage s works
on group (t - s) mod S at tick t, and the token sampled at the end of one tick is what
the first stage embeds in the next. One call is a round of S ticks, in which every
group gains one token and no stage idles. Group 0 receives its token in the call that
started it, the others early in the next call. A batch smaller than S is one group
that walks through the stages, G = 1.

The cache of group g lies in slot (g + s) mod G of stage s, so that at tick t every
stage reads slot t mod G, which depends on the tick alone. With unrolled ticks, each
tick of decode is its own piece of program and each slot its own arrays, read where they
lie; a slot that a loop picks out of a stack is copied first on GPUs and CPUs. Prefill
is a loop over ticks in both cases: it writes to every slot, and only one of them anew.

Embedding and head are split over stages by vocabulary, so no stage is larger than
another; that costs a sum of B D over the stage axis on the way in and on the way out.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.attention import PromptAttention
from jaxllm.cache import KV, CacheLayer
from jaxllm.config import ModelConfig
from jaxllm.decode import (
    Lookup,
    TokenAttention,
    last_layer,
    last_position,
    prompt_attend,
    token_attend,
)
from jaxllm.layers import Place, Rotate, angles_at
from jaxllm.model import (
    LastLayer,
    Params,
    Steps,
    Tree,
    Turn,
    bind_ends,
    run_blocks,
)
from sharding.layout import State, Ticks, local_blocks

_AXIS = "stage"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What one replica's pipeline needs to know.

    Attributes:
      config: the model as computed.
      stages: S.
      groups: G in flight while decoding, S or 1.
      micro_batches: M of prefill; a multiple of G.
      ticks: of decode, and how the cache lies: see `sharding.layout.Layout`.
      place: pins activations over the axes that the compiler handles.
      attention: of a prompt over itself.
      rotate: turns its queries and keys.
      token_attention: of one token over the cache; see `token_attend`.
      steps: parts of each block as kernels; see `jaxllm.model`.
      turn: runs halves of a micro-batch in turns; see `jaxllm.model.run_blocks`.
      fill: write behind prompts too; see `jaxllm.decode.prompt_attend`.
      only_last: of the last stage's last layer, compute what `jaxllm.decode.prefill`
        computes with `only_last`; the other stages compute all of theirs.
      lookup: embeds tokens, of which this stage holds a part of the table.
      sample: picks tokens from this stage's part of the logits, the sequences' seeds
        and the positions where the tokens will stand.
      with_logits: return the logits; else an empty tuple stands for them.
      wide_sums: sum over stages in float32, for XLA:CPU, which aborts on a bfloat16
        all-reduce inside a manual region ("Invalid binary instruction opcode copy",
        jaxlib 0.10.2 and 0.12.0).
    """

    config: ModelConfig
    stages: int
    groups: int
    micro_batches: int
    ticks: Ticks
    place: Place
    attention: PromptAttention
    rotate: Rotate
    token_attention: TokenAttention | None
    steps: Steps | None
    turn: Turn | None
    fill: bool
    only_last: bool
    lookup: Lookup
    sample: Callable[[jax.Array, Any, jax.Array], jax.Array]
    with_logits: bool
    wide_sums: bool

    def prefill(
        self,
        params: Params,
        state: State,
        prompts: jax.Array,
        lengths: jax.Array | None = None,
    ) -> tuple[State, Any]:
        """Reads prompts [B, T] into the state; returns it and the logits [B, V].

        Runs inside `jax.shard_map` over the stage axis.
        """
        stage = lax.axis_index(_AXIS)
        batch, seq_len = prompts.shape
        size = batch // self.micro_batches
        blocks, cache = local_blocks(params.blocks), _local(state.cache)
        items = self._split(prompts)
        item_lengths = None if lengths is None else self._split(lengths)
        positions = jnp.broadcast_to(jnp.arange(seq_len)[None], (size, seq_len))
        angles = angles_at(positions, self.config)

        def tick(carry: tuple[jax.Array, Tree], t: jax.Array):
            x, cache = carry
            tokens = items[_clip(t, self.micro_batches)]
            fed = self._embed(params.ends, tokens)
            x = jnp.where(stage == 0, fed, x)
            item = t - stage
            busy = (item >= 0) & (item < self.micro_batches)
            item = _clip(item, self.micro_batches)
            filled = None if item_lengths is None else item_lengths[item]
            short = self._short_layer(tokens, filled)
            row = item // self.groups * size
            x, cache = self._read(blocks, cache, x, angles, t, row, ~busy, short)
            return (self._pass_on(x), cache), last_position(x, filled)

        ticks = self.micro_batches + self.stages - 1
        empty = jnp.zeros((size, seq_len, self.config.embed_dim), _dtype(params))
        empty = self.place(empty, ("batch", "residual_seq", "embed"))
        with jax.named_scope("ticks"):
            (_, cache), last = lax.scan(tick, (empty, cache), jnp.arange(ticks))
        last = self._join(last[self.stages - 1 :])
        logits = self._logits(params.ends, self._from_last_stage(last))
        count = jnp.int32(seq_len) if lengths is None else lengths
        tokens = self.sample(logits, state.seeds, count)
        state = state._replace(
            cache=_global(cache),
            tokens=tokens,
            position=count,
            round=jnp.int32(0),
            hidden=jnp.zeros_like(state.hidden),
        )
        return state, self._all_logits(logits)

    def _short_layer(
        self, tokens: jax.Array, lengths: jax.Array | None
    ) -> LastLayer | None:
        """Returns what the last stage's last layer does of a micro-batch [b, T]."""
        if not self.only_last:
            return None
        is_last = lax.axis_index(_AXIS) == self.stages - 1
        return last_layer(
            tokens,
            lengths,
            self.place,
            rotate=self.rotate,
            fill=self.fill,
            when=is_last,
        )

    def _read(
        self,
        blocks: Tree,
        cache: Tree,
        x: jax.Array,
        angles: jax.Array,
        t: jax.Array,
        row: jax.Array,
        keep: jax.Array,
        last: LastLayer | None,
    ) -> tuple[jax.Array, Tree]:
        """Runs a micro-batch [b, T, D] through this stage's layers at tick t.

        Its keys and values are written from sequence `row` on, unless `keep`.
        """
        attend = prompt_attend(
            self.place, self.attention, rotate=self.rotate, fill=self.fill
        )
        run = functools.partial(
            run_blocks, self.config, blocks, steps=self.steps, turn=self.turn, last=last
        )
        if self.ticks == "scanned":
            at = CacheLayer(kv=KV(x, x), index=(t % self.groups,), row=row, keep=keep)
            return run(cache, x, angles, attend, self.place, cache_at=at)
        count = None if self.fill else x.shape[1]
        empty = [
            jax.tree.map(lambda a: _empty(a, x.shape[0], count), slots[0])
            for slots in cache
        ]
        x, fresh = run(empty, x, angles, attend, self.place)

        def write(slot: int, kv: KV, new: KV) -> KV:
            old = keep | (t % self.groups != slot)
            return CacheLayer(kv=kv, row=row, keep=old).write(new, 0, self.place).kv

        def write_all(slots: tuple[KV, ...], new: KV) -> tuple[KV, ...]:
            done: list[KV] = []
            for i, kv in enumerate(slots):
                # One after the other: XLA of jaxlib 0.12 fuses the writes of many
                # slots around what they share, and copies the cache behind it.
                new, kv, done = lax.optimization_barrier((new, kv, done))
                done.append(write(i, kv, new))
            return tuple(done)

        with jax.named_scope("write_slots"):
            return x, tuple(map(write_all, cache, fresh))

    def decode(self, params: Params, state: State) -> tuple[State, Any]:
        """Runs one round; returns the state and the logits [B, V] behind its tokens.

        Runs inside `jax.shard_map` over the stage axis.
        """
        blocks = local_blocks(params.blocks)
        cache, hidden = _local((state.cache, state.hidden))
        tokens = state.tokens.reshape(self.groups, -1)
        run = self._full_round if self.groups > 1 else self._single_round
        cache, tokens, hidden, logits = run(
            params.ends, blocks, cache, tokens, hidden, state
        )
        state = state._replace(
            cache=_global(cache),
            tokens=tokens.reshape(-1),
            position=state.position + 1,
            round=state.round + 1,
            hidden=hidden[None],
        )
        return state, logits

    def _full_round(
        self,
        ends: Tree,
        blocks: Tree,
        cache: Tree,
        tokens: jax.Array,
        hidden: jax.Array,
        state: State,
    ) -> tuple[Tree, jax.Array, jax.Array, Any]:
        stage = lax.axis_index(_AXIS)

        def tick(carry: tuple[Tree, jax.Array, jax.Array], t: jax.Array | int):
            cache, tokens, hidden = carry
            fed = self._embed(ends, tokens[t][:, None])[:, 0]
            x = jnp.where(stage == 0, fed, hidden)
            # A group that entered before this round is one position behind.
            behind = (t < stage).astype(jnp.int32)
            position = self._position(state.position, t - stage) - behind
            busy = (behind == 0) | (state.round > 0)
            x, cache = self._step(blocks, cache, x, position, t, ~busy)
            logits = self._logits(ends, self._from_last_stage(x))
            done = (t + 1) % self.groups
            fresh = (done == 0) | (state.round > 0)
            # Behind the token that the last stage has just seen.
            late = jnp.asarray(t < self.stages - 1, jnp.int32)
            where = self._position(state.position, done) + 1 - late
            token = self.sample(logits, self._seeds(state, done), where)
            token = jnp.where(fresh, token, tokens[done])
            tokens = tokens.at[done].set(token)
            return (cache, tokens, self._pass_on(x)), self._all_logits(logits)

        carry, logits = self._run_ticks(tick, (cache, tokens, hidden))
        if self.with_logits:
            # Tick t finished group t + 1: bring the groups into order.
            logits = jnp.roll(logits, 1, axis=0).reshape(-1, logits.shape[-1])
        return *carry, logits

    def _single_round(
        self,
        ends: Tree,
        blocks: Tree,
        cache: Tree,
        tokens: jax.Array,
        hidden: jax.Array,
        state: State,
    ) -> tuple[Tree, jax.Array, jax.Array, Any]:
        stage = lax.axis_index(_AXIS)
        fed = self._embed(ends, tokens[0][:, None])[:, 0]

        def tick(carry: tuple[Tree, jax.Array], t: jax.Array | int):
            cache, x = carry
            x, cache = self._step(blocks, cache, x, state.position, 0, stage != t)
            return (cache, self._pass_on(x)), x

        carry, every = self._run_ticks(tick, (cache, fed))
        last = every[-1]
        logits = self._logits(ends, self._from_last_stage(last))
        token = self.sample(logits, state.seeds, state.position + 1)[None]
        return carry[0], token, hidden, self._all_logits(logits)

    def _run_ticks(
        self, tick: Callable[[Any, Any], tuple[Any, Any]], carry: Any
    ) -> tuple[Any, Any]:
        """Returns what S ticks carry on, and their results, stacked."""
        with jax.named_scope("ticks"):
            if self.ticks == "scanned":
                return lax.scan(tick, carry, jnp.arange(self.stages))
            results = []
            for t in range(self.stages):
                with jax.named_scope(f"tick_{t}"):
                    carry, result = tick(carry, t)
                results.append(result)
            return carry, jax.tree.map(lambda *each: jnp.stack(each), *results)

    def _step(
        self,
        blocks: Tree,
        cache: Tree,
        x: jax.Array,
        position: jax.Array,
        slot: Any,
        keep: jax.Array,
    ) -> tuple[jax.Array, Tree]:
        """Runs one token [b, D] through this stage's layers."""
        where = jnp.broadcast_to(position, x.shape[:1])[:, None]
        apart = self.ticks == "unrolled"
        at = CacheLayer(kv=KV(x, x), index=() if apart else (slot,), keep=keep)
        x, new = run_blocks(
            self.config,
            blocks,
            [slots[slot] for slots in cache] if apart else cache,
            self.place(x[:, None], ("batch", "residual_seq", "embed")),
            angles_at(where, self.config),
            token_attend(position, self.place, self.token_attention),
            self.place,
            cache_at=at,
            steps=self.steps,
        )
        if apart:
            new = tuple(
                (*slots[:slot], kv, *slots[slot + 1 :])
                for slots, kv in zip(cache, new, strict=True)
            )
        return x[:, 0], new

    def _position(self, position: jax.Array, item: jax.Array | int) -> jax.Array:
        if position.ndim == 0:
            return position
        return position.reshape(self.groups, -1)[item % self.groups]

    def _seeds(self, state: State, group: jax.Array | int) -> Any:
        if isinstance(state.seeds, tuple):
            return ()
        return state.seeds.reshape(self.groups, -1)[group]

    def _split(self, x: jax.Array) -> jax.Array:
        """Returns [B, ...] as micro-batches [M, B/M, ...]; i is of group i % G."""
        x = x.reshape(self.groups, self.micro_batches // self.groups, -1, *x.shape[1:])
        return jnp.swapaxes(x, 0, 1).reshape(self.micro_batches, -1, *x.shape[3:])

    def _join(self, x: jax.Array) -> jax.Array:
        """Undoes `_split`."""
        x = x.reshape(self.micro_batches // self.groups, self.groups, -1, *x.shape[2:])
        return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[3:])

    def _embed(self, ends: Tree, tokens: jax.Array) -> jax.Array:
        with jax.named_scope("embed"):
            found = self.lookup(ends["embedding"], tokens)
            return self.place(found, ("batch", "residual_seq", "embed"))

    def _logits(self, ends: Tree, x: jax.Array) -> jax.Array:
        """Returns the scores [b, V/S] of this stage's part of the vocabulary."""
        with jax.named_scope("head"):
            x = self.place(x, ("batch", "embed"))
            return bind_ends(self.config, ends).logits(x, self.place)

    def _all_logits(self, logits: jax.Array) -> Any:
        if not self.with_logits:
            return ()
        return lax.all_gather(logits, _AXIS, axis=1, tiled=True)

    def _from_last_stage(self, x: jax.Array) -> jax.Array:
        last = lax.axis_index(_AXIS) == self.stages - 1
        return self._sum(jnp.where(last, x, 0))

    def _sum(self, x: jax.Array) -> jax.Array:
        if self.wide_sums:
            return lax.psum(x.astype(jnp.float32), _AXIS).astype(x.dtype)
        return lax.psum(x, _AXIS)

    def _pass_on(self, x: jax.Array) -> jax.Array:
        pairs = [(s, s + 1) for s in range(self.stages - 1)]
        return lax.ppermute(x, _AXIS, pairs)


def _clip(item: jax.Array, count: int) -> jax.Array:
    return jnp.clip(item, 0, count - 1)


def _empty(cached: jax.Array, rows: int, positions: int | None) -> jax.Array:
    """Returns zeros as `cached`, [B, K, S, ...], of other rows and positions."""
    _, heads, length, *rest = cached.shape
    return jnp.zeros((rows, heads, positions or length, *rest), cached.dtype)


def _dtype(params: Params) -> Any:
    return params.ends["embedding"].dtype


def _local(tree: Tree) -> Tree:
    """Drops the stage dimension, of size 1 inside the map."""
    return jax.tree.map(lambda x: x[0], tree)


def _global(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x[None], tree)
