"""Norm, rotary embedding, attention projections, feed-forward: one block's parts.

A layer takes `place`, which pins a named activation to a layout and may be the
identity; it knows nothing of devices. Query, key and value are one weight, and so
are gate and up: one matrix product each. Weights are matrices, whose layout every
compiler likes, with columns ordered so that every shard holds whole pieces.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxllm.config import ModelConfig, RopeScaling
from jaxllm.quantized import GROUP, Quantized, product

# Pins an activation, whose dimensions are named, to a layout; returns it.
Place = Callable[[Array, tuple[str | None, ...]], Array]

# Turns coordinate pairs of heads [B, T, K, G, H] by angles [B, T, P].
Rotate = Callable[[Array, Array], Array]


def anywhere(x: Array, names: tuple[str | None, ...]) -> Array:
    """A `Place` that leaves every activation where it is."""
    del names
    return x


def param(
    init: Callable[..., Array],
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Param:
    """Returns a parameter whose dimensions are named `axes`."""
    return nnx.Param(init(rngs.params(), shape, dtype), axes=axes)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        ones = jax.nn.initializers.ones
        self.eps = config.norm_eps
        self.scale = param(
            ones, (config.embed_dim,), ("embed",), dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        wide = x.astype(jnp.float32)
        power = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(power + self.eps)).astype(x.dtype)
        return normed * self.scale[...][None, None, :]


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> Float[Array, " P"]:
    """Returns the angle by which each pair of coordinates turns per position.

    Su et al. 2021, arXiv:2104.09864, with the stretching described at
    `RopeScaling`. In radians, float32.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * jnp.pi)
    keep = (turns - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    keep = jnp.clip(keep, 0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def rotate(
    x: Float[Array, "B T K G H"], angles: Float[Array, "B T P"]
) -> Float[Array, "B T K G H"]:
    """Turns coordinate pairs (i, i + H/2) of every head by `angles`, in float32."""
    cos = jnp.cos(angles)[:, :, None, None, :]
    sin = jnp.sin(angles)[:, :, None, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return turned.astype(x.dtype)


def rotate_flipped(
    x: Float[Array, "B T K G H"], angles: Float[Array, "B T P"]
) -> Float[Array, "B T K G H"]:
    """Returns what `rotate` does: both halves by cosine, and by sine the other way.

    XLA:GPU reads halves that were joined two bytes at a time, and these as wide as it
    can; XLA:TPU rather joins.
    """
    signs = jnp.array([-1.0, 1.0], jnp.float32).reshape(1, 1, 1, 1, 2, 1)
    cos = jnp.cos(angles)[:, :, None, None, None, :]
    sin = jnp.sin(angles)[:, :, None, None, None, :] * signs
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    turned = halves * cos + jnp.flip(halves, axis=-2) * sin
    return turned.reshape(x.shape).astype(x.dtype)


def turned(
    qkv: Float[Array, "B T K S H"],
    angles: Float[Array, "B T P"],
    rotate: Rotate = rotate,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Returns rotated queries, rotated keys and values of `Attention.project_in`."""
    rotated = rotate(qkv[:, :, :, :-1], angles)
    return rotated[:, :, :, :-1], rotated[:, :, :, -1], qkv[:, :, :, -1]


def _columns(
    x: Array, weight: nnx.Param, slots: tuple[int, ...], multiply: Any = product
) -> Array:
    """Returns `x` times `weight`, with the columns told apart as `slots`."""
    out = multiply(x, weight.get_value())
    if not isinstance(weight.get_value(), Quantized):  # whose products end in one
        # Else XLA:TPU tells the weight's columns apart too, and copies all of it.
        out = jax.lax.optimization_barrier(out)
    return out.reshape(*out.shape[:-1], *slots)


class Attention(nnx.Module):
    """The projections around grouped-query attention (arXiv:2305.13245).

    The columns of `w_qkv` hold, for each key/value head in turn, its G query heads,
    then its key, then its value.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, n = config.embed_dim, config.num_heads * config.head_dim
        self.slots = (config.num_kv_heads, config.group_size + 2, config.head_dim)
        self.w_qkv = param(
            jax.nn.initializers.normal(d**-0.5),
            (d, math.prod(self.slots)),
            ("embed", "heads"),
            dtype=dtype,
            rngs=rngs,
        )
        self.w_out = param(
            jax.nn.initializers.normal(n**-0.5),
            (n, d),
            ("heads", "embed"),
            dtype=dtype,
            rngs=rngs,
        )

    def project_in(
        self,
        x: Float[Array, "B T D"],
        place: Place = anywhere,
        multiply: Callable[[Array, Any], Array] = product,
    ) -> Float[Array, "*parts B T K S H"]:
        """Returns each head's queries, its key and its value, none of them rotated.

        Args:
          x: the stream, normed.
          place: pins activations.
          multiply: what multiplies it with a weight, perhaps in parts to add up.
        """
        qkv = _columns(x, self.w_qkv, self.slots, multiply)
        parts = (None,) * (qkv.ndim - 5)
        return place(qkv, (*parts, "cache_batch", "seq", "heads", None, "head_dim"))

    def flatten(
        self, heads: Float[Array, "B T K G H"], place: Place = anywhere
    ) -> Float[Array, "B T N"]:
        """Returns what `w_out` is multiplied with."""
        heads = place(heads, ("batch", "seq", "heads", None, "head_dim"))
        return heads.reshape(*heads.shape[:2], -1)


# The most pieces into which gate and up are cut: 16 x 9 has the divisors 2, 3, 4, 6, 8,
# 9, 12, 16, ..., which are the tensor degrees there are.
MLP_PIECES = 144


def mlp_pieces(config: ModelConfig) -> int:
    """Returns into how many pieces gate and up are cut to be interleaved.

    A tensor degree that divides it gives every device whole pieces of both. It is 16
    for the Llama 3.1 models and 48 for SmolLM2-135M.
    """
    return math.gcd(config.mlp_dim, MLP_PIECES)


def group_size(name: str, config: ModelConfig) -> int:
    """Returns how many outputs of weight `name` share a scale, where groups do.

    At most `GROUP`, and so that no group reaches from one piece of the weight that a
    device may hold into the next: a head, a piece of gate or of up, a sixteenth of the
    residual stream.

    Example:
      >>> from jaxllm.config import PRESETS
      >>> names = ("w_qkv", "w_out", "w_gate_up", "w_down")
      >>> [group_size(name, PRESETS["smollm2-135m"]) for name in names]
      [64, 36, 32, 36]
    """
    stream = config.embed_dim // math.gcd(config.embed_dim, 16)
    piece = {
        "w_qkv": config.head_dim,
        "w_out": stream,
        "w_gate_up": config.mlp_dim // mlp_pieces(config),
        "w_down": stream,
    }[name]
    return max(g for g in range(1, min(GROUP, piece) + 1) if piece % g == 0)


class MLP(nnx.Module):
    """Gated feed-forward layer, SwiGLU (Shazeer 2020, arXiv:2002.05202).

    The columns of `w_gate_up` hold, piece by piece, the gate's columns, then the up
    projection's: see `mlp_pieces`.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, f = config.embed_dim, config.mlp_dim
        pieces = mlp_pieces(config)
        self.slots = (pieces, 2, f // pieces)
        self.w_gate_up = param(
            jax.nn.initializers.normal(d**-0.5),
            (d, 2 * f),
            ("embed", "mlp"),
            dtype=dtype,
            rngs=rngs,
        )
        self.w_down = param(
            jax.nn.initializers.normal(f**-0.5),
            (f, d),
            ("mlp", "embed"),
            dtype=dtype,
            rngs=rngs,
        )

    def hidden(
        self, x: Float[Array, "B T D"], place: Place = anywhere
    ) -> Float[Array, "B T F"]:
        """Returns what `w_down` is multiplied with."""
        gate_up = _columns(x, self.w_gate_up, self.slots)
        gate_up = place(gate_up, ("batch", "seq", "mlp", None, None))
        hidden = jax.nn.silu(gate_up[:, :, :, 0]) * gate_up[:, :, :, 1]
        return hidden.reshape(*hidden.shape[:2], -1)


def angles_at(
    positions: Int[Array, "B T"], config: ModelConfig
) -> Float[Array, "B T P"]:
    """Returns the rotary angles of `positions`, in radians, float32."""
    frequencies = rotary_frequencies(
        config.head_dim, config.rope_theta, config.rope_scaling
    )
    return positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
