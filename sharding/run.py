"""Runs compiled programs on attached devices: tokens step by step."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm.model import Params
from sharding.layout import Layout, State
from sharding.mesh import make_mesh
from sharding.program import CompiledProgram, Program
from sharding.target import Target


def generate(
    prefill: CompiledProgram,
    decode: CompiledProgram,
    layout: Layout,
    params: Params,
    state: State,
    prompts: Any,
    *lengths: Any,
) -> Iterator[tuple[np.ndarray, Any]]:
    """Yields the next token of every sequence [B] int32, and the logits behind it.

    In a full pipeline all groups but the first get their token one call later
    (`sharding.pipeline`); what is yielded is in step again, so that the first decoded
    token costs two calls and every other one.

    Args:
      prefill: compiled for the same layout as `decode`.
      decode: likewise.
      layout: of both.
      params: on the devices.
      state: on the devices; donated.
      prompts: [B, T] int32.
      *lengths: [B] int32, if the programs are ragged.

    Yields:
      Tokens, and logits [B, V] or an empty tuple; the first from prefill.
    """
    state, logits = prefill.executable(params, state, prompts, *lengths)
    yield np.asarray(state.tokens), _host(logits)
    ahead = leads(layout)
    late = not ahead.all()
    before: tuple[Any, Any] | None = None
    while True:
        state, logits = decode.executable(params, state)
        now = np.asarray(state.tokens), _host(logits)
        if not late:
            yield now
        elif before is not None:
            yield _merge(ahead, before, now)
        before = now


def answers(
    prefill: Program,
    decode: Program,
    target: Target,
    params: Callable[[Layout, Mesh], Params],
    prompts: np.ndarray,
    *lengths: np.ndarray,
    count: int,
    seeds: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Compiles both phases and returns tokens [count, B] and logits [count, B, V].

    Args:
      prefill: `with_logits`, and written for the same layout as `decode`.
      decode: likewise.
      target: attached devices.
      params: gives the parameters as they lie on a mesh.
      prompts: [B, T] int32.
      *lengths: [B] int32, if the programs are ragged.
      count: tokens of each sequence.
      seeds: [B] uint32, if tokens are drawn.
    """
    layout = decode.layout
    mesh = make_mesh(target.mesh_devices(decode.partition.shape))
    state = layout.zeros(layout.named_state(), mesh)
    if seeds is not None:
        state = state._replace(seeds=jax.device_put(seeds, state.seeds.sharding))
    steps = generate(
        prefill.compile(target),
        decode.compile(target),
        layout,
        params(layout, mesh),
        state,
        prompts,
        *lengths,
    )
    tokens, logits = zip(*itertools.islice(steps, count), strict=True)
    return np.stack(tokens), np.stack(logits)


def leads(layout: Layout) -> np.ndarray:
    """Returns which sequences [B] get their token in the call that starts it."""
    row = np.arange(layout.workload.batch_size) % layout.replica_batch
    return row < layout.replica_batch // layout.groups


def _host(logits: Any) -> Any:
    return logits if isinstance(logits, tuple) else np.asarray(logits)


def _merge(ahead: np.ndarray, before: tuple, now: tuple) -> tuple[np.ndarray, Any]:
    tokens = np.where(ahead, before[0], now[0])
    if isinstance(now[1], tuple):
        return tokens, ()
    return tokens, np.where(ahead[:, None], before[1], now[1])
