"""Checkpoints of the published model, which any partition writes and any restores.

A checkpoint is a folder that `orbax-checkpoint` wrote: one subtree of arrays a part
of the model (`sharding.published`), heads not repeated, nothing filled up, every
device writing and reading its own slice. Beside the arrays lies the seal
(`sharding.seal`): the model's config, what the caller added, such as a tokenizer, the
size of every file and a fingerprint of every array.

Orbax writes into a folder of another name. The seal is written last, and then the
folder gets its name in one rename, so a save that stopped at any moment leaves no
checkpoint. `open_saved` holds the files against the seal; `restore_params` holds the
arrays, on the devices, against their fingerprints. What was damaged, deleted or mixed
up afterwards is an error, never another number.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from jaxllm.config import ModelConfig
from jaxllm.model import Params, Part, Tree
from sharding import published, seal
from sharding.layout import Layout
from sharding.seal import Saved, is_saved, open_saved

_CHUNK_BYTES = 4 * 2**20  # what one read fetches: other partitions cut arrays elsewhere
_TIMEOUT_S = 24 * 3600  # Orbax gives up after 20 minutes, a slow disk may need more


class Saving:
    """A save under way; what was saved may be changed or donated already.

    Attributes:
      path: of the folder that will be there.
    """

    def __init__(
        self, path: pathlib.Path, writer: ocp.AsyncCheckpointer, work: pathlib.Path
    ):
        self.path = path
        self._writer = writer
        self._work = work

    def wait(self) -> None:
        """Returns when the checkpoint is there.

        Raises:
          RuntimeError: it could not be written; what stood at its place still does.
        """
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            raise RuntimeError(
                f"checkpoint {self.path} was not written: {_short(error)}. It appears"
                " whole or not at all, so what was there still is. Put that right, and"
                " save again."
            ) from error
        self._writer.close()

    @property
    def bytes_written(self) -> int:
        """Bytes of the files so far; 0 once they have their final name."""
        try:
            return sum(seal.sizes(self._work).values())
        except FileNotFoundError:  # renamed meanwhile
            return 0


def save(
    path: str | pathlib.Path,
    params: Params,
    layout: Layout,
    mesh: Mesh,
    *,
    extra: Mapping[str, Any] | None = None,
    wait: bool = True,
    overwrite: bool = False,
) -> Saving:
    """Writes `params` to the folder `path`.

    Returns when they are copied to the host: they may be donated or changed then. The
    devices hold one part of the published model beside them meanwhile, the host this
    process's share of all parts.

    Args:
      path: of the new folder.
      params: as `layout` wants them.
      layout: of `params`.
      mesh: its devices.
      extra: JSON to keep with them, such as a tokenizer.
      wait: whether to return only when the checkpoint is there; else call
        `Saving.wait`, which also raises what went wrong.
      overwrite: whether a checkpoint at `path` is replaced. It stays until the new one
        is whole.

    Raises:
      ValueError: something is at `path`, or `extra` is no JSON.
      OSError: the disk is too small.
      RuntimeError: writing failed.
    """
    parts = published.disassemble(layout, mesh, params)
    saving = save_parts(path, layout, parts, extra=extra, overwrite=overwrite)
    if wait:
        saving.wait()
    return saving


def save_parts(
    path: str | pathlib.Path,
    layout: Layout,
    parts: Iterable[tuple[Part, Tree]],
    *,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Saving:
    """Writes a published model to the folder `path`, without waiting.

    Args:
      path: of the new folder.
      layout: says the model and its dtype.
      parts: every part, lying as `published.shapes` says. Each is copied to the host,
        and let go before the next is asked for.
      extra: as in `save`.
      overwrite: as in `save`.

    Raises:
      ValueError: as in `save`.
      OSError: as in `save`.
    """
    path = pathlib.Path(path).absolute()
    try:
        kept = json.loads(json.dumps(extra or {}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"cannot keep `extra` in checkpoint {path}: {error}. It is written as JSON."
            " Give only mappings with names, lists, texts, numbers, true, false, None."
        ) from error
    check_place(path, layout, overwrite)

    fingerprint = jax.jit(seal.fingerprints)
    tree, marks = {}, {}
    for part, arrays in parts:
        marks[str(part)] = fingerprint(arrays)
        tree[str(part)] = jax.block_until_ready(jax.tree.map(_to_host, arrays))
        del arrays
    assert list(tree) == [str(part) for part in published.parts(layout.config)]
    write_seal = functools.partial(
        seal.write,
        config=layout.config,
        dtype=layout.dtype,
        extra=kept,
        fingerprints=jax.tree.map(int, marks),
    )
    final = path
    if is_saved(path):
        final = path.with_name(path.name + seal.NEW)
        shutil.rmtree(final, ignore_errors=True)  # of a save that stopped
    elif path.exists() and jax.process_index() == 0:
        path.rmdir()  # empty
    writer = ocp.AsyncCheckpointer(
        ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False),
        timeout_secs=_TIMEOUT_S,
        temporary_path_class=_sealing(write_seal, path),
    )
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    writer.save(final, args=ocp.args.PyTreeSave(tree, save_args=chunks))
    return Saving(path, writer, final.with_name(final.name + seal.UNFINISHED))


def check_place(
    path: str | pathlib.Path, layout: Layout, overwrite: bool = False
) -> None:
    """Refuses to write where something is, or where there is no room.

    Args:
      path: of the folder, as for `save`, which asks this first.
      layout: says how large it will be.
      overwrite: whether a checkpoint may be there.

    Raises:
      ValueError: something is there.
      OSError: there is no room, or no right to look.
    """
    path = pathlib.Path(path).absolute()
    if seal.UNFINISHED in path.name:
        raise ValueError(
            f"cannot save as {path}: names with {seal.UNFINISHED!r} are of checkpoints"
            " that are being written. Choose another name."
        )
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        if not is_saved(path):
            raise ValueError(
                f"cannot save as {path}: something else is there, and only a checkpoint"
                " is ever replaced by one. Choose another folder."
            )
        if not overwrite:
            raise ValueError(
                f"cannot save as {path}: a checkpoint is there already. It is replaced"
                " only if you ask for that. Choose another folder, or say overwrite."
            )
    folder = next(parent for parent in path.parents if parent.exists())
    needed_bytes = layout.config.num_params * jnp.dtype(layout.dtype).itemsize
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise OSError(
            f"cannot save as {path}: it takes {needed_bytes:,} bytes, {folder} has"
            f" {free_bytes:,} free. A checkpoint that is replaced stays until the new"
            " one is whole. Make room, or choose another disk."
        )
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise OSError(
            f"cannot save as {path}: {folder} is not a folder that may be written to."
            " Folders in between are made there. Choose another place."
        )


def restore_params(
    path: str | pathlib.Path,
    layout: Layout,
    mesh: Mesh,
    progress: Callable[[int, int], None] | None = None,
) -> Params:
    """Returns the parameters of the checkpoint at `path`, lying as `layout` says.

    They are the saved ones to the bit. If the layout is of another dtype, they are
    rounded to it, to nearest, on the devices.

    Args:
      path: of the folder.
      layout: where they shall lie, and their dtype; whatever partition saved them.
      mesh: its devices.
      progress: told how many parts of the model are there, and of how many.

    Raises:
      ValueError: there is no whole checkpoint, it holds another model, or its arrays
        are not those that were saved.
    """
    saved = open_saved(path)
    _check_model(saved, layout.config)
    parts = _read(saved, layout, mesh, progress or (lambda done, total: None))
    return jax.block_until_ready(published.assemble(layout, mesh, parts))


def _read(
    saved: Saved, layout: Layout, mesh: Mesh, progress: Callable[[int, int], None]
) -> Iterator[tuple[Part, Tree]]:
    """Yields every part as `published.shapes` says, one in memory at a time."""
    wanted = published.shapes(dataclasses.replace(layout, dtype=saved.dtype), mesh)
    fingerprint = jax.jit(seal.fingerprints)
    with ocp.PyTreeCheckpointer() as reader:
        for done, (part, shapes) in enumerate(wanted.items()):
            progress(done, len(wanted))
            tree = {str(part): shapes}
            args = ocp.args.PyTreeRestore(
                tree,
                restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
                partial_restore=True,
            )
            try:
                arrays = reader.restore(saved.path, args=args)[str(part)]
                found = jax.tree.map(int, fingerprint(arrays))
            except Exception as error:
                raise ValueError(
                    f"cannot read part {part!r} of checkpoint {saved.path}:"
                    f" {_short(error)}. A checkpoint is read as it was written. If its"
                    " files were changed since, save or copy it again."
                ) from error
            _check_fingerprints(saved, part, found)
            if saved.dtype != layout.dtype:
                arrays = jax.tree.map(lambda x: x.astype(layout.dtype), arrays)
            yield part, arrays
            del arrays
        progress(len(wanted), len(wanted))


def _check_fingerprints(saved: Saved, part: Part, found: Tree) -> None:
    """Refuses arrays that are not those that were saved."""
    names = jax.tree_util.tree_flatten_with_path(found)[0]
    written = jax.tree.leaves(saved.fingerprints[str(part)])
    for (path, mark), other in zip(names, written, strict=True):
        if mark != other:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"part {part!r} of checkpoint {saved.path} is damaged: the fingerprint"
                f" of {name} is {mark}, saved was {other}. Arrays are restored to the"
                " bit or not at all. Save or copy it again."
            )


def _check_model(saved: Saved, config: ModelConfig) -> None:
    """Refuses to restore one model as another."""
    there, asked = dataclasses.asdict(saved.config), dataclasses.asdict(config)
    differ = [name for name in asked if there[name] != asked[name]]
    if differ:
        of, wanted = (
            ", ".join(f"{name}={fields[name]}" for name in differ)
            for fields in (there, asked)
        )
        raise ValueError(
            f"checkpoint {saved.path} is of a model with {of}; the program is for"
            f" {wanted}. They must be the same model, however it is partitioned. Make"
            " the program from the checkpoint's config."
        )


def _sealing(
    write_seal: Callable[[pathlib.Path], None], path: pathlib.Path
) -> type[ocp.path.atomicity.AtomicRenameTemporaryPath]:
    """Returns how Orbax makes a folder final, with a step of ours before and after."""

    class Sealing(ocp.path.atomicity.AtomicRenameTemporaryPath):
        async def finalize(self) -> None:
            write_seal(pathlib.Path(self.get()))
            await super().finalize()
            final = pathlib.Path(self.get_final())
            if final != path:
                old = path.with_name(path.name + seal.OLD)
                shutil.rmtree(old, ignore_errors=True)  # of a save that stopped
                path.rename(old)
                final.rename(path)
                shutil.rmtree(old, ignore_errors=True)

    return Sealing


def _to_host(array: jax.Array) -> jax.Array:
    """Returns a copy in the memory of the hosts that `array`'s devices are on."""
    return jax.device_put(array, array.sharding.with_memory_kind("pinned_host"))


def _short(error: Exception) -> str:
    """Returns what went wrong; TensorStore adds its whole specification in brackets."""
    return str(error).partition(" [")[0][:400]
