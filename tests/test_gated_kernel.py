"""The kernel of gate, up and SwiGLU: where it can be, its mapping, its cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import PRESETS
from jaxllm.gated_kernel import gated_product
from jaxllm.layers import mlp_pieces, swiglu
from sharding import choices, gated
from sharding.hlo.ledger import Ledger, read_ledger
from sharding.limits import closed_form_flops
from sharding.mesh import make_mesh
from sharding.partition import Partition, Workload
from sharding.program import Program
from sharding.target import parse_target


def program(partition: str = "tp2", rules: str = "megatron", **changes) -> Program:
    asked = Program(
        phase="prefill",
        config=dataclasses.replace(PRESETS["llama-3.1-8b"], num_layers=2),
        partition=Partition.parse(partition, rules),
        workload=Workload(batch_size=4, input_len=1024, output_len=128),
        attention="cudnn",
        gate_up="mosaic",
    )
    return dataclasses.replace(asked, **changes)


@pytest.mark.parametrize("name", ["tp8", "dp2_tp2", "tp2_pp2"])
def test_every_device_joins_its_own_gate_and_up(name: str) -> None:
    config, partition = PRESETS["tiny"], Partition.parse(name)
    mesh = make_mesh(
        parse_target(f"cpu:{partition.num_devices}").mesh_devices(partition.shape)
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 6, config.embed_dim)).astype(np.float32)
    weight = rng.standard_normal((config.embed_dim, 2 * config.mlp_dim))
    weight = weight.astype(np.float32)
    with jax.set_mesh(mesh):
        gate = gated.make_gate(config, partition, (), phase="prefill", on_cpu=True)
        found = jax.jit(gate)(x, weight)
    want = swiglu(jnp.asarray(x @ weight), mlp_pieces(config))
    np.testing.assert_allclose(found, want, atol=1e-4)


def test_pieces_of_gate_and_up_lie_in_turn() -> None:
    gate_up = jnp.asarray([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]]])
    want = jax.nn.silu(jnp.asarray([1.0, 2.0, 5.0, 6.0])) * jnp.asarray([3.0, 4.0, 7.0, 8.0])
    np.testing.assert_allclose(swiglu(gate_up, 2)[0, 0], want, rtol=1e-6)


def _ledger(asked: Program) -> Ledger:
    target = parse_target(f"h100:{asked.partition.num_devices}")
    return read_ledger(asked.compile(target).text, asked.partition.axes)


@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_the_ledger_counts_the_same_products_and_fewer_bytes(name: str) -> None:
    asked = program(name)
    kernel, plain = _ledger(asked), _ledger(program(name, gate_up="plain"))
    assert 1.0 <= kernel.flops / closed_form_flops(asked) < 1.01
    assert kernel.collectives == plain.collectives
    products = [
        sum(c.count * c.matmul_flops for c in found.costs) for found in (kernel, plain)
    ]
    assert products[0] == products[1]
    # Gate and up written once and read once, by each layer in each tick.
    config, partition = asked.config, asked.partition
    layers = config.num_layers // partition.stage * asked.num_ticks
    tokens = 4 * 1024 // asked.prefill_micro_batches
    unwritten = layers * 2 * tokens * 2 * config.mlp_dim // partition.tensor * 2
    assert plain.hbm_bytes - kernel.hbm_bytes == pytest.approx(unwritten, rel=0.02)


def test_the_kernel_is_priced_as_the_product_that_it_is() -> None:
    found = [
        step.products
        for step in _ledger(program("tp2")).steps
        if "gated_product" in getattr(getattr(step, "cost", None), "op_name", "")
    ]
    assert len(found) == 2
    for (product,) in found:
        assert (product.batch, product.m, product.n, product.k) == (
            1, 4096, 14336, 4096,
        )  # fmt: skip


def test_what_does_not_suit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"100 rows are no multiple of 128.* Use an"):
        gated_product(
            jnp.zeros((100, 64), jnp.bfloat16),
            jnp.zeros((64, 256), jnp.bfloat16),
            pieces=1,
        )
    with pytest.raises(ValueError, match="this is float32"):
        program(dtype="float32", attention="blocks")
    with pytest.raises(ValueError, match="of 400 tokens: 400 rows"):
        program(workload=Workload(batch_size=4, input_len=100, output_len=8))
    with pytest.raises(ValueError, match="rules 'sequence' of tp2"):
        program("tp2", "sequence")
    with pytest.raises(ValueError, match="weights int8"):
        program(weights="int8")
    with pytest.raises(ValueError, match="overlap 'rows'"):
        program(overlap="rows")
    with pytest.raises(ValueError, match="no gate_up 'other'"):
        program(gate_up="other")
    with pytest.raises(ValueError, match="devices of platform tpu"):
        program(attention="blocks").compile(parse_target("v5e:1x2"))


@pytest.mark.parametrize(
    ("partition", "chip", "attached", "length", "gate_up"),
    [
        ("tp1", "h100", True, 1024, "mosaic"),
        ("pp2", "h200", True, 1024, "mosaic"),
        ("tp1", "h100", False, 1024, "plain"),
        ("tp1", "h100", True, 1000, "plain"),  # rows of tiles
        ("tp1", "v5e", True, 1024, "plain"),  # another kind of GPU, say
    ],
)
def test_it_is_where_it_was_timed(
    partition: str, chip: str, attached: bool, length: int, gate_up: str
) -> None:
    cpu = parse_target("cpu:8")
    kind = "v5e:1x1" if chip == "v5e" else f"{chip}:1"
    target = dataclasses.replace(
        cpu, platform="cuda", chip=parse_target(kind).chip, compile_only=not attached
    )
    workload = Workload(batch_size=20, input_len=length, output_len=128)
    asked = program(partition, workload=workload, gate_up="plain")
    found = choices.choose(asked, target, layers="unrolled")
    assert found.gate_up == gate_up
