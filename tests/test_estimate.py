"""An estimate is arithmetic on a ledger, so closed forms say what it must be."""

import dataclasses
import math

import pytest

from sharding.chips import CHIPS, Chip
from sharding.estimate import collective_time_s, estimate
from sharding.hlo.ledger import Collective, Cost, Ledger, Step
from sharding.hlo.records import Block
from sharding.links import links_used


def _cost(
    *, count: int = 1, flops: int = 0, matmul_flops: int = 0, hbm_bytes: int = 0
) -> Cost:
    return Cost(
        name="fusion.1",
        opcode="fusion",
        computation="main",
        count=count,
        flops=flops,
        matmul_flops=matmul_flops,
        hbm_bytes=hbm_bytes,
        op_name="",
        source="",
    )


def _row(
    *,
    axis: str = "tensor",
    kind: str = "all-reduce",
    count: int = 1,
    wire_bytes: int = 0,
    group_size: int = 2,
) -> Collective:
    return Collective(
        axis=axis,
        kind=kind,
        count=count,
        payload_bytes=wire_bytes,
        wire_bytes=wire_bytes,
        group_size=group_size,
        op_name="",
        source="",
        loop="",
    )


H100 = CHIPS["h100"].published()


def _ledger(*rows: Cost | Collective) -> Ledger:
    """Returns a ledger of steps one after the other, as often as each row counts."""
    costs = tuple(row for row in rows if isinstance(row, Cost))
    sends = tuple(row for row in rows if isinstance(row, Collective))
    steps = [
        (row.count, Step(name=f"fusion.{k}", cost=row)) for k, row in enumerate(costs)
    ]
    for k, row in enumerate(sends):
        once = dataclasses.replace(
            row,
            count=1,
            payload_bytes=row.payload_bytes / row.count,
            wire_bytes=row.wire_bytes / row.count,
        )
        step = Step(name=f"send.{k}", cost=None, sends=(once,), is_kernel=False)
        steps.append((row.count, step))
    blocks = tuple(Block(label="", times=count, steps=(step,)) for count, step in steps)
    return Ledger(costs=costs, collectives=sends, steps=blocks)


TOY = dataclasses.replace(
    H100,
    name="toy",
    flops_per_s={"bf16": 1000.0},
    vector_flops_per_s=100.0,
    hbm_bytes_per_s=10.0,
    links=2,
    link_bytes_per_s=1.0,
    collective_latency_s=0.5,
    hop_latency_s=0.25,
    call_overhead_s=7.0,
    sources={key: "made up" for key in H100.figures()},
)
LEDGER = _ledger(
    # 3 * max(5000/1000, 20/10): arithmetic, 15 s.
    _cost(count=3, flops=5000, matmul_flops=5000, hbm_bytes=20),
    # 2 * max(1000/1000, 40/10): memory, 8 s.
    _cost(count=2, flops=1000, matmul_flops=1000, hbm_bytes=40),
    # max(600/100, 50/10): vector arithmetic, 6 s; at the matrix rate it were 0.6.
    _cost(flops=600, hbm_bytes=50),
    # max(3000/1000, 400/100, 10/10): the vector part of a fused product, 4 s.
    _cost(flops=3400, matmul_flops=3000, hbm_bytes=10),
    # 4 * 0.5 + 6 / (2 * 1) = 5 s.
    _row(count=4, wire_bytes=6),
    # 0.5 + 2 / 2 = 1.5 s.
    _row(axis="stage", kind="permute", wire_bytes=2),
)


def test_parts_are_closed_forms() -> None:
    found = estimate(LEDGER, TOY)
    assert found.compute_s == pytest.approx(15 + 6 + 4)
    assert found.hbm_s == pytest.approx(8)
    assert found.collective_s == pytest.approx({"tensor": 5.0, "stage": 1.5})
    assert found.overhead_s == 7
    assert found.bubble_s == 0
    assert found.total_s == pytest.approx(46.5)
    assert found.bottleneck == "compute"


@pytest.mark.parametrize("busy_ticks", [1, 5, 7])
def test_parts_sum_exactly_to_the_total(busy_ticks: int) -> None:
    found = estimate(LEDGER, TOY, ticks=7, busy_ticks=busy_ticks)
    parts = [found.compute_s, found.hbm_s, found.overhead_s, found.bubble_s]
    assert found.total_s == math.fsum([*parts, *found.collective_s.values()])
    assert found.total_s == pytest.approx(46.5)  # a bubble moves time, and adds none


def test_idle_ticks_are_a_bubble() -> None:
    """8 micro-batches over 4 stages: 11 ticks, 3 of them idle."""
    found = estimate(LEDGER, TOY, ticks=11, busy_ticks=8)
    assert found.bubble_s == pytest.approx(39.5 * 3 / 11)
    assert found.compute_s == pytest.approx(25 * 8 / 11)
    assert found.collective_s["stage"] == pytest.approx(1.5 * 8 / 11)
    assert found.overhead_s == 7


@pytest.mark.parametrize(
    ("changes", "bottleneck"),
    [
        ({}, "compute"),
        ({"hbm_bytes_per_s": 1.0}, "hbm"),
        ({"link_bytes_per_s": 0.01}, "tensor links"),
        ({"call_overhead_s": 100.0}, "overhead"),
    ],
)
def test_bottleneck_is_the_largest_part(changes: dict, bottleneck: str) -> None:
    chip = dataclasses.replace(TOY, **changes)
    assert estimate(LEDGER, chip).bottleneck == bottleneck


def test_mostly_idle_pipeline_is_limited_by_its_bubble() -> None:
    assert estimate(LEDGER, TOY, ticks=8, busy_ticks=1).bottleneck == "bubble"


def test_without_latency_and_with_infinite_links_it_is_the_roofline() -> None:
    ideal = dataclasses.replace(
        TOY,
        collective_latency_s=0.0,
        hop_latency_s=0.0,
        call_overhead_s=0.0,
        link_bytes_per_s=math.inf,
    )
    assert estimate(LEDGER, ideal).total_s == pytest.approx(33)


def test_with_infinite_compute_it_is_the_communication() -> None:
    ideal = dataclasses.replace(
        TOY,
        flops_per_s={"bf16": math.inf},
        vector_flops_per_s=math.inf,
        hbm_bytes_per_s=math.inf,
        call_overhead_s=0.0,
    )
    assert estimate(LEDGER, ideal).total_s == pytest.approx(6.5)


def test_unknown_vector_rate_is_the_matrix_rate() -> None:
    chip = dataclasses.replace(TOY, vector_flops_per_s=None)
    ledger = _ledger(_cost(flops=600))
    assert estimate(ledger, TOY).compute_s == 6
    assert estimate(ledger, chip).compute_s == 0.6


def test_a_device_gets_half_of_a_chip_of_two() -> None:
    two = dataclasses.replace(TOY, devices_per_chip=2)
    whole, half = estimate(LEDGER, TOY), estimate(LEDGER, two)
    assert half.compute_s == pytest.approx(2 * whole.compute_s)
    assert half.hbm_s == pytest.approx(2 * whole.hbm_s)
    # Bytes take twice as long, latency does not: 4 * 0.5 + 2 * 3.
    assert half.collective_s["tensor"] == pytest.approx(8)


@pytest.mark.parametrize(
    ("name", "kind", "group_size", "links"),
    [
        # NVLink switch: a GPU reaches anyone with all it has.
        ("h100", "all-reduce", 2, 18),
        ("h100", "permute", 8, 18),
        # Infinity Fabric mesh: one link to each peer (arXiv:2603.05692, claim C6).
        ("mi355x", "all-reduce", 2, 1),
        ("mi355x", "all-reduce", 4, 3),
        ("mi355x", "all-gather", 8, 7),
        ("mi355x", "permute", 8, 1),
        # 2D torus, boxes 2, 2x2, 4x2, no side closes below 16.
        ("v5e", "all-reduce", 2, 1),
        ("v5e", "all-reduce", 4, 2),
        ("v5e", "all-reduce", 8, 2),
        ("v5e", "all-reduce", 256, 4),
        # 3D torus, 2x2x2 open and 4x4x4 closed.
        ("v5p", "all-reduce", 8, 3),
        ("v5p", "all-reduce", 64, 6),
        ("v5p", "permute", 64, 1),
    ],
)
def test_links_follow_the_topology(
    name: str, kind: str, group_size: int, links: int
) -> None:
    assert links_used(kind, group_size, CHIPS[name]) == links


@pytest.mark.parametrize(
    ("topology", "kind", "group_size", "further_steps"),
    [
        ("switch", "all-reduce", 2, 0),
        ("switch", "all-reduce", 8, 12),  # 14 ring steps less the 2 of two devices
        ("switch", "all-gather", 8, 6),
        ("switch", "permute", 8, 0),
        ("torus2d", "all-reduce", 8, 6),  # 2 * ((4 - 1) + (2 - 1)) - 2
        ("torus3d", "all-reduce", 8, 4),  # 2 * 3 - 2
        ("torus3d", "reduce-scatter", 64, 5),  # three closed rings of 4: 3 * 2 - 1
    ],
)
def test_latency_grows_with_the_steps(
    topology: str, kind: str, group_size: int, further_steps: int
) -> None:
    chip = dataclasses.replace(TOY, topology=topology, links=6)
    row = _row(kind=kind, group_size=group_size, count=3)
    expected = 3 * (0.5 + 0.25 * further_steps)
    assert collective_time_s(row, chip) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("payload_bytes", "measured_s"), [(8 << 10, 29e-6), (4 << 20, 36e-6)]
)
def test_small_all_reduce_is_near_the_measured_one(
    payload_bytes: int, measured_s: float
) -> None:
    """2 x H100, jax 0.11.2, 2026-11-22; large ones stay under, as links do."""
    row = _row(wire_bytes=payload_bytes)
    assert collective_time_s(row, H100) == pytest.approx(measured_s, rel=0.1)


def test_group_of_one_sends_nothing() -> None:
    assert collective_time_s(_row(group_size=1), TOY) == 0


@pytest.mark.parametrize(("ticks", "busy_ticks"), [(3, 4), (3, 0)])
def test_impossible_ticks_are_refused(ticks: int, busy_ticks: int) -> None:
    with pytest.raises(ValueError, match=f"ticks={ticks} with busy_ticks={busy_ticks}"):
        estimate(LEDGER, TOY, ticks=ticks, busy_ticks=busy_ticks)


@pytest.mark.parametrize("chip", [TOY, CHIPS["v5p"]], ids=lambda c: c.name)
def test_unknown_collective_is_an_error(chip: Chip) -> None:
    ledger = _ledger(_row(kind="gossip", group_size=4))
    with pytest.raises(ValueError, match=r"kind 'gossip' over 4 devices"):
        estimate(ledger, chip)


def test_unknown_dtype_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"dtype 'int4' on chip 'toy', which has bf16"):
        estimate(LEDGER, TOY, dtype="int4")


def test_a_ledger_without_its_order_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 costs and 0 collectives without steps"):
        estimate(Ledger(costs=(_cost(flops=600),), collectives=()), TOY)
