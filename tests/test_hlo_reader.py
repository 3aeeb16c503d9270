"""HLO text is read as it stands, and what cannot be read stops the reader."""

import re
import time

import pytest

from sharding.hlo import Shape, parse_shape, read_ledger, read_module
from sharding.hlo.attributes import attributes
from sharding.hlo.reader import read_instruction
from sharding.hlo.source import read_sources


@pytest.mark.parametrize(
    ("text", "dims", "space", "num_bytes"),
    [
        ("bf16[8,4096]{1,0:T(8,128)(2,1)}", (8, 4096), 0, 65536),
        ("f32[4,256]{1,0:T(4,128)S(1)}", (4, 256), 1, 4096),
        ("f32[2048,1024]{1,0:T(8,128)S(1)SC(0:1024)}", (2048, 1024), 1, 8388608),
        ("u32[]{:S(2)}", (), 2, 4),
        ("s4[3,3]{1,0:E(4)}", (3, 3), 0, 5),  # 9 half bytes, rounded up
        ("pred[7]", (7,), 0, 7),
        ("f8e4m3fn[16]{0}", (16,), 0, 16),
        ("f32[<=8,2]{1,0}", (8, 2), 0, 64),
        ("f32[0]", (0,), 0, 0),
        ("token[]", (), 0, 0),
    ],
)
def test_shape(text: str, dims: tuple[int, ...], space: int, num_bytes: int) -> None:
    shape = parse_shape(text)
    assert (shape.dims, shape.space, shape.num_bytes) == (dims, space, num_bytes)


def test_tuple_shape_nests_and_carries_comments() -> None:
    shape = parse_shape("((f32[2]{0:T(128)}, s8[3]), /*index=1*/bf16[4], ())")
    assert [leaf.dims for leaf in shape.leaves] == [(2,), (3,), (4,)]
    assert shape.num_bytes == 8 + 3 + 8


@pytest.mark.parametrize("text", ["f33[2]", "f32[2", "(f32[2]", "f32[2] f32[3]", ""])
def test_no_shape(text: str) -> None:
    with pytest.raises(ValueError, match="shape"):
        parse_shape(text)


def test_instruction_with_everything() -> None:
    found = read_instruction(
        "  ROOT %fusion.1 = (bf16[2]{0:T(128)}, /*index=1*/f32[]) fusion(%a.b-1,"
        ' /*index=1*/%c), kind=kLoop, calls=%g, slice={[0:2], [1:3]}, note="a, b=\\"{",'
        ' metadata={op_name="jit(f)/x[a={1}]/calls=%no" stack_frame_id=3},'
        ' backend_config={"a":[{"b":"}"}],"c":{}}'
    )
    assert (found.name, found.opcode, found.is_root) == ("fusion.1", "fusion", True)
    assert found.operands == ("a.b-1", "c")
    assert found.called("calls") == "g"
    assert found.string("note") == 'a, b="{'
    assert found.attr("backend_config") == '{"a":[{"b":"}"}],"c":{}}'
    assert [key for key, _ in attributes(found.rest)] == [
        "kind", "calls", "slice", "note", "metadata", "backend_config",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "operands"),
    [
        ("%a = f32[2]{0} add(f32[2]{0:T(2,1)} %x, f32[2]{0} %y)", ("x", "y")),
        ("a = f32[2]{0} add(x, y)", ("x", "y")),
        ("a = f32[2]{0} add(f32[2]{0:T(2,1)} x, (f32[1], s32[]) y)", ("x", "y")),
        ("%a = f32[2]{0} constant({1, 2})", ()),
        ('%a = c64[2]{0} constant({(1, 2), (3, ")")})', ()),
        ("%a = () tuple()", ()),
    ],
)
def test_operands(line: str, operands: tuple[str, ...]) -> None:
    assert read_instruction(line).operands == operands


@pytest.mark.parametrize(
    "line", ["%a = f32[2] add(%b", "%a f32[2] add(%b)", "nonsense", "%a = add(%b)"]
)
def test_no_instruction(line: str) -> None:
    with pytest.raises(ValueError, match=r"nonsense|add"):
        read_instruction(line)


MODULE = """\
HloModule jit_f, is_scheduled=true, num_partitions=8

FileNames
1 "/home/x/my model.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=21 end_line=21 column=2 end_column=79}

StackFrames
7 {file_location_id=1 parent_frame_id=1}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y), metadata={op_name="jit(f)/\\"a\\"" stack_frame_id=7}
}, execution_thread="sparsecore"

ENTRY %main (p: f32[4]) -> f32[] {
  // a remark
  %p = f32[4]{0} parameter(0), metadata={op_name="p" source_file="b.py" source_line=3}
  %zero = f32[] constant(0)
  ROOT %r = f32[] reduce(%p, %zero), dimensions={0}, to_apply=%add
}
"""


def test_module_and_sources() -> None:
    module = read_module(MODULE)
    assert module.num_devices == 8
    assert module.entry.root.name == "r"
    sources = read_sources(module)
    add = module.computations["add"]
    assert sources.of(add.root) == ('jit(f)/"a"', "my model.py:21")
    assert sources.of(module.entry.instructions[0]) == ("p", "b.py:3")
    assert sources.of(module.entry.root) == ("", "")
    assert add.parameters[1].shape == Shape(dtype="f32")


@pytest.mark.parametrize(
    "text",
    ["", "HloModule x\n", MODULE[:-3], MODULE.replace("%zero = f32[]", "%zero ="), "?"],
)
def test_no_module(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_module(text)


@pytest.mark.parametrize(
    ("read", "instead", "message"),
    [
        ("reduce(%p", "reduce(%q", "'q' is not defined in %main before its use: %r ="),
        # A circle, which nothing that follows operands would leave.
        ("reduce(%p", "reduce(%r", "'r' is not defined in %main before its use: %r ="),
        ("%zero =", "%p =", "twice in computation %main: %p = f32[] constant(0)"),
    ],
)
def test_a_name_is_defined_once_and_before_its_use(
    read: str, instead: str, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_module(MODULE.replace(read, instead))


def test_time_grows_with_the_text() -> None:
    line = MODULE.splitlines()[-4]

    def seconds(copies: int) -> float:
        body = "\n".join(line.replace("%p ", f"%p{i} ") for i in range(copies))
        text = MODULE.replace(line, line + "\n" + body)
        start = time.process_time()
        read_module(text)
        return time.process_time() - start

    assert seconds(20_000) < 2  # 10,000 lines a second, on any machine


@pytest.mark.parametrize(
    ("printed", "name"),
    [
        (r"a \"b\" <script>alert(1)</script>", 'a "b" <script>alert(1)</script>'),
        (r"na\303\257ve \342\200\250 x", "na\u00efve \u2028 x"),
        (
            r"it\'s {x=[1} \\ calls=%no, stack_frame_id=7",
            "it's {x=[1} \\ calls=%no, stack_frame_id=7",
        ),
        (r"tab\tline\n", "tab\tline\n"),
        ("caf\u00e9 \u2028 \x85 \x1c raw", "caf\u00e9 \u2028 \x85 \x1c raw"),
        (r"\377 is no character", "\ufffd is no character"),
    ],
)
def test_odd_characters_in_names_survive(printed: str, name: str) -> None:
    text = f"""HloModule m
ENTRY %e (x: f32[8]) -> f32[8] {{
  %x = f32[8] parameter(0)
  ROOT %s = f32[8] sine(%x), metadata={{op_name="{printed}" stack_frame_id=3}}
}}
"""
    (cost,) = read_ledger(text).costs
    assert (cost.name, cost.op_name, cost.flops) == ("s", name, 8)


def test_windows_line_ends() -> None:
    text = "HloModule m\nENTRY %e () -> f32[] {\n  ROOT %c = f32[] constant(1)\n}\n"
    text = text.replace("\n", "\r\n")
    assert read_module(text).entry.root.literal == "1"
