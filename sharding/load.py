"""Trained parameters from files onto the devices of a mesh, each reading its slice."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm.model import Params, Part, Tree
from jaxllm.weights import Checkpoint
from sharding import published
from sharding.layout import Layout


def load_params(
    checkpoint: Checkpoint,
    layout: Layout,
    mesh: Mesh,
    progress: Callable[[int, int], None] | None = None,
) -> Params:
    """Returns the parameters of `checkpoint`, lying as `layout` says.

    Every number is read once: each device reads a slice of each array, and devices
    exchange what a layout wants elsewhere or more than once. On the host there is at
    most one device's slice of one array at a time.

    Args:
      checkpoint: of the layout's model.
      layout: where the parameters shall lie, and their dtype.
      mesh: its devices.
      progress: told how many parts of the model are there, and of how many.

    Raises:
      ValueError: `checkpoint` holds another model.
    """
    parts = read_parts(checkpoint, layout, mesh, progress)
    return jax.block_until_ready(published.assemble(layout, mesh, parts))


def read_parts(
    checkpoint: Checkpoint,
    layout: Layout,
    mesh: Mesh,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Part, Tree]]:
    """Yields every part of the published model, lying as `published.shapes` says.

    Arguments and errors are those of `load_params`.
    """
    if checkpoint.config != layout.config:
        raise ValueError(
            f"the checkpoint holds {checkpoint.config}, the program is for"
            f" {layout.config}. They must be the same model. Make the program from the"
            " checkpoint's config."
        )
    wanted = published.shapes(layout, mesh)
    for done, (part, tree) in enumerate(wanted.items()):
        if progress:
            progress(done, len(wanted))
        read = functools.partial(_read, checkpoint, part)
        yield part, jax.tree_util.tree_map_with_path(read, tree)
    if progress:
        progress(len(wanted), len(wanted))


def _read(
    checkpoint: Checkpoint, part: Part, path: tuple[Any, ...], leaf: Any
) -> jax.Array:
    """Returns one array, each of its slices read once and put on its devices."""
    keys = tuple(key.key for key in path)
    pieces: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    index_of = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    for device, index in index_of.items():
        bounds = tuple(
            s.indices(size)[:2] for s, size in zip(index, leaf.shape, strict=True)
        )
        pieces.setdefault(bounds, []).append(device)
    placed = []
    for bounds, devices in pieces.items():
        slices = tuple(slice(start, stop) for start, stop in bounds)
        host = np.ascontiguousarray(checkpoint.read(part, keys, slices, leaf.dtype))
        placed += [jax.device_put(host, device) for device in devices]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, placed)
