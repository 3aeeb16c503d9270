"""Programs written otherwise are compared fairly."""

import dataclasses

import numpy as np
import pytest

from experiments import agreement
from experiments.agreement import Answer, compare
from jaxllm.config import PRESETS
from sharding.partition import Partition, Workload
from sharding.target import parse_target


def _answer(tokens: list[list[int]], logits: np.ndarray) -> Answer:
    return Answer(partition="tp1", changes={}, tokens=np.asarray(tokens), logits=logits)


def test_what_follows_a_parting_is_not_compared() -> None:
    logits = np.zeros((3, 1, 4), np.float32)
    logits[1, 0] = [0.0, 2.0, 1.75, 0.0]
    other = logits.copy()
    other[1, 0, 2] = 2.25  # so it picks token 2 at the second step
    other[2] = 100.0
    found = compare(_answer([[0], [1], [0]], logits), _answer([[0], [2], [0]], other))
    assert (found.first, found.all, found.margin) == (0.0, 0.5, 0.25)
    assert (found.equal_tokens, found.steps) == (1, 3)


def test_variants_are_read_and_refused() -> None:
    found = agreement.read_variants(["residual=triton+ticks=scanned", ""])
    assert found == [{"residual": "triton", "ticks": "scanned"}, {}]
    with pytest.raises(ValueError, match="Did you mean residual"):
        agreement.read_variants(["residul=triton"])
    with pytest.raises(ValueError, match="no choice 'residual=fast'"):
        agreement.read_variants(["residual=fast"])


def test_kernels_agree_on_the_host() -> None:
    config = dataclasses.replace(
        PRESETS["tiny"], num_layers=2, embed_dim=64, head_dim=16
    )
    params = agreement.parameters(config, "float32")
    workload = Workload(batch_size=2, input_len=12, output_len=6)
    answers = [
        agreement.answer(
            config, params, Partition.parse(name), workload,
            parse_target("cpu:2"), changes, "float32",
        )
        for name, changes in [
            ("tp1", agreement.PLAIN),
            ("tp2", {"token_attention": "triton", "residual": "triton"}),
        ]
    ]  # fmt: skip
    found = compare(*answers)
    assert found.equal_tokens == found.steps == 2 * 5
    assert found.all < 1e-4 < found.largest
