"""What a person is told to look at is there, and what is not there is not told."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.config import PRESETS
from jaxllm.model import Layers
from sharding.hlo import Advice, Analysis, analyze, assert_donated
from sharding.partition import Partition, Workload
from sharding.program import Phase, Program
from sharding.target import parse_target

DATA = pathlib.Path(__file__).parent / "data" / "hlo"
MESHES = {
    "decode": {"data": 1, "stage": 2, "tensor": 4},
    "scan": {"data": 1, "stage": 1, "tensor": 8},
    "pipeline": {"data": 1, "stage": 4, "tensor": 2},
    "collectives": {"data": 2, "stage": 1, "tensor": 4},
    "gathered": {"data": 8, "stage": 1, "tensor": 1},
}


def of_file(name: str) -> Analysis:
    return analyze(DATA / f"{name}.hlo", MESHES[name.partition(".")[0]])


def kinds(found: Analysis) -> set[str]:
    return {advice.kind for advice in found.advice}


def only(found: Analysis, kind: str) -> Advice:
    (advice,) = [a for a in found.advice if a.kind == kind]
    assert advice.change
    assert advice.evidence
    return advice


def by_hand(body: str, parameters: str, header: str = "", called: str = "") -> Analysis:
    text = f"HloModule m, is_scheduled=true, num_partitions=4{header}\n\n{called}\n"
    return analyze(text + f"ENTRY %main () -> f32[] {{\n{parameters}{body}}}\n")


BIG = "f32[1024,1024]{1,0}"  # 4 MiB
GROUPS = "replica_groups={{0,1,2,3}}, channel_id=1, use_global_device_ids=true"
X = f'  %x = {BIG} parameter(0), metadata={{op_name="w"}}\n'
SUM = """\
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}
"""
DOT = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"


@pytest.mark.parametrize(
    "name",
    [
        "collectives.cpu.jax0.10",
        "collectives.h100.jax0.12",
        "decode.h100.jax0.12",
        "decode.v5p.jax0.12",
        "pipeline.h100.jax0.12",
        "pipeline.v5p.jax0.10",
    ],
)
def test_programs_that_do_what_they_must_are_left_alone(name: str) -> None:
    assert of_file(name).advice == ()


def test_weights_gathered_where_they_are_used() -> None:
    found = of_file("gathered.v5e.jax0.12")
    advice = only(found, "weight-gathered")
    assert advice.what == "weights[*][*] is gathered over data"
    # Two layers of two weights, each gathered whole, in bf16.
    assert (advice.num_bytes, advice.count) == (2 * 2 * 512 * 2048 * 2, 4)
    assert advice.source.startswith("make.py:")


@pytest.mark.parametrize("name", ["scan.h100.jax0.12", "scan.v5p.jax0.12"])
def test_a_scanned_cache_is_copied_out_of_its_stack(name: str) -> None:
    found = of_file(name)
    copied = [a for a in found.advice if a.kind == "cache-copied"]
    assert {a.what for a in copied} == {
        "keys, donated, is copied",
        "values, donated, is copied",
    }
    # 5 layers' slices of 16 x 640 x 64 bf16, one KV head a device.
    assert {a.num_bytes for a in copied} == {5 * 16 * 640 * 64 * 2}


def test_a_gather_through_a_conversion_in_a_loop() -> None:
    """The weight goes into the loop whole, is sliced, converted, gathered."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P(None, None, "tensor"))
    weights = jax.ShapeDtypeStruct((3, 64, 64), jnp.float32, sharding=split)
    whole = NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=whole)

    def run(weights, x):
        def body(x, w):
            w = jax.lax.with_sharding_constraint(w.astype(jnp.bfloat16), whole)
            return jnp.tanh(x @ w.astype(jnp.float32)), None

        return jax.lax.scan(body, x, weights)[0]

    found = analyze(jax.jit(run).lower(weights, x).compile())
    advice = only(found, "weight-gathered")
    assert advice.what == "weights is gathered over tensor"
    assert advice.count == 3


def test_an_activation_may_be_gathered() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("tensor")), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)

    def run(x):
        y = jax.lax.with_sharding_constraint(jnp.sin(x), split)
        return jax.lax.with_sharding_constraint(y, whole)

    found = analyze(jax.jit(run).lower(x).compile())
    assert [row.kind for row in found.ledger.collectives] == ["all-gather"]
    assert not found.advice


def test_donated_in_vain() -> None:
    def run(cache, x):
        return x + jnp.sum(cache)

    cache, x = jnp.zeros((64, 64)), jnp.zeros(3)
    with pytest.warns(UserWarning, match="donated buffers were not usable"):
        compiled = jax.jit(run, donate_argnums=0).lower(cache, x).compile()
    advice = only(analyze(compiled), "not-aliased")
    assert advice.what == "cache f32[64,64] is donated in vain"
    assert advice.num_bytes == 64 * 64 * 4


def test_kept_wider_than_it_came() -> None:
    found = by_hand(
        f"  %wide = {BIG} convert(%x)\n  ROOT %y = {BIG} dot(%wide, %wide), {DOT}\n",
        '  %x = bf16[1024,1024]{1,0} parameter(0), metadata={op_name="w"}\n',
    )
    advice = only(found, "widened-copy")
    assert advice.what == "w is kept as f32 beside its bf16"
    assert advice.num_bytes == 4 << 20


def test_a_weight_that_is_dequantised_in_memory() -> None:
    """Values times scales, written out; the same inside of a product is no finding."""
    wide = "bf16[8,1024,1024]{2,1,0}"
    called = f"""\
%dequantise (v: s4[8,1024,1024], s: bf16[8,1024]) -> bf16[8,1024,1024] {{
  %v = s4[8,1024,1024]{{2,1,0}} parameter(0)
  %s = bf16[8,1024]{{1,0}} parameter(1)
  %c = {wide} convert(%v)
  %b = {wide} broadcast(%s), dimensions={{0,1}}
  ROOT %m = {wide} multiply(%b, %c)
}}
"""
    parameters = (
        "  %v = s4[8,1024,1024]{2,1,0} parameter(0),"
        ' metadata={op_name="w"}\n'
        '  %s = bf16[8,1024]{1,0} parameter(1), metadata={op_name="s"}\n'
    )
    body = f"  ROOT %f = {wide} fusion(%v, %s), kind=kLoop, calls=%dequantise\n"
    advice = only(by_hand(body, parameters, called=called), "widened-copy")
    assert advice.what == "w is kept as bf16 beside its s4"
    assert advice.num_bytes == 16 << 20
    assert "scales" in advice.change


def test_a_constant_of_size() -> None:
    array = np.random.default_rng(0).normal(size=(512, 640)).astype(np.float32)
    found = analyze(jax.jit(lambda x: x @ array).lower(jnp.zeros((2, 512))).compile())
    advice = only(found, "constant-captured")
    assert advice.num_bytes == 512 * 640 * 4


def test_an_all_reduce_of_which_a_slice_is_read() -> None:
    cut = "f32[256,1024]{1,0}"
    body = (
        f"  %y = {BIG} dot(%x, %x), {DOT}\n"
        f"  %r = {BIG} all-reduce(%y), {GROUPS}, to_apply=%sum\n"
        "  %i = s32[] constant(0)\n"
        f"  %s = {cut} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={{256,1024}}\n"
    )
    sliced = by_hand(f"{body}  ROOT %e = {cut} exponential(%s)\n", X, called=SUM)
    advice = only(sliced, "could-be-scattered")
    assert advice.num_bytes == 4 << 20
    assert "1/4 of an all-reduce" in advice.what
    whole = by_hand(f"{body}  ROOT %t = ({cut}, {BIG}) tuple(%s, %r)\n", X, called=SUM)
    assert "could-be-scattered" not in kinds(whole)


def test_gathered_again_what_was_scattered() -> None:
    cut = "f32[256,1024]{1,0}"
    found = by_hand(
        f"  %y = {BIG} dot(%x, %x), {DOT}\n"
        f"  %s = {cut} reduce-scatter(%y), {GROUPS}, dimensions={{0}}, to_apply=%sum\n"
        f"  %c = {cut} copy(%s)\n"
        f"  ROOT %g = {BIG} all-gather(%c), {GROUPS}, dimensions={{0}}\n",
        X,
        called=SUM,
    )
    assert only(found, "gathered-again").num_bytes == 4 << 20
    assert "weight-gathered" not in kinds(found)


def test_an_operand_listed_three_times() -> None:
    found = by_hand(
        f"  %y = {BIG} dot(%x, %x), {DOT}\n"
        "  ROOT %g = (f32[4096,1024]{1,0}, f32[4096,1024]{1,0}, f32[4096,1024]{1,0})"
        f" all-gather(%y, %y, %y), {GROUPS}, dimensions={{0}}\n",
        X,
    )
    advice = only(found, "operand-repeated")
    assert advice.what.startswith("2 of 3 operands of one all-gather")
    assert advice.num_bytes == 2 * 4 << 20


@pytest.mark.parametrize("beside", [True, False])
def test_a_collective_with_nothing_beside_it(beside: bool) -> None:
    work = f"  %z = {BIG} dot(%x, %x), {DOT}\n"
    started = f"  %s = {BIG} all-reduce-start(%y), {GROUPS}, to_apply=%sum\n"
    found = by_hand(
        f"  %y = {BIG} dot(%x, %x), {DOT}\n"
        + (started + work if beside else work + started)
        + f"  %d = {BIG} all-reduce-done(%s)\n"
        f"  ROOT %o = {BIG} add(%d, %z)\n",
        X,
        called=SUM,
    )
    assert kinds(found) == (set() if beside else {"not-overlapped"})


def test_most_bytes_come_first() -> None:
    found = of_file("scan.cpu.jax0.12")
    sizes = [advice.num_bytes for advice in found.advice]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) > 3


@pytest.mark.parametrize(
    ("target", "partition", "phase", "layers", "possible"),
    [
        ("h100:8", "tp8", "decode", "unrolled", set()),
        ("v5p:2x2x2", "tp8", "decode", "scanned", set()),
        ("v5p:2x2x2", "tp4_pp2", "decode", "scanned", set()),
        # All-reduces of 134 MB that the next product waits for.
        ("h100:8", "tp8", "prefill", "unrolled", {"not-overlapped"}),
        # A scan slices the cache of every layer out of its stack, older compilers
        # every weight too.
        ("h100:8", "tp8", "decode", "scanned", {"argument-copied", "cache-copied"}),
        # Older CPU compilers multiply in float32, so the weights are widened first.
        ("cpu:8", "tp8", "decode", "unrolled", {"widened-copy", "cache-copied"}),
    ],
)
def test_our_own_programs(
    target: str, partition: str, phase: Phase, layers: Layers, possible: set[str]
) -> None:
    program = Program(
        phase=phase,
        config=dataclasses.replace(PRESETS["llama-3.1-8b"], num_layers=2),
        partition=Partition.parse(partition, "megatron"),
        workload=Workload(batch_size=16, input_len=2048, output_len=128),
        layers=layers,
    )
    executable = program.compile(parse_target(target)).executable
    # The mesh is that of the arguments.
    found = analyze(executable)
    assert found.axes == dict(program.partition.axes)
    assert kinds(found) <= possible
    assert found.advice or not possible or target == "cpu:8"
    if layers == "unrolled" and phase == "decode":
        assert_donated(executable, 1)
    memory = found.memory
    assert memory.xla is not None
    assert memory.argument_bytes == memory.xla.argument_bytes
    assert memory.peak_bytes == pytest.approx(memory.xla.total_bytes, rel=0.1)
