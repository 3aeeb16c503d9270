"""Folders and safetensors made to harm, or damaged, end in a clear error.

Every case starts from a sound checkpoint and changes one thing. `refuses` holds all
of them to the same: a ValueError of ours, in little memory and time.
"""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxllm import weights
from tests import checkpoints
from tests.hostile import CONFIG, FIELDS, TENSORS, read_all, refuses

pytestmark = pytest.mark.skipif(os.name != "posix", reason="makes pipes and links")

Q = "model.layers.0.self_attn.q_proj.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A sound folder, next to which a test may put what must not be read."""
    return checkpoints.write_folder(tmp_path / "model", FIELDS, TENSORS)


@pytest.fixture
def shards(tmp_path: pathlib.Path) -> pathlib.Path:
    """The same in two shards with an index."""
    return checkpoints.write_folder(tmp_path / "shards", FIELDS, TENSORS, 2)


def test_the_files_changed_here_are_sound(
    folder: pathlib.Path, shards: pathlib.Path
) -> None:
    single, sharded = map(weights.open_checkpoint, (folder, shards))
    assert single.config == sharded.config == CONFIG
    found = read_all(sharded)
    for name, array in read_all(single).items():
        np.testing.assert_array_equal(array, found[name])


# --- The bytes of a safetensors file -------------------------------------------------


def packed(header: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    """Returns a safetensors file; `size` is what it says its header has."""
    length = len(header) if size is None else size
    return length.to_bytes(8, "little") + header + data


def one(name: str = "a", data: bytes = bytes(16), **entry: Any) -> bytes:
    """Returns a file of one tensor, sound but for `entry`."""
    sound = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    return packed(json.dumps({name: sound | entry}).encode(), data)


def two(first: list[int], second: list[int], size_bytes: int = 32) -> bytes:
    """Returns a file of two tensors of 16 bytes each."""
    entries = {
        name: {"dtype": "F32", "shape": [4], "data_offsets": span}
        for name, span in (("a", first), ("b", second))
    }
    return packed(json.dumps(entries).encode(), bytes(size_bytes))


SAFETENSORS = {
    "an empty file": (b"", "0 bytes"),
    "less than a length": (b"\x10\0\0\0", "4 bytes"),
    "a header longer than the file": (
        packed(b"{}", size=900),
        "900 bytes, of at most 2",
    ),
    "a header of 2**64 - 1": (packed(b"{}", size=2**64 - 1), str(2**64 - 1)),
    "a header of 2**63": (packed(b"{}", size=2**63), str(2**63)),
    "a header of nothing": (packed(b""), "begins with b''"),
    "a header shorter than it is": (packed(b"{}    ", size=1), "JSON"),
    "a header that is a list": (packed(b"[]"), r"begins with b'\['"),
    "a header after blanks": (packed(b"  {}"), "begins with b' '"),
    "a header cut off": (one()[:40], "header has"),
    "a header in UTF-16": (packed("{}".encode("utf-16-le")), "JSON"),
    "a header with a byte-order mark": (packed(b"\xef\xbb\xbf{}"), "begins with"),
    "a header that is not UTF-8": (packed(b'{"\xff\xfe": 1}'), "utf-8"),
    "a header a million levels deep": (packed(b'{"a":' * 700_000), "JSON"),
    "a list a million levels deep": (packed(b'{"a":' + b"[" * 999_999), "JSON"),
    "a number of 5,000 digits": (packed(b'{"a":' + b"1" * 5000 + b"}"), "JSON"),
    "one tensor twice": (packed(b'{"a": {}, "a": {}}'), "twice"),
    "one attribute twice": (
        packed(b'{"a": {"dtype": "F32", "dtype": "F16"}}'),
        "twice",
    ),
    "metadata that is a list": (packed(b'{"__metadata__": []}'), "__metadata__"),
    "metadata of numbers": (packed(b'{"__metadata__": {"a": 1}}'), "__metadata__"),
    "a tensor that is a number": (packed(b'{"a": 1}'), "'a'"),
    "a tensor without a shape": (packed(b'{"a": {"dtype": "F32"}}'), "shape"),
    "a tensor with more to say": (one(stride=4), "data_offsets"),
    "whole numbers": (one(dtype="I32"), "'I32'.*BF16"),
    "numbers of 8 bits": (one(dtype="F8_E4M3"), "'F8_E4M3'.*quantised"),
    "an unknown dtype": (one(dtype="F31"), "'F31'"),
    "a dtype that is a list": (one(dtype=["F32"]), r"\['F32'\]"),
    "a dtype of another width": (one(dtype="F16"), "needs 8 bytes.*hold 16"),
    "a negative size": (one(shape=[-2, -2]), r"\[-2, -2\]"),
    "a size of NaN": (one(shape=[float("nan"), 4]), "nan"),
    "a size of 2.0": (one(shape=[2.0, 2]), r"2\.0"),
    "a size of true": (one(shape=[True, 4]), "True"),
    "a shape that is a number": (one(shape=4), "shape 4"),
    "sizes that overflow 64 bits": (one(shape=[2**32, 2**32, 4]), "data_offsets"),
    "a size of 2**63": (one(shape=[2**63, 0]), "natural numbers"),
    "a size of 400 digits": (one(shape=[10**400, 0]), "natural numbers"),
    "nine dimensions": (one(shape=[1] * 8 + [4]), "natural numbers"),
    "a million dimensions": (one(shape=[1] * 1_000_000), "natural numbers"),
    "offsets that end before they begin": (one(data_offsets=[16, 0]), "hold -16"),
    "one offset": (one(data_offsets=[16]), "natural numbers"),
    "three offsets": (one(data_offsets=[0, 16, 32]), "natural numbers"),
    "a negative offset": (one(data_offsets=[-8, 8]), "natural numbers"),
    "offsets into the next file": (one(data_offsets=[16, 32]), "begins at byte"),
    "offsets of 2**62": (one(data_offsets=[2**62, 2**62 + 16]), "begins at byte"),
    "tensors that overlap": (two([0, 16], [8, 24]), "'b' begins at"),
    "tensors in one place": (two([0, 16], [0, 16], 16), "'b' begins at"),
    "a gap between tensors": (two([0, 16], [20, 36], 36), "'b' begins at"),
    "bytes after the last tensor": (one(data=bytes(17)), "end at byte"),
    "a byte too few": (one(data=bytes(15)), "end at byte"),
    "a pickle by another name": (b"\x80\x02}q\x00." + bytes(40), "header has"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_a_safetensors_file_that_is_not_sound(case: str, folder: pathlib.Path) -> None:
    content, message = SAFETENSORS[case]
    (folder / SINGLE).write_bytes(content)
    with refuses(message):
        weights.open_checkpoint(folder)


def test_a_header_of_a_gigabyte(folder: pathlib.Path) -> None:
    with (folder / SINGLE).open("wb") as file:
        file.write(packed(b"{", size=1 << 30))
        file.truncate(2 << 30)  # a hole
    with refuses("1073741824 bytes, of at most 4194304"):
        weights.open_checkpoint(folder)


# --- What the tensors are ------------------------------------------------------------


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in TENSORS.items() if key != name}


MODELS = {
    "no tensors at all": ({}, {}, "no tensor 'model.embed_tokens.weight'"),
    "a tensor missing": (without(Q), {}, f"no tensor '{Q}'"),
    "a head missing": (without("lm_head.weight"), {}, "no tensor 'lm_head.weight'"),
    "a bias": (
        {**TENSORS, Q.replace("weight", "bias"): np.zeros(24, np.float32)},
        {},
        "1 tensors.*q_proj.bias",
    ),
    "a layer too many": (
        {**TENSORS, Q.replace("0", "1"): TENSORS[Q]},
        {},
        "1 tensors.*layers.1.",
    ),
    "other names": ({f"x.{key}": TENSORS[key] for key in TENSORS}, {}, "no tensor"),
    "a matrix turned": (
        {**TENSORS, Q: np.ascontiguousarray(TENSORS[Q].T)},
        {},
        r"\(32, 24\).*\(24, 32\)",
    ),
    "a matrix of one dimension": (
        {**TENSORS, Q: TENSORS[Q].reshape(-1)},
        {},
        r"\(768,\).*\(24, 32\)",
    ),
    "a matrix of three": (
        {**TENSORS, Q: TENSORS[Q][None]},
        {},
        r"\(1, 24, 32\).*\(24, 32\)",
    ),
    "the config of another model": (
        TENSORS,
        {"vocab_size": 41},
        r"\(40, 32\).*\(41, 32\)",
    ),
    "a config with more layers": (TENSORS, {"num_hidden_layers": 2}, "layers.1."),
    "a config with 10**15 layers": (
        TENSORS,
        {"num_hidden_layers": 10**15},
        "layers.1.",
    ),
    "a config without a size": (TENSORS, {"hidden_size": None}, "hidden_size"),
    "a size that is a text": (TENSORS, {"hidden_size": "32"}, "hidden_size='32'"),
    "a size of 32.0": (TENSORS, {"hidden_size": 32.0}, "hidden_size"),
    "no heads": (TENSORS, {"num_attention_heads": 0, "head_dim": None}, "num_heads=0"),
    "a negative size of layers": (TENSORS, {"num_hidden_layers": -1}, "num_layers=-1"),
    "a base of NaN": (TENSORS, {"rope_theta": float("nan")}, "rope_theta=nan"),
    "a base without end": (TENSORS, {"rope_theta": float("inf")}, "rope_theta=inf"),
    "a base of 10**400": (TENSORS, {"rope_theta": 10**400}, "rope_theta="),
    "a base that is a list": (TENSORS, {"rope_theta": [1e4]}, "rope_theta="),
    "a scaling that is a text": (TENSORS, {"rope_scaling": "llama3"}, "rope_scaling="),
    "a scaling without numbers": (
        TENSORS,
        {"rope_scaling": {"rope_type": "llama3"}},
        "no 'factor'",
    ),
    "a scaling with nothing between": (
        TENSORS,
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 4,
                "high_freq_factor": 4,
                "original_max_position_embeddings": 1,
            }
        },
        "low_freq_factor=4",
    ),
    "a tie that is a text": (TENSORS, {"tie_word_embeddings": "no"}, "tie_word"),
    "experts": (TENSORS, {"model_type": "mixtral"}, "'mixtral'"),
    "a type that is a list": (TENSORS, {"model_type": ["llama"]}, "model_type"),
}


@pytest.mark.parametrize("case", MODELS)
def test_weights_of_another_model(case: str, tmp_path: pathlib.Path) -> None:
    tensors, change, message = MODELS[case]
    checkpoints.write_folder(tmp_path, {**FIELDS, **change}, tensors)
    with refuses(message):
        weights.open_checkpoint(tmp_path)


# --- Paths, links and what is no file ------------------------------------------------


def set_index(shards: pathlib.Path, shard: Any, tensor: str = Q) -> None:
    """Says in the index that `tensor` lies in `shard`."""
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"][tensor] = shard
    (shards / INDEX).write_text(json.dumps(index))


def shard_paths(shards: pathlib.Path) -> list[pathlib.Path]:
    return sorted(shards.glob("model-*.safetensors"))


def replace_by_link(path: pathlib.Path, target: str | pathlib.Path) -> None:
    path.unlink()
    path.symlink_to(target)


def elsewhere(path: pathlib.Path) -> pathlib.Path:
    """Moves a sound file out of its folder: reading it there would succeed."""
    outside = path.parent.parent / "elsewhere"
    outside.mkdir(exist_ok=True)
    return path.rename(outside / path.name)


def link_to_elsewhere(path: pathlib.Path) -> None:
    path.symlink_to(elsewhere(path))


def link_through_folder(path: pathlib.Path) -> None:
    outside = elsewhere(path)
    (path.parent / "inner").symlink_to(outside.parent)
    path.symlink_to(pathlib.Path("inner", path.name))


def link_to_blobs_of_no_cache(path: pathlib.Path) -> None:
    blobs = path.parent.parent / "blobs"
    blobs.mkdir()
    path.rename(blobs / "0")
    path.symlink_to(blobs / "0")


def pipe(path: pathlib.Path) -> None:
    path.unlink()
    os.mkfifo(path)


def rename_all(shards: pathlib.Path, to: str) -> None:
    """Names in the index the first shard as `to`, for all its tensors."""
    text = (shards / INDEX).read_text()
    name = shard_paths(shards)[0].name
    (shards / INDEX).write_text(text.replace(json.dumps(name), json.dumps(to)))


def absolute(shards: pathlib.Path) -> None:
    rename_all(shards, str(elsewhere(shard_paths(shards)[0])))


def upwards(shards: pathlib.Path) -> None:
    rename_all(shards, f"../elsewhere/{elsewhere(shard_paths(shards)[0]).name}")


PATHS: dict[str, tuple[Callable[[pathlib.Path], object], str]] = {
    "an absolute path": (absolute, "not the name of a file"),
    "a path upwards": (upwards, "not the name of a file"),
    "a path downwards": (lambda s: set_index(s, "a/b.safetensors"), "not the name of"),
    "a path of Windows": (
        lambda s: set_index(s, "..\\b.safetensors"),
        "not the name of",
    ),
    "a name with a zero byte": (
        lambda s: set_index(s, "a\0.safetensors"),
        "not the name",
    ),
    "half a character": (lambda s: rename_all(s, "\ud800.safetensors"), "cannot"),
    "a name of 10,000 letters": (
        lambda s: rename_all(s, "a" * 10_000 + ".safetensors"),
        "too long",
    ),
    "a pickle": (lambda s: set_index(s, "pytorch_model.bin"), "names of .safetensors"),
    "a shard that is a number": (lambda s: set_index(s, 1), "names of .safetensors"),
    "a shard that is null": (lambda s: set_index(s, None), "names of .safetensors"),
    "a shard that is missing": (lambda s: shard_paths(s)[0].unlink(), "No such file"),
    "a shard named but not there": (
        lambda s: set_index(s, "x.safetensors"),
        "only the|No such",
    ),
    "a tensor its shard lacks": (
        lambda s: set_index(s, shard_paths(s)[0].name, "x"),
        "'x': only the index",
    ),
    "a tensor in the other shard": (
        lambda s: (
            set_index(s, shard_paths(s)[0].name),
            set_index(s, shard_paths(s)[1].name, "model.norm.weight"),
        ),
        "disagrees with the index",
    ),
    "a shard under two names": (
        lambda s: (
            (s / "x.safetensors").symlink_to(shard_paths(s)[0].name),
            set_index(s, "x.safetensors"),
        ),
        "disagrees with the index",
    ),
    "a map that is a list": (
        lambda s: (s / INDEX).write_text('{"weight_map": []}'),
        "weight_map",
    ),
    "no map": (lambda s: (s / INDEX).write_text("{}"), "weight_map"),
    "an empty map": (
        lambda s: (s / INDEX).write_text('{"weight_map": {}}'),
        "no tensor",
    ),
    "an index that is a list": (lambda s: (s / INDEX).write_text("[]"), "a list"),
    "a map with a tensor twice": (
        lambda s: (s / INDEX).write_text('{"weight_map": {"a": "b", "a": "b"}}'),
        "twice",
    ),
    "an index a million levels deep": (
        lambda s: (s / INDEX).write_text('{"a":' * 500_000),
        "JSON",
    ),
    "an index of a gigabyte": (
        lambda s: os.truncate(s / INDEX, 1 << 30),
        "1073741824 bytes",
    ),
    "an index that is a pipe": (lambda s: pipe(s / INDEX), "not a regular file"),
    "an index that is a link outside": (
        lambda s: link_to_elsewhere(s / INDEX),
        "outside",
    ),
    "a shard that is a link outside": (
        lambda s: link_to_elsewhere(shard_paths(s)[0]),
        "outside",
    ),
    "a shard in a folder that is a link": (
        lambda s: link_through_folder(shard_paths(s)[0]),
        "outside",
    ),
    "a link to blobs of no cache": (
        lambda s: link_to_blobs_of_no_cache(shard_paths(s)[0]),
        "outside",
    ),
    "a link to itself": (
        lambda s: replace_by_link(shard_paths(s)[0], shard_paths(s)[0].name),
        "cannot read",
    ),
    "a link to nothing": (
        lambda s: replace_by_link(shard_paths(s)[0], "x"),
        "No such file",
    ),
    "a shard that is endless": (
        lambda s: replace_by_link(shard_paths(s)[0], "/dev/zero"),
        "outside",
    ),
    "a shard that is a pipe": (lambda s: pipe(shard_paths(s)[0]), "not a regular file"),
    "a shard that is a folder": (
        lambda s: (
            shard_paths(s)[0].rename(s / "x"),
            (s / "model-00001-of-00002.safetensors").mkdir(),
        ),
        "not a regular file",
    ),
    "both one file and an index": (
        lambda s: (s / SINGLE).write_bytes(b""),
        "both model.safetensors and",
    ),
    "no config": (lambda s: (s / "config.json").unlink(), "config.json"),
    "a config that is a pipe": (
        lambda s: pipe(s / "config.json"),
        "not a regular file",
    ),
    "a config that is a link outside": (
        lambda s: link_to_elsewhere(s / "config.json"),
        "outside",
    ),
    "a config of a gigabyte": (
        lambda s: os.truncate(s / "config.json", 1 << 30),
        "1073741824",
    ),
    "a config that is not JSON": (
        lambda s: (s / "config.json").write_text("model"),
        "JSON",
    ),
    "a config that is a number": (
        lambda s: (s / "config.json").write_text("1"),
        "a int",
    ),
    "a config that is not UTF-8": (
        lambda s: (s / "config.json").write_bytes(b"\xff"),
        "utf-8",
    ),
}


@pytest.mark.parametrize("case", PATHS)
def test_a_folder_that_leads_astray(case: str, shards: pathlib.Path) -> None:
    change, message = PATHS[case]
    change(shards)
    with refuses(message):
        weights.open_checkpoint(shards)


def test_a_folder_with_a_pickle_alone(folder: pathlib.Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with refuses(r"pytorch_model\.bin, which is a pickle.*save_pretrained"):
        weights.open_checkpoint(folder)


def test_what_is_no_checkpoint(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("GGU")
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "missing", "No such file"),
        (tmp_path / "empty", "does not begin as a GGUF file"),
        (tmp_path / "text", "does not begin as a GGUF file"),
        (folder / SINGLE, "Give one of these"),
        (tmp_path / "pipe", "not a regular file"),
        (pathlib.Path("/dev/zero"), "not a regular file"),
        (tmp_path, "config.json"),
        (pathlib.Path("a\0b"), "null"),
        (pathlib.Path("a" * 5000), "too long"),
    ):
        with refuses(message):
            weights.open_checkpoint(path)
