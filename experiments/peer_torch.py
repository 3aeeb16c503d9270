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

import dataclasses
import functools
import importlib
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from rich.console import Console

from experiments.report import folder, provenance, tables, terminal, units
from experiments.report.frontier import Objective, questions
from experiments.report.measurement import Measurement
from experiments.report.record import Point, Record, digest, rates
from experiments.report.store import Store, current, read_records
from jaxllm import config as config_lib
from jaxllm.config import ModelConfig
from sharding import guard, limits, timing
from sharding.chips import CHIPS, Chip, find_chip
from sharding.partition import Partition, Workload
from sharding.program import Phase, Program
from sharding.target import prepare_environment
from sharding.timing import Run

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
PHASES: tuple[Phase, Phase] = ("prefill", "decode")
_WIDTH = 118  # of tables, where there is no terminal to ask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """A model in torch, and how it is run."""

    torch: Any
    transformers: Any
    model: Any
    device: str
    compiled: bool

    @classmethod
    def make(cls, config: ModelConfig, dtype: str, device: str, compiled: bool):
        """Returns the model with random weights, made on the device.

        Raises:
          ModuleNotFoundError: torch or transformers is not installed.
        """
        try:
            torch = importlib.import_module("torch")
            transformers = importlib.import_module("transformers")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"cannot run the peer: {error.name} is not installed. This project"
                " never needs it; the comparison does. Install torch and transformers,"
                " or use a machine that has them."
            ) from error
        hf_config = transformers.LlamaConfig(
            **_hf_config(config), attn_implementation="sdpa"
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            with torch.device(device):
                model = transformers.LlamaForCausalLM(hf_config).eval()
        finally:
            torch.set_default_dtype(before)
        return cls(
            torch=torch,
            transformers=transformers,
            model=model,
            device=device,
            compiled=compiled,
        )

    @property
    def device_name(self) -> str:
        if self.device == "cpu":
            return "cpu"
        return self.torch.cuda.get_device_name()

    def runner(self, workload: Workload, seed: int = 0) -> Callable[[int], Run]:
        """Returns a function that generates once, with so many decode steps."""
        torch, model = self.torch, self.model
        shape = (workload.batch_size, workload.input_len)
        generator = torch.Generator().manual_seed(seed)
        vocab = model.config.vocab_size
        prompts = torch.randint(vocab, shape, generator=generator).to(self.device)
        cache = self.transformers.StaticCache(
            config=model.config, max_cache_len=workload.input_len + workload.output_len
        )

        def step(tokens: Any) -> Any:
            scores = model(
                tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
            return scores[:, -1].argmax(-1, keepdim=True)

        compiled = (
            torch.compile(step, mode="reduce-overhead", fullgraph=True)
            if self.compiled
            else step
        )

        @torch.no_grad()
        def generate(calls: int) -> Run:
            cache.reset()
            self._wait()
            start = time.perf_counter()
            tokens = step(prompts)
            tokens.cpu()
            first = time.perf_counter()
            for _ in range(calls):
                if self.compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                # A graph writes its results where the next run of it reads them.
                tokens = compiled(tokens.clone())
            last = tokens.cpu()
            end = time.perf_counter()
            return Run(ttft_s=first - start, e2e_s=end - start, tokens=last.numpy())

        return generate

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def start_count(self) -> None:
        """Frees what earlier points left, and counts memory from here."""
        self.torch.compiler.reset()
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    @property
    def memory_bytes(self) -> tuple[int | None, int | None]:
        """What is allocated now, and at most since `start_count`."""
        if self.device == "cpu":
            return None, None
        cuda = self.torch.cuda
        return cuda.memory_allocated(), cuda.max_memory_allocated()

    @property
    def available_bytes(self) -> int | None:
        if self.device == "cpu":
            return None
        return self.torch.cuda.get_device_properties(0).total_memory

    @property
    def versions(self) -> dict[str, str]:
        return {
            "torch": self.torch.__version__,
            "transformers": self.transformers.__version__,
            "cuda": str(self.torch.version.cuda),
        }


def _hf_config(c: ModelConfig) -> dict[str, Any]:
    """Returns the arguments of `transformers.LlamaConfig`."""
    rope: dict[str, Any] = dict(rope_type="default", rope_theta=c.rope_theta)
    if c.rope_scaling is not None:
        rope |= dict(rope_type="llama3", **dataclasses.asdict(c.rope_scaling))
    return dict(
        num_hidden_layers=c.num_layers,
        hidden_size=c.embed_dim,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.mlp_dim,
        vocab_size=c.vocab_size,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings,
        max_position_embeddings=131_072,
        rope_parameters=rope,
    )


def measure(
    peer: Peer, config: ModelConfig, point: Point, repeats: int, warnings: Sequence[str]
) -> Record:
    """Returns the measured record of `point`, which is of one device."""
    workload = Workload(
        batch_size=point.batch_size,
        input_len=point.input_len,
        output_len=point.output_len,
    )
    chip = find_chip(point.chip)
    made = provenance.collect()
    made = dataclasses.replace(made, versions={**made.versions, **peer.versions})
    record = functools.partial(Record.of, point, made, origin="measured")
    available = peer.available_bytes or int(chip.hbm_bytes)
    peer.start_count()
    try:
        generate = peer.runner(workload)
        before = tuple(map(str, guard.gpus()))
        calls = point.output_len - 1
        found = timing.measure(
            generate, output_len=point.output_len, calls=calls, repeats=repeats
        )
        busy = guard.while_running(lambda: generate(calls)) if before else []
    except peer.torch.OutOfMemoryError as error:
        reason = f"Out of memory: {' '.join(str(error).split())[:300]}"
        return record(status="does not fit", reason=reason, available_bytes=available)
    held, peak = peer.memory_bytes
    ttft_limit_s, tpot_limit_s = (
        limits.limit_s(
            Program(
                phase=phase,
                config=config,
                partition=Partition(),
                workload=workload,
                dtype=point.dtype,
            ),
            chip,
        )
        for phase in PHASES
    )
    figures: dict[str, Any] = rates(
        ttft_s=found.ttft_s,
        tpot_s=found.tpot_s,
        batch_size=point.batch_size,
        output_len=point.output_len,
        num_chips=1,
    )
    return record(
        status="ok",
        micro_batches=1,
        needed_bytes=peak or 0,
        available_bytes=available,
        ttft_limit_s=ttft_limit_s,
        tpot_limit_s=tpot_limit_s,
        **figures,
        measurement=Measurement.of(
            found,
            engine="torch",
            devices=(peer.device_name,),
            driver=point.context.get("driver"),
            held_bytes=held,
            peak_bytes=peak,
            peak_reason=None if peak else "torch counts no memory of a cpu",
            devices_before=before,
            devices_busy=tuple(map(str, busy)),
            warnings=warnings,
        ),
    )


def plan(peer: Peer, config: ModelConfig, chip: Chip) -> list[Point]:
    """Returns the points that the flags ask for, batches rising."""
    gpus = guard.gpus() if peer.device == "cuda" else []
    context = {
        "engine": "torch",
        "compiled": str(peer.compiled),
        "code": provenance.code_digest("experiments/peer_torch.py"),
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


def beside(records: Sequence[Record], theirs: Sequence[Record]) -> tables.Table:
    """Returns torch's times next to those of every partition at the same batch.

    Args:
      records: of torch.
      theirs: of experiments.measure; other shapes are left out.
    """
    headings = [
        "batch", "partition", "TTFT", "of torch", "ratio", "TPOT", "of torch", "ratio",
    ]  # fmt: skip
    rows = []
    for r in records:
        for other in theirs:
            same = all(
                getattr(r, name) == getattr(other, name)
                for name in ("model", "dtype", "batch_size", "input_len", "output_len")
            )
            if not same or other.measurement is None or r.measurement is None:
                continue
            row = [str(r.batch_size), other.partition]
            for name in ("ttft_s", "tpot_s"):
                ours_s, torch_s = other.require(name), r.require(name)
                row += [units.seconds(ours_s), units.seconds(torch_s)]
                row.append(f"{torch_s / ours_s:.2f}")
            rows.append(row)
    return headings, rows


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
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
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
