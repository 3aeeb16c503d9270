"""The kernel of products with few rows: its answer, its cuts, its cost."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import PRESETS
from jaxllm.product_kernel import parts_of, split_product, tile_of
from sharding.hlo.ledger import read_ledger
from sharding.partition import Partition, Workload
from sharding.program import Program
from sharding.target import parse_target

# Said by jax 0.12 when it compiles one for a GPU; see docs/performance.md.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is depr")


@pytest.mark.parametrize(
    ("rows", "depth", "columns", "parts"),
    # Neither depth nor columns whole pieces; the last part shorter than the others.
    [(1, 256, 128, 2), (3, 384, 200, None), (16, 300, 384, 2), (40, 300, 200, 2)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_add_up(
    rows: int, depth: int, columns: int, parts: int | None, dtype: str
) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, depth)), dtype)
    weight = jnp.asarray(rng.standard_normal((depth, columns)), dtype)
    found = split_product(x, weight, parts=parts, interpret=True)
    assert found.shape[1:] == (rows, columns)
    want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    np.testing.assert_allclose(np.asarray(found, np.float64).sum(0), want, atol=1e-4)


def test_no_part_is_empty_and_all_are_small() -> None:
    for rows, depth, columns in [
        (1, 2048, 4096), (16, 2048, 4096), (16, 128, 64), (64, 7168, 4096)
    ]:  # fmt: skip
        parts = parts_of(rows, depth, columns)
        pieces = -(-depth // tile_of(rows).depth)
        assert (parts - 1) * -(-pieces // parts) < pieces
        assert parts == 1 or parts * rows * 4 * 2 <= depth * 2 / 4


def test_too_many_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="65 rows"):
        split_product(jnp.zeros((65, 128)), jnp.zeros((128, 128)), interpret=True)


@pytest.mark.parametrize("batch", [4, 64])
def test_the_ledger_counts_the_same_products(batch: int) -> None:
    partition = Partition.parse("tp2")
    found = []
    for residual in ("triton_split", "plain"):
        program = Program(
            phase="decode",
            config=dataclasses.replace(PRESETS["llama-3.1-8b"], num_layers=2),
            partition=partition,
            workload=Workload(batch_size=batch, input_len=1000, output_len=128),
            residual=residual,
        )
        compiled = program.compile(parse_target("h100:2"))
        found.append(read_ledger(compiled.text, partition.axes))
    split, plain = found
    count = sum(
        cost.op_name.endswith("split_product/pallas_call") for cost in split.costs
    )
    assert count == 2 * 3
    products = [sum(c.count * c.matmul_flops for c in f.costs) for f in found]
    assert products[0] == pytest.approx(products[1], rel=1e-3)
    assert split.hbm_bytes == pytest.approx(plain.hbm_bytes, rel=0.05)
