"""One point of an experiment and everything found out about it: one JSON line.

A `Point` holds the inputs that determine an answer; a `Record` is a point with
its answer. Records are the only thing that reports, tables, plots and notebooks
read. Names end in their unit (`_s`, `_bytes`) and nothing is scaled here.

    status          what it means                                    `fits`
    ok              compiled, fits, every figure is present          true
    does not fit    compiled or refused by the compiler for memory   false
    refused         the combination is invalid; never compiled       false
    failed          the evaluation broke; redone by the next sweep   null

Figures that a point does not have are null. A phase (`prefill`, `decode`) is of
ONE device for ONE call: the whole batch in prefill, one token for the whole
batch in decode.
"""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Self

from experiments.report.measurement import Measurement

SCHEMA = 1
STATUSES = ("ok", "does not fit", "refused", "failed")
ORIGINS = ("measured", "compiled", "modelled")
_ADDED = {"added": True}  # marks fields that older records lack; they are null then


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """The inputs of one evaluation; equal points have equal answers.

    Attributes:
      model: preset name or path of a Hugging Face `config.json`.
      target: what is compiled for, e.g. "h100:8".
      chip: whose rates cost the program, e.g. "h100".
      partition: e.g. "tp4_pp2".
      rules: name of the rule table.
      num_chips: of the target.
      num_devices: JAX devices of the target; a chip may show two.
      layers: "unrolled", "scanned", or "auto" where each phase has its own.
      asked_micro_batches: into which prefill is cut; None leaves it to the program.
      weights: format in which matrices are stored, such as "int8"; None: `dtype`.
      kv: format of the cache; None: `dtype`.
      context: digests and versions of everything else that determines the answer
        (code, model config, chip file, jax, plugins, compiler flags). Two points
        that differ only here are never mixed in one report.
    """

    model: str
    target: str
    chip: str
    num_chips: int
    num_devices: int
    partition: str
    rules: str
    dtype: str
    layers: str
    batch_size: int
    input_len: int
    output_len: int
    asked_micro_batches: int | None = None
    weights: str | None = None
    kv: str | None = None
    context: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        """Identity of the point in a results file, 16 hexadecimal digits."""
        inputs = {"schema": SCHEMA, **dataclasses.asdict(self)}
        return digest(json.dumps(inputs, sort_keys=True))

    def __str__(self) -> str:
        return (
            f"{self.model} {self.target} {self.partition} {self.rules}"
            f" batch {self.batch_size}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeParts:
    """Where a time goes, in seconds; the parts add up to it.

    Attributes:
      links: exposed communication by mesh axis.
      bubble: idle ticks of a pipeline.
    """

    compute: float
    hbm: float
    links: Mapping[str, float]
    overhead: float
    bubble: float

    def items(self) -> list[tuple[str, float]]:
        """Returns (part, seconds), every link axis being its own part."""
        links = [(f"{axis} links", s) for axis, s in self.links.items()]
        return [
            ("compute", self.compute),
            ("hbm", self.hbm),
            *links,
            ("overhead", self.overhead),
            ("bubble", self.bubble),
        ]

    @property
    def total_s(self) -> float:
        return math.fsum(seconds for _, seconds in self.items())

    @property
    def bottleneck(self) -> str:
        """Name of the largest part."""
        return max(self.items(), key=lambda item: item[1])[0]

    def plus(self, other: Self, times: float) -> "TimeParts":
        """Returns these parts and `times` the `other` ones."""
        axes = [*self.links, *(a for a in other.links if a not in self.links)]
        return TimeParts(
            compute=self.compute + times * other.compute,
            hbm=self.hbm + times * other.hbm,
            links={
                a: self.links.get(a, 0.0) + times * other.links.get(a, 0.0)
                for a in axes
            },
            overhead=self.overhead + times * other.overhead,
            bubble=self.bubble + times * other.bubble,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectiveRow:
    """All executions of one collective in one call of one device."""

    axis: str
    kind: str
    count: int
    payload_bytes: int
    payload_bytes_each: int
    wire_bytes: int
    group_size: int
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """Bytes of one device while the phase runs, by category."""

    weights_bytes: int
    kv_bytes: int
    activations_bytes: int
    other_bytes: int
    peak_bytes: int

    def items(self) -> list[tuple[str, int]]:
        """Returns (category, bytes) without the peak."""
        return [
            ("weights", self.weights_bytes),
            ("KV cache", self.kv_bytes),
            ("activations", self.activations_bytes),
            ("other", self.other_bytes),
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseRecord:
    """One phase's program, of one device for one call.

    Attributes:
      layers: "unrolled" or "scanned".
      flops: from the optimised HLO, loops multiplied by their trip counts.
      closed_form_flops: what the formula says, for comparison.
      xla_flops: what XLA itself reports; null where it reports nothing.
      ticks: equal steps of the pipeline; each stage is busy in `busy_ticks`.
      bottleneck: largest part of the phase's estimated time; null without one.
      pct_of_limit: 100 * least possible time / time, as measured or else estimated.
      mfu: FLOPs the model needs / (time * peak), as a fraction.
      mbu: bytes the model must move / (time * bandwidth), as a fraction.
      attention: how a prompt's is computed; null in decode.
      unrolled_ticks: whether decode's ticks are; null with one stage.
      token_attention: kernel of a decoded token's; null for ordinary operations.
      residual: kernel that adds its products up; null for ordinary operations.
      prompt_residual: kernel that adds a prompt's up; null for ordinary operations.
      overlap: what of a prompt runs while devices sum; null for nothing.
      last_layer: of which of a prompt's positions it computes all; null for all.
      rotation: how a prompt's queries and keys are turned; null for halves joined.
      compiler_options: of XLA that this program was given; null for the target's alone.
    """

    layers: str
    flops: int
    hbm_bytes: int
    collectives: tuple[CollectiveRow, ...]
    memory: MemoryRow
    compile_s: float
    ticks: int
    busy_ticks: int
    closed_form_flops: float | None
    xla_flops: float | None
    bottleneck: str | None = None
    pct_of_limit: float | None = None
    mfu: float | None = None
    mbu: float | None = None
    attention: str | None = dataclasses.field(default=None, metadata=_ADDED)
    unrolled_ticks: bool | None = dataclasses.field(default=None, metadata=_ADDED)
    token_attention: str | None = dataclasses.field(default=None, metadata=_ADDED)
    residual: str | None = dataclasses.field(default=None, metadata=_ADDED)
    prompt_residual: str | None = dataclasses.field(default=None, metadata=_ADDED)
    overlap: str | None = dataclasses.field(default=None, metadata=_ADDED)
    last_layer: str | None = dataclasses.field(default=None, metadata=_ADDED)
    rotation: str | None = dataclasses.field(default=None, metadata=_ADDED)
    compiler_options: Mapping[str, str] | None = dataclasses.field(
        default=None, metadata=_ADDED
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Which code, versions and command made a record, and when (UTC)."""

    commit: str
    dirty: bool
    python: str
    versions: Mapping[str, str]
    flags: Mapping[str, str]
    command: str
    time: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A point and its answer; the fields are explained in the module and in `METRICS`.

    Times and rates of a measured record are measured; its parts add up to the
    predicted times beside them, and are null where there is no prediction.

    Raises:
      ValueError: a figure is missing or present against `status`, is negative or
        not finite, or parts do not add up to their total.
    """

    schema: int = SCHEMA
    key: str
    origin: str
    status: str
    model: str
    target: str
    chip: str
    num_chips: int
    num_devices: int
    partition: str
    rules: str
    dtype: str
    layers: str
    batch_size: int
    input_len: int
    output_len: int
    context: Mapping[str, str]
    micro_batches: int | None
    fits: bool | None
    reason: str | None
    needed_bytes: int | None
    available_bytes: int | None
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
    output_tokens_per_s: float | None
    tokens_per_s_per_user: float | None
    tokens_per_s_per_chip: float | None
    ttft_limit_s: float | None
    tpot_limit_s: float | None
    bottleneck: str | None
    ttft_parts_s: TimeParts | None
    tpot_parts_s: TimeParts | None
    prefill: PhaseRecord | None
    decode: PhaseRecord | None
    provenance: Provenance
    asked_micro_batches: int | None = dataclasses.field(default=None, metadata=_ADDED)
    weights: str | None = dataclasses.field(default=None, metadata=_ADDED)
    kv: str | None = dataclasses.field(default=None, metadata=_ADDED)
    predicted_ttft_s: float | None = dataclasses.field(default=None, metadata=_ADDED)
    predicted_tpot_s: float | None = dataclasses.field(default=None, metadata=_ADDED)
    measurement: Measurement | None = dataclasses.field(default=None, metadata=_ADDED)

    def __post_init__(self) -> None:
        where = f"record of {self.partition} at batch {self.batch_size}"
        if self.schema != SCHEMA:
            raise ValueError(
                f"{where} has schema {self.schema}; this code reads {SCHEMA}. Read it"
                " with the code that wrote it, or sweep into another folder."
            )
        if self.status not in STATUSES or self.origin not in ORIGINS:
            raise ValueError(
                f"{where} has status {self.status!r} and origin {self.origin!r};"
                f" known are {STATUSES} and {ORIGINS}."
            )
        fits = {"ok": True, "failed": None}.get(self.status, False)
        if self.fits is not fits:
            raise ValueError(
                f"{where} has status {self.status!r} and fits={self.fits};"
                f" that status goes with fits={fits}."
            )
        figures = {name: getattr(self, name) for name in _FIGURES}
        measured = self.origin == "measured"
        if (self.measurement is not None) != (measured and self.status == "ok"):
            raise ValueError(
                f"{where} is {self.origin} and {self.status!r}, but its measurement is"
                f" {self.measurement}; exactly what was measured has one."
            )
        if self.status == "ok":
            optional = _OF_PREDICTION if measured else ()
            missing = [
                name
                for name, value in figures.items()
                if value is None and name not in optional
            ]
            if missing or self.reason is not None:
                raise ValueError(
                    f"{where} is ok but lacks {missing}, reason={self.reason!r}."
                )
            for total, parts in (
                (self.predicted_ttft_s if measured else self.ttft_s, self.ttft_parts_s),
                (self.predicted_tpot_s if measured else self.tpot_s, self.tpot_parts_s),
            ):
                stated = None if parts is None else parts.total_s
                if stated is None and total is None:
                    continue
                if not math.isclose(total or 0.0, stated or 0.0, rel_tol=1e-6):
                    raise ValueError(
                        f"{where}: parts add up to {stated} s, not {total} s."
                    )
        else:
            found = [n for n in _METRICS if figures[n] is not None]
            if found or not self.reason:
                raise ValueError(
                    f"{where} has status {self.status!r} but states {found},"
                    f" reason={self.reason!r}; it needs a reason and no metric."
                )
        _refuse_bad_numbers(self, where)

    @classmethod
    def of(
        cls,
        point: Point,
        provenance: Provenance,
        *,
        status: str,
        reason: str | None = None,
        origin: str = "compiled",
        **answer: Any,
    ) -> Self:
        """Returns the record of `point`; figures not in `answer` are null.

        Example:
          >>> point = Point(model="m", target="cpu:1", chip="cpu", num_chips=1,
          ...               num_devices=1, partition="tp1", rules="megatron",
          ...               dtype="bfloat16", layers="scanned", batch_size=3,
          ...               input_len=5, output_len=7)
          >>> made = Provenance(commit="0", dirty=False, python="3", versions={},
          ...                   flags={}, command="", time="")
          >>> Record.of(point, made, status="refused", reason="as it must be").fits
          False
        """
        question = {f.name: getattr(point, f.name) for f in dataclasses.fields(point)}
        fits = {"ok": True, "failed": None}.get(status, False)
        return cls(
            key=point.key,
            status=status,
            fits=fits,
            reason=reason,
            origin=origin,
            provenance=provenance,
            **{**question, **dict.fromkeys(_FIGURES), **answer},
        )

    def require(self, name: str) -> float:
        """Returns the figure called `name`, which this record must have."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"{name} was asked of {self.partition} at batch {self.batch_size},"
                f" whose status is {self.status!r}: {self.reason}."
            )
        return value

    def to_json(self) -> str:
        """Returns the record as one line of JSON, without the line's end."""
        return json.dumps(
            dataclasses.asdict(self), allow_nan=False, separators=(",", ":")
        )

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Reads one line written by `to_json`.

        Raises:
          ValueError: not JSON, a field is missing, unknown or of another type.
        """
        data = json.loads(line)
        if isinstance(data, dict) and data.get("schema") != SCHEMA:
            raise ValueError(
                f"schema {data.get('schema')} was found; this code reads {SCHEMA}."
            )
        return decode(cls, data, "record")


_METRICS = (
    "ttft_s", "tpot_s", "e2e_s", "output_tokens_per_s", "tokens_per_s_per_user",
    "tokens_per_s_per_chip", "bottleneck", "ttft_parts_s", "tpot_parts_s",
)  # fmt: skip
_FIGURES = (
    *_METRICS, "micro_batches", "needed_bytes", "available_bytes", "ttft_limit_s",
    "tpot_limit_s", "prefill", "decode",
)  # fmt: skip
# Figures that a measured record does without, if what was run cannot be priced.
_OF_PREDICTION = ("bottleneck", "ttft_parts_s", "tpot_parts_s", "prefill", "decode")


def metrics(
    *,
    ttft_parts_s: TimeParts,
    tpot_parts_s: TimeParts,
    batch_size: int,
    output_len: int,
    num_chips: int,
) -> dict[str, Any]:
    """Returns the fields of a record that follow from the two phases' parts.

    The definitions are those of `METRICS`. `bottleneck` is the largest part of
    E2E; each phase names its own.

    Example:
      >>> step = TimeParts(compute=0, hbm=0.25, links={}, overhead=0, bubble=0)
      >>> found = metrics(ttft_parts_s=step, tpot_parts_s=step, batch_size=4,
      ...                 output_len=8, num_chips=2)
      >>> found["e2e_s"], found["output_tokens_per_s"], found["bottleneck"]
      (2.0, 16.0, 'hbm')
    """
    found = rates(
        ttft_s=ttft_parts_s.total_s,
        tpot_s=tpot_parts_s.total_s,
        batch_size=batch_size,
        output_len=output_len,
        num_chips=num_chips,
    )
    return dict(
        **found,
        bottleneck=ttft_parts_s.plus(tpot_parts_s, output_len - 1).bottleneck,
        ttft_parts_s=ttft_parts_s,
        tpot_parts_s=tpot_parts_s,
    )


def rates(
    *, ttft_s: float, tpot_s: float, batch_size: int, output_len: int, num_chips: int
) -> dict[str, float]:
    """Returns the fields of a record that follow from two times; see `METRICS`."""
    e2e_s = ttft_s + tpot_s * (output_len - 1)
    output_tokens_per_s = batch_size * output_len / e2e_s
    return dict(
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        e2e_s=e2e_s,
        output_tokens_per_s=output_tokens_per_s,
        tokens_per_s_per_user=1 / tpot_s,
        tokens_per_s_per_chip=output_tokens_per_s / num_chips,
    )


def digest(text: str) -> str:
    """Returns 16 hexadecimal digits that identify `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _refuse_bad_numbers(value: Any, where: str) -> None:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _refuse_bad_numbers(getattr(value, field.name), f"{where}, {field.name}")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _refuse_bad_numbers(item, f"{where}, {name}")
    elif isinstance(value, tuple):
        for item in value:
            _refuse_bad_numbers(item, where)
    elif isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{where} is {value}; figures are finite and not negative.")


def decode(kind: Any, value: Any, where: str) -> Any:
    """Builds `kind`, a dataclass or an annotation used in one, from parsed JSON."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        added = {f.name for f in dataclasses.fields(kind) if f.metadata.get("added")}
        if wrong := (hints.keys() ^ value.keys()) - (added - value.keys()):
            raise ValueError(
                f"{where} must have each of its fields once; missing or"
                f" unknown: {', '.join(sorted(wrong))}."
            )
        fields = {n: decode(hints[n], v, f"{where}.{n}") for n, v in value.items()}
        return kind(**fields)  # pyright: ignore[reportCallIssue]
    if origin is types.UnionType:
        (inner,) = (arg for arg in args if arg is not types.NoneType)
        return None if value is None else decode(inner, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(decode(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {n: decode(args[1], v, f"{where}.{n}") for n, v in value.items()}
    if kind is float and type(value) in (int, float):
        return float(value)
    if type(value) is kind:
        return value
    raise ValueError(f"{where} is {value!r}; it must be {kind}.")
