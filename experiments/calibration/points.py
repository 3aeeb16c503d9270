"""What a calibration measures, in the order of what it is worth.

A plan is a list of `Point`; where time runs out, its last points are the ones missing.
The sizes for accelerators are those of dense models between 8B and 70B parameters on
1 to 8 devices, so that what is asked of a calibration lies between what it holds; those
for CPUs are small.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from jaxllm.product_kernel import parts_of
from sharding.attention import KERNELS
from sharding.chips import Chip
from sharding.chips.calibration import key_of

Size = Literal["full", "small", "tiny"]
SIZES: Mapping[str, Size] = {"full": "full", "small": "small", "tiny": "tiny"}

# A call works at least this long, so that what it costs to make it is little of that,
_CALL_S = 1e-3
_LINK_S = 4e-6  # beside its work; only to choose how many links make a call
# and reads this much before it reads the same again: several times the last cache of
# any chip here (50 MB on an H100).
_COLD_BYTES = 256 << 20
WIDTH = 4096  # numbers of a token between layers
_MOST_CACHES = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One micro-benchmark to make.

    Attributes:
      name: as `sharding.chips.calibration.NAMES`.
      at: its sizes, as there.
      links: of one call.
      profile: ask a profiler too, which takes a second.
    """

    name: str
    at: Mapping[str, int | str]
    links: int
    profile: bool = False

    @property
    def key(self) -> str:
        return key_of(self.name, {**self.at, "links": self.links})

    def __str__(self) -> str:
        return key_of(self.name, self.at)


def plan(chip: Chip, num_devices: int, size: Size) -> list[Point]:
    """Returns the points for devices of one kind.

    Args:
      chip: of one device; its peaks only say how long a chain must be.
      num_devices: that take part.
      size: "full" for accelerators, "small" for CPUs, "tiny" for tests.
    """
    parts: Sequence[Iterator[Point]] = (
        _kernels(num_devices, size),
        _calls(num_devices, size),
        _products(chip, _WEIGHTS[size], _ROWS[size], size),
        _streams(chip, size),
        _collectives(chip, num_devices, size),
        _own_kernels(chip, size),
        _attention(chip, size),
        _vector(chip, size),
        _products(chip, _MORE_WEIGHTS[size], _MORE_ROWS[size], size),
        _narrow(chip, size),
    )
    found = {point.key: point for part in parts for point in part}
    return list(found.values())


# [k, n] of Llama-3.1-8B on one device and on each of two: queries, keys and values
# together, attention's output, gate and up together, down, head.
_8B = (
    (4096, 28672), (14336, 4096), (4096, 6144), (4096, 4096), (4096, 128256),
    (4096, 14336), (7168, 4096), (4096, 3072), (2048, 4096), (4096, 64128),
)  # fmt: skip
# Of Llama-3.1-70B on each of two, four and eight; and squares.
_70B = (
    (8192, 28672), (14336, 8192), (8192, 5120), (4096, 8192), (8192, 64128),
    (8192, 14336), (7168, 8192), (8192, 2560), (2048, 8192),
    (8192, 7168), (3584, 8192), (8192, 1280), (1024, 8192),
)  # fmt: skip
_SQUARES = ((1024, 1024), (2048, 2048), (8192, 8192))
_WEIGHTS = {"full": _8B, "small": ((512, 512), (512, 1536)), "tiny": ((32, 48),)}
_ROWS = {"full": (1, 64, 16, 256, 1024), "small": (1, 16, 64, 256), "tiny": (1, 4)}
_MORE_WEIGHTS = {
    "full": (*_70B, *_SQUARES),
    "small": ((1536, 512), (1024, 1024)),
    "tiny": (),
}
_MORE_ROWS = {"full": (1, 64, 1024), "small": (1, 16, 64), "tiny": ()}
# Of a prefill's micro-batch of 16 prompts, and of a pipeline's of four.
_PROMPT_ROWS = {"full": (16384, 4096), "small": (512,), "tiny": (8,)}
# Of the products that decode makes in parts: queries, keys and values together,
# attention's output and down, of 8B on one device and on each of two, and of 70B.
_IN_PARTS = (
    (4096, 6144), (4096, 4096), (14336, 4096),
    (4096, 3072), (2048, 4096), (7168, 4096),
)  # fmt: skip
_MORE_IN_PARTS = (
    (8192, 10240), (8192, 8192), (28672, 8192),
    (8192, 5120), (4096, 8192), (14336, 8192),
)  # fmt: skip
_TOKENS = (1, 16, 64)


def _links(chip: Chip, work_s: float, distinct_bytes: float = 0) -> int:
    """Returns how many links make a call long, and its operands more than a cache."""
    by_time = _CALL_S / (work_s + _LINK_S)
    by_bytes = _COLD_BYTES / distinct_bytes if distinct_bytes else 0
    few, most = (2, 16) if chip.kind == "cpu" else (4, 96)
    return min(max(math.ceil(max(by_time, by_bytes)), few), most)


def _kernels(num_devices: int, size: Size) -> Iterator[Point]:
    lengths = {"full": (128, 512), "small": (32, 128), "tiny": (2, 6)}[size]
    for devices in sorted({1, num_devices}):
        for links in lengths:
            profile = size == "full" and links == lengths[0]
            yield Point(
                name="kernel", at={"devices": devices}, links=links, profile=profile
            )


def _calls(num_devices: int, size: Size) -> Iterator[Point]:
    numbers = {"full": (1, 64, 512), "small": (1, 64), "tiny": (1, 3)}[size]
    for devices in sorted({1, num_devices}):
        for arguments in numbers:
            at = {"devices": devices, "arguments": arguments}
            yield Point(name="call", at=at, links=1)


def product(
    chip: Chip, m: int, k: int, n: int, dtype: str, weights: str | None = None
) -> Point:
    """Returns the point of [m, k] @ [k, n], `weights` stored in another dtype."""
    stored = BYTES[weights or dtype] * k * n
    moved = BYTES[dtype] * m * (k + n) + stored
    work_s = max(
        2 * m * n * k / chip.matmul_flops_per_s(dtype), moved / chip.hbm_bytes_per_s
    )
    at = {"dtype": dtype, "weights": weights or dtype, "m": m, "k": k, "n": n}
    return Point(name="matmul", at=at, links=_links(chip, work_s, stored))


BYTES = {"fp32": 4, "bf16": 2, "fp8": 1, "int8": 1, "int4": 0.5}


def _dtype(size: Size) -> str:
    return "bf16" if size == "full" else "fp32"


def _products(
    chip: Chip, shapes: Sequence[tuple[int, int]], rows: Sequence[int], size: Size
) -> Iterator[Point]:
    """Yields all rows of a shape together: they share its weights."""
    for k, n in shapes:
        for m in rows:
            yield product(chip, m, k, n, _dtype(size))
        if n < 10 * k and shapes is _WEIGHTS[size]:
            for m in _PROMPT_ROWS[size]:
                yield product(chip, m, k, n, _dtype(size))


def _narrow(chip: Chip, size: Size) -> Iterator[Point]:
    """Yields products in 8 bits where there are such, and bf16 with narrow weights."""
    if size != "full":
        return
    shapes = ((4096, 28672), (14336, 4096), (4096, 6144))
    for weights in ("int8", "fp8", "int4"):
        for k, n in shapes:
            for m in (1, 64):
                yield product(chip, m, k, n, "bf16", weights)
    for dtype in ("fp8", "int8"):
        if dtype in chip.flops_per_s:
            for k, n in shapes[:2]:
                for m in (1, 64, 1024):
                    yield product(chip, m, k, n, dtype)
    for m in (16, 1024):
        yield product(chip, m, 4096, 14336, "fp32")


def _streams(chip: Chip, size: Size) -> Iterator[Point]:
    powers = {"full": (12, 16, 19, 21, 23, 25, 27, 30), "small": (12, 16, 20, 23)}
    for power in powers.get(size, (10, 12)):
        work_s = (1 << power) / chip.hbm_bytes_per_s
        yield Point(name="copy", at={"bytes": 1 << power}, links=_links(chip, work_s))
    powers = {"full": (16, 19, 21, 23, 25, 27, 29), "small": (16, 20, 23)}
    for power in powers.get(size, (10, 12)):
        work_s = (1 << power) / chip.hbm_bytes_per_s
        links = _links(chip, work_s, 1 << power)
        yield Point(name="read", at={"bytes": 1 << power}, links=links)


def _vector(chip: Chip, size: Size) -> Iterator[Point]:
    rate = chip.vector_flops_per_s or chip.matmul_flops_per_s("fp32")
    for power in {"full": (28, 32), "small": (20, 24)}.get(size, (14,)):
        links = min(_links(chip, (1 << power) / rate), 4)
        yield Point(name="vector", at={"flops": 1 << power}, links=links)


def wire(kind: str, group: int, payload: int) -> int:
    """Returns what one device sends, as the ledger counts it."""
    if kind == "permute":
        return payload
    return (2 if kind == "all-reduce" else 1) * payload * (group - 1) // group


_KINDS = ("all-reduce", "permute", "all-gather", "reduce-scatter")


def _collectives(chip: Chip, num_devices: int, size: Size) -> Iterator[Point]:
    """Yields groups of all devices first, then of half of them; all-reduces first.

    XLA:GPU reduces up to 256 KB with one kernel of its own, up to 2 MB with another,
    and leaves the rest to NCCL: each is measured at its ends. So is the kernel that
    decode programs of this project may reduce with.
    """
    groups = [g for g in (16, 8, 4, 2) if num_devices % g == 0]
    all_reduce = {"full": (13, 16, 18, 19, 21, 22, 25, 28), "small": (12, 16, 20)}
    others = {"full": (13, 16, 19, 22, 25, 28), "small": (12, 16, 20)}
    for group, kind in itertools.product(groups, _KINDS):
        powers = (all_reduce if kind == "all-reduce" else others).get(size, (10, 12))
        for power in powers:
            yield _collective(chip, "collective", kind, group, power, num_devices)
        for power in powers[:5] if kind == "all-reduce" else powers[:1]:
            yield _collective(chip, "apart", kind, group, power, num_devices)
        if kind == "all-reduce" and chip.vendor == "NVIDIA":
            # To more than one peer it sends too much of more.
            own = (13, 16, 18, 19, 20, 21, *((23, 25, 27) if group == 2 else ()))
            for by, powers in (("triton", own), ("nccl", (13, 16, 18, 19, 21))):
                for power in powers:
                    yield _collective(
                        chip, "collective", kind, group, power, num_devices, by=by
                    )


def _collective(
    chip: Chip,
    name: str,
    kind: str,
    group: int,
    power: int,
    devices: int,
    by: str = "xla",
) -> Point:
    payload = 1 << power
    sent = wire(kind, group, payload)
    work_s = chip.collective_latency_s + sent / (chip.links * chip.link_bytes_per_s)
    return Point(
        name=name,
        at={
            "kind": kind, "group": group, "bytes": payload, "wire": sent, "by": by,
            "devices": devices,
        },
        links=_links(chip, work_s),
        profile=power == 13,
    )  # fmt: skip


def _attention(chip: Chip, size: Size) -> Iterator[Point]:
    """Yields prompts and single tokens, by each implementation there is."""
    if size == "full":
        prompts = ((1, 1024), (4, 1024), (16, 1024), (1, 4096), (2, 8192))
        tokens = ((1, 1152), (16, 1152), (64, 1152), (256, 1152), (16, 4096))
        heads, width = ((32, 8), (16, 4)), 128
    else:
        prompts, tokens = ((1, 32),), ((2, 32),)
        heads, width = ((4, 2),), 8
    on_gpu = size == "full" and chip.vendor == "NVIDIA"
    by_prompts, by_tokens = ("cudnn", "cudnn") if on_gpu else ("xla", "einsum")
    for n, k in heads:
        for b, s in tokens if on_gpu else ():
            yield _token(chip, b, s, n, k, width)
        for b, t in prompts:
            yield _attend(chip, "prefill", by_prompts, (b, t, t, n, k, width))
        for b, s in tokens:
            yield _attend(chip, "decode", by_tokens, (b, 1, s, n, k, width))
    for b, s in tokens if on_gpu else ():
        batch, m, k, n = b * 8, 4, 128, s
        moved = batch * (2 * m * k + 2 * k * n + 2 * m * n)
        links = _links(chip, moved / chip.hbm_bytes_per_s, 2 * batch * k * n)
        at = {"bytes": moved, "batch": batch, "m": m, "k": k, "n": n}
        yield Point(name="scores", at=at, links=links)


def _own_kernels(chip: Chip, size: Size) -> Iterator[Point]:
    """Yields products in parts, and the sums of them, as decode makes them."""
    if size != "full" or chip.vendor != "NVIDIA":
        return
    for shapes, rows in ((_IN_PARTS, _TOKENS), (_MORE_IN_PARTS, (1, 64))):
        for (k, n), m in itertools.product(shapes, rows):
            moved = BYTES["bf16"] * (m * k + k * n)
            links = _links(chip, moved / chip.hbm_bytes_per_s, 2 * k * n)
            yield Point(name="split", at={"m": m, "k": k, "n": n}, links=links)
    parts = {(m, parts_of(m, k, n)) for k, n in _IN_PARTS for m in _TOKENS}
    for rows, count in sorted(parts):
        # The stream is read and written, and written normed; parts are in float32.
        moved = rows * WIDTH * (3 * BYTES["bf16"] + count * BYTES["fp32"])
        links = _links(chip, moved / chip.hbm_bytes_per_s)
        at = {"bytes": int(moved), "rows": rows, "parts": count}
        yield Point(name="add", at=at, links=links)


def distinct_of(num_bytes: float, links: int) -> int:
    """Returns how many operands of a size are more than a cache, two at least."""
    return min(max(math.ceil(_COLD_BYTES / num_bytes), 2), links)


def _token(chip: Chip, b: int, s: int, n: int, k: int, h: int) -> Point:
    """Returns the point of this project's kernel.

    It writes into the caches, which must be the same ones again in the next call: there
    are as many links as caches, or several times as many.
    """
    moved = 2 * b * h * (n + s * k) * BYTES["bf16"]  # queries, results and the cache
    caches = caches_of(b, s, k, h)
    by_time = _links(chip, moved / chip.hbm_bytes_per_s)
    sizes = {"B": b, "S": s, "N": n, "K": k, "H": h}
    return Point(
        name="token",
        at={"flops": 4 * b * n * h * s, "bytes": moved, **sizes},
        links=math.ceil(by_time / caches) * caches,
    )


def caches_of(b: int, s: int, k: int, h: int) -> int:
    """Returns how many caches a chain takes in turn; a call of many is slow to make."""
    return distinct_of(2 * b * s * k * h * BYTES["bf16"], _MOST_CACHES)


def _attend(
    chip: Chip, phase: str, implementation: str, sizes: tuple[int, ...]
) -> Point:
    b, t, s, n, k, h = sizes
    # Of a prompt, the tiles at and below the diagonal that cuDNN visits.
    scores = KERNELS["cudnn"].scores(t) if phase == "prefill" else s
    flops = 4 * b * n * h * scores
    item = BYTES["bf16"] if chip.kind != "cpu" else BYTES["fp32"]
    cache = 2 * b * s * k * h * item
    moved = 2 * b * t * n * h * item + cache
    dtype = "bf16" if chip.kind != "cpu" else "fp32"
    work_s = max(flops / chip.matmul_flops_per_s(dtype), moved / chip.hbm_bytes_per_s)
    names = dict(zip("BTSNKH", sizes, strict=True))
    return Point(
        name="attention",
        at={
            "phase": phase, "implementation": implementation, "flops": flops,
            "bytes": moved, **names,
        },
        links=min(_links(chip, work_s, cache if phase == "decode" else 0), 24),
    )  # fmt: skip
