"""The model computes what the papers say."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import config as config_lib
from jaxllm import decode, model
from jaxllm.attention import blocks_of, causal_attention
from jaxllm.cache import KV
from jaxllm.config import PRESETS, TINY, ModelConfig
from jaxllm.layers import Rotate, mlp_pieces, rotate, rotate_flipped
from tests import reference

SMALL = {
    "tiny": TINY,
    "tied": PRESETS["tiny-tied"],
    "one query head a key": dataclasses.replace(TINY, num_layers=2, num_kv_heads=8),
    "one key head": dataclasses.replace(TINY, num_layers=2, num_kv_heads=1),
}


def to_params(plain: dict[str, np.ndarray], config: ModelConfig) -> model.Params:
    """Returns the reference's parameters in the order of `jaxllm`, float32."""
    pieces = mlp_pieces(config)

    def block(layer: int) -> model.Tree:
        p = {
            key.rsplit(".", 1)[1]: value
            for key, value in plain.items()
            if key.startswith(f"layers.{layer}.")
        }
        d, k, g = config.embed_dim, config.num_kv_heads, config.group_size
        queries = p["w_q"].reshape(d, k, g, config.head_dim)
        qkv = [queries, p["w_k"][:, :, None], p["w_v"][:, :, None]]
        gate_up = [p[name].reshape(d, pieces, 1, -1) for name in ("w_gate", "w_up")]
        return {
            "attention": {
                "w_qkv": np.concatenate(qkv, axis=2).reshape(d, -1),
                "w_out": p["w_o"].reshape(-1, d),
            },
            "attention_norm": {"scale": p["attn_norm"]},
            "mlp_norm": {"scale": p["mlp_norm"]},
            "mlp": {
                "w_gate_up": np.concatenate(gate_up, axis=2).reshape(d, -1),
                "w_down": p["w_down"],
            },
        }

    ends = {
        "embedding": plain["embedding"],
        "final_norm": {"scale": plain["final_norm"]},
    }
    if not config.tie_embeddings:
        ends["w_head"] = plain["head"]
    blocks = tuple(block(layer) for layer in range(config.num_layers))
    tree = model.Params(ends=ends, blocks=blocks)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def empty_cache(config: ModelConfig, batch: int, length: int) -> tuple[KV, ...]:
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    return (KV(jnp.zeros(shape), jnp.zeros(shape)),) * config.num_layers


@pytest.mark.parametrize("name", SMALL)
def test_prefill_and_decode_equal_the_papers(name: str) -> None:
    config = SMALL[name]
    rng = np.random.default_rng(0)
    plain = reference.random_params(config, tied=config.tie_embeddings, seed=0)
    # Longer than the scaled rotary period of TINY, so that scaling matters.
    tokens = rng.integers(0, config.vocab_size, (3, 37))
    expected = reference.logits(plain, config, tokens)
    params = to_params(plain, config)
    cache, found = decode.prefill(
        config, params, empty_cache(config, 3, 40), jnp.asarray(tokens[:, :33])
    )
    np.testing.assert_allclose(found, expected[:, 32], atol=1e-4, rtol=1e-4)
    for position in range(33, 37):
        cache, found = decode.decode_step(
            config,
            params,
            cache,
            jnp.asarray(tokens[:, position]),
            jnp.int32(position),
        )
        np.testing.assert_allclose(found, expected[:, position], atol=1e-4, rtol=1e-4)


def test_prompts_of_different_lengths_get_what_they_get_alone() -> None:
    rng = np.random.default_rng(1)
    plain = reference.random_params(TINY, tied=False, seed=1)
    tokens = rng.integers(0, TINY.vocab_size, (3, 12))
    lengths = np.array([12, 5, 9])
    expected = reference.logits(plain, TINY, tokens)[np.arange(3), lengths - 1]
    params = to_params(plain, TINY)
    cache, found = decode.prefill(
        TINY,
        params,
        empty_cache(TINY, 3, 16),
        jnp.asarray(tokens),
        jnp.asarray(lengths),
    )
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    following = rng.integers(0, TINY.vocab_size, 3)
    _, found = decode.decode_step(
        TINY, params, cache, jnp.asarray(following), jnp.asarray(lengths)
    )
    for row, length in enumerate(lengths):
        alone = np.append(tokens[row, :length], following[row])[None]
        expected = reference.logits(plain, TINY, alone)[0, -1]
        np.testing.assert_allclose(found[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seq_len", [1, 16, 50, 97])
def test_attention_in_blocks_is_attention(seq_len: int) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, seq_len, 3, 4, 6))
    k, v = (jax.random.normal(key, (2, seq_len, 3, 6)) for key in keys[1:])
    found = causal_attention(q, k, v, block=16)
    scores = np.einsum("btkgh,bskh->bkgts", q, k) / np.sqrt(6)
    scores[..., ~np.tri(seq_len, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bkgts,bskh->btkgh", weights, v)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_long_prompts_never_hold_all_scores() -> None:
    """9,428 positions, the paper's longest: scores would be 355 MB a head."""
    shape = (1, 9428, 1, 1, 64)
    q = jax.ShapeDtypeStruct(shape, jnp.float32)
    k = jax.ShapeDtypeStruct((1, 9428, 1, 64), jnp.float32)
    compiled = jax.jit(causal_attention).lower(q, k, k).compile()
    count, size = blocks_of(9428)
    assert count * size >= 9428
    stats = compiled.memory_analysis()
    assert stats is not None
    assert stats.temp_size_in_bytes < 9428 * 9428 * 4 / 10


def test_published_sizes() -> None:
    # arXiv:2407.21783 table 3 names the models by billions of parameters; the exact
    # counts are those of the published checkpoints.
    counts = {
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.1-70b": 70_553_706_496,
        "llama-3.1-405b": 405_853_388_800,
        "smollm2-135m": 134_515_008,
    }
    for name, count in counts.items():
        config = PRESETS[name]
        assert config.num_params == count
        params = jax.eval_shape(lambda c=config: model.init_params(c, jnp.bfloat16))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


HUGGING_FACE = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}


def test_hugging_face_config_is_the_preset(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(HUGGING_FACE))
    assert config_lib.load(str(path)) == PRESETS["llama-3.1-8b"]
    assert config_lib.load(str(tmp_path)) == PRESETS["llama-3.1-8b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "'mixtral'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_theta": None}, "rope_theta"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_key_value_heads": 5}, r"num_heads=32.*num_kv_heads=5"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn'"),
        # transformers takes the older of the two names; others may not.
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_scaling=.*llama3.*and rope_parameters=.*default.*one thing",
        ),
        ({"rope_parameters": {"type": "linear"}}, "'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (
            {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        ({"model_type": "x" * 9999}, r"x\.\.\. \(10001 characters\): only"),
        ({"hidden_size": -4096}, "embed_dim=-4096"),
    ],
)
def test_other_architectures_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_lib.from_hugging_face({**HUGGING_FACE, **change})


@pytest.mark.parametrize("turn", [rotate, rotate_flipped])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pairs_are_turned_like_complex_numbers(turn: Rotate, dtype: type) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 2, 4, 6)), dtype)
    angles = rng.uniform(0, 9, (2, 3, 3)).astype(np.float32)
    first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
    want = (first + 1j * second) * np.exp(1j * angles[:, :, None, None])
    want = np.concatenate([want.real, want.imag], axis=-1)
    found = turn(x, jnp.asarray(angles))
    assert found.dtype == dtype
    most = 1e-5 if dtype == jnp.float32 else 2**-8 * np.abs(want)
    assert (np.abs(np.asarray(found, np.float64) - want) <= most + 1e-5).all()


def test_the_rotary_embedding_has_two_names() -> None:
    """Either may say it, or both the same; null says nothing."""
    scaling = HUGGING_FACE["rope_scaling"]
    newer = {"rope_theta": 500000.0, **scaling}
    for change in (
        {"rope_scaling": None, "rope_theta": None, "rope_parameters": newer},
        {"rope_theta": 1e4, "rope_parameters": newer},
        {"rope_theta": None, "rope_scaling": newer, "rope_parameters": None},
        {"partial_rotary_factor": None, "pretraining_tp": None},
        {"partial_rotary_factor": 1},
    ):
        found = config_lib.from_hugging_face({**HUGGING_FACE, **change})
        assert found == PRESETS["llama-3.1-8b"]


def test_a_misspelt_model_names_the_presets() -> None:
    with pytest.raises(ValueError, match=r"'llama-3\.1-7b'.*llama-3\.1-8b"):
        config_lib.load("llama-3.1-7b")
