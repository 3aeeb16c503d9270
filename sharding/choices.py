"""How programs are best written for a target: tables, the only place that says so.

The first row whose condition holds decides. What each choice means stands with the
field of `sharding.program.Program` that holds it; why it was made, beside its row;
with which figures, in docs/performance.md.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

from jaxllm.model import Layers
from jaxllm.product_kernel import MOST_ROWS
from sharding.attention import Attention, Token, refusal
from sharding.layout import Ticks
from sharding.overlap import Overlap
from sharding.program import LastLayer, Program, Rotation
from sharding.residual import PromptResidual, Residual
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
      stages_up_to: of the pipeline.
      tensor_above, tensor_up_to: devices that share a layer.
      rows_up_to: sequences of which a device decodes a token at once.
      dtypes: of activations.
      weights: formats of the blocks' matrices; None is that of activations.
    """

    platforms: tuple[str, ...] | None = None
    attached: bool | None = None
    phase: Literal["prefill", "decode"] | None = None
    tokens_above: int = 0
    groups_above: int = 0
    layers_above: int = 0
    stages_up_to: int | None = None
    tensor_above: int = 0
    tensor_up_to: int | None = None
    rows_up_to: int | None = None
    dtypes: tuple[str, ...] | None = None
    weights: tuple[str | None, ...] | None = None

    def holds(self, target: Target, program: Program) -> bool:
        rows = program.layout.replica_batch // program.prefill_micro_batches
        return (
            (self.platforms is None or target.platform in self.platforms)
            and self.attached in (None, not target.compile_only)
            and self.phase in (None, program.phase)
            and rows * program.workload.input_len > self.tokens_above
            and program.layout.groups > self.groups_above
            and program.config.num_layers > self.layers_above
            and (
                self.stages_up_to is None
                or program.partition.stage <= self.stages_up_to
            )
            and program.partition.tensor > self.tensor_above
            and (
                self.tensor_up_to is None
                or program.partition.tensor <= self.tensor_up_to
            )
            and (self.rows_up_to is None or program.token_rows <= self.rows_up_to)
            and (self.dtypes is None or program.dtype in self.dtypes)
            and (self.weights is None or program.weights in self.weights)
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
# Scales of int4 are a loop's arguments inside of one, and XLA:GPU fuses them no longer:
# pp8 of the 405B reads 3.1 times the least at batch 256, and 1.1 times without a loop.
TICKS: tuple[tuple[When, Ticks], ...] = (
    (When(attached=True), "unrolled"),
    (When(platforms=("cuda",), weights=("int4",)), "unrolled"),
    (When(layers_above=48), "scanned"),
    (When(groups_above=1), "unrolled"),
    (When(), "scanned"),
)

# Prefill of Llama-3.1-8B on two H100s takes three quarters of the time that it takes
# with blocks.
ATTENTION: tuple[tuple[When, Attention], ...] = (
    (When(platforms=("cuda",), phase="prefill"), "cudnn"),
    (When(), "blocks"),
)

# Decode of Llama-3.1-8B on one H100: 6.75 -> 6.47 and 10.2 -> 9.27 ms a token at batch
# 16 and 64; pp2 on two: 6.68 -> 6.19 and 8.32 -> 7.60 ms.
TOKEN_ATTENTION: tuple[tuple[When, Token], ...] = (
    (
        When(
            platforms=("cuda",),
            attached=True,
            phase="decode",
            dtypes=("bfloat16", "float16"),
        ),
        "triton",
    ),
    (When(), "einsum"),
)

# Where the kernel that sums has run.
_TWO_SUM = When(
    platforms=("cuda",),
    attached=True,
    tensor_above=1,
    tensor_up_to=2,
    dtypes=("bfloat16",),
)

# With that attention, on two H100s: tp2 at batch 256 12.8 -> 11.5 ms, tp1 at 1 and 64
# 5.70 -> 5.62 and 9.27 -> 8.79, pp2 at 64 7.60 -> 7.44; tp1 and pp2 at 16 no other. It
# has summed over two devices and never over more.
RESIDUAL: tuple[tuple[When, Residual], ...] = (
    (
        When(
            platforms=("cuda",),
            attached=True,
            phase="decode",
            tensor_up_to=2,
            rows_up_to=MOST_ROWS,
            dtypes=("bfloat16",),
        ),
        "triton_split",
    ),
    (_TWO_SUM, "triton"),
    (When(), "plain"),
)

# TTFT of Llama-3.1-8B, tp2 on two H100s: 17.4 -> 16.0, 224 -> 203 and 877 -> 829 ms at
# batch 1, 16 and 64. Where nothing is summed over devices there is nothing to gain: pp2
# at 64 takes 832 ms either way.
PROMPT_RESIDUAL: tuple[tuple[When, PromptResidual], ...] = (
    (_TWO_SUM, "triton"),
    (When(), "plain"),
)

# The head reads the last position of a prompt, so that is all that is needed of what
# the last layer makes of keys and values: 2.8 % of Llama-3.1-8B's products. In a
# pipeline only the last stage gains, if it is the slowest (`sharding.pace`).
_PROMPT = When(platforms=("cuda",), attached=True, phase="prefill")
LAST_LAYER: tuple[tuple[When, LastLayer], ...] = (
    (dataclasses.replace(_PROMPT, stages_up_to=1), "last"),
    (dataclasses.replace(_PROMPT, tensor_up_to=1), "last"),
    (When(), "all"),
)

# TTFT of Llama-3.1-8B on two H200s, turn about: tp1 at batch 64 1,385 -> 1,374 ms, tp2
# at 16 200.1 -> 198.4 and at 64 792 -> 785; at batch 1 neither gains.
ROTATION: tuple[tuple[When, Rotation], ...] = (
    (_PROMPT, "flipped"),
    (When(), "joined"),
)

# Options of XLA, beside those of the target. Without its own products XLA:GPU leaves a
# residual addition to cuBLAS and makes a norm one kernel: on two H200s tp1 at batch 64
# 1,374 -> 1,362 ms, pp2 802 -> 797; tp2, whose sums do both, 786 either way. Prompts of
# 1,024 tokens are better off with the faster of the two: tp1 at batch 1 24.0 -> 24.4.
COMPILER: tuple[tuple[When, Mapping[str, str]], ...] = (
    (
        dataclasses.replace(
            _PROMPT, tokens_above=2048, tensor_up_to=1, weights=(None,)
        ),
        {"xla_gpu_enable_triton_gemm": "False"},
    ),
    (When(), {}),
)

# What can be had instead of what the tables say, and in which phase it is asked.
_OPTIONS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "attention": (get_args(Attention), ("prefill",)),
    "rotation": (get_args(Rotation), ("prefill",)),
    "token_attention": (get_args(Token), ("decode",)),
    "residual": (get_args(Residual), ("decode",)),
    "prompt_residual": (get_args(PromptResidual), ("prefill",)),
    "overlap": (get_args(Overlap), ("prefill",)),
    "last_layer": (get_args(LastLayer), ("prefill",)),
    "ticks": (get_args(Ticks), ("prefill", "decode")),
}


def read_changes(texts: Sequence[str]) -> dict[str, str]:
    """Returns choices to make whatever the tables say, from texts as `residual=plain`.

    A name that begins with `xla_` is an option of the compiler.

    Raises:
      ValueError: a text, a name or a value is not known.
    """
    changes: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name.startswith("xla_") and value:
            changes[name] = value
            continue
        known = _OPTIONS.get(name, ((), ()))[0]
        if value not in known:
            near = difflib.get_close_matches(name, _OPTIONS, n=1)
            hint = f" Did you mean {near[0]}?" if near and name not in _OPTIONS else ""
            every = "; ".join(
                f"{name}={'|'.join(values)}" for name, (values, _) in _OPTIONS.items()
            )
            raise ValueError(
                f"no choice {text!r}.{hint} There are {every}; and options of XLA, as"
                " xla_gpu_enable_triton_gemm=False. Choose one of these."
            )
        changes[name] = value
    return changes


def choose(
    program: Program,
    target: Target,
    *,
    layers: str = "auto",
    table: Sequence[tuple[When, Layers]] = LAYERS,
    changes: Mapping[str, str] | None = None,
) -> Program:
    """Returns `program` as it is best written for `target`.

    Args:
      program: with any choices; they are overwritten.
      target: where it runs, or for which it is compiled.
      layers: "unrolled" or "scanned" to have them so; "auto" asks `table`.
      table: the rows for layers.
      changes: what to choose whatever the tables say; see `read_changes`.

    Raises:
      ValueError: a change does not suit the program.
    """
    chosen: Any = layers if layers != "auto" else _first(table, target, program)
    ticks: Ticks = "scanned"
    if chosen == "unrolled" and program.partition.stage > 1:
        ticks = _first(TICKS, target, program)
    attention = _first(ATTENTION, target, program)
    if refusal(attention, program.config, program.dtype, target):
        attention = "blocks"
    program = dataclasses.replace(
        program,
        layers=chosen,
        ticks=ticks,
        attention=attention,
        rotation=_first(ROTATION, target, program),
        compiler_options=tuple(_first(COMPILER, target, program).items()),
        token_attention="einsum",
        residual="plain",
        prompt_residual="plain",
        last_layer="all",
    )
    token = _first(TOKEN_ATTENTION, target, program)
    if not program.token_refusal(token):
        program = dataclasses.replace(program, token_attention=token)
    residual = _first(RESIDUAL, target, program)
    if not program.residual_refusal(residual):
        program = dataclasses.replace(program, residual=residual)
    changes = changes or {}
    program = change(program, changes)
    # Behind the changes, for not all of them leave a whole prompt.
    prompt = _first(PROMPT_RESIDUAL, target, program)
    is_open = "prompt_residual" not in changes
    if is_open and not program.prompt_residual_refusal(prompt):
        program = dataclasses.replace(program, prompt_residual=prompt)
    last = _first(LAST_LAYER, target, program)
    if "last_layer" not in changes and not program.last_layer_refusal(last):
        program = dataclasses.replace(program, last_layer=last)
    return program


def change(program: Program, changes: Mapping[str, str]) -> Program:
    """Returns `program` with the `changes` that concern its phase; see `read_changes`.

    Raises:
      ValueError: a change does not suit the program.
    """
    fields: dict[str, Any] = {
        name: value
        for name, value in changes.items()
        if name in _OPTIONS and program.phase in _OPTIONS[name][1]
    }
    if program.partition.stage == 1:
        fields.pop("ticks", None)
    options = {name: value for name, value in changes.items() if name not in _OPTIONS}
    if options:
        merged = {**dict(program.compiler_options), **options}
        fields["compiler_options"] = tuple(merged.items())
    return dataclasses.replace(program, **fields)


def choose_both(
    prefill: Program,
    decode: Program,
    target: Target,
    *,
    layers: str = "auto",
    table: Sequence[tuple[When, Layers]] = LAYERS,
    changes: Mapping[str, str] | None = None,
) -> tuple[Program, Program]:
    """Returns both phases as best written to run one after the other.

    They share parameters and cache, which lie as decode needs them. Arguments are
    those of `choose`.
    """
    decode = choose(decode, target, layers=layers, table=table, changes=changes)
    prefill = choose(prefill, target, layers=decode.layers, changes=changes)
    return dataclasses.replace(prefill, ticks=decode.ticks), decode


def _first(
    table: Sequence[tuple[When, Value]], target: Target, program: Program
) -> Value:
    return next(value for when, value in table if when.holds(target, program))
