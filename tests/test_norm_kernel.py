"""The kernel that adds and norms: its answer, what it refuses, what the ledger sees."""

import dataclasses
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import norm_kernel
from jaxllm.config import PRESETS
from jaxllm.norm_kernel import Mailbox, add_and_norm
from sharding.hlo.ledger import read_ledger
from sharding.partition import Partition, Workload
from sharding.program import Program
from sharding.target import parse_target

# Said by jax 0.12 when it compiles one for a GPU; see docs/performance.md.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is depr")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_formula(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, part = (jnp.asarray(rng.standard_normal((3, 64)), dtype) for _ in range(2))
    scale = jnp.asarray(rng.standard_normal(64), dtype)
    summed, normed = add_and_norm(x, part, scale, 1e-5, interpret=True)
    np.testing.assert_array_equal(summed, x + part)
    wide = np.asarray(x + part, np.float64)
    want = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        np.asarray(normed, np.float64),
        want * np.asarray(scale, np.float64),
        rtol=1e-6 if dtype == "float32" else 2e-2,
        atol=1e-6,
    )
    only, nothing = add_and_norm(x, part, None, 1e-5, interpret=True)
    np.testing.assert_array_equal(only, summed)
    assert nothing is None


def test_mailboxes_are_cut_without_overlap() -> None:
    box = Mailbox(peers=3, rows=5, width=64, protocol="letters")
    assert box.flags >= 5 * 4
    assert box.words == box.flags  # which letters bring themselves
    assert box.words % 8 == 0  # a letter is stored whole only where it is aligned
    # Of each number two bytes, and as many of flags.
    assert box.num_bytes == box.words + 2 * 2 * 5 * 64 * 4
    box = dataclasses.replace(box, protocol="rows")
    assert box.words >= box.flags + 2 * 2 * 5 * 4
    assert box.words % 16 == 0  # so are four words
    assert box.num_bytes == box.words + 2 * 2 * 5 * 64 * 2


def test_few_words_go_in_letters_and_many_in_rows() -> None:
    def protocol(rows: int) -> str:
        return Mailbox.of(peers=2, rows=rows, width=4096).protocol

    assert [protocol(1), protocol(64), protocol(65)] == ["letters", "letters", "rows"]


@pytest.mark.parametrize("vector", [1, 4])
def test_words_that_threads_send_at_once_lie_side_by_side(vector: int) -> None:
    threads, each = 64, 8
    place = np.asarray(norm_kernel.side_by_side(threads * each, each, vector))
    assert sorted(place) == list(range(threads * each))
    place = place.reshape(threads, each // vector, vector)
    for turn in range(each // vector):
        at_once = place[:, turn].ravel()
        np.testing.assert_array_equal(np.diff(at_once), 1)


def test_what_does_not_suit_is_refused() -> None:
    x = jnp.zeros((2, 96))
    with pytest.raises(ValueError, match="96 numbers a token"):
        add_and_norm(x, x, None, 1e-5, interpret=True)
    x, box = jnp.zeros((2, 64)), Mailbox.of(peers=2, rows=1, width=64)
    with pytest.raises(ValueError, match="in float32"):
        add_and_norm(x, x, None, 1e-5, mailbox=box)
    x = x.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="2 tokens of 64 numbers for a mailbox of 1"):
        add_and_norm(x, x, None, 1e-5, mailbox=box)


def _decode(partition: str = "tp2", rules: str = "megatron", **changes) -> Program:
    program = Program(
        phase="decode",
        config=dataclasses.replace(PRESETS["llama-3.1-8b"], num_layers=2),
        partition=Partition.parse(partition, rules),
        workload=Workload(batch_size=16, input_len=1000, output_len=128),
        residual="triton",
    )
    return dataclasses.replace(program, **changes)


def test_programs_that_it_does_not_suit() -> None:
    with pytest.raises(ValueError, match="rules 'two_d' of dp2_tp2"):
        _decode("dp2_tp2", "two_d")
    with pytest.raises(ValueError, match="in prefill"):
        _decode(phase="prefill")
    with pytest.raises(ValueError, match="no residual 'other'"):
        _decode(residual="other")
    many = Workload(batch_size=4096, input_len=1000, output_len=128)
    with pytest.raises(ValueError, match="above 4,194,304"):
        _decode("tp4", workload=many)
    assert _decode("tp2", workload=many)  # a ring sends as much to one peer
    with pytest.raises(ValueError, match="prompt_residual 'triton' in decode"):
        _decode(prompt_residual="triton")
    prompts = {"phase": "prefill", "residual": "plain", "prompt_residual": "triton"}
    with pytest.raises(ValueError, match="prompt_residual 'triton' with rules 'seq"):
        _decode("tp2", "sequence", **prompts)
    long = Workload(batch_size=1, input_len=131072, output_len=128)
    with pytest.raises(ValueError, match="which 32 bits can point"):
        _decode("tp2", workload=long, **prompts)
    with pytest.raises(ValueError, match="and overlap 'rows'"):
        _decode("tp2", overlap="rows", **prompts)


@pytest.mark.parametrize(
    ("phase", "partition"),
    [
        ("decode", "tp2"),
        ("decode", "dp2_tp2"),
        ("decode", "tp2_pp2"),
        ("prefill", "tp2"),
        ("prefill", "tp2_pp2"),
    ],
)
def test_the_ledger_sees_an_all_reduce(phase: str, partition: str) -> None:
    axes = Partition.parse(partition).axes
    target = parse_target(f"h100:{Partition.parse(partition).num_devices}")
    found = []
    name = "residual" if phase == "decode" else "prompt_residual"
    for residual in ("triton", "plain"):
        written = {"residual": "plain", "phase": phase, name: residual}
        program = _decode(partition, ticks="scanned", **written)
        ledger = read_ledger(program.compile(target).text, axes)
        counts: Counter[tuple[str, str, int]] = Counter()
        for row in ledger.collectives:
            counts[row.axis, row.kind, row.payload_bytes_each] += row.count
        found.append(counts)
    assert found[0] == found[1]
    assert any(axis == "tensor" and kind == "all-reduce" for axis, kind, _ in found[0])
