"""Made-up records for tests of reports and sweeps: plausible, and never a result.

A few lines of roofline arithmetic for Llama-3.1-70B stand in for the compiler, so
that winners, frontiers and points that do not fit come out as they would.
"""

import dataclasses
import os
import signal
import time

from experiments.report.record import (
    CollectiveRow,
    MemoryRow,
    PhaseRecord,
    Point,
    Provenance,
    Record,
    TimeParts,
    metrics,
)
from sharding.chips import Chip
from sharding.chips.calibration import Calibration, Header, Sample

PARTITIONS = ("tp8", "tp4_pp2", "tp2_pp4", "pp8", "dp2_tp4", "dp4_tp2", "dp8")
_LAYERS, _WIDTH, _WEIGHTS, _KV_TOKEN = 80, 8192, 141e9, 327_680
# Peak FLOP/s, HBM bytes/s, HBM bytes, link bytes/s, latency of a collective.
_CHIPS = {
    "h100": (989e12, 3.35e12, 80e9, 450e9, 9e-6),
    "v5p": (459e12, 2.765e12, 95e9, 180e9, 3e-6),
}
MADE = Provenance(
    commit="0" * 40,
    dirty=False,
    python="3.11.0",
    versions={"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.40"},
    flags={"XLA_FLAGS": ""},
    command="made up by tests/fakes.py",
    time="2026-01-01T00:00:00Z",
)
CALIBRATED = Header(
    chip="h100",
    devices=("NVIDIA H100 80GB HBM3",) * 2,
    driver="580.1",
    versions={"jax": "0.11.2"},
    flags={},
    command="python -m experiments.calibrate",
    commit="0123",
    time="2026-11-24T10:00:00Z",
)


def calibrated(chip: Chip, *samples: Sample) -> Chip:
    """Returns a chip with samples of benchmarks that nobody ran."""
    found = Calibration(headers=(CALIBRATED,), samples=samples, digest="0")
    return dataclasses.replace(chip, calibrated=found)


def point(**changes) -> Point:
    """Returns a point, tp8 of 70B on h100:8 at batch 16 unless changed."""
    fields: dict = dict(
        model="llama-3.1-70b", target="h100:8", chip="h100", partition="tp8",
        num_chips=8, num_devices=8, rules="megatron", dtype="bfloat16",
        batch_size=16, input_len=2048, output_len=128,
        layers="unrolled", context={"code": "0123456789abcdef", "jax": "0.10.2"},
    )  # fmt: skip
    return Point(**{**fields, **changes})


def points() -> list[Point]:
    return [
        point(target=target, chip=target.split(":")[0], partition=name, batch_size=b)
        for target in ("h100:8", "v5p:2x2x2")
        for b in (1, 16, 64)
        for name in PARTITIONS
    ]


def evaluate(p: Point) -> Record:
    """Returns a made-up record of `p`."""
    degrees = {"tp": 1, "pp": 1, "dp": 1}
    degrees |= {part[:2]: int(part[2:]) for part in p.partition.split("_")}
    tp, pp, dp = degrees["tp"], degrees["pp"], degrees["dp"]
    if p.batch_size % dp:
        reason = f"cannot split batch={p.batch_size} over data={dp}: not divisible."
        return Record.of(p, MADE, status="refused", reason=reason)
    micro = min(p.batch_size // dp, 2 * pp) if pp > 1 else 1
    prefill = _phase(p, tp, pp, dp, p.input_len, micro + pp - 1, micro)
    decode = _phase(p, tp, pp, dp, 1, pp, pp)
    needed = max(prefill[0].memory.peak_bytes, decode[0].memory.peak_bytes)
    available = int(_CHIPS[p.chip][2])
    if needed > available:
        return Record.of(
            p,
            MADE,
            status="does not fit",
            reason="Weights of 141 GB are whole on every replica.",
            needed_bytes=needed,
            available_bytes=available,
            prefill=prefill[0],
            decode=decode[0],
        )
    times = metrics(
        ttft_parts_s=prefill[1],
        tpot_parts_s=decode[1],
        batch_size=p.batch_size,
        output_len=p.output_len,
        num_chips=8,
    )
    return Record.of(
        p,
        MADE,
        status="ok",
        micro_batches=micro,
        needed_bytes=needed,
        available_bytes=available,
        ttft_limit_s=prefill[2],
        tpot_limit_s=decode[2],
        prefill=prefill[0],
        decode=decode[0],
        **times,
    )


def no_setup() -> None:
    """Prepares nothing."""


def slowly(point: Point) -> Record:
    """Takes long enough to be interrupted."""
    time.sleep(0.3)
    return evaluate(point)


def badly(point: Point) -> Record:
    """Dies, fails or is killed at some points, as a compiler might."""
    if point.partition == "tp4_pp2":
        os.write(2, b"F0000 everything is lost\n")
        os.abort()
    if point.partition == "pp8":
        os.kill(os.getpid(), signal.SIGKILL)
    if point.partition == "tp2_pp4":
        raise ValueError("cannot read this instruction: %fusion.7")
    return evaluate(point)


def failed(p: Point, reason: str) -> Record:
    """Returns the record of a point whose evaluation broke."""
    return Record.of(p, MADE, status="failed", reason=reason)


def _phase(
    p: Point, tp: int, pp: int, dp: int, tokens: int, ticks: int, busy: int
) -> tuple[PhaseRecord, TimeParts, float]:
    peak, bandwidth, _, link, latency = _CHIPS[p.chip]
    sequences = p.batch_size / dp
    weights = _WEIGHTS / (tp * pp)
    kv = sequences * (p.input_len + p.output_len) * _KV_TOKEN / (tp * pp)
    flops = 2 * 70e9 * sequences * tokens / (tp * pp)
    hbm = weights * busy + kv
    each = int(sequences * tokens / busy * _WIDTH * 2)
    rows, links = [], {}
    if tp > 1:
        count = 2 * _LAYERS // pp * busy + 2
        rows.append(_row("tensor", "all-reduce", count, each, tp, "layers.py:112"))
    if pp > 1:
        rows.append(_row("stage", "permute", ticks, each, pp, "pipeline.py:87"))
        rows.append(_row("stage", "all-gather", 1, each // 9, pp, "program.py:141"))
    for row in rows:
        seconds = row.count * latency * (1 + 0.2 * row.group_size)
        links[row.axis] = links.get(row.axis, 0.0) + seconds + row.wire_bytes / link
    compute_s, hbm_s = flops / (0.9 * peak), hbm / (0.92 * bandwidth)
    parts = TimeParts(
        compute=compute_s if compute_s > hbm_s else 0.05 * hbm_s,
        hbm=hbm_s if hbm_s >= compute_s else 0.03 * compute_s,
        links=links,
        overhead=3e-4,
        bubble=max(compute_s, hbm_s) * (ticks - busy) / busy,
    )
    limit_s = max(flops / peak, (weights + kv) / bandwidth)
    activations = sequences * tokens / busy * _WIDTH * 2 * 9 / tp + 2e8
    phase = PhaseRecord(
        layers="unrolled",
        flops=int(flops * 1.004),
        hbm_bytes=int(hbm * 1.04),
        collectives=tuple(rows),
        memory=MemoryRow(
            weights_bytes=int(weights),
            kv_bytes=int(kv),
            activations_bytes=int(activations),
            other_bytes=int(4e8),
            peak_bytes=int(weights + kv + activations + 4e8),
        ),
        compile_s=5.2,
        ticks=ticks,
        busy_ticks=busy,
        closed_form_flops=flops,
        xla_flops=None if p.chip == "h100" else flops * 1.004 / 7,
        bottleneck=parts.bottleneck,
        pct_of_limit=100 * limit_s / parts.total_s,
        mfu=flops / peak / parts.total_s,
        mbu=(weights + kv) / bandwidth / parts.total_s,
    )
    return phase, parts, limit_s


def _row(
    axis: str, kind: str, count: int, each: int, n: int, source: str
) -> CollectiveRow:
    factor = {"all-reduce": 2 * (n - 1) / n, "all-gather": (n - 1) / n}.get(kind, 1)
    return CollectiveRow(
        axis=axis,
        kind=kind,
        count=count,
        payload_bytes=count * each,
        payload_bytes_each=each,
        wire_bytes=int(count * each * factor),
        group_size=n,
        source=source,
    )
