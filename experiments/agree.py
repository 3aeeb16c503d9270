r"""Do programs that are written otherwise give the same answer on these devices?

The same random weights and prompts through every partition and every variant of its
programs: kernels instead of ordinary operations, other loops. Each is compared with the
first partition in ordinary operations: how far logits are apart, and where greedy text
parts, by how little the tokens differed.

    python -m experiments.agree --model=llama-3.1-8b --num_layers=4 \
        --partitions=tp1,tp2 \
        --variants=token_attention=triton,token_attention=triton+residual=triton

A variant is a list of choices joined by `+`, as in `--choices` of experiments.measure.
"""

import dataclasses
import sys
from collections.abc import Sequence

from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments import agreement, command
from jaxllm import config as config_lib
from sharding.partition import Partition, Workload
from sharding.target import parse_target, prepare_environment

_MODEL = flags.DEFINE_string(
    "model", "llama-3.1-8b", "Preset, or path of a Hugging Face config.json."
)
_NUM_LAYERS = flags.DEFINE_integer(
    "num_layers", None, "Use so few of its layers.", lower_bound=1
)
_TARGET = flags.DEFINE_string("target", "attached", "What to run on: attached, cpu:8.")
_PARTITIONS = flags.DEFINE_list("partitions", "tp1", "Such as tp1,tp2,pp2.")
_VARIANTS = flags.DEFINE_list("variants", "", "Choices joined by +, for each variant.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Sequences.", lower_bound=1)
_INPUT_LEN = flags.DEFINE_integer("input_len", 200, "Prompt tokens.", lower_bound=1)
_OUTPUT_LEN = flags.DEFINE_integer("output_len", 17, "New tokens.", lower_bound=2)
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of weights and cache."
)


def _show(console: Console, rows: list[tuple[str, str, agreement.Agreement]]) -> None:
    table = Table("partition", "written", "first logits", "all", "tokens", "lead")
    for partition, written, found in rows:
        table.add_row(
            partition,
            written,
            f"{found.first:.2g}",
            f"{found.all:.2g}",
            f"{found.equal_tokens} of {found.steps}",
            f"{found.margin:.2g}",
        )
    console.print(table)
    largest = max(found.largest for *_, found in rows)
    console.print(
        f"Largest difference of logits, which reach {largest:.3g}; tokens before a"
        " sequence parts from the first row's, and the lead it parted at."
    )


def main(argv: Sequence[str]) -> None:
    """Reads the flags, runs every variant, and prints a table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    console = command.console()
    try:
        prepare_environment([_TARGET.value])
        config = config_lib.load(_MODEL.value)
        if _NUM_LAYERS.value:
            config = dataclasses.replace(config, num_layers=_NUM_LAYERS.value)
        target = parse_target(_TARGET.value)
        variants = agreement.read_variants(_VARIANTS.value)
        partitions = [Partition.parse(name) for name in _PARTITIONS.value]
    except ValueError as error:
        sys.exit(f"Nothing was started: {error}")
    workload = Workload(
        batch_size=_BATCH_SIZE.value,
        input_len=_INPUT_LEN.value,
        output_len=_OUTPUT_LEN.value,
    )
    params = agreement.parameters(config, _DTYPE.value)
    rows, first = [], None
    for partition in partitions:
        for changes in [agreement.PLAIN, {}, *variants]:
            written = "+".join(f"{k}={v}" for k, v in changes.items())
            if changes is agreement.PLAIN:
                written = "plain"
            name = written or "as the tables say"
            with console.status(f"{partition.name}, {name}"):
                try:
                    found = agreement.answer(
                        config, params, partition, workload, target, changes,
                        _DTYPE.value,
                    )  # fmt: skip
                except ValueError as error:
                    console.print(f"{partition.name}, {name}: {error}")
                    continue
            first = first or found
            rows.append((partition.name, name, agreement.compare(first, found)))
    if not rows:
        sys.exit("Nothing ran.")
    _show(console, rows)


if __name__ == "__main__":
    app.run(main)
