"""Worker processes that may die: a crash costs one item, never the others.

`concurrent.futures` gives up the whole pool when a process is killed, and a pool of
`multiprocessing` waits for it forever. A compiler that aborts, or is killed for
want of memory, must be neither; so each worker has a pipe of its own, and the end
of that pipe is the news of its death.
"""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Self

_SPAWN = multiprocessing.get_context("spawn")  # a forked JAX hangs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """One piece of news about one item.

    Attributes:
      kind: "started", "finished" or "broke".
      value: what the function returned, once finished.
      reason: an exception's text or how the process died, once broken.
    """

    kind: str
    item: Any
    value: Any = None
    reason: str = ""


class Workers:
    """Up to `jobs` processes, started when there is work and kept between runs.

    Args:
      jobs: processes at a time.
      setup: called once in each process before its first item.
    """

    def __init__(self, jobs: int, setup: Callable[[], object]):
        self._jobs = jobs
        self._setup = setup
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        self._logs = tempfile.TemporaryDirectory(prefix="workers-")
        self._started = 0

    def run(
        self, function: Callable[[Any], Any], items: Sequence[Any]
    ) -> Generator[Event, None, None]:
        """Yields events of `function(item)` for each item, as they happen.

        `function`, items and results cross a process boundary, so `function` is
        importable and everything can be pickled.
        """
        waiting = deque(items)
        yield from self.follow(function, lambda: waiting.popleft() if waiting else None)

    def follow(
        self, function: Callable[[Any], Any], following: Callable[[], Any | None]
    ) -> Generator[Event, None, None]:
        """Yields events of `function(item)` for items that depend on what was found.

        Whenever a process is free, `following` is asked for the next item, or None if
        there is nothing to do until more is known. It ends when nothing is running and
        there is still nothing to do.
        """
        while True:
            while len(self._busy) < self._jobs and (item := following()) is not None:
                worker = self._idle.pop() if self._idle else self._start()
                worker.item = item
                self._busy.append(worker)
                # A worker that died while idle is found out by the wait below.
                with contextlib.suppress(OSError):
                    worker.pipe.send((function, worker.item))
                yield Event(kind="started", item=worker.item)
            if not self._busy:
                return
            by_pipe = {worker.pipe: worker for worker in self._busy}
            for pipe in multiprocessing.connection.wait(by_pipe):
                worker = by_pipe[pipe]  # pyright: ignore[reportArgumentType]
                self._busy.remove(worker)
                yield self._news(worker)

    def close(self) -> None:
        """Stops every worker, busy or not."""
        for worker in self._idle + self._busy:
            worker.process.kill()
        for worker in self._idle + self._busy:
            worker.process.join()
            worker.pipe.close()
        self._idle, self._busy = [], []
        self._logs.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> "_Worker":
        ours, theirs = _SPAWN.Pipe()
        self._started += 1
        log = pathlib.Path(self._logs.name) / f"{self._started}.log"
        process = _SPAWN.Process(
            target=_work, args=(theirs, str(log), self._setup), daemon=True
        )
        process.start()
        theirs.close()  # so that the worker's death ends the pipe
        return _Worker(process=process, pipe=ours, log=log)

    def _news(self, worker: "_Worker") -> Event:
        try:
            value, reason = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            worker.pipe.close()
            return Event(kind="broke", item=worker.item, reason=worker.post_mortem())
        self._idle.append(worker)
        if reason is not None:
            return Event(kind="broke", item=worker.item, reason=reason)
        return Event(kind="finished", item=worker.item, value=value)


@dataclasses.dataclass(kw_only=True)
class _Worker:
    process: Any
    pipe: Connection
    log: pathlib.Path
    item: Any = None

    def post_mortem(self) -> str:
        """Returns how the process ended and the last it had to say."""
        code = self.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            how = f"the worker process was ended by {name}"
            if -code == signal.SIGKILL:
                how += ", which most often means that the machine is out of memory"
        else:
            how = f"the worker process ended with exit code {code}"
        lines = self.log.read_text(errors="replace").split("\n")
        last = " ".join(line.strip() for line in lines if line.strip())[-600:]
        return f"{how}. Its last words: {last}" if last else f"{how}."


def _work(pipe: Connection, log: str, setup: Callable[[], object]) -> None:
    """Answers (function, item) with (value, None) or (None, reason), until the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Compilers write to the file descriptors, past Python.
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    ready = False
    while True:
        try:
            function, item = pipe.recv()
        except EOFError:
            return
        try:
            if not ready:
                setup()
                ready = True
            answer = (function(item), None)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{pathlib.Path(where.filename).name}:{where.lineno}"
            answer = (None, f"{type(error).__name__} at {place}: {error}")
        pipe.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
