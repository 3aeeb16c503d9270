"""Two programs side by side: what was added, what went, and where."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.chips import CHIPS
from sharding.hlo import Analysis, Difference, analyze, compare

DATA = pathlib.Path(__file__).parent / "data" / "hlo"
DECODE = DATA / "decode.h100.jax0.12.hlo"
AXES = {"data": 1, "stage": 2, "tensor": 4}


def _figures(difference: Difference) -> dict[str, tuple[float, float]]:
    return {f.name: (f.before, f.after) for f in difference.figures}


@pytest.fixture(scope="module")
def programs() -> tuple[Analysis, Analysis]:
    """A product whose activation is constrained well, and whose is not."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def array(shape, *axes):
        sharding = NamedSharding(mesh, P(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def run(x, up, down, *, hidden: P):
        place = NamedSharding(mesh, hidden)
        inner = jax.lax.with_sharding_constraint(x @ up, place)
        return jax.nn.relu(inner) @ down

    arrays = (
        array((16, 48), "data"),
        array((48, 96), None, "tensor"),
        array((96, 48), "tensor"),
    )
    good, bad = (
        analyze(
            jax.jit(run, static_argnames="hidden").lower(*arrays, hidden=h).compile()
        )
        for h in (P("data", "tensor"), P("data"))
    )
    return bad, good


def test_what_a_constraint_removes(programs: tuple[Analysis, Analysis]) -> None:
    found = compare(*programs)
    assert not found.is_same
    gathers = [c for c in found.collectives if c.either.kind == "all-gather"]
    assert gathers
    assert all(c.verb == "removed" and c.after is None for c in gathers)
    assert all(c.either.axis == "tensor" and c.wire_bytes < 0 for c in gathers)
    assert all(c.either.source.startswith("test_hlo_diff.py:") for c in gathers)
    (row,) = [row for row in found.by_axis if row[1] == "all-gather"]
    assert row == ("tensor", "all-gather", len(gathers), 0)
    before, after = _figures(found)["sent over tensor, bytes"]
    assert after == 16 // 2 * 48 * 4 * 3 // 2 < before
    assert "removed  tensor  all-gather" in str(found)


def test_the_other_way_round_it_is_added(programs: tuple[Analysis, Analysis]) -> None:
    forth, back = compare(*programs), compare(*reversed(programs))
    assert {c.verb for c in back.collectives} >= {"added"}
    assert _figures(back) == {k: (b, a) for k, (a, b) in _figures(forth).items()}
    assert back.advice_new == forth.advice_gone


def test_a_program_is_the_same_as_itself() -> None:
    found = analyze(DECODE, AXES, CHIPS["h100"])
    same = compare(found, found)
    assert same.is_same
    assert (same.collectives, same.by_axis) == ((), ())
    assert "Nothing differs." in str(same)
    assert any(f.name == "least time, s" for f in same.figures)


@pytest.mark.parametrize(
    ("change", "verbs"),
    [
        ({"source": "make.py:999"}, []),  # the line moved
        ({"op_name": "other", "source": "make.py:999"}, []),  # renamed
        ({"payload_bytes": 1, "wire_bytes": 2}, ["changed"]),
        ({"count": 3}, ["changed"]),
        ({"axis": "stage"}, ["added", "removed"]),
        ({"kind": "all-gather"}, ["added", "removed"]),
    ],
)
def test_collectives_are_matched(change: dict, verbs: list[str]) -> None:
    before = analyze(DECODE, AXES)
    first, *rest = before.ledger.collectives
    rows = (dataclasses.replace(first, **change), *rest)
    ledger = dataclasses.replace(before.ledger, collectives=rows)
    after = dataclasses.replace(before, ledger=ledger)
    found = compare(before, after)
    assert sorted(c.verb for c in found.collectives) == verbs


def test_html_is_escaped() -> None:
    before = analyze(DECODE, AXES)
    after = dataclasses.replace(before, name="<script>")
    assert "<script>" not in compare(before, after)._repr_html_()
