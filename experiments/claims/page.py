"""The page: every claim with its verdict, its cells, its figure and its rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.claims import figures, printed, questions
from experiments.claims.claims import CLAIMS, CROSSOVERS
from experiments.claims.judge import DEPENDS, FAILS, HOLDS, UNKNOWN, Claim
from experiments.claims.rows import FILE_NAME, Row, Rows
from experiments.report import html, units
from experiments.report.tables import Table

TITLE = "Do the paper's claims about TP and PP hold?"
HEADINGS = (
    "key", "origin", "model", "weights, KV", "compiled for", "chip", "partition",
    "rules", "batch", "in", "out", "status", "TTFT", "TPOT", "tokens/s", "needed",
)  # fmt: skip
NOTES = (
    "Times are estimates: programs compiled for described H100s, priced with the rates"
    " of each chip's file. For mi325x and mi355x no compiler runs without the device,"
    " so they are costed from those programs too.",
    "Weights are stored in 8 bits (70B) or 4 bits (405B) and the cache in 8; products"
    " run in bfloat16. A batch is of one replica; devices left over run more replicas.",
    "† the point does not fit the node: its time is what the program would take with"
    " enough memory.",
    "Decode reads 4-bit weights as they are stored. With 256 long prompts pp8 of 405B"
    " moves 1.3 times the least bytes, tp4_pp2 1.6 times and tp8 1.8 times; most of"
    " what is too much are scores of attention, in 32 bits. Prefill writes 4-bit"
    " weights out wide, a layer at a time.",
    "A number of the paper holds where ours is within a tenth of it.",
)


def page(rows: Rows, provenance: Table, notes: Sequence[str] = ()) -> str:
    """Returns the page as HTML; it loads nothing, and all text is escaped."""
    claims = [_claim(claim, rows) for claim in CLAIMS]
    return html.render(
        "page.html.j2",
        Path(__file__).parent,
        title=TITLE,
        lead=summary(rows),
        url=printed.URL,
        notes=[*NOTES, rates(rows), *notes],
        claims=claims,
        crossovers=[_claim(claim, rows) for claim in CROSSOVERS],
        answers=questions.answers(rows),
        parts=list(figures.PARTS.items()),
        file=FILE_NAME,
        headings=HEADINGS,
        table_rows=[(row.key, _cells(row)) for row in rows.all],
        provenance=provenance,
    )


def rates(rows: Rows) -> str:
    """Returns where the rates of each chip are from, in a sentence."""
    found = {
        row.chip: row.rates
        for row in rows.all
        if row.origin != "measured" and row.links is None
    }
    words = "; ".join(f"{chip}: {said}" for chip, said in found.items())
    return f"Rates: {words or 'none used'}."


def summary(rows: Rows) -> str:
    """Returns how many claims hold, in a sentence."""
    found = [claim.judge(rows).verdict for claim in CLAIMS]
    counts = {word: found.count(word) for word in (HOLDS, FAILS, DEPENDS, UNKNOWN)}
    words = {
        HOLDS: "hold as printed",
        FAILS: "do not",
        DEPENDS: "depend on chip, batch or memory",
        UNKNOWN: "cannot be told yet",
    }
    texts = [f"{n} {words[word]}" for word, n in counts.items() if n]
    return f"Of {len(CLAIMS)} claims, {', '.join(texts)}."


def _claim(claim: Claim, rows: Rows) -> dict[str, Any]:
    drawn = claim.figures(rows)
    return dict(
        name=claim.name,
        printed=claim.printed,
        finding=claim.judge(rows),
        figures=drawn,
        caption=claim.caption,
        stacked=any(
            figure["layout"].get("barmode") == "stack"
            and any(bar.get("name") in figures.PARTS for bar in figure["data"])
            for _, figure in drawn
        ),
    )


def _cells(row: Row) -> list[str]:
    links = "" if row.links is None else f", links x {row.links:g}"
    memory = "" if row.memory == "own" else " †"
    timed = row.ok
    micro = "" if row.asked_micro_batches is None else f" M{row.asked_micro_batches}"
    return [
        row.origin if row.run is None else f"{row.origin}: {row.run}",
        row.model,
        f"{row.weights}, {row.kv}",
        row.target,
        f"{row.chip}{links}{memory}",
        ", ".join([f"{row.partition}{micro}", *filter(None, row.choices.split(","))]),
        row.rules,
        f"{row.batch_size:,}",
        f"{row.input_len:,}",
        f"{row.output_len:,}",
        row.status,
        units.seconds(row.require("ttft_s")) if timed else "",
        units.seconds(row.require("tpot_s")) if timed else "",
        units.digits(_rate(row)) if timed else "",
        units.bytes_(row.needed_bytes) if row.needed_bytes else "",
    ]


def _rate(row: Row) -> float:
    """Returns tokens/s: of a node, but of the devices that ran where any did."""
    return row.node_tokens_per_s if row.run is None else row.tokens_per_s
