"""Shapes of dense decoder-only transformers: presets and Hugging Face configs."""

import dataclasses
import difflib
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from jaxllm import files


def _check_positive(numbers: Any) -> None:
    """Checks every int and float of a dataclass to be positive and finite."""
    for field in dataclasses.fields(numbers):
        value = getattr(numbers, field.name)
        if field.type not in (int, float):
            continue
        if type(value) not in (int, field.type) or not 0 < value < math.inf:
            raise ValueError(
                f"{field.name}={str(value)[:80]} of a model must be a positive"
                f" {field.type.__name__}; correct the config."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of rotary frequencies.

    Wavelengths longer than `original_max_position_embeddings / low_freq_factor`
    are stretched by `factor`, shorter ones than `... / high_freq_factor` are kept,
    those between are interpolated. Source: "The Llama 3 Herd of Models",
    arXiv:2407.21783, and the `rope_scaling` entry of its config.json.

    Raises:
      ValueError: a number is not positive and finite, or there is nothing between
        the two factors.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} of a rotary scaling is not"
                f" below high_freq_factor={self.high_freq_factor}; wavelengths between"
                " the two are interpolated. Correct the config."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a dense decoder-only transformer.

    Attributes:
      num_layers: L, decoder blocks.
      embed_dim: D, width of the residual stream.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; must divide `num_heads`.
      head_dim: H, width of one head; even, because rotary rotates pairs.
      mlp_dim: F, hidden width of the feed-forward layer.
      vocab_size: V, tokens.
      rope_theta: base of the rotary wavelengths.
      rope_scaling: Llama 3.1 frequency stretching, or None.
      norm_eps: epsilon of RMSNorm.
      tie_embeddings: whether the head is the transposed embedding.

    Raises:
      ValueError: a size is not positive, `num_kv_heads` does not divide
        `num_heads`, or `head_dim` is odd.
    """

    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    tie_embeddings: bool

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of"
                f" num_kv_heads={self.num_kv_heads}; grouped-query attention gives"
                " every key/value head the same number of query heads. Correct the"
                " config."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd; rotary embedding rotates pairs of"
                " coordinates. Correct the config."
            )

    @property
    def group_size(self) -> int:
        """G, query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def layer_params(self) -> int:
        """Parameters of one decoder block."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        attention = self.embed_dim * (qkv + self.num_heads * self.head_dim)
        return attention + 3 * self.embed_dim * self.mlp_dim + 2 * self.embed_dim

    @property
    def num_params(self) -> int:
        """Parameters of the whole model; a tied head is counted once."""
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size * self.embed_dim
        return self.num_layers * self.layer_params + tables + self.embed_dim

    def cache_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of keys and values of `tokens` positions over all layers."""
        return (
            2 * self.num_layers * self.num_kv_heads * self.head_dim * tokens * itemsize
        )


_LLAMA_31_SCALING = RopeScaling(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def _llama_31(**shape: int) -> ModelConfig:
    # arXiv:2407.21783 table 3, and config.json of meta-llama/Llama-3.1-*.
    return ModelConfig(
        head_dim=128,
        vocab_size=128_256,
        rope_theta=500_000.0,
        rope_scaling=_LLAMA_31_SCALING,
        norm_eps=1e-5,
        tie_embeddings=False,
        **shape,
    )


# Every size is different from every other, so a transposed axis cannot hide, and
# no stage count but 3 divides the layers.
TINY = ModelConfig(
    num_layers=9,
    embed_dim=48,
    num_heads=8,
    num_kv_heads=4,
    head_dim=10,
    mlp_dim=112,
    vocab_size=264,
    rope_theta=10_000.0,
    rope_scaling=RopeScaling(
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=3.0,
        original_max_position_embeddings=32,
    ),
    norm_eps=1e-5,
    tie_embeddings=False,
)

PRESETS: Mapping[str, ModelConfig] = {
    "tiny": TINY,
    # Tied head, no scaling, few key/value heads.
    "tiny-tied": dataclasses.replace(
        TINY, num_layers=8, num_kv_heads=2, rope_scaling=None, tie_embeddings=True
    ),
    # config.json of HuggingFaceTB/SmolLM2-135M-Instruct.
    "smollm2-135m": ModelConfig(
        num_layers=30,
        embed_dim=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_dim=1536,
        vocab_size=49_152,
        rope_theta=100_000.0,
        rope_scaling=None,
        norm_eps=1e-5,
        tie_embeddings=True,
    ),
    "llama-3.1-8b": _llama_31(
        num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=8, mlp_dim=14_336
    ),
    "llama-3.1-70b": _llama_31(
        num_layers=80, embed_dim=8192, num_heads=64, num_kv_heads=8, mlp_dim=28_672
    ),
    "llama-3.1-405b": _llama_31(
        num_layers=126, embed_dim=16_384, num_heads=128, num_kv_heads=8, mlp_dim=53_248
    ),
}


def load(name: str) -> ModelConfig:
    """Returns the preset `name`, or the model of the config.json at path `name`.

    Args:
      name: a key of `PRESETS`, a Hugging Face config.json, or a folder with one. With
        `@` and a number behind it, a preset of so many layers: llama-3.1-70b@4.

    Raises:
      ValueError: `name` is neither, or the file describes another architecture.
    """
    if name in PRESETS:
        return PRESETS[name]
    preset, _, layers = name.partition("@")
    if preset in PRESETS and re.fullmatch(r"[1-9]\d{0,3}", layers):
        return dataclasses.replace(PRESETS[preset], num_layers=int(layers))
    path = pathlib.Path(name)
    if os.path.isdir(path):  # also where the name is too long for one
        path = path / "config.json"
    if not os.path.isfile(path):
        near = difflib.get_close_matches(name, PRESETS, 1)
        raise ValueError(
            f"unknown model {files.quoted(name)}: no preset of that name and no file"
            f" there. Presets are {', '.join(PRESETS)}."
            + (f" Did you mean {near[0]}?" if near else "")
            + " Choose one, or give the path of a Hugging Face config.json."
        )
    return from_hugging_face(files.read_json(files.find(path)))


def from_hugging_face(fields: Mapping[str, Any]) -> ModelConfig:
    """Returns the model that a Hugging Face config.json of the Llama family describes.

    Args:
      fields: the parsed config.json.

    Raises:
      ValueError: a needed field is missing, or the model is not a Llama-style dense
        decoder (biases, another activation, experts, another rotary scaling).
    """
    asked = fields.get("model_type", "a model without model_type")
    if asked != "llama":
        raise ValueError(
            f"config of model_type {files.quoted(asked)}: only dense decoders of type"
            " 'llama' are implemented. Give a config.json of the Llama family."
        )
    # transformers 5 writes one `rope_parameters`; earlier ones the two older fields.
    older = _get(fields, "rope_scaling", dict, {})
    newer = _get(fields, "rope_parameters", dict, {})
    scalings = [_rope_scaling(each) for each in (older, newer) if each]
    if scalings[1:] and scalings[0] != scalings[1]:
        raise ValueError(
            f"config has rope_scaling={files.quoted(older)} and"
            f" rope_parameters={files.quoted(newer)}; they are two names of one thing."
            " Remove the one that is stale."
        )
    for key in ("rope_theta", "partial_rotary_factor"):
        said = newer.get(key, older.get(key))
        fields = fields if said is None else {**fields, key: said}
    fixed = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "partial_rotary_factor": 1.0,
    }
    for key, only in fixed.items():
        if fields.get(key) not in (None, only):
            raise ValueError(
                f"config has {key}={files.quoted(fields[key])}; only {only!r} is"
                " implemented for the Llama family. Use a model that has it so."
            )

    embed_dim = _get(fields, "hidden_size", int)
    num_heads = _get(fields, "num_attention_heads", int)
    return ModelConfig(
        num_layers=_get(fields, "num_hidden_layers", int),
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=_get(fields, "num_key_value_heads", int, num_heads),
        head_dim=_get(fields, "head_dim", int, embed_dim // max(1, num_heads)),
        mlp_dim=_get(fields, "intermediate_size", int),
        vocab_size=_get(fields, "vocab_size", int),
        rope_theta=_get(fields, "rope_theta", float),
        rope_scaling=scalings[0] if scalings else None,
        norm_eps=_get(fields, "rms_norm_eps", float),
        tie_embeddings=_get(fields, "tie_word_embeddings", bool, False),
    )


def _get(fields: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Returns a field of type `kind`; null counts as absent."""
    value = fields.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(
            f"config has no {key!r}; it is part of the model and has no default here."
            " Add it to config.json."
        )
    if kind is float and type(value) is int and abs(value) < 1 << 63:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(
            f"config has {key}={str(value)[:80]!r}, a {type(value).__name__}; it must"
            f" be one {kind.__name__}. Correct config.json."
        )
    return value


def _rope_scaling(fields: Mapping[str, Any]) -> RopeScaling | None:
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(
            f"config has rotary scaling {files.quoted(kind)}; implemented are 'default'"
            " and 'llama3'. Use a model with one of these."
        )
    return RopeScaling(
        factor=_get(fields, "factor", float),
        low_freq_factor=_get(fields, "low_freq_factor", float),
        high_freq_factor=_get(fields, "high_freq_factor", float),
        original_max_position_embeddings=_get(
            fields, "original_max_position_embeddings", int
        ),
    )
