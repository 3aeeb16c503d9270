"""The seal of a checkpoint: what its folder held when it was whole.

`jaxllm.json` says which model the arrays beside it are, what else was kept with them,
the size of every file, and a fingerprint of every array; a checksum says that nobody
changed it. It is written when everything else is. A folder without one, or with other
files, is no checkpoint.
"""

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.config import ModelConfig, RopeScaling
from jaxllm.model import Tree

NAME = "jaxllm.json"
UNFINISHED = ".orbax-checkpoint-tmp"  # how Orbax names a folder that it writes
NEW, OLD = ".jaxllm-new", ".jaxllm-old"  # while a checkpoint is being replaced
_FORMAT = 1
_CONTENT = {
    "format": int,
    "config": dict,
    "dtype": str,
    "extra": dict,
    "fingerprints": dict,
    "files": dict,
}
_LIMIT_BYTES = 256 << 20  # a tokenizer has 64 MB at most
_CHANGES_LATER = "_CHECKPOINT_METADATA"  # Orbax adds the time of the rename


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """A whole checkpoint, no array of it read.

    Attributes:
      path: its folder.
      config: of the model.
      dtype: of every array.
      extra: what it was saved with.
      num_bytes: of all files.
      fingerprints: of every array, a tree for each part.
    """

    path: pathlib.Path
    config: ModelConfig
    dtype: str
    extra: Mapping[str, Any]
    num_bytes: int
    fingerprints: Mapping[str, Tree]


def is_saved(path: str | pathlib.Path) -> bool:
    """Whether `path` is a folder with a seal, whole or not."""
    return (pathlib.Path(path) / NAME).is_file()


def write(
    folder: pathlib.Path,
    *,
    config: ModelConfig,
    dtype: str,
    extra: Mapping[str, Any],
    fingerprints: Mapping[str, Tree],
) -> None:
    """Seals `folder`, in which everything else is written."""
    files = sizes(folder)
    files.pop(_CHANGES_LATER, None)
    content = {
        "format": _FORMAT,
        "config": dataclasses.asdict(config),
        "dtype": dtype,
        "extra": extra,
        "fingerprints": fingerprints,
        "files": files,
    }
    text = json.dumps({"crc32": _checksum(content), **content})
    (folder / NAME).write_text(text, encoding="utf-8")


def open_saved(path: str | pathlib.Path) -> Saved:
    """Returns what the checkpoint at `path` holds, having read no array.

    Raises:
      ValueError: there is none, or not a whole one.
    """
    path = pathlib.Path(path).absolute()
    content = _read(path)
    files, found = content["files"], sizes(path)
    wrong = [name for name, size in files.items() if found.get(name) != size]
    if wrong:
        raise ValueError(
            f"checkpoint {path} is damaged: of its {len(files)} files {len(wrong)} are"
            f" not as they were written; {wrong[0]} has {found.get(wrong[0], 'no')}"
            f" bytes and not {files[wrong[0]]}. A checkpoint is read whole or not at"
            " all. Save or copy it again."
        )
    fields = content["config"]
    try:
        scaling = fields["rope_scaling"] and RopeScaling(**fields["rope_scaling"])
        config = ModelConfig(**{**fields, "rope_scaling": scaling})
    except (KeyError, TypeError) as error:
        raise _damaged(path) from error
    return Saved(
        path=path,
        config=config,
        dtype=content["dtype"],
        extra=content["extra"],
        num_bytes=sum(files.values()),
        fingerprints=content["fingerprints"],
    )


def _read(path: pathlib.Path) -> dict[str, Any]:
    """Returns what the seal says, if nobody changed it."""
    if UNFINISHED in path.name:
        raise ValueError(
            f"{path} is a checkpoint whose writing has not ended. One gets its name"
            " when it is whole. Wait, or if nobody writes it any more, delete it."
        )
    if not path.is_dir():
        names = [path.name + end for end in (NEW, OLD)]
        whole = ", ".join(name for name in names if is_saved(path.with_name(name)))
        stopped = f" Replacing it was stopped; it is whole in {whole}." if whole else ""
        raise ValueError(
            f"no checkpoint {path}: there is no such folder.{stopped} A checkpoint is a"
            " folder that sharding.checkpoint.save wrote. Give the path of one."
        )
    if not is_saved(path):
        names = sorted(entry.name for entry in path.iterdir())
        raise ValueError(
            f"{path} is not a whole checkpoint: it has no {NAME}, which is written"
            f" last; it holds {', '.join(names[:5]) or 'nothing'}. Only what"
            " sharding.checkpoint.save wrote is read. Bring Hugging Face and GGUF files"
            " into that form with `python -m experiments.convert`."
        )
    try:
        with (path / NAME).open("rb") as file:
            content = dict(json.loads(file.read(_LIMIT_BYTES)))
        good = content.pop("crc32") == _checksum(content) and "format" in content
    except (ValueError, TypeError, KeyError, RecursionError):
        content, good = {}, False  # no JSON, no object, no checksum, endless
    if not good:
        raise _damaged(path)
    if content["format"] != _FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {content['format']}; this version reads"
            f" {_FORMAT}. A format has one reader. Use the version that wrote it."
        )
    if {name: type(value) for name, value in content.items()} != _CONTENT:
        raise _damaged(path)
    return content


def _damaged(path: pathlib.Path) -> ValueError:
    return ValueError(
        f"checkpoint {path} is damaged: its {NAME} is not as it was written. Without it"
        " nothing is known of the rest. Save or copy it again."
    )


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def sizes(folder: pathlib.Path) -> dict[str, int]:
    """Returns the bytes of every file below `folder`."""
    return {
        entry.relative_to(folder).as_posix(): entry.stat().st_size
        for entry in sorted(folder.rglob("*"))
        if entry.is_file()
    }


def fingerprints(tree: Tree) -> Tree:
    """Returns a uint32 for every array of `tree`, however it is split. Traceable.

    A sum modulo 2^32 of every element's bits times an odd number made from its index.
    A sum of integers does not depend on their order; one changed element always
    changes it, and any other change does but once in 2^32.
    """
    return jax.tree.map(_fingerprint, tree)


def _fingerprint(array: jax.Array) -> jax.Array:
    narrow = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = lax.bitcast_convert_type(array, narrow).astype(jnp.uint32)
    index = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        along = lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        index = index * jnp.uint32(size) + along
    # Odd constants that mix well: 2^32 over the golden ratio, and one of MurmurHash3.
    mixed = index * jnp.uint32(0x9E3779B1)
    odd = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA6B) | jnp.uint32(1)
    return jnp.sum(bits * odd, dtype=jnp.uint32)
