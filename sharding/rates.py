"""How long one kernel or one collective takes on one device of a chip.

    matmul_s, scores_s, attention_s, memory_s, vector_s    the work of one kernel
    own_kernel_s                                           of one of this project's
    kernel_gap_s, collective_gap_s, call_overhead_s        what each one costs besides
    collective_s                                           one collective

Where a chip is not calibrated, work takes the time of its roofline at the published
peaks (Williams et al. 2009), a collective the time of its links and its latency, and
gaps are zero. Where it is, each is asked of the samples of that benchmark:

- A time is what one link of the benchmark took, less the gaps of its kernels: a chain
  of kernels costs the sum of their times and gaps, as it was measured.
- Between two sizes times are interpolated linearly, which is exact wherever time is
  latency + size / rate. Below the least size a time stays the same, above the largest
  the rate does.
- Of products, and of groups of devices that were not measured, what is interpolated is
  how many times longer than the roofline or the links they took, over the logarithms
  of the sizes. So a curve bends where the roofline does.
- What was not measured at all is priced by the published figures.
"""

import dataclasses
import math
from collections.abc import Sequence

from sharding import curves
from sharding.chips import Chip, short_dtype
from sharding.chips.calibration import Sample
from sharding.hlo.records import Kernel
from sharding.links import links_s

_ITEM_BYTES = {"bf16": 2, "fp32": 4, "fp8": 1, "int8": 1, "int4": 0.5}
_OUTPUT_BYTES = 2  # at least, of an element of a product
# Which implementations are one kernel, the first that was measured is asked.
_FUSED = {"prefill": ("cudnn", "xla"), "decode": ("cudnn",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Least seconds of [m, k] @ [k, n] with every array read or written once.

    Attributes:
      flops_per_s, bytes_per_s: peaks.
      item_bytes: of an element of [m, k].
      weight_bytes: of an element of [k, n].
    """

    flops_per_s: float
    bytes_per_s: float
    item_bytes: float
    weight_bytes: float

    def __call__(self, m: int, n: int, k: int, batch: int = 1) -> float:
        out = max(self.item_bytes, _OUTPUT_BYTES)
        moved = m * k * self.item_bytes + k * n * self.weight_bytes + m * n * out
        flops = 2 * m * n * k
        return batch * max(flops / self.flops_per_s, moved / self.bytes_per_s)


def matmul_s(
    chip: Chip, m: int, n: int, k: int, dtype: str, *, weight_bytes: float | None = None
) -> float:
    """Returns the time of [m, k] @ [k, n], where [k, n] is read from memory.

        T = max(2 m n k / flops_per_s, bytes / hbm_bytes_per_s)

    times how much longer it took at the measured shapes near it: of each [k, n]
    between the nearest m; of several [k, n] weighted by their distance
    (`curves.near_ratio`). Weights stored narrower, with more rows than were measured
    so, take as much longer as wide ones (`curves.stored_ratios`).

    Args:
      chip: of one device, from `Chip.per_device`.
      m: rows on that device.
      n: columns.
      k: what is summed over.
      dtype: of the product, e.g. "bf16" or "float32".
      weight_bytes: of all [k, n] where it is stored in another dtype.

    Raises:
      ValueError: the chip has no rate for `dtype`.
    """
    item = _item_bytes(chip, dtype)
    roofline = _roofline(chip, dtype, weight_bytes / (k * n) if weight_bytes else item)
    ideal_s = roofline(m, n, k)
    if chip.calibrated is None:
        return ideal_s
    dtype = short_dtype(dtype)
    stored = {
        str(s.at["weights"]) for s in chip.calibrated.select("matmul", dtype=dtype)
    }
    if not stored:
        return ideal_s
    # Weights in 8 bits are priced by those measured in 8 bits, else by any others.
    near = min(
        sorted(stored), key=lambda w: abs(_item_bytes(chip, w) - roofline.weight_bytes)
    )
    measured = _roofline(chip, dtype, _item_bytes(chip, near))
    wide = _roofline(chip, dtype, item)
    shapes = curves.stored_ratios(chip.calibrated, dtype, near, measured, wide)
    return ideal_s * curves.near_ratio(shapes, m, n, k)


def scores_s(
    chip: Chip, batch: int, m: int, n: int, k: int, dtype: str = "bf16"
) -> float:
    """Returns the time of `batch` products [m, k] @ [k, n], each with its own [k, n].

    Attention over a cache is made of them where it is not one kernel. The roofline is
    that of `matmul_s`; what was measured is interpolated over the bytes of all arrays,
    and never faster than the arithmetic.
    """
    item = _item_bytes(chip, dtype)
    ideal_s = _roofline(chip, dtype, item)(m, n, k, batch)
    if chip.calibrated is None:
        return ideal_s
    moved = batch * ((m * k + k * n) * item + m * n * max(item, _OUTPUT_BYTES))
    arithmetic_s = 2 * batch * m * n * k / chip.matmul_flops_per_s(dtype)
    measured = curves.curve(chip.calibrated, "scores", "bytes")
    streamed_s = measured.at(moved) if measured else memory_s(chip, moved, cold=True)
    return max(arithmetic_s, streamed_s)


def memory_s(chip: Chip, hbm_bytes: float, *, cold: bool = False) -> float:
    """Returns the time of a kernel that streams bytes: a fusion, copy or reduction.

    Args:
      chip: of one device.
      hbm_bytes: read and written.
      cold: most of them are weights or cache, which no kernel has just written; else
        arrays that fit there are still in the chip's last cache.
    """
    if chip.calibrated is not None and hbm_bytes:
        for name in ("read", "copy") if cold else ("copy", "read"):
            if measured := curves.curve(chip.calibrated, name, "bytes"):
                return measured.at(hbm_bytes)
    return hbm_bytes / chip.hbm_bytes_per_s


def vector_s(chip: Chip, flops: float) -> float:
    """Returns the time of arithmetic outside the matrix units.

    At the matrix rate of bf16 where a chip's vector rate is unknown.
    """
    measured = chip.calibrated and curves.curve(chip.calibrated, "vector", "flops")
    if measured:
        least, seconds = measured.points[0]
        return measured.at(flops) if flops > least else seconds * flops / least
    return flops / (chip.vector_flops_per_s or chip.matmul_flops_per_s("bf16"))


def attention_s(chip: Chip, flops: float, hbm_bytes: float, *, phase: str) -> float:
    """Returns the time of one fused attention kernel.

        T = max(flops / flops_per_s, hbm_bytes / hbm_bytes_per_s)

    or, measured, that of the kernels of the same phase, interpolated over this time.

    Args:
      chip: of one device.
      flops: of both products, of the tiles that are visited.
      hbm_bytes: read and written.
      phase: "prefill" or "decode".
    """
    if chip.calibrated is not None:
        for name in _FUSED[phase]:
            at = {"phase": phase, "implementation": name}
            if samples := chip.calibrated.select("attention", **at):
                return _attended_s(chip, flops, hbm_bytes, samples)
    return _attention_roofline_s(chip, flops, hbm_bytes)


def own_kernel_s(
    chip: Chip, kernel: Kernel, flops: float, hbm_bytes: float
) -> float | None:
    """Returns the time of a kernel of this project on one device, None if unmeasured.

    A product in parts takes as many times longer than its roofline as those near it
    (`matmul_s`). What adds parts up is interpolated over their number, at the nearest
    number of rows that was measured. Attention of one token is interpolated over its
    roofline; where it needs a second kernel to join what the first one has found, the
    first one's time is that of both.

    Args:
      chip: of one device.
      kernel: which, and on what.
      flops: in matrix products.
      hbm_bytes: read and written.
    """
    if chip.calibrated is None:
        return None
    if kernel.name == "split_product":
        m, k, n = kernel.sizes
        roofline = _roofline(chip, "bf16", _ITEM_BYTES["bf16"])
        shapes = curves.split_ratios(chip.calibrated, roofline)
        if not shapes:
            return None
        return roofline(m, n, k) * curves.near_ratio(shapes, m, n, k)
    if kernel.name == "add":
        rows, parts = kernel.sizes
        added = curves.added(chip.calibrated)
        if not added or rows > max(added):
            return None
        near = min(added, key=lambda n: (abs(math.log(n / rows)), n))
        return added[near].at(parts)
    samples = chip.calibrated.select("token")
    if not samples:
        return None
    if kernel.name == "join_token_attention":
        return 0.0
    return _attended_s(chip, flops, hbm_bytes, samples)


def _attended_s(
    chip: Chip, flops: float, hbm_bytes: float, samples: Sequence[Sample]
) -> float:
    """Returns the time of a fused attention from samples, at least one."""
    assert chip.calibrated is not None
    measured = curves.curve_of(
        (
            _attention_roofline_s(chip, s["flops"], s["bytes"]),
            curves.work_s(chip.calibrated, s),
        )
        for s in samples
    )
    assert measured is not None
    return measured.at(_attention_roofline_s(chip, flops, hbm_bytes))


def _attention_roofline_s(chip: Chip, flops: float, hbm_bytes: float) -> float:
    arithmetic_s = flops / chip.matmul_flops_per_s("bf16")
    return max(arithmetic_s, hbm_bytes / chip.hbm_bytes_per_s)


def collective_s(
    chip: Chip,
    kind: str,
    group_size: int,
    payload_bytes: float,
    wire_bytes: float,
    *,
    in_kernel: bool = False,
) -> float:
    """Returns the time of one collective on one device, without `collective_gap_s`.

    Measured, it is interpolated over the payload. A group that was not measured takes
    as many times longer than `links_s` as the nearest one that was. Where collectives
    take less for several kernels between them, which hide what starting one costs the
    host, it is that much less.

    Args:
      chip: of one device, from `Chip.per_device`.
      kind: one of `sharding.links.KINDS`.
      group_size: devices that take part together.
      payload_bytes: what it is about, as the ledger counts it.
      wire_bytes: what one device sends.
      in_kernel: this project's kernel does it (`jaxllm.norm_kernel`).

    Raises:
      ValueError: the kind of collective is unknown.
    """
    ideal_s = links_s(chip, kind, group_size, wire_bytes)
    if chip.calibrated is None or group_size < 2:
        return ideal_s
    measured = curves.collective_curves(chip.calibrated, kind)
    if in_kernel:
        own = curves.collective_curves(chip.calibrated, kind, "triton").get(group_size)
        if own:
            return own.at(payload_bytes)
    if not measured:
        return ideal_s
    near = min(measured, key=lambda n: (abs(math.log(n / group_size)), n))
    hidden_s = max(-curves.apart_s(chip.calibrated), 0.0)
    near_s = max(measured[near].at(payload_bytes) - hidden_s, 0.0)
    if near == group_size:
        return near_s
    # All but permutes and broadcasts send (n - 1) / n of the payload in each pass.
    share = (near - 1) / near / ((group_size - 1) / group_size)
    near_wire_bytes = wire_bytes * (1 if kind in ("permute", "broadcast") else share)
    return near_s * ideal_s / links_s(chip, kind, near, near_wire_bytes)


def kernel_gap_s(chip: Chip) -> float:
    """Returns what a kernel costs besides its work, inside a program that runs.

    Each kernel of a chain in which every one waits for the one before; measured as the
    time of a kernel that does next to nothing. Zero where nothing was measured.
    """
    return 0.0 if chip.calibrated is None else curves.gap_s(chip.calibrated)


def collective_gap_s(chip: Chip) -> float:
    """Returns what a collective between many kernels costs besides itself.

    How much longer collectives take for several kernels between each two than for one,
    less these kernels: XLA:GPU starts several as one graph, which a collective ends.
    Zero where they take no longer, and where nothing was measured: the published
    latency has it.
    """
    return 0.0 if chip.calibrated is None else max(curves.apart_s(chip.calibrated), 0.0)


def call_overhead_s(chip: Chip, *, devices: int = 1) -> float:
    """Returns what a call adds to what its program does, the host running ahead.

    Measured as what chains of 0 kernels would take, by a line through longer ones.

    Args:
      chip: of one device.
      devices: that the program runs on.
    """
    if chip.calibrated is None or not chip.calibrated.select("kernel"):
        return chip.call_overhead_s
    return curves.call_line(chip.calibrated, devices)[0]


def dispatch_s(chip: Chip, *, arguments: int = 1, devices: int = 1) -> float:
    """Returns the least time between two calls: the host can start no more of them.

    Zero where nothing was measured.

    Args:
      chip: of one device.
      arguments: arrays that go in.
      devices: that the program runs on.
    """
    found = chip.calibrated.select("call") if chip.calibrated is not None else ()
    if not found:
        return 0.0
    near = min((s["devices"] for s in found), key=lambda d: abs(d - devices))
    measured = curves.curve_of(
        (s["arguments"], s.call_s) for s in found if s["devices"] == near
    )
    assert measured is not None
    return measured.at(arguments)


def _item_bytes(chip: Chip, dtype: str) -> float:
    """Returns the bytes of an element of a dtype that products are made of.

    Raises:
      ValueError: the chip has no rate for `dtype`.
    """
    short = short_dtype(dtype)
    if short not in _ITEM_BYTES:
        chip.matmul_flops_per_s(dtype)
    return _ITEM_BYTES[short]


def _roofline(chip: Chip, dtype: str, weight_bytes: float) -> Roofline:
    return Roofline(
        flops_per_s=chip.matmul_flops_per_s(dtype),
        bytes_per_s=chip.hbm_bytes_per_s,
        item_bytes=_item_bytes(chip, dtype),
        weight_bytes=weight_bytes,
    )
