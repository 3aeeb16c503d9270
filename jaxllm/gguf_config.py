"""The model that a GGUF file describes in fields and, for its rotary scaling, a tensor.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#llm.
"""

from typing import Any

import numpy as np

from jaxllm.config import ModelConfig, RopeScaling
from jaxllm.files import quoted
from jaxllm.gguf_file import Header


def model_config(header: Header) -> ModelConfig:
    """Returns the model that the fields describe.

    Raises:
      ValueError: a field is missing, of a wrong type or not understood, or the model
        is not a Llama-style dense decoder.
    """
    fields = _Fields(header)
    family = fields.need("general.architecture", str)
    if family != "llama":
        raise fields.refusal(
            f"general.architecture is {quoted(family)}; only 'llama' is implemented"
        )
    fields.only_known()
    embed_dim = fields.need("llama.embedding_length", int)
    num_heads = fields.need("llama.attention.head_count", int)
    if num_heads < 1:
        raise fields.refusal(f"llama.attention.head_count is {num_heads}")
    head_dim = fields.get("llama.attention.key_length", int, embed_dim // num_heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.get(key, int, head_dim) != head_dim:
            raise fields.refusal(
                f"{key} is {header.fields[key]}, but heads are {head_dim} wide"
            )
    embedding = header.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding else 0
    theta = _shortest(fields.need("llama.rope.freq_base", float))
    try:
        return ModelConfig(
            num_layers=fields.need("llama.block_count", int),
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=fields.get("llama.attention.head_count_kv", int, num_heads),
            head_dim=head_dim,
            mlp_dim=fields.need("llama.feed_forward_length", int),
            vocab_size=fields.get("llama.vocab_size", int, rows),
            rope_theta=theta,
            rope_scaling=_rope_scaling(fields, head_dim, theta),
            norm_eps=_shortest(
                fields.need("llama.attention.layer_norm_rms_epsilon", float)
            ),
            # llama.cpp's rule: a file without a head uses the embedding for it.
            tie_embeddings="output.weight" not in header.tensors,
        )
    except ValueError as error:
        raise ValueError(f"{header.file.path}: {error}") from error


class _Fields:
    """Fields of a header, asked for by key and type."""

    def __init__(self, header: Header):
        self.header = header

    def refusal(self, fact: str) -> ValueError:
        return ValueError(
            f"cannot load {self.header.file.path}: {fact}. The model must be a dense"
            " decoder of the Llama family, described in full. Give another file."
        )

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self.header.fields.get(key, default)
        if type(value) is not kind:
            raise self.refusal(
                f"{key} is {quoted(value)}, a {type(value).__name__} and not one"
                f" {kind.__name__}"
            )
        return value

    def need(self, key: str, kind: type) -> Any:
        if key not in self.header.fields:
            raise self.refusal(f"it has no field {key}, which has no default here")
        return self.get(key, kind, None)

    def only_known(self) -> None:
        """Refuses fields of the architecture that would change the model."""
        neutral = {
            "llama.expert_count": 0,
            "llama.expert_used_count": 0,
            "llama.rope.scaling.type": "none",
            "split.count": 1,
        }
        known = {
            *("context_length", "embedding_length", "block_count", "vocab_size"),
            *("feed_forward_length", "rope.freq_base", "rope.dimension_count"),
            *("attention.head_count", "attention.head_count_kv"),
            *("attention.key_length", "attention.value_length"),
            "attention.layer_norm_rms_epsilon",
        }
        for key, value in self.header.fields.items():
            if key in neutral:
                if value not in (neutral[key], 0):
                    raise self.refusal(
                        f"{key} is {quoted(value)}; only {neutral[key]!r} is known"
                    )
            elif key.startswith("llama.") and key.removeprefix("llama.") not in known:
                raise self.refusal(f"its field {quoted(key)} is not understood")


def _shortest(number: float) -> float:
    """Returns the decimal that was meant: the shortest that rounds to this float32."""
    return float(str(np.float32(number)))


def _rope_scaling(fields: _Fields, head_dim: int, theta: float) -> RopeScaling | None:
    """Returns the stretching that the tensor rope_freqs.weight applies, if any.

    The tensor divides each frequency. Only the stretching of Llama 3.1 and 3.2 is
    recognised: the factor is the tensor's largest number, the rest is published, and
    all numbers must be what follows from these.
    """
    stored = fields.header.tensors.get("rope_freqs.weight")
    if stored is None:
        return None
    if stored.shape != (head_dim // 2,):
        raise fields.refusal(
            f"rope_freqs.weight has shape {stored.shape}, one for each of"
            f" {head_dim // 2} rotary frequencies is needed"
        )
    divisors = stored.read(np.arange(1), slice(0, head_dim // 2))[0].astype(np.float64)
    if not (np.isfinite(divisors).all() and divisors.min() > 0):
        raise fields.refusal("rope_freqs.weight has numbers that are no divisors")
    # config.json of meta-llama/Llama-3.1-* and Llama-3.2-*.
    scaling = RopeScaling(
        factor=_shortest(divisors.max()),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    keep = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1.0 / (keep + (1.0 - keep) / scaling.factor)
    if not np.allclose(divisors, expected, rtol=1e-5):
        worst = int(np.abs(divisors / expected - 1).argmax())
        raise fields.refusal(
            f"rope_freqs.weight divides frequency {worst} by {divisors[worst]:.6g},"
            f" where Llama 3.1's stretching by {scaling.factor} divides it by"
            f" {expected[worst]:.6g}; no other stretching is implemented"
        )
    return scaling
