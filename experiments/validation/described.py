"""What compiles with no device, beside what was compiled where it ran.

A measured record holds the counts of the program that was timed. The same program is
written again as the record says and compiled for described devices of that kind: if
both agree, so do estimates of machines that nobody has here.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from experiments import evaluate
from experiments.report import units
from experiments.report.record import PhaseRecord
from experiments.report.tables import Table, markdown
from experiments.validation.predict import AsMeasured, Measured

# Executions and payload bytes, by mesh axis and kind.
Sent = Mapping[tuple[str, str], tuple[int, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Counts of one program, compiled on its devices and for described ones.

    Attributes:
      what: partition, batch and run.
      phase: "prefill" or "decode".
      ran: of the program that was timed.
      described: of the one that no device was needed for.
    """

    what: str
    phase: str
    ran: PhaseRecord
    described: PhaseRecord

    @property
    def same_collectives(self) -> bool:
        return sent(self.ran) == sent(self.described)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """Pairs of one record, and why some have none."""

    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]


def sent(phase: PhaseRecord) -> Sent:
    """Returns what a call sends, lines of the program put together."""
    found: dict[tuple[str, str], tuple[int, int]] = collections.defaultdict(
        lambda: (0, 0)
    )
    for row in phase.collectives:
        count, payload = found[row.axis, row.kind]
        found[row.axis, row.kind] = count + row.count, payload + row.payload_bytes
    return dict(found)


def compare(measured: Measured) -> Described:
    """Returns both phases of a record that ran on attached devices.

    Raises:
      ValueError: its devices are not described, or a program cannot be counted.
    """
    pairs, notes = list[Pair](), dict[str, None]()
    for phase in evaluate.PHASES:
        ran: PhaseRecord | None = getattr(measured.record, phase)
        if ran is None:
            continue
        compiler = AsMeasured(measured, measured.record.chip, without_devices=True)
        answer = compiler.answer(phase)
        notes |= dict.fromkeys(compiler.notes)
        if answer is None or answer.record is None:
            continue
        what = f"{measured}; {measured.folder.name}"
        pairs.append(Pair(what=what, phase=phase, ran=ran, described=answer.record))
    return Described(pairs=tuple(pairs), notes=tuple(notes))


def work(pairs: Sequence[Pair]) -> Table:
    """Returns one row for each program; differences are (described - ran) / ran."""
    headings = (
        "program", "phase", "FLOPs", "described", "difference %", "HBM bytes",
        "described", "difference %",
    )  # fmt: skip
    rows = [
        [
            pair.what,
            pair.phase,
            *_both(pair.ran.flops, pair.described.flops, units.count),
            *_both(pair.ran.hbm_bytes, pair.described.hbm_bytes, units.bytes_),
        ]
        for pair in pairs
    ]
    return headings, rows


def collectives(pairs: Sequence[Pair]) -> Table:
    """Returns one row for each kind of collective of each program."""
    headings = (
        "program",
        "phase",
        "axis",
        "collective",
        "executions, bytes",
        "described",
    )
    rows = []
    for pair in pairs:
        ran, described = sent(pair.ran), sent(pair.described)
        for axis, kind in sorted({*ran, *described}):
            found = [_said(each.get((axis, kind))) for each in (ran, described)]
            rows.append([pair.what, pair.phase, axis, kind, *found])
    return headings, rows


def headline(pairs: Sequence[Pair]) -> str:
    """Returns in a sentence how far both are apart."""
    same = sum(pair.same_collectives for pair in pairs)
    flops, hbm = (
        max(abs(getattr(p.described, f) / getattr(p.ran, f) - 1) for p in pairs)
        for f in ("flops", "hbm_bytes")
    )
    return (
        f"Compiled with no device, {same} of {len(pairs)} programs have the collectives"
        " (axis, kind, executions, payload) of the program that ran; FLOPs differ by"
        f" {100 * flops:.2f} % at most, HBM bytes by {100 * hbm:.1f} %."
    )


def as_markdown(pairs: Sequence[Pair]) -> str:
    """Returns the section of a page of docs."""
    if not pairs:
        return "No record of attached devices."
    tables = map(markdown, (work(pairs), collectives(pairs)))
    return "\n\n".join([headline(pairs), *tables])


def _both(ran: int, described: int, unit: Callable[[float], str]) -> list[str]:
    difference = f"{100 * (described / ran - 1):+.2f}" if ran else "-"
    return [unit(ran), unit(described), difference]


def _said(found: tuple[int, int] | None) -> str:
    return f"{found[0]} x, {units.bytes_(found[1])}" if found else "none"
