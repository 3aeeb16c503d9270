"""Runs compiled programs on attached devices: tokens step by step."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxllm.model import Params
from sharding.layout import Layout, State
from sharding.program import CompiledProgram


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
