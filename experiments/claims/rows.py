"""Rows: what claims are judged by; a record without what no claim needs.

A record of a sweep is some kilobytes, most of them collectives by source line. A row
has its question, its times and their parts, bytes and memory, and nothing that differs
between two runs of the same code, so that rows of a later run can be compared byte for
byte. Its key is a digest of its question alone.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

from experiments.claims.printed import NODE_DEVICES, Case
from experiments.report import validated
from experiments.report.record import PhaseRecord, Record, TimeParts, decode, digest
from sharding.chips import CHIPS

FILE_NAME = "rows.jsonl"
# What a point's context says of chips that are not there: see `programs.Priced`.
LINKS, MEMORY = "links", "memory"
RUN = "run"  # what a timed point's context says of the folder it is from
ANY_MEMORY = "any"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseRow:
    """One phase's program, of one device for one call.

    Attributes:
      wire_bytes: sent, by mesh axis.
      unrolled_ticks: whether a pipeline's are; null in prefill and with one stage.
      others: as in a `PhaseRecord`.
    """

    flops: int
    hbm_bytes: int
    wire_bytes: Mapping[str, int]
    weights_bytes: int
    kv_bytes: int
    activations_bytes: int
    peak_bytes: int
    unrolled_ticks: bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One point and what was found; other fields are those of a `Record`.

    Attributes:
      whole: compiled with every layer; else carried there, see `depth`.
      links: rate of every link, in times the chip's published one; None where the
        point is priced as the chip is, calibrated or not.
      memory: "own", or "any" where the chip is given as much as the point needs, to
        see what it would do if that were all.
      rates: where the chip's are from, in words.
      run: the folder of a measured point; None where nothing was run.
      choices: how its programs were asked to be written, or "".
    """

    key: str
    origin: str
    whole: bool
    status: str
    reason: str | None
    model: str
    target: str
    chip: str
    links: float | None
    memory: str
    rates: str
    run: str | None
    choices: str
    num_chips: int
    partition: str
    rules: str
    dtype: str
    weights: str
    kv: str
    batch_size: int
    input_len: int
    output_len: int
    asked_micro_batches: int | None
    micro_batches: int | None
    needed_bytes: int | None
    available_bytes: int | None
    ttft_s: float | None
    tpot_s: float | None
    ttft_limit_s: float | None
    tpot_limit_s: float | None
    ttft_parts_s: Mapping[str, float] | None
    tpot_parts_s: Mapping[str, float] | None
    predicted_ttft_s: float | None
    predicted_tpot_s: float | None
    prefill: PhaseRow | None
    decode: PhaseRow | None

    @classmethod
    def of(cls, record: Record, *, whole: bool = True) -> Self:
        """Returns what claims need of `record`."""
        same = (
            "origin", "status", "reason", "model", "target", "chip", "num_chips",
            "partition", "rules", "dtype", "batch_size", "input_len", "output_len",
            "asked_micro_batches", "micro_batches", "needed_bytes", "available_bytes",
            "ttft_s", "tpot_s", "ttft_limit_s", "tpot_limit_s", "predicted_ttft_s",
            "predicted_tpot_s",
        )  # fmt: skip
        links = float(record.context[LINKS]) if LINKS in record.context else None
        memory = record.context.get(MEMORY, "own")
        found = cls(
            key="",
            whole=whole,
            weights=record.weights or record.dtype,
            kv=record.kv or record.dtype,
            links=links,
            memory=memory,
            rates=_rates(record.chip, links),
            run=record.context.get(RUN),
            choices=validated.choices_of(record),
            ttft_parts_s=_parts(record.ttft_parts_s),
            tpot_parts_s=_parts(record.tpot_parts_s),
            prefill=_phase(record.prefill),
            decode=_phase(record.decode),
            **{name: getattr(record, name) for name in same},
        )
        return dataclasses.replace(found, key=found.key_with(memory))

    def key_with(self, memory: str) -> str:
        """Returns the key of this question of a chip with such `memory`."""
        question = [*_identity(self), memory]
        return digest(json.dumps(question))[:10]

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def require(self, name: str) -> float:
        """Returns the figure called `name`, which this row must have."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"{name} was asked of row {self.key} ({self.partition} at batch"
                f" {self.batch_size}), whose status is {self.status!r}: {self.reason}."
                " Only points that are ok have times. Ask for `ok` first."
            )
        return value

    @property
    def twin(self) -> str:
        """Key that the row shares with that of the whole program."""
        return dataclasses.replace(self, whole=False).key_with(self.memory)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of the batch over its time from the first call to the last."""
        e2e_s = self.require("ttft_s") + self.require("tpot_s") * (self.output_len - 1)
        return self.batch_size * self.output_len / e2e_s

    @property
    def node_tokens_per_s(self) -> float:
        """Output tokens of a node of eight, replicas on the devices left over."""
        return self.tokens_per_s * NODE_DEVICES / self.num_chips

    def share(self, phase: str, part: str) -> float:
        """Returns the share of "ttft" or "tpot" that `part` takes, bubbles apart."""
        parts = getattr(self, f"{phase}_parts_s")
        return parts.get(part, 0.0) / self.require(f"{phase}_s")

    def to_json(self) -> str:
        """Returns the row as one line of JSON, times with 9 significant digits."""
        return json.dumps(_short(dataclasses.asdict(self)), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Self:
        return decode(cls, json.loads(line), "row")


class Rows:
    """Rows by what was asked; a row that was not made is None."""

    def __init__(self, rows: Iterable[Row]):
        self.all = sorted(rows, key=_order)
        self._by = {
            (_question(row), row.memory, row.whole): row
            for row in self.all
            if row.origin != "measured"
        }

    def get(
        self,
        case: Case,
        chip: str,
        partition: str,
        batch_size: int,
        *,
        rules: str = "megatron",
        links: float | None = None,
        memory: str = "own",
        micro_batches: int | None = None,
        whole: bool = False,
    ) -> Row | None:
        """Returns the prediction for a point, whether it fits or not."""
        question = (
            case.model, case.weights, case.kv, case.input_len, case.output_len, chip,
            partition, rules, batch_size, links, micro_batches,
        )  # fmt: skip
        return self._by.get((question, memory, whole))

    def timed(
        self, case: Case, chip: str, partition: str, batch_size: int, **also: object
    ) -> Row | None:
        """Returns a row with times: of the chip, or else of one with more memory.

        Arguments are those of `get`.
        """
        for memory in ("own", ANY_MEMORY):
            row = self.get(case, chip, partition, batch_size, memory=memory, **also)  # pyright: ignore[reportArgumentType]
            if row is not None and row.ok:
                return row
        return None

    def batches(self, case: Case, chip: str, partition: str) -> list[int]:
        """Returns the batch sizes at which `partition` fits on `chip`."""
        sizes = sorted({row.batch_size for row in self.all})
        found = [self.get(case, chip, partition, size) for size in sizes]
        return [row.batch_size for row in found if row is not None and row.ok]

    @property
    def measured(self) -> list[Row]:
        return [row for row in self.all if row.origin == "measured" and row.ok]


def read(path: Path) -> list[Row]:
    """Returns the rows of a file; none if it is not there."""
    if not path.exists():
        return []
    return [Row.from_json(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Writes `rows`, in an order that does not depend on how they came."""
    path.write_text("".join(f"{row.to_json()}\n" for row in Rows(rows).all))


def _question(row: Row) -> tuple[object, ...]:
    return (
        row.model, row.weights, row.kv, row.input_len, row.output_len, row.chip,
        row.partition, row.rules, row.batch_size, row.links, row.asked_micro_batches,
    )  # fmt: skip


def _identity(row: Row) -> tuple[object, ...]:
    """Returns what tells a row from others, its memory apart."""
    return (
        row.model, row.weights, row.kv, row.input_len, row.output_len, row.target,
        row.chip, row.partition, row.rules, row.batch_size, row.links,
        row.asked_micro_batches, row.whole,
        row.origin == "measured" and [row.run, row.choices],
    )  # fmt: skip


def _order(row: Row) -> tuple[str, ...]:
    return tuple(
        f"{x:012.3f}" if isinstance(x, int | float) else str(x)
        for x in (*_identity(row), row.memory)
    )


def _rates(name: str, links: float | None) -> str:
    chip = CHIPS.get(name)
    if chip is None:  # measured, and priced by a file of its own
        return name
    return (chip if links is None else chip.published()).rates_from


def _parts(parts: TimeParts | None) -> dict[str, float] | None:
    return None if parts is None else {n: s for n, s in parts.items() if s}


def _phase(phase: PhaseRecord | None) -> PhaseRow | None:
    if phase is None:
        return None
    wire: dict[str, int] = {}
    for row in phase.collectives:
        wire[row.axis] = wire.get(row.axis, 0) + row.wire_bytes
    return PhaseRow(
        flops=phase.flops,
        hbm_bytes=phase.hbm_bytes,
        wire_bytes=dict(sorted(wire.items())),
        weights_bytes=phase.memory.weights_bytes,
        kv_bytes=phase.memory.kv_bytes,
        activations_bytes=phase.memory.activations_bytes,
        peak_bytes=phase.memory.peak_bytes,
        unrolled_ticks=phase.unrolled_ticks,
    )


def _short(value: object) -> object:
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    return float(f"{value:.9g}") if isinstance(value, float) else value
