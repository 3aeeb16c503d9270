"""Files that somebody else wrote: regular ones, read in bounded pieces.

Nothing here trusts what it reads. A file is looked at before it is opened, so that a
pipe cannot hang and a device cannot feed without end; every read says how much it
takes; and a folder's file lies in that folder, wherever links point. What is wrong is
a ValueError that names the file.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import stat
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

# A config or an index of a thousand tensors is 100 kB. Parsed, JSON takes up to 30
# times its size.
JSON_LIMIT_BYTES = 4 << 20

# Between rows that are read, fewer bytes than this are read too: systems read pages.
GAP_BYTES = 4 << 10
# Such rows are read so many bytes at a time.
RUN_BYTES = 1 << 20


def quoted(name: object) -> str:
    """Returns `name`, which may be anything, for a message of one line."""
    text = repr(name)
    return text if len(text) <= 160 else f"{text[:120]}... ({len(text)} characters)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """A regular file, as it was when it was found.

    Attributes:
      path: where it is.
      size_bytes: its length.
      identity: changes when the file is replaced or written to.
    """

    path: pathlib.Path
    size_bytes: int
    identity: tuple[int, ...]

    @contextlib.contextmanager
    def open(self) -> Iterator[int]:
        """Gives a descriptor for reading.

        Raises:
          ValueError: the file cannot be opened, or is no longer what it was.
        """
        try:
            # Not to wait for the other end of a pipe that took the file's place.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ValueError(
                f"cannot open {self.path}: {error.strerror}. It must be readable for as"
                " long as it is loaded. Put it back, or open it anew."
            ) from error
        try:
            if _identity(os.fstat(descriptor)) != self.identity:
                raise ValueError(
                    f"cannot go on reading {self.path}: it changed after it was opened."
                    " What was learnt from its header holds for the old file only. Open"
                    " it anew."
                )
            yield descriptor
        finally:
            os.close(descriptor)

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Returns the bytes at `offset_bytes`."""
        buffer = np.empty(size_bytes, np.uint8)
        with self.open() as descriptor:
            self.fill(descriptor, buffer, offset_bytes)
        return buffer.tobytes()

    def fill(self, descriptor: int, buffer: np.ndarray, offset_bytes: int) -> None:
        """Fills `buffer`, which is contiguous, with the bytes at `offset_bytes`.

        Raises:
          ValueError: the file ends before the buffer is full, or the disk fails.
        """
        view = buffer.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], offset_bytes + done)
            except OSError as error:
                raise ValueError(
                    f"cannot read {self.path} at byte {offset_bytes + done}:"
                    f" {error.strerror}. The file must be whole. Copy it anew."
                ) from error
            if count == 0:
                raise ValueError(
                    f"cannot read {len(view)} bytes of {self.path} at byte"
                    f" {offset_bytes}: it ends after {done} of them. The file must be"
                    " whole. Download or copy it anew."
                )
            done += count


def find(path: pathlib.Path) -> File:
    """Returns the file at `path`, following links.

    Raises:
      ValueError: there is none, or it is a folder, pipe, socket or device.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot open {quoted(str(path))}: {_why(error)}. Weights are read from"
            " files that exist. Correct the path."
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(
            f"cannot read {path}: it is not a regular file (mode"
            f" {stat.filemode(found.st_mode)}). Pipes, devices and folders are not"
            " read as files. Give a file."
        )
    return File(path=path, size_bytes=found.st_size, identity=_identity(found))


def member(folder: pathlib.Path, name: str) -> File:
    """Returns the file `name` of `folder`.

    A link is followed to a file in the same folder or below, and, because Hugging
    Face's cache is made of such links, from snapshots/REVISION to the folder blobs
    beside snapshots. A link elsewhere is refused: a downloaded folder must not choose
    which files of this machine are read.

    Raises:
      ValueError: `name` is more than a name, or the file is elsewhere or missing.
    """
    if name in ("", ".", "..") or any(char in name for char in "/\\\0"):
        raise ValueError(
            f"cannot read {quoted(name)} of {folder}: it is not the name of a file in"
            " that folder. Files of a checkpoint lie side by side. Correct the index."
        )
    try:
        home, real = folder.resolve(), (folder / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # loops of links, odd names
        raise ValueError(
            f"cannot read {quoted(name)} of {folder}: {_why(error)}. Files of a"
            " checkpoint lie side by side. Correct the link or the index."
        ) from error
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not real.is_relative_to(home) and real.parent != blobs:
        raise ValueError(
            f"cannot read {quoted(name)} of {folder}: it is a link to {real}, outside"
            " the folder. Files of a checkpoint lie side by side. Copy the file into"
            " the folder."
        )
    return find(folder / name)


def read_json(file: File) -> dict[str, Any]:
    """Returns the object in a JSON file; see `parse_json`."""
    if file.size_bytes > JSON_LIMIT_BYTES:
        raise ValueError(
            f"cannot read {file.path}: it has {file.size_bytes} bytes. JSON beside"
            f" weights has at most {JSON_LIMIT_BYTES}. Give the right file."
        )
    return parse_json(file.read(0, file.size_bytes), str(file.path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """Returns the object that `text` holds.

    Raises:
      ValueError: it is not UTF-8, not JSON, not an object, or says something twice.
    """
    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"cannot read the JSON of {where}: {str(error)[:160]}. It must be one"
            " object in UTF-8, every key once. Download the file anew."
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(
            f"cannot read the JSON of {where}: it holds a {type(fields).__name__}. It"
            " must be one object. Give the right file."
        )
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return fields


def _why(error: Exception) -> str:
    """Returns what went wrong, without the path, which may be of any length."""
    return (isinstance(error, OSError) and error.strerror) or str(error)[:160]


def _identity(found: os.stat_result) -> tuple[int, ...]:
    kind = stat.S_IFMT(found.st_mode)
    return kind, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """How numbers lie in bytes: in blocks along a row.

    Attributes:
      name: as the file format calls it.
      block_values: numbers in a block.
      block_bytes: bytes of a block.
      decode: from bytes [rows, blocks * block_bytes], uint8 and contiguous, to numbers
        [rows, blocks * block_values] of some float dtype.
    """

    name: str
    block_values: int
    block_bytes: int
    decode: Callable[[np.ndarray], np.ndarray]


def plain(name: str, dtype: np.dtype) -> Encoding:
    """Returns the encoding of numbers that are stored as numpy holds them."""
    return Encoding(
        name=name,
        block_values=1,
        block_bytes=dtype.itemsize,
        decode=lambda raw: raw.view(dtype),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """An array of one or two dimensions in a file, row by row.

    Attributes:
      file: where it lies.
      offset_bytes: from the beginning of the file.
      shape: its sizes; a vector counts as one row. The last is whole blocks.
      encoding: how its numbers are written.
    """

    file: File
    offset_bytes: int
    shape: tuple[int, ...]
    encoding: Encoding

    def read(self, rows: np.ndarray, columns: slice) -> np.ndarray:
        """Returns some rows, in the order asked for, between two columns.

        Reads the bytes of these alone, except that blocks are read whole and gaps
        below `GAP_BYTES` are read through. Takes memory for what it returns, a few
        times over, and `RUN_BYTES`: ask for few rows at a time.

        Args:
          rows: which rows, counted from 0.
          columns: start and stop, both given.
        """
        encoding = self.encoding
        first = columns.start // encoding.block_values
        last = -(-columns.stop // encoding.block_values)
        pitch = self.shape[-1] // encoding.block_values * encoding.block_bytes
        width = (last - first) * encoding.block_bytes
        raw = np.empty((len(rows), width), np.uint8)
        begins = self.offset_bytes + first * encoding.block_bytes + rows * pitch
        with self.file.open() as descriptor:
            for start, stop, step in _runs(begins, width):
                at = int(begins[start])
                if step == width:
                    self.file.fill(descriptor, raw[start:stop], at)
                    continue
                run = np.empty((stop - start, step), np.uint8)
                # Behind the last row there may be no gap.
                end = run.size - (step - width)
                self.file.fill(descriptor, run.reshape(-1)[:end], at)
                raw[start:stop] = run[:, :width]
        skipped = first * encoding.block_values
        numbers = encoding.decode(raw)
        return numbers[:, columns.start - skipped : columns.stop - skipped]


def _runs(begins: np.ndarray, width: int) -> Iterator[tuple[int, int, int]]:
    """Yields rows that are read at once: start, stop, and bytes between beginnings.

    Args:
      begins: where each row that is asked for begins.
      width: bytes of a row that are asked for.
    """
    steps = np.diff(begins)
    ends = [*(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(begins) - 1]
    start = 0
    for last in ends:  # up to this row, and from it on, steps are equal
        step = int(steps[start]) if start < last else width
        if width <= step < width + GAP_BYTES:
            stop, most = last + 1, max(1, RUN_BYTES // max(1, step))
        else:
            stop, step, most = last, width, 1
        for row in range(start, stop, most):
            yield row, min(row + most, stop), step
        start = stop
    if start == len(begins) - 1:
        yield start, start + 1, width
