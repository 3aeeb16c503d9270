"""One call says what a compiled program does, in whatever form it comes."""

import dataclasses
import gzip
import html
import pathlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.chips import CHIPS
from sharding.estimate import collective_time_s, estimate
from sharding.hlo import Analysis, analyze, read_ledger

DATA = pathlib.Path(__file__).parent / "data" / "hlo"
DECODE = DATA / "decode.h100.jax0.12.hlo"
DECODE_MESH = {"data": 1, "stage": 2, "tensor": 4}
D, F, B = 48, 96, 8


def mlp(params, cache, x):
    hidden = jax.nn.relu(x @ params["up"])
    return hidden @ params["down"], cache.at[0].set(hidden[0])


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def compiled(mesh: Mesh):
    def array(shape, *axes):
        sharding = NamedSharding(mesh, P(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    params = {"up": array((D, F), None, "tensor"), "down": array((F, D), "tensor")}
    cache, x = array((6, F), None, "tensor"), array((B, D), "data")
    return jax.jit(mlp, donate_argnums=1).lower(params, cache, x).compile()


def test_a_compiled_function(compiled, mesh: Mesh) -> None:
    found = analyze(compiled)
    assert (found.name, found.num_devices, found.axes) == (
        "jit_mlp",
        8,
        dict(mesh.shape),
    )
    assert found.matmul_flops == 2 * 2 * (B // 2) * D * (F // 4)
    # One all-reduce of the output after the second product, Megatron's.
    rows = [r for r in found.ledger.by_axis()["tensor"] if r.kind == "all-reduce"]
    assert [(r.count, r.payload_bytes) for r in rows] == [(1, B // 2 * D * 4)]
    assert found.ledger == read_ledger(compiled.as_text(), dict(mesh.shape))
    assert found.payload_bytes["tensor"] == rows[0].payload_bytes
    assert found.wire_bytes["tensor"] == rows[0].wire_bytes == B // 2 * D * 4 * 3 // 2
    assert {a.name: (a.num_bytes, a.aliased_bytes) for a in found.memory.arguments} == {
        "params['down']": (F // 4 * D * 4, 0),
        "params['up']": (D * F // 4 * 4, 0),
        "cache": (6 * F // 4 * 4, 6 * F // 4 * 4),
        "x": (B // 2 * D * 4, 0),
    }
    assert [a.is_donated for a in found.memory.arguments] == [False, False, True, False]
    assert found.memory.xla is not None
    assert found.memory.alias_bytes == found.memory.xla.alias_bytes
    assert found.xla_flops is not None
    assert found.roofline is None


def test_every_form_of_a_program_says_the_same(
    compiled, mesh: Mesh, tmp_path: pathlib.Path
) -> None:
    text = compiled.as_text()
    (tmp_path / "program.txt").write_text(text)
    (tmp_path / "program.txt.gz").write_bytes(gzip.compress(text.encode()))
    expected = analyze(compiled, mesh)
    for form in (
        text,
        tmp_path / "program.txt",
        str(tmp_path / "program.txt.gz"),
        text.encode(),
    ):
        found = analyze(form, {"data": 2, "tensor": 4})
        assert found.ledger == expected.ledger
        assert found.memory.peak == expected.memory.peak
        assert (found.memory.xla, found.xla_flops) == (None, None)


@pytest.mark.parametrize("spoil", [lambda b: b[:90], lambda b: b[:30] + b[60:]])
def test_a_file_of_gzip_that_was_not_copied_whole(
    tmp_path: pathlib.Path, spoil: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "a.txt.gz").write_bytes(spoil(gzip.compress(bytes(range(256)))))
    with pytest.raises(ValueError, match=r"a\.txt\.gz cannot be unpacked: .* bytes\)"):
        analyze(tmp_path / "a.txt.gz")


def test_without_a_mesh_text_shows_device_sets(compiled) -> None:
    found = analyze(compiled.as_text())
    assert found.axes == {}
    assert "devices {0,1,2,3},{4,5,6,7}" in found.wire_bytes


# A message's fields: number, then an int or bytes.
def message(*fields: tuple[int, int | bytes]) -> bytes:
    def varint(n: int) -> bytes:
        low, rest = n & 127, n >> 7
        return bytes([low | 128]) + varint(rest) if rest else bytes([low])

    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(varint(number << 3) + varint(value))
        else:
            parts.append(varint(number << 3 | 2) + varint(len(value)) + value)
    return b"".join(parts)


@pytest.fixture(scope="module")
def module_proto(compiled) -> bytes:
    (module,) = compiled.runtime_executable().hlo_modules()
    return module.as_serialized_hlo_module_proto()


DEVICES = (
    15,
    message((1, 1), (2, 8), *[(3, message((1, bytes([d])))) for d in range(8)]),
)


def test_a_proto_is_read(compiled, mesh: Mesh, module_proto: bytes, tmp_path) -> None:
    # What the header of the text says is in the device assignment of a dump.
    assignment = b"".join([
        message((3, message((1, 0), (2, 1000), (5, 1), (6, 0)))),
        message((3, message((1, 1), (2, 300), (5, 1), (6, 1), (7, 1)))),
        message((3, message((1, 2), (2, 50), (7, 1)))),
        message((3, message((1, 3), (2, 7000)))),
        message((3, message((1, 4), (2, 9), (12, 1)))),
        message((3, message((1, 5), (2, 4), (3, 1)))),
    ])  # fmt: skip
    module = module_proto + (b"" if has_devices(module_proto) else message(DEVICES))
    path = tmp_path / "module.hlo.pb"
    path.write_bytes(message((1, module), (3, assignment)))
    found, expected = analyze(path, mesh), analyze(compiled)
    assert found.num_devices == 8
    assert (found.flops, found.wire_bytes) == (expected.flops, expected.wire_bytes)
    assert found.hbm_bytes == expected.hbm_bytes
    assert {c.source for c in found.ledger.collectives} == {
        c.source for c in expected.ledger.collectives
    }
    xla = found.memory.xla
    assert xla is not None
    assert (xla.argument_bytes, xla.output_bytes) == (1300, 350)
    assert (xla.alias_bytes, xla.temporary_bytes) == (300, 7000)
    assert analyze(module, mesh).flops == expected.flops  # the module alone


def has_devices(module: bytes) -> bool:
    return message(DEVICES) in module


def test_a_snapshot_is_refused(module_proto: bytes) -> None:
    snapshot = message((1, message((1, module_proto))), (4, b"cpu"))
    with pytest.raises(ValueError, match=r"HloSnapshot.*after_optimizations"):
        analyze(snapshot)


@pytest.mark.parametrize(
    ("program", "error", "words"),
    [
        (b"", ValueError, "holds no program"),
        (b"\x7fELF\x02\x01", ValueError, r"ELF.*--xla_dump_to"),
        (b"\x0a\xff\xff", ValueError, "holds no program"),
        ("no/such/file.txt", ValueError, r"no file 'no/such/file.txt'"),
        ("", ValueError, "the text is empty"),
        ("some\nlines", ValueError, "the text holds no program.*begins with 'some"),
        ("module @jit_f {\n}\n", ValueError, r"is StableHLO.*compile\(\).as_text"),
        (7, TypeError, "cannot inspect a int"),
    ],
)
def test_what_is_no_program_is_refused(program, error, words: str) -> None:
    with pytest.raises(error, match=words):
        analyze(program)


def test_what_is_not_compiled_is_refused() -> None:
    lowered = jax.jit(jnp.sin).lower(1.0)
    with pytest.raises(TypeError, match=r"Lowered.*Call .compile\(\) on it"):
        analyze(lowered)


def test_a_proto_that_jaxlib_cannot_read_is_refused() -> None:
    module = message((1, b"jit_f"), (2, b"main"), (3, b"\x0a\x04main"), (4, b"\xff"))
    with pytest.raises(ValueError, match="jaxlib"):
        analyze(message((1, module)))


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"data": 2, "tensor": 2}, ValueError, r"4 devices, the program runs on 8"),
        ({"tensor": 0}, ValueError, r"\{'tensor': 0\}"),
        (8, TypeError, "cannot read mesh 8 of type int"),
    ],
)
def test_a_wrong_mesh_is_refused(compiled, wrong, error, words: str) -> None:
    with pytest.raises(error, match=words):
        analyze(compiled, wrong)


def test_time_bounds_are_those_of_the_estimate() -> None:
    # Of a chip at its peaks: the bounds know no curves.
    chip = CHIPS["h100"].published()
    found = analyze(
        DECODE,
        DECODE_MESH,
        chip,
        collective_time_s=lambda row: collective_time_s(row, chip),
    )
    roofline = found.roofline
    assert roofline is not None
    expected = estimate(found.ledger, chip)
    assert roofline.total_s == pytest.approx(expected.total_s - expected.overhead_s)
    assert roofline.time_s["hbm"] == pytest.approx(expected.hbm_s)
    assert roofline.time_s["compute"] == pytest.approx(expected.compute_s)
    links = roofline.time_s["links"] + roofline.time_s["latency"]
    assert links == pytest.approx(sum(expected.collective_s.values()))
    # 16 KiB over NVLink take 0.1 us, starting takes 28.
    slowest = roofline.top[0]
    assert (slowest.opcode, slowest.limit, slowest.axis) == (
        "all-reduce", "latency", "tensor"
    )  # fmt: skip
    product = max(roofline.top, key=lambda bound: bound.matmul_flops)
    assert (product.dtype, product.limit) == ("bf16", "hbm")
    # A weight of 2 bytes is read for 16 sequences: 16 FLOPs a byte, less activations.
    assert 12 < product.flops_per_byte < 16
    assert roofline.flops_per_s == {"bf16": chip.flops_per_s["bf16"]}


def test_what_binds_depends_on_the_rates() -> None:
    h100 = CHIPS["h100"]
    slow = dataclasses.replace(h100, flops_per_s={"bf16": 1e9}, vector_flops_per_s=1e12)
    thin = dataclasses.replace(h100, link_bytes_per_s=1e3)
    limits = {}
    for name, chip in {"h100": h100, "slow": slow, "thin": thin}.items():
        roofline = analyze(DECODE, DECODE_MESH, chip).roofline
        assert roofline is not None
        limits[name] = roofline.top[0].limit
    assert limits == {"h100": "latency", "slow": "compute", "thin": "links"}


def test_an_unscheduled_text_says_so() -> None:
    text = DECODE.read_text().replace("is_scheduled=true, ", "")
    found = analyze(text, DECODE_MESH)
    assert not found.memory.is_scheduled
    assert "is_scheduled" in found.warnings[-1]


def test_a_loop_of_unknown_length_is_per_iteration() -> None:
    def until(x, limit):
        return jax.lax.while_loop(
            lambda c: jnp.sum(c) < limit, lambda c: jnp.tanh(c @ c) + c, x
        )

    x = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    compiled = jax.jit(until).lower(x, jax.ShapeDtypeStruct((), jnp.float32)).compile()
    found = analyze(compiled, chip=CHIPS["h100"])
    (loop,) = found.ledger.loops
    assert found.matmul_flops == 2 * 32**3
    assert [a.kind for a in found.advice] == ["unknown-loop"]
    assert "an iteration" in str(found)
    told = analyze(compiled, trip_counts={loop.name: 10})
    assert told.matmul_flops == 10 * found.matmul_flops
    assert not told.advice


class TestRendering:
    """An analysis shows itself."""

    def test_as_text(self) -> None:
        text = str(analyze(DECODE, DECODE_MESH, CHIPS["h100"]))
        for words in ("jit_step on 8 devices", "tensor  all-reduce", "make.py:55"):
            assert words in text
        assert max(map(len, text.splitlines())) < 260

    def test_as_html(self) -> None:
        page = analyze(DECODE, DECODE_MESH, CHIPS["h100"])._repr_html_()
        assert page.count("<table>") == page.count("</table>") == 5
        tags = {"div", "p", "b", "table", "caption", "thead", "tbody", "tr", "th", "td"}
        assert set(re.findall(r"</?(\w+)", page)) == tags

    def test_names_cannot_inject_markup(self) -> None:
        evil = "<script>alert(1)</script>&\\\"'"
        text = DECODE.read_text().replace("caches[0][1]", evil)
        text = text.replace("HloModule jit_step", "HloModule <img/onerror=x>")
        found = analyze(text, DECODE_MESH, CHIPS["h100"])
        page = found._repr_html_()
        assert "<script" not in page
        assert "<img" not in page
        assert html.escape("<script>alert(1)</script>") in page


def test_the_record_is_frozen() -> None:
    found = analyze(DECODE, DECODE_MESH)
    assert isinstance(found, Analysis)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.name = "other"  # pyright: ignore[reportAttributeAccessIssue]
    assert dataclasses.asdict(found)["memory"]["arguments"]


def test_a_dump_of_jax_0_12_spells_tuple_elements_short() -> None:
    long = """\
HloModule m, is_scheduled=true

ENTRY %main (t: (f32[8], s32[2])) -> f32[8] {
  %t = (f32[8]{0}, (s32[2]{0}, f32[8]{0})) parameter(0)
  %a = f32[8]{0} get-tuple-element(%t), index=0
  %n = (s32[2]{0}, f32[8]{0}) get-tuple-element(%t), index=1
  %b = f32[8]{0} get-tuple-element(%n), index=1
  ROOT %s = f32[8]{0} add(%a, %b)
}
"""
    short = re.sub(r"(?m)^  %[anb] = .*\n", "", long)
    short = short.replace("add(%a, %b)", "add(%t#0, %t#1#1)")
    assert analyze(short).hbm_bytes == analyze(long).hbm_bytes == 3 * 8 * 4
    with pytest.raises(ValueError, match="no %t#7"):
        analyze(short.replace("#0", "#7"))
