"""What arXiv:2603.05692 printed: workloads, nodes and the figures of its claims.

Topcu et al., "Parallelization Strategies for Dense LLM Deployment", 5 March 2026. All
of it came from a simulator of formulas; nothing was compiled, and pipelines and
hybrids were not run either. Batches are of one replica: devices that a partition
leaves over run more replicas.
"""

import dataclasses

URL = "https://arxiv.org/abs/2603.05692"

# The node of each model in the paper, and the others it is asked for here. No compiler
# runs for AMD's without the device; their programs are compiled for an H100.
CHIPS = ("h100", "h200", "mi325x", "mi355x")
COMPILED_FOR = "h100"
NODE_DEVICES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One model on one kind of prompts.

    Attributes:
      name: as figures and rows call it.
      model: preset.
      weights, kv: dtypes in which both are stored.
      chip: of the paper's node.
      input_len, output_len: its mean lengths, tokens.
    """

    name: str
    model: str
    weights: str
    kv: str
    chip: str
    input_len: int
    output_len: int


_70B = dict(model="llama-3.1-70b", weights="fp8", kv="fp8", chip="mi325x")
_405B = dict(model="llama-3.1-405b", weights="int4", kv="fp8", chip="mi355x")
LONG_70B = Case(name="70B long", input_len=9092, output_len=208, **_70B)
SHORT_70B = Case(name="70B short", input_len=106, output_len=26, **_70B)
LONG_405B = Case(name="405B long", input_len=9428, output_len=684, **_405B)
SHORT_405B = Case(name="405B short", input_len=89, output_len=20, **_405B)
CASES = (LONG_70B, LONG_405B, SHORT_70B, SHORT_405B)

# C1-C3: the partition that TP8 is faster than, and how many times in prefill, decode.
SPEEDUPS_70B = {"tp4": (1.87, 1.67), "tp2": (3.61, 3.01)}
SPEEDUPS_405B = {"tp4": (1.89, 1.61), "tp4_pp2": (1.90, 1.62), "tp2": (3.67, 2.81)}
# C6: fall of TTFT against TP1, 405B at batch 32. TP2 was slower than TP1.
FALL_OF_TTFT = {"tp8": 0.68, "tp4": 0.38}
# C8: fall of TTFT of TP8 at batch 32 when links are twice as fast.
FALL_WITH_LINKS = 0.34
# C9: most that point-to-point may take of TTFT of PP8 at a fifth of the link rate.
STAGE_LINKS_SHARE, FIFTH = 0.005, 0.2
# C11: sequences of one nano-batch on a device of 405B.
LARGEST_BATCH = {"tp1": 32, "pp4": 256, "pp8": 512}
# C12: PP8 against data parallel only, 405B: times the batch, throughput, TTFT, TPOT.
PP8_TIMES = dict(batch=16.0, throughput=1.35, prefill=16.03, decode=4.24)
# C13: throughput of PP8 over no parallelism at batch 1, and PP8's batch.
PP8_GAIN = {
    "70B long": (1024, 4.2),
    "70B short": (1024, 37.0),
    "405B long": (512, 13.8),
    "405B short": (512, 44.0),
}
