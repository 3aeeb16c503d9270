"""Programs of few layers, carried to the depth of the model.

Layers are alike: written one by one, each is the same kernels and collectives again. So
every figure of a program is a + b x layers, exactly but for what the compiler fuses
across the first and last one, and two shallow programs tell a and b. They compile in a
tenth of the time that the whole program takes. Some are compiled whole as well, and
stand beside what was carried.

In a pipeline it is layers of a stage that are counted, the fullest stage's.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.claims.rows import ANY_MEMORY, PhaseRow, Row
from experiments.report import units
from experiments.report.record import Record
from jaxllm import config as config_lib
from sharding.chips import find_chip
from sharding.partition import Partition

_TIMES = (
    "ttft_s", "tpot_s", "ttft_limit_s", "tpot_limit_s", "ttft_parts_s",
    "tpot_parts_s",
)  # fmt: skip
_CARRIED = (*_TIMES, "needed_bytes", "prefill", "decode")


def shallow(model: str, partition: str) -> tuple[str, str]:
    """Returns the models that stand for `model` under `partition`.

    Example:
      >>> shallow("llama-3.1-70b", "tp8"), shallow("llama-3.1-70b", "pp8")
      (('llama-3.1-70b@2', 'llama-3.1-70b@4'), ('llama-3.1-70b@8', 'llama-3.1-70b@16'))
    """
    stages = Partition.parse(partition).stage
    first = stages if stages > 1 else 2
    return f"{model}@{first}", f"{model}@{2 * first}"


def rows_of(records: Iterable[Record]) -> list[Row]:
    """Returns the rows that `records` of shallow and of whole programs say.

    A point whose second depth is missing has none. Measured records are rows as they
    are. Records of programs are of chips with any memory; the chip's own decides here
    what fits, and what does not is a row of its own.
    """
    rows: list[Row] = []
    pairs: dict[str, dict[int, Row]] = {}
    for record in records:
        if record.measurement is not None:
            rows.append(Row.of(record))
            continue
        model, _, layers = record.model.partition("@")
        row = Row.of(dataclasses.replace(record, model=model), whole=not layers)
        if not layers:
            rows += _by_memory(row)
        else:
            pairs.setdefault(row.key, {})[int(layers)] = row
    for found in pairs.values():
        if len(found) == 2:
            (first, a), (second, b) = sorted(found.items())
            partition = Partition.parse(a.partition)
            layers = max(partition.stage_layers(config_lib.load(a.model)))
            deep = layers * partition.stage
            rows += _by_memory(carry(a, b, (deep - first) / (second - first)))
    return rows


def carry(first: Row, second: Row, steps: float) -> Row:
    """Returns `first` + `steps` x (`second` - `first`), figure by figure.

    A point without figures, because it is refused, is returned as it is.
    """
    if not (first.ok and second.ok):
        return second if first.ok else first
    both = {name: (getattr(first, name), getattr(second, name)) for name in _CARRIED}
    found: dict[str, Any] = {n: _along(a, b, steps) for n, (a, b) in both.items()}
    phases = [phase for phase in (found["prefill"], found["decode"]) if phase]
    if phases:
        found["needed_bytes"] = max(phase.peak_bytes for phase in phases)
    return dataclasses.replace(first, **found)


def _along(a: Any, b: Any, steps: float) -> Any:
    if a is None or b is None or isinstance(a, bool):
        return a
    if isinstance(a, PhaseRow):
        fields = [field.name for field in dataclasses.fields(a)]
        row = PhaseRow(
            **{n: _along(getattr(a, n), getattr(b, n), steps) for n in fields}
        )
        # Temporaries never shrink with depth; XLA:TPU writes a loop over very few
        # layers otherwise than one over many, and holds more.
        first, second = (p.peak_bytes - p.activations_bytes for p in (a, b))
        held = max(row.activations_bytes, b.activations_bytes)
        peak = _along(first, second, steps) + held
        return dataclasses.replace(row, activations_bytes=held, peak_bytes=peak)
    if isinstance(a, Mapping):
        names = [*a, *(name for name in b if name not in a)]
        return {n: _along(a.get(n, 0), b.get(n, 0), steps) for n in names}
    value = max(0.0, a + steps * (b - a))
    return round(value) if isinstance(a, int) and isinstance(b, int) else value


def _by_memory(row: Row) -> list[Row]:
    """Returns the row of the chip's own memory; and, if it does not fit, of any."""
    needed = row.needed_bytes
    if not row.ok or needed is None:
        return [dataclasses.replace(row, memory="own")]
    available = int(find_chip(row.chip).per_device().hbm_bytes)
    row = dataclasses.replace(row, available_bytes=available)
    if needed <= available:
        return [dataclasses.replace(row, memory="own", key=row.key_with("own"))]
    nothing: dict[str, Any] = dict.fromkeys(_TIMES)
    own = dataclasses.replace(
        row,
        memory="own",
        key=row.key_with("own"),
        status="does not fit",
        reason=(
            f"needs {units.bytes_(needed)} a device, has {units.bytes_(available)}"
        ),
        **nothing,
    )
    return [own, dataclasses.replace(row, memory=ANY_MEMORY)]
