"""Text from a trained model under a partition, batch by batch.

A `Generator` keeps its programs and parameters; a `Batch` is text in the making.
"""

import concurrent.futures
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from experiments.trained import Trained
from jaxllm.decode import GREEDY, Sampling
from jaxllm.model import Params
from jaxllm.quantized import KVFormat, WeightFormat
from sharding import choices, run
from sharding.layout import Layout
from sharding.mesh import make_mesh
from sharding.partition import Partition, Workload
from sharding.program import CompiledProgram, Program
from sharding.target import Target

_LEAST_BUCKET = 16
_WARM_STEPS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What goes on.

    Attributes:
      text: as it was asked.
      tokens: as the model reads it, the chat template around it if there is one.
    """

    text: str
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """How one prompt went on.

    Attributes:
      prompt: what was asked.
      tokens: that were generated, the end of sequence included.
      text: of `tokens`, without special ones.
      finish_reason: "eos" (the model ended), "length" (as many tokens as asked for) or
        "interrupted".
      seed: of its draws.
    """

    prompt: Prompt
    tokens: tuple[int, ...]
    text: str
    finish_reason: str
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Measured times of one batch, from the call of prefill on.

    Attributes:
      ttft_s: until every prompt has its first token.
      tpot_s: between tokens after that; None if there was one.
      e2e_s: until the last token.
      num_tokens: of all completions.
    """

    ttft_s: float
    tpot_s: float | None
    e2e_s: float
    num_tokens: int


class Generator:
    """Text from one model under one partition.

    Programs are compiled when a prompt length first needs them, parameters are read
    once; both are kept.

    Args:
      model: trained.
      partition: how it is split.
      target: devices that run.
      dtype: of activations, and of parameters and cache unless stored narrower.
      weights: format in which matrices are stored, such as "int8"; None: `dtype`.
      kv: format of the cache; None: `dtype`.
      layers: unrolled, scanned or auto, which is what is best for text.
      max_new_tokens: at most so many a prompt.
      sampling: how tokens are picked.
      batch_size: prompts at once; rounded up to what the partition can split.

    Raises:
      ValueError: the partition does not fit the model.
    """

    def __init__(
        self,
        model: Trained,
        partition: Partition,
        target: Target,
        *,
        dtype: str = "float32",
        weights: WeightFormat | None = None,
        kv: KVFormat | None = None,
        layers: str = "auto",
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
        batch_size: int = 1,
    ):
        self.model, self.partition, self.target = model, partition, target
        self.dtype, self.sampling = dtype, sampling
        self.weights: WeightFormat | None = weights
        self.kv: KVFormat | None = kv
        self.layers = layers
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self._rows = padded_batch(partition, batch_size)
        self._mesh = make_mesh(target.mesh_devices(partition.shape))
        self._compiled: dict[int, tuple[CompiledProgram, CompiledProgram]] = {}
        self._params: Params | None = None
        # Refuses what does not fit; says which layers "auto" is.
        self.layers = self._programs(self.input_len(1))[1].layers

    def input_len(self, length: int) -> int:
        """Returns the prompt length that programs are compiled for."""
        return bucket(length, self.partition.ways("residual_seq"))

    def _programs(self, input_len: int) -> tuple[Program, Program]:
        """Returns prefill and decode, not yet compiled."""
        prefill = Program(
            phase="prefill",
            config=self.model.config,
            partition=self.partition,
            workload=Workload(
                batch_size=self._rows,
                input_len=input_len,
                output_len=self.max_new_tokens,
            ),
            dtype=self.dtype,
            weights=self.weights,
            kv=self.kv,
            ragged=True,
            sampling=self.sampling,
        )
        return choices.choose_both(
            prefill,
            dataclasses.replace(prefill, phase="decode"),
            self.target,
            layers=self.layers,
            table=choices.LAYERS_FOR_TEXT,
        )

    def prepare(
        self, lengths: Sequence[int], tell: Callable[[str], None] = lambda text: None
    ) -> None:
        """Compiles and loads what prompts of these lengths need; the rest is waiting.

        Args:
          lengths: of the prompts of one batch, in tokens.
          tell: what is done, as it changes.
        """
        input_len = self.input_len(max(lengths))
        if input_len in self._compiled and self._params is not None:
            return
        programs = self._programs(input_len)
        tell("Compiling")
        # Compilers leave Python alone, so parameters are read meanwhile.
        with concurrent.futures.ThreadPoolExecutor(len(programs)) as pool:
            compiled = pool.map(lambda program: program.compile(self.target), programs)
            if self._params is None:
                self._params = self.model.load(
                    programs[0].layout,
                    self._mesh,
                    lambda done, total: tell(
                        f"Compiling, loading part {done} of {total}"
                    ),
                )
                tell("Compiling")
            prefill, decode = compiled
        self._compiled[input_len] = prefill, decode
        if self.target.platform != "cpu":
            # The first calls open connections and record graphs; text is not to wait.
            tell("Warming up")
            unsaid = Prompt(text="", tokens=(0,) * max(lengths))
            for _ in itertools.islice(self.steps([unsaid], 0), _WARM_STEPS):
                pass

    def start(self, prompts: Sequence[Prompt], seed: int = 0) -> "Batch":
        """Returns a batch whose text is made as it is iterated.

        Raises:
          ValueError: there are more prompts than `batch_size`, or none.
        """
        if not 0 < len(prompts) <= self.batch_size:
            raise ValueError(
                f"{len(prompts)} prompts for a batch of {self.batch_size}. Programs are"
                " compiled for one batch size. Give at least one prompt, and no more"
                " than that."
            )
        self.prepare([len(prompt.tokens) for prompt in prompts])
        return Batch(self, prompts, seed)

    def steps(self, prompts: Sequence[Prompt], seed: int) -> Iterator[np.ndarray]:
        """Yields the next token of every prompt, and of the rows that fill up."""
        input_len = self.input_len(max(len(prompt.tokens) for prompt in prompts))
        prefill, decode = self._compiled[input_len]
        layout: Layout = self._programs(input_len)[1].layout
        tokens = np.zeros((self._rows, input_len), np.int32)
        lengths = np.ones(self._rows, np.int32)
        for row, prompt in enumerate(prompts):
            lengths[row] = len(prompt.tokens)
            tokens[row, : lengths[row]] = prompt.tokens
        state = layout.zeros(layout.named_state(), self._mesh)
        if not self.sampling.is_greedy:
            seeds = np.full(self._rows, seed, np.uint32)
            state = state._replace(seeds=jax.device_put(seeds, state.seeds.sharding))
        assert self._params is not None
        made = run.generate(
            prefill, decode, layout, self._params, state, tokens, lengths
        )
        for step, _ in itertools.islice(made, self.max_new_tokens):
            yield step


class Batch:
    """Prompts that go on together; iterate once for the text as it is made."""

    def __init__(self, generator: Generator, prompts: Sequence[Prompt], seed: int):
        self._generator, self._prompts, self._seed = generator, prompts, seed
        self._texts = [_Text(generator) for _ in prompts]
        self._at_s: list[float] = []

    def __iter__(self) -> Iterator[list[str]]:
        """Yields a piece of text for each prompt; empty while none is certain."""
        steps = self._generator.steps(self._prompts, self._seed)
        start = time.perf_counter()
        for tokens in steps:
            self._at_s.append(time.perf_counter() - start)
            rows = zip(self._texts, tokens.tolist(), strict=False)
            yield [text.take(token) for text, token in rows]
            if all(text.finish_reason for text in self._texts):
                return

    def stop(self) -> list[str]:
        """Ends what has not ended; returns a last piece for each prompt."""
        return [text.stop("interrupted") for text in self._texts]

    @property
    def completions(self) -> list[Completion]:
        """How every prompt went on, so far."""
        return [
            Completion(
                prompt=prompt,
                tokens=tuple(text.tokens),
                text=text.text,
                finish_reason=text.finish_reason or "interrupted",
                seed=self._seed,
            )
            for prompt, text in zip(self._prompts, self._texts, strict=True)
        ]

    @property
    def timing(self) -> Timing | None:
        """What was measured; None if no token came."""
        if not self._at_s:
            return None
        first, last, count = self._at_s[0], self._at_s[-1], len(self._at_s)
        return Timing(
            ttft_s=first,
            tpot_s=(last - first) / (count - 1) if count > 1 else None,
            e2e_s=last,
            num_tokens=sum(len(text.tokens) for text in self._texts),
        )


class _Text:
    """One prompt's text as it grows."""

    def __init__(self, generator: Generator):
        tokenizer = generator.model.tokenizer
        self._eos, self._most = tokenizer.eos, generator.max_new_tokens
        self._stream = tokenizer.stream()
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None

    def take(self, token: int) -> str:
        """Returns what one more token adds."""
        if self.finish_reason:
            return ""
        self.tokens.append(token)
        if token in self._eos:
            return self.stop("eos")
        piece = self._stream.push(token)
        self.text += piece
        return piece + (self.stop("length") if len(self.tokens) == self._most else "")

    def stop(self, reason: str) -> str:
        """Returns what was held back."""
        if self.finish_reason:
            return ""
        self.finish_reason = reason
        rest = self._stream.end()
        self.text += rest
        return rest


def generate_texts(
    generator: Generator, prompts: Sequence[Prompt], seed: int = 0
) -> list[Completion]:
    """Returns how every prompt goes on, batch by batch."""
    done: list[Completion] = []
    for some in batches(prompts, generator.batch_size):
        batch = generator.start(some, seed)
        for _ in batch:
            pass
        done += batch.completions
    return done


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    """Yields `prompts` in order, at most `size` at a time."""
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def bucket(length: int, ways: int = 1) -> int:
    """Returns `length` rounded up, so that few programs serve all lengths.

    There are four lengths an octave, so less than a fifth of a long prompt is padding.

    Args:
      length: of the longest prompt.
      ways: pieces that the prompt must have.

    Example:
      >>> [bucket(n) for n in (1, 16, 17, 64, 65, 1000, 1025)]
      [16, 16, 32, 64, 80, 1024, 1280]
    """
    step = max(_LEAST_BUCKET, 1 << max(0, (length - 1).bit_length() - 3))
    step = math.lcm(step, ways)
    return math.ceil(length / step) * step


def padded_batch(partition: Partition, count: int) -> int:
    """Returns the least batch of at least `count` that `partition` can split."""
    replicas, stages = partition.ways("cache_batch"), partition.stage
    manual = partition.data if "data" in partition.manual_axes else 1
    batch = math.ceil(count / replicas) * replicas
    while batch // manual > stages and batch // manual % stages:
        batch += replicas
    return batch
