"""Checkpoints written for tests, as Hugging Face and llama.cpp lay them out.

Written from their documentation and not from `jaxllm`: names and shapes of tensors as
`transformers` saves a Llama, and the rows of q and k as llama.cpp's converter orders
them in GGUF files.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from jaxllm.config import ModelConfig
from tests import reference

# Extras: without them, tests that import this file are skipped.
gguf = pytest.importorskip("gguf")
save_file = pytest.importorskip("safetensors.numpy").save_file

Arrays = dict[str, np.ndarray]

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_params(config: ModelConfig, seed: int = 0) -> Arrays:
    """Returns parameters of the reference, float32."""
    params = reference.random_params(config, tied=config.tie_embeddings, seed=seed)
    return {name: value.astype(np.float32) for name, value in params.items()}


def hugging_face(params: Mapping[str, np.ndarray], config: ModelConfig) -> Arrays:
    """Returns `params` as `transformers` names and shapes them: [out, in]."""
    d = config.embed_dim
    tensors = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm"],
    }
    if not config.tie_embeddings:
        tensors["lm_head.weight"] = params["head"].T
    for layer in range(config.num_layers):
        p, at = f"layers.{layer}.", f"model.layers.{layer}."
        for name in "qkv":
            matrix = params[f"{p}w_{name}"].reshape(d, -1).T
            tensors[f"{at}self_attn.{name}_proj.weight"] = matrix
        tensors |= {
            f"{at}self_attn.o_proj.weight": params[f"{p}w_o"].reshape(-1, d).T,
            f"{at}input_layernorm.weight": params[f"{p}attn_norm"],
            f"{at}post_attention_layernorm.weight": params[f"{p}mlp_norm"],
            f"{at}mlp.gate_proj.weight": params[f"{p}w_gate"].T,
            f"{at}mlp.up_proj.weight": params[f"{p}w_up"].T,
            f"{at}mlp.down_proj.weight": params[f"{p}w_down"].T,
        }
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def config_json(config: ModelConfig) -> dict[str, Any]:
    """Returns what config.json says of `config`."""
    scaling = config.rope_scaling
    return {
        "model_type": "llama",
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling and {"rope_type": "llama3", **vars(scaling)},
        "tie_word_embeddings": config.tie_embeddings,
    }


def write_folder(
    folder: pathlib.Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    shards: int = 1,
) -> pathlib.Path:
    """Writes a Hugging Face folder: one file, or shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        held = {key: tensors[key] for key in list(tensors)[shard::shards]}
        save_file(held, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(held, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def gguf_names(tensors: Mapping[str, np.ndarray]) -> Arrays:
    """Returns Hugging Face tensors with the names of GGUF files."""
    renamed = {}
    for name, value in tensors.items():
        for theirs, ours in _GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name.replace("model.layers.", "blk.")] = value
    return renamed


def gguf_tensors(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Arrays:
    """Returns Hugging Face tensors with the names and the row order of GGUF files."""
    ordered = dict(tensors)
    for name, value in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # A head's halves, [2, H/2], become pairs of neighbours, [H/2, 2].
            rows = value.reshape(-1, 2, config.head_dim // 2, config.embed_dim)
            ordered[name] = rows.swapaxes(1, 2).reshape(value.shape)
    return gguf_names(ordered)


def rope_divisors(config: ModelConfig) -> np.ndarray:
    """Returns by how much each rotary frequency is divided, float32."""
    plain = reference.rotary_frequencies(config.head_dim, config.rope_theta, None)
    scaled = reference.rotary_frequencies(
        config.head_dim, config.rope_theta, config.rope_scaling
    )
    return (plain / scaled).astype(np.float32)


def write_gguf(
    path: pathlib.Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    kind: Any = gguf.GGMLQuantizationType.F32,
    fields: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes `tensors`, named as in GGUF files: matrices as `kind`, vectors as F32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(20)])
    writer.add_array("tokenizer.ggml.token_type", [1] * 20)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    for key, value in (fields or {}).items():
        kinds = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32}
        kinds |= {float: writer.add_float32, list: writer.add_array}
        kinds[type(value)](key, value)
    if config.rope_scaling:
        writer.add_tensor("rope_freqs.weight", rope_divisors(config))
    for name, value in tensors.items():
        if value.dtype == np.uint8:  # quantised already
            writer.add_tensor(name, value, raw_dtype=kind)
        elif value.ndim == 1:
            writer.add_tensor(name, value.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
