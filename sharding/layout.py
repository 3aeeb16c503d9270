"""Layout: the arrays of a partitioned model, their shapes and where they lie.

Parameters and decode state are plain pytrees. With one stage they are the model's
own; with several, every block array gains a leading stage dimension, and a stage
with fewer layers than the longest is filled up with layers of zeros, which add
nothing to the residual stream. A stage holds the cache of every group in flight, in
slots: arrays of their own where ticks are unrolled, else one array a layer.

Scales of groups gain no dimension: those of all stages lie behind each other along
their first, so that what a device holds is the array that a product takes. XLA:GPU
multiplies by such a scale on its way into the product; of one that was sliced or
reshaped before, it writes the activations or the weight out scaled.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.cache import CACHE_AXES, KV
from jaxllm.config import ModelConfig
from jaxllm.model import (
    Layers,
    Params,
    Tree,
    init_params,
    param_axes,
    quantize_block,
    stack_blocks,
)
from jaxllm.quantized import (
    KVFormat,
    Quantized,
    WeightFormat,
    check_format,
    kv_dtype,
)
from sharding.computed import widen
from sharding.partition import Partition, Workload
from sharding.rules import MESH_AXES, Name

Names = tuple[Name, ...]
Ticks = Literal["unrolled", "scanned"]

_ALIGNED = 128  # positions; XLA:GPU splits a sum in up to 16 pieces of multiples of 8


class State(NamedTuple):
    """What decode carries from token to token; donated, updated in place.

    Attributes:
      cache: keys and values of every layer; with unrolled ticks of every slot of it.
      tokens: [B] int32, the newest token of each sequence.
      position: where the next token is written: [] int32, or [B] for prompts of
        different lengths.
      round: [] int32, decode calls so far.
      hidden: residual streams on their way between stages, [stage, B/groups, D];
        an empty tuple where there is one stage.
      seeds: [B] uint32, of the draws for each sequence; an empty tuple where tokens
        are not drawn.
    """

    cache: Tree
    tokens: Any
    position: Any
    round: Any
    hidden: Any
    seeds: Any


class Named(NamedTuple):
    """Shape, dtype and dimension names of one array."""

    shape: tuple[int, ...]
    dtype: Any
    names: Names


def _is_named(x: Any) -> bool:
    return isinstance(x, Named)


def _is_quantized(x: Any) -> bool:
    return isinstance(x, Quantized)


def local_blocks(blocks: Tree) -> Tree:
    """Returns what a stage holds of all stages' blocks, inside `jax.shard_map`.

    Drops the stage dimension, of size 1 there, of every array that has one.
    """

    def one(leaf: Any) -> Any:
        if not _is_quantized(leaf):
            return leaf[0]
        scale = leaf.scale if leaf.in_groups else leaf.scale[0]
        return Quantized(values=leaf.values[0], scale=scale)

    return jax.tree.map(one, blocks, is_leaf=_is_quantized)


def _with_scales(change: Callable[[Any], Any], blocks: Tree) -> Tree:
    """Returns stages' blocks, arrays or `Named`, with the scales of groups changed."""

    def one(leaf: Any) -> Any:
        if not (_is_quantized(leaf) and leaf.in_groups):
            return leaf
        return dataclasses.replace(leaf, scale=change(leaf.scale))

    return jax.tree.map(one, blocks, is_leaf=lambda x: _is_named(x) or _is_quantized(x))


def _behind(scale: jax.Array) -> jax.Array:
    """Returns [stage, n, ...] as [stage x n, ...]: see the top of this file."""
    return scale.reshape(-1, *scale.shape[2:])


def _named_behind(scale: Named) -> Named:
    """Returns what `_behind` gives: the first dimension has two names."""
    (stage, first, *shape), dtype, (outer, inner, *names) = scale
    return Named((stage * first, *shape), dtype, ((outer, inner), *names))


@functools.cache
def _param_shapes(
    config: ModelConfig, dtype: str, weights: WeightFormat | None
) -> Params:
    """Returns the shapes of parameters as stored, `blocks` being one block's."""
    shapes = jax.eval_shape(lambda: init_params(config, dtype))
    narrow = functools.partial(quantize_block, config=config, weights=weights)
    return Params(ends=shapes.ends, blocks=jax.eval_shape(narrow, shapes.blocks[0]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Parameters and state of `config` under `partition`.

    Attributes:
      config: the model as published.
      partition: how it is split.
      workload: sizes the cache.
      dtype: of activations, and of parameters and cache unless stored narrower.
      weights: format of the blocks' matrices, see `jaxllm.quantized`; None: `dtype`.
      kv: format of the cache; None: `dtype`.
      layers: whether each layer is its own arrays, or all are stacked.
      ticks: whether each slot of a stage's cache is its own arrays, which decode's
        ticks then name, or all are stacked. Layers must be unrolled to unroll ticks.
      ragged: whether every sequence has its own position.
      drawn: whether tokens are drawn, from a seed a sequence.

    Raises:
      ValueError: there is no such format.
    """

    config: ModelConfig
    partition: Partition
    workload: Workload
    dtype: str = "bfloat16"
    weights: WeightFormat | None = None
    kv: KVFormat | None = None
    layers: Layers = "unrolled"
    ticks: Ticks = "scanned"
    ragged: bool = False
    drawn: bool = False

    def __post_init__(self) -> None:
        check_format("weights", self.weights, WeightFormat)
        check_format("a KV cache", self.kv, KVFormat)

    @property
    def model(self) -> ModelConfig:
        """The model as computed: see `Partition.computed`."""
        return self.partition.computed(self.config)

    @property
    def cache_heads(self) -> int:
        """Key/value heads that the cache holds, copies included."""
        split = self.partition.ways("kv_heads") > 1
        return (self.model if split else self.config).num_kv_heads

    @property
    def cache_len(self) -> int:
        """S, positions of the cache: prompt and output, rounded up to equal pieces.

        Pieces are a multiple of a power of two, up to 128 and to a sixteenth of them:
        else XLA:GPU fills the keys or values up to equal, aligned parts of a split
        sum, which copies half of the cache for every token.
        """
        ways = self.partition.ways("cache_seq")
        total = self.workload.input_len + self.workload.output_len
        power = 2 ** max(0, (total // (16 * ways)).bit_length() - 1)
        multiple = ways * min(_ALIGNED, power)
        return math.ceil(total / multiple) * multiple

    @property
    def replica_batch(self) -> int:
        """Sequences that one replica's program sees."""
        manual = self.partition.manual_axes
        replicas = self.partition.data if "data" in manual else 1
        return self.workload.batch_size // replicas

    @property
    def groups(self) -> int:
        """Groups of sequences in flight: one a stage, or one in all if B is smaller."""
        stage = self.partition.stage
        return stage if self.replica_batch >= stage else 1

    @property
    def layers_per_stage(self) -> int:
        """Layers that every stage runs, padding included."""
        return max(self.partition.stage_layers(self.config))

    def named_params(self) -> Params:
        """Returns `Named` for every parameter."""
        lead_shape, lead_names = self._leading()

        def lead(n: Named) -> Named:
            return Named(lead_shape + n.shape, n.dtype, lead_names + n.names)

        ends, layer = self.named_part()
        block = jax.tree.map(lead, layer, is_leaf=_is_named)
        if self.partition.stage > 1:
            block = _with_scales(_named_behind, block)
        if self.layers == "scanned":
            return Params(ends=ends, blocks=block)
        return Params(ends=ends, blocks=(block,) * self.layers_per_stage)

    def named_part(self) -> Params:
        """Returns `Named` for the ends and, as `blocks`, for one layer by itself."""
        shapes = _param_shapes(self.model, self.dtype, self.weights)
        axes = param_axes(self.model, self.weights)

        def name(leaf: jax.ShapeDtypeStruct, names: Names) -> Named:
            return Named(leaf.shape, leaf.dtype, names)

        return jax.tree.map(name, shapes, axes)

    def _leading(self, slots: tuple[int, ...] = ()) -> tuple[tuple[int, ...], Names]:
        """Returns the dimensions before one layer's own: stage, slots, layers."""
        shape: tuple[int, ...] = ()
        names: Names = ()
        if self.partition.stage > 1:
            shape = (self.partition.stage, *slots)
            names = ("layers", *(None for _ in slots))
        if self.layers == "scanned":
            shape, names = (*shape, self.layers_per_stage), (*names, None)
        return shape, names

    def named_state(self) -> State:
        """Returns `Named` for every array of the decode state."""
        batch, staged = self.workload.batch_size, self.partition.stage > 1
        group = batch // self.groups
        kv_shape = (group, self.cache_heads, self.cache_len, self.config.head_dim)
        apart = staged and self.ticks == "unrolled"
        lead, names = self._leading(() if apart else (self.groups,))
        array: Any = Named(
            lead + kv_shape, kv_dtype(self.kv, self.dtype), names + CACHE_AXES
        )
        if self.kv:
            scale = Named(
                lead + kv_shape[:-1], jnp.dtype("float32"), names + CACHE_AXES[:-1]
            )
            array = Quantized(values=array, scale=scale)
        kv: Any = KV(array, array)
        kv = (kv,) * self.groups if apart else kv
        hidden = Named(
            (self.partition.stage, group, self.config.embed_dim),
            jnp.dtype(self.dtype),
            ("layers", "batch", "embed"),
        )
        return State(
            cache=kv if self.layers == "scanned" else (kv,) * self.layers_per_stage,
            tokens=Named((batch,), jnp.int32, ("batch",)),
            position=Named(
                (batch,) if self.ragged else (),
                jnp.int32,
                ("batch",) if self.ragged else (),
            ),
            round=Named((), jnp.int32, ()),
            hidden=hidden if staged else (),
            seeds=Named((batch,), jnp.uint32, ("batch",)) if self.drawn else (),
        )

    def spec(self, names: Names, keep: tuple[str, ...] = MESH_AXES) -> PartitionSpec:
        """Returns how an array that lives between calls is split."""
        return self.partition.rules.spec(names, phase="decode", keep=keep)

    def specs(self, named: Tree, keep: tuple[str, ...] = MESH_AXES) -> Tree:
        """Returns the `PartitionSpec` of every `Named`."""
        return jax.tree.map(
            lambda n: self.spec(n.names, keep), named, is_leaf=_is_named
        )

    def abstract(self, named: Tree, mesh: Mesh) -> Tree:
        """Returns a `ShapeDtypeStruct` with its sharding for every `Named`."""

        def make(n: Named) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(mesh, self.spec(n.names))
            return jax.ShapeDtypeStruct(n.shape, n.dtype, sharding=sharding)

        return jax.tree.map(make, named, is_leaf=_is_named)

    def device_bytes(self, named: Tree) -> int:
        """Returns the bytes of `named` that lie on one device."""

        def one(n: Named) -> int:
            pieces = math.prod(self.partition.ways(x, "decode") for x in n.names if x)
            return math.prod(n.shape) * jax.dtypes.itemsize_bits(n.dtype) // 8 // pieces

        return sum(map(one, jax.tree.leaves(named, is_leaf=_is_named)))

    def arrange(self, params: Params) -> Params:
        """Returns unrolled parameters of the published model in this layout.

        Repeats key/value heads, fills widths up, stores matrices in their format, deals
        layers to stages and fills stages up with zeros. Traceable.
        """
        ends, *blocks = map(self.store, (params.ends, *params.blocks))
        staged = self.partition.stage > 1
        if staged:
            blocks = self._deal(blocks)
        if self.layers == "scanned":
            found = stack_blocks(blocks)
            if staged:
                found = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), found)
        else:
            found = tuple(blocks)
        return Params(
            ends=ends, blocks=_with_scales(_behind, found) if staged else found
        )

    def store(self, part: Tree) -> Tree:
        """Returns a block, or some ends, of the published model as they are stored."""
        part = widen(part, self.config, self.model)
        if "attention" not in part:
            return part
        return quantize_block(part, self.model, self.weights)

    def _deal(self, blocks: list[Tree]) -> list[Tree]:
        """Returns, for each layer of a stage, the trees of all stages stacked."""
        zeros = jax.tree.map(jnp.zeros_like, blocks[0])
        counts = self.partition.stage_layers(self.config)
        firsts = [sum(counts[:s]) for s in range(len(counts))]
        return [
            stack_blocks(
                [
                    blocks[first + i] if i < count else zeros
                    for first, count in zip(firsts, counts, strict=True)
                ]
            )
            for i in range(self.layers_per_stage)
        ]

    def zeros(self, named: Tree, mesh: Mesh) -> Tree:
        """Returns zero arrays on the devices of `mesh`."""

        def make() -> Tree:
            return jax.tree.map(
                lambda n: jnp.zeros(n.shape, n.dtype), named, is_leaf=_is_named
            )

        return jax.jit(make, out_shardings=self.shardings(named, mesh))()

    def place_params(self, params: Params, mesh: Mesh) -> Params:
        """Returns unrolled parameters of the published model, arranged on `mesh`."""
        shardings = self.shardings(self.named_params(), mesh)
        return jax.jit(self.arrange, out_shardings=shardings)(params)

    def random_params(self, mesh: Mesh, seed: int = 0) -> Params:
        """Returns random parameters, made on the devices of `mesh` where they lie."""
        shardings = self.shardings(self.named_params(), mesh)

        def make() -> Params:
            return self.arrange(init_params(self.config, self.dtype, seed))

        return jax.jit(make, out_shardings=shardings)()

    def shardings(self, named: Tree, mesh: Mesh) -> Tree:
        """Returns the `NamedSharding` of every `Named`."""
        return jax.tree.map(lambda a: a.sharding, self.abstract(named, mesh))
