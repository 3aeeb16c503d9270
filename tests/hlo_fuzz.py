"""Damages HLO texts and says whether the reader behaved.

    python -m tests.hlo_fuzz 100000 [SEED]   # by hand, all small texts of tests/

The reader may read a damaged text or refuse it with ValueError. It may not

- raise anything else, or take longer than `SECONDS`;
- read a wrong zero. Take the lines that a mutation left alone. Where one of them is a
  collective, or a matrix product, and the mutated text still leads from its entry to
  the computation it stands in (found here by regular expressions of its own), a ledger
  with none of that kind, though that of the whole text has some, is wrong, unless it
  says why itself: a loop that runs 0 times, or a branch that is left out.
"""

import collections
import dataclasses
import gzip
import pathlib
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from sharding.hlo import Ledger, read_ledger

HERE = pathlib.Path(__file__).resolve().parent
SECONDS = 5.0
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\w.\-]+|\s+|[^\w\s]')
_HEADER = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*->.*\{\s*$")
_CALLS = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
# What a line holds -> kinds of the ledger that it may be counted as.
_KINDS = {
    re.compile(r" (?:all-reduce|reduce-scatter)(?:-start)?\("): {
        "all-reduce",
        "reduce-scatter",
    },
    re.compile(r" all-gather(?:-start)?\("): {"all-gather"},
    re.compile(r" (?:ragged-)?all-to-all(?:-start)?\("): {"all-to-all"},
    re.compile(r" collective-permute(?:-start)?\("): {"permute"},
    re.compile(r" collective-broadcast(?:-start)?\("): {"broadcast"},
    re.compile(r" (?:dot|convolution)\("): {"product"},
}
_ODD = [
    "\0",
    "\x7f",
    "é",
    "\u2028",
    "😀",
    "\t",
    "\r",
    "\\",
    '"',
    "'",
    "<",
    "%",
    "{",
    ")",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """A text as a compiler made it, and its lines that must not be lost."""

    name: str
    text: str
    lines: frozenset[tuple[str, frozenset[str]]]


def base(name: str, text: str) -> Base:
    """Returns `text` with the lines whose loss shows, and what each is counted as."""
    counted = _kinds(read_ledger(text))
    return Base(
        name=name,
        text=text,
        lines=frozenset(
            (line, frozenset(kinds))
            for line in _reached_lines(text)
            for pattern, kinds in _KINDS.items()
            if kinds & counted and pattern.search(line)
        ),
    )


def _kinds(ledger: Ledger) -> set[str]:
    kinds = {collective.kind for collective in ledger.collectives}
    return kinds | ({"product"} if ledger.matmul_flops else set())


def bases(largest: int) -> list[Base]:
    """Returns the committed texts of at most `largest` characters."""
    found = []
    for path in sorted(HERE.glob("foreign/hlo/*.gz")) + sorted(
        HERE.glob("data/hlo/*.hlo")
    ):
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
        if len(text) <= largest:
            found.append(base(path.name, text))
    return found


def _reached_lines(text: str) -> Iterator[str]:
    """Yields the lines of the entry and of what it calls, directly or not."""
    bodies: dict[str, list[str]] = collections.defaultdict(list)
    name, entry = "", ""
    for line in text.split("\n"):
        if not line.startswith(" ") and (header := _HEADER.match(line)):
            name = header[1]
            entry = name if line.startswith("ENTRY") else entry
        elif line.startswith(" "):
            bodies[name].append(line)
    waiting, seen = [entry], {entry}
    while waiting:
        for line in bodies[waiting.pop()]:
            yield line
            for one, several in _CALLS.findall(line):
                for called in re.findall(r"[\w.\-]+", f"{one} {several}"):
                    if called not in seen:
                        seen.add(called)
                        waiting.append(called)


def _tokens(rng: random.Random, line: str, edit: Callable[[list[str], int], None]):
    tokens = _TOKEN.findall(line)
    if tokens:
        edit(tokens, rng.randrange(len(tokens)))
    return "".join(tokens)


def _delete_token(rng: random.Random, line: str) -> str:
    return _tokens(rng, line, lambda t, i: t.__delitem__(i))


def _double_token(rng: random.Random, line: str) -> str:
    return _tokens(rng, line, lambda t, i: t.insert(i, t[i]))


def _swap_tokens(rng: random.Random, line: str) -> str:
    def edit(tokens: list[str], i: int) -> None:
        j = rng.randrange(len(tokens))
        tokens[i], tokens[j] = tokens[j], tokens[i]

    return _tokens(rng, line, edit)


def _edit_number(rng: random.Random, line: str) -> str:
    numbers = list(re.finditer(r"\d+", line))
    if not numbers:
        return line
    at = rng.choice(numbers)
    old = int(at[0][:18])
    new = rng.choice([0, 1, -1, old + 1, old * 2, 10**9, 10**30, rng.randrange(100)])
    return f"{line[: at.start()]}{new}{line[at.end() :]}"


def _cut(rng: random.Random, line: str) -> str:
    return line[: rng.randrange(len(line) + 1)]


def _damage_bracket(rng: random.Random, line: str) -> str:
    places = [i for i, c in enumerate(line) if c in '(){}[]"']
    if not places:
        return line
    at = rng.choice(places)
    return line[:at] + rng.choice(["", *'(){}[]"']) + line[at + 1 :]


def _edit_shape(rng: random.Random, line: str) -> str:
    shapes = list(re.finditer(r"\b[a-z]+\d*\w*\[[\d,]*\]", line))
    if not shapes:
        return line
    at = rng.choice(shapes)
    new = rng.choice(
        ["f32[]", "s32[]", "pred[]", "bf16[3,5,7]", "f4e2m1fn[9]", "token[]", "f33[2]",
         "f32[0]", "f32[<=4]", "(f32[2], s32[])", "()", "u8[99999999999]"]
    )  # fmt: skip
    return line[: at.start()] + new + line[at.end() :]


def _swap_operands(rng: random.Random, line: str) -> str:
    names = list(re.finditer(r"%[\w.\-]+", line))
    if len(names) < 2:
        return line
    a, b = sorted(rng.sample(names, 2), key=lambda m: m.start())
    between = line[a.end() : b.start()]
    return line[: a.start()] + b[0] + between + a[0] + line[b.end() :]


def _insert_odd(rng: random.Random, line: str) -> str:
    at = rng.randrange(len(line) + 1)
    return line[:at] + rng.choice(_ODD) * rng.choice([1, 1, 3]) + line[at:]


_EDITS = (
    _delete_token, _double_token, _swap_tokens, _edit_number, _edit_number, _cut,
    _damage_bracket, _edit_shape, _swap_operands, _insert_odd,
)  # fmt: skip


def mutate(rng: random.Random, text: str) -> str:
    """Returns `text` with one to three things wrong."""
    lines = text.split("\n")
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.randrange(len(lines))
        if " = " not in lines[at] and rng.random() < 0.8:
            at = rng.randrange(len(lines))  # fewer of the tables, more instructions
        what = rng.random()
        if what < 0.05:
            del lines[at]
        elif what < 0.08:
            lines.insert(at, rng.choice(lines))
        elif what < 0.11:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif what < 0.12:
            del lines[at:]
        else:
            lines[at] = rng.choice(_EDITS)(rng, lines[at])
        lines = lines or [""]
    return "\n".join(lines)


class TooSlowError(BaseException):
    """A case ran into the alarm; no handler of the reader's may swallow it."""


def judge(case: Base, text: str) -> str:
    """Returns what is wrong with how `text`, a mutation of `case`, is read, or ""."""
    try:
        ledger = read_ledger(text)
    except ValueError as error:
        return "" if len(str(error)) > 10 else f"says nothing: {error!r}"
    except TooSlowError:
        return f"longer than {SECONDS} s"
    except BaseException as error:
        return f"raised {error!r}"
    if any(loop.trip_count == 0 for loop in ledger.loops):
        return ""
    if any("leaves out" in warning for warning in ledger.warnings):
        return ""
    counted = _kinds(ledger)
    missing = [(line, kinds) for line, kinds in case.lines if not kinds & counted]
    reached = set(_reached_lines(text)) if missing else set()
    lost = [
        f"no {min(kinds)}, but {line}" for line, kinds in missing if line in reached
    ]
    return min(lost, default="")


def run(found: list[Base], cases: int, seed: int) -> collections.Counter[str]:
    """Returns what was wrong, with how many cases; `cases` of them, in turn."""
    wrong: collections.Counter[str] = collections.Counter()

    def alarm(*_: Any) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, alarm)
    try:
        for number in range(cases):
            rng = random.Random(f"{seed}/{number}")
            case = found[number % len(found)]
            text = mutate(rng, case.text)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            verdict = judge(case, text)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if verdict:
                wrong[f"{case.name} {seed}/{number}: {verdict}"] += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return wrong


if __name__ == "__main__":
    started = time.time()
    texts = bases(12_000)
    findings = run(texts, int(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 0)
    for finding in list(findings)[:60]:
        print(finding)
    print(
        f"{sys.argv[1]} cases of {len(texts)} texts, {len(findings)} findings,"
        f" {time.time() - started:.0f} s"
    )
