r"""Which partition is fastest for a user, and which gives the most tokens per chip?

Compiles prefill and decode of `--model` under every partition and batch size for
each `--target`, reads FLOPs, bytes, memory and collectives from what the compiler
made, prices them with the chip's rates, and reports time to first token, time per
output token and throughput. Nothing is run and no accelerator is needed.

    python -m experiments.tradeoff --model=llama-3.1-70b \
        --target=h100:8,v5p:2x2x2 --partitions=tp8,tp4_pp2,pp8,dp2_tp4 \
        --batch_sizes=1,16,64 --input_len=2048 --output_len=128 --out=runs/demo

A point that is in `--out` already is not computed again, so the same command goes
on where a sweep was stopped, whatever stopped it. Programs are kept in `--cache`, so
other rates, as of another --chip, compile nothing that was compiled before.
"""

import functools
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import get_args

from absl import app, flags
from rich.console import Console

from experiments import command, evaluate, traces
from experiments.evaluate import Ask
from experiments.report import folder, terminal
from experiments.report.frontier import Objective, questions
from experiments.report.record import Point, Record
from experiments.report.store import FILE_NAME, Store
from experiments.report.sweep import sweep
from experiments.report.workers import Workers
from experiments.shelf import Shelf
from jaxllm.quantized import KVFormat, WeightFormat
from sharding.target import prepare_environment
from sharding.tensor import RULES

_MODEL = flags.DEFINE_list(
    "model", "llama-3.1-70b", "Presets, or paths of Hugging Face config.json."
)
_TARGET = flags.DEFINE_list("target", "h100:8", "What to compile for: h100:8, v5e:2x4.")
_CHIP = flags.DEFINE_string(
    "chip", None, "Price the programs as this chip instead of the target's own."
)
_PARTITIONS = flags.DEFINE_list(
    "partitions", "all", "Such as tp8,tp4_pp2; `all` is every factorisation."
)
_RULES = flags.DEFINE_list("rules", "megatron", f"Rule tables: {', '.join(RULES)}.")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", "1,16,64", "B, sequences.")
_INPUT_LEN = flags.DEFINE_integer("input_len", 2048, "Prompt tokens.", lower_bound=1)
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
_TTFT_MS = flags.DEFINE_float("ttft_ms", None, "Objective: longest TTFT.", 0.0)
_TPOT_MS = flags.DEFINE_float("tpot_ms", None, "Objective: longest TPOT.", 0.0)
_JOBS = flags.DEFINE_integer(
    "jobs", None, "Compiles at a time; default one a core.", lower_bound=1
)
_OUT = flags.DEFINE_string("out", "runs/tradeoff", "Folder of results and reports.")
_CACHE = flags.DEFINE_string(
    "cache", None, "Folder of what was compiled; default: in --out."
)
_TRACES = flags.DEFINE_string(
    "traces", None, "Write timelines of the points into this folder, for Perfetto."
)


def _ask() -> Ask:
    """Returns the question on the command line.

    Raises:
      ValueError: a batch size is no number.
    """
    return Ask(
        models=tuple(_MODEL.value),
        targets=tuple(_TARGET.value),
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
    )


def _jobs(ask: Ask) -> int:
    if "attached" in ask.targets:
        return 1  # attached devices belong to one process at a time
    return _JOBS.value or os.cpu_count() or 1


def _run(
    ask: Ask, out: pathlib.Path, objective: Objective, console: Console
) -> list[Record]:
    """Returns the records of every point of `ask`, having written the reports."""
    # JAX starts in the workers only.
    setup = functools.partial(prepare_environment, ask.targets)
    with Workers(_jobs(ask), setup) as workers:
        with console.status("Reading the question"):
            *_, planned = workers.run(evaluate.plan, [ask])
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
            shelf = Shelf(pathlib.Path(_CACHE.value or out / "cache"))
            answer = functools.partial(evaluate.evaluate, compiler=shelf)
            records = sweep(points, answer, store, workers, console)
            folder.write(out, objective)
        if _TRACES.value:
            traced = pathlib.Path(_TRACES.value)
            _trace(points, records, traced, shelf, workers, console)
    return records


def _trace(
    points: Sequence[Point],
    records: Sequence[Record],
    target: pathlib.Path,
    shelf: Shelf,
    workers: Workers,
    console: Console,
) -> None:
    """Writes the timelines of all points that fit into the folder `target`."""
    fit = [p for p, r in zip(points, records, strict=True) if r.status == "ok"]
    write = functools.partial(traces.write, folder=target, compiler=shelf)
    with console.status(f"Writing timelines to {target}"):
        events = list(workers.run(write, fit))
    for event in events:
        if event.kind == "broke":
            console.print(f"No timeline of {event.item}: {event.reason}")


def main(argv: Sequence[str]) -> None:
    """Reads the flags, sweeps, and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    console = command.console()
    out = pathlib.Path(_OUT.value)
    objective = Objective.of_ms(ttft_ms=_TTFT_MS.value, tpot_ms=_TPOT_MS.value)
    try:
        ask = _ask()
    except ValueError as error:
        command.refuse([str(error)])
    try:
        records = _run(ask, out, objective, console)
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. The same command goes on from what is in {out}.")
    for question in questions(records):
        terminal.show(console, question, objective)
    terminal.show_files(console, out)
    failed = sum(record.status == "failed" for record in records)
    if failed:
        sys.exit(f"{failed} points failed; the same command tries them again.")


if __name__ == "__main__":
    app.run(main)
