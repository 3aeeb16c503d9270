"""Convolutions: how many products a window really makes.

TPU writes matrix products as convolutions with padded or dilated windows, so
only window positions that fall on an element of the input count; padding and
the holes between dilated elements do not.
"""

import dataclasses
import functools
import math
import re

from sharding.hlo.reader import Instruction

_MAX_LOOP = 1 << 22  # positions looked at one by one; seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowDim:
    """One dimension of `window={...}`."""

    size: int
    stride: int = 1
    pad_low: int = 0
    pad_high: int = 0
    lhs_dilate: int = 1
    rhs_dilate: int = 1

    def results(self, in_size: int) -> int:
        """Returns how many positions the window takes over `in_size` elements."""
        dilated = (in_size - 1) * self.lhs_dilate + 1 if in_size else 0
        room = dilated + self.pad_low + self.pad_high
        reach = (self.size - 1) * self.rhs_dilate + 1
        return (room - reach) // self.stride + 1 if room >= reach else 0


def parse_window(text: str) -> tuple[WindowDim, ...]:
    """Returns the dimensions of `{size=3x2 stride=2x1 pad=1_1x0_0 ...}`."""
    fields = dict(re.findall(r"(\w+)=([\w\-]+)", text))

    def numbers(key: str, default: str, end: int = 0) -> list[int]:
        parts = fields[key].split("x") if key in fields else [default] * count
        return [int(p.split("_")[end]) for p in parts]

    count = len(fields["size"].split("x")) if "size" in fields else 0
    columns = zip(
        numbers("size", "1"),
        numbers("stride", "1"),
        numbers("pad", "0"),
        numbers("pad", "0", -1),
        numbers("lhs_dilate", "1"),
        numbers("rhs_dilate", "1"),
        strict=True,
    )
    return tuple(
        WindowDim(
            size=s, stride=t, pad_low=low, pad_high=high, lhs_dilate=ld, rhs_dilate=rd
        )
        for s, t, low, high, ld, rd in columns
    )


@functools.lru_cache(maxsize=4096)
def valid_positions(dim: WindowDim, in_size: int, out_size: int) -> int:
    """Returns the (output, window) index pairs that meet an input element.

    Output o and window k meet input position o*stride + k*rhs_dilate - pad_low of
    the dilated input, where elements stand at multiples of lhs_dilate.
    """
    last = (in_size - 1) * dim.lhs_dilate
    if in_size < 1:
        return 0
    if min(dim.size, out_size) > _MAX_LOOP or min(dim.stride, dim.rhs_dilate) < 1:
        raise ValueError(f"no window slides like {dim} over {in_size} to {out_size}")
    # Loop over the shorter of the two, count the other in closed form.
    if dim.size <= out_size:
        few, few_step, many, many_step = dim.size, dim.rhs_dilate, out_size, dim.stride
    else:
        few, few_step, many, many_step = out_size, dim.stride, dim.size, dim.rhs_dilate
    return sum(
        _count(i * few_step - dim.pad_low, many_step, many, last, dim.lhs_dilate)
        for i in range(few)
    )


def reduced_positions(dim: WindowDim, in_size: int, out_size: int) -> tuple[int, int]:
    """Returns the input elements that a sliding reduction meets, and its results.

    TPU writes "reduce, then broadcast" as a window so wide and padded that every
    position sees the whole input: that is one reduction, not one for each output.
    """
    first_reach = (dim.size - 1) * dim.rhs_dilate - dim.pad_low
    last_start = (out_size - 1) * dim.stride - dim.pad_low
    whole = first_reach >= (in_size - 1) * dim.lhs_dilate and last_start <= 0
    if whole and dim.rhs_dilate == 1:
        return in_size, 1
    return valid_positions(dim, in_size, out_size), out_size


def _count(offset: int, step: int, number: int, last: int, multiple: int) -> int:
    """Returns for how many j < number offset + j*step is a multiple in [0, last]."""
    low = max(0, -(offset // step)) if offset < 0 else 0
    high = min(number - 1, (last - offset) // step)
    common = math.gcd(step, multiple)
    if high < low or offset % common:
        return 0
    period = multiple // common
    if period == 1:
        return high - low + 1
    first = -(offset // common) * pow(step // common, -1, period) % period
    first += -(-(low - first) // period) * period
    return 0 if first > high else (high - first) // period + 1


def convolution_products(
    instruction: Instruction,
    lhs: tuple[int, ...],
    rhs: tuple[int, ...],
    out: tuple[int, ...],
) -> int:
    """Returns the multiply-adds of a convolution with these sizes.

    Raises:
      ValueError: `dim_labels` or `window` cannot be read or do not fit the sizes.
    """
    labels = re.fullmatch(
        r"([\w?]+)_([\w?]+)->([\w?]+)", instruction.require("dim_labels")
    )
    window = parse_window(instruction.attr("window") or "{}")
    if not labels or [len(g) for g in labels.groups()] != [
        len(lhs),
        len(rhs),
        len(out),
    ]:
        raise ValueError(
            f"dim_labels do not fit the shapes in instruction: {instruction}"
        )
    left, kernel, result = labels.groups()
    batches = int(instruction.attr("batch_group_count") or 1)
    features = int(instruction.attr("feature_group_count") or 1)
    at = lambda sizes, names, label: sizes[names.index(label)]
    fits = [
        len(window) == len(lhs) - 2,
        at(lhs, left, "b") == at(out, result, "b") * batches,
        at(lhs, left, "f") == at(rhs, kernel, "i") * features,
        at(rhs, kernel, "o") == at(out, result, "f"),
    ]
    products = at(out, result, "b") * at(rhs, kernel, "i") * at(out, result, "f")
    for axis, dim in enumerate(window):
        label = str(axis)
        in_size, out_size = at(lhs, left, label), at(out, result, label)
        fits.append(dim.size == at(rhs, kernel, label))
        fits.append(dim.results(in_size) == out_size)
        products *= valid_positions(dim, in_size, out_size)
    if not all(fits):
        raise ValueError(f"sizes do not fit in instruction: {instruction}")
    return products
