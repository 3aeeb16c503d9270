"""What is best: the Pareto frontier, the winners, and who meets an objective."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from experiments.report.record import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Service-level objective: longest TTFT and TPOT, least throughput; or None."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    output_tokens_per_s: float | None = None

    @classmethod
    def of_ms(
        cls,
        *,
        ttft_ms: float | None,
        tpot_ms: float | None,
        min_tokens_per_s: float | None = None,
    ) -> "Objective":
        """Returns the objective written in milliseconds, as on the command line."""
        return cls(
            ttft_s=None if ttft_ms is None else ttft_ms / 1e3,
            tpot_s=None if tpot_ms is None else tpot_ms / 1e3,
            output_tokens_per_s=min_tokens_per_s,
        )

    @property
    def given(self) -> bool:
        return any(value is not None for value in dataclasses.astuple(self))

    def met(self, record: Record) -> bool:
        """Whether `record` has times and none is longer than allowed."""
        if record.status != "ok":
            return False
        least = self.output_tokens_per_s
        return (
            (self.ttft_s is None or record.require("ttft_s") <= self.ttft_s)
            and (self.tpot_s is None or record.require("tpot_s") <= self.tpot_s)
            and (least is None or record.require("output_tokens_per_s") >= least)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Winner:
    """The best record by one measure.

    Attributes:
      near: others within `NEAR` of it, nearest first, with their distance as a
        fraction of the best figure. Estimates are not good enough to tell those
        apart.
    """

    record: Record
    near: tuple[tuple[Record, float], ...]


NEAR = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """Records that answer one question: how to share one model on one target."""

    model: str
    target: str
    chip: str
    dtype: str
    weights: str | None
    kv: str | None
    input_len: int
    output_len: int
    layers: str
    records: tuple[Record, ...]

    @property
    def stored(self) -> str:
        """Formats in words, e.g. "bfloat16, weights int8"."""
        own = {"weights": self.weights, "KV cache": self.kv}
        return ", ".join(
            [self.dtype, *(f"{what} {form}" for what, form in own.items() if form)]
        )

    @property
    def num_chips(self) -> int:
        """Of the target; measured partitions may each use fewer of them."""
        return max(r.num_chips for r in self.records)

    @property
    def num_devices(self) -> int:
        return max(r.num_devices for r in self.records)

    @property
    def measured(self) -> bool:
        """Whether times are measured, and predictions stand beside them."""
        return any(r.measurement is not None for r in self.records)

    @property
    def ok(self) -> list[Record]:
        return [r for r in self.records if r.status == "ok"]

    @property
    def not_ok(self) -> list[Record]:
        return [r for r in self.records if r.status != "ok"]

    @property
    def batch_sizes(self) -> list[int]:
        return sorted({r.batch_size for r in self.records})

    @property
    def many_rules(self) -> bool:
        return len({r.rules for r in self.records}) > 1

    def label(self, record: Record) -> str:
        """Name of a record's series: its partition, and its rules if they vary.

        With micro-batches where a number was asked for, as in "tp4_pp2 M8".
        """
        name = record.partition
        if self.many_rules:
            name += f" {record.rules}"
        if record.asked_micro_batches is not None:
            name += f" M{record.asked_micro_batches}"
        return name


def questions(records: Iterable[Record]) -> list[Question]:
    """Groups records into questions, each sorted by batch size and partition."""
    groups: dict[tuple[object, ...], list[Record]] = {}
    names = [f.name for f in dataclasses.fields(Question) if f.name != "records"]
    for record in records:
        groups.setdefault(tuple(getattr(record, n) for n in names), []).append(record)
    return [
        Question(
            **dict(zip(names, key, strict=True)),  # pyright: ignore[reportArgumentType]
            records=tuple(
                sorted(
                    group,
                    key=lambda r: (r.batch_size, r.rules, partition_order(r.partition)),
                )
            ),
        )
        for key, group in groups.items()
    ]


def partition_order(name: str) -> tuple[int, int, int, str]:
    """Sort key of a partition's name: data, then stages, then tensor.

    Example:
      >>> sorted(["pp8", "tp4_pp2", "dp2_tp4", "tp8"], key=partition_order)
      ['tp8', 'tp4_pp2', 'pp8', 'dp2_tp4']
    """
    degrees = {"dp": 1, "pp": 1, "tp": 1}
    for part in name.split("_"):
        axis, degree = part[:2], part[2:]
        if axis in degrees and degree.isdigit():
            degrees[axis] = int(degree)
    return degrees["dp"], degrees["pp"], degrees["tp"], name


def pareto(
    records: Iterable[Record],
    x: str = "tokens_per_s_per_user",
    y: str = "tokens_per_s_per_chip",
) -> list[Record]:
    """Returns the records that no other beats in both `x` and `y`, by rising x.

    Records without figures are left out. Of exactly equal ones the first is kept.
    """
    ok = [r for r in records if r.status == "ok"]
    ok.sort(key=lambda r: (r.require(x), r.require(y)), reverse=True)
    best: list[Record] = []
    for record in ok:
        if not best or record.require(y) > best[-1].require(y):
            best.append(record)
    return best[::-1]


def least(records: Sequence[Record], name: str) -> Winner | None:
    """Returns the record with the smallest figure `name`; None if there is none."""
    return _winner(records, lambda r: r.require(name), lambda best, v: v / best - 1)


def most(records: Sequence[Record], name: str) -> Winner | None:
    """Returns the record with the largest figure `name`; None if there is none."""
    return _winner(records, lambda r: -r.require(name), lambda best, v: 1 - v / best)


def _winner(
    records: Sequence[Record],
    cost: Callable[[Record], float],
    distance: Callable[[float, float], float],
) -> Winner | None:
    ok = sorted((r for r in records if r.status == "ok"), key=cost)
    if not ok:
        return None
    near = [(r, distance(cost(ok[0]), cost(r))) for r in ok[1:]]
    return Winner(record=ok[0], near=tuple((r, d) for r, d in near if d <= NEAR))
