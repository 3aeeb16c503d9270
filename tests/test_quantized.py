"""Weights and caches in 8 and 4 bits: right, the same everywhere, stored as claimed."""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.config import PRESETS, ModelConfig
from jaxllm.layers import group_size
from jaxllm.quantized import (
    KVFormat,
    WeightFormat,
    narrow,
    product,
    quantize,
)
from sharding.layout import Ticks
from sharding.mesh import make_mesh
from sharding.partition import Partition, Workload
from sharding.program import Program
from sharding.run import generate
from sharding.target import parse_target
from tests import reference
from tests.test_model import to_params

BATCH, PROMPT, TOKENS = 8, 12, 4
SMALL = dataclasses.replace(PRESETS["tiny"], num_layers=3)
# 6 devices hold two copies of 3 heads; neither 112 nor 265 divides by 3.
ODD = dataclasses.replace(SMALL, num_heads=6, num_kv_heads=3, vocab_size=265)
LARGEST = {"int8": 127, "fp8": 448, "int4": 7}


def rounded(w: np.ndarray, form: str, axis: int) -> np.ndarray:
    """Returns what is left of float32 `w` with one scale along `axis`."""
    scale = np.abs(w).max(axis, keepdims=True) / np.float32(LARGEST[form])
    values = w / scale
    if form == "fp8":
        return values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    return np.rint(values) * scale


@functools.cache
def weights_of(config: ModelConfig) -> dict[str, np.ndarray]:
    plain = reference.random_params(config, tied=False, seed=0)
    return {name: value.astype(np.float32) for name, value in plain.items()}


def dequantized(config: ModelConfig, form: str) -> dict[str, np.ndarray]:
    """Returns the weights that `form` stands for, from the definition."""
    fused = {"w_q": "w_qkv", "w_k": "w_qkv", "w_v": "w_qkv", "w_o": "w_out"}
    fused |= {"w_gate": "w_gate_up", "w_up": "w_gate_up", "w_down": "w_down"}
    found = {}
    for name, w in weights_of(config).items():
        if (short := name.rsplit(".", 1)[-1]) in fused:
            # [N, H, D] has two dimensions of inputs, all others one.
            rows = w.reshape(-1 if short == "w_o" else w.shape[0], w[0].size)
            rows = w.reshape(-1, w.shape[-1]) if short == "w_o" else rows
            if form == "int4":
                group = group_size(fused[short], config)
                rows = rounded(rows.reshape(len(rows), -1, group), form, 2)
            else:
                rows = rounded(rows, form, 0)
            w = rows.reshape(w.shape)
        found[name] = w
    return found


@functools.cache
def run(
    config: ModelConfig,
    name: str,
    weights: WeightFormat | None,
    kv: KVFormat | None,
    rules: str = "megatron",
    ticks: Ticks = "scanned",
    ragged: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns prompts [B, T], tokens [TOKENS, B] and the logits behind them."""
    partition = Partition.parse(name, rules)
    target = parse_target(f"cpu:{partition.num_devices}")
    prefill, decode = (
        Program(
            phase=phase,
            config=config,
            partition=partition,
            workload=Workload(
                batch_size=BATCH, input_len=PROMPT, output_len=TOKENS + 1
            ),
            dtype="float32",
            weights=weights,
            kv=kv,
            layers="scanned" if ticks == "scanned" else "unrolled",
            ticks=ticks,
            ragged=ragged,
            with_logits=True,
        )
        for phase in ("prefill", "decode")
    )
    layout = prefill.layout
    mesh = make_mesh(target.mesh_devices(partition.shape))
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config.vocab_size, (BATCH, PROMPT), np.int32)
    lengths = (rng.integers(3, PROMPT + 1, BATCH, np.int32),) if ragged else ()
    steps = generate(
        prefill.compile(target),
        decode.compile(target),
        layout,
        layout.place_params(to_params(weights_of(config), config), mesh),
        layout.zeros(layout.named_state(), mesh),
        prompts,
        *lengths,
    )
    tokens, logits = zip(*itertools.islice(steps, TOKENS), strict=True)
    return prompts, np.stack(tokens), np.stack(logits)


@pytest.mark.parametrize("form", ["int8", "fp8", "int4"])
def test_a_product_is_that_of_the_dequantised_weight(form: WeightFormat) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((48, 24)).astype(np.float32)
    w[:, 3], w[5] = 0, 0  # no largest value to scale by
    x = rng.standard_normal((2, 3, 48)).astype(np.float32)
    found = product(jnp.asarray(x), quantize(jnp.asarray(w), form, 6))
    with np.errstate(invalid="ignore"):
        if form == "int4":
            left = rounded(w.reshape(48, 4, 6), form, 2).reshape(w.shape)
        else:
            left = rounded(w, form, 0)
    expected = x.astype(np.float64) @ np.nan_to_num(left)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_narrow_values_are_near_wide_ones(form: str) -> None:
    x = np.random.default_rng(0).standard_normal((5, 7, 64)).astype(np.float32)
    dtype = jnp.int8 if form == "int8" else jnp.float8_e4m3fn
    found = narrow(jnp.asarray(x), -1, dtype)
    assert found.scale.shape == (5, 7)
    back = (
        np.asarray(found.values.astype(jnp.float32))
        * np.asarray(found.scale)[..., None]
    )
    # Half a step of 127, or of 3 bits behind the leading one.
    step = np.abs(x).max(-1, keepdims=True) / 254 if form == "int8" else np.abs(x) / 16
    assert (np.abs(back - x) <= 1.001 * step + 1e-3).all()


@pytest.mark.parametrize("form", ["int8", "fp8", "int4"])
def test_logits_equal_the_papers_with_dequantised_weights(form: WeightFormat) -> None:
    prompts, tokens, logits = run(SMALL, "tp1", form, None)
    texts = np.concatenate([prompts, tokens[:-1].T], axis=1)
    expected = reference.logits(dequantized(SMALL, form), SMALL, texts)
    for step in range(TOKENS):
        want = expected[:, PROMPT - 1 + step]
        np.testing.assert_allclose(logits[step], want, atol=1e-4, rtol=1e-4)
    exact = reference.logits(weights_of(SMALL), SMALL, texts)
    assert np.abs(exact - expected).max() > 0.01  # it matters


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_a_narrow_cache_changes_logits_a_little(kv: KVFormat) -> None:
    _, tokens, logits = run(SMALL, "tp1", None, kv)
    _, exact_tokens, exact = run(SMALL, "tp1", None, None)
    same = (tokens == exact_tokens).all(axis=0)
    assert same.any()
    error = np.abs(logits - exact)[:, same]
    np.testing.assert_array_equal(error[0], 0)  # prompts attend to what they made
    assert 0 < error[1:].max() < (0.1 if kv == "int8" else 0.5)


@pytest.mark.parametrize(
    ("config", "name", "rules", "weights", "kv", "ticks", "ragged"),
    [
        (SMALL, "tp8", "megatron", "int8", "int8", "scanned", False),  # heads twice
        (SMALL, "tp4", "kv_seq", "fp8", "fp8", "scanned", True),
        (SMALL, "tp4", "sequence", "int4", "int8", "scanned", False),
        (SMALL, "dp2_tp4", "two_d", "int4", "int8", "scanned", False),
        (SMALL, "dp2_tp2", "two_d", "int8", "fp8", "scanned", False),
        (SMALL, "dp2_tp2_pp2", "megatron", "int4", "fp8", "scanned", False),
        (SMALL, "pp2", "megatron", "int4", "int8", "unrolled", True),
        (SMALL, "tp2", "replicated", "fp8", None, "scanned", False),
        (ODD, "tp6", "megatron", "int8", "int8", "scanned", False),
    ],
    ids=lambda value: str(getattr(value, "num_heads", value)),
)  # fmt: skip
def test_equals_one_device(
    config: ModelConfig,
    name: str,
    rules: str,
    weights: WeightFormat,
    kv: KVFormat | None,
    ticks: Ticks,
    ragged: bool,
) -> None:
    _, tokens, logits = run(config, name, weights, kv, rules, ticks, ragged)
    _, want_tokens, want = run(config, "tp1", weights, kv, ragged=ragged)
    # A cache that is rounded turns the last bit of a key into a step of its scale.
    atol = 1e-4 if kv is None else {"int8": 0.02, "fp8": 0.1}[kv]
    np.testing.assert_allclose(logits, want, atol=atol)
    np.testing.assert_array_equal(tokens, want_tokens)
