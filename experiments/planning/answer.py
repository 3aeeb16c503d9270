"""What a search comes to, in words and tables that a terminal and a page lay out."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from experiments.planning.changes import Outcome
from experiments.planning.prospect import Prospect, Verdict
from experiments.planning.search import Search
from experiments.planning.space import Candidate
from experiments.report import units, words
from experiments.report.frontier import NEAR
from experiments.report.record import Record
from experiments.report.tables import Table

_MOST_ROWS = 5
_FIGURES = {
    "ttft_s": ("TTFT", units.seconds),
    "tpot_s": ("TPOT", units.seconds),
    "output_tokens_per_s": ("tokens/s", units.digits),
    "needed_bytes": ("memory", units.bytes_),
}
_FATES = (
    ("refused", "cannot work"),
    ("does not fit", "does not fit"),
    ("limit", "misses the objective at its limits"),
    ("batch", "is ruled out by a smaller batch"),
    ("beaten", "cannot be better than what was found"),
    ("predicted", "was compiled and misses the objective"),
    ("done", "was compiled and meets the objective"),
    ("failed", "failed"),
    ("open", "was not looked into"),
)
# The kindest first: what a family's best candidate came to.
_KINDEST = (
    "done", "predicted", "beaten", "batch", "open", "failed", "limit", "does not fit",
    "refused",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to one plan.

    Attributes:
      headline: the answer in a sentence or two.
      paragraphs: (name, text): what binds, ties, what is missed, what was searched.
      best: the best few, a row each.
      families: what became of every partition and rule table.
      changes: single changes that were tried; no rows if none were.
      commands: that verify the best by measurement.
      is_met: whether anything meets the objective.
    """

    headline: str
    paragraphs: tuple[tuple[str, str], ...]
    best: Table
    families: Table
    changes: Table
    commands: tuple[str, ...]
    is_met: bool


def answer(
    search: Search, outcomes: Sequence[Outcome], commands: Sequence[str]
) -> Answer:
    """Returns the answer that a finished search gives.

    Args:
      search: that has nothing left to compile.
      outcomes: of single changes, where nothing met the objective.
      commands: as in `Answer`.
    """
    verdicts = search.verdicts()
    best = search.best()
    done = [(c, v) for c, v in verdicts.values() if v.fate == "done"]
    ranked = best if search.aim == "frontier" else _ranked(search, [c for c, _ in done])
    paragraphs = []
    if best and search.aim != "frontier":
        paragraphs.append(("What binds", _binds(search, best[0])))
        if ties := _ties(search, ranked):
            paragraphs.append(("Ties", ties))
    if not best:
        paragraphs.append(("What is missed", _missed(search, outcomes)))
    paragraphs.append(("Searched", _searched(search)))
    return Answer(
        headline=_headline(search, best, outcomes),
        paragraphs=tuple(paragraphs),
        best=_best_table(search, ranked),
        families=_families_table(search),
        changes=_changes_table(outcomes),
        commands=tuple(commands),
        is_met=bool(best),
    )


def name(candidate: Candidate) -> str:
    """Returns e.g. "tp8 megatron at batch 24"."""
    return f"{candidate.family} at batch {candidate.batch_size}"


def _ranked(search: Search, candidates: Sequence[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=search.value, reverse=True)


def _headline(
    search: Search, best: Sequence[Candidate], outcomes: Sequence[Outcome]
) -> str:
    wanted = words.asked_for(search.objective)
    if not best:
        helps = [o for o in outcomes if o.found is not None]
        change = f" It takes one change: {helps[0].words}." if helps else ""
        total = len(search.candidates)
        return f"None of {total:,} candidates has {wanted}.{change}"
    if search.aim == "frontier":
        first, last = best[-1], best[0]
        return (
            f"{len(best)} points are not beaten in both: from {name(first)},"
            f" {_rate(search, first)} tokens/s per chip, to {name(last)},"
            f" {units.seconds(search.prospect(last).tpot_s)} a token."
        )
    found = search.prospect(best[0])
    return (
        f"{name(best[0])} gives most tokens, {_rate(search, best[0])} per second per"
        f" chip, of all that have {wanted}: TTFT {units.seconds(found.ttft_s)}, TPOT"
        f" {units.seconds(found.tpot_s)}."
    )


def _rate(search: Search, candidate: Candidate) -> str:
    return units.digits(search.prospect(candidate).tokens_per_s_per_chip)


def _binds(search: Search, best: Candidate) -> str:
    """Returns what keeps the best from being better."""
    larger = [
        (c, v)
        for c, v in search.verdicts().values()
        if c.family == best.family and c.batch_size > best.batch_size
    ]
    larger.sort(key=lambda pair: pair[0].batch_size)
    known = [(c, v) for c, v in larger if v.fate != "refused"]
    text = f"{best.batch_size} is the largest batch that was asked for."
    if known:
        larger_batch = known[0][0].batch_size
        text = f"At batch {larger_batch} it {_because(search, *known[0])}."
    found = search.record(best)
    if found is None or found.prefill is None or found.decode is None:
        return text
    phases = [
        f"{phase} is limited by {words.part_name(p.bottleneck or '')}"
        for phase, p in (("prefill", found.prefill), ("decode", found.decode))
    ]
    share = found.require("needed_bytes") / found.require("available_bytes")
    return (
        f"{text} Its {phases[0]}, its {phases[1]}; {units.percent(share)} of a device's"
        " memory is used."
    )


def _because(search: Search, candidate: Candidate, verdict: Verdict) -> str:
    """Returns what became of a candidate, as the end of a sentence with "it"."""
    if verdict.fate in ("refused", "does not fit", "failed"):
        verb = {"refused": "cannot work", "failed": "failed"}
        return f"{verb.get(verdict.fate, verdict.fate)}: {verdict.reason.rstrip('.')}"
    prospect = search.prospect(candidate)
    if verdict.fate == "beaten":
        return f"gives at most {_rate(search, candidate)} tokens/s per chip"
    if verdict.fate == "done":
        return f"gives {_rate(search, candidate)} tokens/s per chip"
    if verdict.fate == "open":
        return "was not looked into"
    if verdict.missed == "needed_bytes":
        assert verdict.by is not None
        return f"does not fit: batch {verdict.by.batch_size} does not by far"
    title, scaled = _FIGURES[verdict.missed]
    value = scaled(getattr(prospect, verdict.missed))
    allowed = scaled(getattr(search.objective, verdict.missed))
    if verdict.missed == "output_tokens_per_s":
        most = "" if verdict.fate == "predicted" else "at most "
        return f"gives {most}{value} tokens/s, and {allowed} are asked for"
    least = "" if verdict.fate == "predicted" else "at least "
    judged = ""
    if verdict.fate == "batch" and verdict.by is not None:
        judged = f", judged by batch {verdict.by.batch_size},"
    return f"has a {title} of {least}{value}{judged} and {allowed} are allowed"


def _ties(search: Search, ranked: Sequence[Candidate]) -> str:
    """Returns who is within the error of estimates of the best, and how they differ."""
    best, *rest = ranked
    most = search.value(best)
    near = [c for c in rest if search.value(c) >= most * (1 - NEAR)]
    others = {
        f"{c.point.partition} {c.point.rules}"
        for c, v in search.verdicts().values()
        if v.fate == "beaten" and search.value(c) >= most * (1 - NEAR)
    }
    unseen = ""
    if others:
        unseen = (
            f"Not compiled, for they cannot be better, but may be as near:"
            f" {', '.join(sorted(others))}."
        )
    if not near:
        return unseen
    listed = "; ".join(
        f"{name(c)}, {units.percent(1 - search.value(c) / most)} less, with TTFT"
        f" {units.seconds(search.prospect(c).ttft_s)} and TPOT"
        f" {units.seconds(search.prospect(c).tpot_s)}"
        for c in near[:_MOST_ROWS]
    )
    more = f"; and {len(near) - _MOST_ROWS} more" if len(near) > _MOST_ROWS else ""
    alike = [best, *near]
    soonest = min(alike, key=lambda c: search.prospect(c).ttft_s)
    steadiest = min(alike, key=lambda c: search.prospect(c).tpot_s)
    chosen = (
        f"Of these {name(soonest)} has the shortest TTFT"
        f" and {name(steadiest)} the shortest TPOT."
        if soonest is not steadiest
        else f"Of these {name(soonest)} has the shortest TTFT and TPOT."
    )
    return (
        f"Within {100 * NEAR:.0f} % of the best, which estimates cannot tell apart:"
        f" {listed}{more}. {chosen} {unseen}"
    ).strip()


def _missed(search: Search, outcomes: Sequence[Outcome]) -> str:
    """Returns how far the nearest are from the objective."""
    relaxed = [o for o in outcomes if o.relaxes and o.found is not None]
    if relaxed:
        return " ".join(f"{o.words[:1].upper()}{o.words[1:]}." for o in relaxed)
    fates = Counter(v.fate for _, v in search.verdicts().values())
    return ", ".join(f"{fates[f]} {text}" for f, text in _FATES if fates[f]) + "."


def _searched(search: Search) -> str:
    found = Counter(v.fate for _, v in search.verdicts().values())
    parts = "; ".join(f"{found[f]:,}: {text}" for f, text in _FATES if found[f])
    return (
        f"{len(search.candidates):,} candidates, {search.compiled} programs compiled"
        f" for them now. {parts}."
    )


def _best_table(search: Search, ranked: Sequence[Candidate]) -> Table:
    headings = [
        "partition, rules", "batch", "TTFT", "limited by", "TPOT", "limited by",
        "tokens/s", "/user", "/chip", "memory",
    ]  # fmt: skip
    rows = []
    limit = None if search.aim == "frontier" else _MOST_ROWS
    for candidate in ranked[:limit]:
        r: Record | None = search.record(candidate)
        assert r is not None
        assert r.prefill is not None
        assert r.decode is not None
        memory = r.require("needed_bytes") / r.require("available_bytes")
        rows.append(
            [
                candidate.family,
                str(r.batch_size),
                words.seconds_of(r, "ttft_s"),
                words.part_name(r.prefill.bottleneck or ""),
                words.seconds_of(r, "tpot_s"),
                words.part_name(r.decode.bottleneck or ""),
                units.digits(r.require("output_tokens_per_s")),
                units.digits(r.require("tokens_per_s_per_user")),
                units.digits(r.require("tokens_per_s_per_chip")),
                units.percent(memory),
            ]
        )
    return headings, rows


def _families_table(search: Search) -> Table:
    """Returns a row for each partition and rules: what became of its best candidate."""
    groups: dict[str, list[tuple[Candidate, Verdict]]] = {}
    for candidate, verdict in search.verdicts().values():
        name = f"{candidate.point.partition} {candidate.point.rules}"
        groups.setdefault(name, []).append((candidate, verdict))
    kept: list[tuple[Candidate, Verdict]] = []
    for pairs in groups.values():
        fate = min((v.fate for _, v in pairs), key=_KINDEST.index)
        alike = [pair for pair in pairs if pair[1].fate == fate]
        kept.append(max(alike, key=lambda pair: _merit(search, *pair)))
    kept.sort(
        key=lambda pair: (_KINDEST.index(pair[1].fate), -_merit(search, *pair)[1])
    )
    rows = []
    for candidate, verdict in kept:
        known: Prospect | None = None
        if candidate.refused is None:
            known = search.prospect(candidate)
        rows.append(
            [
                candidate.family,
                str(candidate.batch_size),
                _bounded(search, candidate, "ttft_s", known),
                _bounded(search, candidate, "tpot_s", known),
                "-" if known is None else _rate_cell(known),
                f"it {_because(search, candidate, verdict)}",
            ]
        )
    return ["partition, rules", "batch", "TTFT", "TPOT", "/chip", "because"], rows


def _merit(search: Search, candidate: Candidate, verdict: Verdict) -> tuple[float, ...]:
    """Returns a sort key: nearest to the objective, then the best."""
    if candidate.refused is not None:
        return (0.0, -float(candidate.batch_size))
    missed = search.prospect(candidate).misses(search.objective)
    return (-missed[0][1] if missed else 0.0, search.value(candidate))


def _bounded(
    search: Search, candidate: Candidate, figure: str, known: Prospect | None
) -> str:
    if known is None:
        return "-"
    text = units.seconds(getattr(known, figure))
    return text if search.is_known(candidate, figure) else f">{text}"


def _rate_cell(known: Prospect) -> str:
    text = units.digits(known.tokens_per_s_per_chip)
    return text if known.exact else f"<{text}"


def _changes_table(outcomes: Sequence[Outcome]) -> Table:
    rows = [[o.title, "yes" if o.found else "no", o.words] for o in outcomes]
    return ["one change", "meets it", "with"], rows
