"""The answer in words, the names of things, and how each metric is defined."""

import dataclasses

from experiments.report import units
from experiments.report.frontier import (
    NEAR,
    Objective,
    Question,
    Winner,
    least,
    most,
)
from experiments.report.record import Record
from experiments.report.validated import METRICS as TIMES
from experiments.report.validated import NOT_VALIDATED, Band, band, kind_of

METRICS = (
    ("TTFT", "Start of prefill to the first token of every sequence of the batch."),
    ("TPOT", "(E2E - TTFT) / (output tokens - 1): time between tokens of a user."),
    ("E2E", "TTFT + TPOT x (output tokens - 1)."),
    ("tokens/s", "Output throughput of the target: batch x output tokens / E2E."),
    ("tokens/s/user", "1 / TPOT."),
    ("tokens/s/chip", "Output throughput / all chips of the target."),
    (
        "limit",
        "The least time physics allows: bytes that must move, FLOPs that must be"
        " done and messages that must be sent, at the chip's peak rates.",
    ),
    (
        "% of limit",
        "100 x limit / time, measured or else estimated; 100 % cannot be improved on.",
    ),
    ("MFU", "FLOPs the model needs / (time x peak FLOP/s of the devices)."),
    ("MBU", "Bytes the model must move / (time x peak memory bandwidth)."),
    (
        "FLOPs",
        "Of one device for one call, read from the optimised HLO, loops multiplied"
        " by their trip counts. A multiply-add is 2, an elementwise operation 1.",
    ),
    (
        "payload, wire",
        "Payload is what a collective is about: the operand of an all-reduce, the"
        " gathered result of an all-gather. Wire is what one device sends for it.",
    ),
    (
        "parts of time",
        "Compute or HBM, whichever takes longer, of each operation; links by mesh"
        " axis; overhead of each call; bubble is the idle share of a pipeline.",
    ),
    (
        "predicted, off",
        "What a roofline of the compiled program says, and how much longer or shorter"
        " the measured time is.",
    ),
    (
        "measured slower by",
        "How much longer than predicted programs took that were measured on this chip:"
        " of the same kind of partition, rules and dtype, predicted at the same rates.",
    ),
    (
        "spread",
        "Interquartile range of the measured samples / their median: smaller"
        " differences mean nothing.",
    ),
    (
        "peak memory",
        "Most allocated on a device by the point; where the allocator cannot say, what"
        " is held between calls, after >.",
    ),
    (
        "memory",
        "Of one device at the phase's peak. 1 GB is 1e9 bytes.",
    ),
    (
        "batch",
        "Static: all sequences start together and have equal lengths. Queueing and"
        " continuous batching are not modelled.",
    ),
)

_OUTCOMES = (
    ("ok", "fits", "fit"),
    ("does not fit", "does not fit", "do not fit"),
    ("refused", "refused", "refused"),
    ("failed", "failed", "failed"),
)

ORIGIN = {
    "compiled": (
        "FLOPs, bytes, memory and collectives are read from programs that XLA"
        " compiled; times are estimated from them with the chip's rates."
        " Nothing was run."
    ),
    "modelled": (
        "Where weights and cache alone are larger than a device's memory, nothing was"
        " compiled."
    ),
    "measured": (
        "Times are medians of runs on attached devices, with random weights and"
        " prompts. Predictions and parts of time are of the same compiled programs."
    ),
}


def part_name(part: str) -> str:
    """Returns the name of a part of time, as used in sentences and legends.

    Example:
      >>> part_name("hbm"), part_name("tensor links")
      ('HBM', 'tensor links')
    """
    return {"hbm": "HBM"}.get(part, part)


def title(question: Question) -> str:
    """Returns e.g. "llama-3.1-70b on h100:8"."""
    costed = "" if question.target.startswith(f"{question.chip}:") else " as"
    name = f"{question.model} on {question.target}"
    return f"{name}{costed} {question.chip}" if costed else name


def size(question: Question) -> str:
    """Returns e.g. "8 chips", or "4 chips, 8 devices" where they differ."""
    chips = f"{question.num_chips} chip{'s' * (question.num_chips != 1)}"
    if question.num_chips == question.num_devices:
        return chips
    return f"{chips}, {question.num_devices} devices"


def rates(question: Question) -> str:
    """Returns where the chip's rates are from, e.g. "rates: published peaks", or ""."""
    found = dict.fromkeys(r.context.get("rates", "") for r in question.records)
    said = " and ".join(filter(None, found))
    return f"rates: {said}" if said else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Best:
    """The best of some points by one measure, in words.

    Attributes:
      measure: e.g. "best TTFT".
      name: the winner's series, e.g. "tp8".
      figure: e.g. "9.84 ms".
      limit: e.g. "limited by HBM"; if measured, "81 % of the limit of TPOT".
      near: who is within 5 %, e.g. "tp4_pp2 within 5 %", or "".
    """

    measure: str
    name: str
    figure: str
    limit: str
    near: str

    def __str__(self) -> str:
        near = f" ({self.near})" if self.near else ""
        return f"{self.measure} {self.name}{near}, {self.figure} ({self.limit})"


def best(question: Question, batch_size: int) -> list[Best]:
    """Returns the best TTFT, TPOT and throughput at a batch; [] if there are none."""
    records = [r for r in question.records if r.batch_size == batch_size]
    ttft, tpot = least(records, "ttft_s"), least(records, "tpot_s")
    rate = most(records, "output_tokens_per_s")
    if ttft is None or tpot is None or rate is None:
        return []
    figures = (
        ("best TTFT", ttft, seconds_of(ttft.record, "ttft_s"), "ttft"),
        ("best TPOT", tpot, seconds_of(tpot.record, "tpot_s"), "tpot"),
        (
            "most tokens/s",
            rate,
            f"{units.digits(rate.record.require('output_tokens_per_s'))},"
            f" {_per_chip(rate.record)} per chip",
            "e2e",
        ),
    )
    return [
        Best(
            measure=measure,
            name=question.label(winner.record),
            figure=figure,
            limit=_limit(winner.record, name),
            near=_near(question, winner),
        )
        for measure, winner, figure, name in figures
    ]


def _limit(record: Record, name: str) -> str:
    """Returns what limits the time `name`, or how near its limit a measured one is."""
    if record.measurement is not None:
        name = "tpot" if name == "e2e" else name
        share = record.require(f"{name}_limit_s") / record.require(f"{name}_s")
        return f"{units.percent(share)} of the limit of {name.upper()}"
    phase = {"ttft": record.prefill, "tpot": record.decode}.get(name, record)
    return f"limited by {part_name(str(phase and phase.bottleneck))}"


def answers(question: Question, objective: Objective) -> list[tuple[str, str]]:
    """Returns (batch, sentence) for each batch size, then for the objective."""
    found = []
    for batch in question.batch_sizes:
        bests = best(question, batch)
        text = "; ".join(map(str, bests)) if bests else "no point has an answer"
        found.append((f"batch {batch}", f"{text}."))
    if objective.given:
        found.append(("objective", met_by(question, objective)))
    return found


def bands(record: Record) -> dict[str, Band | None]:
    """Returns the error band of each predicted time; None where there is none.

    Measured times have none: their prediction stands beside them.
    """
    if record.measurement is not None:
        return dict.fromkeys(TIMES)
    return {metric: band(record, metric) for metric in TIMES}


def trust(question: Question) -> list[tuple[str, str]]:
    """Returns (what, sentence) on how far the predictions of a question hold.

    One for each time and kind of partition, those without a band together.
    """
    if question.measured or not question.ok:
        return []
    found, unknown = list[tuple[str, str]](), dict[str, list[str]]()
    for metric in TIMES:
        kinds = {kind_of(r.partition): bands(r)[metric] for r in question.ok}
        for kind, known in kinds.items():
            if known is None:
                unknown.setdefault(kind, []).append(metric.upper())
            else:
                found.append((f"{metric.upper()} of {kind}", f"{known.sentence}."))
    if unknown and not found:
        return [("error", f"{NOT_VALIDATED}: nothing like it was measured.")]
    left = [f"{' and '.join(times)} of {kind}" for kind, times in unknown.items()]
    return found + ([("; ".join(left), f"{NOT_VALIDATED}.")] if left else [])


def headline(question: Question) -> str:
    """Returns the shortest answer: the extremes over every batch size."""
    ttft, tpot = least(question.ok, "ttft_s"), least(question.ok, "tpot_s")
    rate = most(question.ok, "tokens_per_s_per_chip")
    if ttft is None or tpot is None or rate is None:
        total = len(question.records)
        return f"On {question.target} none of {total} points has an answer."
    first, step = ttft.record, tpot.record
    soonest = (
        f"{question.label(first)} gives the first token soonest"
        f" ({seconds_of(first, 'ttft_s')} at batch {first.batch_size})"
    )
    steady = f"the shortest time per token ({seconds_of(step, 'tpot_s')})"
    if question.label(first) == question.label(step):
        latency = f"{soonest} and {steady}"
    else:
        latency = f"{soonest}, {question.label(step)} {steady}"
    return (
        f"On {question.target} {latency}; {question.label(rate.record)} at batch"
        f" {rate.record.batch_size} gives the most tokens, {_per_chip(rate.record)} per"
        " second per chip."
    )


def met_by(question: Question, objective: Objective) -> str:
    """Returns who meets the objective, and which of them gives most tokens/s."""
    wanted = asked_for(objective)
    winner = most([r for r in question.ok if objective.met(r)], "tokens_per_s_per_chip")
    if winner is None:
        ttft, tpot = least(question.ok, "ttft_s"), least(question.ok, "tpot_s")
        if ttft is None or tpot is None:
            return f"no point has {wanted}; none has an answer at all."
        return (
            f"no point has {wanted}; the least are TTFT"
            f" {seconds_of(ttft.record, 'ttft_s')} and TPOT"
            f" {seconds_of(tpot.record, 'tpot_s')}."
        )
    r, met = winner.record, sum(objective.met(r) for r in question.ok)
    return (
        f"{met} of {len(question.ok)} points have {wanted}; of these"
        f" {question.label(r)} at batch {r.batch_size} gives most tokens/s,"
        f" {_per_chip(r)} per chip (TTFT {seconds_of(r, 'ttft_s')}, TPOT"
        f" {seconds_of(r, 'tpot_s')})."
    )


def asked_for(objective: Objective) -> str:
    """Returns e.g. "TTFT of at most 2.00 s and TPOT of at most 25.0 ms"."""
    parts = [
        f"{name} of at most {units.seconds(value)}"
        for name, value in (("TTFT", objective.ttft_s), ("TPOT", objective.tpot_s))
        if value is not None
    ]
    if (least := objective.output_tokens_per_s) is not None:
        parts.append(f"at least {units.digits(least)} tokens/s")
    return " and ".join(parts)


def reason_line(record: Record) -> str:
    """Returns why a point has no figures, with bytes where it is about memory."""
    text = record.reason or ""
    if record.needed_bytes is not None and record.available_bytes is not None:
        needed = units.bytes_(record.needed_bytes)
        text = (
            f"needs {needed} a device, has {units.bytes_(record.available_bytes)}."
            f" {text}"
        )
    return text


def outcome(question: Question) -> str:
    """Returns e.g. "18 points: 15 fit, 2 do not fit, 1 refused"."""
    counts = [
        (name if n == 1 else many, n)
        for status, name, many in _OUTCOMES
        if (n := sum(r.status == status for r in question.records))
    ]
    parts = ", ".join(f"{n} {name}" for name, n in counts)
    total = len(question.records)
    return f"{total} point{'s' * (total != 1)}: {parts}"


def seconds_of(record: Record, name: str) -> str:
    """Returns the figure `name`, which is in seconds, as people read it."""
    return units.seconds(record.require(name))


def _per_chip(record: Record) -> str:
    return units.digits(record.require("tokens_per_s_per_chip"))


def _near(question: Question, winner: Winner) -> str:
    near = [question.label(record) for record, _ in winner.near]
    if not near:
        return ""
    more = f" and {len(near) - 2} more" if len(near) > 2 else ""
    return f"{', '.join(near[:2])}{more} within {100 * NEAR:.0f} %"
