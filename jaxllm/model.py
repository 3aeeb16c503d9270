"""The transformer: embedding, decoder blocks, head; blocks unrolled or scanned.

The modules are Flax NNX; what runs is a function of plain parameter arrays, held in
`Params`. Blocks come either as a tuple of L parameter trees ("unrolled": every layer
is its own piece of program) or as one tree with a leading layer dimension
("scanned": one piece of program in a loop). `stack_blocks` turns the first into the
second; both give the same answer.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxllm.cache import KV, CacheLayer
from jaxllm.config import ModelConfig
from jaxllm.layers import MLP, Attention, Place, RMSNorm, anywhere, group_size, param
from jaxllm.quantized import Quantized, WeightFormat, product, quantize

Layers = Literal["unrolled", "scanned"]
Tree = Any  # A pytree of arrays, of shapes, or of shardings.
Part = int | Literal["ends"]  # A decoder block, or what stands around all of them.

# Attention of new queries, keys and values, as `Attention.project_in` gives them and
# still to be rotated by the given angles, with a layer's cache, which it updates.
Attend = Callable[[Array, Array, CacheLayer], tuple[Array, CacheLayer]]

# Sums over devices the product of an activation, whose last dimension has the given
# name, with a weight. Returns the sum, and another array as it is once the product is
# there: what is computed from that one runs while devices still sum.
Turn = Callable[[Array, str, Any, Array], tuple[Array, Array]]


class Steps(NamedTuple):
    """Parts of a block as kernels of one's own.

    Attributes:
      project: multiplies an activation with the weight of queries, keys and values;
        perhaps in parts [P, B, T, N] for attention to add up.
      join: adds to a residual stream the product of an activation, whose last
        dimension has the given name, with a weight; returns the stream and, of a
        scale, its norm.
    """

    project: Callable[[Array, Any], Array]
    join: Callable[[Array, Array, str, Any, Array | None], tuple[Array, Any]]


class LastLayer(NamedTuple):
    """The last block where only some positions are asked for behind it.

    Attributes:
      attend: what attention does there; its heads are of these positions alone.
      pick: takes these positions of the residual stream.
      when: whether the last block of this stage is the last one; then its result
        stands at every position, for shapes must not depend on it. None: it is.
    """

    attend: Attend
    pick: Callable[[Array], Array]
    when: Bool[Array, ""] | None = None


class Block(nnx.Module):
    """One pre-norm decoder block: attention, then feed-forward."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Float[Array, "B T P"],
        cache: CacheLayer,
        attend: Attend,
        place: Place = anywhere,
        steps: Steps | None = None,
        *,
        normed: Float[Array, "B T D"] | None = None,
        then: Float[Array, " D"] | None = None,
        pick: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "B R D"], CacheLayer, Float[Array, "B R D"] | None]:
        """Returns the residual stream, the cache and, with `then`, the stream's norm.

        Args:
          x: residual stream.
          angles: rotary angles of its positions.
          cache: of this layer.
          attend: what attention does.
          place: pins activations.
          steps: parts of the block as kernels; None: ordinary operations.
          normed: `x` after this block's first norm, where `steps` have made it.
          then: scale of the norm that follows this block, for `steps` to make it.
          pick: takes the R positions that `attend` returns heads of; None: all.
        """
        with jax.named_scope("attention"):
            inner = self.attention_norm(x) if normed is None else normed
            multiply = steps.project if steps else product
            flat, cache = self._heads(inner, angles, cache, attend, place, multiply)
            weight = self.attention.w_out.get_value()
            x = x if pick is None else pick(x)
            if steps is None:
                out = product(flat, weight)
                x = x + place(out, ("batch", "residual_seq", "embed"))
                inner = self.mlp_norm(x)
            else:
                x, inner = steps.join(
                    x, flat, "heads", weight, self.mlp_norm.scale[...]
                )
        with jax.named_scope("mlp"):
            hidden = self._hidden(inner, place)
            weight = self.mlp.w_down.get_value()
            if steps is None:
                out = product(hidden, weight)
                x = x + place(out, ("batch", "residual_seq", "embed"))
                normed = None
            else:
                x, normed = steps.join(x, hidden, "mlp", weight, then)
        return x, cache, normed

    def in_turns(
        self,
        halves: tuple[Float[Array, "B T D"], ...],
        angles: Float[Array, "2*B T P"],
        cache: CacheLayer,
        attend: Attend,
        place: Place,
        turn: Turn,
    ) -> tuple[tuple[Float[Array, "B T D"], ...], CacheLayer]:
        """Returns two halves of the rows, and the cache: each is computed in its turn.

            a's attention, b's attention, a's feed-forward, b's feed-forward

        What a turn ends in is summed while the next turn, of the other half, runs, and
        is needed one turn later.

        Args:
          halves: the residual stream of one half of the rows, and of the other.
          angles: rotary angles of all positions.
          cache: of this layer; the second half is written behind the first.
          attend: what attention does.
          place: pins activations.
          turn: ends a turn.
        """
        a, b = halves
        rows = a.shape[0]
        with jax.named_scope("attention"):
            weight = self.attention.w_out.get_value()
            normed = self.attention_norm(a)
            flat, cache = self._heads(normed, angles[:rows], cache, attend, place)
            sum_a, b = turn(flat, "heads", weight, b)
            normed = self.attention_norm(b)
            cache = dataclasses.replace(cache, row=cache.row + rows)
            flat, cache = self._heads(normed, angles[rows:], cache, attend, place)
            sum_b, sum_a = turn(flat, "heads", weight, sum_a)
        with jax.named_scope("mlp"):
            weight = self.mlp.w_down.get_value()
            a = a + sum_a
            hidden = self._hidden(self.mlp_norm(a), place)
            sum_a, sum_b = turn(hidden, "mlp", weight, sum_b)
            b = b + sum_b
            hidden = self._hidden(self.mlp_norm(b), place)
            sum_b, sum_a = turn(hidden, "mlp", weight, sum_a)
        return (a + sum_a, b + sum_b), cache

    def _heads(
        self,
        normed: Float[Array, "B T D"],
        angles: Float[Array, "B T P"],
        cache: CacheLayer,
        attend: Attend,
        place: Place,
        multiply: Callable[[Array, Any], Array] = product,
    ) -> tuple[Float[Array, "B R N"], CacheLayer]:
        """Returns what attention's last weight is multiplied with, and the cache."""
        normed = place(normed, ("batch", "seq", "embed"))
        qkv = self.attention.project_in(normed, place, multiply)
        heads, cache = attend(qkv, angles, cache)
        return self.attention.flatten(heads, place), cache

    def _hidden(
        self, normed: Float[Array, "B T D"], place: Place
    ) -> Float[Array, "B T F"]:
        """Returns what the feed-forward layer's last weight is multiplied with."""
        return self.mlp.hidden(place(normed, ("batch", "seq", "embed")), place)


class Ends(nnx.Module):
    """What stands before and after the blocks: embedding, last norm, head."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        normal = jax.nn.initializers.normal(config.embed_dim**-0.5)
        v, d = config.vocab_size, config.embed_dim
        self.embedding = param(
            normal, (v, d), ("vocab", "embed"), dtype=dtype, rngs=rngs
        )
        self.final_norm = RMSNorm(config, dtype=dtype, rngs=rngs)
        if not config.tie_embeddings:
            self.w_head = param(
                normal, (d, v), ("embed", "vocab"), dtype=dtype, rngs=rngs
            )
        self.tied = config.tie_embeddings

    def logits(
        self, x: Float[Array, "B D"], place: Place = anywhere
    ) -> Float[Array, "B V"]:
        """Returns float32 scores of every token."""
        normed = self.final_norm(x[:, None])[:, 0]
        weight = self.embedding[...].T if self.tied else self.w_head[...]
        scores = jnp.einsum(
            "BD,DV->BV", normed, weight, preferred_element_type=jnp.float32
        )
        return place(scores, ("batch", "vocab"))


class Params(NamedTuple):
    """Parameters as plain arrays.

    Attributes:
      ends: the tree of `Ends`.
      blocks: a tuple of L trees of `Block`, or one tree with stacked layers.
    """

    ends: Tree
    blocks: Tree


@functools.cache
def _definitions(
    config: ModelConfig,
) -> tuple[nnx.GraphDef[Ends], nnx.GraphDef[Block], Tree, Tree]:
    def split(kind: type[Ends] | type[Block]) -> tuple[Any, Tree]:
        graph, state = nnx.split(
            nnx.eval_shape(lambda: kind(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
        )
        names = {path: leaf.axes for path, leaf in nnx.to_flat_state(state)}
        return graph, _as_tree(names)

    ends, ends_axes = split(Ends)
    block, block_axes = split(Block)
    return ends, block, ends_axes, block_axes


def _as_tree(flat: Mapping[Any, Any]) -> Tree:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def bind_ends(config: ModelConfig, tree: Tree) -> Ends:
    """Returns the module whose parameters are the arrays of `tree`."""
    return _bind(_definitions(config)[0], tree)


def bind_block(config: ModelConfig, tree: Tree) -> Block:
    """Returns the module whose parameters are the arrays of `tree`."""
    return _bind(_definitions(config)[1], tree)


def _bind(graph: nnx.GraphDef[Any], tree: Tree) -> Any:
    flat: dict[Any, Any] = {}

    def visit(node: Tree, path: tuple[str, ...]) -> None:
        if isinstance(node, dict):
            for key, child in node.items():
                visit(child, (*path, key))
        else:
            flat[path] = nnx.Param(node)

    visit(tree, ())
    return nnx.merge(graph, nnx.from_flat_state(flat))


def param_axes(config: ModelConfig, weights: WeightFormat | None = None) -> Params:
    """Returns the dimension names of every parameter, `blocks` being one block's.

    Scales have the names of their weight's dimensions, so they are split with it.

    Args:
      config: shape of the model.
      weights: format in which matrices are stored; see `quantize_block`.
    """
    _, _, ends, block = _definitions(config)

    def one(names: tuple[str | None, ...]) -> Any:
        if weights is None or len(names) != 2:
            return names
        rows, columns = names
        if weights != "int4":
            return Quantized(values=names, scale=(columns,))
        return Quantized(values=(columns, None, rows), scale=(columns, rows))

    block = jax.tree.map(one, block, is_leaf=lambda x: isinstance(x, tuple))
    return Params(ends=ends, blocks=block)


def quantize_block(
    block: Tree, config: ModelConfig, weights: WeightFormat | None
) -> Tree:
    """Returns a block with its matrices in the format `weights`; None leaves them.

    Traceable.

    Args:
      block: its parameters in full precision.
      config: the model it is of.
      weights: see `jaxllm.quantized`.
    """
    if weights is None:
        return block

    def one(path: tuple[Any, ...], leaf: Array) -> Any:
        if leaf.ndim != 2:
            return leaf
        return quantize(leaf, weights, group_size(path[-1].key, config))

    return jax.tree.map_with_path(one, block)


def init_params(config: ModelConfig, dtype: DTypeLike, seed: int = 0) -> Params:
    """Returns random parameters, blocks unrolled. Traceable: `jax.eval_shape` it."""

    def make(kind: type[Ends] | type[Block], key: Array) -> Tree:
        state = nnx.state(kind(config, dtype=dtype, rngs=nnx.Rngs(key)))
        return _as_tree({path: leaf[...] for path, leaf in nnx.to_flat_state(state)})

    ends_key, blocks_key = jax.random.split(jax.random.key(seed))
    # One traced block for all layers: tracing and compiling L of them takes minutes.
    keys = jax.random.split(blocks_key, config.num_layers)
    stacked = jax.vmap(functools.partial(make, Block))(keys)
    return Params(
        ends=make(Ends, ends_key),
        blocks=tuple(
            jax.tree.map(lambda leaf: leaf[i], stacked)  # noqa: B023
            for i in range(config.num_layers)
        ),
    )


@functools.cache
def layer_bytes(
    config: ModelConfig, dtype: str, weights: WeightFormat | None = None
) -> int:
    """Returns the bytes of one block's parameters as they are stored, scales included.

    Args:
      config: shape of the model.
      dtype: of activations.
      weights: format of the matrices; see `quantize_block`.
    """

    def make() -> Tree:
        state = nnx.state(Block(config, dtype=dtype, rngs=nnx.Rngs(0)))
        flat = {path: leaf[...] for path, leaf in nnx.to_flat_state(state)}
        return quantize_block(_as_tree(flat), config, weights)

    leaves = jax.tree.leaves(jax.eval_shape(make))
    return sum(x.size * jax.dtypes.itemsize_bits(x.dtype) // 8 for x in leaves)


def stack_blocks(blocks: Sequence[Tree]) -> Tree:
    """Returns one tree whose arrays have a leading dimension of len(blocks)."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


def run_blocks(
    config: ModelConfig,
    blocks: Tree,
    caches: Any,
    x: Float[Array, "B T D"],
    angles: Float[Array, "B T P"],
    attend: Attend,
    place: Place = anywhere,
    *,
    cache_at: CacheLayer | None = None,
    steps: Steps | None = None,
    turn: Turn | None = None,
    last: LastLayer | None = None,
) -> tuple[Float[Array, "B R D"], Any]:
    """Runs `x` through the blocks.

    Args:
      config: shape of the model.
      blocks: a tuple of trees (unrolled) or one stacked tree (scanned).
      caches: unrolled: a `KV` for each block. Scanned: one `KV` with the layer
        dimension behind the dimensions that `cache_at.index` already names.
      x: residual stream.
      angles: rotary angles of its positions.
      attend: what attention does; gets and returns the layer's cache.
      place: pins activations.
      cache_at: where in each cache to read and write (`kv` is ignored).
      steps: parts of each block as kernels; None: ordinary operations.
      turn: runs two halves of the rows in turns, see `Block.in_turns`; None: all rows
        at once.
      last: what the last of unrolled blocks does otherwise, in ordinary operations;
        None: nothing.

    Returns:
      The residual stream, at R of its positions with `last`, and the updated caches.
    """
    at = cache_at or CacheLayer(kv=KV(x, x))

    def run(
        x: Any,
        tree: Tree,
        kv: KV,
        index: tuple[Any, ...],
        *,
        is_last: bool = False,
        **norms: Any,
    ) -> tuple[Any, KV, Array | None]:
        layer = CacheLayer(kv=kv, index=index, row=at.row, keep=at.keep)
        block = bind_block(config, tree)
        if turn is not None:
            x, layer = block.in_turns(x, angles, layer, attend, place, turn)
            return x, layer.kv, None

        def whole() -> tuple[Array, KV, Array | None]:
            done, new, normed = block(x, angles, layer, attend, place, steps, **norms)
            return done, new.kv, normed

        if last is None or not is_last:
            return whole()
        how, pick, when = last

        def short() -> tuple[Array, KV, Array | None]:
            few, new, normed = block(x, angles, layer, how, place, pick=pick, **norms)
            few = few if when is None else jnp.broadcast_to(few, x.shape)
            return few, new.kv, normed

        return short() if when is None else lax.cond(when, short, whole)

    stream: Any = x if turn is None else tuple(jnp.split(x, 2))
    stream, caches = _run_layers(
        run, blocks, caches, stream, at.index, bool(steps), last is not None
    )
    return stream if turn is None else jnp.concatenate(stream), caches


def _run_layers(
    run: Callable[..., tuple[Any, KV, Any]],
    blocks: Tree,
    caches: Any,
    x: Any,
    index: tuple[Any, ...],
    with_norms: bool,
    tell_last: bool,
) -> tuple[Any, Any]:
    """Returns `x` and the caches after all layers; `run` runs one.

    With `tell_last` it is told which of unrolled layers is the last.
    """
    if isinstance(blocks, tuple):
        # Traced once for all like layers; the compiler puts it in place of every call.
        @functools.partial(jax.jit, static_argnames="is_last")
        def block(x: Any, tree: Tree, kv: KV, normed: Any, then: Any, *, is_last: bool):
            return run(x, tree, kv, index, is_last=is_last, normed=normed, then=then)

        done, normed = [], None
        for i, (tree, kv) in enumerate(zip(blocks, caches, strict=True)):
            following = blocks[i + 1] if with_norms and i + 1 < len(blocks) else None
            then = following and following["attention_norm"]["scale"]
            with jax.named_scope(f"layer_{i}"):
                is_last = tell_last and i + 1 == len(blocks)
                x, kv, normed = block(x, tree, kv, normed, then, is_last=is_last)
            done.append(kv)
        return x, tuple(done)

    def body(carry: tuple[Any, KV], step: tuple[Array, Tree]):
        i, tree = step
        return run(carry[0], tree, carry[1], (*index, i))[:2], None

    count = jax.tree.leaves(blocks)[0].shape[0]
    with jax.named_scope("layers"):
        carry, _ = lax.scan(body, (x, caches), (jnp.arange(count), blocks))
    return carry
