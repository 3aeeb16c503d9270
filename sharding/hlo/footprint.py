"""Bytes that an array takes where it lies, tiles and padding included."""

import functools
import math
import re

from sharding.hlo.shapes import ELEMENT_BITS, Shape

_MINOR_TO_MAJOR = re.compile(r"\{([\d,]*)")
_TILE = re.compile(r"T\(([\d,]+)\)")
_ELEMENT = re.compile(r"E\((\d+)\)")


@functools.lru_cache(maxsize=65536)
def padded_bytes(leaf: Shape) -> int:
    """Returns the bytes that an array takes in memory, as its layout says.

    A tile T(8,128) rounds the two minor dimensions up to multiples of 8 and 128;
    tiles after the first only reorder inside it. Elements narrower than a byte take
    a whole one unless the layout packs them, E(4).

    Example:
      >>> from sharding.hlo.shapes import parse_shape
      >>> padded_bytes(parse_shape("bf16[16,100]{1,0:T(8,128)(2,1)}"))
      4096
      >>> padded_bytes(parse_shape("bf16[16,100]{0,1:T(8,128)(2,1)}"))
      26624
      >>> padded_bytes(parse_shape("s4[10]{0:E(4)}"))
      5
    """
    bits = ELEMENT_BITS.get(leaf.dtype, 0)
    if not bits:
        return 0
    element = _ELEMENT.search(leaf.layout)
    bits = int(element[1]) if element else max(bits, 8)
    order = _MINOR_TO_MAJOR.match(leaf.layout)
    tile = _TILE.search(leaf.layout)
    size = leaf.size
    if order and tile:
        minor = [int(d) for d in order[1].split(",") if d]
        sides = [int(t) for t in tile[1].split(",")]
        dims = [leaf.dims[d] for d in minor if d < len(leaf.dims)]
        dims += [1] * (len(sides) - len(dims))  # a scalar takes a whole tile
        # Tiles are written major to minor, the order of dimensions the other way.
        tiled = zip(dims, [*reversed(sides), *[1] * len(dims)], strict=False)
        size = math.prod(-(-d // t) * t for d, t in tiled)
    return (size * bits + 7) // 8


def minor_to_major(leaf: Shape) -> str:
    """Returns the order in which an array's dimensions lie, "1,0"; "" if not said."""
    found = _MINOR_TO_MAJOR.match(leaf.layout)
    return found[1] if found else ""


def spell_shape(shape: Shape) -> str:
    """Returns "bf16[16,640]", or "(bf16[2], s32[])", without layouts."""
    if shape.dtype == "tuple":
        return f"({', '.join(map(spell_shape, shape.elements))})"
    return f"{shape.dtype}[{','.join(map(str, shape.dims))}]"
