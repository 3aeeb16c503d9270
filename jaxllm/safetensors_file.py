"""Tensors of safetensors files: where they lie, and that the files are sound.

A file is the length of its header (8 bytes, little endian), the header (JSON: name ->
dtype, shape, offsets from the header's end), and the tensors without a gap. Format:
https://github.com/huggingface/safetensors#format. Its own library maps the file into
memory, which counts as memory of the process, and numpy without help has no bfloat16;
so the header is read here, and the tensors with plain reads.
"""

import math
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm import files
from jaxllm.files import File, Stored, quoted

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

ENCODINGS = {
    "F64": files.plain("F64", np.dtype("<f8")),
    "F32": files.plain("F32", np.dtype("<f4")),
    "F16": files.plain("F16", np.dtype("<f2")),
    "BF16": files.plain("BF16", np.dtype(jnp.bfloat16)),
}


def read_folder(folder: pathlib.Path) -> dict[str, Stored]:
    """Returns the tensors of a Hugging Face folder by name; reads headers only.

    Raises:
      ValueError: the folder has no safetensors, or both a single file and an index,
        or its files are not what the index says, or not sound.
    """
    single, index = ((folder / name).exists() for name in (SINGLE, INDEX))
    if single and index:
        raise ValueError(
            f"cannot read {folder}: it has both {SINGLE} and {INDEX}. Weights are in"
            " one file or in shards with an index. Remove what is stale."
        )
    if single:
        return read_header(files.member(folder, SINGLE))
    if not index:
        pickles = sorted(path.name for path in folder.glob("*.bin"))[:3]
        held = f"but {', '.join(pickles)}, which is a pickle" if pickles else "either"
        raise ValueError(
            f"cannot read {folder}: it has no {SINGLE} and no {INDEX}, {held}. Pickles"
            " run code and are never opened. Give a folder with safetensors, or save"
            " the model anew with save_pretrained."
        )
    return _read_shards(folder)


def _read_shards(folder: pathlib.Path) -> dict[str, Stored]:
    index = files.member(folder, INDEX)
    shard_of = files.read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(
        isinstance(name, str) and name.endswith(".safetensors")
        for name in shard_of.values()
    ):
        raise ValueError(
            f"cannot read {index.path}: weight_map is not an object of the names of"
            " .safetensors files. It says in which shard each tensor lies. Download the"
            " index anew."
        )
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(shard_of.values())):
        held = read_header(files.member(folder, shard))
        named = {name for name, home in shard_of.items() if home == shard}
        if held.keys() != named:
            name = min(held.keys() ^ named)
            only = "shard" if name in held else "index"
            raise ValueError(
                f"shard {quoted(shard)} of {folder} disagrees with the index about"
                f" tensor {quoted(name)}: only the {only} has it. Both must name the"
                " same tensors. Download the folder anew."
            )
        tensors |= held
    return tensors


def read_header(file: File) -> dict[str, Stored]:
    """Returns the tensors of one file by name; reads the header only.

    Raises:
      ValueError: the file is not sound, or holds a dtype that is no float.
    """
    if file.size_bytes < 8:
        raise _unsound(file, f"it has {file.size_bytes} bytes, not even a length")
    size = int.from_bytes(file.read(0, 8), "little")
    limit = min(files.JSON_LIMIT_BYTES, file.size_bytes - 8)
    if size > limit:
        raise _unsound(file, f"its header has {size} bytes, of at most {limit}")
    text = file.read(8, size)
    if text[:1] != b"{":
        raise _unsound(file, f"its header begins with {text[:1]!r}, not with '{{'")
    entries = files.parse_json(text, f"the header of {file.path}")
    notes = entries.pop("__metadata__", {})
    if not isinstance(notes, dict) or any(
        not isinstance(note, str) for note in notes.values()
    ):
        raise _unsound(file, "its __metadata__ is not an object of texts")
    tensors = {
        name: _tensor(file, name, entry, 8 + size) for name, entry in entries.items()
    }
    end = 8 + size
    for name, (begin, stop) in sorted(
        ((name, _span(tensor)) for name, tensor in tensors.items()),
        key=lambda item: item[1],
    ):
        if begin != end:
            raise _unsound(
                file,
                f"tensor {quoted(name)} begins at byte {begin}, the one before ends at"
                f" {end}",
            )
        end = stop
    if end != file.size_bytes:
        raise _unsound(
            file, f"its tensors end at byte {end}, the file at {file.size_bytes}"
        )
    return tensors


def _tensor(file: File, name: str, entry: Any, data_bytes: int) -> Stored:
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or entry.keys() != keys:
        raise _unsound(file, f"tensor {quoted(name)} has not just {sorted(keys)}")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (_naturals(shape, 8) and _naturals(span, 2) and len(span) == 2):
        raise _unsound(
            file,
            f"tensor {quoted(name)} has shape {quoted(shape)} and data_offsets"
            f" {quoted(span)}, not two lists of natural numbers",
        )
    if not isinstance(dtype, str) or dtype not in ENCODINGS:
        raise ValueError(
            f"tensor {quoted(name)} of {file.path} has dtype {quoted(dtype)}. Weights"
            f" are read as {', '.join(ENCODINGS)}. Give a checkpoint that is not"
            " quantised."
        )
    encoding = ENCODINGS[dtype]
    needed = math.prod(shape) * encoding.block_bytes
    if span[1] - span[0] != needed:
        raise _unsound(
            file,
            f"tensor {quoted(name)} of shape {shape} in {dtype} needs {needed} bytes,"
            f" its data_offsets {span} hold {span[1] - span[0]}",
        )
    return Stored(
        file=file,
        offset_bytes=data_bytes + span[0],
        shape=tuple(shape),
        encoding=encoding,
    )


def _span(tensor: Stored) -> tuple[int, int]:
    size = math.prod(tensor.shape) * tensor.encoding.block_bytes
    return tensor.offset_bytes, tensor.offset_bytes + size


def _naturals(numbers: Any, most: int) -> bool:
    return (
        isinstance(numbers, list)
        and len(numbers) <= most
        and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
    )


def _unsound(file: File, fact: str) -> ValueError:
    return ValueError(
        f"cannot read {file.path} as safetensors: {fact}. A file that breaks its format"
        " is damaged or made to harm. Download it anew."
    )
