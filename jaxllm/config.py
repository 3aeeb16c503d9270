"""Shapes of dense decoder-only transformers: presets and Hugging Face configs."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of rotary frequencies.

    Wavelengths longer than `original_max_position_embeddings / low_freq_factor`
    are stretched by `factor`, shorter ones than `... / high_freq_factor` are kept,
    those between are interpolated. Source: "The Llama 3 Herd of Models",
    arXiv:2407.21783, and the `rope_scaling` entry of its config.json.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


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
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type not in (int, float):
                continue
            if type(value) not in (int, field.type) or not value > 0:
                raise ValueError(
                    f"{field.name}={value!r} of a model must be a positive"
                    f" {field.type.__name__}; correct the config."
                )
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
      name: a key of `PRESETS`, a Hugging Face config.json, or a folder with one.

    Raises:
      ValueError: `name` is neither, or the file describes another architecture.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = pathlib.Path(name)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ValueError(
            f"unknown model {name!r}: no preset of that name and no file there."
            f" Presets are {', '.join(PRESETS)}. Choose one, or give the path of a"
            " Hugging Face config.json."
        )
    try:
        fields = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"cannot read model config {path}: {error}. A model is described by a"
            " Hugging Face config.json; give such a file."
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(
            f"cannot read model config {path}: it holds a {type(fields).__name__}, not"
            " an object of fields. Give a Hugging Face config.json."
        )
    return from_hugging_face(fields)


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
            f"config of model_type {asked!r}: only dense decoders of type 'llama' are"
            " implemented. Give a config.json of the Llama family."
        )
    fixed = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
    }
    for key, only in fixed.items():
        if fields.get(key, only) != only:
            raise ValueError(
                f"config has {key}={fields[key]!r}; only {only!r} is implemented for"
                " the Llama family. Use a model that has it so."
            )

    def need(key: str) -> Any:
        if fields.get(key) is None:
            raise ValueError(
                f"config has no {key!r}; it is part of the model's shape and has no"
                " default here. Add it to config.json."
            )
        return fields[key]

    # transformers 5 writes one `rope_parameters`; earlier ones the two older fields.
    rope = fields.get("rope_parameters") or {}
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    if theta is None:
        raise ValueError(
            "config has neither rope_theta nor rope_parameters.rope_theta; rotary"
            " embedding has no default base here. Add it to config.json."
        )
    num_heads = need("num_attention_heads")
    return ModelConfig(
        num_layers=need("num_hidden_layers"),
        embed_dim=need("hidden_size"),
        num_heads=num_heads,
        num_kv_heads=fields.get("num_key_value_heads") or num_heads,
        head_dim=fields.get("head_dim") or need("hidden_size") // num_heads,
        mlp_dim=need("intermediate_size"),
        vocab_size=need("vocab_size"),
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(rope or fields.get("rope_scaling") or {}),
        norm_eps=float(need("rms_norm_eps")),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
    )


def _rope_scaling(fields: Mapping[str, Any]) -> RopeScaling | None:
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(
            f"config has rotary scaling {kind!r}; implemented are 'default' and"
            " 'llama3'. Use a model with one of these."
        )
    return RopeScaling(
        factor=float(fields["factor"]),
        low_freq_factor=float(fields["low_freq_factor"]),
        high_freq_factor=float(fields["high_freq_factor"]),
        original_max_position_embeddings=int(
            fields["original_max_position_embeddings"]
        ),
    )
