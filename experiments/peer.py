"""A peer to be compared with: the Llama of transformers on torch, timed as ours is."""

import dataclasses
import functools
import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from experiments.report import provenance, tables, units
from experiments.report.measurement import Measurement
from experiments.report.record import Point, Record, rates
from jaxllm.config import ModelConfig
from sharding import guard, limits, timing
from sharding.chips import find_chip
from sharding.partition import Partition, Workload
from sharding.program import Phase, Program
from sharding.timing import Run

PHASES: tuple[Phase, Phase] = ("prefill", "decode")


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
