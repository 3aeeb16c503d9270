"""A file of lines that is only appended to, safe against being killed.

A line is written in one `write`, then flushed and synced, so a process killed at any
moment leaves whole lines and at most one cut-off last line, which opening cuts off.
"""

import fcntl
import os
from pathlib import Path


class Lines:
    """Appends to the file `path`; one process at a time.

    Attributes:
      texts: the whole lines found on opening.
      dropped: the cut-off last line found on opening, or None.

    Raises:
      ValueError: another process has the file open.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(
                f"{path.parent} is being written by another process; a results file has"
                " one writer. Wait for it, or choose another folder."
            ) from None
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        self.texts = [line.decode(errors="replace") for line in whole.split(b"\n")[:-1]]
        rest = data[len(whole) :]
        self.dropped = rest.decode(errors="replace") if rest else None
        self._file.truncate(len(whole))

    def append(self, text: str) -> None:
        """Writes one line; it is on disk when this returns."""
        self._file.write(text.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
