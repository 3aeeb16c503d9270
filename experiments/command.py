"""What commands do alike: read a list of numbers, refuse, find where to print."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from rich.console import Console


def batch_sizes(texts: Sequence[str], also: str = "") -> tuple[int, ...]:
    """Returns the numbers of --batch_sizes.

    Args:
      texts: as they were given.
      also: what else the flag takes, for the message, e.g. ", or auto".

    Raises:
      ValueError: one is no number.
    """
    try:
        return tuple(int(size) for size in texts)
    except ValueError:
        raise ValueError(
            f"cannot read --batch_sizes={','.join(texts)}; it is a list of whole"
            f" numbers. Write it like 1,16,64{also}."
        ) from None


def refuse(wrong: Sequence[str]) -> NoReturn:
    """Ends the command before it starts, with everything that is wrong."""
    lines = "\n".join(f"  - {text}" for text in wrong)
    sys.exit(f"Nothing was started. {len(wrong)} to put right:\n{lines}")


def console(width: int = 118) -> Console:
    """Returns standard output, `width` wide where there is no terminal to ask."""
    found = Console()
    return found if found.is_terminal else Console(width=width)
