"""HBM bytes: what an instruction must read and write, and no more."""

import pytest

from sharding.hlo import read_ledger

FUSED = """
%slice_and_scale (w: bf16[20,64,32], i: s32[], x: bf16[64]) -> bf16[64,32] {
  %w = bf16[20,64,32] parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = bf16[1,64,32] dynamic-slice(%w, %i, %z, %z), dynamic_slice_sizes={1,64,32}
  %b = bf16[64,32] bitcast(%s)
  %x = bf16[64] parameter(2)
  %y = bf16[64,32] broadcast(%x), dimensions={0}
  ROOT %m = bf16[64,32] multiply(%b, %y)
}
%slice_of_sum (w: f32[20,64], v: f32[20,64]) -> f32[2,64] {
  %w = f32[20,64] parameter(0)
  %v = f32[20,64] parameter(1)
  %a = f32[20,64] add(%w, %v)
  ROOT %s = f32[2,64] slice(%a), slice={[3:5], [0:64]}
}
%update (c: bf16[640,32], u: f32[1,32], i: s32[]) -> bf16[640,32] {
  %c = bf16[640,32] parameter(0)
  %u = f32[1,32] parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %v = bf16[1,32] convert(%u)
  ROOT %d = bf16[640,32] dynamic-update-slice(%c, %v, %i, %z)
}
%update_and_look (c: bf16[640,32], u: bf16[1,32], i: s32[]) -> (bf16[32,640]) {
  %c = bf16[640,32] parameter(0)
  %u = bf16[1,32] parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %d = bf16[640,32] dynamic-update-slice(%c, %u, %i, %z)
  %b = bf16[32,640] bitcast(%d)
  %n = bf16[1,32] negate(%u)
  ROOT %t = (bf16[32,640], bf16[1,32]) tuple(%b, %n)
}
%update_of_bitcast (c: bf16[1,640,32], u: bf16[1,32], i: s32[]) -> bf16[640,32] {
  %c = bf16[1,640,32] parameter(0)
  %u = bf16[1,32] parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %b = bf16[640,32] bitcast(%c)
  ROOT %d = bf16[640,32] dynamic-update-slice(%b, %u, %i, %z)
}
%other_tiles (c: bf16[640,32]) -> bf16[640,32] {
  %c = bf16[640,32]{1,0:T(16,128)} parameter(0)
  ROOT %k = bf16[640,32]{1,0:T(8,128)} copy(%c)
}
%update_of_other_tiles (c: bf16[640,32], u: bf16[1,32], i: s32[]) -> bf16[640,32] {
  %c = bf16[640,32]{1,0:T(16,128)} parameter(0)
  %u = bf16[1,32] parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %k = bf16[640,32]{1,0:T(8,128)} fusion(%c), kind=kLoop, \
output_to_operand_aliasing={{}: (0, {})}, calls=%other_tiles
  ROOT %d = bf16[640,32]{1,0:T(8,128)} dynamic-update-slice(%k, %u, %i, %z)
}
%update_of_zeros (u: f32[1,32], i: s32[]) -> f32[640,32] {
  %u = f32[1,32] parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %f = f32[] constant(0)
  %c = f32[640,32] broadcast(%f), dimensions={}
  ROOT %d = f32[640,32] dynamic-update-slice(%c, %u, %i, %z)
}
%take_and_update (c: bf16[5,640,32], u: bf16[1,32], i: s32[]) -> (bf16[640,32]) {
  %c = bf16[5,640,32] parameter(0)
  %u = bf16[1,32] parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %s = bf16[1,640,32] dynamic-slice(%c, %i, %z, %z), dynamic_slice_sizes={1,640,32}
  %b = bf16[640,32] bitcast(%s)
  %d = bf16[640,32] dynamic-update-slice(%b, %u, %i, %z)
  ROOT %t = (bf16[640,32], bf16[640,32]) tuple(%b, %d)
}
%inner (w: bf16[20,64,32], i: s32[]) -> bf16[64,32] {
  %w = bf16[20,64,32] parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = bf16[1,64,32] dynamic-slice(%w, %i, %z, %z), dynamic_slice_sizes={1,64,32}
  ROOT %b = bf16[64,32] bitcast(%s)
}
%product (x: bf16[8,64], w: bf16[20,64,32], i: s32[]) -> bf16[8,32] {
  %x = bf16[8,64] parameter(0)
  %w = bf16[20,64,32] parameter(1)
  %i = s32[] parameter(2)
  %f = bf16[64,32] fusion(%w, %i), kind=kLoop, calls=%inner
  ROOT %c = bf16[8,32] convolution(%x, %f), dim_labels=bf_io->bf
}
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}
"""

SLICE = 64 * 32 * 2


def _bytes(shapes: list[str], line: str) -> int:
    parameters = "\n".join(
        f"  %{name} = {shape} parameter({i})"
        for i, (name, shape) in enumerate(zip("abcd", shapes, strict=False))
    )
    entry = f"ENTRY %e () -> f32[] {{\n{parameters}\n  ROOT %r = {line}\n}}\n"
    return read_ledger(f"HloModule m\n{FUSED}\n{entry}").hbm_bytes


@pytest.mark.parametrize(
    ("shapes", "line", "expected"),
    [
        (["f32[8]", "f32[8]"], "f32[8] add(%a, %b)", 3 * 32),
        (["f32[8]"], "f32[8] add(%a, %a)", 2 * 32),  # read once
        (["f32[8]"], "f32[8] copy(%a)", 2 * 32),
        (["f32[8]"], "f32[2,4] bitcast(%a)", 0),
        (["f32[8]"], "(f32[8]) tuple(%a)", 0),
        (["f32[100,8]"], "f32[2,8] slice(%a), slice={[4:6], [0:8]}", 2 * 64),
        (["f32[100,8]", "s32[]"],
         "f32[1,8] dynamic-slice(%a, %b, %b), dynamic_slice_sizes={1,8}", 2 * 32 + 4),
        (["f32[100,8]", "s32[3,1]"],
         "f32[3,8] gather(%a, %b), offset_dims={1}", 2 * 96 + 12),
        # in place: the update is read and written, the buffer is not
        (["f32[100,8]", "f32[2,8]", "s32[]"],
         "f32[100,8] dynamic-update-slice(%a, %b, %c, %c)", 2 * 64 + 4),
        # read what is there, the updates and their places; write
        (["f32[100,8]", "s32[2,1]", "f32[2,8]"],
         "f32[100,8] scatter(%a, %b, %c), to_apply=%add", 3 * 64 + 8),
        # on-chip memory is no traffic
        (["f32[8]{0:T(8)S(1)}", "f32[8]{0:T(8)}"],
         "f32[8]{0:T(8)S(1)} add(%a, %b)", 32),
        (["f32[8]{0:T(8)}"],
         "(f32[8]{0:T(8)S(1)}, f32[8]{0:T(8)}, u32[]{:S(2)}) copy-start(%a)", 32),
        (["f32[8]{0:T(8)S(1)}"], "f32[8]{0:T(8)S(6)} copy(%a)", 0),
        # a prefetch of a slice reads the slice
        (["f32[100,8]{1,0:T(8)}"],
         "((f32[100,8]{1,0:T(8)}), f32[2,8]{1,0:T(8)S(1)}, s32[]{:S(2)})"
         " slice-start(%a), slice={[0:2], [0:8]}", 64),
    ],
)  # fmt: skip
def test_instruction(shapes: list[str], line: str, expected: int) -> None:
    assert _bytes(shapes, line) == expected


@pytest.mark.parametrize(
    ("shapes", "line", "expected"),
    [
        # one layer of stacked weights, the index, the scale; one layer written
        (["bf16[20,64,32]", "s32[]", "bf16[64]"],
         "bf16[64,32] fusion(%a, %b, %c), kind=kLoop, calls=%slice_and_scale",
         SLICE + 4 + 128 + SLICE),
        # elementwise work on a slice reads only the slice
        (["f32[20,64]", "f32[20,64]"],
         "f32[2,64] fusion(%a, %b), kind=kLoop, calls=%slice_of_sum", 3 * 512),
        # the same array twice, each use half of it: no more than all of it
        (["f32[20,64]"],
         "f32[2,64] fusion(%a, %a), kind=kLoop, calls=%slice_of_sum", 3 * 512),
        # cache[i] = bf16(update): f32 update and index read, bf16 row written
        (["bf16[640,32]", "f32[1,32]", "s32[]"],
         "bf16[640,32] fusion(%a, %b, %c), kind=kLoop, calls=%update", 128 + 4 + 64),
        # through a bitcast, in a tuple, beside another result
        (["bf16[640,32]", "bf16[1,32]", "s32[]"],
         "(bf16[32,640], bf16[1,32]) fusion(%a, %b, %c), kind=kLoop,"
         " calls=%update_and_look", 64 + 4 + 64 + 64),
        # the buffer itself, seen through a bitcast
        (["bf16[1,640,32]", "bf16[1,32]", "s32[]"],
         "bf16[640,32] fusion(%a, %b, %c), kind=kLoop, calls=%update_of_bitcast",
         64 + 4 + 64),
        # TPU: the buffer itself, in other tiles
        (["bf16[640,32]", "bf16[1,32]", "s32[]"],
         "bf16[640,32] fusion(%a, %b, %c), kind=kLoop, calls=%update_of_other_tiles",
         64 + 4 + 64),
        # a fresh buffer has to be written whole
        (["f32[1,32]", "s32[]"],
         "f32[640,32] fusion(%a, %b), kind=kLoop, calls=%update_of_zeros",
         128 + 4 + 640 * 128),
        # a slice taken once for two results, one of them a changed copy
        (["bf16[5,640,32]", "bf16[1,32]", "s32[]"],
         "(bf16[640,32], bf16[640,32]) fusion(%a, %b, %c), kind=kLoop,"
         " calls=%take_and_update", 3 * 640 * 64 + 64 + 4),
        # TPU: the slice sits in a fusion within the fusion
        (["bf16[8,64]", "bf16[20,64,32]", "s32[]"],
         "bf16[8,32] fusion(%a, %b, %c), kind=kOutput, calls=%product",
         1024 + SLICE + 4 + 512),
        # GPU: the same, asynchronous
        (["bf16[20,64,32]", "s32[]"],
         "((bf16[20,64,32], s32[]), bf16[64,32], u32[])"
         " fusion-start(%a, %b), kind=kLoop, calls=%inner", SLICE + 4 + SLICE),
    ],
    ids=[
        "slice", "lazy", "twice", "update", "tuple", "bitcast", "tiles", "fresh",
        "copy", "nested", "async",
    ],
)  # fmt: skip
def test_fusion(shapes: list[str], line: str, expected: int) -> None:
    assert _bytes(shapes, line) == expected


def test_the_done_half_of_a_pair_is_free() -> None:
    text = """HloModule m
ENTRY %e (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %s = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%a)
  ROOT %d = f32[8]{0} copy-done(%s)
}
"""
    assert read_ledger(text).hbm_bytes == 2 * 32
