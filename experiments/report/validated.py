"""How far predictions were from measurements, and what that says of another one.

`experiments.validate --write` keeps one `Figure` for each time that was measured and
predicted again, in `validation.json` beside this file. A report shows beside a
prediction the `Band` of the figures that are like it: of the same chip, priced from
the same rates (published or measured), and of the same kind of partition, rules,
dtypes, phase and kernels. What nothing is like is not validated.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.report import files
from experiments.report.frontier import partition_order
from experiments.report.record import Record, decode
from sharding.tensor import MEGATRON

PATH = Path(__file__).with_name("validation.json")
SCHEMA = 1
METRICS = ("ttft", "tpot")
_CHOICE = "choice "  # begins their names in a record's context
# What a phase is written with, and how, by the fields of its record and `Program`.
KERNELS = ("attention", "token_attention", "residual", "prompt_residual", "overlap")
WRITING = (*KERNELS, "rotation", "last_layer")
NOT_VALIDATED = "not validated here"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One time of one point, measured and predicted.

    Attributes:
      metric: "ttft" or "tpot".
      model, chip, partition, rules, layers, batch_size, input_len, output_len: as in
        the record.
      dtypes: of activations, and of weights and cache where they have their own.
      asked_micro_batches: into which prefill was to be cut; null if that was left open.
      choices: how its programs were asked to be written, or "".
      kernels: that the phase was written with; see `kernels_of`.
      num_chips: that the partition uses.
      rates: where the chip's rates are from; see `Chip.rates_from`.
      measured_s: median of the samples.
      spread: their interquartile range / their median.
      predicted_s: by today's code.
      recorded_s: as it was predicted when it was measured; null if it was not.
      source: the folder of the record, and when it was made.
    """

    metric: str
    model: str
    chip: str
    rates: str
    partition: str
    rules: str
    dtypes: str
    layers: str
    asked_micro_batches: int | None
    choices: str
    kernels: str
    num_chips: int
    batch_size: int
    input_len: int
    output_len: int
    measured_s: float
    spread: float
    predicted_s: float
    recorded_s: float | None
    source: str

    @property
    def difference(self) -> float:
        """(predicted - measured) / measured; negative where predicted too fast."""
        return self.predicted_s / self.measured_s - 1

    @property
    def slower(self) -> float:
        """(measured - predicted) / predicted: what a prediction must be raised by."""
        return self.measured_s / self.predicted_s - 1

    @property
    def run(self) -> str:
        """The folder of the record."""
        return self.source.rpartition(", ")[0]

    @property
    def time(self) -> str:
        """When the record was made."""
        return self.source.rpartition(", ")[2]

    @property
    def label(self) -> str:
        """The partition, with its rules, choices and kernels if these are not usual."""
        own = {self.rules, self.choices.replace(",", ", ")} - {MEGATRON.name, ""}
        if not self.choices:
            own |= {k for k in self.kernels.split(", ") if k.startswith("triton")}
        return " ".join([self.partition, *sorted(own)])

    @property
    def kind(self) -> str:
        """Kind of partition; see `kind_of`."""
        return kind_of(self.partition)

    @property
    def alike(self) -> tuple[str, ...]:
        """What a prediction must share to have the error of this figure."""
        return (
            self.metric, self.chip, self.rates, self.kind, self.rules,
            self.dtypes, self.layers, self.choices, self.kernels,
        )  # fmt: skip


def kind_of(partition: str) -> str:
    """Returns which mesh axes a partition uses, whatever their degrees.

    Example:
      >>> [kind_of(name) for name in ("tp1", "tp8", "pp2", "tp2_pp4", "dp2_tp4")]
      ['one device', 'tensor', 'pipeline', 'tensor + pipeline', 'replicas + tensor']
    """
    data, stage, tensor, _ = partition_order(partition)
    degrees = {"replicas": data, "tensor": tensor, "pipeline": stage}
    used = [name for name, degree in degrees.items() if degree > 1]
    return " + ".join(used) or "one device"


def dtypes_of(record: Record) -> str:
    """Returns a record's dtype, and those of weights and cache if they have others."""
    own = {name: getattr(record, name, None) for name in ("weights", "kv")}
    return ", ".join(
        [record.dtype, *(f"{name} {dtype}" for name, dtype in own.items() if dtype)]
    )


def choices_of(record: Record) -> str:
    """Returns how a record's programs were asked to be written, "" if nothing was."""
    asked = [
        f"{name.removeprefix(_CHOICE)}={value}"
        for name, value in record.context.items()
        if name.startswith(_CHOICE)
    ]
    return ",".join(sorted(asked))


def kernels_of(record: Record, metric: str) -> str:
    """Returns which kernels a phase was written with, "" where a record says nothing.

    Attention in blocks, whose scores are in memory, says nothing of cuDNN's.
    """
    phase = record.prefill if metric == "ttft" else record.decode
    found = [getattr(phase, name, None) for name in KERNELS]
    return ", ".join(kernel for kernel in found if kernel)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Band:
    """How much slower than predicted measured programs of one kind were.

    Attributes:
      low, high: least and most, as fractions of the prediction; negative is faster.
      figures: behind it; at least one.
    """

    low: float
    high: float
    figures: tuple[Figure, ...]

    def __str__(self) -> str:
        """In a cell of a table, e.g. "+24 to +31 %"."""
        low, high = (f"{100 * part:+.0f}" for part in (self.low, self.high))
        return f"{low} %" if low == high else f"{low} to {high} %"

    def cell(self, partition: str) -> str:
        """Beside a prediction of `partition`, e.g. "+24 to +31 % (tp2)".

        In brackets which other partitions it was measured on, where that one was not.
        """
        measured = dict.fromkeys(f.partition for f in self.figures)
        return str(self) if partition in measured else f"{self} ({', '.join(measured)})"

    @property
    def sentence(self) -> str:
        """In words, with what it stands on."""
        low, high = sorted((abs(self.low), abs(self.high)))
        rounded = f"{100 * low:.0f}", f"{100 * high:.0f}"
        size = f"{'-'.join(dict.fromkeys(rounded))} %"
        if self.low >= 0 or self.high <= 0:
            found = f"{size} {'slower' if self.low >= 0 else 'faster'}"
        else:
            found = f"{-100 * self.low:.0f} % faster to {100 * self.high:.0f} % slower"
        points = f"{len(self.figures)} point{'s' * (len(self.figures) != 1)}"
        partitions = " and ".join(dict.fromkeys(f.partition for f in self.figures))
        models = " and ".join(dict.fromkeys(f.model for f in self.figures))
        return (
            f"measured programs of this kind were {found} on this chip: {points}"
            f" ({models}, {partitions}, {_range('batch', self.figures, 'batch_size')},"
            f" {_range('input', self.figures, 'input_len')})"
        )


def _range(name: str, figures: Sequence[Figure], field: str) -> str:
    values = sorted({getattr(figure, field) for figure in figures})
    ends = dict.fromkeys((values[0], values[-1]))
    return f"{name} {' to '.join(f'{value:,}' for value in ends)}"


def bands(figures: Iterable[Figure]) -> dict[tuple[str, ...], Band]:
    """Returns the band of every group of figures that are alike."""
    groups: dict[tuple[str, ...], list[Figure]] = {}
    for figure in figures:
        groups.setdefault(figure.alike, []).append(figure)
    return {
        alike: Band(
            low=min(f.slower for f in group),
            high=max(f.slower for f in group),
            figures=tuple(group),
        )
        for alike, group in groups.items()
    }


def band(
    record: Record, metric: str, known: Mapping[tuple[str, ...], Band] | None = None
) -> Band | None:
    """Returns the error band of a prediction, None where nothing measured is like it.

    A record that does not say where its chip's rates are from is older than any
    validation, and has none.

    Args:
      record: whose estimate is asked about.
      metric: "ttft" or "tpot".
      known: bands to choose from, instead of the committed ones.
    """
    known = committed() if known is None else known
    alike = (
        metric,
        record.chip,
        record.context.get("rates", ""),
        kind_of(record.partition),
        record.rules,
        dtypes_of(record),
        record.layers,
        choices_of(record),
        kernels_of(record, metric),
    )
    return known.get(alike)


@functools.cache
def committed() -> Mapping[tuple[str, ...], Band]:
    """Returns the bands of `validation.json`, none if there is no such file."""
    return bands(read(PATH)) if PATH.exists() else {}


def read(path: Path) -> list[Figure]:
    """Returns the figures of a file that `write` made.

    Raises:
      ValueError: it is no such file, or a figure is not a positive number.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        figures = [decode(Figure, one, "figure") for one in data["figures"]]
        for figure in figures:
            times = figure.measured_s, figure.predicted_s
            if not all(0 < time_s < math.inf for time_s in times):
                raise ValueError(f"{figure.partition} has the times {times}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"cannot read {path}: {error}. It holds measured times beside predicted"
            " ones. Make it again with: python -m experiments.validate --write"
        ) from error
    return figures


def write(path: Path, figures: Sequence[Figure], made: Mapping[str, Any]) -> None:
    """Writes figures, one a line, in one step.

    Args:
      path: the file.
      figures: at least one.
      made: by which versions, and when.
    """
    lines = ",\n".join(json.dumps(dataclasses.asdict(f)) for f in figures)
    head = f'"schema": {SCHEMA}, "made": {json.dumps(made)}'
    text = f'{{{head}, "figures": [\n{lines}\n]}}\n'
    files.replace(path, text)
