"""Halves of a prompt in turns: the answer, the all-reduces, what runs beside them."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import decode
from jaxllm.config import PRESETS, TINY
from jaxllm.layers import group_size
from jaxllm.model import Layers
from jaxllm.quantized import WeightFormat, product, quantize
from sharding import choices
from sharding.hlo import Ledger, read_ledger
from sharding.hlo.records import Block, Step, Steps, Wait
from sharding.mesh import make_mesh
from sharding.overlap import make_turn
from sharding.partition import Partition, Workload
from sharding.program import Program
from sharding.target import parse_target
from tests import reference
from tests.test_model import empty_cache, to_params

LAYERS = 2


def test_turns_equal_the_papers() -> None:
    """On one device, where a sum has one part."""
    plain = reference.random_params(TINY, tied=False, seed=0)
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (4, 9))
    order: list[str] = []

    def turn(x, name, weight, other):
        order.append(name)
        return product(x, weight), other

    params, cache = to_params(plain, TINY), empty_cache(TINY, 4, 10)
    cache, found = decode.prefill(
        TINY, params, cache, jnp.asarray(tokens[:, :8]), turn=turn
    )
    expected = reference.logits(plain, TINY, tokens)
    np.testing.assert_allclose(found, expected[:, 7], atol=1e-4, rtol=1e-4)
    assert order == ["heads", "heads", "mlp", "mlp"]  # traced once for all layers
    # Both halves are in the cache.
    _, found = decode.decode_step(
        TINY, params, cache, jnp.asarray(tokens[:, 8]), jnp.int32(8)
    )
    np.testing.assert_allclose(found, expected[:, 8], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", [None, "int8", "int4"])
def test_a_turn_ends_in_the_product_of_all_devices(form: WeightFormat | None) -> None:
    partition = Partition.parse("tp2")
    turn = make_turn(TINY, partition, (), weights=form, wide=True)
    rng = np.random.default_rng(0)
    shape = (TINY.mlp_dim, TINY.embed_dim)
    weight: Any = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    if form:
        weight = quantize(weight, form, group_size("w_down", TINY))
    x = jnp.asarray(rng.standard_normal((3, 5, TINY.mlp_dim)), jnp.float32)
    other = jnp.asarray(rng.standard_normal((3, 5, TINY.embed_dim)), jnp.float32)
    with jax.set_mesh(make_mesh(np.array(jax.devices()[:2]).reshape(partition.shape))):
        total, same = jax.jit(turn, static_argnums=1)(x, "mlp", weight, other)
    np.testing.assert_allclose(total, product(x, weight), atol=1e-4)
    np.testing.assert_array_equal(same, other)


def _prefill(partition: str = "tp2", rules: str = "megatron", **changes) -> Program:
    program = Program(
        phase="prefill",
        config=dataclasses.replace(PRESETS["llama-3.1-8b"], num_layers=LAYERS),
        partition=Partition.parse(partition, rules),
        workload=Workload(batch_size=16, input_len=1024, output_len=128),
        attention="cudnn",
        overlap="rows",
    )
    return dataclasses.replace(program, **changes)


@functools.cache
def _read(**changes: Any) -> Ledger:
    program = _prefill(**changes)
    target = parse_target(f"h100:{program.partition.num_devices}")
    return read_ledger(program.compile(target).text, program.partition.axes)


def _beside(steps: Steps) -> Iterator[list[int]]:
    """Yields products between start and end of a block's all-reduces, loop by loop."""
    running: dict[str, int] = {}
    found = []
    for step in steps:
        if isinstance(step, Block):
            yield from _beside(step.steps)
        elif isinstance(step, Wait):
            if step.name in running:
                found.append(running.pop(step.name))
        elif _is_of_a_block(step):
            if step.is_beside:
                running[step.name] = 0
            else:
                found.append(0)
        else:
            running = {n: count + len(step.products) for n, count in running.items()}
    assert not running
    yield found


def _is_of_a_block(step: Step) -> bool:
    return any(
        sent.kind == "all-reduce"
        and ("/mlp/" in sent.op_name or "/att" in sent.op_name)
        for sent in step.sends
    )


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_all_but_the_last_sum_run_beside_products(layers: Layers) -> None:
    ledger = _read(layers=layers, overlap="rows")
    found = [counts for counts in _beside(ledger.steps) if counts]
    # In a loop, the last of each layer.
    assert [len(counts) for counts in found] == [
        4 * LAYERS if layers == "unrolled" else 4
    ]
    *first, last = found[0]
    assert min(first) > 0
    assert last == 0


def test_what_is_computed_and_sent_is_the_same() -> None:
    both = [_read(layers="unrolled", overlap=overlap) for overlap in ("rows", "none")]
    counts: list[Counter[int]] = []
    for ledger in both:
        counts.append(Counter())
        for row in ledger.collectives:
            if row.kind == "all-reduce":
                counts[-1][row.payload_bytes_each] += row.count
    halves, whole = counts
    size = 16 * 1024 * 4096 * 2
    assert whole[size] == 1 + 2 * LAYERS  # the embedding's, and two a layer
    assert halves == whole - Counter({size: 2 * LAYERS}) + Counter(
        {size // 2: 4 * LAYERS}
    )
    assert both[0].flops == pytest.approx(both[1].flops, rel=1e-3)


def test_halves_are_had_where_they_are_asked_for() -> None:
    prefill = _prefill(overlap="none")
    both = prefill, dataclasses.replace(prefill, phase="decode")
    target = parse_target("h100:2")
    for texts, overlap in ((["overlap=rows"], "rows"), ([], "none")):
        changes = choices.read_changes(texts)
        found = choices.choose_both(*both, target, changes=changes)
        assert [program.overlap for program in found] == [overlap, "none"]


def test_what_does_not_suit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"in decode: .*Use overlap='none'"):
        _prefill(phase="decode")
    one = Workload(batch_size=1, input_len=1024, output_len=128)
    with pytest.raises(ValueError, match=r"of 1 sequences at once: .*even number"):
        _prefill(workload=one)
    with pytest.raises(ValueError, match="of 1 sequences"):
        _prefill(micro_batches=16)
    for name, rules in (
        ("tp1", "megatron"),
        ("pp2", "megatron"),
        ("tp2", "sequence"),
        ("tp2", "replicated"),
        ("dp2_tp2", "two_d"),
    ):
        with pytest.raises(ValueError, match=f"{rules}' of {name}: there is no sum"):
            _prefill(name, rules)
    with pytest.raises(ValueError, match="no overlap 'columns'; there are none, rows"):
        _prefill(overlap="columns")
