"""A Llama decoder in float64 NumPy, written from the papers and not from `jaxllm`.

The tests compare `jaxllm` with this, so it shares no code, no parameter layout and no
trick with it: one function, whole arrays, every score kept. B sequences, T positions,
D width, N query heads, K key/value heads of H, G = N / K, F hidden width, V tokens.

    parameter                shape      parameter                shape
    embedding                V D        layers.<l>.mlp_norm      D
    layers.<l>.attn_norm     D          layers.<l>.w_gate        D F
    layers.<l>.w_q           D N H      layers.<l>.w_up          D F
    layers.<l>.w_k           D K H      layers.<l>.w_down        F D
    layers.<l>.w_v           D K H      final_norm               D
    layers.<l>.w_o           N H D      head (if untied)         D V

Sources: Llama, Touvron et al. 2023, arXiv:2302.13971 and Dubey et al. 2024,
arXiv:2407.21783; the rest is named where it is computed.
"""

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np

__all__ = [
    "Config",
    "RopeScaling",
    "apply_rotary",
    "logits",
    "parameter_shapes",
    "random_params",
    "rotary_frequencies",
]


class RopeScaling(Protocol):
    """How Llama 3.1 stretches its rotary frequencies."""

    @property
    def factor(self) -> float: ...
    @property
    def low_freq_factor(self) -> float: ...
    @property
    def high_freq_factor(self) -> float: ...
    @property
    def original_max_position_embeddings(self) -> int: ...


class Config(Protocol):
    """What the reference must know of a model; any object with these fields will do."""

    @property
    def num_layers(self) -> int: ...
    @property
    def embed_dim(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def mlp_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope_scaling(self) -> RopeScaling | None: ...
    @property
    def norm_eps(self) -> float: ...


def parameter_shapes(config: Config, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by name; `tied` leaves out the head."""
    d, f, v = config.embed_dim, config.mlp_dim, config.vocab_size
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding": (v, d), "final_norm": (d,)}
    if not tied:
        shapes["head"] = (d, v)
    layer = {
        "attn_norm": (d,),
        "w_q": (d, n, h),
        "w_k": (d, k, h),
        "w_v": (d, k, h),
        "w_o": (n, h, d),
        "mlp_norm": (d,),
        "w_gate": (d, f),
        "w_up": (d, f),
        "w_down": (f, d),
    }
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def random_params(config: Config, *, tied: bool, seed: int) -> dict[str, np.ndarray]:
    """Returns normal weights that keep activations near 1, and norms that are not 1."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in parameter_shapes(config, tied=tied).items():
        if name.endswith("norm"):
            params[name] = rng.uniform(0.5, 1.5, shape)
            continue
        # Inputs summed over: N H for the attention output, the first axis elsewhere.
        fan_in = math.prod(shape[:2]) if name.endswith("w_o") else shape[0]
        scale = 1.0 if name == "embedding" else fan_in**-0.5
        params[name] = scale * rng.standard_normal(shape)
    return params


def logits(
    params: Mapping[str, np.ndarray], config: Config, tokens: np.ndarray
) -> np.ndarray:
    """Returns the logits after every position of every sequence, in float64.

    Args:
      params: as in the table at the top, converted to float64. Without `head` the head
        is the embedding, transposed.
      config: sizes, rotary base and scaling, and epsilon of the norms.
      tokens: integers, [B, T].

    Returns:
      [B, T, V].

    Raises:
      ValueError: a parameter is missing, unknown, or not of the shape `config` says.
    """
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    _check(params, config)
    x = params["embedding"][tokens]
    for index in range(config.num_layers):
        prefix = f"layers.{index}."
        layer = {
            name.removeprefix(prefix): value
            for name, value in params.items()
            if name.startswith(prefix)
        }
        x = x + _attention(_norm(x, layer["attn_norm"], config.norm_eps), layer, config)
        x = x + _mlp(_norm(x, layer["mlp_norm"], config.norm_eps), layer)
    x = _norm(x, params["final_norm"], config.norm_eps)
    return x @ params.get("head", params["embedding"].T)


def _check(params: Mapping[str, np.ndarray], config: Config) -> None:
    wanted = parameter_shapes(config, tied="head" not in params)
    found = {name: value.shape for name, value in params.items()}
    if found != wanted:
        names = found.keys() ^ wanted.keys() or {
            name for name in wanted if found[name] != wanted[name]
        }
        details = [f"{n}: {found.get(n)}, not {wanted.get(n)}" for n in sorted(names)]
        raise ValueError(f"parameters do not fit the config: {'; '.join(details)}.")


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4)."""
    return weight * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> np.ndarray:
    """Returns the angle by which each pair of a head turns per position, [H / 2].

    Pair i turns by theta^(-2i / H) (Su et al. 2021, arXiv:2104.09864, section 3.2.2).
    Llama 3.1 reaches longer contexts by slowing the slow pairs down. Over the original
    context a pair makes so many turns: with at most `low_freq_factor` of them it goes
    `factor` times slower, with at least `high_freq_factor` as before, and in between at
    a mean of the two speeds that is linear in the turns.
    """
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequency
    turns = scaling.original_max_position_embeddings * frequency / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    as_before = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return as_before * frequency + (1 - as_before) * frequency / scaling.factor


def apply_rotary(
    x: np.ndarray, positions: np.ndarray, frequency: np.ndarray
) -> np.ndarray:
    """Returns `x` [..., T, heads, H] turned by `positions` [T].

    Entry i of a head is paired with entry i + H / 2, as in the checkpoints of Hugging
    Face; the papers pair 2i with 2i + 1, which is the same model with rows permuted.
    """
    angle = positions[:, None, None] * frequency
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
        ],
        axis=-1,
    )


def _attention(
    x: np.ndarray, layer: Mapping[str, np.ndarray], config: Config
) -> np.ndarray:
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    Query head n reads key/value head n // G.
    """
    length = x.shape[1]
    positions = np.arange(length)
    frequency = rotary_frequencies(
        config.head_dim, config.rope_theta, config.rope_scaling
    )
    q = apply_rotary(np.einsum("btd,dnh->btnh", x, layer["w_q"]), positions, frequency)
    k = apply_rotary(np.einsum("btd,dkh->btkh", x, layer["w_k"]), positions, frequency)
    v = np.einsum("btd,dkh->btkh", x, layer["w_v"])
    group = config.num_heads // config.num_kv_heads
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(config.head_dim)
    scores = np.where(positions[:, None] >= positions[None, :], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bnts,bsnh,nhd->btd", weights, v, layer["w_o"], optimize=True)


def _mlp(x: np.ndarray, layer: Mapping[str, np.ndarray]) -> np.ndarray:
    """SwiGLU (Shazeer 2020, arXiv:2002.05202, eq. 6), Swish with beta = 1."""
    gate, up = x @ layer["w_gate"], x @ layer["w_up"]
    return (gate / (1 + np.exp(-gate)) * up) @ layer["w_down"]
