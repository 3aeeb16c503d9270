"""Shows text as it is made: plainly, in live panels, or prompt after prompt."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

# Takes a piece of text for each prompt of a batch.
Write = Callable[[Sequence[str]], None]

# What steers a terminal rather than shows on it.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Writer(Protocol):
    """Shows batches, one after the other."""

    def batch(
        self, prompts: Sequence[str]
    ) -> contextlib.AbstractContextManager[Write]: ...


def writer_for(out: TextIO, num_prompts: int, *, quiet: bool = False) -> Writer:
    """Returns the best way to show text on `out`.

    Args:
      out: a terminal, or anything else.
      num_prompts: in all batches.
      quiet: show nothing.
    """
    if quiet:
        return _Quiet()
    console = Console(file=out, highlight=False)
    if num_prompts == 1:
        return _Plain(console)
    return _Panels(console) if console.is_terminal else _Blocks(console)


def _safe(text: str) -> str:
    """Returns `text` with what could steer the terminal made visible."""
    return _CONTROL.sub("\ufffd", text)


class _Quiet:
    @contextlib.contextmanager
    def batch(self, prompts: Sequence[str]) -> Iterator[Write]:
        yield lambda pieces: None


class _Plain:
    """One prompt: its text as it comes; on a terminal after the prompt."""

    def __init__(self, console: Console):
        self._console = console

    @contextlib.contextmanager
    def batch(self, prompts: Sequence[str]) -> Iterator[Write]:
        out, shown = self._console.file, self._console.is_terminal
        if shown:
            self._console.print(
                Text(_safe(prompts[0]), style="dim"), end="", soft_wrap=True
            )

        def write(pieces: Sequence[str]) -> None:
            out.write(_safe(pieces[0]) if shown else pieces[0])
            out.flush()

        yield write
        write(["\n"])


class _Blocks:
    """Several prompts to a file: each with its text, when the batch is done."""

    def __init__(self, console: Console):
        self._out = console.file

    @contextlib.contextmanager
    def batch(self, prompts: Sequence[str]) -> Iterator[Write]:
        texts = [""] * len(prompts)
        yield lambda pieces: _extend(texts, pieces)
        for prompt, text in zip(prompts, texts, strict=True):
            self._out.write(f"> {prompt}\n{text}\n\n")
        self._out.flush()


class _Panels:
    """Several prompts on a terminal: a panel each, drawn as text comes."""

    def __init__(self, console: Console):
        self._console = console

    @contextlib.contextmanager
    def batch(self, prompts: Sequence[str]) -> Iterator[Write]:
        texts = [""] * len(prompts)

        def panels() -> Group:
            return Group(*map(_panel, prompts, texts))

        # What is taller than the terminal is cut while it grows, and whole in the end.
        with Live(
            get_renderable=panels,
            console=self._console,
            transient=True,
            vertical_overflow="ellipsis",
        ):
            yield lambda pieces: _extend(texts, pieces)
        self._console.print(panels())


def _extend(texts: list[str], pieces: Sequence[str]) -> None:
    for i, piece in enumerate(pieces):
        texts[i] += piece


def _panel(prompt: str, text: str) -> Panel:
    title = Text(_safe(prompt).replace("\n", " "), style="bold")
    title.truncate(70, overflow="ellipsis")
    return Panel(Text(_safe(text)), title=title, title_align="left", border_style="dim")
