"""Weights and caches stored in 8 or 4 bits with scales, and products with them.

    name   stored as      one scale for
    int8   int8           a weight: each output column; a cache: each token and head
    fp8    float8_e4m3fn  likewise
    int4   int4, packed   128 neighbouring outputs of one input row

Only what is stored is narrow: products are of activations in their own dtype. What is
multiplied is the stored value, converted on the way into the product, so that compilers
read 8 or 4 bits and never write a wide copy; scales are applied beside it. A column's
scale multiplies the result. A group's would have to multiply the weights, which makes
XLA write them out; so groups lie along the outputs, where each is a product of its own,
of activations times the scales of their rows (`product` says when).

Scales are symmetric: the largest value of a column or group is the largest stored one.
Embedding, head and norms stay as they are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

WeightFormat = Literal["int8", "fp8", "int4"]
KVFormat = Literal["int8", "fp8"]

GROUP = 128  # outputs that share a scale with a row of inputs, at most
MANY_TOKENS = 256  # of prompts, from which on a weight in groups is written out wide

_DTYPES: Mapping[str, Any] = {
    "int8": jnp.int8,
    "fp8": jnp.float8_e4m3fn,
    "int4": jnp.int4,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """Narrow values and their scales; a pytree that stands for one array.

    Attributes:
      values: of a weight [D, N] or, in groups of g outputs, [N / g, g, D]; of a cache
        [..., S, H].
      scale: what values are multiplied by: [N], [N / g, D] or [..., S].
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """Of the values."""
        return self.values.dtype

    @property
    def in_groups(self) -> bool:
        """Whether groups of outputs share a scale with each row of inputs."""
        return self.values.dtype == jnp.int4


def check_format(what: str, name: str | None, formats: Any) -> None:
    """Refuses a format that does not exist; None stands for the activations' dtype.

    Raises:
      ValueError: with the formats there are.
    """
    known = formats.__args__
    if name is not None and name not in known:
        raise ValueError(
            f"{what} in {name!r}: formats are {', '.join(known)}. None keeps the dtype"
            " of activations. Choose one of them."
        )


def largest(dtype: Any) -> float:
    """Returns the largest value that an array of `dtype` holds."""
    integer = jnp.issubdtype(dtype, jnp.integer)
    return float(jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max)


def narrow(x: Float[Array, "..."], axis: int, dtype: Any) -> Quantized:
    """Returns `x` in `dtype`, with a float32 scale for all that lies along `axis`.

        scale = max |x| / largest,  values = round(x / scale)

    Zeros, which have no largest, stay zeros.
    """
    wide, most = x.astype(jnp.float32), largest(dtype)
    scale = jnp.max(jnp.abs(wide), axis=axis, keepdims=True) / most
    values = wide / jnp.where(scale == 0, 1.0, scale)
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.round(values)
    values = jnp.clip(values, -most, most).astype(dtype)
    return Quantized(values=values, scale=jnp.squeeze(scale, axis))


def wide(x: Any, dtype: DTypeLike) -> tuple[Array, Array | None]:
    """Returns the values of an array in `dtype`, and their scale if it has one."""
    if isinstance(x, Quantized):
        return x.values.astype(dtype), x.scale
    return x, None


def quantize(
    weight: Float[Array, "D N"], form: WeightFormat, group: int = GROUP
) -> Quantized:
    """Returns a weight in `form`.

    Args:
      weight: in full precision.
      form: of the result.
      group: outputs that share a scale, where `form` has groups; divides N.
    """
    if form != "int4":
        return narrow(weight, 0, _DTYPES[form])
    columns = weight.T.reshape(-1, group, weight.shape[0])
    found = narrow(columns, 1, _DTYPES[form])
    return dataclasses.replace(found, scale=found.scale.astype(weight.dtype))


def dequantize(stored: Quantized) -> Float[Array, "D N"]:
    """Returns the weight [D, N] in float32 that `stored` stands for."""
    values, scale = stored.values.astype(jnp.float32), stored.scale.astype(jnp.float32)
    if values.ndim == 2:
        return values * scale[None]
    return (values * scale[:, None]).reshape(-1, values.shape[2]).T


def product(x: Float[Array, "B T D"], weight: Any) -> Float[Array, "B T N"]:
    """Returns `x` times a weight, an array [D, N] or `Quantized`.

    Groups are products of their own while decoding, at any batch, and for a few tokens
    of prompts. Many tokens are read in loops, where XLA:GPU would write the activations
    out anew for every group: there the weight is, layer by layer, which is smaller.
    """
    if not isinstance(weight, Quantized):
        return jnp.einsum("BTD,DN->BTN", x, weight)
    values, scale = weight.values.astype(x.dtype), weight.scale
    if values.ndim == 2:
        out = jnp.einsum("BTD,DN->BTN", x, values)
        # Scales are applied where the result is read, not in a pass of their own.
        out = jax.lax.optimization_barrier(out).astype(jnp.float32)
        return (out * scale[None, None]).astype(x.dtype)
    scale = scale.astype(x.dtype)
    if x.shape[1] == 1 or x.shape[0] * x.shape[1] < MANY_TOKENS:
        rows = x[None] * scale[:, None, None]
        out = jnp.einsum("JBTD,JgD->BTJg", rows, values).reshape(*x.shape[:2], -1)
    else:
        matrix = (values * scale[:, None]).reshape(-1, x.shape[2])
        out = jnp.einsum("BTD,ND->BTN", x, matrix)
    return jax.lax.optimization_barrier(out)


def narrow_like(new: Any, old: Any) -> Any:
    """Returns keys or values [..., H] stored as the cache `old` stores them."""
    if isinstance(old, Quantized) and not isinstance(new, Quantized):
        return narrow(new, -1, old.values.dtype)
    return new


def kv_dtype(form: KVFormat | None, dtype: DTypeLike) -> Any:
    """Returns the dtype in which a cache in `form` stores keys and values."""
    return jnp.dtype(dtype if form is None else _DTYPES[form])


def kv_row_bytes(form: KVFormat | None, dtype: DTypeLike, width: int) -> int:
    """Returns the bytes of one token's key, or value, of one head, its scale included.

    Example:
      >>> kv_row_bytes(None, "bfloat16", 128), kv_row_bytes("int8", "bfloat16", 128)
      (256, 132)
    """
    return width * kv_dtype(form, dtype).itemsize + (4 if form else 0)
