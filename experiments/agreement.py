"""The same prompts through programs that are written otherwise: how far apart are they?

Random weights, equal for all; the first variant is what the others are compared with.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.model import Params, init_params
from sharding import choices
from sharding.partition import Partition, Workload
from sharding.program import Program
from sharding.run import answers
from sharding.target import Target

# The plainest way: ordinary operations alone.
PLAIN = {
    "attention": "blocks",
    "rotation": "joined",
    "token_attention": "einsum",
    "residual": "plain",
    "prompt_residual": "plain",
    "overlap": "none",
    "last_layer": "all",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What one variant said.

    Attributes:
      partition: how the model was split.
      changes: how its programs were written; empty: as the tables say.
      tokens: [steps, B], greedy.
      logits: [steps, B, V] they come from, float32.
    """

    partition: str
    changes: Mapping[str, str]
    tokens: np.ndarray
    logits: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far an answer is from the first one.

    Attributes:
      largest: of the first one's logits, absolute.
      first: the largest difference of logits after the prompt.
      all: the same over all steps, of each sequence as long as tokens are equal.
      equal_tokens: of all, those before a sequence's first difference.
      steps: of each sequence.
      margin: the first one's lead of its token over the other's, where sequences part,
        at most; 0 where none does. A near tie is no error.
    """

    largest: float
    first: float
    all: float
    equal_tokens: int
    steps: int
    margin: float


def answer(
    config: ModelConfig,
    params: Params,
    partition: Partition,
    workload: Workload,
    target: Target,
    changes: Mapping[str, str],
    dtype: str,
) -> Answer:
    """Returns what programs written with `changes` say to random prompts.

    Args:
      config: shape of the model.
      params: of `parameters`.
      partition: how the model is split.
      workload: batch and lengths.
      target: attached devices.
      changes: to the tables; see `sharding.choices.read_changes`.
      dtype: of weights, activations and cache.

    Raises:
      ValueError: the partition does not suit, or a change does not.
    """
    target = target.first(partition.num_devices)
    prefill = Program(
        phase="prefill",
        config=config,
        partition=partition,
        workload=workload,
        dtype=dtype,
        with_logits=True,
    )
    decode = dataclasses.replace(prefill, phase="decode")
    prefill, decode = choices.choose_both(prefill, decode, target, changes=changes)
    rng = np.random.default_rng(0)
    shape = (workload.batch_size, workload.input_len)
    tokens, logits = answers(
        prefill,
        decode,
        target,
        lambda layout, mesh: layout.place_params(params, mesh),
        rng.integers(0, config.vocab_size, shape, np.int32),
        count=workload.output_len - 1,
    )
    return Answer(
        partition=partition.name,
        changes=changes,
        tokens=tokens,
        logits=logits.astype(np.float32),
    )


def parameters(config: ModelConfig, dtype: str) -> Params:
    """Returns random parameters on the host, to be split in any way."""
    make = jax.jit(init_params, static_argnums=(0, 1))
    return jax.device_get(make(config, dtype))


def compare(first: Answer, other: Answer) -> Agreement:
    """Returns how far `other` is from `first`."""
    same = np.logical_and.accumulate(first.tokens == other.tokens, axis=0)
    # Logits behind a token are comparable while all tokens before it are equal.
    before = np.concatenate([np.ones_like(same[:1]), same[:-1]])
    apart = np.abs(first.logits - other.logits).max(axis=-1)
    parts = before & ~same
    margin = 0.0
    for step, row in zip(*np.nonzero(parts), strict=True):
        logits = first.logits[step, row]
        lead = logits[first.tokens[step, row]] - logits[other.tokens[step, row]]
        margin = max(margin, float(lead))
    return Agreement(
        largest=float(np.abs(first.logits).max()),
        first=float(apart[0].max()),
        all=float(apart[before].max()),
        equal_tokens=int(same.sum()),
        steps=int(same.size),
        margin=margin,
    )


def read_variants(texts: Sequence[str]) -> list[dict[str, str]]:
    """Returns the changes of each variant, from `residual=triton+ticks=scanned`.

    Raises:
      ValueError: a change is not known.
    """
    return [choices.read_changes([t for t in text.split("+") if t]) for text in texts]
