"""The claims C1 to C14: what the paper printed, who judges, and what is drawn."""

from experiments.claims import figures, latency, throughput
from experiments.claims.judge import Claim
from experiments.claims.points import SWEPT_LINKS
from experiments.claims.printed import (
    CASES,
    FIFTH,
    LONG_70B,
    LONG_405B,
    SHORT_70B,
    SHORT_405B,
)

_TENSOR = ("tp2", "tp4", "tp8")
_ALONG = ("tp8", "tp4_pp2", "tp2_pp4", "pp8")
_WHERE = "Where the time goes, in absolute units; † with memory that is not there."

CLAIMS = (
    Claim(
        name="C1",
        printed="70B, 9092 in, 208 out, batch 256: TP8 is 1.87x as fast as TP4 in"
        " prefill and 1.67x in decode.",
        judge=latency.c1,
        figures=lambda rows: figures.parts(rows, LONG_70B, ("tp4", "tp8"), 256),
        caption=_WHERE,
    ),
    Claim(
        name="C2",
        printed="The same, TP8 over TP2: 3.61x and 3.01x.",
        judge=latency.c2,
        figures=lambda rows: figures.parts(rows, LONG_70B, _TENSOR, 256),
        caption=_WHERE,
    ),
    Claim(
        name="C3",
        printed="405B, 9428 in, 684 out, batch 256: TP8 over TP4 1.89x and 1.61x, over"
        " TP4_PP2 1.90x and 1.62x, over TP2 3.67x and 2.81x.",
        judge=latency.c3,
        figures=lambda rows: figures.parts(rows, LONG_405B, (*_TENSOR, "tp4_pp2"), 256),
        caption=_WHERE,
    ),
    Claim(
        name="C4",
        printed="TP8 gives the best TTFT and TPOT at every batch size; pipelines alone"
        " gain no latency.",
        judge=latency.c4,
        figures=lambda rows: [
            figure
            for case in (LONG_70B, LONG_405B)
            for metric in ("ttft_s", "tpot_s")
            for figure in figures.lines(rows, case, metric)
        ],
        caption="TTFT and TPOT against the batch size, where they fit.",
    ),
    Claim(
        name="C5",
        printed="TP scales TTFT almost linearly and TPOT less; at high degrees the"
        " all-reduce is the bottleneck.",
        judge=latency.c5,
        figures=lambda rows: figures.parts(rows, LONG_405B, _TENSOR, 32),
        caption=_WHERE,
    ),
    Claim(
        name="C6",
        printed="405B, batch 32: TTFT falls by 68 % at TP8 and 38 % at TP4 against TP1;"
        " TP2 is slower than TP1.",
        judge=latency.c6,
        figures=lambda rows: figures.parts(
            rows, LONG_405B, ("tp1", *_TENSOR), 32, phases=("ttft",)
        ),
        caption=_WHERE,
    ),
    Claim(
        name="C7",
        printed="The share of the all-reduces in TTFT is nearly the same at every TP"
        " degree.",
        judge=latency.c7,
        figures=lambda rows: figures.parts(
            rows, LONG_405B, _TENSOR, 256, phases=("ttft",)
        ),
        caption=_WHERE,
    ),
    Claim(
        name="C8",
        printed="TP8, batch 32: twice the link bandwidth cuts TTFT by 34 %.",
        judge=latency.c8,
        figures=lambda rows: [
            figure
            for case in (LONG_70B, LONG_405B)
            for figure in figures.swept_links(rows, case, "tp8", 32, SWEPT_LINKS)
        ],
        caption="The same program priced with slower and faster links, at published"
        " rates.",
    ),
    Claim(
        name="C9",
        printed="PP8, batch 512: even at a fifth of the link bandwidth, point-to-point"
        " is under 0.5 % of TTFT.",
        judge=latency.c9,
        figures=lambda rows: figures.parts(
            rows, LONG_405B, ("pp8",), 512, phases=("ttft",), links=(FIFTH, 1.0)
        ),
        caption=_WHERE,
    ),
    Claim(
        name="C10",
        printed="PP gives more throughput than TP and hybrids at every batch size.",
        judge=throughput.c10,
        figures=lambda rows: [
            figure
            for case in CASES
            for figure in figures.lines(rows, case, "node_tokens_per_s")
        ],
        caption="Output tokens per second of a node of eight, where they fit.",
    ),
    Claim(
        name="C11",
        printed="405B holds at most 32 sequences a device unpartitioned, 256 under PP4"
        " and 512 under PP8.",
        judge=throughput.c11,
        figures=figures.memory,
        caption="Closed forms. The red line is the memory of the chip.",
    ),
    Claim(
        name="C12",
        printed="405B: PP8 has 16x the batch of data parallelism alone and 1.35x its"
        " throughput; prefill takes 16.03x, decode 4.24x as long.",
        judge=throughput.c12,
        figures=lambda rows: figures.parts(
            rows, LONG_405B, ("pp8",), 4096, phases=("ttft", "tpot")
        ),
        caption=_WHERE,
    ),
    Claim(
        name="C13",
        printed="Throughput over no parallelism at batch 1: 70B PP8 at batch 1024 4.2x"
        " (long) and 37x (short), 405B PP8 at batch 512 13.8x and 44x.",
        judge=throughput.c13,
        figures=lambda rows: [
            figure
            for case in (SHORT_70B, SHORT_405B)
            for figure in figures.lines(
                rows, case, "node_tokens_per_s", ("tp1", "tp8", "pp8")
            )
        ],
        caption="Output tokens per second of a node of eight.",
    ),
    Claim(
        name="C14",
        printed="TP degree is the knob of latency, PP depth that of throughput, and"
        " hybrids trade one for the other.",
        judge=throughput.c14,
        figures=lambda rows: [
            figure
            for case in (LONG_70B, LONG_405B)
            for figure in figures.tradeoff(rows, case, _ALONG)
        ],
        caption="Left is faster for a user, up is cheaper; numbers are batch sizes.",
    ),
)

CROSSOVERS = (
    Claim(
        name="X1",
        printed="A TP x PP hybrid overtakes pure TP as the batch grows:"
        " FasterTransformer saw it for 530B between batches 64 and 256, on two nodes.",
        judge=throughput.hybrid_overtakes,
        figures=lambda rows: [],
        caption="",
    ),
    Claim(
        name="X2",
        printed="On one node of 405B, TP is about 5.6x better in latency and PP about"
        " 1.5x in throughput.",
        judge=throughput.tensor_or_pipeline,
        figures=lambda rows: [],
        caption="",
    ),
)
