"""The curves of a calibration: a table in the terminal, a page beside the file."""

import dataclasses
import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from rich.console import Console
from rich.table import Table

from experiments.calibration import bench
from experiments.calibration.points import BYTES
from experiments.calibration.run import Outcome
from experiments.report import charts, html, units
from sharding import curves, rates
from sharding.chips import Chip, load_calibrated
from sharding.chips.calibration import Calibration, Sample

PAGE = "curves.html"
_MANY_ROWS = 4096  # whose products wait for arithmetic alone, so that power shows
_COLOURS = (
    "#2563a8", "#d1602d", "#2f8a57", "#a23b72", "#8a6d1d", "#5b4fb0", "#15838c",
    "#b3333b", "#6b7a2a", "#6d5a4e", "#7aa5d2", "#e6a988", "#8ec5a6", "#cf97b6",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """Samples that differ in one size.

    Attributes:
      name: of the line.
      points: of the size, what is drawn, and the sample in words.
    """

    name: str
    points: tuple[tuple[float, float, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over one size, both axes logarithmic.

    Attributes:
      title: what it shows.
      x, y: titles of the axes.
      lines: by name.
      peak: published, of what is drawn; None if there is none.
    """

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    peak: float | None = None


def show(console: Console, outcome: Outcome) -> None:
    """Prints what was found and writes the page beside the file."""
    chip = load_calibrated(outcome.path)
    assert chip.calibrated is not None
    console.print(f"\n{chip.title}, {chip.rates_from}")
    table = Table("what", "measured", "published", box=None, header_style="dim")
    for row in facts(chip):
        table.add_row(*row)
    console.print(table)
    for key, reason in outcome.failed:
        console.print(f"Not measured: {key}: {reason}", markup=False, soft_wrap=True)
    if outcome.left:
        console.print(
            f"{outcome.left} points are left; the same command goes on with them."
        )
    page_path = outcome.path.with_name(PAGE)
    page_path.write_text(page(chip), encoding="utf-8")
    console.print(
        f"{outcome.done} points in {outcome.path} (use it as --chip={outcome.path}),"
        f" curves in {page_path}"
    )


def facts(chip: Chip) -> list[tuple[str, str, str]]:
    """Returns (what, measured, published) of the figures that sum a chip up."""
    calibration = chip.calibrated
    assert calibration is not None
    device = chip.per_device()
    found: list[tuple[str, str, str]] = []

    def add(what: str, text: str | None, published: str | None = None) -> None:
        if text is not None:
            found.append((what, text, published or ""))

    for name in ("read", "copy"):
        best = _best(calibration, calibration.select(name), lambda s: s["bytes"])
        add(
            f"{name}, fastest", _rate(best, "B/s"), _rate(device.hbm_bytes_per_s, "B/s")
        )
    for dtype, peak in device.flops_per_s.items():
        samples = calibration.select("matmul", dtype=dtype, weights=dtype)
        best = _best(calibration, samples, lambda s: 2 * s["m"] * s["k"] * s["n"])
        add(
            f"products in {dtype}, fastest",
            _rate(best, "FLOP/s"),
            _rate(peak, "FLOP/s"),
        )
    best = _best(calibration, calibration.select("vector"), lambda s: s["flops"])
    peak = device.vector_flops_per_s
    add("arithmetic", _rate(best, "FLOP/s"), _rate(peak, "FLOP/s"))
    links = device.links * device.link_bytes_per_s
    for kind in ("all-reduce", "all-gather", "reduce-scatter", "permute"):
        samples = calibration.select("collective", kind=kind, by="xla")
        best = _best(calibration, samples, lambda s: s["wire"])
        add(f"{kind}, sent at most", _rate(best, "B/s"), _rate(links, "B/s"))
    if calibration.select("kernel"):
        add("a kernel besides its work", units.seconds(rates.kernel_gap_s(chip)))
        call_s = rates.call_overhead_s(chip)
        published = units.seconds(chip.published().call_overhead_s)
        add("a call besides its kernels", units.seconds(call_s), published)
    if calibration.select("apart"):
        more_s = curves.apart_s(calibration)
        what = "more" if more_s >= 0 else "less"
        add(f"a collective between graphs, {what}", units.seconds(abs(more_s)))
    for sample in calibration.select("call"):
        what = f"call of {sample['arguments']} arrays on {sample['devices']} devices"
        add(what, units.seconds(sample.call_s))
    return found


def _best(
    calibration: Calibration, samples: Iterable[Sample], amount: Callable[[Sample], int]
) -> float | None:
    found = [(amount(s), curves.work_s(calibration, s)) for s in samples]
    return max((n / s for n, s in found if s > 0), default=None)


def _rate(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{units.count(value)}{unit}"


def charts_of(chip: Chip) -> list[Chart]:
    """Returns every chart that a calibrated chip has samples for."""
    calibration = chip.calibrated
    assert calibration is not None
    device = chip.per_device()

    def link_s(sample: Sample) -> float:
        return curves.work_s(calibration, sample)

    def stored(s: Sample) -> float:
        return s["k"] * s["n"] * BYTES[str(s.at["weights"])]

    def made(s: Sample) -> float:
        return 2 * s["m"] * s["k"] * s["n"]

    def line(
        name: str, samples: Iterable[Sample], x: str, y: Callable[[Sample], float]
    ) -> Line:
        points = [(float(s[x]), y(s), _words(s, link_s(s))) for s in samples]
        return Line(name=name, points=tuple(sorted(points)))

    def by(samples: Iterable[Sample], *names: str) -> list[tuple[str, list[Sample]]]:
        groups: dict[str, list[Sample]] = defaultdict(list)
        for s in samples:
            if link_s(s) > 0:
                groups[" ".join(str(s.at[n]) for n in names)].append(s)
        return list(groups.items())

    gb_s = device.hbm_bytes_per_s / 1e9
    every = calibration.select("matmul")
    charts_ = [
        Chart(
            title="Memory",
            x="bytes read and written",
            y="GB/s",
            peak=gb_s,
            lines=tuple(
                line(name, group, "bytes", lambda s: s["bytes"] / link_s(s) / 1e9)
                for name in ("copy", "read")
                for _, group in by(calibration.select(name))
            ),
        )
    ]
    for name, group in by(every, "dtype", "weights"):
        dtype, weights = name.split()
        title = f"Products in {dtype}"
        title += f", weights in {weights}" if weights != dtype else ""
        shapes = by(group, "k", "n")
        common: dict[str, Any] = dict(x="rows, m")
        for what, amount, scale, unit, peak in (
            ("weights read", stored, 1e9, "GB/s", gb_s),
            ("done", made, 1e12, "TFLOP/s", device.matmul_flops_per_s(dtype) / 1e12),
        ):
            lines = tuple(
                line(
                    "[{}, {}]".format(*shape.split()),
                    samples,
                    "m",
                    lambda s, a=amount, c=scale: a(s) / link_s(s) / c,
                )
                for shape, samples in shapes
            )
            charts_.append(
                Chart(
                    title=f"{title}: {what}", y=unit, lines=lines, peak=peak, **common
                )
            )
    many = [s for s in every if s["m"] >= _MANY_ROWS]
    charts_ += [
        Chart(
            title="Products of many rows, as time goes on",
            x="ms since the first call",
            y="TFLOP/s",
            lines=tuple(
                Line(
                    name=f"{s['m']:,} rows, [{s['k']}, {s['n']}]",
                    points=tuple(
                        (1e3 * at, made(s) * s.links / call_s / 1e12, s.key)
                        for at, call_s in _in_order(s)
                    ),
                )
                for s in many
            ),
        ),
        Chart(
            title="Products in parts: weights read",
            x="rows, m",
            y="GB/s",
            peak=gb_s,
            lines=tuple(
                line("[{}, {}]".format(*shape.split()), group, "m",
                     lambda s: 2 * s["k"] * s["n"] / link_s(s) / 1e9)
                for shape, group in by(calibration.select("split"), "k", "n")
            ),
        ),
        Chart(
            title="Parts added up, and normed",
            x="parts",
            y="µs",
            lines=tuple(
                line(f"{rows} rows", group, "parts", lambda s: 1e6 * link_s(s))
                for rows, group in by(calibration.select("add"), "rows")
            ),
        ),
    ]  # fmt: skip
    for title, name, unit in (
        ("Collectives and one small kernel", "collective", "µs"),
        ("Collectives and a graph of small kernels", "apart", "µs"),
    ):
        groups = by(calibration.select(name), "kind", "group", "by")
        lines = tuple(
            line("{}, {} devices, {}".format(*label.split()), group, "bytes",
                 lambda s: 1e6 * link_s(s))
            for label, group in groups
        )  # fmt: skip
        charts_.append(Chart(title=title, x="payload, bytes", y=unit, lines=lines))
    for phase, size, scale, unit, peak in (
        ("prefill", "flops", 1e12, "TFLOP/s", device.matmul_flops_per_s("bf16") / 1e12),
        ("decode", "bytes", 1e9, "GB/s", gb_s),
    ):
        groups = by(calibration.select("attention", phase=phase), "implementation")
        if phase == "decode":
            own = by(calibration.select("token"))
            groups += [("this project's kernel", group) for _, group in own]
        lines = tuple(
            line(label, group, size,
                 lambda s, n=size, c=scale: s[n] / link_s(s) / c)
            for label, group in groups
        )  # fmt: skip
        title = f"Attention of {'prompts' if phase == 'prefill' else 'one token'}"
        charts_.append(Chart(title=title, x=size, y=unit, lines=lines, peak=peak))
    return [chart for chart in charts_ if any(line.points for line in chart.lines)]


def _in_order(sample: Sample) -> list[tuple[float, float]]:
    """Returns when each run ended, from the first call on, and what its calls took.

    In seconds. The runs of single calls that the warm-up begins with are left out: the
    first ones load the program.
    """
    runs_s = sample.warmup_samples_s + sample.call_samples_s
    single = min(bench.SINGLE_CALLS, len(sample.warmup_samples_s))
    calls = [1] * single + [sample.calls] * (len(runs_s) - single)
    ends_s = itertools.accumulate(map(operator.mul, runs_s, calls))
    return [*zip(ends_s, runs_s, strict=True)][bench.SINGLE_CALLS :]


def _words(sample: Sample, link_s: float) -> str:
    return f"{sample.key}: {units.seconds(link_s)}"


def draw(chart: Chart) -> dict[str, Any]:
    """Returns a chart as a Plotly figure."""
    figure = go.Figure()
    for i, line in enumerate(chart.lines):
        figure.add_scatter(
            x=[x for x, _, _ in line.points],
            y=[y for _, y, _ in line.points],
            customdata=[words for *_, words in line.points],
            name=line.name,
            mode="lines+markers",
            line=dict(color=_COLOURS[i % len(_COLOURS)], width=1.5),
            marker=dict(size=6),
            hovertemplate="%{customdata}<extra></extra>",
        )
    values = [y for line in chart.lines for _, y, _ in line.points]
    if chart.peak is not None:
        values.append(chart.peak)
        figure.add_hline(y=chart.peak, line=dict(color="#6b6b6b", width=1, dash="dash"))
    sizes = [x for line in chart.lines for x, _, _ in line.points]
    figure.update_layout(
        height=360,
        showlegend=len(chart.lines) > 1,
        legend=dict(font_size=10, y=1, yanchor="top"),
        xaxis=charts.log_axis(chart.x, sizes),
        yaxis=charts.log_axis(chart.y, values),
    )
    return charts.finish(figure, showlegend=len(chart.lines) > 1)


def page(chip: Chip) -> str:
    """Returns the page of a calibrated chip."""
    calibration = chip.calibrated
    assert calibration is not None
    header = calibration.header
    made_by: Sequence[tuple[str, str]] = (
        ("command", header.command),
        ("commit", header.commit),
        ("devices", str(calibration)),
        ("driver", header.driver or "none"),
        ("versions", ", ".join(f"{k} {v}" for k, v in header.versions.items())),
        ("begun (UTC)", header.time),
    )
    return html.render(
        "curves.html.j2",
        Path(__file__).parent,
        title=f"How fast is {chip.title}?",
        rates=chip.rates_from,
        facts=(("what", "measured", "published"), facts(chip)),
        charts=[(chart, draw(chart)) for chart in charts_of(chip)],
        failed=(
            ("benchmark", "why"),
            [(s.key, s.reason) for s in calibration.samples if s.reason],
        ),
        made_by=(("what", "value"), made_by),
    )
