"""The published model's parameters, one part at a time, against a layout's.

A part is one decoder block, or the ends before and after them. Between files and
devices parts are what moves: arrays of the published model, lying evenly over all
devices of the mesh, so that every byte is read or written once. `assemble` brings
them into a layout (heads repeated, widths filled up, layers dealt to stages);
`disassemble` gets them back out of it, to the bit, whatever the layout.
"""

import ctypes
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.config import ModelConfig
from jaxllm.model import Params, Part, Tree, init_params, param_axes
from sharding.computed import narrow
from sharding.layout import Layout
from sharding.rules import MESH_AXES


def parts(config: ModelConfig) -> tuple[Part, ...]:
    """Returns what a model consists of: its ends, then its layers in order."""
    return ("ends", *range(config.num_layers))


def shapes(layout: Layout, mesh: Mesh) -> dict[Part, Tree]:
    """Returns shape, dtype and sharding of every array of every part.

    A dimension keeps the mesh axes of the layout's rules where they cut it evenly and
    into pieces that the layout wants too; every other mesh axis goes to another
    dimension that it cuts evenly. So getting into the layout gathers or exchanges
    along one axis at a time.
    """
    published, computed = (
        jax.eval_shape(lambda config=config: init_params(config, layout.dtype))
        for config in (layout.config, layout.model)
    )
    axes = param_axes(layout.config)
    sizes = layout.partition.axes

    def one(leaf: jax.ShapeDtypeStruct, other: Any, names: Any) -> jax.ShapeDtypeStruct:
        kept = names if leaf.shape == other.shape else (None,) * leaf.ndim
        rows = [layout.partition.rules.axes_of(name, "decode") for name in kept]
        common = tuple(map(math.gcd, leaf.shape, other.shape))
        spec = _even(common, rows, sizes)
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
        )

    block = jax.tree.map(one, published.blocks[0], computed.blocks[0], axes.blocks)
    ends = jax.tree.map(one, published.ends, computed.ends, axes.ends)
    return {part: ends if part == "ends" else block for part in parts(layout.config)}


def _even(
    shape: tuple[int, ...], wanted: Sequence[Sequence[str]], sizes: dict[str, int]
) -> PartitionSpec:
    """Returns `wanted`, completed by every other mesh axis that cuts evenly."""
    rows = [list(row) for row in wanted]
    for axis in MESH_AXES:
        if any(axis in row for row in rows):
            continue
        # The least cut dimension first: an axis of its own needs no exchange.
        for i in sorted(range(len(shape)), key=lambda i: len(rows[i])):
            if shape[i] % math.prod(sizes[a] for a in [*rows[i], axis]) == 0:
                rows[i].append(axis)
                break
    return PartitionSpec(*(tuple(row) or None for row in rows))


def assemble(layout: Layout, mesh: Mesh, arrays: Iterable[tuple[Part, Tree]]) -> Params:
    """Returns parameters as `layout` wants them, from published ones.

    Args:
      layout: where they shall lie.
      mesh: its devices.
      arrays: every part in the order of `parts`, lying as `shapes` says. Each is let
        go before the next is asked for, so one part at most stands beside the result.
        Those of the ends, which are large, go one by one: their tree is emptied.

    Raises:
      ValueError: parts are missing, or come in another order.
    """
    named = layout.named_params()
    wanted = layout.shardings(named, mesh)
    homes, stacked = _homes(layout), _stacked(layout)
    block = wanted.blocks if layout.layers == "scanned" else wanted.blocks[0]

    def widened(homes: Tree) -> Callable[[Tree], Tree]:
        if layout.model == layout.config and layout.weights is None:
            return lambda tree: jax.tree.map(_moved, tree, homes)
        return jax.jit(layout.store, out_shardings=homes)

    def to_home(home: Tree) -> Callable[[Tree], Tree]:
        if layout.model.vocab_size == layout.config.vocab_size:
            return lambda tree: jax.tree.map(_moved, tree, home)

        def fill(tree: Tree) -> Tree:
            # In bits, for CPUs move bfloat16 as float32.
            filled = layout.store(jax.tree.map(_bits, tree))
            floats = functools.partial(lax.bitcast_convert_type, new_dtype=layout.dtype)
            return jax.tree.map(floats, filled)

        return jax.jit(fill, out_shardings=home)

    @functools.cache
    def putting(sharding: Any) -> Any:
        put = functools.partial(_put, layout)
        return jax.jit(put, out_shardings=sharding, donate_argnums=0)

    def put(stack: jax.Array, leaf: jax.Array, **home: jax.Array) -> jax.Array:
        return jax.block_until_ready(putting(stack.sharding)(stack, leaf, **home))

    if layout.partition.stage > 1 and layout.weights is None:
        even = jax.tree.map(lambda x: x.sharding, shapes(layout, mesh)[0])
    else:  # as in the stack, else compilers update it in parts, and gather all of it
        even = layout.shardings(layout.named_part().blocks, mesh)
    to_block, to_wide = map(widened, (block, even))
    # Made when the first layer comes, after the ends have moved.
    to_empty = functools.partial(
        layout.zeros, named.blocks if layout.layers == "scanned" else named.blocks[0]
    )
    ends: Tree = None
    blocks: dict[int, Tree] = {}
    due = iter(parts(layout.config))
    with _Allocator() as allocator:
        for part, tree in arrays:
            if part != next(due, None):
                raise ValueError(
                    f"part {part!r} of the model came out of turn. Parts are the ends,"
                    f" then the {layout.config.num_layers} layers in order. Give each"
                    " once."
                )
            if part == "ends":
                # One array after the other, for these are the largest there are.
                ends = {}
                for name in sorted(tree):
                    to_end = to_home({name: wanted.ends[name]})
                    ends |= jax.block_until_ready(to_end({name: tree.pop(name)}))
            elif not stacked:
                blocks[part] = to_block(tree)
            else:
                stage, slot = homes[part]
                at = 0 if layout.layers == "scanned" else slot
                stack = blocks.pop(at) if at in blocks else to_empty(mesh)
                # One array after the other: each is for a moment on every stage.
                at_home = functools.partial(
                    put, stage=jnp.int32(stage), slot=jnp.int32(slot)
                )
                blocks[at] = jax.tree.map(at_home, stack, to_wide(tree))
                del stack
            # Else the parts that wait for the devices pile up.
            jax.block_until_ready((ends, blocks))
            del tree
            allocator.give_back()
    if (missing := next(due, None)) is not None:
        raise ValueError(
            f"part {missing!r} of the model is missing. Parts are the ends, then the"
            f" {layout.config.num_layers} layers in order. Give each once."
        )
    one_tree = layout.layers == "scanned"
    every = tuple(blocks[at] for at in range(len(blocks)))
    return Params(ends=ends, blocks=every[0] if one_tree else every)


def disassemble(
    layout: Layout, mesh: Mesh, params: Params
) -> Iterator[tuple[Part, Tree]]:
    """Yields every part of the published model out of a layout's parameters.

    The inverse of `assemble`: each part lies as `shapes` says, and is made when it is
    asked for.

    Raises:
      ValueError: the layout stores matrices in a narrower format.
    """
    if layout.weights is not None:
        raise ValueError(
            f"parameters stored in {layout.weights} cannot be taken back to the"
            f" published model in {layout.dtype}: what was rounded is lost. A model is"
            " saved from full precision. Use a layout with weights=None."
        )
    homes, stacked, wanted = _homes(layout), _stacked(layout), shapes(layout, mesh)
    ends, block = (
        jax.tree.map(lambda x: x.sharding, wanted[part]) for part in ("ends", 0)
    )

    def change(tree: Tree) -> Tree:
        # First to where the published arrays lie: narrowing is then local.
        tree = lax.with_sharding_constraint(
            tree, ends if "embedding" in tree else block
        )
        return narrow(tree, layout.config, layout.model)

    def pick(stacks: Tree, stage: jax.Array, slot: jax.Array) -> Tree:
        return change(jax.tree.map(lambda x: _pick(layout, x, stage, slot), stacks))

    from_block = jax.jit(change, out_shardings=block)
    from_stack = jax.jit(pick, out_shardings=block)
    yield "ends", jax.jit(change, out_shardings=ends)(params.ends)
    for part, (stage, slot) in homes.items():
        tree = params.blocks if layout.layers == "scanned" else params.blocks[slot]
        if stacked:
            yield part, from_stack(tree, jnp.int32(stage), jnp.int32(slot))
        else:
            yield part, from_block(tree)


class _Allocator:
    """Makes the C library give freed memory back, of which it would keep much.

    Nothing happens where it is not glibc. Its option M_MMAP_THRESHOLD is -3; larger
    blocks are returned when freed. It moves up by itself, to 32 MiB.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._option = getattr(library, "mallopt", None)
        self._trim = getattr(library, "malloc_trim", None)

    def __enter__(self) -> "_Allocator":
        if self._option:
            self._option(-3, 1 << 20)
        return self

    def __exit__(self, *_: object) -> None:
        if self._option:
            self._option(-3, 32 << 20)

    def give_back(self) -> None:
        if self._trim:
            self._trim(0)


def _stacked(layout: Layout) -> bool:
    """Whether an array of the layout holds several layers."""
    return layout.partition.stage > 1 or layout.layers == "scanned"


def _homes(layout: Layout) -> dict[Part, tuple[int, int]]:
    """Returns the stage of every layer, and its place among the stage's layers."""
    counts = layout.partition.stage_layers(layout.config)
    places = [(s, i) for s, count in enumerate(counts) for i in range(count)]
    return dict(enumerate(places))


def _moved(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Returns `leaf` where `sharding` says, itself if it lies so already."""
    if leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    return _mover(sharding)(leaf)


@functools.cache
def _mover(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """Returns what moves an array; not `device_put`, which goes by the host."""
    return jax.jit(lambda x: x, out_shardings=sharding)


def _put(
    layout: Layout, stack: jax.Array, leaf: jax.Array, stage: jax.Array, slot: jax.Array
) -> jax.Array:
    """Returns `stack` with one layer's array in its place."""
    if layout.partition.stage == 1:
        return lax.dynamic_update_index_in_dim(stack, leaf, slot, 0)
    shape = stack.shape
    if stack.ndim - leaf.ndim < 1 + (layout.layers == "scanned"):
        # A scale of groups, whose stages lie behind each other.
        stack = stack.reshape(layout.partition.stage, -1, *shape[1:])
    # A comparison, not an update at `stage`: every stage then looks at its own only.
    here = _is_stage(layout, stage, stack.ndim)
    if layout.layers == "scanned":
        # Nor an update at `slot`: compilers copy a stack that is read and written.
        slots = jnp.arange(stack.shape[1], dtype=jnp.int32)
        here &= (slots == slot).reshape(1, -1, *(1,) * leaf.ndim)
    leaf = jnp.expand_dims(leaf, tuple(range(stack.ndim - leaf.ndim)))
    if jnp.issubdtype(stack.dtype, jnp.integer):
        return jnp.where(here, leaf, stack)
    # In bits, for CPUs move bfloat16 as float32.
    new = jnp.where(here, _bits(leaf), _bits(stack))
    return lax.bitcast_convert_type(new, stack.dtype).reshape(shape)


def _pick(
    layout: Layout, stack: jax.Array, stage: jax.Array, slot: jax.Array
) -> jax.Array:
    """Returns one layer's array out of `stack`, to the bit."""
    if layout.layers == "scanned":
        axis = 1 if layout.partition.stage > 1 else 0
        stack = lax.dynamic_index_in_dim(stack, slot, axis, keepdims=False)
    if layout.partition.stage == 1:
        return stack
    # A sum of bits, of which one stage's are not zero: adding floats would lose the
    # sign of -0, and indexing a split dimension gathers it.
    bits = _bits(stack)
    own = jnp.where(_is_stage(layout, stage, stack.ndim), bits.astype(jnp.uint32), 0)
    found = jnp.sum(own, axis=0, dtype=jnp.uint32).astype(bits.dtype)
    return lax.bitcast_convert_type(found, stack.dtype)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _is_stage(layout: Layout, stage: jax.Array, ndim: int) -> jax.Array:
    every = jnp.arange(layout.partition.stage, dtype=jnp.int32)
    return (every == stage).reshape(-1, *(1,) * (ndim - 1))
