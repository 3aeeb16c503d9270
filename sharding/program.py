"""Program: one phase of one partitioned model, abstract until it is compiled.

A program knows the shapes and layouts of its arguments, so it can be lowered and
compiled for devices that are not there. With one stage it is a plain `jax.jit` whose
layouts follow from named arguments and constrained activations; stages, and replicas
that share nothing, are handled by `jax.shard_map` around it (`sharding.pipeline`).

    prefill(params, state, prompts[, lengths]) -> state, logits
    decode(params, state)                      -> state, logits

`state` is donated. Logits are an empty tuple unless `with_logits`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import layout as layouts
from jax.sharding import Mesh, PartitionSpec

from jaxllm import decode as decode_lib
from jaxllm.attention import PromptAttention
from jaxllm.cache import CACHE_AXES
from jaxllm.config import ModelConfig
from jaxllm.decode import GREEDY, Lookup, Sampling, TokenAttention
from jaxllm.layers import Place, Rotate, rotate, rotate_flipped
from jaxllm.model import Layers, Params, Steps, Turn
from jaxllm.norm_kernel import Mailbox
from jaxllm.quantized import KVFormat, WeightFormat
from sharding import overlap, residual, vocab
from sharding.attention import (
    Attention,
    Token,
    prompt_attention,
    refusal,
    split_attention,
    token_attention,
    token_refusal,
)
from sharding.layout import Layout, Named, State, Ticks
from sharding.mesh import make_mesh
from sharding.overlap import Overlap
from sharding.partition import Partition, Workload, check
from sharding.pipeline import Pipeline
from sharding.residual import PromptResidual, Residual
from sharding.rules import MESH_AXES
from sharding.target import Target

Phase = Literal["prefill", "decode"]
LastLayer = Literal["all", "last"]
Rotation = Literal["joined", "flipped"]

_ROTATIONS: Mapping[Rotation, Rotate] = {"joined": rotate, "flipped": rotate_flipped}

# Prompt tokens that a replica reads at once. More would only cost memory: a matrix
# product of this many rows is limited by compute on every chip we know (an H100 needs
# about 300: 989e12 / 3.35e12), and weights are read again for each micro-batch.
MICRO_BATCH_TOKENS = 16_384

# What a stage takes for a micro-batch besides, in tokens: what it computes while it
# reads its weights once, as above. Products of fewer rows run at a lower rate too:
# Llama-3.1-8B as pp2 on two H100s takes 25.7, 24.2 and 23.8 ms for 2,048 tokens in
# micro-batches of 2,048, 4,096 and 8,192, about 1 + 150 / tokens; with either figure
# it is cut alike.
MICRO_BATCH_OVERHEAD_TOKENS = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device, by what they hold, while a program runs.

    Attributes:
      weights_bytes: parameters, padded layers included.
      kv_bytes: the cache of every sequence in flight.
      activations_bytes: the compiler's temporaries.
      other_bytes: prompts, tokens, residual streams in flight, results, code.
      peak_bytes: the sum; what must fit.
    """

    weights_bytes: int
    kv_bytes: int
    activations_bytes: int
    other_bytes: int
    peak_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """What the compiler made of a program.

    Attributes:
      text: the optimised HLO of one device.
      memory: of one device.
      alias_bytes: of one device's results that are written over its arguments.
      xla_flops: what XLA's own cost analysis says, None where it says nothing.
      compile_s: seconds to trace, lower and compile.
      ticks: equal steps that a stage executes in one call.
      busy_ticks: those in which it does useful work.
      executable: call it with the program's arguments, on attached devices.
    """

    text: str
    memory: Memory
    alias_bytes: int
    xla_flops: float | None
    compile_s: float
    ticks: int
    busy_ticks: int
    executable: Any


class _Recompiled:
    """A compiled program that takes arrays of int4 in jax before 0.11.

    There an array forgets that it is packed, and compiled programs then refuse it; a
    `jax.jit`, which compiles once more when first called, does not.
    """

    def __init__(self, compiled: Any, jitted: Any, mesh: Mesh):
        self._compiled, self._jitted, self._mesh = compiled, jitted, mesh

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    def __call__(self, *arguments: Any) -> Any:
        with jax.set_mesh(self._mesh):
            return self._jitted(*arguments)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One phase of `config` under `partition`.

    Attributes:
      phase: "prefill" or "decode".
      config: the model as published.
      partition: how it is split.
      workload: batch and lengths.
      dtype: of activations, and of parameters and cache unless stored narrower.
      weights: format of the blocks' matrices, see `jaxllm.quantized`; None: `dtype`.
      kv: format of the cache; None: `dtype`.
      layers: unrolled or scanned.
      ticks: of a decode pipeline, unrolled or scanned; see `Layout.ticks`.
      attention: how a prompt's is computed; see `sharding.attention`.
      rotation: how its queries and keys are turned; see `jaxllm.layers`.
      token_attention: how that of a decoded token is; see there.
      residual: how a token's products are added up; see `sharding.residual`.
      prompt_residual: how a prompt's are; see there.
      overlap: what of a prompt runs while devices sum; see `sharding.overlap`.
      last_layer: of which of a prompt's positions the last layer computes more than
        keys and values: "all", or the "last" one, which is all that the head reads;
        of a pipeline the last stage alone.
      compiler_options: of XLA, beside those of the target.
      micro_batches: of prefill; None chooses (see `prefill_micro_batches`).
      ragged: prompts of different lengths, each with its own position.
      with_logits: also return logits [B, V] in float32.
      sampling: how tokens are picked; if not greedy, `State.seeds` says from what.

    Raises:
      ValueError: the combination cannot work; see `sharding.partition.check`.
    """

    phase: Phase
    config: ModelConfig
    partition: Partition
    workload: Workload
    dtype: str = "bfloat16"
    weights: WeightFormat | None = None
    kv: KVFormat | None = None
    layers: Layers = "unrolled"
    ticks: Ticks = "scanned"
    attention: Attention = "blocks"
    rotation: Rotation = "joined"
    token_attention: Token = "einsum"
    residual: Residual = "plain"
    prompt_residual: PromptResidual = "plain"
    overlap: Overlap = "none"
    last_layer: LastLayer = "all"
    compiler_options: tuple[tuple[str, str], ...] = ()
    micro_batches: int | None = None
    ragged: bool = False
    with_logits: bool = False
    sampling: Sampling = GREEDY

    def __post_init__(self) -> None:
        check(self.config, self.partition, self.workload)
        if self.ticks == "unrolled" and self.layers == "scanned":
            raise ValueError(
                "ticks='unrolled' with layers='scanned': slots of a cache whose layers"
                " are stacked are stacked too, and a loop over ticks picks one. Unroll"
                " the layers as well, or scan the ticks."
            )
        if reason := refusal(self.attention, self.config, self.dtype):
            raise ValueError(reason)
        if self.rotation not in _ROTATIONS:
            known = ", ".join(_ROTATIONS)
            raise ValueError(
                f"no rotation {self.rotation!r}; there are {known}. Choose one."
            )
        if reason := self.token_refusal(self.token_attention):
            raise ValueError(reason)
        if reason := self.residual_refusal(self.residual):
            raise ValueError(reason)
        self._check_ragged()
        self._check_micro_batches()
        if reason := self.prompt_residual_refusal(self.prompt_residual):
            raise ValueError(reason)
        if reason := self._overlap_refusal():
            raise ValueError(reason)
        if reason := self.last_layer_refusal(self.last_layer):
            raise ValueError(reason)

    def _check_micro_batches(self) -> None:
        asked, batch = self.micro_batches, self.layout.replica_batch
        if asked and (batch % asked or asked % self.layout.groups):
            raise ValueError(
                f"{asked} micro-batches of {batch} sequences a replica with"
                f" {self.layout.groups} groups in flight: micro-batches must divide the"
                " sequences and be a multiple of the groups. Choose another number, or"
                " leave it out."
            )

    def _check_ragged(self) -> None:
        """Refuses what would end the process, in XLA's partitioner of scatters.

        "Check failed: partition_group_list", spmd_partitioner_util.cc, jaxlib 0.10.2 to
        0.12.0.
        """
        partition = self.partition
        shared = partition.data > 1 and "data" not in partition.manual_axes
        if self.ragged and shared and min(partition.stage, partition.tensor) > 1:
            raise ValueError(
                f"{partition.name} (rules {partition.rules.name}) with prompts of"
                " different lengths: the compiler cannot write at a position a sequence"
                " inside stages whose data and tensor axes share each layer. Use equal"
                " lengths, one of the axes less, or other rules."
            )

    @property
    def layout(self) -> Layout:
        return Layout(
            config=self.config,
            partition=self.partition,
            workload=self.workload,
            dtype=self.dtype,
            weights=self.weights,
            kv=self.kv,
            layers=self.layers,
            ticks=self.ticks,
            ragged=self.ragged,
            drawn=not self.sampling.is_greedy,
        )

    def token_refusal(self, name: Token) -> str | None:
        """Returns why attention of a token cannot be `name`, None if it can."""
        if name == "einsum":
            return None
        layout, partition = self.layout, self.partition
        layers = -(-self.config.num_layers // partition.stage)
        bytes_each = layout.device_bytes(layout.named_state().cache) // (2 * layers)
        return token_refusal(
            name,
            layout.model,
            is_apart=self.layers == "unrolled"
            and (partition.stage == 1 or self.ticks == "unrolled"),
            is_whole=not self._splits_positions,
            is_wide=self.kv is None,
            size=bytes_each // jnp.dtype(self.dtype).itemsize,
        )

    @property
    def _splits_positions(self) -> bool:
        """Whether devices hold the cache of some positions each."""
        return self.partition.ways("cache_seq", "decode") > 1

    @property
    def token_rows(self) -> int:
        """Sequences of which a device decodes a token at once."""
        return self.layout.replica_batch // self.layout.groups

    def residual_refusal(self, name: Residual) -> str | None:
        """Returns why the residual cannot be `name`, None if it can."""
        if name == "plain":
            return None
        if self.phase != "decode" or self.weights:
            return (
                f"residual {name!r} in {self.phase} with weights {self.weights}: the"
                " kernel is for decoded tokens and weights as wide as activations. Use"
                " residual='plain', which has no such limit."
            )
        model = self.layout.model
        return residual.refusal(name, model, self.partition, self._tokens_at_once)

    def prompt_residual_refusal(self, name: PromptResidual) -> str | None:
        """Returns why a prompt's residual cannot be `name`, None if it can."""
        if name == "plain":
            return None
        if self.phase != "prefill" or self.weights or self.overlap != "none":
            return (
                f"prompt_residual {name!r} in {self.phase} with weights {self.weights}"
                f" and overlap {self.overlap!r}: the kernel is for prompts, read at"
                " once, and weights as wide as activations. Use"
                " prompt_residual='plain', which has no such limit."
            )
        tokens, model = self._tokens_at_once, self.layout.model
        return residual.refusal(name, model, self.partition, tokens, "prefill")

    def _overlap_refusal(self) -> str | None:
        if self.overlap == "none":
            return None
        if self.phase != "prefill":
            return (
                f"overlap {self.overlap!r} in {self.phase}: a token's sums are too"
                " short to run something beside them. It is for prompts. Use"
                " overlap='none'."
            )
        return overlap.refusal(self.overlap, self.partition, self._prompt_rows)

    def last_layer_refusal(self, name: LastLayer) -> str | None:
        """Returns why the last layer cannot be computed so, None if it can."""
        if name == "all":
            return None
        if name not in get_args(LastLayer):
            known = ", ".join(get_args(LastLayer))
            return f"no last_layer {name!r}; there are {known}. Choose one."
        partition = self.partition
        rules = {
            f"phase {self.phase}: a decoded token is the last position": (
                self.phase == "prefill"
            ),
            f"ticks {self.ticks!r}: the cache would pass through a choice of layers": (
                partition.stage == 1 or self.ticks == "unrolled"
            ),
            f"layers {self.layers!r}: a loop runs them all alike": (
                self.layers == "unrolled"
            ),
            f"overlap {self.overlap!r}: halves of the rows run in turns": (
                self.overlap == "none"
            ),
            f"rules {partition.rules.name!r}: one position cannot be split": (
                partition.sums_stream("prefill")
            ),
        }
        for reason, good in rules.items():
            if not good:
                return (
                    f"last_layer {name!r} with {reason}. Use last_layer='all', which"
                    " has no such limit."
                )
        return None

    @property
    def _phase_residual(self) -> Residual:
        return self.prompt_residual if self.phase == "prefill" else self.residual

    @property
    def _tokens_at_once(self) -> int:
        """Of a replica, in this phase."""
        if self.phase == "decode":
            return self.token_rows
        return self._prompt_rows * self.workload.input_len

    @property
    def _prompt_rows(self) -> int:
        """Sequences whose prompts a replica reads at once."""
        return self.layout.replica_batch // self.prefill_micro_batches

    @property
    def prefill_micro_batches(self) -> int:
        """M: with the least time for bubbles and overhead, and bounded activations.

        Of S stages and N tokens, each of M + S - 1 ticks is as long as N / M tokens and
        MICRO_BATCH_OVERHEAD_TOKENS take: with one stage the fewest micro-batches, of
        MICRO_BATCH_TOKENS at most; with several, more for shorter bubbles.
        """
        if self.micro_batches:
            return self.micro_batches
        layout = self.layout
        batch, groups = layout.replica_batch, layout.groups
        data = self.partition.data
        if data > 1 and "data" not in self.partition.manual_axes:
            return groups  # Rows of a split batch cannot be taken one by one.
        length, stages = self.workload.input_len, self.partition.stage
        fitting = [
            m
            for m in range(1, batch + 1)
            if batch % m == 0
            and m % groups == 0
            and batch // m * length <= MICRO_BATCH_TOKENS
        ]

        def tokens(m: int) -> float:
            return (m + stages - 1) * (batch * length / m + MICRO_BATCH_OVERHEAD_TOKENS)

        return min(fitting, key=tokens, default=batch)

    @property
    def num_ticks(self) -> int:
        """Equal steps that a stage executes in one call."""
        stages = self.partition.stage
        if self.phase == "decode":
            return stages
        return self.prefill_micro_batches + stages - 1

    @property
    def busy_ticks(self) -> int:
        """Ticks in which a stage does useful work."""
        if self.phase == "decode":
            return self.layout.groups
        return self.prefill_micro_batches

    @property
    def _manual(self) -> tuple[str, ...]:
        """Axes that `jax.shard_map` handles.

        Replicas need it for micro-batches, which are rows of a replica's own batch. A
        decode step of one stage has none, and compiles faster without.
        """
        one_step = self.phase == "decode" and self.partition.stage == 1
        return () if one_step else self.partition.manual_axes

    def named_arguments(self) -> tuple[Any, ...]:
        """Returns `Named` for every argument."""
        layout = self.layout
        arguments: tuple[Any, ...] = (layout.named_params(), layout.named_state())
        if self.phase == "prefill":
            batch, seq_len = self.workload.batch_size, self.workload.input_len
            arguments += (Named((batch, seq_len), jnp.int32, ("batch", None)),)
            if self.ragged:
                arguments += (Named((batch,), jnp.int32, ("batch",)),)
        return arguments

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """Returns the program lowered for the devices of `mesh`."""
        arguments = self.named_arguments()
        abstract = tuple(self.layout.abstract(named, mesh) for named in arguments)
        with jax.set_mesh(mesh):
            return self._jitted(mesh).lower(*abstract)

    def _jitted(self, mesh: Mesh) -> Any:
        shardings = jax.tree.map(
            lambda spec: jax.sharding.NamedSharding(mesh, spec),
            self._result_specs(),
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )
        return jax.jit(self._function(mesh), donate_argnums=1, out_shardings=shardings)

    def compile(self, target: Target) -> CompiledProgram:
        """Returns the program compiled for `target`, whose devices need not exist."""
        check(
            self.config,
            self.partition,
            self.workload,
            num_devices=target.num_devices,
            target=target.name,
        )
        if reason := refusal(self.attention, self.config, self.dtype, target):
            raise ValueError(reason)
        start = time.perf_counter()
        mesh = make_mesh(target.mesh_devices(self.partition.shape))
        executable = self.lower(mesh).compile(
            {**(target.compiler_options or {}), **dict(self.compiler_options)}
        )
        compile_s = time.perf_counter() - start
        stats = executable.memory_analysis()
        if stats is None:
            raise RuntimeError(
                f"XLA gives no memory analysis for {self.phase} of"
                f" {self.partition.name} on {target.name}; it is needed to say what"
                " fits. Use another jax version."
            )
        cost = executable.cost_analysis()
        text = executable.as_text()
        if text is None:
            raise RuntimeError(
                f"XLA gives no text of {self.phase} of {self.partition.name} on"
                f" {target.name}; it is what costs are read from. Use another jax"
                " version."
            )
        return CompiledProgram(
            text=text,
            memory=self._memory(stats),
            alias_bytes=stats.alias_size_in_bytes,
            xla_flops=cost.get("flops") if cost else None,
            compile_s=compile_s,
            ticks=self.num_ticks,
            busy_ticks=self.busy_ticks,
            executable=executable
            if self.weights != "int4" or jax.__version_info__ >= (0, 11)
            else _Recompiled(executable, self._jitted(mesh), mesh),
        )

    def _memory(self, stats: Any) -> Memory:
        layout = self.layout
        weights = layout.device_bytes(layout.named_params())
        kv = layout.device_bytes(layout.named_state().cache)
        live = (
            stats.argument_size_in_bytes
            + stats.output_size_in_bytes
            - stats.alias_size_in_bytes
            + stats.temp_size_in_bytes
            + stats.generated_code_size_in_bytes
            + self._mailbox_bytes
        )
        return Memory(
            weights_bytes=weights,
            kv_bytes=kv,
            activations_bytes=stats.temp_size_in_bytes,
            other_bytes=live - weights - kv - stats.temp_size_in_bytes,
            peak_bytes=live,
        )

    def _result_specs(self, keep: tuple[str, ...] | None = None) -> Any:
        layout = self.layout
        axes = keep if keep is not None else MESH_AXES
        state = layout.specs(layout.named_state(), axes)
        logits = layout.spec(("batch", None), axes) if self.with_logits else ()
        return state, logits

    def _function(self, mesh: Mesh) -> Callable[..., Any]:
        manual = self._manual
        local = self._staged(mesh) if self.partition.stage > 1 else self._single(mesh)

        def program(*arguments: Any) -> tuple[State, Any]:
            state, logits = local(*arguments)
            # Without the scores that fill the vocabulary up.
            return state, jax.tree.map(lambda x: x[:, : self.config.vocab_size], logits)

        program.__name__ = self.phase  # what profiles and HLO call the module
        if not manual:
            return program
        return jax.shard_map(
            program,
            mesh=mesh,
            in_specs=tuple(
                self.layout.specs(named, manual) for named in self.named_arguments()
            ),
            out_specs=self._result_specs(manual),
            axis_names=set(manual),
            check_vma=False,
        )

    def _place(self, platform: str) -> Place:
        """Returns what splits activations, and keeps a prompt's cache as it lies.

        Else XLA:GPU writes a prompt's keys as they come from the projection, positions
        before heads, and copies the whole cache there and back around a loop over
        micro-batches. Each device says so of its own part: the compiler cannot split
        what is said of the whole.
        """
        manual = self._manual
        sizes = self.partition.axes
        keep = tuple(a for a in sizes if sizes[a] > 1 and a not in manual)
        left = tuple(a for a in MESH_AXES if a not in manual)
        rules, phase = self.partition.rules, self.phase
        gpu = platform in ("gpu", "cuda", "rocm")
        pinned = gpu and phase == "prefill"

        def pin(x: jax.Array) -> jax.Array:
            return layouts.with_layout_constraint(
                x, layouts.Layout(tuple(range(x.ndim)))
            )

        def place(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
            if keep:
                spec = rules.spec(names, phase=phase, keep=keep)
                x = lax.with_sharding_constraint(x, spec)
            if pinned and names[-len(CACHE_AXES) :] == CACHE_AXES:
                spec = rules.spec(names, phase=phase, keep=left)
                x = jax.shard_map(
                    pin,
                    in_specs=spec,
                    out_specs=spec,
                    axis_names=set(left),
                    check_vma=False,
                )(x)
            return x

        return place

    def _attention(self) -> PromptAttention:
        return prompt_attention(
            self.attention, self.partition.rules, MESH_AXES, self._manual
        )

    def _steps(self, mesh: Mesh) -> Steps | None:
        name = self._phase_residual
        if name == "plain":
            return None
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        boxes = None
        if self.partition.tensor > 1 and not on_cpu:
            boxes = residual.make_mailboxes(self._mailbox, mesh)
        return residual.kernel_steps(
            self.config,
            self.partition,
            self._manual,
            boxes,
            phase=self.phase,
            split=name == "triton_split",
            whole=self.token_attention == "einsum",
            on_cpu=on_cpu,
        )

    @property
    def _mailbox_bytes(self) -> int:
        """Of what the compiler does not know of."""
        if self._phase_residual == "plain" or self.partition.tensor == 1:
            return 0
        return self._mailbox.num_bytes

    @property
    def _mailbox(self) -> Mailbox:
        """Where a device's peers write what it is to add up."""
        return Mailbox.of(
            peers=self.partition.tensor,
            rows=self._tokens_at_once,
            width=self.config.embed_dim,
        )

    def _turn(self, platform: str) -> Turn | None:
        if self.overlap == "none":
            return None
        return overlap.make_turn(
            self.layout.model,
            self.partition,
            self._manual,
            weights=self.weights,
            wide=platform == "cpu",
        )

    def _token_attention(self, platform: str) -> TokenAttention | None:
        if self._splits_positions:
            return split_attention(
                self.partition.rules, MESH_AXES, self._manual, self._place(platform)
            )
        return token_attention(
            self.token_attention,
            self.partition.rules,
            MESH_AXES,
            self._manual,
            interpret=platform == "cpu",
        )

    def _vocabulary(self, platform: str) -> tuple[Lookup, Callable[..., Any]]:
        """Returns how tokens are embedded and how they are picked."""
        sizes, manual = self.partition.axes, self._manual
        axes = self.partition.rules.axes_of("vocab", self.phase)
        axes = tuple(a for a in axes if sizes[a] > 1)
        inner = tuple(a for a in axes if a not in manual)
        batch = self.partition.rules.axes_of("batch", self.phase)
        rows = tuple(a for a in batch if sizes[a] > 1 and a not in manual)
        # See Pipeline.wide_sums.
        wide = platform == "cpu"
        return (
            functools.partial(
                vocab.lookup, axes=axes, inner=inner, rows=rows, wide=wide
            ),
            functools.partial(
                vocab.sample,
                sampling=self.sampling,
                vocab_size=self.config.vocab_size,
                axes=axes,
                inner=inner,
                rows=rows,
            ),
        )

    def _staged(self, mesh: Mesh) -> Callable[..., Any]:
        platform = mesh.devices.flat[0].platform
        lookup, sample = self._vocabulary(platform)
        pipeline = Pipeline(
            config=self.layout.model,
            stages=self.partition.stage,
            groups=self.layout.groups,
            micro_batches=self.prefill_micro_batches,
            ticks=self.ticks,
            place=self._place(platform),
            attention=self._attention(),
            rotate=_ROTATIONS[self.rotation],
            token_attention=self._token_attention(platform),
            steps=self._steps(mesh),
            turn=self._turn(platform),
            fill=self._splits_positions,
            only_last=self.last_layer == "last",
            lookup=lookup,
            sample=sample,
            with_logits=self.with_logits,
            wide_sums=platform == "cpu",
        )
        return pipeline.prefill if self.phase == "prefill" else pipeline.decode

    def _single(self, mesh: Mesh) -> Callable[..., Any]:
        platform = mesh.devices.flat[0].platform
        lookup, sample = self._vocabulary(platform)
        place = self._place(platform)
        steps = self._steps(mesh)
        if self.phase == "prefill":
            turn = self._turn(platform)
            return functools.partial(
                self._prefill_whole, place, lookup, sample, steps, turn
            )
        attention = self._token_attention(platform)
        return functools.partial(
            self._decode_whole, place, lookup, sample, attention, steps
        )

    def _prefill_whole(
        self,
        place: Place,
        lookup: Lookup,
        sample: Callable[..., Any],
        steps: Steps | None,
        turn: Turn | None,
        params: Params,
        state: State,
        prompts: jax.Array,
        lengths: jax.Array | None = None,
    ) -> tuple[State, Any]:
        config = self.layout.model
        attention = self._attention()
        count = self.prefill_micro_batches
        size = prompts.shape[0] // count

        def read(cache: Any, item: tuple[Any, ...], row: Any) -> tuple[Any, Any]:
            tokens, lengths, seeds = item
            cache, logits = decode_lib.prefill(
                config,
                params,
                cache,
                tokens,
                lengths,
                place=place,
                lookup=lookup,
                attention=attention,
                rotate=_ROTATIONS[self.rotation],
                row=row,
                steps=steps,
                turn=turn,
                fill=self._splits_positions,
                only_last=self.last_layer == "last",
            )
            where = jnp.int32(tokens.shape[1]) if lengths is None else lengths
            picked = sample(logits, seeds, where)
            return cache, (picked, logits if self.with_logits else ())

        items = (prompts, lengths, state.seeds)
        if count == 1:
            cache, (tokens, logits) = read(state.cache, items, 0)
        else:
            split = jax.tree.map(lambda x: x.reshape(count, size, *x.shape[1:]), items)

            def body(cache: Any, step: tuple[jax.Array, Any]) -> tuple[Any, Any]:
                i, item = step
                return read(cache, item, i * size)

            with jax.named_scope("micro_batches"):
                cache, results = lax.scan(body, state.cache, (jnp.arange(count), split))
            tokens, logits = jax.tree.map(
                lambda x: x.reshape(-1, *x.shape[2:]), results
            )
        state = state._replace(
            cache=cache,
            tokens=tokens,
            position=jnp.int32(prompts.shape[1]) if lengths is None else lengths,
            round=jnp.int32(0),
        )
        return state, logits

    def _decode_whole(
        self,
        place: Place,
        lookup: Lookup,
        sample: Callable[..., Any],
        attention: TokenAttention | None,
        steps: Steps | None,
        params: Params,
        state: State,
    ) -> tuple[State, Any]:
        cache, logits = decode_lib.decode_step(
            self.layout.model,
            params,
            state.cache,
            state.tokens,
            state.position,
            place=place,
            lookup=lookup,
            attention=attention,
            steps=steps,
        )
        state = state._replace(
            cache=cache,
            tokens=sample(logits, state.seeds, state.position + 1),
            position=state.position + 1,
            round=state.round + 1,
        )
        return state, logits if self.with_logits else ()
