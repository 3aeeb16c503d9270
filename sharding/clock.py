"""The clock of a timeline: steps run, started things go on beside them.

A kernel takes its time and, on its way, the gap behind it. A collective starts when its
links are free and ends after its own time; only waiting for it costs any. A copy moves
on while main memory is idle. What a run starts with, and ends with, is a `State`, so a
block that starts alike is run once.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from sharding.hlo.records import Block, Step, Steps, Wait
from sharding.pricing import Price, Pricer

KERNELS, COPIES = "kernels", "copies"
# Iterations after which the rest of a loop is taken to be like the last one.
_MOST_ITERATIONS = 4
_ALIKE_S = 1e-12
# Chips on a switch put everything on the same links.
_SHARED = "switch"


class Span(NamedTuple):
    """What one stream does from `start_s`, within a run.

    Attributes:
      track: "kernels", "copies", or such as "tensor links".
      what: a step, or a block with the runs of its iterations and how many of each.
    """

    start_s: float
    seconds: float
    track: str
    what: "Step | Repeated"


class Repeated(NamedTuple):
    """A block, and what its iterations were."""

    block: Block
    runs: "tuple[tuple[Run, float], ...]"


class OnPath(NamedTuple):
    """What the time of a run is made of: the longest chain of waits.

    Attributes:
      limit: "compute", "hbm", such as "tensor links", or "overhead".
      op_name, source: of the steps, as in a ledger.
    """

    limit: str
    op_name: str
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """Steps that ran once.

    Attributes:
      seconds: until the last of them that anything waits for.
      parts: where the time of the kernels' stream goes: it sums to `seconds`.
      busy_s: of each track.
      path: the critical path, by what is on it: it sums to `seconds`, too.
      counts: kernels, and collectives.
      cycles: that XLA:TPU gives, where it does.
      spans: in order of their start on each track.
      after: what is still going on at its end.
    """

    seconds: float
    parts: Mapping[str, float]
    busy_s: Mapping[str, float]
    path: Mapping[OnPath, float]
    counts: tuple[float, float]
    cycles: float
    spans: tuple[Span, ...]
    after: "State"


_GAPS = OnPath("overhead", "between kernels", "")
_IN_USE = OnPath("overhead", "links in use", "")


class _Going(NamedTuple):
    """A step that was started and not yet waited for.

    Attributes:
      until_s: when a collective will be done, from the start of the run.
      sending_s: how long of that is for its links, others before it included.
      left_s: what of a copy is left to do.
      path: how its end came about, see `_Chain`.
      began_s: for the trace.
    """

    step: Step
    price: Price
    until_s: float
    sending_s: float
    left_s: float
    path: "_Chain | None"
    began_s: float


class State(NamedTuple):
    """What goes on where a run starts; times count from there."""

    free_s: tuple[tuple[str, float], ...] = ()  # when links are free again
    going: tuple[_Going, ...] = ()

    def is_like(self, other: "State") -> bool:
        """Whether runs that start so and like `other` are alike."""
        mine, theirs = self._times(), other._times()
        return mine.keys() == theirs.keys() and all(
            abs(mine[key] - theirs[key]) <= _ALIKE_S for key in mine
        )

    def _times(self) -> dict[tuple[object, ...], float]:
        times: dict[tuple[object, ...], float] = dict(
            ((name,), seconds) for name, seconds in self.free_s
        )
        for k, each in enumerate(self.going):
            times[k, each.step.name, "until"] = max(each.until_s, 0.0)
            times[k, each.step.name, "left"] = each.left_s
        return times


class _Chain(NamedTuple):
    """One moment's cause: something that took `seconds`, after `before`."""

    what: "OnPath | tuple[tuple[Run, float], ...]"
    seconds: float
    before: "_Chain | None"


class Clock:
    """Runs steps; blocks that start alike are run once."""

    def __init__(self, pricer: Pricer):
        self._pricer = pricer
        self._known: dict[int, list[tuple[State, Run]]] = {}

    def run(self, steps: Steps, state: State, *, is_last: bool = False) -> Run:
        """Returns a run of `steps`; the last one waits for all that goes on."""
        one = _Running(self._pricer, state)
        for step in steps:
            if isinstance(step, Step):
                one.step(step)
            elif isinstance(step, Wait):
                one.wait(step.name)
            elif step.times and step.steps:
                one.repeat(step, self._iterations(step, one.state()))
        if is_last:
            one.wait_for_all()
        return one.result()

    def _iterations(self, block: Block, state: State) -> tuple[tuple[Run, float], ...]:
        """Returns the runs of a block's iterations, and how many are like each."""
        runs: list[tuple[Run, float]] = []
        left = block.times
        while left > 0:
            run = self._once(block, state)
            is_steady = run.after.is_like(state) or len(runs) + 1 >= _MOST_ITERATIONS
            share = left if is_steady else min(left, 1.0)
            runs.append((run, share))
            left -= share
            state = run.after
        return tuple(runs)

    def _once(self, block: Block, state: State) -> Run:
        known = self._known.setdefault(id(block), [])
        for before, run in known:
            if before.is_like(state):
                return run
        known.append((state, self.run(block.steps, state)))
        return known[-1][1]


class _Running:
    """The clock of one run."""

    def __init__(self, pricer: Pricer, state: State):
        self._pricer = pricer
        self._now = 0.0
        self._free = dict(state.free_s)
        self._going = list(state.going)
        self._parts: defaultdict[str, float] = defaultdict(float)
        self._busy: defaultdict[str, float] = defaultdict(float)
        self._path: _Chain | None = None
        self._kernels = self._collectives = self._cycles = 0.0
        self._spans: list[Span] = []

    def step(self, step: Step) -> None:
        price = self._pricer.price(step)
        self._cycles += step.cycles or 0
        if step.sends and not step.is_kernel:
            self._send(step, price)
            if not step.is_beside:
                self._finish(self._going.pop())
        elif step.is_beside:
            going = _Going(step, price, 0.0, 0.0, price.seconds, self._path, self._now)
            self._going.append(going)
        else:
            self._kernels += 1
            self._span(self._now, price.seconds, KERNELS, step)
            self._pass(price.seconds, price.limit, _on_path(step, price))
            self._copy(price.seconds - price.memory_s + price.gap_s)
            self._pass(price.gap_s, "overhead", _GAPS)

    def wait(self, name: str) -> None:
        """Waits for what was started under a name, or first of all."""
        at = 0 if not name else self._find(name)
        while at is not None and self._going:
            self._finish(self._going.pop(at))
            at = self._find(name) if name else None

    def wait_for_all(self) -> None:
        while self._going:
            self._finish(self._going.pop(0))

    def repeat(self, block: Block, runs: tuple[tuple[Run, float], ...]) -> None:
        start = self._now
        for run, times in runs:
            self._now += run.seconds * times
            for name, seconds in run.parts.items():
                self._parts[name] += seconds * times
            for name, seconds in run.busy_s.items():
                self._busy[name] += seconds * times
            self._kernels += run.counts[0] * times
            self._collectives += run.counts[1] * times
            self._cycles += run.cycles * times
        self._path = _Chain(runs, self._now - start, self._path)
        what = Repeated(block, runs)
        self._spans.append(Span(start, self._now - start, KERNELS, what))
        after = runs[-1][0].after
        self._free = {name: self._now + free for name, free in after.free_s}
        self._going = [self._carried(each) for each in after.going]

    def _find(self, name: str) -> int | None:
        named = (k for k, each in enumerate(self._going) if each.step.name == name)
        return next(named, None)

    def _carried(self, each: _Going) -> _Going:
        """Returns what a block left going; of its path, only what is to come counts."""
        what = _on_path(each.step, each.price)
        path = _Chain(what, max(each.until_s, 0.0), self._path)
        return _later(each, self._now, path)

    def state(self) -> State:
        """Returns what goes on now."""
        free = sorted(
            (n, s - self._now) for n, s in self._free.items() if s > self._now
        )
        going = tuple(_later(each, -self._now, None) for each in self._going)
        return State(tuple(free), going)

    def result(self) -> Run:
        return Run(
            seconds=self._now,
            parts=dict(self._parts),
            busy_s=dict(self._busy),
            path=_by_what(self._path),
            counts=(self._kernels, self._collectives),
            cycles=self._cycles,
            spans=tuple(self._spans),
            after=self.state(),
        )

    def _send(self, step: Step, price: Price) -> None:
        """Starts a collective as soon as its links are free."""
        axis = max(step.sends, key=lambda row: row.wire_bytes).axis
        track = f"{axis} links"
        links = track if self._pricer.chip.topology != _SHARED else _SHARED
        ready = start = self._now + price.gap_s
        path = _Chain(_GAPS, price.gap_s, self._path) if price.gap_s else self._path
        if (free := self._free.get(links, 0.0)) > ready:
            before = [e for e in self._going if e.until_s == free and e.path]
            path = before[-1].path if before else _Chain(_IN_USE, free, None)
            start = free
        until = start + price.seconds
        path = _Chain(_on_path(step, price), price.seconds, path)
        self._free[links] = until
        self._collectives += 1
        self._span(start, price.seconds, track, step)
        self._going.append(_Going(step, price, until, until - ready, 0.0, path, start))

    def _finish(self, each: _Going) -> None:
        """Waits until something that goes on is done."""
        if not each.step.sends:
            self._finish_copy(each)
        elif (exposed := each.until_s - self._now) > 0:
            linked = min(exposed, each.sending_s)
            self._parts[each.price.limit] += linked
            self._parts["overhead"] += exposed - linked
            self._now = each.until_s
            self._path = each.path or _Chain(
                _on_path(each.step, each.price), self._now, None
            )
            self._copy(exposed)

    def _finish_copy(self, each: _Going) -> None:
        for k, before in enumerate(self._going):
            if before.left_s and before.began_s <= each.began_s:
                self._wait_for_copy(before)
                self._going[k] = before._replace(left_s=0.0)
        self._wait_for_copy(each)
        self._busy[COPIES] += each.price.seconds
        start = max(each.began_s, 0.0)
        self._spans.append(Span(start, self._now - start, COPIES, each.step))

    def _wait_for_copy(self, each: _Going) -> None:
        self._pass(each.left_s, each.price.limit, _on_path(each.step, each.price))

    def _copy(self, seconds: float) -> None:
        """Lets copies move on while main memory is idle for so long."""
        for k, each in enumerate(self._going):
            if seconds <= 0:
                return
            if each.left_s > 0:
                done = min(seconds, each.left_s)
                seconds -= done
                self._going[k] = each._replace(left_s=each.left_s - done)

    def _pass(self, seconds: float, part: str, what: OnPath) -> None:
        if seconds:
            self._now += seconds
            self._parts[part] += seconds
            self._path = _Chain(what, seconds, self._path)

    def _span(self, start: float, seconds: float, track: str, step: Step) -> None:
        self._busy[track] += seconds
        self._spans.append(Span(start, seconds, track, step))


def _later(each: _Going, seconds: float, path: _Chain | None) -> _Going:
    """Returns what goes on, seen from a clock that is ahead by so long."""
    return each._replace(
        until_s=each.until_s + seconds, began_s=each.began_s + seconds, path=path
    )


def _on_path(step: Step, price: Price) -> OnPath:
    where = step.sends[0] if step.sends else step.cost
    assert where is not None
    return OnPath(price.limit, where.op_name or step.name, where.source)


def _by_what(chain: _Chain | None) -> dict[OnPath, float]:
    """Returns the seconds of everything on a path."""
    found: defaultdict[OnPath, float] = defaultdict(float)
    while chain is not None:
        if isinstance(chain.what, OnPath):
            found[chain.what] += chain.seconds
        else:
            for run, times in chain.what:
                for what, seconds in run.path.items():
                    found[what] += seconds * times
        chain = chain.before
    return dict(found)
