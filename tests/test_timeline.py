"""A timeline is arithmetic on a schedule, so closed forms say what it must be."""

import dataclasses
import math
import pathlib
import re

import pytest

from sharding import clock
from sharding.chips import CHIPS
from sharding.chips.calibration import Sample
from sharding.estimate import collective_time_s, estimate
from sharding.hlo.ledger import Collective, Cost, Ledger, Step, read_ledger
from sharding.hlo.records import Block, Product, Steps, Wait
from sharding.timeline import Timeline, lay_out
from sharding.trace import trace
from tests import fakes

DATA = pathlib.Path(__file__).parent / "data/hlo"
AXES = {
    "causal": {"data": 2, "tensor": 4},
    "decode": {"data": 1, "stage": 1, "tensor": 8},
    "pipeline": {"data": 1, "stage": 2, "tensor": 4},
}
FILES = sorted(DATA.glob("*.hlo"))
TOY = dataclasses.replace(
    CHIPS["h100"].published(),
    name="toy",
    flops_per_s={"bf16": 1000.0},
    vector_flops_per_s=math.inf,
    hbm_bytes_per_s=10.0,
    links=1,
    link_bytes_per_s=1.0,
    collective_latency_s=0.0,
    hop_latency_s=0.0,
    call_overhead_s=0.0,
    sources={key: "made up" for key in CHIPS["h100"].figures()},
)


def _kernel(compute_s: float, memory_s: float = 0.0) -> Step:
    return Step(name="kernel", cost=_cost(1000 * compute_s, 10 * memory_s))


def _cost(flops: float, hbm_bytes: float) -> Cost:
    return Cost(
        name="kernel",
        opcode="fusion",
        computation="main",
        count=1,
        flops=int(flops),
        matmul_flops=int(flops),
        hbm_bytes=int(hbm_bytes),
        op_name="work",
        source="",
    )


def _send(name: str, seconds: int, *, axis: str = "tensor", beside: bool = True):
    row = Collective(
        axis=axis,
        kind="permute",
        count=1,
        payload_bytes=seconds,
        wire_bytes=seconds,
        group_size=2,
        op_name=name,
        source="",
        loop="",
    )
    return Step(name=name, cost=None, sends=(row,), is_beside=beside, is_kernel=False)


def _copy(name: str, memory_s: float) -> Step:
    cost = _cost(0, 10 * memory_s)
    return Step(name=name, cost=cost, is_beside=True, is_kernel=False)


def _loop(times: float, *steps: Step | Wait | Block) -> Block:
    return Block(label=f"while x{times:g}", times=times, steps=steps)


def _laid(*steps: Step | Wait | Block, chip=TOY) -> Timeline:
    found = lay_out(Ledger(costs=(), collectives=(), steps=steps), chip)
    assert found.total_s == pytest.approx(math.fsum(found.path.values()))
    assert found.total_s == pytest.approx(math.fsum(found.parts.values()))
    return found


def _links(found: Timeline) -> float:
    return found.parts.get("tensor links", 0.0)


@pytest.mark.parametrize(
    ("between_s", "total_s", "exposed_s", "on_path"),
    [(0, 5, 5, "tensor links"), (3, 5, 2, "tensor links"), (7, 7, 0, "compute")],
)
def test_work_between_start_and_done_hides_a_collective(
    between_s: float, total_s: float, exposed_s: float, on_path: str
) -> None:
    found = _laid(_send("a", 5), _kernel(between_s), Wait(name="a"))
    assert found.total_s == total_s
    assert _links(found) == exposed_s
    assert next(iter(found.path)).limit == on_path
    assert found.busy_s["tensor links"] == 5
    assert found.idle_s["kernels"] == total_s - between_s


def test_a_collective_without_start_is_waited_for() -> None:
    found = _laid(_kernel(3), _send("a", 5, beside=False), _kernel(2))
    assert found.total_s == 10
    assert found.parts == {"compute": 5, "tensor links": 5, "overhead": 0}


@pytest.mark.parametrize(("topology", "total_s"), [("switch", 8), ("torus3d", 5)])
def test_collectives_share_the_links_of_a_switch(topology: str, total_s: float) -> None:
    chip = dataclasses.replace(TOY, topology=topology)
    a, b = _send("a", 5), _send("b", 3, axis="stage")
    found = _laid(a, b, Wait(name="b"), Wait(name="a"), chip=chip)
    assert found.total_s == total_s


def test_waiting_in_the_queue_of_the_links_is_communication() -> None:
    found = _laid(_send("a", 5), _send("b", 3), _kernel(1), Wait(name="b"))
    assert found.parts == {"compute": 1, "tensor links": 7, "overhead": 0}


@pytest.mark.parametrize(
    ("memory_s", "total_s"),
    [
        # A kernel of 6 s leaves memory idle for 4: nothing of a copy of 3 is seen.
        (2, 6),
        # It leaves it idle for 1: the other 2 are waited for.
        (5, 8),
        # Both want it all the time: no faster than one after the other.
        (6, 9),
    ],
)
def test_a_copy_moves_on_while_memory_is_idle(memory_s: float, total_s: float) -> None:
    found = _laid(_copy("a", 3), _kernel(6, memory_s), Wait(name="a"))
    assert found.total_s == total_s
    assert found.parts.get("hbm", 0) == pytest.approx(total_s - 6 + 6 * (memory_s == 6))


def test_loops_are_multiplied() -> None:
    inner = _loop(5, _kernel(2), _send("a", 1, beside=False))
    found = _laid(_kernel(1), _loop(80, inner, _kernel(3)), _kernel(1))
    assert found.total_s == 1 + 80 * (5 * (2 + 1) + 3) + 1
    assert _links(found) == 80 * 5
    assert (found.kernels, found.collectives) == (80 * 6 + 2, 400)


@pytest.mark.parametrize("work_s", [3, 8])
def test_what_an_iteration_starts_the_next_one_may_end(work_s: int) -> None:
    """Ten iterations take ten times the longer of both, the last send included."""
    body = Wait(name=""), _send("a", 5), _kernel(work_s)
    assert _laid(_loop(10, *body)).total_s == 10 * max(work_s, 5)


def test_a_pipeline_takes_the_time_of_its_ticks() -> None:
    """M micro-batches over S stages: M + S - 1 ticks, each handing its result on."""
    stages, micro_batches = 4, 8
    ticks = micro_batches + stages - 1
    tick = _loop(ticks, _kernel(6), _send("x", 2, axis="stage", beside=False))
    ledger = Ledger(costs=(), collectives=(), steps=(_kernel(7), tick, _kernel(9)))
    found = estimate(ledger, TOY, ticks=ticks, busy_ticks=micro_batches)
    assert found.total_s == pytest.approx(7 + ticks * (6 + 2) + 9)
    # Embedding and head run once: they are no part of the bubble.
    assert found.bubble_s == pytest.approx((stages - 1) * (6 + 2))
    assert found.compute_s == pytest.approx(7 + micro_batches * 6 + 9)
    assert found.collective_s == pytest.approx({"stage": micro_batches * 2})


def test_a_branch_counts_as_often_as_it_is_taken() -> None:
    branch = Block(label="", times=7 / 8, steps=(_kernel(4),))
    assert _laid(_loop(8, _kernel(1), branch)).total_s == pytest.approx(8 + 7 * 4)


def test_gaps_and_calls_are_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharding.rates.kernel_gap_s", lambda chip: 0.5)
    monkeypatch.setattr("sharding.rates.collective_gap_s", lambda chip: 0.25)
    steps = _kernel(1), _kernel(1), _send("a", 5, beside=False), _kernel(1)
    found = _laid(*steps)
    assert found.parts == {"compute": 3, "tensor links": 5, "overhead": 1.75}
    ledger = Ledger(costs=(), collectives=(), steps=steps)
    assert lay_out(ledger, TOY, call_s=2).total_s == 11.75
    assert lay_out(ledger, TOY, call_s=2, least_s=20).total_s == 20


@pytest.mark.parametrize(
    ("kernel_s", "idle", "total_s"), [(1, False, 20), (60, False, 62), (60, True, 82)]
)
def test_devices_that_do_nothing_wait_for_the_host(
    monkeypatch: pytest.MonkeyPatch, kernel_s: int, idle: bool, total_s: int
) -> None:
    monkeypatch.setattr("sharding.rates.call_overhead_s", lambda chip, devices: 2.0)
    monkeypatch.setattr(
        "sharding.rates.dispatch_s", lambda chip, arguments, devices: 20.0
    )
    ledger = Ledger(costs=(), collectives=(), steps=(_kernel(kernel_s),))
    assert estimate(ledger, TOY, idle=idle).total_s == total_s


def test_cost_is_linear_in_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A billion kernels are counted by looking at a few."""
    seen: list[str] = []
    step = clock._Running.step
    monkeypatch.setattr(
        clock._Running, "step", lambda self, s: (seen.append(s.name), step(self, s))
    )
    for size in (10, 20):
        seen.clear()
        inner = [_kernel(1), _send("a", 2), _kernel(1), Wait(name="a")] * size
        found = _laid(_loop(1000, _loop(1000, _loop(1000, *inner))))
        assert found.kernels == 2 * size * 1000**3
        assert len(seen) == 3 * size


def _read(path: pathlib.Path) -> tuple[str, Ledger]:
    text = path.read_text(encoding="utf-8")
    return text, read_ledger(text, AXES.get(path.name.partition(".")[0]))


def _executed(steps: Steps, times: float = 1.0) -> dict[str, float]:
    found: dict[str, float] = {}
    for step in steps:
        if isinstance(step, Block):
            for name, count in _executed(step.steps, times * step.times).items():
                found[name] = found.get(name, 0.0) + count
        elif isinstance(step, Step) and step.cost:
            name = step.cost.name
            found[name] = found.get(name, 0.0) + times
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_steps_are_the_costs_in_order(path: pathlib.Path) -> None:
    """Nothing is left out or counted twice, but for the conditions of counted loops."""
    text, ledger = _read(path)
    conditions = set(re.findall(r"condition=%?([\w.\-]+)", text))
    expected: dict[str, float] = {}
    for cost in ledger.costs:
        if cost.computation not in conditions:
            expected[cost.name] = expected.get(cost.name, 0.0) + cost.count
    assert _executed(ledger.steps) == pytest.approx(expected)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_real_programs_keep_the_limits(path: pathlib.Path) -> None:
    """Parts sum up; bounds hold; without links and latency it is the roofline."""
    text, ledger = _read(path)
    h100 = CHIPS["h100"].published()
    found = lay_out(ledger, h100)
    total = found.total_s
    assert total == pytest.approx(math.fsum(found.parts.values()), rel=1e-12)
    assert total == pytest.approx(math.fsum(found.path.values()), rel=1e-9)
    assert all(idle >= -1e-12 for idle in found.idle_s.values())

    conditions = set(re.findall(r"condition=%?([\w.\-]+)", text))
    costs = [c for c in ledger.costs if c.computation not in conditions]
    arithmetic, memory, roofline = (
        math.fsum(c.count * seconds(c) for c in costs)
        for seconds in (_arithmetic_s, _memory_s, _roofline_s)
    )
    free_links = dataclasses.replace(
        h100, collective_latency_s=0, hop_latency_s=0, link_bytes_per_s=math.inf
    )
    ideal = lay_out(ledger, free_links).total_s
    # Copies beside kernels hide behind arithmetic, and no further.
    assert max(arithmetic, memory) * (1 - 1e-9) <= ideal <= roofline * (1 + 1e-9)
    if not found.busy_s.get("copies"):
        assert ideal == pytest.approx(roofline, rel=1e-9)

    no_work = dataclasses.replace(
        h100,
        flops_per_s={"bf16": math.inf},
        vector_flops_per_s=math.inf,
        hbm_bytes_per_s=math.inf,
    )
    sent = math.fsum(collective_time_s(row, h100) for row in ledger.collectives)
    assert lay_out(ledger, no_work).total_s == pytest.approx(sent, rel=1e-9, abs=1e-15)


def _arithmetic_s(cost: Cost) -> float:
    chip = CHIPS["h100"]
    assert chip.vector_flops_per_s
    vector_s = (cost.flops - cost.matmul_flops) / chip.vector_flops_per_s
    return max(cost.matmul_flops / chip.flops_per_s["bf16"], vector_s)


def _memory_s(cost: Cost) -> float:
    return cost.hbm_bytes / CHIPS["h100"].hbm_bytes_per_s


def _roofline_s(cost: Cost) -> float:
    return max(_arithmetic_s(cost), _memory_s(cost))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_trace_is_one_that_perfetto_reads(path: pathlib.Path) -> None:
    """Every event is whole, and the slices of a track lie beside or inside others."""
    _, ledger = _read(path)
    found = lay_out(ledger, CHIPS["v5p"].published(), call_s=1e-6)
    events = trace(found, title=path.stem)["traceEvents"]
    named = {e["tid"] for e in events if e["name"] == "thread_name"}
    slices = [e for e in events if e["ph"] == "X"]
    assert {e["tid"] for e in slices} <= named
    assert max(e["ts"] + e["dur"] for e in slices) == pytest.approx(
        1e6 * found.total_s, rel=1e-3, abs=1e-4
    )
    copies = {e["tid"] for e in events if e.get("args", {}).get("name") == "copies"}
    for track in named - copies:
        open_until = [math.inf]
        mine = [e for e in slices if e["tid"] == track]
        for event in sorted(mine, key=lambda e: (e["ts"], -e["dur"])):
            end = event["ts"] + event["dur"]
            while event["ts"] >= open_until[-1] - 1e-4:
                open_until.pop()
            assert end <= open_until[-1] + 1e-4, event
            open_until.append(end)


def test_a_trace_shows_a_few_iterations() -> None:
    inner = _loop(1000, _kernel(1))
    found = _laid(_loop(50, inner, _kernel(2)))
    slices = [e for e in trace(found, iterations=3)["traceEvents"] if e["ph"] == "X"]
    names = [e["name"] for e in slices]
    assert names.count("997 more iterations") == 3
    assert names.count("47 more iterations") == 1
    assert len(slices) == 1 + 3 * (1 + 3 + 1 + 1) + 1
    last = slices[-1]
    assert last["dur"] == pytest.approx(47 * 1002e6)


def _products(text: str) -> list[tuple[int, int, int, int, int]]:
    steps = read_ledger(text).steps
    return [
        (p.batch, p.m, p.n, p.k, p.weight_bytes)
        for step in steps
        if isinstance(step, Step)
        for p in step.products
    ]


_PROGRAM = """HloModule m, is_scheduled=true
%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}
%product (p: {lhs}, q: {rhs}) -> {out} {{
  %p = {lhs} parameter(0)
  %q = {rhs} parameter(1)
  %w = {wide} convert(%q)
  ROOT %d = {out} dot(%p, %w), {dims}
}}
{more}
ENTRY %main (x: {lhs}, w: {rhs}) -> {result} {{
  %x = {lhs} parameter(0)
  %w0 = {rhs} parameter(1)
  %n = {lhs} negate(%x)
  %f = {out} fusion(%n, %w0), kind=kCustom, calls=%product
{user}
}}
"""


def test_sizes_of_products_are_read_from_fusions() -> None:
    """[6, 64] @ [64, 48], the second stored in one byte each."""
    text = _PROGRAM.format(
        lhs="bf16[6,64]", rhs="s8[64,48]", wide="bf16[64,48]", out="bf16[6,48]",
        result="bf16[6,48]", more="", user="  ROOT %r = bf16[6,48] negate(%f)",
        dims="lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    )  # fmt: skip
    assert _products(text) == [(1, 6, 48, 64, 64 * 48)]


@pytest.mark.parametrize(("stored", "item_bytes"), [("bf16", 2), ("s8", 1)])
def test_weights_that_a_loop_carries_keep_their_dtype(
    stored: str, item_bytes: int
) -> None:
    """[6, 64] @ [64, 48] by cuBLAS, from a carry of both."""
    convert = "" if stored == "bf16" else "%w = bf16[64,48] convert(%v)"
    carry = f"(s32[], bf16[6,64], {stored}[64,48])"
    text = f"""HloModule m, is_scheduled=true
%body (p: {carry}) -> {carry} {{
  %p = {carry} parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[6,64] get-tuple-element(%p), index=1
  %v = {stored}[64,48] get-tuple-element(%p), index=2
  {convert}
  %g = (bf16[6,48], s8[32]) custom-call(%x, {"%w" if convert else "%v"}), custom_call_target="__cublas$lt$matmul", backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}}}}
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  ROOT %t = {carry} tuple(%j, %x, %v)
}}
%more (p: {carry}) -> pred[] {{
  %p = {carry} parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(3)
  ROOT %l = pred[] compare(%i, %n), direction=LT
}}
ENTRY %main (x: bf16[6,64], v: {stored}[64,48]) -> {carry} {{
  %x = bf16[6,64] parameter(0)
  %v = {stored}[64,48] parameter(1)
  %zero = s32[] constant(0)
  %t = {carry} tuple(%zero, %x, %v)
  ROOT %w = {carry} while(%t), condition=%more, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
}}
"""  # noqa: E501
    loops = [s for s in read_ledger(text).steps if isinstance(s, Block)]
    (step,) = [s for s in loops[0].steps if isinstance(s, Step) and s.products]
    (product,) = step.products
    assert (product.m, product.n, product.k) == (6, 48, 64)
    assert product.weight_bytes == 64 * 48 * item_bytes


def test_cycles_of_the_compiler_are_apart() -> None:
    """XLA:TPU writes what it expects of each fusion; nothing is made of that here."""
    text = _PROGRAM.format(
        lhs="bf16[6,64]", rhs="bf16[64,48]", wide="bf16[64,48]", out="bf16[6,48]",
        result="bf16[6,48]", more="", user="  ROOT %r = bf16[6,48] negate(%f)",
        dims="lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    )  # fmt: skip
    said = text.replace(
        "calls=%product", 'calls=%product, backend_config={"estimated_cycles":"2239"}'
    )
    without, found = (lay_out(read_ledger(t), CHIPS["v5e"]) for t in (text, said))
    assert (without.cycles, found.cycles) == (None, 2239)
    assert found.parts == without.parts


def test_a_long_sum_cut_into_a_batch_is_one_product() -> None:
    """[6, 64] @ [64, 48] as eight of [6, 8] @ [8, 48] that are summed up."""
    text = _PROGRAM.format(
        lhs="bf16[8,6,8]", rhs="bf16[8,8,48]", wide="bf16[8,8,48]", out="f32[8,6,48]",
        result="f32[6,48]",
        more="""%sum (s: f32[8,6,48]) -> f32[6,48] {
  %s = f32[8,6,48] parameter(0)
  %z = f32[] constant(0)
  ROOT %t = f32[6,48] reduce(%s, %z), dimensions={0}, to_apply=%add
}""",
        user="  ROOT %r = f32[6,48] fusion(%f), kind=kLoop, calls=%sum",
        dims="lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0},"
        " rhs_contracting_dims={1}",
    )  # fmt: skip
    assert _products(text) == [(1, 6, 48, 64, 2 * 64 * 48)]


def test_what_came_in_is_the_weights() -> None:
    """XLA may write w x as well as x w; [48, 64] is what is read from memory."""
    text = _PROGRAM.format(
        lhs="bf16[64,48]", rhs="bf16[64,6]", wide="bf16[64,6]", out="bf16[48,6]",
        result="bf16[48,6]", more="", user="  ROOT %r = bf16[48,6] negate(%f)",
        dims="lhs_contracting_dims={0}, rhs_contracting_dims={0}",
    ).replace("negate(%x)", "negate(%x), metadata={}")  # fmt: skip
    swapped = text.replace("fusion(%n, %w0)", "fusion(%x, %m)").replace(
        "  %n = bf16[64,48] negate(%x), metadata={}", "  %m = bf16[64,6] negate(%w0)"
    )
    assert _products(swapped) == [(1, 6, 48, 64, 2 * 64 * 48)]


def _sample(name: str, work_s: float, *, links: int = 10, **at) -> Sample:
    """A call takes 1 ms, each kernel 2 us and its work."""
    seconds = 1e-3 + links * (2e-6 + work_s)
    return Sample(
        name=name, at=at, links=links, slots=1, calls=1, call_samples_s=(seconds,),
        steady=True, time="2026-11-24T10:00:00Z",
    )  # fmt: skip


def test_what_was_measured_is_what_a_step_costs() -> None:
    """Products of a shape as long as that shape took, and gaps where they belong."""
    m, n, k = 64, 28672, 4096
    roofline_s = 2 * (m * k + k * n + m * n) / 3.35e12  # memory: 64 rows are few
    each = {"kind": "all-reduce", "group": 2, "bytes": 4096, "by": "xla"}
    samples = (
        *(_sample("kernel", 0.0, links=links, devices=1) for links in (10, 100)),
        _sample("matmul", 1.25 * roofline_s, m=m, n=n, k=k, dtype="bf16",
                weights="bf16"),
        *(_sample("copy", size / 2e12, bytes=size) for size in (1e6, 1e9)),
        _sample("collective", 5e-6, wire=4096, devices=1, **each),
        _sample("apart", 9e-6 + 5e-6, wire=4096, devices=1, **each),
    )  # fmt: skip
    chip = fakes.calibrated(CHIPS["h100"].published(), *samples)
    product = dataclasses.replace(
        _kernel(0),
        cost=_cost(2 * m * n * k, 2 * (m * k + k * n + m * n)),
        products=(
            Product(batch=1, m=m, n=n, k=k, dtype="bf16", weight_bytes=2 * n * k),
        ),
    )
    small = dataclasses.replace(_kernel(0), cost=_cost(0, 4e6))
    reduce = _send("a", 4096, beside=False)
    row = dataclasses.replace(reduce.sends[0], kind="all-reduce")
    reduce = dataclasses.replace(reduce, sends=(row,))
    found = _laid(_loop(3, product, small, reduce), chip=chip)
    assert found.parts["hbm"] == pytest.approx(3 * (1.25 * roofline_s + 4e6 / 2e12))
    assert found.parts["tensor links"] == pytest.approx(3 * 5e-6)
    assert found.parts["overhead"] == pytest.approx(3 * (2 * 2e-6 + 9e-6))
    ledger = Ledger(costs=(), collectives=(), steps=(product,))
    call = estimate(ledger, chip)
    assert call.overhead_s == pytest.approx(1e-3 + 2e-6)


def test_kernels_of_a_decode_step_are_those_of_its_profile() -> None:
    """The shape of docs/performance.md: some ten small kernels a layer, seven large.

    Two layers of a decode step over eight devices: an all-reduce after attention and
    after the MLP of each, and none of pointers, tuples and parameters is a kernel.
    """
    path = DATA / "decode.h100.jax0.12.hlo"
    text, ledger = _read(path)
    found = lay_out(ledger, CHIPS["h100"].published())
    entry = text[text.index("\nENTRY") :]
    counted = len(re.findall(r" (?:fusion|copy|custom-call)\(", entry))
    assert found.kernels == pytest.approx(counted, abs=4)
    assert found.collectives == sum(row.count for row in ledger.collectives)
