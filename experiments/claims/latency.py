"""C1 to C9: claims about latency and what it is made of."""

from collections.abc import Mapping

from experiments.claims import measured
from experiments.claims.accounting import ideal_ttft_s
from experiments.claims.judge import Cell, Finding, close, missing, subject, verdict
from experiments.claims.printed import (
    CHIPS,
    FALL_OF_TTFT,
    FALL_WITH_LINKS,
    FIFTH,
    LONG_70B,
    LONG_405B,
    SPEEDUPS_70B,
    SPEEDUPS_405B,
    STAGE_LINKS_SHARE,
    Case,
)
from experiments.claims.rows import Row, Rows
from experiments.report import units
from sharding.chips import CHIPS as CHIP_FILES

TENSOR = ("tp1", "tp2", "tp4", "tp8")
PIPELINES = ("pp2", "pp4", "pp8")
HYBRIDS = ("tp4_pp2", "tp2_pp4", "tp2_pp2")
LONG = (LONG_70B, LONG_405B)
_EIGHT_BITS = "fp8"


def speedups(
    rows: Rows, case: Case, printed: Mapping[str, tuple[float, float]]
) -> Finding:
    """C1 to C3: how many times faster TP8 is, in prefill and decode, at batch 256."""
    cells: list[Cell] = []
    for chip in CHIPS:
        fast = rows.timed(case, chip, "tp8", 256)
        for name, (prefill, decode) in printed.items():
            slow = rows.timed(case, chip, name, 256)
            what = f"{case.name}, tp8 over {name}"
            if fast is None or slow is None:
                found = [rows.get(case, chip, p, 256) for p in ("tp8", name)]
                cells.append(missing(chip, what, *found))
                continue
            ttft = slow.require("ttft_s") / fast.require("ttft_s")
            tpot = slow.require("tpot_s") / fast.require("tpot_s")
            cells.append(
                Cell(
                    chip=chip,
                    subject=what,
                    holds=close(ttft, prefill) and close(tpot, decode),
                    direction=ttft > 1.05 and tpot > 1.05,
                    text=(
                        f"prefill {ttft:.2f}x (printed {prefill}x), decode {tpot:.2f}x"
                        f" (printed {decode}x)"
                    ),
                    rows=(fast, slow),
                )
            )
    return verdict(cells, on="chip and partition")


def c1(rows: Rows) -> Finding:
    """70B: TP8 over TP4."""
    return speedups(rows, LONG_70B, {"tp4": SPEEDUPS_70B["tp4"]})


def c2(rows: Rows) -> Finding:
    """70B: TP8 over TP2."""
    return speedups(rows, LONG_70B, {"tp2": SPEEDUPS_70B["tp2"]})


def c3(rows: Rows) -> Finding:
    """405B: TP8 over TP4, TP4_PP2 and TP2."""
    return speedups(rows, LONG_405B, SPEEDUPS_405B)


def c4(rows: Rows) -> Finding:
    """TP8 has the best TTFT and TPOT at every batch; PP alone gains no latency."""
    cells = []
    for case in LONG:
        for chip in CHIPS:
            for batch in _batches(rows, case, chip):
                cells += _best_is_tp8(rows, case, chip, batch)
    return verdict(
        cells,
        on="the batch and the chip",
        measured=measured.c4(rows),
        why="A prefill of many sequences keeps a pipeline full and sends almost nothing"
        " between its stages; TPOT is another matter.",
    )


def _batches(rows: Rows, case: Case, chip: str) -> list[int]:
    """Returns batch sizes at which TP8 and another partition fit."""
    others = {b for p in (*PIPELINES, *HYBRIDS) for b in rows.batches(case, chip, p)}
    return sorted(others & set(rows.batches(case, chip, "tp8")))


def _best_is_tp8(rows: Rows, case: Case, chip: str, batch: int) -> list[Cell]:
    found = [
        row
        for name in (*TENSOR, *PIPELINES, *HYBRIDS)
        if (row := rows.get(case, chip, name, batch)) is not None and row.ok
    ]
    best = {
        metric: min(found, key=lambda row, m=metric: row.require(m))
        for metric in ("ttft_s", "tpot_s")
    }
    tp8 = next(row for row in found if row.partition == "tp8")
    holds = all(
        tp8.require(metric) <= 1.0001 * row.require(metric)
        for metric, row in best.items()
    )
    texts = [
        f"best {metric[:4].upper()} {row.partition}"
        f" {units.seconds(row.require(metric))}"
        + ("" if row is tp8 else f" (tp8 {units.seconds(tp8.require(metric))})")
        for metric, row in best.items()
    ]
    return [
        Cell(
            chip=chip,
            subject=subject(case, batch),
            holds=holds,
            text=", ".join(texts),
            rows=(tp8, *best.values()),
        )
    ]


def c5(rows: Rows) -> Finding:
    """TP scales TTFT almost linearly, TPOT less; all-reduces limit it at TP8."""
    cells = []
    for case in LONG:
        for chip in CHIPS:
            for batch in (32, 256):
                cells.append(_scaling(rows, case, chip, batch))
    return verdict(cells, on="chip and batch", measured=measured.c5(rows))


def _scaling(rows: Rows, case: Case, chip: str, batch: int) -> Cell:
    what = subject(case, batch)
    wide = rows.timed(case, chip, "tp8", batch)
    narrow = rows.timed(case, chip, "tp2", batch)
    if wide is None or narrow is None:
        found = [rows.get(case, chip, p, batch) for p in ("tp8", "tp2")]
        return missing(chip, what, *found)
    ttft = narrow.require("ttft_s") / wide.require("ttft_s")
    tpot = narrow.require("tpot_s") / wide.require("tpot_s")
    share = wide.share("ttft", "tensor links")
    parts = wide.tpot_parts_s or {}
    largest = max(parts, key=lambda name: parts[name])
    return Cell(
        chip=chip,
        subject=what,
        # Of the four times that there are to gain.
        holds=ttft >= 0.8 * 4 and tpot < ttft and largest == "tensor links",
        direction=tpot < ttft,
        text=(
            f"tp2 to tp8: TTFT {ttft:.2f}x, TPOT {tpot:.2f}x of 4x; all-reduces are"
            f" {units.percent(share)} of TTFT and"
            f" {units.percent(wide.share('tpot', 'tensor links'))} of TPOT, whose"
            f" largest part is {largest}"
        ),
        rows=(narrow, wide),
    )


def c6(rows: Rows) -> Finding:
    """405B at batch 32: TP8 and TP4 cut TTFT of TP1 by 68 and 38 %; TP2 adds to it."""
    cells = []
    for chip in CHIPS:
        found = {n: rows.timed(LONG_405B, chip, n, 32) for n in TENSOR}
        times = {n: r.require("ttft_s") for n, r in found.items() if r is not None}
        what = subject(LONG_405B, 32)
        if len(times) < len(TENSOR):
            own = [rows.get(LONG_405B, chip, n, 32) for n in TENSOR]
            cells.append(missing(chip, what, *own))
            continue
        falls = {n: 1 - times[n] / times["tp1"] for n in TENSOR[1:]}
        cells.append(
            Cell(
                chip=chip,
                subject=what,
                holds=falls["tp2"] < 0
                and all(close(falls[n], fall) for n, fall in FALL_OF_TTFT.items()),
                direction=falls["tp8"] > falls["tp4"] > 0 > falls["tp2"],
                text=", ".join(
                    f"{n} {units.seconds(times[n])}"
                    + (f" ({-100 * falls[n]:+.0f} %)" if n in falls else "")
                    for n in TENSOR
                ),
                rows=tuple(row for row in found.values() if row is not None),
            )
        )
    return verdict(
        cells,
        on="chip",
        why="On a mesh two devices share one link of seven, through a switch all of"
        f" them: only on a mesh is tp2's all-reduce dear. {_ideal_falls()}",
    )


def _ideal_falls() -> str:
    """Returns C6 of the paper's chip from products at the 8-bit rate alone."""
    chip = CHIP_FILES[LONG_405B.chip]
    times = [
        ideal_ttft_s(LONG_405B, chip, t, 32, dtype=_EIGHT_BITS) for t in (1, 2, 4, 8)
    ]
    falls = ", ".join(
        f"tp{t} {100 * (s / times[0] - 1):+.0f} %"
        for t, s in zip((2, 4, 8), times[1:], strict=True)
    )
    return (
        f"Modelled, with products at the 8-bit rate of {chip.name} and nothing but them"
        f" and all-reduces, it nearly comes out: {falls}. Ours run in bfloat16."
    )


def _ideal_links() -> str:
    """Returns C8 of the paper's chip from products at the 8-bit rate alone."""
    chip = CHIP_FILES[LONG_405B.chip]
    slow, fast = (
        ideal_ttft_s(LONG_405B, chip, 8, 32, dtype=_EIGHT_BITS, links=times)
        for times in (1, 2)
    )
    return (
        f"Modelled as in C6, {chip.name} would save {100 * (1 - fast / slow):.0f} % of"
        " TTFT."
    )


def c7(rows: Rows) -> Finding:
    """The all-reduces' share of TTFT is nearly the same at every TP degree."""
    cells = []
    for case in LONG:
        for chip in CHIPS:
            what = subject(case, 256)
            found = [rows.timed(case, chip, n, 256) for n in TENSOR[1:]]
            known = [row for row in found if row is not None]
            if len(known) < len(found):
                own = [rows.get(case, chip, n, 256) for n in TENSOR[1:]]
                cells.append(missing(chip, what, *own))
                continue
            shares = [row.share("ttft", "tensor links") for row in known]
            cells.append(
                Cell(
                    chip=chip,
                    subject=what,
                    holds=max(shares) - min(shares) <= 0.05,
                    text=", ".join(
                        f"{row.partition} {units.percent(share)} (at most"
                        f" {units.percent(_most_share(row))})"
                        for row, share in zip(known, shares, strict=True)
                    ),
                    rows=tuple(known),
                )
            )
    return verdict(
        cells,
        on="how the chips are wired",
        measured=measured.c7(rows),
        why="Nearly constant: within 5 percentage points. In brackets the share if"
        " nothing waited for memory.",
    )


def _most_share(row: Row) -> float:
    parts = row.ttft_parts_s or {}
    return parts.get("tensor links", 0.0) / _without_memory(row)


def c8(rows: Rows) -> Finding:
    """TP8 at batch 32: links of twice the rate cut TTFT by 34 %."""
    cells = []
    for case in LONG:
        for chip in CHIPS:
            slow, fast = (
                rows.timed(case, chip, "tp8", 32, links=times) for times in (1.0, 2.0)
            )
            if slow is None or fast is None:
                own = rows.get(case, chip, "tp8", 32, links=1.0)
                cells.append(missing(chip, subject(case, 32), own))
                continue
            saved = slow.require("ttft_s") - fast.require("ttft_s")
            fall = saved / slow.require("ttft_s")
            cells.append(
                Cell(
                    chip=chip,
                    subject=subject(case, 32),
                    holds=close(fall, FALL_WITH_LINKS),
                    direction=fall > 0.02,
                    text=(
                        f"TTFT {units.seconds(slow.require('ttft_s'))} to"
                        f" {units.seconds(fast.require('ttft_s'))}:"
                        f" {-100 * fall:+.1f} % (printed -34 %);"
                        f" {-100 * saved / _without_memory(slow):+.1f} % if nothing"
                        " waited for memory"
                    ),
                    rows=(slow, fast),
                )
            )
    return verdict(
        cells,
        on="chip",
        why="Twice the rate can save at most half of the all-reduces' share; the last"
        f" figure is what that would be if nothing waited for memory. {_ideal_links()}",
    )


def _without_memory(row: Row) -> float:
    """Returns TTFT if no instruction waited for memory."""
    return row.require("ttft_s") - (row.ttft_parts_s or {}).get("hbm", 0.0)


def c9(rows: Rows) -> Finding:
    """PP8 at batch 512: at a fifth of the link rate, hops are under 0.5 % of TTFT."""
    cells = []
    for case in LONG:
        for chip in CHIPS:
            what = subject(case, 512)
            row = rows.timed(case, chip, "pp8", 512, links=FIFTH)
            if row is None:
                own = rows.get(case, chip, "pp8", 512, links=FIFTH)
                cells.append(missing(chip, what, own))
                continue
            share = row.share("ttft", "stage links")
            cells.append(
                Cell(
                    chip=chip,
                    subject=what,
                    holds=share < STAGE_LINKS_SHARE,
                    text=f"stage links are {100 * share:.2f} % of TTFT",
                    rows=(row,),
                )
            )
    return verdict(cells, on="chip", measured=measured.c9(rows))
