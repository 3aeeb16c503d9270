"""Ledgers of programs that the real compilers made equal their closed forms."""

import json
import pathlib
from collections import Counter

import pytest

from experiments.report import kept
from sharding.hlo import Ledger, read_ledger, stored
from sharding.hlo.records import Kernel, Step

DATA = pathlib.Path(__file__).parent / "data" / "hlo"
RECORDS = pathlib.Path(__file__).parents[1] / "docs" / "records"
H200 = RECORDS / "2026-11-28-h200x2" / "programs"

# Sizes of tests/data/hlo/make.py.
D, F, LAYERS, BATCH, CACHE = 512, 1536, 5, 16, 640
HEADS, KV_HEADS, HEAD_DIM = 16, 8, 64
LAYER_WEIGHTS = D * (HEADS + 2 * KV_HEADS) * HEAD_DIM + HEADS * HEAD_DIM * D + 3 * D * F
LAYER_CACHE = 2 * BATCH * KV_HEADS * CACHE * HEAD_DIM
MESHES = {
    "decode": {"data": 1, "stage": 2, "tensor": 4},
    "scan": {"data": 1, "stage": 1, "tensor": 8},
    "pipeline": {"data": 1, "stage": 4, "tensor": 2},
    "collectives": {"data": 2, "stage": 1, "tensor": 4},
    "causal": {"data": 1, "stage": 1, "tensor": 8},
    "gathered": {"data": 8, "stage": 1, "tensor": 1},
    "two_matmuls": {"t": 2},
}


def _ledger(name: str) -> Ledger:
    text = (DATA / f"{name}.hlo").read_text()
    return read_ledger(text, MESHES[name.partition(".")[0]])


def _rows(ledger: Ledger) -> dict[tuple[str, str], tuple[int, int, int, int]]:
    """Returns (axis, kind) -> count, payload each, wire in all, group size."""
    rows: dict[tuple[str, str], tuple[int, int, int, int]] = {}
    for c in ledger.collectives:
        count, each, wire, size = rows.get((c.axis, c.kind), (0, 0, 0, c.group_size))
        assert not count or each == c.payload_bytes_each
        rows[c.axis, c.kind] = (
            count + c.count, c.payload_bytes_each, wire + c.wire_bytes, size
        )  # fmt: skip
    return rows


@pytest.mark.parametrize("path", sorted(DATA.glob("*.hlo")), ids=lambda p: p.name)
def test_every_file_says_what_made_it(path: pathlib.Path) -> None:
    with path.open() as lines:
        assert next(lines).startswith("// jax ")
    assert path.stat().st_size < 60_000


@pytest.mark.parametrize(
    ("name", "most"), [("decode.h100.jax0.12", 1.4), ("decode.v5p.jax0.12", 1.15)]
)
def test_decode_layer(name: str, most: float) -> None:
    ledger = _ledger(name)
    # 2 FLOPs a weight and sequence; scores and mixing: 2 x 2 B N S H.
    products = 2 * BATCH * LAYER_WEIGHTS + 4 * BATCH * HEADS * CACHE * HEAD_DIM
    assert ledger.matmul_flops == products // 4
    assert products // 4 < ledger.flops < 1.02 * products // 4
    # Weights and cache once, bf16; activations come on top. H100's default kernels
    # write f32 partial sums, which at these sizes is a third.
    needed = 2 * (LAYER_WEIGHTS + LAYER_CACHE) // 4
    assert needed < ledger.hbm_bytes < most * needed
    # Megatron: one all-reduce of B D after attention, one after the MLP.
    payload = BATCH * D * 2
    assert _rows(ledger) == {
        ("tensor", "all-reduce"): (2, payload, 2 * 2 * 3 * payload // 4, 4)
    }
    assert {c.source for c in ledger.collectives} == {"make.py:55", "make.py:58"}


@pytest.mark.parametrize(
    ("name", "itemsize"),
    [("scan.h100.jax0.12", 2), ("scan.v5p.jax0.12", 2), ("scan.cpu.jax0.12", 4)],
)
def test_scanned_layers_are_multiplied(name: str, itemsize: int) -> None:
    ledger = _ledger(name)
    products = 2 * BATCH * LAYER_WEIGHTS + 4 * BATCH * HEADS * CACHE * HEAD_DIM
    assert ledger.matmul_flops == LAYERS * products // 8
    assert [loop.trip_count for loop in ledger.loops] == [LAYERS]
    payload = BATCH * D * itemsize  # CPU reduces in f32
    assert _rows(ledger) == {
        ("tensor", "all-reduce"): (2 * LAYERS, payload, 10 * 2 * 7 * payload // 8, 8)
    }
    # Weights are read from their slice or copied out of the stack first, at most
    # 3 times. The cache of a layer is copied out, read, and copied back: both
    # compilers really do, at most 8 times in all. The stack is never touched whole.
    weights, cache = (2 * LAYERS * n // 8 for n in (LAYER_WEIGHTS, LAYER_CACHE))
    if itemsize == 2:
        assert weights + 4 * cache < ledger.hbm_bytes < 1.05 * (3 * weights + 8 * cache)


@pytest.mark.parametrize("name", ["pipeline.h100.jax0.12", "pipeline.v5p.jax0.10"])
def test_pipeline(name: str) -> None:
    ledger = _ledger(name)
    ticks, rows = 6 + 4 - 1, 32
    assert [loop.trip_count for loop in ledger.loops] == [ticks]
    assert ledger.matmul_flops == ticks * 2 * 2 * rows * D * F // 2
    one = rows * D * 2
    assert _rows(ledger) == {
        ("stage", "permute"): (ticks, one, ticks * one, 4),
        ("tensor", "all-reduce"): (ticks, one, ticks * one, 2),  # 2 (n-1)/n = 1
        ("stage", "all-reduce"): (1, 6 * one, 6 * one * 3 // 2, 4),
    }
    assert all(
        c.loop.startswith("while.") and c.loop.endswith(" x9")
        for c in ledger.collectives
        if c.count > 1
    )


@pytest.mark.parametrize(
    "name", ["collectives.cpu.jax0.10", "collectives.h100.jax0.12"]
)
def test_every_kind_of_collective(name: str) -> None:
    whole = 128 * 256 * 4  # one device's part of 256 x 1024, float32
    assert _rows(_ledger(name)) == {
        ("tensor", "reduce-scatter"): (1, whole, whole * 3 // 4, 4),
        ("tensor", "all-gather"): (1, whole, whole * 3 // 4, 4),
        ("tensor", "all-to-all"): (2, whole, 2 * whole * 3 // 4, 4),
        ("data+tensor", "all-reduce"): (1, whole, 2 * whole * 7 // 8, 8),
        ("data", "permute"): (1, whole, whole, 2),
    }


@pytest.mark.parametrize("name", ["causal.h100.jax0.12", "causal.v5p.jax0.12"])
def test_causal_blocks(name: str) -> None:
    ledger = _ledger(name)
    # 1 + 2 + ... + 8 blocks of 128 x 128 x 256, though no text says 36.
    assert ledger.matmul_flops == 36 * 2 * 128 * 128 * 256
    assert [loop.trip_count for loop in ledger.loops] == [8, 4.5]
    assert not ledger.warnings


def test_gathers_that_run_beside_products_count_once() -> None:
    ledger = _ledger("gathered.v5e.jax0.12")
    # 4 weights, gathered once and kept for the gradients; 4 gradients in one sum of
    # which each device keeps its part, in a fusion of all-reduce and 4 slices.
    # Two of the gathers are spread over chains of fusions with products in them.
    weight = 2048 * D * 2
    assert _rows(ledger) == {
        ("data", "all-gather"): (4, weight, 4 * weight * 7 // 8, 8),
        ("data", "reduce-scatter"): (1, 4 * weight, 4 * weight * 7 // 8, 8),
    }
    # 4 products forward, 8 backward, less the gradient of the input.
    assert ledger.matmul_flops == 11 * 2 * (4096 // 8) * D * 2048


def test_xla_gpu_kernels_on_a_real_machine() -> None:
    ledger = _ledger("two_matmuls.h200.jax0.11")
    assert ledger.matmul_flops == 2 * 2 * 2 * 8 * 4096 * 2048
    payload = 8 * 4096 * 2
    assert _rows(ledger) == {("t", "all-reduce"): (2, payload, 2 * payload, 2)}
    # 2 layers of 2 weights; f32 partial sums of split products come on top.
    assert 4 * 4096 * 2048 * 2 < ledger.hbm_bytes < 1.1 * 4 * 4096 * 2048 * 2


def test_kernels_of_this_project_are_told_apart_on_a_real_machine() -> None:
    """A decode step of Llama-3.1-8B on one H200: 32 layers, one sequence."""
    (path,) = H200.glob("tp1_*_batch1_decode_*")
    ledger = read_ledger(kept.read(path)[0].text, {"tensor": 1})
    kernels = Counter(
        step.kernel for step in ledger.steps if isinstance(step, Step) and step.kernel
    )
    shapes = {"qkv": (1, 4096, 6144), "out": (1, 4096, 4096), "down": (1, 14336, 4096)}
    split = [Kernel(name="split_product", sizes=sizes) for sizes in shapes.values()]
    assert all(kernels[each] == 32 for each in split)
    assert kernels[Kernel(name="add", sizes=(1, 5))] == 64  # out and down
    assert kernels[Kernel(name="token_attention")] == 32
    assert kernels[Kernel(name="join_token_attention")] == 32
    assert kernels.total() == 32 * 7
    plain = json.loads(json.dumps(stored.to_plain(ledger)))
    assert stored.from_plain(plain).steps == ledger.steps


def test_without_a_mesh_groups_are_device_ids() -> None:
    ledger = read_ledger((DATA / "decode.v5p.jax0.12.hlo").read_text())
    assert set(ledger.by_axis()) == {"devices {0,1,2,3},{4,5,6,7}"}


def test_a_mesh_of_another_size_is_refused() -> None:
    text = (DATA / "decode.v5p.jax0.12.hlo").read_text()
    with pytest.raises(ValueError, match="4 devices, the program runs on 8"):
        read_ledger(text, {"tensor": 4})


def test_largest() -> None:
    ledger = _ledger("decode.v5p.jax0.12")
    costs = ledger.largest("flops", 3)
    assert len(costs) == 3
    assert costs[0].flops * costs[0].count == max(
        c.flops * c.count for c in ledger.costs
    )
    with pytest.raises(ValueError, match="seconds"):
        ledger.largest("seconds")


HEAD = "HloModule m, num_partitions=4\n"
ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}
"""
GROUPS = "channel_id=1, replica_groups=[2,2]<=[4], use_global_device_ids=true"


def _collectives(line: str, before: str = "", shapes: str = "f32[8] f32[6]") -> list:
    parameters = "\n".join(
        f"  %{name} = {shape} parameter({i})"
        for i, (name, shape) in enumerate(zip("abc", shapes.split(), strict=False))
    )
    entry = f"ENTRY %e () -> f32[] {{\n{parameters}\n  ROOT %r = {line}\n}}\n"
    ledger = read_ledger(f"{HEAD}{ADD}{before}\n{entry}", {"x": 2, "y": 2})
    return [
        (c.axis, c.kind, c.payload_bytes, c.wire_bytes, c.group_size)
        for c in ledger.collectives
    ]


REDUCE_SCATTER = f"""
%scattered (p: f32[8], i: s32[]) -> f32[4] {{
  %p = f32[8] parameter(0)
  %i = s32[] parameter(1)
  %all = f32[8] all-reduce(%p), {GROUPS}, to_apply=%add
  ROOT %mine = f32[4] dynamic-slice(%all, %i), dynamic_slice_sizes={{4}}
}}
"""
ASYNC = f"""
%wrapped (p: f32[8]) -> f32[4] {{
  %p = f32[8] parameter(0)
  ROOT %mine = f32[4] reduce-scatter(%p), {GROUPS}, dimensions={{0}}, to_apply=%add
}}
"""


@pytest.mark.parametrize(
    ("line", "before", "expected"),
    [
        (f"(f32[8], f32[6]) all-reduce(%a, %b), {GROUPS}, to_apply=%add", "",
         ("y", "all-reduce", 56, 56, 2)),
        # listed twice, sent once
        (f"(f32[16], f32[16]) all-gather(%a, %a), {GROUPS}, dimensions={{0}}", "",
         ("y", "all-gather", 64, 32, 2)),
        (f"((f32[8]), f32[16]) all-gather-start(%a), {GROUPS}, dimensions={{0}}", "",
         ("y", "all-gather", 64, 32, 2)),
        ("f32[4] fusion(%a, %i), kind=kLoop, calls=%scattered", REDUCE_SCATTER,
         ("y", "reduce-scatter", 32, 16, 2)),
        ("((f32[8]), f32[4], u32[]) async-start(%a), calls=%wrapped", ASYNC,
         ("y", "reduce-scatter", 32, 16, 2)),
        ("f32[8] collective-permute(%a), source_target_pairs={{0,2},{1,3}}", "",
         ("x", "permute", 32, 32, 2)),
        ("f32[8] collective-broadcast(%a), replica_groups={{0,1},{2,3}}", "",
         ("y", "broadcast", 32, 32, 2)),
        ("f32[8] all-to-all(%a), channel_id=1, replica_groups={{0,2},{1,3}}", "",
         ("x", "all-to-all", 32, 16, 2)),
        # no global ids: the one replica, with all its partitions
        ("f32[8] all-reduce(%a), channel_id=1, replica_groups={{0}}, to_apply=%add", "",
         ("x+y", "all-reduce", 32, 48, 4)),
        # alone in a group: nothing is sent
        ("f32[8] all-reduce(%a), replica_groups={{0}}, to_apply=%add", "", None),
        ("f32[8] collective-permute(%a), source_target_pairs={{0,0},{1,1}}", "", None),
    ],
    ids=["combined", "twice", "start", "fused", "wrapped", "permute", "broadcast",
         "exchange", "replicas", "alone", "itself"],
)  # fmt: skip
def test_collective(line: str, before: str, expected: tuple | None) -> None:
    line = line.replace("%i", "%b") if "calls=%scattered" in line else line
    shapes = "f32[8] s32[]" if "calls=%scattered" in line else "f32[8] f32[6]"
    found = _collectives(line, before, shapes)
    assert found == ([expected] if expected else [])


def test_unknown_groups_stop_the_reader_with_the_instruction() -> None:
    with pytest.raises(ValueError, match=r"no known spelling.*%r = .*all-reduce"):
        _collectives("f32[8] all-reduce(%a), replica_groups=<1,2>, to_apply=%add")


def test_a_conditional_counts_as_its_costliest_branch() -> None:
    text = """HloModule m
%cheap (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8] parameter(0)
}
%dear (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  ROOT %e = f32[8] exponential(%x)
}
ENTRY %e (p: pred[], x: f32[8]) -> f32[8] {
  %p = pred[] parameter(0)
  %x = f32[8] parameter(1)
  ROOT %c = f32[8] conditional(%p, %x, %x), branch_computations={%dear, %cheap}
}
"""
    ledger = read_ledger(text)
    assert (ledger.flops, ledger.hbm_bytes) == (8, 64)
    assert ledger.warnings == ("c is a conditional; its costliest branch is counted.",)


STEPS = """\
HloModule m, num_partitions=2
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}
%send (t: (f32[64])) -> (f32[64]) {
  %t = (f32[64]) parameter(0)
  %x = f32[64] get-tuple-element(%t), index=0
  %y = f32[64] collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %u = (f32[64]) tuple(%y)
}
%keep (t: (f32[64])) -> (f32[64]) {
  %t = (f32[64]) parameter(0)
  %x = f32[64] get-tuple-element(%t), index=0
  %wide = f32[64,99] broadcast(%x), dimensions={0}
  %y = f32[64] slice(%wide), slice={[0:64], [0:1]}
  ROOT %u = (f32[64]) tuple(%y)
}
%body (c: (s32[], f32[64])) -> (s32[], f32[64]) {
  %c = (s32[], f32[64]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[64] get-tuple-element(%c), index=1
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  %four = s32[] constant(4)
  %seed = s32[] rng(%one, %four), distribution=rng_uniform
  %p = pred[] compare(%j, %four), direction=LT
  %q = pred[] compare(%j, %seed), direction=LT
  %t = (f32[64]) tuple(%x)
  %z = (f32[64]) conditional(CHOICE, %t, %t), BRANCHES
  %y = f32[64] get-tuple-element(%z), index=0
  ROOT %r = (s32[], f32[64]) tuple(%j, %y)
}
%test (c: (s32[], f32[64])) -> pred[] {
  %c = (s32[], f32[64]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %four = s32[] constant(4)
  ROOT %p = pred[] compare(%i, %four), direction=LT
}
ENTRY %main (x: f32[64]) -> (s32[], f32[64]) {
  %x = f32[64] parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[64]) tuple(%zero, %x)
  ROOT %w = (s32[], f32[64]) while(%t), condition=%test, body=%body
}
"""


@pytest.mark.parametrize(
    ("choice", "branches", "sent"),
    [
        # The last of 4 turns sends nothing, as in XLA's windowed products.
        ("%p", "true_computation=%send, false_computation=%keep", 3),
        ("%p", "branch_computations={%keep, %send}", 1),
        # Counter 0 1 2 3 among 2 branches: all but the first take the last.
        ("%i", "branch_computations={%keep, %send}", 3),
        ("%i", "branch_computations={%send, %keep}", 1),
    ],
)
def test_a_conditional_on_the_counter_takes_the_branches_it_takes(
    choice: str, branches: str, sent: int
) -> None:
    text = STEPS.replace("CHOICE", choice).replace("BRANCHES", branches)
    ledger = read_ledger(text, {"x": 2})
    assert [(c.kind, c.count) for c in ledger.collectives] == [("permute", sent)]
    copies = [c.count for c in ledger.costs if c.name == "y"]
    assert (copies, ledger.warnings) == ([4 - sent], ())


def test_a_branch_that_is_left_out_says_what_it_sends() -> None:
    """The dear branch is counted, but no collective is dropped in silence."""
    branches = "branch_computations={%keep, %send}"
    text = STEPS.replace("CHOICE", "%q").replace("BRANCHES", branches)
    ledger = read_ledger(text, {"x": 2})
    assert not ledger.collectives
    assert "leaves out permute over x" in ledger.warnings[0]


def test_a_scatter_of_several_results_keeps_a_slice_of_each() -> None:
    tuple_of = "(f32[8], f32[6]) all-reduce(%a, %b), " + GROUPS + ", to_apply=%add"
    body = f"""
%both (a: f32[8], b: f32[6], i: s32[]) -> (f32[4], f32[3]) {{
  %a = f32[8] parameter(0)
  %b = f32[6] parameter(1)
  %i = s32[] parameter(2)
  %all = {tuple_of}
  %x = f32[8] get-tuple-element(%all), index=0
  %y = f32[6] get-tuple-element(%all), index=1
  %c = f32[4] dynamic-slice(%x, %i), dynamic_slice_sizes={{4}}
  %d = f32[3] dynamic-slice(%y, %i), dynamic_slice_sizes={{3}}
  ROOT %t = (f32[4], f32[3]) tuple(%c, %d)
}}
"""
    line = "(f32[4], f32[3]) fusion(%a, %b, %c), kind=kCustom, calls=%both"
    shapes = "f32[8] f32[6] s32[]"
    assert _collectives(line, body, shapes) == [("y", "reduce-scatter", 56, 28, 2)]
    # One of them kept whole: a reduction.
    kept = body.replace("tuple(%c, %d)", "tuple(%c, %y)").replace("f32[3])", "f32[6])")
    line = line.replace("f32[3])", "f32[6])")
    assert _collectives(line, kept, shapes) == [("y", "all-reduce", 56, 56, 2)]


def test_a_gathered_argument_gets_the_line_of_its_first_user() -> None:
    text = """HloModule m, num_partitions=2

FileNames
1 "/home/me/model.py"

FileLocations
1 {file_name_id=1 line=12}
2 {file_name_id=1 line=34}

StackFrames
1 {file_location_id=1}
2 {file_location_id=2}

ENTRY %e (w: f32[4]) -> f32[8] {
  %w = f32[4] parameter(0), metadata={op_name="w"}
  %g = f32[8] all-gather(%w), replica_groups={{0,1}}, dimensions={0}, METADATA
  %b = f32[8] bitcast(%g)
  %s = f32[8] sine(%b), metadata={op_name="jit(f)/sin" stack_frame_id=2}
  ROOT %t = f32[8] cosine(%s), metadata={op_name="jit(f)/cos" stack_frame_id=1}
}
"""
    for metadata, source in (
        ('metadata={op_name="w"}', "model.py:34"),
        ('metadata={op_name="w" stack_frame_id=1}', "model.py:12"),
    ):
        (row,) = read_ledger(text.replace("METADATA", metadata)).collectives
        assert (row.op_name, row.source) == ("w", source)


def test_a_gathered_result_gets_the_line_that_made_it() -> None:
    text = """HloModule m, num_partitions=2

ENTRY %e (w: f32[4]) -> f32[8] {
  %w = f32[4] parameter(0), metadata={op_name="w"}
  %s = f32[4] sine(%w), metadata={op_name="sin" source_file="a.py" source_line=7}
  %c = f32[4] copy(%s)
  ROOT %g = f32[8] all-gather(%c), replica_groups={{0,1}}, dimensions={0}
}
"""
    (row,) = read_ledger(text).collectives
    assert row.source == "a.py:7"


def test_names_of_mesh_axes_may_hold_brackets_and_commas() -> None:
    """As jax 0.12 prints a psum over the axis `x],{(` of a mesh."""
    text = """HloModule m, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

ENTRY %e (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  ROOT %r = f32[4] all-reduce(%x), replica_groups=mesh['a b'=2,'x],{('=4] {'x],{('}, use_global_device_ids=true, to_apply=%add
}
"""  # noqa: E501
    (row,) = read_ledger(text, {"a b": 2, "x],{(": 4}).collectives
    assert (row.axis, row.kind, row.payload_bytes) == ("x],{(", "all-reduce", 16)


@pytest.mark.parametrize(
    ("addition", "body", "source"),
    [
        ("stack_frame_id=1", "stack_frame_id=2", "model.py:12"),  # who wrote the sum
        ("", "stack_frame_id=2", "model.py:34"),  # what is summed, in a fusion
        ("", "", "model.py:56"),  # who uses it
    ],
)
def test_a_sum_without_a_line_gets_that_of_what_is_summed(
    addition: str, body: str, source: str
) -> None:
    text = f"""HloModule m, num_partitions=2

FileNames
1 "/home/me/model.py"

FileLocations
1 {{file_name_id=1 line=12}}
2 {{file_name_id=1 line=34}}
3 {{file_name_id=1 line=56}}

StackFrames
1 {{file_location_id=1}}
2 {{file_location_id=2}}
3 {{file_location_id=3}}

%add (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %a = f32[] add(%x, %y), metadata={{op_name="add" {addition}}}
}}

%made (p: f32[4]) -> f32[4] {{
  %p = f32[4] parameter(0)
  %c = f32[4] cosine(%p), metadata={{op_name="jit(f)/cos" {body}}}
  ROOT %b = f32[4] negate(%c)
}}

ENTRY %e (w: f32[4]) -> f32[4] {{
  %w = f32[4] parameter(0), metadata={{op_name="w"}}
  %f = f32[4] fusion(%w), kind=kLoop, calls=%made
  %k = f32[4] copy(%f)
  %r = f32[4] all-reduce(%k), replica_groups={{{{0,1}}}}, to_apply=%add
  ROOT %s = f32[4] sine(%r), metadata={{op_name="jit(f)/sin" stack_frame_id=3}}
}}
"""
    (row,) = read_ledger(text).collectives
    assert row.source == source


def test_calls_that_fan_out_without_end_are_refused() -> None:
    """Each computation calls the one before it twice: 2^40 runs of the first."""
    shape = "f32[8]{0}"
    lines = ["HloModule deep, is_scheduled=true", ""]
    lines += [f"%c0 (p: {shape}) -> {shape} {{", f"  ROOT %p = {shape} parameter(0)"]
    for i in range(1, 40):
        call = f"call(%{{}}), to_apply=%c{i - 1}"
        lines += [
            "}",
            "",
            f"%c{i} (p.{i}: {shape}) -> {shape} {{",
            f"  %p.{i} = {shape} parameter(0)",
            f"  %x.{i} = {shape} {call.format(f'p.{i}')}",
            f"  ROOT %y.{i} = {shape} {call.format(f'x.{i}')}",
        ]
    lines += ["}", "", f"ENTRY %main (q: {shape}) -> {shape} {{"]
    lines += [
        f"  %q = {shape} parameter(0)",
        f"  ROOT %r = {shape} call(%q), to_apply=%c39",
    ]
    with pytest.raises(ValueError, match="calls that fan out without end"):
        read_ledger("\n".join([*lines, "}"]))
