"""Shapes as HLO prints them: element type, sizes, memory space.

`bf16[8,4096]{1,0:T(8,128)(2,1)S(1)}` is 8 x 4096 bfloat16, row-major, tiled, in
memory space 1. A tuple `(f32[2], s32[])` has elements and no sizes of its own.
Sizes are logical: a layout's tile padding is not counted.
"""

import dataclasses
import functools
import math
import re

# Bits of one element. xla_data.proto, enum PrimitiveType.
ELEMENT_BITS = {
    "pred": 8,
    "s1": 1, "s2": 2, "s4": 4, "s8": 8, "s16": 16, "s32": 32, "s64": 64,
    "u1": 1, "u2": 2, "u4": 4, "u8": 8, "u16": 16, "u32": 32, "u64": 64,
    "f4e2m1fn": 4, "f8e3m4": 8, "f8e4m3": 8, "f8e4m3b11fnuz": 8, "f8e4m3fn": 8,
    "f8e4m3fnuz": 8, "f8e5m2": 8, "f8e5m2fnuz": 8, "f8e8m0fnu": 8,
    "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
    "token": 0, "opaque": 0,
}  # fmt: skip

# dtype[dims]{layout}
_ARRAY = re.compile(r"([a-z]\w*)\[([0-9,<=\s]*)\]((?:\{(?:[^{}]|\{[^{}]*\})*\})?)")
_SPACE = re.compile(r"S\((\d+)\)")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """An array, a token, or a tuple of shapes.

    Attributes:
      dtype: XLA's name of the element type; "tuple" for a tuple.
      dims: sizes, major to minor as written (not as laid out).
      space: memory space; 0 is the device's main memory.
      elements: shapes inside a tuple; empty for an array.
      is_tiled: the layout carries tiles, as only XLA:TPU's do.
      layout: as written, "{1,0:T(8,128)(2,1)}", or "".
    """

    dtype: str
    dims: tuple[int, ...] = ()
    space: int = 0
    elements: tuple["Shape", ...] = ()
    is_tiled: bool = False
    layout: str = ""

    @functools.cached_property
    def size(self) -> int:
        """Number of elements of an array; 0 for a token or a tuple."""
        return math.prod(self.dims) if ELEMENT_BITS.get(self.dtype) else 0

    @property
    def multiply_add_flops(self) -> int:
        """Operations on real numbers in x * y + z: 2, or 8 where these are complex."""
        return 8 if self.dtype in ("c64", "c128") else 2

    @functools.cached_property
    def leaves(self) -> tuple["Shape", ...]:
        """The arrays inside, in order; an array is its own only leaf."""
        if self.dtype != "tuple":
            return (self,)
        return tuple(leaf for e in self.elements for leaf in e.leaves)

    @functools.cached_property
    def sizes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Element type and dimensions of each leaf, whatever their layout."""
        return tuple((leaf.dtype, leaf.dims) for leaf in self.leaves)

    @functools.cached_property
    def num_bytes(self) -> int:
        """Bytes of all arrays inside, wherever they live."""
        return sum(to_bytes(leaf.size, leaf.dtype) for leaf in self.leaves)


def to_bytes(num_elements: int, dtype: str) -> int:
    """Returns the bytes of `num_elements` elements, rounded up to a byte."""
    return (num_elements * ELEMENT_BITS[dtype] + 7) // 8


@functools.lru_cache(maxsize=65536)
def parse_shape(text: str) -> Shape:
    """Returns the shape that `text` spells.

    Raises:
      ValueError: `text` is no shape, or its element type is unknown.
    """
    clean = _COMMENT.sub("", text).strip()
    try:
        shape, end = _parse(clean, 0, text)
    except RecursionError:
        raise ValueError(f"shape {text[:80]!r}... nests hundreds deep.") from None
    if end != len(clean):
        raise ValueError(f"shape {text!r}: cannot read {clean[end:]!r}.")
    return shape


def _parse(text: str, at: int, whole: str) -> tuple[Shape, int]:
    if text.startswith("(", at):
        elements = []
        at += 1
        while True:
            while text.startswith((" ", ","), at):
                at += 1
            if text.startswith(")", at):
                return Shape(dtype="tuple", elements=tuple(elements)), at + 1
            element, at = _parse(text, at, whole)
            elements.append(element)
    match = _ARRAY.match(text, at)
    if not match:
        raise ValueError(f"shape {whole!r}: cannot read {text[at:]!r}.")
    dtype, dims, layout = match.groups()
    if dtype not in ELEMENT_BITS:
        raise ValueError(
            f"shape {whole!r} has element type {dtype!r}; known are"
            f" {' '.join(ELEMENT_BITS)}; add it to ELEMENT_BITS."
        )
    space = _SPACE.search(layout)
    sizes = tuple(int(d.strip(" <=")) for d in dims.split(",")) if dims.strip() else ()
    return (
        Shape(
            dtype=dtype,
            dims=sizes,
            space=int(space[1]) if space else 0,
            is_tiled="T(" in layout,
            layout=layout,
        ),
        match.end(),
    )
