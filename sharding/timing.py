"""Times compiled programs on attached devices and keeps every sample.

    TTFT  from the start of prefill until the first token of every sequence is on
          the host
    E2E   until the last token of every sequence is on the host
    TPOT  (E2E - TTFT) / (output tokens - 1)

Decode calls are dispatched one behind the other: each reads its tokens from the state
that the call before left on the device, and the host waits once, at the end. So a step
costs what the devices need for it, or what the host needs to dispatch it if that is
more. In a full pipeline all groups but the first get a token one call late, so one
call more is made, and counted (`sharding.run.leads`).

Nothing is timed before it is steady: the first call loads the program, and on GPUs the
second records its graph.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllm.model import Params
from jaxllm.quantized import Quantized, largest
from sharding import run
from sharding.layout import Layout, Named
from sharding.program import CompiledProgram

WARMUP_CALLS = 8  # of decode in a warm-up run
MIN_WARMUP, MAX_WARMUP = 3, 10  # runs; each has one call of prefill
STEADY = 0.05  # two warm-up runs that differ by less are followed by counted ones
DRIFT = 0.03  # later samples that differ by more from earlier ones are warned of,
NOISY = 0.05  # and so are samples that spread over more than this

Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One generation: prefill, then decode calls.

    Attributes:
      ttft_s: start to the first tokens on the host.
      e2e_s: start to the last tokens on the host.
      tokens: [B], the last token of each sequence.
    """

    ttft_s: float
    e2e_s: float
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Every sample of some equal runs.

    Attributes:
      output_len: tokens of each sequence, the one from prefill included.
      calls: of the decode program in each run.
      warmup_samples_s: whole times of the runs before.
      ttft_samples_s: of each run, in order.
      e2e_samples_s: likewise.
      steady: the last two warm-up runs took equally long.
      same_tokens: all runs ended in the same tokens, as they must.
    """

    output_len: int
    calls: int
    warmup_samples_s: tuple[float, ...]
    ttft_samples_s: tuple[float, ...]
    e2e_samples_s: tuple[float, ...]
    steady: bool
    same_tokens: bool

    @property
    def tpot_samples_s(self) -> tuple[float, ...]:
        pairs = zip(self.ttft_samples_s, self.e2e_samples_s, strict=True)
        return tuple((e2e - ttft) / (self.output_len - 1) for ttft, e2e in pairs)

    @property
    def ttft_s(self) -> float:
        return statistics.median(self.ttft_samples_s)

    @property
    def tpot_s(self) -> float:
        return statistics.median(self.tpot_samples_s)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why these times may not be trusted; empty if nothing speaks against them."""
        found = []
        if not self.steady:
            last = ", ".join(f"{1e3 * s:.4g}" for s in self.warmup_samples_s[-3:])
            found.append(
                f"not steady after {len(self.warmup_samples_s)} warm-up runs, the last"
                f" of {last} ms"
            )
        named = (("TTFT", self.ttft_samples_s), ("TPOT", self.tpot_samples_s))
        for name, samples in named:
            change, width = drift(samples) - 1, spread(samples)
            if width > NOISY:
                found.append(f"{name} samples spread over {100 * width:.1f} %")
            if abs(change) > max(DRIFT, width):
                found.append(
                    f"{name} of later runs is {100 * change:+.1f} % from earlier ones"
                )
        if not self.same_tokens:
            found.append("equal runs ended in different tokens")
        return tuple(found)


def spread(samples: Sequence[float]) -> float:
    """Returns the interquartile range of `samples` as a fraction of their median.

    Example:
      >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
      0.6666666666666666
    """
    low, middle, high = np.quantile(samples, (0.25, 0.5, 0.75))
    return float((high - low) / middle)


def drift(samples: Sequence[float]) -> float:
    """Returns the median of the later half of `samples` over that of the earlier.

    A middle sample belongs to neither. 1 if there are fewer than four: two samples
    say nothing.

    Example:
      >>> drift([1.0, 1.0, 7.0, 1.5, 1.5])
      1.5
    """
    half = len(samples) // 2
    if half < 2:
        return 1.0
    return statistics.median(samples[-half:]) / statistics.median(samples[:half])


def decode_calls(layout: Layout, output_len: int) -> int:
    """Returns how many calls of decode give every sequence `output_len` tokens.

    Prefill gives the first token. Where groups follow each other through a pipeline,
    all but the first get theirs in the call after the one that starts it.
    """
    late = not run.leads(layout).all()
    return output_len - 1 + late


def runner(
    prefill: CompiledProgram,
    decode: CompiledProgram,
    layout: Layout,
    mesh: Mesh,
    params: Params,
    *,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> Callable[[int], Run]:
    """Returns a function that generates once, with so many decode calls.

    It holds one decode state, which every call donates and prefill sets back, so
    nothing more is allocated than one generation needs. Prompts are random tokens that
    lie on the devices.

    Args:
      prefill: of `layout`, not ragged.
      decode: likewise.
      layout: of both.
      mesh: attached devices.
      params: on them.
      seed: of the prompts.
      clock: seconds, rising.
    """
    workload = layout.workload
    shape = (workload.batch_size, workload.input_len)
    tokens = np.random.default_rng(seed).integers(layout.config.vocab_size, size=shape)
    named = Named(shape, np.int32, ("batch", None))
    prompts = jax.device_put(tokens.astype(np.int32), layout.shardings(named, mesh))
    state = layout.zeros(layout.named_state(), mesh)

    def generate(calls: int) -> Run:
        nonlocal state
        jax.block_until_ready((state, prompts))
        start = clock()
        state, _ = prefill.executable(params, state, prompts)
        np.asarray(state.tokens)
        first = clock()
        for _ in range(calls):
            state, _ = decode.executable(params, state)
        last = np.asarray(state.tokens)
        return Run(ttft_s=first - start, e2e_s=clock() - start, tokens=last)

    return generate


def measure(
    generate: Callable[[int], Run], *, output_len: int, calls: int, repeats: int
) -> Timing:
    """Returns the times of `repeats` runs, after as many as it takes to be steady.

    Warm-up runs are short: prefill and at most WARMUP_CALLS of decode, at least
    MIN_WARMUP of them.

    Args:
      generate: runs prefill and so many decode calls; see `runner`.
      output_len: tokens of each sequence, at least 2.
      calls: of decode in a run.
      repeats: runs that count.
    """
    warmup: list[float] = []
    while len(warmup) < MIN_WARMUP or not settled(warmup):
        if len(warmup) == MAX_WARMUP:
            break
        warmup.append(generate(min(calls, WARMUP_CALLS)).e2e_s)
    runs = [generate(calls) for _ in range(repeats)]
    return Timing(
        output_len=output_len,
        calls=calls,
        warmup_samples_s=tuple(warmup),
        ttft_samples_s=tuple(run.ttft_s for run in runs),
        e2e_samples_s=tuple(run.e2e_s for run in runs),
        steady=settled(warmup),
        same_tokens=all(np.array_equal(r.tokens, runs[0].tokens) for r in runs),
    )


def settled(samples: Sequence[float]) -> bool:
    """Returns whether the last two runs took equally long; see `STEADY`."""
    before, last = samples[-2:]
    return abs(last - before) <= STEADY * min(last, before)


def random_params(layout: Layout, mesh: Mesh, seed: int = 0) -> Params:
    """Returns random parameters that lie as `layout` says, made one array at a time.

    Nothing is allocated beside them, which `Layout.random_params` cannot promise: a
    model that just fits can be made. Scales are 1, all else is normal with the
    variance of 1 / inputs; layers that only fill a stage up are random too, for a
    product with zeros takes less power, and less time. Stored in a narrower format,
    values are normal in a third of its range, and their scales all equal.
    """
    named = layout.named_params()
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(named))))

    def make(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = path[-1] == jax.tree_util.DictKey("scale")
        return _maker(leaf.shape, leaf.dtype, leaf.sharding, scale)(next(keys))

    def one(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Quantized):
            return make(path, leaf)
        values, scale = leaf.values, leaf.scale
        # Values are [..., D, N], or in groups [..., N / g, g, D].
        inputs = values.shape[-1 if layout.weights == "int4" else -2]
        even = 3 / largest(values.dtype) * inputs**-0.5
        filled = jnp.full(scale.shape, even, scale.dtype, device=scale.sharding)
        return Quantized(values=make(path, values), scale=filled)

    return jax.tree.map_with_path(
        one,
        layout.abstract(named, mesh),
        is_leaf=lambda x: isinstance(x, Quantized),
    )


@functools.lru_cache(maxsize=32)
def _maker(
    shape: tuple[int, ...], dtype: Any, sharding: Any, scale: bool
) -> Callable[[jax.Array], jax.Array]:
    """Returns what draws one array; equal ones share it, and are compiled once."""

    def make(key: jax.Array) -> jax.Array:
        if scale:
            return jnp.ones(shape, dtype)
        if jnp.dtype(dtype).itemsize > 1:
            deviation = jnp.asarray(shape[-2] ** -0.5, dtype)
            return jax.random.normal(key, shape, dtype) * deviation
        most = largest(dtype)
        drawn = jax.random.normal(key, shape, jnp.bfloat16) * (most / 3)
        return jnp.clip(drawn, -most, most).astype(dtype)

    return jax.jit(make, out_shardings=sharding)


def allocated_bytes(devices: Sequence[jax.Device], name: str) -> int | None:
    """Returns a figure of the fullest device's allocator; None if it keeps none.

    Args:
      devices: attached.
      name: "bytes_in_use", or "peak_bytes_in_use" since the process started.
    """
    stats = [device.memory_stats() for device in devices]
    found = [s[name] for s in stats if s and name in s]
    return max(found) if len(found) == len(stats) else None
