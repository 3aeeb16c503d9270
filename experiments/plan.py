r"""Which partition, rules, batch and micro-batches serve a model best on these devices?

Looks through every factorisation of the devices, rule table, batch size and number of
micro-batches, and answers with the most output tokens a second per chip that keep
`--ttft_ms` and `--tpot_ms`; without bounds, with the frontier. What cannot win by the
least time its program can take is never compiled, so the answer is that of the whole
sweep for a small part of its work. If nothing meets the bounds, it says by how much
they are missed and which single change would do. Nothing is run.

    python -m experiments.plan --model=llama-3.1-70b --target=h100:8 \
        --input_len=2048 --output_len=128 --ttft_ms=2000 --tpot_ms=25 --out=runs/plan

What was compiled is kept in `--out`: the same command goes on where it was stopped,
and another objective starts from what is known.
"""

import functools
import os
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags
from rich.text import Text

from experiments import command
from experiments.evaluate import Ask
from experiments.planning import changes, page, space, work
from experiments.report.frontier import Objective
from experiments.report.workers import Workers
from sharding.target import prepare_environment
from sharding.tensor import RULES

_MODEL = flags.DEFINE_string(
    "model", "llama-3.1-70b", "Preset, or path of a Hugging Face config.json."
)
_TARGET = flags.DEFINE_string("target", "h100:8", "What to compile for: h100:8.")
_CHIP = flags.DEFINE_string(
    "chip", None, "Price the programs as this chip instead of the target's own."
)
_PARTITIONS = flags.DEFINE_list(
    "partitions", "all", "Such as tp8,tp4_pp2; `all` is every factorisation."
)
_RULES = flags.DEFINE_list(
    "rules", ",".join(space.RULES), f"Rule tables: {', '.join(RULES)}."
)
_BATCH_SIZES = flags.DEFINE_list(
    "batch_sizes", "auto", "B, sequences; `auto` is 1,2,4,6,8,12 and on, that fit."
)
_MICRO_BATCHES = flags.DEFINE_enum(
    "micro_batches", "auto", ["auto", "own"],
    "Of a pipeline's prefill: the program's own choice, or also half and twice that.",
)  # fmt: skip
_INPUT_LEN = flags.DEFINE_integer("input_len", 2048, "Prompt tokens.", lower_bound=1)
_OUTPUT_LEN = flags.DEFINE_integer("output_len", 128, "New tokens.", lower_bound=2)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "bfloat16",
    ["bfloat16", "float16", "float32"],
    "Of activations, and of what is not said.",
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["int8", "fp8", "int4"], "How weights are stored, if not so."
)
_KV = flags.DEFINE_enum("kv", None, ["int8", "fp8"], "How the cache is, if not so.")
_LAYERS = flags.DEFINE_enum(
    "layers", "auto", ["auto", "unrolled", "scanned"], "How layers are written."
)
_TTFT_MS = flags.DEFINE_float("ttft_ms", None, "Objective: longest TTFT.", 0.0)
_TPOT_MS = flags.DEFINE_float("tpot_ms", None, "Objective: longest TPOT.", 0.0)
_MIN_TOKENS_PER_S = flags.DEFINE_float(
    "min_tokens_per_s", None, "Objective: least output tokens/s of all chips.", 0.0
)
_CHANGES = flags.DEFINE_bool(
    "changes", True, "If nothing meets the objective, look for one change that would."
)
_JOBS = flags.DEFINE_integer(
    "jobs", None, "Compiles at a time; default one a core.", lower_bound=1
)
_OUT = flags.DEFINE_string("out", "runs/plan", "Folder of results and the page.")
_WIDTH = 140  # of tables, where there is no terminal to ask


def _ask() -> Ask:
    """Returns the question on the command line.

    Raises:
      ValueError: a batch size is no number.
    """
    sizes = _BATCH_SIZES.value
    auto = sizes == ["auto"]
    return Ask(
        models=(_MODEL.value,),
        targets=(_TARGET.value,),
        chip=_CHIP.value,
        partitions=tuple(_PARTITIONS.value),
        rules=tuple(_RULES.value),
        batch_sizes=() if auto else command.batch_sizes(sizes, ", or auto"),
        input_len=_INPUT_LEN.value,
        output_len=_OUTPUT_LEN.value,
        dtype=_DTYPE.value,
        weights=_WEIGHTS.value,
        kv=_KV.value,
        layers=_LAYERS.value,
    )


def main(argv: Sequence[str]) -> None:
    """Reads the flags, plans, and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    console = command.console(_WIDTH)
    out = pathlib.Path(_OUT.value)
    objective = Objective.of_ms(
        ttft_ms=_TTFT_MS.value,
        tpot_ms=_TPOT_MS.value,
        min_tokens_per_s=_MIN_TOKENS_PER_S.value,
    )
    jobs = 1 if _TARGET.value == "attached" else _JOBS.value or os.cpu_count() or 1
    try:
        ask = _ask()
        # JAX starts in the workers only, once for every target that may come up.
        every = [ask.targets[0], *changes.targets(ask)]
        setup = functools.partial(prepare_environment, every)
        with Workers(jobs, setup) as workers:
            done = work.plan(
                ask,
                objective,
                workers=workers,
                out=out,
                console=console,
                with_changes=_CHANGES.value,
                cut=_MICRO_BATCHES.value == "auto",
            )
        files = work.write(done, out)
    except ValueError as error:
        command.refuse(str(error).split("\n"))
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. The same command goes on from what is in {out}.")
    page.show(console, ask, objective, done.answer)
    console.print()
    for name in files:
        console.print(Text(f"  {out / name}", style="dim"), soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
