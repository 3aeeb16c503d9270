"""What validation found, as tables of finished strings and as Markdown."""

from collections.abc import Sequence

from experiments.report import units
from experiments.report.frontier import partition_order
from experiments.report.tables import Table, markdown
from experiments.report.validated import METRICS, Figure
from experiments.validation.summary import (
    Ranking,
    agreement,
    as_recorded,
    rankings,
    summaries,
)

WORDS = (
    (
        "difference",
        "(predicted - measured) / measured; negative is predicted too fast.",
    ),
    ("MAPE", "Mean of the absolute differences."),
    ("spread", "Interquartile range of the measured samples / their median."),
    ("predicted", "By today's code and chip files, from the program that was timed."),
    ("then", "As predicted on the devices, on the day of the measurement."),
    (
        "order",
        "Partitions from best to worst; = where the measured difference is within the"
        " measured spread, and either order is right.",
    ),
    (
        "regret",
        "How much longer the partition that is predicted best takes than the best; of"
        " tokens/s/chip, how many more chip-seconds a token costs.",
    ),
    ("older run", "A newer one ordered at least the same partitions."),
)


def percent(part: float) -> str:
    """Example: `percent(-0.2447)` is "-24.5 %"."""
    return f"{100 * part:+.1f} %"


def points(figures: Sequence[Figure]) -> Table:
    """Returns one row for each point and metric."""
    headings = (
        "metric", "batch", "partition", "measured", "spread", "predicted",
        "difference %", "then", "difference %",
    )  # fmt: skip
    rows = [
        [
            f.metric.upper(),
            str(f.batch_size),
            f.label,
            units.seconds(f.measured_s),
            units.percent(f.spread),
            units.seconds(f.predicted_s),
            _signed(f.difference),
            "-" if (then := f.recorded_s) is None else units.seconds(then),
            "-" if then is None else _signed(then / f.measured_s - 1),
        ]
        for f in sorted(figures, key=_order)
    ]
    return headings, rows


def errors(figures: Sequence[Figure]) -> Table:
    """Returns one row for each metric and kind of partition."""
    headings = (
        "metric", "partitions", "points", "MAPE %", "mean %", "worst %", "at",
        "MAPE % then",
    )  # fmt: skip
    then = {(s.metric, s.kind): s.mape for s in summaries(as_recorded(figures))}
    rows = [
        [
            s.metric.upper(),
            s.kind,
            str(s.points),
            f"{100 * s.mape:.1f}",
            _signed(s.bias),
            _signed(s.worst.difference),
            f"{s.worst.label} at batch {s.worst.batch_size}",
            f"{100 * was:.1f}" if (was := then.get((s.metric, s.kind))) else "-",
        ]
        for s in sorted(summaries(figures), key=lambda s: METRICS.index(s.metric))
    ]
    return headings, rows


def orders(found: Sequence[Ranking]) -> Table:
    """Returns one row for each measure, run and batch, best partition first."""
    headings = (
        "by", "run", "batch", "measured order", "predicted order", "agrees",
        "regret %",
    )  # fmt: skip
    rows = [
        [
            {"tokens/s/chip": r.by}.get(r.by, r.by.upper()),
            f"{r.run} (older run)" if r.superseded else r.run,
            str(r.batch_size),
            r.measured,
            r.predicted,
            "yes" if r.agrees else f"no: {'; '.join(map(' before '.join, r.wrong))}",
            f"{100 * r.regret:.1f}",
        ]
        for r in found
    ]
    return headings, rows


def headline(figures: Sequence[Figure]) -> str:
    """Returns the result in a sentence or two."""
    parts = [
        f"{s.metric.upper()} is predicted with a mean error of {100 * s.mape:.1f} %,"
        f" worst {percent(s.worst.difference)} ({s.worst.label} at batch"
        f" {s.worst.batch_size}; {s.points} points)"
        for s in summaries(figures)
        if s.kind == "all"
    ]
    return f"{'; '.join(parts)}. {agreed(rankings(figures))}"


def agreed(found: Sequence[Ranking]) -> str:
    """Returns in a sentence how often the order of partitions was right."""
    return f"Order of partitions: {agreement(found)}." if found else ""


def titles(figures: Sequence[Figure]) -> list[tuple[str, list[Figure]]]:
    """Returns figures by what they have in common, with its name."""
    groups: dict[str, list[Figure]] = {}
    for f in figures:
        name = (
            f"{f.model} on {f.chip}, {f.dtypes}, {f.input_len:,} tokens in,"
            f" {f.output_len:,} out; rates: {f.rates}"
        )
        groups.setdefault(name, []).append(f)
    return list(groups.items())


def as_markdown(figures: Sequence[Figure]) -> str:
    """Returns the sections of a page of docs."""
    parts = []
    for title, group in titles(figures):
        tables = (errors(group), orders(rankings(group)), points(group))
        parts += [f"### {title}", headline(group).strip()]
        parts += [markdown(table) for table in tables if table[1]]
    return "\n\n".join(parts)


def _order(f: Figure) -> tuple[object, ...]:
    place = partition_order(f.partition)
    return METRICS.index(f.metric), f.batch_size, place, f.label


def _signed(part: float) -> str:
    return f"{100 * part:+.1f}"
