"""Long names from HLO, made short enough to read; equal ones of many layers made one.

JAX's op_name is a path: `jit(step)/layers/while/body/closed_call/mlp/dot_general`.
Its end says what is done, some of its parts only how JAX got there.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")

# Parts of a path that JAX's transformations add; the step they wrap has its own.
_WRAPPERS = frozenset([
    "body", "checkpoint", "closed_call", "cond", "main", "pjit", "rematted_computation",
    "scan", "shard_map", "while",
])  # fmt: skip
_WRAPPED = re.compile(r"(jit|jvp|vmap|remat|checkpoint|transpose)\((.*)\)")
_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"[/>, ]+")
_INSTRUCTION = re.compile(r"\.\d+")


def short(op_name: str, width: int | None = None) -> str:
    """Returns what tells an operation from others; its end where there is little room.

    Example:
      >>> name = "jit(step)/layers/while/body/closed_call/mlp/BTD,DF->BTF/dot_general"
      >>> short(name), short(name, 20), short("jit(f)/jvp(relu)/max")
      ('layers/mlp/BTD,DF->BTF/dot_general', '…BTF/dot_general', 'jvp(relu)/max')
    """
    parts = [part for part in op_name.split("/") if part]
    kept = [part for part in parts[:-1] if part not in _WRAPPERS]
    if kept and _WRAPPED.fullmatch(kept[0]) and kept[0].startswith("jit("):
        kept = kept[1:]  # the whole program
    kept = [m[1] if (m := re.fullmatch(r"jit\((.*)\)", p)) else p for p in kept]
    text = "/".join([*kept, *parts[-1:]])
    return text if width is None else tail(text, width)


def tail(text: str, width: int) -> str:
    """Returns `text`, or as much of its end as `width` holds behind "…".

    Example:
      >>> tail("attention/dot_general", 12), tail("short", 12)
      ('…dot_general', 'short')
    """
    text = printable(text)
    if len(text) <= width:
        return text
    cut = text[len(text) - width + 1 :]
    # From the start of a word, unless that leaves less than half of the room.
    if (mark := _WORD.search(cut)) and len(cut) - mark.end() >= width // 2:
        cut = cut[mark.end() :]
    return f"…{cut}"


def printable(text: str) -> str:
    """Returns `text` in one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))


def alike(names: Sequence[str]) -> str:
    """Returns one name for names that differ in numbers only.

    Example:
      >>> alike(["jit(f)/layer_0/dot", "jit(f)/layer_1/dot"]), alike(["a.1", "a.1"])
      ('jit(f)/layer_*/dot', 'a.1')
    """
    first, *others = dict.fromkeys(names)
    if not others:
        return first
    columns = zip(*(_NUMBER.findall(name) for name in (first, *others)), strict=True)
    numbers = [c[0] if len(set(c)) == 1 else "*" for c in columns]
    return _NUMBER.sub(lambda _: numbers.pop(0), first)


def pattern(name: str) -> str:
    """Returns what is equal in names that differ in numbers only."""
    return _NUMBER.sub("0", name)


def loop_pattern(loop: str) -> str:
    """Returns a loop's label without the compiler's numbers; trip counts stay.

    Example:
      >>> loop_pattern("while.59 x2 > while.50 x16")
      'while x2 > while x16'
    """
    return _INSTRUCTION.sub("", loop)


def trips(loop: str) -> str:
    """Returns a loop's label without names.

    Example:
      >>> trips("while.59 x2 > while.50 x16"), trips("while.3 per iteration")
      ('x2 > x16', 'per iteration')
    """
    return " > ".join(printable(part).partition(" ")[2] for part in loop.split(" > "))


def groups(rows: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Returns rows of equal key together, in the order of each key's first."""
    found: dict[Hashable, list[T]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.values())
