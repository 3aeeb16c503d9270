"""How programs are best written for a target: tables, the only place that says so.

The first row whose condition holds decides. What each choice means stands with the
field of `sharding.program.Program` that holds it; why it was made, beside its row;
with which figures, in docs/performance.md.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from jaxllm.model import Layers
from sharding.attention import Attention, refusal
from sharding.layout import Ticks
from sharding.program import Program
from sharding.target import Target

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class When:
    """For which programs and targets a row holds; None and 0 for any.

    Attributes:
      platforms: of the target.
      attached: whether programs run there; described devices only compile.
      phase: "prefill" or "decode".
      tokens_above: prompt tokens of a micro-batch.
      groups_above: groups in flight through the stages.
      layers_above: of the model.
    """

    platforms: tuple[str, ...] | None = None
    attached: bool | None = None
    phase: Literal["prefill", "decode"] | None = None
    tokens_above: int = 0
    groups_above: int = 0
    layers_above: int = 0

    def holds(self, target: Target, program: Program) -> bool:
        rows = program.layout.replica_batch // program.prefill_micro_batches
        return (
            (self.platforms is None or target.platform in self.platforms)
            and self.attached in (None, not target.compile_only)
            and self.phase in (None, program.phase)
            and rows * program.workload.input_len > self.tokens_above
            and program.layout.groups > self.groups_above
            and program.config.num_layers > self.layers_above
        )


# A loop over stacked weights compiles up to ten times faster. XLA:TPU reads each
# layer's weights where they lie in the stack; XLA:GPU and XLA:CPU copy them first, two
# more passes over all weights. From 8192 tokens on, prefill hides that: on an H100,
# 2 x 8192 / 989e12 s to compute with a weight, and 4 / 3.35e12 s, 7 % of that, to copy.
LAYERS: tuple[tuple[When, Layers], ...] = (
    (When(platforms=("tpu",)), "scanned"),
    (When(phase="prefill", tokens_above=8192), "scanned"),
    (When(), "unrolled"),
)

# Where a few tokens are made once, compiling is what takes time: SmolLM2-135M under
# tp3_pp2 on CPUs has made seventy tokens before the unrolled program is compiled, and
# on one CPU it is no slower. XLA:GPU pays for the loop with every token.
LAYERS_FOR_TEXT: tuple[tuple[When, Layers], ...] = (
    (When(platforms=("cuda", "rocm")), "unrolled"),
    (When(), "scanned"),
)

# With unrolled layers. A group's cache is copied when a loop picks it out of a stack:
# on two H100s 0.7 of 7.3 ms a token at batch 16 and 3.1 of 11.4 ms at 64 (pp2 of
# Llama-3.1-8B). One group has nothing to pick from, and unrolling S ticks makes a
# program S times as long: not where it is compiled once and never run. Of the 70B and
# larger models the copies are 8 to 14 % of a round's bytes (batch 64), and unrolled
# ticks of `make demo`'s four pipelines compile for 100 CPU-seconds: not there either.
TICKS: tuple[tuple[When, Ticks], ...] = (
    (When(attached=True), "unrolled"),
    (When(layers_above=48), "scanned"),
    (When(groups_above=1), "unrolled"),
    (When(), "scanned"),
)

# cuDNN needs the device and its libraries to compile. Prefill of Llama-3.1-8B on two
# H100s takes three quarters of the time it takes with blocks.
ATTENTION: tuple[tuple[When, Attention], ...] = (
    (When(platforms=("cuda",), attached=True, phase="prefill"), "cudnn"),
    (When(), "blocks"),
)


def choose(
    program: Program,
    target: Target,
    *,
    layers: str = "auto",
    table: Sequence[tuple[When, Layers]] = LAYERS,
) -> Program:
    """Returns `program` as it is best written for `target`.

    Args:
      program: with any choices; they are overwritten.
      target: where it runs, or for which it is compiled.
      layers: "unrolled" or "scanned" to have them so; "auto" asks `table`.
      table: the rows for layers.
    """
    chosen: Any = layers if layers != "auto" else _first(table, target, program)
    ticks: Ticks = "scanned"
    if chosen == "unrolled" and program.partition.stage > 1:
        ticks = _first(TICKS, target, program)
    attention = _first(ATTENTION, target, program)
    if refusal(attention, program.config, program.dtype, target):
        attention = "blocks"
    return dataclasses.replace(program, layers=chosen, ticks=ticks, attention=attention)


def choose_both(
    prefill: Program,
    decode: Program,
    target: Target,
    *,
    layers: str = "auto",
    table: Sequence[tuple[When, Layers]] = LAYERS,
) -> tuple[Program, Program]:
    """Returns both phases as best written to run one after the other.

    They share parameters and cache, which lie as decode needs them. Arguments are
    those of `choose`.
    """
    decode = choose(decode, target, layers=layers, table=table)
    prefill = choose(prefill, target, layers=decode.layers)
    return dataclasses.replace(prefill, ticks=decode.ticks), decode


def _first(
    table: Sequence[tuple[When, Value]], target: Target, program: Program
) -> Value:
    return next(value for when, value in table if when.holds(target, program))
