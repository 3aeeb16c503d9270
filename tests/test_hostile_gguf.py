"""GGUF files made to harm, or damaged, end in a clear error.

Every case starts from a sound file, made here byte by byte, and changes one thing.
`refuses` holds all of them to the same: a ValueError of ours, in little memory and
time.
"""

import pathlib
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxllm import weights
from tests import checkpoints
from tests.hostile import CONFIG, TENSORS, read_all, refuses

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def f32(value: float) -> bytes:
    return struct.pack("<f", value)


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


GGUF_FIELDS: dict[str, tuple[int, bytes]] = {
    "general.architecture": (STRING, text("llama")),
    "llama.block_count": (U32, u32(1)),
    "llama.context_length": (U32, u32(64)),
    "llama.embedding_length": (U32, u32(32)),
    "llama.feed_forward_length": (U32, u32(64)),
    "llama.attention.head_count": (U32, u32(4)),
    "llama.attention.head_count_kv": (U32, u32(2)),
    "llama.attention.key_length": (U32, u32(6)),
    "llama.attention.value_length": (U32, u32(6)),
    "llama.attention.layer_norm_rms_epsilon": (F32, f32(1e-5)),
    "llama.rope.freq_base": (F32, f32(1e4)),
    "llama.rope.dimension_count": (U32, u32(6)),
    "llama.vocab_size": (U32, u32(40)),
    "tokenizer.ggml.tokens": (ARRAY, array(STRING, 2, text("a") + text("b"))),
    "tokenizer.ggml.scores": (ARRAY, array(F32, 2, bytes(8))),
    "tokenizer.ggml.add_bos_token": (BOOL, b"\1"),
}


class Info(NamedTuple):
    """One row of the table of tensors."""

    name: bytes
    dims: list[int]
    code: int
    offset: int


def gguf_infos() -> tuple[list[Info], bytes]:
    """Returns the table of sound tensors and what they hold."""
    infos, data = [], b""
    for name, value in checkpoints.gguf_tensors(TENSORS, CONFIG).items():
        infos.append(Info(name.encode(), list(value.shape[::-1]), 0, len(data)))
        data += value.tobytes() + bytes(-value.nbytes % 32)
    return infos, data


def gguf_bytes(
    change: dict[str, tuple[int, bytes] | None] | None = None,
    *,
    infos: Callable[[list[Info]], object] = lambda infos: None,
    more: bytes = b"",
    counts: tuple[int | None, int | None] = (None, None),
    magic: bytes = b"GGUF",
    version: bytes = u32(3),
    cut: int | None = None,
) -> bytes:
    """Returns a GGUF file, sound but for what is changed.

    Args:
      change: fields to set, or to leave out where None.
      infos: changes the table of tensors: name, dimensions, type, offset.
      more: bytes of fields written after the others, one if there are any.
      counts: how many tensors and fields it says there are.
      magic: its first four bytes.
      version: the next four.
      cut: how many bytes of it to keep.
    """
    fields = {**GGUF_FIELDS, **(change or {})}
    held = {key: value for key, value in fields.items() if value is not None}
    table, data = gguf_infos()
    infos(table)
    tensors, others = counts
    out = magic + version
    out += struct.pack("<Q", len(table) if tensors is None else tensors)
    count = len(held) + bool(more) if others is None else others
    out += struct.pack("<Q", count)
    for key, (kind, value) in held.items():
        out += text(key) + u32(kind) + value
    out += more
    for name, dims, code, offset in table:
        out += text(name) + u32(len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
        out += u32(code) + struct.pack("<Q", offset)
    return (out + bytes(-len(out) % 32) + data)[:cut]


def entry(row: int, **change: Any) -> Callable[[list[Info]], None]:
    """Returns a change of one row of the table of tensors."""

    def apply(infos: list[Info]) -> None:
        infos[row] = infos[row]._replace(**change)

    return apply


def copied(infos: list[Info]) -> None:
    infos.append(infos[0])


HUGE = 2**63
GGUF = {
    "nothing but the name": (b"GGUF", "goes on for 4 bytes at byte 4"),
    "another beginning": (gguf_bytes(magic=b"GGML"), "does not begin as a GGUF"),
    "version 1": (gguf_bytes(version=u32(1)), "version 1;"),
    "version 4": (gguf_bytes(version=u32(4)), "version 4;"),
    "the other byte order": (gguf_bytes(version=b"\0\0\0\3"), "version 50331648"),
    "2**63 tensors": (gguf_bytes(counts=(HUGE, None)), f"{HUGE} tensors"),
    "2**63 fields": (gguf_bytes(counts=(None, HUGE)), f"{HUGE} fields"),
    "65,000 tensors": (
        gguf_bytes(counts=(65_000, None)),
        "goes on|string|dimensions|UTF",
    ),
    "65,000 fields": (
        gguf_bytes(counts=(None, 65_000)),
        "unknown type|goes on|string|UTF",
    ),
    "a field too few": (
        gguf_bytes(counts=(None, 15)),
        "goes on|string|dimensions|twice",
    ),
    "a key of 2**63": (
        gguf_bytes(more=struct.pack("<Q", HUGE)),
        f"{HUGE} bytes, of at",
    ),
    "a key longer than the file": (
        gguf_bytes(more=struct.pack("<Q", 99_999)),
        "goes on for 99999",
    ),
    "a key that is not UTF-8": (
        gguf_bytes(more=text(b"\xff") + u32(U32) + u32(1)),
        "UTF-8",
    ),
    "a key twice": (
        gguf_bytes(more=text("llama.block_count") + u32(U32) + u32(1)),
        "block_count' stands twice",
    ),
    "a text of 2**63": (
        gguf_bytes({"general.name": (STRING, struct.pack("<Q", HUGE))}),
        f"{HUGE} bytes",
    ),
    "a text that is not UTF-8": (
        gguf_bytes({"general.name": (STRING, text(b"\xc3("))}),
        "UTF-8",
    ),
    "a value of type 13": (gguf_bytes({"general.x": (13, b"")}), "unknown type 13"),
    "a list of 2**63": (
        gguf_bytes({"x": (ARRAY, array(U32, HUGE, b""))}),
        f"{HUGE} values",
    ),
    "a list of 2**63 texts": (
        gguf_bytes({"x": (ARRAY, array(STRING, HUGE, b""))}),
        f"{HUGE} values",
    ),
    "a list longer than the file": (
        gguf_bytes({"x": (ARRAY, array(U64, 1 << 20, b""))}),
        "goes on for 8388608",
    ),
    "texts longer than the file": (
        gguf_bytes({"x": (ARRAY, array(STRING, 1 << 20, b""))}),
        "goes on|string",
    ),
    "a list of lists": (
        gguf_bytes({"x": (ARRAY, array(ARRAY, 1, array(U32, 1, u32(1))))}),
        "type 9, neither",
    ),
    "a list of type 77": (
        gguf_bytes({"x": (ARRAY, array(77, 1, b""))}),
        "type 77, neither",
    ),
    "an alignment of 0": (
        gguf_bytes({"general.alignment": (U32, u32(0))}),
        "alignment is 0",
    ),
    "an alignment of 2**31": (
        gguf_bytes({"general.alignment": (U32, u32(2**31))}),
        "alignment is",
    ),
    "an alignment that is a text": (
        gguf_bytes({"general.alignment": (STRING, text("32"))}),
        "alignment is '32'",
    ),
    "another alignment": (
        gguf_bytes({"general.alignment": (U32, u32(64))}),
        "end at byte",
    ),
    "a tensor twice": (gguf_bytes(infos=copied), "stands twice"),
    "a name that is not UTF-8": (gguf_bytes(infos=entry(0, name=b"\xff")), "UTF-8"),
    "no dimensions": (gguf_bytes(infos=entry(0, dims=[])), r"shape \(\)"),
    "five dimensions": (
        gguf_bytes(infos=entry(0, dims=[32, 40, 1, 1, 1])),
        "5 dimensions",
    ),
    "2**32 - 1 dimensions": (
        gguf_bytes(infos=entry(0, dims=[])).replace(
            text("token_embd.weight") + u32(0),
            text("token_embd.weight") + u32(2**32 - 1),
        ),
        "4294967295 dimensions",
    ),
    "a size of 0": (gguf_bytes(infos=entry(0, dims=[32, 0])), r"shape \(0, 32\)"),
    "a size of 2**64 - 1": (
        gguf_bytes(infos=entry(0, dims=[32, 2**64 - 1])),
        "begins at byte|end at byte",
    ),
    "sizes that overflow": (
        gguf_bytes(infos=entry(0, dims=[2**32, 2**32])),
        "begins at|end at",
    ),
    "sizes turned": (
        gguf_bytes(infos=entry(0, dims=[40, 32])),
        r"\(32, 40\).*\(40, 32\)",
    ),
    "an encoding of 999": (gguf_bytes(infos=entry(0, code=999)), "type 999"),
    "an encoding not read": (gguf_bytes(infos=entry(0, code=16)), "IQ2_XXS.*Q4_0"),
    "whole numbers": (gguf_bytes(infos=entry(0, code=26)), "I32"),
    "a shorter encoding": (gguf_bytes(infos=entry(0, code=1)), "begins at byte"),
    "rows of part of a block": (
        gguf_bytes(infos=entry(0, code=12)),
        "Q4_K has rows of blocks of 256",
    ),
    "an offset outside": (
        gguf_bytes(infos=entry(-1, offset=1 << 40)),
        "begins at byte",
    ),
    "an offset of 2**64 - 32": (
        gguf_bytes(infos=entry(0, offset=2**64 - 32)),
        "begins at byte",
    ),
    "an offset between": (gguf_bytes(infos=entry(1, offset=5124)), "begins at byte"),
    "tensors that overlap": (gguf_bytes(infos=entry(1, offset=0)), "begins at byte"),
    "a byte too few": (gguf_bytes(cut=-1), "end at byte"),
    "an end in the fields": (gguf_bytes(cut=300), "goes on"),
    "an end in the table": (gguf_bytes(cut=1000), "goes on"),
    "bytes after the last tensor": (gguf_bytes() + bytes(32), "end at byte"),
    "a tensor missing": (
        gguf_bytes(infos=entry(4, name=b"blk.0.attn_x.weight")),
        "no tensor 'blk.0",
    ),
    "no architecture": (
        gguf_bytes({"general.architecture": None}),
        "general.architecture",
    ),
    "another architecture": (
        gguf_bytes({"general.architecture": (STRING, text("mamba"))}),
        "'mamba'",
    ),
    "an architecture of 7": (
        gguf_bytes({"general.architecture": (U32, u32(7))}),
        "is 7, a int",
    ),
    "heads that are a text": (
        gguf_bytes({"llama.attention.head_count": (STRING, text("4"))}),
        "head_count is '4'",
    ),
    "heads that are a list": (
        gguf_bytes({"llama.attention.head_count_kv": (ARRAY, array(U32, 1, u32(2)))}),
        "head_count_kv",
    ),
    "heads that are true": (
        gguf_bytes({"llama.attention.head_count": (BOOL, b"\1")}),
        "head_count is True",
    ),
    "no heads": (
        gguf_bytes({"llama.attention.head_count": (U32, u32(0))}),
        "head_count is 0",
    ),
    "half a head a key": (
        gguf_bytes({"llama.attention.head_count_kv": (U32, u32(3))}),
        "num_kv_heads=3",
    ),
    "-1 layers": (
        gguf_bytes({"llama.block_count": (I32, struct.pack("<i", -1))}),
        "num_layers=-1",
    ),
    "2**32 - 1 layers": (
        gguf_bytes({"llama.block_count": (U32, u32(2**32 - 1))}),
        "'blk.1.",
    ),
    "no layers said": (gguf_bytes({"llama.block_count": None}), "llama.block_count"),
    "another width": (
        gguf_bytes({"llama.embedding_length": (U32, u32(64))}),
        r"\(40, 32\).*\(40, 64\)",
    ),
    "a base of NaN": (
        gguf_bytes({"llama.rope.freq_base": (F32, f32(float("nan")))}),
        "rope_theta=nan",
    ),
    "a base without end": (
        gguf_bytes({"llama.rope.freq_base": (F32, f32(float("inf")))}),
        "rope_theta=inf",
    ),
    "a base of 0": (
        gguf_bytes({"llama.rope.freq_base": (F32, f32(0.0))}),
        r"rope_theta=0\.0",
    ),
    "no base": (
        gguf_bytes({"llama.rope.freq_base": None}),
        "no field llama.rope.freq_base",
    ),
    "an epsilon below 0": (
        gguf_bytes({"llama.attention.layer_norm_rms_epsilon": (F32, f32(-1.0))}),
        "norm_eps=-1",
    ),
    "part of a head rotated": (
        gguf_bytes({"llama.rope.dimension_count": (U32, u32(4))}),
        "is 4, but heads are 6",
    ),
    "values of another width": (
        gguf_bytes({"llama.attention.value_length": (U32, u32(8))}),
        "is 8, but heads are 6",
    ),
    "another scaling": (
        gguf_bytes({"llama.rope.scaling.type": (STRING, text("yarn"))}),
        "'yarn'",
    ),
    "experts": (gguf_bytes({"llama.expert_count": (U32, u32(8))}), "expert_count is 8"),
    "a part of several": (
        gguf_bytes({"split.count": (U32, u32(3))}),
        "split.count is 3",
    ),
    "a field that may matter": (
        gguf_bytes({"llama.attention.sliding_window": (U32, u32(8))}),
        "sliding_window' is not",
    ),
    "divisors of another length": (
        gguf_bytes(infos=entry(1, name=b"rope_freqs.weight")),
        r"rope_freqs.weight has shape \(32,\)",
    ),
}


@pytest.mark.parametrize("case", GGUF)
def test_a_gguf_file_that_is_not_sound(case: str, tmp_path: pathlib.Path) -> None:
    content, message = GGUF[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with refuses(message):
        weights.open_checkpoint(path)


@pytest.mark.parametrize(
    ("divisors", "message"),
    [
        ([1.0, 1.0, 2.0], r"divides frequency \d by"),
        ([1.0, float("nan"), 8.0], "no divisors"),
        ([0.0, 1.0, 8.0], "no divisors"),
        ([1.0, -1.0, 8.0], "no divisors"),
    ],
)
def test_a_scaling_of_gguf_that_is_not_llama_31(
    divisors: list[float], message: str, tmp_path: pathlib.Path
) -> None:
    tensors = checkpoints.gguf_tensors(TENSORS, CONFIG)
    tensors["rope_freqs.weight"] = np.array(divisors, np.float32)
    path = checkpoints.write_gguf(tmp_path / "model.gguf", CONFIG, tensors)
    with refuses(message):
        weights.open_checkpoint(path)


def test_the_file_changed_here_is_sound(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes())
    found = weights.open_checkpoint(path)
    assert found.config == CONFIG
    folder = checkpoints.write_folder(
        tmp_path, checkpoints.config_json(CONFIG), TENSORS
    )
    expected = read_all(weights.open_checkpoint(folder))
    for name, array in read_all(found).items():
        np.testing.assert_array_equal(array, expected[name])
