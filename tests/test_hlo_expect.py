"""Assertions for other people's tests: they hold, or say which line does not."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.hlo import (
    analyze,
    assert_collectives,
    assert_donated,
    assert_memory_below,
    assert_no_collectives,
    assert_no_weight_gather,
)

B, D, F, LAYERS = 16, 48, 96, 3


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def array(mesh: Mesh):
    def make(shape, *axes):
        sharding = NamedSharding(mesh, P(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    return make


@pytest.fixture(scope="module")
def step(array, mesh: Mesh):
    """Layers of Megatron under a scan, and a donated cache."""

    def run(weights, cache, x):
        def layer(x, w):
            return x + jax.nn.relu(x @ w[0]) @ w[1], None

        x, _ = jax.lax.scan(layer, x, weights)
        return x, cache + x

    weights = (
        array((LAYERS, D, F), None, None, "tensor"),
        array((LAYERS, F, D), None, "tensor"),
    )
    cache, x = array((B, D), "data"), array((B, D), "data")
    return jax.jit(run, donate_argnums=1).lower(weights, cache, x).compile()


@pytest.fixture(scope="module")
def gathering(array, mesh: Mesh):
    """A weight that the constraint on the activation makes XLA gather."""

    def run(x, w):
        y = jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P("data")))
        return jnp.tanh(y)

    x, w = array((B, D), "data"), array((D, F), None, "tensor")
    return jax.jit(run).lower(x, w).compile()


@pytest.mark.parametrize(
    "axis", ["data+tensor", "tensor+data", ("tensor", "data"), ("data", "tensor")]
)
def test_several_axes_are_named_in_any_order(array, mesh: Mesh, axis) -> None:
    names = ("tensor", "data")
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, names), mesh=mesh, in_specs=P(names), out_specs=P()
    )
    compiled = jax.jit(total).lower(array((B, D), names)).compile()
    assert_collectives(compiled, mesh, {axis: {"all-reduce": 1}})
    with pytest.raises(AssertionError, match=r"no all-reduce over data\+tensor; it"):
        assert_no_collectives(compiled, mesh, axis=axis, kind="all-reduce")
    with pytest.raises(ValueError, match="no mesh axis 'tensr'"):
        assert_collectives(compiled, mesh, {axis: {"all-reduce": 1}, "tensr": {}})


def test_counts_are_multiplied_by_loops(step, mesh: Mesh) -> None:
    assert_collectives(step, mesh, {"tensor": {"all-reduce": LAYERS}})
    analysis = analyze(step, mesh)
    assert_collectives(analysis, None, {"tensor": {"all-reduce": LAYERS}})
    assert_collectives(
        step.as_text(), dict(mesh.shape), {"tensor": {"all-reduce": LAYERS}}
    )


def test_a_wrong_count_shows_the_lines(step, mesh: Mesh) -> None:
    with pytest.raises(AssertionError) as error:
        assert_collectives(
            step, mesh, {"tensor": {"all-reduce": 1}, "data": {"permute": 2}}
        )
    message = str(error.value)
    assert f"all-reduce over tensor: expected 1, found {LAYERS}" in message
    assert "permute over data: expected 2, found 0" in message
    assert re.search(r"test_hlo_expect\.py:\d+", message)
    assert f"x{LAYERS}" in message


def test_what_is_not_named_must_not_happen(gathering, mesh: Mesh) -> None:
    with pytest.raises(
        AssertionError, match="all-gather over tensor: expected 0, found 1"
    ):
        assert_collectives(gathering, mesh, {})


def test_at_most(step, mesh: Mesh) -> None:
    assert_collectives(step, mesh, {"tensor": {"all-reduce": 9}}, at_most=True)
    with pytest.raises(AssertionError, match="at most 2, found 3"):
        assert_collectives(step, mesh, {"tensor": {"all-reduce": 2}}, at_most=True)


def test_small_ones_may_be_ignored(step, mesh: Mesh) -> None:
    payload = B // 2 * D * 4
    assert_collectives(step, mesh, {}, ignore_below_bytes=payload + 1)
    with pytest.raises(AssertionError):
        assert_collectives(step, mesh, {}, ignore_below_bytes=payload)


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"tensr": {"all-reduce": 1}}, r"no mesh axis 'tensr'.*'tensor': 4"),
        ({"data+tensr": {}}, "no mesh axis 'tensr'"),
        (
            {"tensor": {"allreduce": 1}},
            r"no kind of collective 'allreduce'.*all-reduce",
        ),
    ],
)
def test_misspelt_names_do_not_pass(step, mesh: Mesh, expected, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        assert_collectives(step, mesh, expected)


def test_another_mesh_than_the_analysis_had(step, mesh: Mesh) -> None:
    with pytest.raises(ValueError, match="not the mesh"):
        assert_collectives(analyze(step, mesh), {"tensor": 8}, {})


def test_nothing_is_sent(step, gathering) -> None:
    assert_no_collectives(step, axis="data")
    assert_no_collectives(step, kind="all-gather")
    assert_no_collectives(jax.jit(jnp.sin).lower(1.0).compile())
    with pytest.raises(AssertionError, match="no collective over tensor; it has 3"):
        assert_no_collectives(step, axis="tensor")
    with pytest.raises(AssertionError, match="no all-gather; it has 1"):
        assert_no_collectives(gathering, kind="all-gather")


def test_an_axis_counts_in_joined_ones_too(array, mesh: Mesh) -> None:
    x = array((B, D), "data", "tensor")
    compiled = jax.jit(jnp.sum).lower(x).compile()
    with pytest.raises(AssertionError, match=r"over data"):
        assert_no_collectives(compiled, mesh, axis="data")


def test_weights_stay_where_they_are(step, gathering) -> None:
    assert_no_weight_gather(step)
    with pytest.raises(
        AssertionError, match=r"w is gathered over tensor.*test_hlo_expect"
    ):
        assert_no_weight_gather(gathering)


def test_donated(step, gathering) -> None:
    assert_donated(step)
    assert_donated(step, 1)
    assert_donated(step, (1, 2), fraction=0.5)
    with pytest.raises(
        AssertionError, match=r"(?s)arguments \(1, 2\).*x, f32.*not donated"
    ):
        assert_donated(step, (1, 2))
    with pytest.raises(AssertionError, match="nothing is donated; pass donate_argnums"):
        assert_donated(gathering)


def test_donated_in_vain() -> None:
    with pytest.warns(UserWarning, match="donated buffers were not usable"):
        compiled = (
            jax.jit(lambda c, x: x + jnp.sum(c), donate_argnums=0)
            .lower(jnp.zeros((8, 8)), jnp.zeros(3))
            .compile()
        )
    with pytest.raises(AssertionError, match=r"(?s)0 B of 256 B.*c, f32\[8,8\]"):
        assert_donated(compiled)


def test_arguments_that_nothing_reads_are_left_out() -> None:
    def run(unused, cache, other):
        return cache + 1, other

    compiled = jax.jit(run, donate_argnums=1).lower(1.0, jnp.zeros(7), 2.0).compile()
    assert_donated(compiled, 1)
    with pytest.raises(AssertionError):
        assert_donated(compiled, 2)


def test_argnums_need_the_function(step) -> None:
    with pytest.raises(ValueError, match="Pass the compiled function"):
        assert_donated(analyze(step), 1)
    with pytest.raises(ValueError, match=r"no argument 3.*3\s+positional"):
        assert_donated(step, 3)


def test_memory(step) -> None:
    memory = analyze(step).memory
    assert memory.xla is not None
    most = max(memory.peak_bytes, memory.xla.total_bytes)
    assert_memory_below(step, most + 1)
    with pytest.raises(AssertionError, match=r"must be below.*(?s:.*)weights\[0\]"):
        assert_memory_below(step, most)


def test_the_examples_in_the_docs_hold(capsys: pytest.CaptureFixture[str]) -> None:
    page = pathlib.Path(__file__).parents[1] / "docs" / "inspecting.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 2
    exec("\n".join(blocks), {"__name__": page.name})
    assert "removed  tensor  all-gather" in capsys.readouterr().out
