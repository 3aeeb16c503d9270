"""Checkpoints damaged at random are refused, or give what was saved.

Every case damages the header, index or config of a small sound checkpoint, seeded by
its number, and keeps the numbers behind it. Far more cases than the tests run:

    python -c "
    from tests.test_fuzz_files import fuzz
    print(fuzz('gguf', range(100_000)))"
"""

import json
import pathlib
import random
import struct
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from jaxllm import weights
from tests import checkpoints
from tests.hostile import ALLOWED_BYTES, CONFIG, FIELDS, TENSORS, is_ours, read_all
from tests.test_hostile_gguf import gguf_bytes, gguf_infos

safetensors = pytest.importorskip("safetensors")

# Lengths and counts where arithmetic goes wrong.
_EDGES = (0, 1, 2, 7, 8, 9, 31, 32, 33, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
_EDGES += (2**63, 2**64 - 8, 2**64 - 1)
_SNIPPETS = (
    *(b"{", b"}", b"[", b"]", b'"', b":", b",", b"null", b"true", b"NaN", b"-1"),
    *(b"1e999", b"0.5", b"9" * 30, b"[" * 2000, b"..", b"/", b"\\ud800", b"\\u0000"),
    *(
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"__metadata__",
        b"data_offsets",
        b"F16",
        b"F64",
    ),
)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Returns `content` with one to three things changed."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(out) + 1)
        stop = min(len(out), at + rng.choice((1, 2, 4, 8, rng.randrange(1, 100))))
        match rng.randrange(8):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(out):
                out[at] = rng.randrange(256)
            case 2:
                del out[at:]
            case 3:
                del out[at:stop]
            case 4:
                out[at:at] = out[at:stop]
            case 5:
                edge = struct.pack("<Q", rng.choice(_EDGES))
                size = rng.choice((4, 8))
                out[at : at + size] = edge[:size]
            case 6:
                # The number here, one up or down or another: lengths, sizes, offsets.
                number = int.from_bytes(out[at : at + 8], "little")
                number += rng.choice((-32, -1, 1, 32, rng.randrange(1 << 16)))
                out[at : at + 8] = (number % 2**64).to_bytes(8, "little")
            case _:
                snippet = rng.choice(_SNIPPETS)
                out[at : at + rng.choice((0, len(snippet)))] = snippet
    return bytes(out)


def redescribed(content: bytes, rng: random.Random) -> bytes:
    """Returns JSON with one value replaced by another of the file, or an odd one."""
    fields = json.loads(content)
    at, places, values = (
        [fields],
        [],
        [-1, 0, 2**63, 1e999, "", "..", None, True, [], {}],
    )
    while at:
        here = at.pop()
        items = here.items() if isinstance(here, dict) else enumerate(here)
        for key, value in items:
            places.append((here, key))
            values.append(value)
            if isinstance(value, dict | list):
                at.append(value)
    here, key = rng.choice(places)
    value = rng.choice(values)
    if rng.random() < 0.2 and isinstance(here, dict):
        here[rng.choice((str(value)[:40], key + "x"))] = here.pop(key)
    elif rng.random() < 0.3 and type(here[key]) is int:
        here[key] += rng.choice((-1, 1, 8, 768))
    else:
        here[key] = json.loads(json.dumps(value))
    return json.dumps(fields).encode()


def _damaged_header(content: bytes, rng: random.Random) -> bytes:
    """Returns a safetensors file with another header, and mostly its true length."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    change = rng.choice((damaged, redescribed))
    header = change(header.rstrip(), rng)
    if rng.random() < 0.1:
        return damaged(content[:8], rng)[:8] + header + data
    return len(header).to_bytes(8, "little") + header + data


def _damaged_gguf(content: bytes, rng: random.Random) -> bytes:
    """Returns a GGUF file with another header, and the numbers aligned behind it."""
    data = gguf_infos()[1]
    header = content[: len(content) - len(data)]
    header = damaged(header, rng)
    return header + bytes(-len(header) % 32) + data


def _damaged_json(content: bytes, rng: random.Random) -> bytes:
    return rng.choice((damaged, redescribed))(content, rng)


# What is damaged: a name in the folder, and how.
Kind = tuple[str, Callable[[bytes, random.Random], bytes]]
KINDS: dict[str, Kind] = {
    "safetensors": ("model.safetensors", _damaged_header),
    "index": ("model.safetensors.index.json", _damaged_json),
    "config": ("config.json", _damaged_json),
    "gguf": ("model.gguf", _damaged_gguf),
}


def fuzz(kind: str, cases: Iterable[int]) -> Counter[str]:
    """Opens damaged checkpoints; returns how many were refused and read.

    Raises:
      AssertionError: a case ended in something else than a refusal of ours, or in
        other arrays than were saved, or was read though the format's own library
        refuses it.
    """
    name, change = KINDS[kind]
    outcome = Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        checkpoints.write_folder(folder, FIELDS, TENSORS, 2 if kind == "index" else 1)
        if kind == "gguf":
            (folder / name).write_bytes(gguf_bytes())
        target = folder / name if kind == "gguf" else folder
        sound = (folder / name).read_bytes()
        expected = read_all(weights.open_checkpoint(target))
        for case in cases:
            content = change(sound, random.Random(case))
            (folder / name).write_bytes(content)
            try:
                checkpoint = weights.open_checkpoint(target)
                found = read_all(checkpoint)
            except Exception as error:
                if not is_ours(error):
                    raise AssertionError(f"case {case} of {kind}") from error
                outcome["refused"] += 1
                continue
            outcome["read"] += 1
            assert checkpoint.config.num_params == CONFIG.num_params, case
            assert found.keys() == expected.keys(), case
            for key, array in found.items():
                np.testing.assert_array_equal(array, expected[key], f"{case} {key}")
            if kind == "safetensors":
                try:
                    with safetensors.safe_open(folder / name, "np") as opened:
                        opened.keys()
                except safetensors.SafetensorError as error:
                    raise AssertionError(f"case {case} was read: {error}") from error
    return outcome


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused_or_does_not_matter(kind: str) -> None:
    outcome = fuzz(kind, range(1000))
    assert outcome["refused"] > 500
    assert outcome["read"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_damage_does_not_cost_memory(kind: str) -> None:
    tracemalloc.start()
    try:
        fuzz(kind, range(1000, 1100))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < ALLOWED_BYTES
