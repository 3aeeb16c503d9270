"""How good predictions are: mean error, worst error, and the order of partitions.

    difference = (predicted - measured) / measured
    MAPE       = mean of |difference|

The order of partitions is what a planner is asked for: whether those that were
predicted faster are faster, among the points that differ in nothing else. What a wrong
order costs is its regret:

    regret = measured(predicted best) / measured(best) - 1
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from experiments.report import validated
from experiments.report.frontier import partition_order
from experiments.report.validated import Figure

MOST_DRIFT = 0.03  # of MAPE, from what is committed
# What partitions are ranked by: the best is the least of the first two and the most of
# the last one.
RANKED = ("ttft", "tpot", "tokens/s/chip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Errors of some figures.

    Attributes:
      metric: "ttft" or "tpot".
      chip, rates: as in a figure.
      kind: of partition, or "all".
      points: how many.
      mape: mean absolute difference, a fraction.
      bias: mean difference, a fraction.
      worst: the figure with the largest absolute difference.
    """

    metric: str
    chip: str
    rates: str
    kind: str
    points: int
    mape: float
    bias: float
    worst: Figure


def summaries(figures: Sequence[Figure]) -> list[Summary]:
    """Returns the errors of each metric, chip and rates, all and by kind."""
    groups: dict[tuple[str, ...], list[Figure]] = {}
    for f in figures:
        for kind in ("all", f.kind):
            where = (f.metric, f.chip, f.rates, kind)
            groups.setdefault(where, []).append(f)
    names = ("metric", "chip", "rates", "kind")
    return [
        Summary(
            **dict(zip(names, where, strict=True)),
            points=len(group),
            mape=math.fsum(abs(f.difference) for f in group) / len(group),
            bias=math.fsum(f.difference for f in group) / len(group),
            worst=max(group, key=lambda f: abs(f.difference)),
        )
        for where, group in groups.items()
    ]


def as_recorded(figures: Sequence[Figure]) -> list[Figure]:
    """Returns figures with what was predicted when they were measured, where it was."""
    return [
        dataclasses.replace(f, predicted_s=f.recorded_s)
        for f in figures
        if f.recorded_s is not None
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """One partition among those it is compared with.

    Attributes:
      partition: its name.
      label: with how its program is written.
      measured, predicted: what it is ranked by; less is better.
      spread: of the measured one, as a fraction.
    """

    partition: str
    label: str
    measured: float
    predicted: float
    spread: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """The order of partitions at one batch, in one run.

    Attributes:
      by: one of `RANKED`.
      run: the folder of its records.
      superseded: a newer run ordered at least the same partitions.
      what: the rest of the question, e.g. "llama-3.1-8b, batch 16, 1,024 in, 128 out".
      places: in the measured order; a partition that is there twice, by its label.
      tied: pairs whose measured difference is within their spread.
      wrong: pairs, measured better first, that are predicted the other way round.
    """

    by: str
    run: str
    superseded: bool
    what: str
    chip: str
    rates: str
    batch_size: int
    places: tuple[Place, ...]
    tied: tuple[tuple[str, str], ...]
    wrong: tuple[tuple[str, str], ...]

    @property
    def agrees(self) -> bool:
        """Whether every pair that can be told apart is predicted in its order."""
        return not self.wrong

    @property
    def pairs(self) -> int:
        """Pairs that can be told apart."""
        return math.comb(len(self.places), 2) - len(self.tied)

    @property
    def regret(self) -> float:
        """How much longer the partition that is predicted best takes than the best.

        A fraction; of throughput, how many more chip-seconds a token costs.
        """
        chosen = min(self.places, key=lambda place: (place.predicted, -place.measured))
        return chosen.measured / self.places[0].measured - 1

    @property
    def measured(self) -> str:
        """The measured order, best first, e.g. "pp2 = tp2 < tp1"."""
        names = [place.partition for place in self.places]
        out = names[0]
        for before, after in itertools.pairwise(names):
            out += f" {'=' if (before, after) in self.tied else self._sign} {after}"
        return out

    @property
    def predicted(self) -> str:
        """The predicted order, best first."""
        best = sorted(self.places, key=lambda place: place.predicted)
        return f" {self._sign} ".join(place.partition for place in best)

    @property
    def _sign(self) -> str:
        return ">" if self.by == "tokens/s/chip" else "<"


def rankings(figures: Sequence[Figure]) -> list[Ranking]:
    """Returns the orders of partitions, wherever two or more can be compared.

    Of each measure those of the newest run come first.
    """
    times = {f.run: f.time for f in sorted(figures, key=lambda f: f.time)}
    groups = _points(sorted(figures, key=lambda f: times[f.run], reverse=True))
    found = []
    for by in RANKED:
        newer = list[set[tuple[Any, ...]]]()
        for group in groups:
            placed = {
                point: place
                for point, pair in group.items()
                if (place := _place(by, pair))
            }
            if len({place.label for place in placed.values()}) < 2:
                continue
            first = next(f for pair in group.values() for f in pair.values())
            superseded = any(placed.keys() <= points for points in newer)
            found.append(_ranking(by, first, [*placed.values()], superseded))
            newer.append({*placed})
    return found


def agreement(found: Iterable[Ranking]) -> str:
    """Returns e.g. "11 of 12 orders agree, 30 of 31 pairs that can be told apart".

    Behind it stand the pairs that cannot, the same of all runs where a newer one
    superseded some, and what it would cost to choose by prediction.

    Args:
      found: at least one.
    """
    found = list(found)
    newest = [ranking for ranking in found if not ranking.superseded]
    orders, pairs = _right(newest)
    tied = sum(len(ranking.tied) for ranking in newest)
    text = f"{orders} orders agree, {pairs} pairs that can be told apart"
    if tied:
        text += f" ({tied} more within the measured spread)"
    if len(newest) < len(found):
        orders, pairs = _right(found)
        text += f"; with older runs {orders} orders, {pairs} pairs"
    regrets = [ranking.regret for ranking in newest]
    return (
        f"{text}. To choose by prediction costs"
        f" {100 * math.fsum(regrets) / len(regrets):.1f} % on average,"
        f" {100 * max(regrets):.1f} % at most"
    )


def _right(found: Sequence[Ranking]) -> tuple[str, str]:
    """Returns how many orders agree, and how many pairs, e.g. ("2 of 3", "5 of 6")."""
    pairs = sum(ranking.pairs for ranking in found)
    wrong = sum(len(ranking.wrong) for ranking in found)
    orders = sum(ranking.agrees for ranking in found)
    return f"{orders} of {len(found)}", f"{pairs - wrong} of {pairs}"


def drifts(now: Sequence[Figure], committed: Sequence[Figure]) -> list[str]:
    """Returns where MAPE is not what is committed, over `MOST_DRIFT`; [] if nowhere.

    Only points that both have are compared, and only if their time is the same.
    """
    before = {_key(f): f for f in committed}
    pairs = [(f, before.get(_key(f))) for f in now]
    missing = [f for f, was in pairs if was is None or was.measured_s != f.measured_s]
    if missing:
        one = missing[0]
        return [
            f"{len(missing)} of {len(now)} figures are not in the committed ones, such"
            f" as {one.metric.upper()} of {one.partition} at batch {one.batch_size},"
            f" {one.chip}, {one.rates}"
        ]
    after = {_group(s): s.mape for s in summaries([f for f, _ in pairs])}
    was = {_group(s): s.mape for s in summaries([f for _, f in pairs if f])}
    return [
        f"MAPE of {', '.join(group)} is {100 * mape:.1f} %, committed is"
        f" {100 * was[group]:.1f} %"
        for group, mape in after.items()
        if abs(mape - was[group]) > MOST_DRIFT
    ]


def _group(summary: Summary) -> tuple[str, ...]:
    s = summary
    return (s.metric.upper(), s.kind, s.chip, s.rates)


def _key(figure: Figure) -> tuple[Any, ...]:
    return (figure.metric, *_point_of(figure), figure.source)


def _point_of(figure: Figure) -> tuple[Any, ...]:
    """Returns what was asked, in whatever run."""
    f = figure
    return (
        f.model, f.chip, f.rates, f.partition, f.rules, f.dtypes, f.layers,
        f.batch_size, f.input_len, f.output_len, f.asked_micro_batches, f.choices,
    )  # fmt: skip


def _points(
    figures: Iterable[Figure],
) -> list[dict[tuple[Any, ...], dict[str, Figure]]]:
    """Returns points that differ in their partition alone, each metric -> figure.

    Programs that were asked to be written otherwise are another question, and those of
    another run may have had other devices.
    """
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], dict[str, Figure]]] = {}
    for f in figures:
        where = (
            f.model, f.chip, f.rates, f.dtypes, f.layers, f.batch_size,
            f.input_len, f.output_len, f.choices, f.run,
        )  # fmt: skip
        groups.setdefault(where, {}).setdefault(_point_of(f), {})[f.metric] = f
    return [*groups.values()]


def _place(by: str, point: dict[str, Figure]) -> Place | None:
    """Returns the place of a point, None if it lacks a time that is needed."""
    needed = validated.METRICS if by == "tokens/s/chip" else (by,)
    if not all(metric in point for metric in needed):
        return None
    first = point[needed[0]]
    if by != "tokens/s/chip":
        return Place(
            partition=first.partition,
            label=first.label,
            measured=first.measured_s,
            predicted=first.predicted_s,
            spread=first.spread,
        )
    # Chip-seconds of one generation, whose least is most tokens/s/chip.
    ttft, tpot = point["ttft"], point["tpot"]
    steps = first.output_len - 1

    def cost(seconds: Callable[[Figure], float]) -> float:
        return first.num_chips * (seconds(ttft) + steps * seconds(tpot))

    measured = cost(lambda f: f.measured_s)
    return Place(
        partition=first.partition,
        label=first.label,
        measured=measured,
        predicted=cost(lambda f: f.predicted_s),
        spread=cost(lambda f: f.spread * f.measured_s) / measured,
    )


def _ranking(by: str, figure: Figure, places: list[Place], superseded: bool) -> Ranking:
    if len({place.partition for place in places}) < len(places):
        places = [dataclasses.replace(p, partition=p.label) for p in places]
    places = sorted(
        places, key=lambda place: (place.measured, partition_order(place.partition))
    )
    tied, wrong = [], []
    for better, worse in itertools.combinations(places, 2):
        pair = better.partition, worse.partition
        spread = max(better.spread, worse.spread)
        if worse.measured <= better.measured * (1 + spread):
            tied.append(pair)
        elif better.predicted >= worse.predicted:
            wrong.append(pair)
    f = figure
    return Ranking(
        by=by,
        run=f.run,
        superseded=superseded,
        what=(
            f"{f.model}, batch {f.batch_size}, {f.input_len:,} in, {f.output_len:,} out"
        ),
        chip=f.chip,
        rates=f.rates,
        batch_size=f.batch_size,
        places=tuple(places),
        tied=tuple(tied),
        wrong=tuple(wrong),
    )
