r"""How do trained weights become a checkpoint that every partition reads quickly?

Reads a Hugging Face folder or a GGUF file slice by slice, and writes the model, its
tokenizer and its chat template as one Orbax folder. `--partition` and `--target` say
over which devices the arrays are spread meanwhile, and how many write at once; what is
written does not depend on them.

    python -m experiments.convert --model=smollm2-135m --out=runs/smollm2
    python -m experiments.convert --checkpoint=path/to/Llama-3.1-8B --out=runs/llama

`experiments.generate --checkpoint=` reads the result under any partition. Until it is
whole there is no folder of that name.
"""

import dataclasses
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from experiments import command, trained
from experiments.report import units
from jaxllm import weights
from jaxllm.model import Part, Tree
from jaxllm.tokenizer import Tokenizer, tokenizer_of
from sharding import checkpoint as checkpoint_lib
from sharding.layout import Layout
from sharding.load import read_parts
from sharding.mesh import make_mesh
from sharding.partition import Partition, Workload

_MODEL = flags.DEFINE_string(
    "model", None, f"Instead of --checkpoint: {', '.join(weights.PRESET_WEIGHTS)}."
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Hugging Face folder or .gguf file."
)
_OUT = flags.DEFINE_string("out", None, "Folder to write.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "auto",
    ["auto", "bfloat16", "float16", "float32"],
    "Of what is written; auto is as stored, or float32 if that is quantised or mixed.",
)
_PARTITION = flags.DEFINE_string("partition", "tp1", "Devices to spread it over: tp8.")
_TARGET = flags.DEFINE_string(
    "target", "auto", "attached or cpu:N; auto is attached accelerators, else cpu."
)
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace a checkpoint at --out.")

_INTERRUPTED = 130  # how shells see a program that Ctrl-C ended
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Told what is being done, and how many bytes of it are.
Told = Callable[[str, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What will be written, and from what; nothing of it is read yet."""

    source: pathlib.Path
    files: weights.Checkpoint
    tokenizer: Tokenizer
    layout: Layout
    mesh: Mesh
    out: pathlib.Path
    overwrite: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        itemsize = jnp.dtype(self.layout.dtype).itemsize
        return self.layout.config.num_params * itemsize


def plan(
    *,
    out: str | None,
    model: str | None = None,
    checkpoint: str | None = None,
    dtype: str = "auto",
    partition: str = "tp1",
    target: str = "auto",
    overwrite: bool = False,
) -> tuple[Conversion | None, list[str]]:
    """Returns what to do, or else everything wrong with it. Reads headers only."""
    wrong: list[str] = []

    def tried(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            wrong.append(str(error))
            return None

    split = tried(Partition.parse, partition)
    source = tried(_source, model, checkpoint)
    files = source and tried(weights.open_checkpoint, source)
    tokenizer = files and tried(tokenizer_of, source)
    if out is None:
        wrong.append(
            "there is no --out. A checkpoint is a folder of its own. Name one that is"
            " not there yet."
        )
    if wrong or out is None:
        return None, wrong
    layout = Layout(
        config=files.config,
        partition=split,
        workload=Workload(batch_size=1, input_len=1, output_len=1),  # no cache is made
        dtype=_dtype(files) if dtype == "auto" else dtype,
    )
    place = pathlib.Path(out).expanduser()
    tried(checkpoint_lib.check_place, place, layout, overwrite)
    devices = tried(trained.find_target, target, split.num_devices)
    if wrong:
        return None, wrong
    return Conversion(
        source=source,
        files=files,
        tokenizer=tokenizer,
        layout=layout,
        mesh=make_mesh(devices.mesh_devices(split.shape)),
        out=place,
        overwrite=overwrite,
    ), []


def _source(model: str | None, checkpoint: str | None) -> pathlib.Path:
    """Returns the path of the files to read."""
    if (model is None) == (checkpoint is None):
        raise ValueError(
            f"cannot tell what to convert from --model={model} and"
            f" --checkpoint={checkpoint}. Exactly one of them says it. Give a Hugging"
            " Face folder or a .gguf file with --checkpoint, or"
            f" --model={trained.DEFAULT}."
        )
    if checkpoint is not None:
        path = pathlib.Path(checkpoint).expanduser()
        if checkpoint_lib.is_saved(path):
            raise ValueError(
                f"{path} is converted already. Any partition reads it as it is. Give it"
                " to experiments.generate, or give the original files here."
            )
        return path
    if model is None or model not in weights.PRESET_WEIGHTS:
        raise ValueError(
            f"model {model!r} has no weights here; those of"
            f" {', '.join(weights.PRESET_WEIGHTS)} come in a package. Nothing is"
            " downloaded. Give their folder or file with --checkpoint."
        )
    return weights.PRESET_WEIGHTS[model]()


def _dtype(files: weights.Checkpoint) -> str:
    """Returns the dtype of everything in the files, or float32."""
    found = {tensor.encoding.name for tensor in files.tensors.values()}
    return _STORED.get(found.pop(), "float32") if len(found) == 1 else "float32"


def convert(conversion: Conversion, told: Told) -> checkpoint_lib.Saved:
    """Returns the checkpoint, written.

    Raises:
      ValueError: the files are not what their headers say.
      RuntimeError: it could not be written.
    """
    saving = checkpoint_lib.save_parts(
        conversion.out,
        conversion.layout,
        _counted(conversion, told),
        extra={"tokenizer": conversion.tokenizer.to_json()},
        overwrite=conversion.overwrite,
    )
    pool = ThreadPoolExecutor(1)
    waiting = pool.submit(saving.wait)
    while not waiting.done():
        told("Writing", saving.bytes_written)
        time.sleep(0.05)
    pool.shutdown()
    waiting.result()
    told("Writing", conversion.num_bytes)
    return checkpoint_lib.open_saved(conversion.out)


def _counted(conversion: Conversion, told: Told) -> Iterator[tuple[Part, Tree]]:
    """Yields every part of the model, saying how many bytes were read."""
    read_bytes, last = 0, conversion.layout.config.num_layers
    parts = read_parts(conversion.files, conversion.layout, conversion.mesh)
    for number, (part, tree) in enumerate(parts):
        read_bytes += sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        told(f"Read part {number + 1} of {last + 1}", read_bytes)
        yield part, tree


def _run(conversion: Conversion, console: Console) -> checkpoint_lib.Saved:
    """Returns the checkpoint, written under a bar where there is a terminal."""
    columns = (BarColumn(24), DownloadColumn(), TextColumn("{task.description}"))
    hide = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hide) as bar:
        task = bar.add_task("", total=conversion.num_bytes)

        def told(what: str, num_bytes: int) -> None:
            bar.update(task, description=what, completed=num_bytes)

        return convert(conversion, told)


def main(argv: Sequence[str]) -> None:
    """Reads the flags, converts, and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    logging.set_verbosity(logging.WARNING)  # Orbax tells every array otherwise
    start = time.perf_counter()
    try:
        conversion, wrong = plan(
            out=_OUT.value,
            model=_MODEL.value,
            checkpoint=_CHECKPOINT.value,
            dtype=_DTYPE.value,
            partition=_PARTITION.value,
            target=_TARGET.value,
            overwrite=_OVERWRITE.value,
        )
        if conversion is None:
            command.refuse(wrong)
        saved = _run(conversion, console)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"Stopped, and nothing is at {_OUT.value} that was not: {error}")
    except KeyboardInterrupt:
        console.print(f"Stopped. Nothing is at {_OUT.value} that was not.")
        # Now: leaving in order would wait for Orbax, which would finish writing.
        os._exit(_INTERRUPTED)
    text, took_s = conversion.tokenizer, time.perf_counter() - start
    console.print(
        f"{units.count(saved.config.num_params)} parameters in {saved.dtype}, a"
        f" tokenizer of {text.num_tokens:,} tokens"
        f" {'and a' if text.chat_template else 'but no'} chat template, from"
        f" {conversion.source}\n{units.bytes_(saved.num_bytes)} in {conversion.out} in"
        f" {units.seconds(took_s)}. Under any partition:\n"
    )
    path = shlex.quote(str(conversion.out))
    console.print(
        f'python -m experiments.generate --checkpoint={path} --prompt="The sea is"'
    )


if __name__ == "__main__":
    app.run(main)
