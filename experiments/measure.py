r"""How fast do the partitions run on the devices that are attached?

Compiles prefill and decode of `--model` under every partition and batch size, warms
them up until they are steady, and times `--repeats` generations of random prompts with
random weights: TTFT and TPOT as median of samples that are all kept, the memory that
was allocated, and beside them what was predicted from the compiled program and the
least time physics allows. A partition may use fewer devices than there are: the first.

    python -m experiments.measure --model=llama-3.1-8b --partitions=tp1,tp2,pp2 \
        --batch_sizes=1,16,64 --input_len=1024 --output_len=128 --out=runs/measured

Devices that another process uses are not timed. A point that is in `--out` already is
not timed again, so the same command goes on where it was stopped.
"""

import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import get_args

from absl import app, flags
from rich.console import Console

from experiments import command, timed
from experiments.evaluate import Ask
from experiments.report import folder, terminal
from experiments.report.frontier import Objective, questions
from experiments.report.record import Record
from experiments.report.store import FILE_NAME, Store
from experiments.report.sweep import sweep
from experiments.report.workers import Workers
from experiments.timed import How
from jaxllm.quantized import KVFormat, WeightFormat
from sharding import choices, guard
from sharding.tensor import RULES

_MODEL = flags.DEFINE_string(
    "model", "llama-3.1-8b", "Preset, or path of a Hugging Face config.json."
)
_TARGET = flags.DEFINE_string("target", "attached", "What to run on: attached, cpu:8.")
_CHIP = flags.DEFINE_string(
    "chip", None, "Predict for this chip instead of the target's own."
)
_PARTITIONS = flags.DEFINE_list(
    "partitions", "all", "Such as tp1,tp2,pp2; `all` is every factorisation."
)
_RULES = flags.DEFINE_list("rules", "megatron", f"Rule tables: {', '.join(RULES)}.")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", "1,16,64", "B, sequences.")
_INPUT_LEN = flags.DEFINE_integer("input_len", 1024, "Prompt tokens.", lower_bound=1)
_OUTPUT_LEN = flags.DEFINE_integer("output_len", 128, "New tokens.", lower_bound=2)
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of activations."
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", None, get_args(WeightFormat), "Stored narrower; default as --dtype."
)
_KV = flags.DEFINE_enum(
    "kv", None, get_args(KVFormat), "Cache stored narrower; default as --dtype."
)
_LAYERS = flags.DEFINE_enum(
    "layers", "auto", ["auto", "unrolled", "scanned"], "How layers are written."
)
_MICRO_BATCHES = flags.DEFINE_integer(
    "micro_batches", None, "Into which prefill is cut.", lower_bound=1
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Runs that count.", lower_bound=1)
_IF_BUSY = flags.DEFINE_enum(
    "if_busy", "refuse", ["refuse", "warn"], "If another process uses the GPUs."
)
_PROFILE = flags.DEFINE_string(
    "profile", None, "Folder for a JAX profile of each point."
)
_CHOICES = flags.DEFINE_list(
    "choices", "", "Write programs so, as residual=plain,xla_gpu_autotune_level=4."
)
_OUT = flags.DEFINE_string("out", "runs/measured", "Folder of results and reports.")


def _ask() -> Ask:
    """Returns the question on the command line.

    Raises:
      ValueError: a batch size is no number.
    """
    return Ask(
        models=(_MODEL.value,),
        targets=(_TARGET.value,),
        chip=_CHIP.value,
        partitions=tuple(_PARTITIONS.value),
        rules=tuple(_RULES.value),
        batch_sizes=command.batch_sizes(_BATCH_SIZES.value),
        input_len=_INPUT_LEN.value,
        output_len=_OUTPUT_LEN.value,
        dtype=_DTYPE.value,
        weights=_WEIGHTS.value,
        kv=_KV.value,
        layers=_LAYERS.value,
        micro_batches=(_MICRO_BATCHES.value,),
    )


def _how() -> How:
    """Returns how to time.

    Raises:
      ValueError: another process uses the GPUs, or a choice is not known.
    """
    changes = choices.read_changes(_CHOICES.value)
    if _TARGET.value == "attached":
        found = guard.before_start()
        if _IF_BUSY.value == "refuse":
            guard.refuse(found)
    else:
        found = guard.load_warning()
    return How(
        repeats=_REPEATS.value,
        refuse=_IF_BUSY.value == "refuse",
        warnings=tuple(found),
        profile=_PROFILE.value,
        out=_OUT.value,
        changes=tuple(changes.items()),
    )


def _run(ask: Ask, how: How, out: pathlib.Path, console: Console) -> list[Record]:
    """Returns the records of every point of `ask`, having written the reports."""
    # Attached devices belong to one process; if it dies, the next point gets another.
    setup = functools.partial(timed.prepare, ask.targets[0])
    with Workers(1, setup) as workers:
        with console.status("Reading the question"):
            *_, planned = workers.run(functools.partial(timed.plan, how=how), [ask])
        points, wrong = planned.value or ([], [planned.reason])
        if wrong:
            command.refuse(wrong)
        try:
            store = Store(out)
        except (OSError, ValueError) as error:
            command.refuse([str(error)])
        with store:
            if store.dropped is not None:
                console.print(
                    f"The last line of {out / FILE_NAME} was cut off; its point is"
                    " done again."
                )
            measure = functools.partial(timed.measure, how=how)
            return sweep(points, measure, store, workers, console)


def main(argv: Sequence[str]) -> None:
    """Reads the flags, measures, and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    console = command.console()
    out = pathlib.Path(_OUT.value)
    try:
        ask, how = _ask(), _how()
    except ValueError as error:
        command.refuse([str(error)])
    try:
        records = _run(ask, how, out, console)
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. The same command goes on from what is in {out}.")
    folder.write(out, Objective())
    for question in questions(records):
        terminal.show(console, question, Objective())
    terminal.show_files(console, out)
    failed = sum(record.status == "failed" for record in records)
    if failed:
        sys.exit(f"{failed} points failed; the same command tries them again.")


if __name__ == "__main__":
    app.run(main)
