"""Rates are published figures until there are samples; then they are the samples."""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable

import pytest

from sharding import curves, links, rates
from sharding.chips import CHIPS, Chip, find_chip
from sharding.chips.calibration import (
    Sample,
    header_line,
    read_calibration,
    sample_line,
)
from sharding.hlo.records import Kernel
from tests import fakes

H100 = CHIPS["h100"].published()
# A device whose every benchmark takes latency + size / rate.
CALL_S, GAP_S, APART_S = 11e-6, 2e-6, 9e-6
MEMORY_S, BYTES_PER_S, LINK_S, LINK_BYTES_PER_S = 1e-6, 2.5e12, 5e-6, 200e9
RATIO = 1.25  # of a product's time to its roofline


def _sample(
    name: str, work_s: float, *, slots: int = 1, links: int = 8, **at
) -> Sample:
    call_s = CALL_S + links * (slots * GAP_S + work_s)
    return Sample(
        name=name,
        at=at,
        links=links,
        slots=slots,
        calls=3,
        call_samples_s=(1.5 * call_s, call_s, 0.9 * call_s),
        steady=True,
        time="2026-11-24T10:00:00Z",
    )


def _product_s(m: int, n: int, k: int, weight_bytes: float = 2) -> float:
    return RATIO * max(
        2 * m * n * k / 989.4e12,
        (2 * m * k + 2 * m * n + weight_bytes * n * k) / 3.35e12,
    )


def _collective(
    kind: str, payload: int, *, name: str = "collective", more_s: float = 0.0, **at
) -> Sample:
    group = 2
    wire = payload * (2 if kind == "all-reduce" else 1) // group
    work_s = LINK_S + wire / LINK_BYTES_PER_S + more_s
    at = {"by": "xla", **at}
    sizes = {"kind": kind, "group": group, "bytes": payload, "wire": wire, **at}
    return _sample(name, work_s, devices=1, **sizes)


SAMPLES = (
    *(_sample("kernel", 0.0, links=n, devices=1) for n in (64, 256)),
    *(
        dataclasses.replace(
            _sample("call", 0.0, links=1, devices=2, arguments=n),
            call_samples_s=(20e-6 + n * 1e-6,),
        )
        for n in (1, 101)
    ),
    *(_sample("copy", MEMORY_S + n / BYTES_PER_S, bytes=n) for n in (1e4, 1e6, 1e9)),
    *(_sample("read", 3 * n / BYTES_PER_S, bytes=n, slots=2) for n in (1e6, 1e9)),
    *(_sample("vector", n / 50e12, flops=n) for n in (1e8, 1e10)),
    *(
        _sample(
            "matmul", _product_s(m, n, k), m=m, n=n, k=k, dtype="bf16", weights="bf16",
            slots=2,
        )
        for m in (1, 64, 1024)
        for k, n in ((4096, 4096), (4096, 28672))
    ),
    _sample(
        "matmul", 3 * _product_s(1, 4096, 4096, 1), m=1, n=4096, k=4096, dtype="bf16",
        weights="int8",
    ),
    *(
        _sample(
            "attention", 1e-5 + 2 * n / 989.4e12, phase="prefill",
            implementation="cudnn", flops=n, bytes=8,
        )
        for n in (1e9, 1e12)
    ),
    *(
        _sample("split", 1.5 * 2 * k * n / 3.35e12, m=m, k=k, n=n, slots=2)
        for m in (1, 16)
        for k, n in ((4096, 4096), (14336, 4096))
    ),
    *(
        _sample("add", (1 + 0.25 * parts) * 1e-6 * rows**0.5, rows=rows, parts=parts)
        for rows in (1, 16)
        for parts in (1, 5)
    ),
    *(_sample("token", 5e-6 + n / 3e12, flops=1, bytes=n, slots=3) for n in (1e6, 1e8)),
    *(_collective("all-reduce", n) for n in (8192, 1 << 20, 1 << 28)),
    _collective("all-reduce", 8192, by="nccl", more_s=1.0),
    *(_collective("all-reduce", n, name="apart", more_s=APART_S) for n in (8192,)),
    Sample(name="copy", at={"bytes": 64}, links=8, slots=1, reason="RuntimeError: no"),
)  # fmt: skip


def _calibrated(*samples: Sample) -> Chip:
    return fakes.calibrated(H100, *samples)


MEASURED = _calibrated(*SAMPLES)


def test_published_rates_are_the_roofline() -> None:
    assert rates.matmul_s(H100, 1, 28672, 4096, "bfloat16") == pytest.approx(
        2 * (4096 * 28672 + 4096 + 28672) / 3.35e12
    )
    assert rates.matmul_s(H100, 8192, 8192, 8192, "bf16") == pytest.approx(
        2 * 8192**3 / 989.4e12
    )
    assert rates.memory_s(H100, 3.35e9, cold=True) == pytest.approx(1e-3)
    assert rates.vector_s(H100, 66.9e9) == pytest.approx(1e-3)
    assert rates.attention_s(H100, 989.4e9, 1, phase="prefill") == pytest.approx(1e-3)
    assert rates.scores_s(H100, 64, 4, 1152, 128) == pytest.approx(
        2 * 64 * (4 * 128 + 128 * 1152 + 4 * 1152) / 3.35e12
    )
    # 28 us and 14 ring steps less the 2 of two devices; 450 GB/s.
    assert rates.collective_s(H100, "all-reduce", 8, 1e6, 1.75e6) == pytest.approx(
        28e-6 + 12 * 0.8e-6 + 1.75e6 / 450e9
    )


def test_published_gaps_are_nothing_but_the_call() -> None:
    assert rates.kernel_gap_s(H100) == rates.collective_gap_s(H100) == 0
    assert rates.dispatch_s(H100) == 0
    assert rates.call_overhead_s(H100) == H100.call_overhead_s
    assert H100.calibrated is None
    assert H100.rates_from == "published peaks"


def test_chains_of_two_lengths_tell_the_call_from_its_kernels() -> None:
    assert rates.kernel_gap_s(MEASURED) == pytest.approx(GAP_S)
    assert rates.call_overhead_s(MEASURED) == pytest.approx(CALL_S)
    assert rates.collective_gap_s(MEASURED) == pytest.approx(APART_S)
    assert rates.dispatch_s(MEASURED, arguments=51, devices=2) == pytest.approx(71e-6)


def test_a_collective_takes_less_where_kernels_hide_its_start() -> None:
    less = _collective("all-reduce", 8192, name="apart", more_s=-2e-6)
    chip = _calibrated(*(s for s in SAMPLES if s.name != "apart"), less)
    assert rates.collective_gap_s(chip) == 0
    for payload in (8192.0, 1e6):
        each = "all-reduce", 2, payload, payload
        bare_s, among_s = (rates.collective_s(c, *each) for c in (MEASURED, chip))
        assert among_s == pytest.approx(bare_s - 2e-6)


@pytest.mark.parametrize("hbm_bytes", [1e4, 3e4, 1e6, 7e8, 1e9])
def test_latency_and_rate_come_back_at_every_size(hbm_bytes: float) -> None:
    expected = MEMORY_S + hbm_bytes / BYTES_PER_S
    assert rates.memory_s(MEASURED, hbm_bytes) == pytest.approx(expected)


def test_outside_of_the_sizes_latency_and_rate_stay() -> None:
    assert rates.memory_s(MEASURED, 10) == rates.memory_s(MEASURED, 1e4)
    assert rates.memory_s(MEASURED, 4e9) == pytest.approx(
        4 * rates.memory_s(MEASURED, 1e9)
    )
    assert rates.memory_s(MEASURED, 0) == 0
    assert rates.vector_s(MEASURED, 1e3) == pytest.approx(1e3 / 50e12)


def test_what_no_cache_holds_has_its_own_curve() -> None:
    assert rates.memory_s(MEASURED, 5e8, cold=True) == pytest.approx(
        1.5e9 / BYTES_PER_S
    )


@pytest.mark.parametrize("m", [1, 3, 64, 300, 1024, 9000])
@pytest.mark.parametrize("n", [1024, 4096, 14336, 28672])
def test_products_keep_their_distance_to_the_roofline(m: int, n: int) -> None:
    """Between shapes, beyond them, and on both sides of its bend."""
    found = rates.matmul_s(MEASURED, m, n, 4096, "bfloat16")
    assert found == pytest.approx(_product_s(m, n, 4096))


def test_weights_in_eight_bits_are_priced_by_such() -> None:
    found = rates.matmul_s(MEASURED, 1, 4096, 4096, "bf16", weight_bytes=4096**2)
    assert found == pytest.approx(3 * _product_s(1, 4096, 4096, 1))
    # Four bits were not measured: as far from their roofline as eight.
    found = rates.matmul_s(MEASURED, 1, 4096, 4096, "bf16", weight_bytes=4096**2 / 2)
    assert found == pytest.approx(3 * _product_s(1, 4096, 4096, 0.5))


@pytest.mark.parametrize("m", [1024, 16384])
def test_widening_weights_does_not_show_with_many_rows(m: int) -> None:
    """None so many were measured in eight bits: they take what wide ones do."""
    found = rates.matmul_s(MEASURED, m, 4096, 4096, "bf16", weight_bytes=4096**2)
    assert found == pytest.approx(_product_s(m, 4096, 4096, 1))


def test_a_measured_shape_is_itself_among_others() -> None:
    odd = _sample(
        "matmul", 1.0, m=1, n=512, k=4096, dtype="bf16", weights="bf16", slots=2
    )
    chip = _calibrated(*SAMPLES, odd)
    assert rates.matmul_s(chip, 1, 512, 4096, "bf16") == pytest.approx(1.0, rel=1e-3)
    # And hardly moves those far away.
    assert rates.matmul_s(chip, 1, 28672, 4096, "bf16") == pytest.approx(
        _product_s(1, 28672, 4096), rel=1e-3
    )


@pytest.mark.parametrize("payload", [8192, 100_000, 1 << 20, 1 << 26])
def test_collectives_come_back_at_every_payload(payload: int) -> None:
    found = rates.collective_s(MEASURED, "all-reduce", 2, payload, payload)
    assert found == pytest.approx(LINK_S + payload / LINK_BYTES_PER_S)


def test_other_groups_are_as_far_from_the_formula() -> None:
    payload = 1 << 20
    wire = {n: 2 * payload * (n - 1) / n for n in (2, 8)}
    ideal = {n: links.links_s(H100, "all-reduce", n, wire[n]) for n in wire}
    assert rates.collective_s(
        MEASURED, "all-reduce", 8, payload, wire[8]
    ) == pytest.approx((LINK_S + payload / LINK_BYTES_PER_S) * ideal[8] / ideal[2])


def test_what_was_not_measured_is_the_formula() -> None:
    for kind in ("all-to-all", "permute"):
        assert rates.collective_s(MEASURED, kind, 2, 8, 4) == links.links_s(
            H100, kind, 2, 4
        )
    assert rates.attention_s(MEASURED, 8, 3.35e9, phase="decode") == pytest.approx(1e-3)
    assert rates.matmul_s(MEASURED, 8, 8, 8, "fp8") == rates.matmul_s(
        H100, 8, 8, 8, "fp8"
    )
    nothing = _calibrated()
    assert rates.call_overhead_s(nothing) == H100.call_overhead_s
    assert rates.memory_s(nothing, 1e6) == rates.memory_s(H100, 1e6)


def test_attention_is_interpolated_over_its_roofline() -> None:
    found = rates.attention_s(MEASURED, 5e11, 8, phase="prefill")
    assert found == pytest.approx(1e-5 + 1e12 / 989.4e12)


def _own_s(name: str, *sizes: int, hbm_bytes: float = 0.0) -> float | None:
    kernel = Kernel(name=name, sizes=sizes)
    assert rates.own_kernel_s(_calibrated(), kernel, 1, hbm_bytes) is None
    assert rates.own_kernel_s(H100, kernel, 1, hbm_bytes) is None
    return rates.own_kernel_s(MEASURED, kernel, 1, hbm_bytes)


def test_a_product_in_parts_is_priced_by_those_near_it() -> None:
    measured_s = _own_s("split_product", 1, 4096, 4096)
    assert measured_s == pytest.approx(1.5 * 2 * 4096 * 4096 / 3.35e12)
    near_s = _own_s("split_product", 16, 14000, 4096)
    assert near_s == pytest.approx(1.5 * 2 * 14000 * 4096 / 3.35e12, rel=2e-2)


def test_parts_are_added_in_the_time_of_as_many() -> None:
    assert _own_s("add", 1, 3) == pytest.approx(1.75e-6)
    assert _own_s("add", 15, 5) == pytest.approx(4 * 2.25e-6)  # as of 16 rows
    assert _own_s("add", 17, 1) is None  # more rows than were measured


def test_attention_of_one_token_is_timed_with_what_joins_it() -> None:
    found_s = _own_s("token_attention", hbm_bytes=1e7)
    assert found_s == pytest.approx(5e-6 + 1e7 / 3e12)
    assert _own_s("join_token_attention", hbm_bytes=1e5) == 0.0


@pytest.mark.parametrize(
    "price",
    [
        lambda n: rates.memory_s(MEASURED, n),
        lambda n: rates.memory_s(MEASURED, n, cold=True),
        lambda n: rates.vector_s(MEASURED, n),
        lambda n: rates.matmul_s(MEASURED, n, 6144, 4096, "bf16"),
        lambda n: rates.matmul_s(MEASURED, 16, n, 4096, "bf16"),
        lambda n: rates.collective_s(MEASURED, "all-reduce", 2, n, n),
        lambda n: rates.collective_s(MEASURED, "all-reduce", 4, n, 1.5 * n),
        lambda n: rates.attention_s(MEASURED, n, n / 8, phase="prefill"),
        lambda n: rates.scores_s(MEASURED, n, 4, 1152, 128),
    ],
)
def test_more_work_never_takes_less(price: Callable[[int], float]) -> None:
    found = [price(2**power) for power in range(31)]
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(found))
    assert all(0 < seconds < math.inf for seconds in found)


def test_unknown_is_an_error() -> None:
    for chip in (H100, MEASURED):
        with pytest.raises(ValueError, match=r"'int4' on chip 'h100', which has bf16"):
            rates.matmul_s(chip, 1, 1, 1, "int4")
        with pytest.raises(ValueError, match=r"kind 'gossip' over 4 devices"):
            rates.collective_s(chip, "gossip", 4, 1, 1)


def test_a_device_of_two_keeps_its_samples() -> None:
    two = dataclasses.replace(MEASURED, devices_per_chip=2)
    assert rates.memory_s(two.per_device(), 1e6) == rates.memory_s(MEASURED, 1e6)


def test_curve_ignores_the_order_of_samples() -> None:
    curve = curves.curve_of([(4, 2.0), (1, 1.0), (4, 4.0), (4, 3.0)])
    assert curve == curves.Curve(points=((1, 1.0), (4, 3.0)))
    assert curves.curve_of([]) is None


def _written(path: pathlib.Path, *samples: Sample) -> pathlib.Path:
    lines = [header_line(fakes.CALIBRATED), *map(sample_line, samples)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_file_says_what_was_written(tmp_path: pathlib.Path) -> None:
    profiled = dataclasses.replace(
        SAMPLES[0],
        kernels={"loop": (3, 0.25)},
        warmup_samples_s=(3.0, 1.0),
        call_samples_s=(3.25e-4, 2.5e-6, SAMPLES[0].call_s),
    )
    path = _written(tmp_path / "h100.jsonl", profiled, *SAMPLES[1:])
    found = read_calibration(path)
    assert found.header == fakes.CALIBRATED
    times_s = found.samples[0].call_samples_s
    assert times_s == pytest.approx(profiled.call_samples_s, rel=1e-5)
    assert dataclasses.replace(profiled, call_samples_s=times_s) == found.samples[0]
    assert [s.key for s in found.samples] == [s.key for s in SAMPLES]
    for read, sample in zip(found.samples[1:], SAMPLES[1:], strict=True):
        assert read.call_samples_s == pytest.approx(sample.call_samples_s, rel=1e-5)
    chip = find_chip(str(path))
    assert chip.rates_from == (
        "measured on 2 x NVIDIA H100 80GB HBM3, 2026-11-24, jax 0.11.2"
    )
    assert chip.published() == find_chip(f"{path}@published") == H100
    assert rates.kernel_gap_s(chip) == pytest.approx(GAP_S, rel=1e-4)
    # What is cached by a chip's text is another thing with other samples.
    other = find_chip(str(_written(tmp_path / "other.jsonl", *SAMPLES[:3])))
    assert len({repr(chip), repr(other), repr(H100)}) == 3


def test_the_newest_sample_of_a_benchmark_counts(tmp_path: pathlib.Path) -> None:
    again = dataclasses.replace(SAMPLES[0], call_samples_s=(7.0,))
    found = read_calibration(_written(tmp_path / "x.jsonl", *SAMPLES[:2], again))
    assert [s.call_s for s in found.samples] == pytest.approx(
        [7.0, SAMPLES[1].call_s], rel=1e-5
    )


def test_a_killed_run_left_whole_lines(tmp_path: pathlib.Path) -> None:
    path = _written(tmp_path / "x.jsonl", *SAMPLES[:2])
    path.write_text(path.read_text() + sample_line(SAMPLES[2])[:40])
    assert len(read_calibration(path).samples) == 2


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (1, '{"schema": 9}', r"line 1 of x\.jsonl: its schema is 9"),
        (1, "[]", r"line 1 of x\.jsonl"),
        (3, "{", r"line 3 of x\.jsonl"),
        (2, '{"name": "copy", "at": {}}', r"line 2 of x\.jsonl.*'links'"),
        (
            2,
            '{"name": "hum", "at": {}, "links": 1, "slots": 1, "reason": "x"}',
            r"line 2 .*no benchmark 'hum'; there are kernel, call, copy",
        ),
        (
            2,
            '{"name": "copy", "at": {}, "links": 1, "slots": 1,'
            ' "call_samples_s": [-1.0]}',
            r"line 2 .*has the times \[-1\.0\]",
        ),
    ],
)
def test_a_damaged_file_is_refused(
    tmp_path: pathlib.Path, line: int, text: str, message: str
) -> None:
    path = _written(tmp_path / "x.jsonl", *SAMPLES[:2])
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        find_chip(str(path))
