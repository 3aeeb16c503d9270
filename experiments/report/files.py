"""Files that are replaced in one step."""

import os
from pathlib import Path


def replace(path: Path, data: str | bytes) -> None:
    """Writes a file, and its folder, so that nobody ever sees half of it.

    Several processes may write the same file: each has a part of its own.

    Args:
      path: the file.
      data: bytes, or text to be written in UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(part, path)
