"""The kernel of one token's attention: its answer, what it writes, what it costs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.attention import decode_attention
from jaxllm.cache import KV, CacheLayer
from jaxllm.config import PRESETS
from jaxllm.layers import turned
from jaxllm.token_kernel import grouped, splits_of, token_attention
from sharding.hlo.ledger import Ledger, read_ledger
from sharding.partition import Partition, Workload
from sharding.program import Program
from sharding.target import parse_target

# Said by jax 0.12 when it compiles one for a GPU; see docs/performance.md.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is depr")


def _arrays(shape: tuple[int, ...], length: int, dtype: str):
    rng = np.random.default_rng(0)
    batch, heads, _, width = shape

    def make(*sizes: int):
        return jnp.asarray(rng.standard_normal(sizes), dtype)

    qkv = make(batch, heads, shape[2] + 2, width)
    cache = KV(*(make(batch, heads, length, width) for _ in range(2)))
    angles = jnp.asarray(rng.uniform(0, 300, (batch, width // 2)), jnp.float32)
    return qkv, angles, cache


def _same(left: KV, right: KV) -> bool:
    return all(
        np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize(
    ("shape", "length", "positions", "splits"),
    [
        # The first, an inner and the last position; a last block that is not full.
        ((3, 1, 4, 64), 300, [0, 130, 299], None),
        ((2, 1, 8, 128), 256, [255, 128], 1),
        ((1, 2, 3, 16), 384, [257], 3),  # 3 queries a head, as SmolLM2 has
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parts", [1, 3])
def test_equals_plain_attention(
    shape: tuple[int, ...],
    length: int,
    positions: list[int],
    splits: int | None,
    parts: int,
    dtype: str,
) -> None:
    qkv, angles, kv = _arrays(shape, length, dtype)
    at = jnp.asarray(positions, jnp.int32)
    q, k, v = turned(qkv[:, None], angles[:, None])
    written = CacheLayer(kv=kv).write(KV(k[:, 0, :, None], v[:, 0, :, None]), at).kv
    want = decode_attention(q, written, at)[:, 0]
    if parts > 1:  # float32, whose sums are the product to the bit
        pieces = [qkv.astype(jnp.float32) * share for share in (0.5, 0.25, 0.25)]
    else:
        pieces = [qkv]
    turns = jnp.cos(angles), jnp.sin(angles)
    inputs = jnp.stack(pieces), *turns, kv, at
    out, new = token_attention(*inputs, splits=splits, interpret=True)
    # Turned with another rounding of sums.
    assert _same(KV(written.k, new.v), written)
    np.testing.assert_allclose(
        np.asarray(new.k, np.float32),
        np.asarray(written.k, np.float32),
        rtol=1e-2 if dtype == "bfloat16" else 0,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        np.asarray(out, np.float32),
        np.asarray(want, np.float32),
        atol=2e-6 if dtype == "float32" else 1e-2,
    )
    _, kept = token_attention(*inputs, jnp.asarray(True), splits=splits, interpret=True)
    assert _same(kept, kv)


def test_heads_computed_several_times_share_a_key() -> None:
    qkv, _, _ = _arrays((2, 6, 2, 16), 8, "float32")
    (joined,) = grouped(qkv[None], 3)
    assert joined.shape == (2, 3, 2 * 2 + 2, 16)
    np.testing.assert_array_equal(joined[:, 1, :2], qkv[:, 2, :2])
    np.testing.assert_array_equal(joined[:, 1, 2:4], qkv[:, 3, :2])
    np.testing.assert_array_equal(joined[:, 1, 4:], qkv[:, 2, 2:])
    np.testing.assert_array_equal(grouped(qkv[None], 6)[0], qkv)


def test_positions_are_split_where_heads_are_few() -> None:
    assert splits_of(1, 8, 1152) == 18
    assert splits_of(16, 8, 1152) == 3
    assert splits_of(256, 8, 1152) == 1
    assert splits_of(1, 1, 64) == 1


def test_wrong_shapes_are_refused() -> None:
    for shape, match in (
        ((1, 1, 17, 16), "17 query heads"),
        ((1, 1, 4, 24), "heads 24 wide"),
    ):
        qkv, angles, kv = _arrays(shape, 32, "float32")
        with pytest.raises(ValueError, match=match):
            token_attention(
                qkv[None], angles, angles, kv, jnp.zeros(1, jnp.int32), interpret=True
            )


def _decode(**changes) -> Program:
    program = Program(
        phase="decode",
        config=dataclasses.replace(PRESETS["llama-3.1-8b"], num_layers=2),
        partition=Partition.parse("tp2"),
        workload=Workload(batch_size=16, input_len=1000, output_len=128),
        token_attention="triton",
    )
    return dataclasses.replace(program, **changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layers": "scanned"}, "cache in stacks"),
        ({"partition": Partition.parse("tp2", "kv_seq")}, "positions split"),
        ({"token_attention": "other"}, "no token attention 'other'"),
    ],
)
def test_programs_that_it_does_not_suit(changes: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _decode(**changes)


def _products(ledger: Ledger) -> int:
    return sum(cost.count * cost.matmul_flops for cost in ledger.costs)


def test_the_ledger_knows_it_and_the_cache_is_updated_in_place() -> None:
    kernel, plain = (
        _decode(token_attention=name).compile(parse_target("h100:2"))
        for name in ("triton", "einsum")
    )
    axes = Partition.parse("tp2").axes
    ledger, other = read_ledger(kernel.text, axes), read_ledger(plain.text, axes)
    assert kernel.text.count('custom_call_target="__gpu$xla.gpu.triton"') == 2 * 2
    assert _products(ledger) == _products(other)
    assert ledger.hbm_bytes == pytest.approx(other.hbm_bytes, rel=0.01)
    assert kernel.alias_bytes == plain.alias_bytes
    assert kernel.memory.activations_bytes < 0.1 * kernel.memory.kv_bytes
