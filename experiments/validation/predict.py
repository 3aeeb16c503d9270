"""Predicts again what was measured, on a machine that has no such devices.

A measured record says what ran and how its programs were written. Where they were kept
beside it (`experiments.report.kept`) they are priced as they are; else they are written
so again by today's code and compiled for described devices of the kind that was used.
`evaluate.evaluate_phase` prices them, as it does every point of a sweep.
"""

import dataclasses
from pathlib import Path
from typing import Any

from experiments import evaluate
from experiments.report import kept, validated
from experiments.report.record import PhaseRecord, Point, Record
from experiments.report.validated import Figure
from sharding import attention, chips, choices
from sharding.chips import Chip
from sharding.program import CompiledProgram, Phase, Program
from sharding.target import GPUS, Target, parse_target

PHASES: dict[str, Phase] = {"ttft": "prefill", "tpot": "decode"}
# Fields of a `Program` that say how it is written, under the same name in a record.
_WRITING = ("layers", *validated.WRITING)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A record of a real run, and the folder it is in."""

    record: Record
    folder: Path

    def __str__(self) -> str:
        r = self.record
        asked = f",{validated.choices_of(r)}".rstrip(",").replace(",", ", ")
        where = f"{r.chip}: {r.partition} at batch {r.batch_size}"
        return f"{where}, {r.input_len:,} in{asked}"

    @property
    def source(self) -> str:
        return f"{self.folder.name}, {self.record.provenance.time}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What became of one measured point.

    Attributes:
      figures: of both phases, at all rates that were asked for.
      notes: what a reader of them must know.
    """

    figures: tuple[Figure, ...]
    notes: tuple[str, ...]


def predict(
    measured: Measured, *, chip: str | None = None, both_rates: bool = False
) -> Found:
    """Returns measured times beside predictions of today's code.

    Args:
      measured: the record.
      chip: price as this chip instead of the record's.
      both_rates: where the chip is calibrated, price by its published rates as well.

    Raises:
      ValueError: its devices are not described, or a program cannot be counted.
    """
    record = measured.record
    priced = [chip or record.chip]
    if both_rates and chips.find_chip(priced[0]).calibrated is not None:
        priced.append(f"{priced[0]}@published")
    figures, notes = list[Figure](), dict[str, None]()
    for metric, phase in PHASES.items():
        for name in priced:
            compiler = AsMeasured(measured, name)
            answer = compiler.answer(phase)
            notes |= dict.fromkeys(compiler.notes)
            if answer is None or answer.parts is None:
                continue
            rates = compiler.target(compiler.point).chip
            figures.append(figure(measured, metric, rates, answer.parts.total_s))
    return Found(figures=tuple(figures), notes=tuple(notes))


class NotAgain(Exception):
    """A program that is not kept and cannot be compiled again without its devices."""


class AsMeasured(evaluate.Compiler):
    """Makes the programs of a measured record, or finds them beside it.

    Args:
      measured: the record.
      chip: that prices them.
      without_devices: leave aside what was compiled where it ran.

    Attributes:
      name: of the described target.
      point: the question that the record answers, asked of that target.
      notes: how they were come by, where that matters.

    Raises:
      ValueError: there is no description of its devices.
    """

    def __init__(self, measured: Measured, chip: str, *, without_devices: bool = False):
        self.name = described(measured.record)
        self.point = point_of(measured.record, self.name)
        self.notes: list[str] = []
        self._measured = measured
        self._chip = chip
        self._without_devices = without_devices

    def answer(self, phase: Phase) -> evaluate.PhaseAnswer | None:
        """Returns what becomes of a phase; None if nothing, and a note says why."""
        try:
            answer = evaluate.evaluate_phase(self.point, phase, self)
        except NotAgain as error:
            self.notes.append(str(error))
            return None
        if answer.record is None:
            self.notes.append(f"No {phase} of {self._measured}: {answer.reason}")
            return None
        return answer

    def target(self, point: Point) -> Target:
        return parse_target(self.name, self._chip).first(point.num_devices)

    def choose(self, program: Program, target: Target, layers: str) -> Program:
        """Returns `program` as the record says that it was written."""
        ran: PhaseRecord | None = getattr(self._measured.record, program.phase)
        if ran is None:  # it could not be counted when it ran
            return program
        # A record without one of these fields is older than the choice.
        how: dict[str, Any] = {
            name: value for name in _WRITING if (value := getattr(ran, name, None))
        }
        how["ticks"] = "unrolled" if ran.unrolled_ticks else "scanned"
        how["compiler_options"] = tuple((ran.compiler_options or {}).items())
        cut = self._measured.record.micro_batches
        if program.phase == "prefill" and program.prefill_micro_batches != cut:
            how["micro_batches"] = cut
        asked = validated.choices_of(self._measured.record)
        changes = choices.read_changes(asked.split(",") if asked else ())
        return choices.change(dataclasses.replace(program, **how), changes)

    def compile(self, program: Program, target: Target) -> CompiledProgram:
        """Returns the program that was timed, or else one that is written like it."""
        one, phase = self._measured, program.phase
        file = kept.path(one.folder, one.record, phase)
        compiled, made = kept.read(file) if file.exists() else (None, {})
        attached = bool(made.get("attached"))
        if compiled is not None and not (attached and self._without_devices):
            if not attached:
                self.notes.append(
                    f"Programs of {one.folder.name} were compiled after it, from the"
                    " same commit and versions, for described devices."
                )
            return compiled
        if getattr(one.record, phase) is None:
            raise NotAgain(
                f"No {phase} of {one}: its record does not say how it was written, and"
                f" it is not kept in {file.parent}."
            )
        if attention.refusal(program.attention, program.config, program.dtype, target):
            raise NotAgain(
                f"No {phase} of {one}: it ran with attention {program.attention!r},"
                f" which is not compiled for {target.name}, and it is not kept in"
                f" {file.parent}."
            )
        if compiled is None:
            self.notes.append(
                f"Programs of {one} are not kept in {file.parent}: today's code wrote"
                " them again, and what it writes otherwise than then counts as an"
                " error."
            )
        return program.compile(target)


def described(record: Record) -> str:
    """Returns the target that stands for the devices of a measured record.

    Raises:
      ValueError: there is no description of such devices.
    """
    if record.target != "attached":
        return record.target
    assert record.measurement is not None
    kind = record.measurement.devices[0]
    for chip in chips.CHIPS.values():
        if kind in chip.device_kinds and chip.name in GPUS:
            return f"{chip.name}:{record.num_devices}"
    raise ValueError(
        f"cannot predict {record.partition} at batch {record.batch_size} again: it ran"
        f" on {record.num_devices} x {kind}, and GPUs described here are"
        f" {', '.join(GPUS)}. A program is compiled for the devices it was timed on."
        " Leave the record out, or validate on a machine that has them."
    )


def figure(measured: Measured, metric: str, chip: Chip, predicted_s: float) -> Figure:
    """Returns a measured time beside a prediction."""
    r = measured.record
    assert r.measurement is not None
    return Figure(
        metric=metric,
        model=r.model,
        chip=chip.name,
        rates=chip.rates_from,
        partition=r.partition,
        rules=r.rules,
        dtypes=validated.dtypes_of(r),
        layers=r.layers,
        asked_micro_batches=r.asked_micro_batches,
        choices=validated.choices_of(r),
        kernels=validated.kernels_of(r, metric),
        num_chips=r.num_chips,
        batch_size=r.batch_size,
        input_len=r.input_len,
        output_len=r.output_len,
        measured_s=r.require(f"{metric}_s"),
        spread=getattr(r.measurement, f"{metric}_spread"),
        predicted_s=predicted_s,
        recorded_s=getattr(r, f"predicted_{metric}_s"),
        source=measured.source,
    )


def point_of(record: Record, target: str) -> Point:
    """Returns the question that `record` answers, asked of a described target."""
    asked = {
        field.name: getattr(record, field.name) for field in dataclasses.fields(Point)
    }
    return Point(**{**asked, "target": target})
