"""A timeline as a file that opens in https://ui.perfetto.dev and chrome://tracing.

The Trace Event Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
Times are microseconds, and every track of the device is a thread of one process.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from sharding.clock import KERNELS, Repeated, Run
from sharding.hlo.records import Step
from sharding.timeline import Timeline

LOOPS = "loops"
ITERATIONS = 3  # of a loop that are shown one by one
MOST_EVENTS = 200_000
_US = 1e6
_DIGITS = 6  # a picosecond


def write_trace(
    timeline: Timeline,
    path: pathlib.Path | str,
    *,
    title: str = "",
    iterations: int = ITERATIONS,
) -> None:
    """Writes a timeline as JSON.

    Args:
      timeline: what happened.
      path: of the file.
      title: what Perfetto calls the process.
      iterations: of a loop that are shown; the rest of it is one slice.

    Raises:
      OSError: the file cannot be written.
    """
    content = json.dumps(
        trace(timeline, title=title, iterations=iterations), allow_nan=False
    )
    pathlib.Path(path).write_text(content, encoding="utf-8")


def trace(
    timeline: Timeline, *, title: str = "", iterations: int = ITERATIONS
) -> dict[str, Any]:
    """Returns what `write_trace` writes, at most about `MOST_EVENTS` events."""
    tracks = [LOOPS, KERNELS, *sorted(set(timeline.busy_s) - {KERNELS})]
    threads = {track: k for k, track in enumerate(tracks)}
    first = timeline.total_s - timeline.run.seconds
    events: list[dict[str, Any]] = [_named("process_name", 0, title or "one device")]
    for track, k in threads.items():
        events.append(_named("thread_name", k, track))
        events.append(
            {"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": k,
             "args": {"sort_index": k}}
        )  # fmt: skip
    if first > 0:
        events.append(_slice(LOOPS, "the call", 0.0, first, {}))
    for event in _events(timeline.run, first, iterations):
        events.append(event)
        if len(events) >= MOST_EVENTS:
            break
    for event in events:
        if event["ph"] == "X":
            event["tid"] = threads[event["tid"]]
    ms = {name: f"{1e3 * s:.4f}" for name, s in timeline.parts.items()}
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {"total_ms": f"{1e3 * timeline.total_s:.4f}", **ms},
    }


def _events(run: Run, at: float, iterations: int) -> Iterator[dict[str, Any]]:
    """Yields the slices of a run that starts at `at` seconds."""
    for span in run.spans:
        start = at + span.start_s
        if isinstance(span.what, Step):
            name, args = _told(span.what)
            yield _slice(span.track, name, start, span.seconds, args)
        else:
            yield from _repeated(span.what, start, span.seconds, iterations)


def _repeated(
    what: Repeated, at: float, seconds: float, iterations: int
) -> Iterator[dict[str, Any]]:
    block = what.block
    label = block.label.rpartition(" > ")[2] or f"branch, taken x{block.times:g}"
    yield _slice(LOOPS, label, at, seconds, {"times": block.times})
    shown, end = 0, at + seconds
    for run, times in what.runs:
        left = times
        while left > 0 and shown < iterations:
            # A branch that is taken now and then is shown as long as it is on average.
            if left >= 1:
                yield from _events(run, at, iterations)
            at += run.seconds * min(left, 1.0)
            left -= min(left, 1.0)
            shown += 1
    more = block.times - shown
    if more > 0 and end > at:
        name = f"{more:g} more iterations"
        yield _slice(KERNELS, name, at, end - at, {"loop": block.label})
    elif shown and block.times < 1:
        yield _slice(KERNELS, label, end - seconds, seconds, {})


def _told(step: Step) -> tuple[str, dict[str, Any]]:
    """Returns the name of a slice, and what is said of it."""
    args: dict[str, Any] = {"instruction": step.name}
    where = step.sends[0] if step.sends else step.cost
    assert where is not None
    args |= {"op_name": where.op_name, "source": where.source}
    if step.cost:
        args |= {"flops": step.cost.flops, "hbm_bytes": step.cost.hbm_bytes}
    for p in step.products:
        batch = f"{p.batch} x " if p.batch > 1 else ""
        args["product"] = f"{batch}[{p.m}, {p.k}] @ [{p.k}, {p.n}] {p.dtype}"
    for row in step.sends:
        args["sends"] = f"{row.kind}, {row.payload_bytes} B over {row.group_size}"
    if step.cycles:
        args["estimated_cycles of XLA"] = step.cycles
    short = where.op_name.rpartition("/")[2]
    return (f"{step.sends[0].kind} {short}" if step.sends else short or step.name), args


def _slice(
    track: str, name: str, start: float, seconds: float, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "pid": 0,
        "tid": track,
        "ts": round(_US * start, _DIGITS),
        "dur": round(_US * seconds, _DIGITS),
        "args": args,
    }


def _named(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": 0, "tid": thread, "args": {"name": name}}
