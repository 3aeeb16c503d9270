r"""How fast is torch on the same shapes, on one GPU of the same machine?

Runs the Llama of Hugging Face `transformers` with random weights, a static cache and
`torch.compile(mode="reduce-overhead")` for decode, through the same clock as
experiments.measure: same lengths, same definition of TTFT and TPOT, same records, with
engine "torch". It is what a good programmer gets from torch without an inference
engine. `--beside` prints the ratio to what experiments.measure found in its folder.

    python -m experiments.peer_torch --model=llama-3.1-8b --batch_sizes=1,16,64 \
        --input_len=1024 --output_len=128 --out=runs/torch --beside=runs/measured

Needs torch and transformers, which this project does not install.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

from experiments import command
from experiments.peer import Peer, beside, measure
from experiments.report import folder, provenance, terminal
from experiments.report.frontier import Objective, questions
from experiments.report.record import Point, digest
from experiments.report.store import Store, current, read_records
from jaxllm import config as config_lib
from jaxllm.config import ModelConfig
from sharding import guard
from sharding.chips import CHIPS, Chip, find_chip
from sharding.target import prepare_environment

_MODEL = flags.DEFINE_string(
    "model", "llama-3.1-8b", "Preset, or path of a Hugging Face config.json."
)
_DEVICE = flags.DEFINE_enum("device", "cuda", ["cuda", "cpu"], "Where torch runs.")
_CHIP = flags.DEFINE_string("chip", None, "Chip of the limit; default the device's.")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", "1,16,64", "B, sequences.")
_INPUT_LEN = flags.DEFINE_integer("input_len", 1024, "Prompt tokens.", lower_bound=1)
_OUTPUT_LEN = flags.DEFINE_integer("output_len", 128, "New tokens.", lower_bound=2)
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of weights and cache."
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Runs that count.", lower_bound=1)
_COMPILE = flags.DEFINE_bool("compile", True, "Whether decode is compiled.")
_IF_BUSY = flags.DEFINE_enum(
    "if_busy", "refuse", ["refuse", "warn"], "If another process uses the GPUs."
)
_OUT = flags.DEFINE_string("out", "runs/torch", "Folder of results and reports.")
_BESIDE = flags.DEFINE_string("beside", None, "Folder of experiments.measure.")


def plan(peer: Peer, config: ModelConfig, chip: Chip) -> list[Point]:
    """Returns the points that the flags ask for, batches rising."""
    gpus = guard.gpus() if peer.device == "cuda" else []
    context = {
        "engine": "torch",
        "compiled": str(peer.compiled),
        "code": provenance.code_digest("experiments/peer.py"),
        "model": digest(repr(config)),
        "devices": peer.device_name,
        "repeats": str(_REPEATS.value),
        **peer.versions,
        **({"driver": gpus[0].driver} if gpus else {}),
    }
    return [
        Point(
            model=_MODEL.value,
            target="torch",
            chip=chip.name,
            num_chips=1,
            num_devices=1,
            partition="tp1",
            rules="megatron",
            dtype=_DTYPE.value,
            layers="unrolled",
            batch_size=batch_size,
            input_len=_INPUT_LEN.value,
            output_len=_OUTPUT_LEN.value,
            context=context,
        )
        for batch_size in sorted(int(size) for size in _BATCH_SIZES.value)
    ]


def _chip(peer: Peer) -> Chip:
    """Returns the chip to take the limit from.

    Raises:
      ValueError: none is known for the device.
    """
    if _CHIP.value is not None:
        return find_chip(_CHIP.value)
    for chip in CHIPS.values():
        if peer.device_name in chip.device_kinds:
            return chip
    raise ValueError(
        f"no chip for a device called {peer.device_name!r}; limits need a chip's rates."
        f" Name one with --chip, of {', '.join(CHIPS)}."
    )


def main(argv: Sequence[str]) -> None:
    """Reads the flags, measures, and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    console = command.console()
    prepare_environment(["cpu:1"])  # JAX is here for shapes; the GPU is torch's
    out = pathlib.Path(_OUT.value)
    try:
        if _DEVICE.value == "cuda":
            warnings = guard.before_start()
            if _IF_BUSY.value == "refuse":
                guard.refuse(warnings)
        else:
            warnings = guard.load_warning()
        config = config_lib.load(_MODEL.value)
        peer = Peer.make(config, _DTYPE.value, _DEVICE.value, _COMPILE.value)
        points = plan(peer, config, _chip(peer))
        theirs = read_records(pathlib.Path(_BESIDE.value))[0] if _BESIDE.value else []
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(str(error))
    with Store(out) as store:
        for point in points:
            if store.lacks(point):
                console.print(f"{point} ...")
                store.append(measure(peer, config, point, _REPEATS.value, warnings))
        records = [store.records[point.key] for point in points]
    folder.write(out, Objective())
    for question in questions(records):
        terminal.show(console, question, Objective())
    if theirs:
        console.print("[bold]Beside experiments.measure; ratio is torch / ours[/]")
        console.print(terminal.table(beside(records, current(theirs)[0]), group_by=0))
    terminal.show_files(console, out)


if __name__ == "__main__":
    app.run(main)
