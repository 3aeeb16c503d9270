"""What samples say between their sizes: a calibration read as curves.

The work of a sample is the time of one of its links less what its kernels cost
besides (`gap_s`), so that a chain of kernels costs the sum of work and gaps, as it was
measured. Everything here is of one device.
"""

import dataclasses
import functools
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from sharding.chips.calibration import Calibration, Sample

# A chain whose links take as long as their gaps leaves noise: never less than this
# share of the roofline.
_LEAST_RATIO = 0.05
_NEAR = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Seconds at some sizes, and in between.

    Linear between two sizes, which is exact wherever time is latency + size / rate.
    Below the least size the time stays, above the largest the rate does.

    Attributes:
      points: size and seconds, by rising size; at least one.

    Example:
      >>> curve = Curve(points=((10.0, 2.0), (20.0, 3.0)))
      >>> [curve.at(size) for size in (1, 10, 15, 20, 40)]
      [2.0, 2.0, 2.5, 3.0, 6.0]
    """

    points: tuple[tuple[float, float], ...]

    def at(self, size: float) -> float:
        """Returns the seconds at `size`."""
        most, last = self.points[-1]
        return last * size / most if size > most else interpolate(self.points, size)


def interpolate(points: tuple[tuple[float, float], ...], x: float) -> float:
    """Returns y at `x`, linear between points and constant outside of them."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def curve_of(points: Iterable[tuple[float, float]]) -> Curve | None:
    """Returns a curve; samples of one size are one point, their median."""
    by_size: dict[float, list[float]] = defaultdict(list)
    for size, seconds in points:
        by_size[size].append(seconds)
    if not by_size:
        return None
    medians = ((size, statistics.median(by_size[size])) for size in sorted(by_size))
    return Curve(points=tuple(medians))


@functools.lru_cache(maxsize=64)
def call_line(calibration: Calibration, devices: int) -> tuple[float, float]:
    """Returns what a call costs, and each kernel of its chain, in seconds.

    The least-squares line through calls of chains of different lengths. Zeros if there
    are none; nothing for the call if all are of one length.
    """
    found = calibration.select("kernel")
    if not found:
        return 0.0, 0.0
    near = min((s["devices"] for s in found), key=lambda d: abs(d - devices))
    points = [(s.links, s.call_s) for s in found if s["devices"] == near]
    if len({links for links, _ in points}) == 1:
        return 0.0, statistics.median(seconds / links for links, seconds in points)
    slope, start = statistics.linear_regression(*zip(*points, strict=True))
    return max(start, 0.0), max(slope, 0.0)


def link_s(calibration: Calibration, sample: Sample) -> float:
    """Returns the time of one link of a sample."""
    overhead_s, _ = call_line(calibration, int(sample.at.get("devices", 1)))
    return max(sample.call_s - overhead_s, 0.0) / sample.links


def gap_s(calibration: Calibration) -> float:
    """Returns what each kernel costs besides its work."""
    return call_line(calibration, 1)[1]


def work_s(calibration: Calibration, sample: Sample) -> float:
    """Returns the time of one link without the gaps of its kernels."""
    return max(link_s(calibration, sample) - sample.slots * gap_s(calibration), 0.0)


@functools.lru_cache(maxsize=256)
def curve(calibration: Calibration, name: str, size: str, **at: str) -> Curve | None:
    """Returns the work of a benchmark over one of its sizes; None if not measured."""
    found = calibration.select(name, **at)
    return curve_of((s[size], work_s(calibration, s)) for s in found)


@functools.lru_cache(maxsize=64)
def collective_curves(
    calibration: Calibration, kind: str, by: str = "xla"
) -> Mapping[int, Curve]:
    """Returns the time of a collective over its payload, by group size.

    Without `collective_gap_s`.

    Args:
      calibration: of the chip.
      kind: of the collective.
      by: what does it: "xla" as it chooses, or this project's kernel, "triton".
    """
    samples = calibration.select("collective", kind=kind, by=by)
    return _curves(calibration, samples, "group", "bytes")


def _curves(
    calibration: Calibration, samples: Iterable[Sample], each: str, size: str
) -> Mapping[int, Curve]:
    """Returns the work of samples over one of their sizes, a curve for each other."""
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for s in samples:
        found[s[each]].append((s[size], work_s(calibration, s)))
    return {n: c for n, points in found.items() if (c := curve_of(points))}


@functools.lru_cache(maxsize=64)
def apart_s(calibration: Calibration) -> float:
    """Returns how much longer a collective takes for several kernels behind it.

    Less those kernels: they are started as one graph, and a single one is not. The
    median over all collectives measured both ways. Negative where the host, which has
    to start every link of the bare chain, is what that waits for.
    """
    near = {_pair(s): s for s in calibration.select("collective")}
    found = [
        work_s(calibration, s) - work_s(calibration, near[_pair(s)])
        for s in calibration.select("apart")
        if _pair(s) in near
    ]
    return statistics.median(found) if found else 0.0


def _pair(sample: Sample) -> tuple[object, ...]:
    return tuple(sample.at[name] for name in ("kind", "group", "bytes", "by"))


Roofline = Callable[[int, int, int], float]


@functools.lru_cache(maxsize=64)
def product_ratios(
    calibration: Calibration, dtype: str, weights: str, roofline_s: Roofline
) -> Mapping[tuple[int, int], tuple[tuple[float, float], ...]]:
    """Returns how many times longer than its roofline each [k, n] took, by log m.

    Args:
      calibration: of the chip.
      dtype: of the products.
      weights: dtype in which [k, n] is stored.
      roofline_s: of m, n and k; hashable.
    """
    samples = calibration.select("matmul", dtype=dtype, weights=weights)
    return _ratios(calibration, samples, roofline_s)


def _ratios(
    calibration: Calibration, samples: Iterable[Sample], roofline_s: Roofline
) -> Mapping[tuple[int, int], tuple[tuple[float, float], ...]]:
    found: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for s in samples:
        m, n, k = s["m"], s["n"], s["k"]
        ratio = work_s(calibration, s) / roofline_s(m, n, k)
        found[k, n].append((math.log(m), max(ratio, _LEAST_RATIO)))
    return {shape: tuple(sorted(points)) for shape, points in found.items()}


@functools.lru_cache(maxsize=64)
def split_ratios(
    calibration: Calibration, roofline_s: Roofline
) -> Mapping[tuple[int, int], tuple[tuple[float, float], ...]]:
    """Returns `product_ratios` of products in parts."""
    return _ratios(calibration, calibration.select("split"), roofline_s)


@functools.lru_cache(maxsize=64)
def added(calibration: Calibration) -> Mapping[int, Curve]:
    """Returns the time of adding parts up over how many there are, by rows."""
    return _curves(calibration, calibration.select("add"), "rows", "parts")


@functools.lru_cache(maxsize=64)
def stored_ratios(
    calibration: Calibration,
    dtype: str,
    weights: str,
    roofline_s: Roofline,
    wide_s: Roofline,
) -> Mapping[tuple[int, int], tuple[tuple[float, float], ...]]:
    """Returns `product_ratios` of weights in a narrower dtype than the product's.

    With more rows than were measured of them, widening them no longer shows: from
    there on the ratios are those of the same [k, n] in the dtype of the product.

    Args:
      calibration: of the chip.
      dtype: of the products.
      weights: dtype in which [k, n] is stored.
      roofline_s: of such products.
      wide_s: of products whose [k, n] is stored in `dtype`.
    """
    found = product_ratios(calibration, dtype, weights, roofline_s)
    wide = product_ratios(calibration, dtype, dtype, wide_s)
    return {
        shape: (*points, *(p for p in wide.get(shape, ()) if p[0] > points[-1][0]))
        for shape, points in found.items()
    }


def near_ratio(
    shapes: Mapping[tuple[int, int], tuple[tuple[float, float], ...]],
    m: int,
    n: int,
    k: int,
) -> float:
    """Returns the ratio at [m, k] @ [k, n] from those of shapes near it.

    Of each shape the one at m; of several shapes their geometric mean, weighted by the
    inverse fourth power of the distance in the logarithms of k, n and, outside of the
    m that were measured, m (Shepard 1968). So a shape that was measured is itself.
    """
    at = math.log(m)
    total = weighted = 0.0
    for (k0, n0), points in shapes.items():
        beyond = max(points[0][0] - at, at - points[-1][0], 0.0)
        distance = math.log(k / k0) ** 2 + math.log(n / n0) ** 2 + beyond**2
        weight = 1 / max(distance, _NEAR) ** 2
        total += weight
        weighted += weight * math.log(interpolate(points, at))
    return math.exp(weighted / total)
