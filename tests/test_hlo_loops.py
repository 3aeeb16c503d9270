"""Trip counts come from the text, or from following what a loop carries."""

import time

import jax
import jax.numpy as jnp
import pytest

from sharding.hlo import Loop, read_ledger

# One loop around x = x + x, 8 elements: 8 FLOPs an iteration.
LOOP = """\
HloModule m
%body (c: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {{
  %c = (s32[], s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=1
  %x = f32[8] get-tuple-element(%c), index=2
  %by = s32[] constant({step})
  %j = s32[] {update}(%i, %by)
  %y = f32[8] add(%x, %x)
  ROOT %t = (s32[], s32[], f32[8]) tuple(%j, %n, %y)
}}
%test (c: (s32[], s32[], f32[8])) -> pred[] {{
  %c = (s32[], s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=1
  ROOT %r = pred[] compare(%i, %n), direction={direction}
}}
ENTRY %main (x: f32[8], m: s32[]) -> f32[8] {{
  %x = f32[8] parameter(0)
  %m = s32[] parameter(1)
  %start = s32[] constant({start})
  %bound = s32[] constant({bound})
  %s = s32[] copy(%start)
  %t = (s32[], s32[], f32[8]) tuple(%s, %{carried}, %x)
  %w = (s32[], s32[], f32[8]) while(%t), condition=%test, body=%body{more}
  ROOT %y = f32[8] get-tuple-element(%w), index=2
}}
"""


def _text(**fields: object) -> str:
    values = {
        "start": 0, "bound": 10, "step": 1, "update": "add", "direction": "LT",
        "carried": "bound", "more": "", **fields,
    }  # fmt: skip
    return LOOP.format(**values)


def _read(**fields: object) -> tuple[Loop, int, tuple[str, ...]]:
    ledger = read_ledger(_text(**fields))
    adds = sum(c.count * c.flops for c in ledger.costs if c.name == "y")
    return ledger.loops[0], adds, ledger.warnings


@pytest.mark.parametrize(
    ("fields", "trips"),
    [
        ({}, 10),
        ({"step": 3}, 4),  # 0 3 6 9
        ({"start": 5, "bound": 101, "step": 2}, 48),
        ({"direction": "LE"}, 11),
        ({"direction": "NE", "step": 5}, 2),
        ({"start": 9, "bound": 0, "update": "subtract", "direction": "GE"}, 10),
        ({"start": 1, "bound": 100, "step": 2, "update": "multiply"}, 7),  # 1 ... 64
        ({"start": 10}, 0),
        # too long to run through
        ({"bound": 10_000_000}, 10_000_000),
        ({"bound": 10_000_000, "direction": "LE", "step": 3}, 3_333_334),
        ({"bound": 10_000_000, "direction": "NE", "step": 5}, 2_000_000),
        (
            {"start": 9_999_999, "bound": 0, "update": "subtract", "direction": "GE"},
            10_000_000,
        ),
        ({"more": ', backend_config={"known_trip_count":{"n":"7"}}'}, 7),
        (
            {"carried": "m", "more": ', backend_config={"known_trip_count":{"n":"7"}}'},
            7,
        ),
    ],
)
def test_trip_count(fields: dict[str, object], trips: int) -> None:
    loop, adds, warnings = _read(**fields)
    assert (loop.trip_count, loop.executions, adds) == (trips, trips, 8 * trips)
    assert loop.label == f"w x{trips:g}"
    assert not warnings


@pytest.mark.parametrize("fields", [{"carried": "m"}, {"direction": "NE", "step": 3}])
def test_what_cannot_be_followed_counts_once_and_says_so(
    fields: dict[str, object],
) -> None:
    loop, adds, warnings = _read(**fields)
    assert (loop.trip_count, loop.label, adds) == (None, "w per iteration", 8)
    assert "data-dependent" in warnings[0]


def test_a_data_dependent_loop_is_labelled_and_may_be_told_its_length() -> None:
    ledger = read_ledger(_text(carried="m"))
    (loop,) = ledger.data_dependent_loops
    assert ledger.inside(loop).flops == 8 + 1 + 1  # y, j and the comparison
    assert [c.per_iteration for c in ledger.costs if c.loop] == [True] * 3
    assert not any(c.per_iteration for c in ledger.costs if not c.loop)
    told = read_ledger(_text(carried="m"), trip_counts={"w": 7})
    assert not told.data_dependent_loops
    assert sum(c.count * c.flops for c in told.costs if c.name == "y") == 8 * 7
    # What the text says is not overruled.
    assert read_ledger(_text(), trip_counts={"w": 7}).loops[0].trip_count == 10


def test_a_random_number_in_the_carry_does_not_keep_the_reader() -> None:
    def draw(_, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        number, x = carry
        for _ in range(20):  # each makes the number's expression eight times as long
            number = number ^ (number << 13)
            number = number ^ (number >> 17)
            number = number ^ (number << 5)
        return number, x + number.astype(jnp.float32)

    run = jax.jit(lambda x: jax.lax.fori_loop(0, 100, draw, (jnp.uint32(1), x)))
    text = run.lower(jnp.zeros(4)).compile().as_text()
    assert text
    start = time.process_time()
    (loop,) = read_ledger(text).loops
    assert loop.trip_count == 100
    assert time.process_time() - start < 5


def test_a_trip_count_told_of_no_loop_is_said() -> None:
    (warning,) = read_ledger(_text(), trip_counts={"v": 7}).warnings
    assert warning == "no loop v, whose trip count was told; there are: w."


NESTED = """\
HloModule m
%inner (c: (s32[], s32[], f32[4])) -> (s32[], s32[], f32[4]) {
  %c = (s32[], s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=1
  %x = f32[4] get-tuple-element(%c), index=2
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  %y = f32[4] multiply(%x, %x)
  ROOT %t = (s32[], s32[], f32[4]) tuple(%j, %n, %y)
}
%less (c: (s32[], s32[], f32[4])) -> pred[] {
  %c = (s32[], s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=1
  ROOT %r = pred[] compare(%i, %n), direction=LT
}
%outer (c: (s32[], s32[6], f32[4])) -> (s32[], s32[6], f32[4]) {
  %c = (s32[], s32[6], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %table = s32[6] get-tuple-element(%c), index=1
  %x = f32[4] get-tuple-element(%c), index=2
  %at = s32[1] dynamic-slice(%table, %i), dynamic_slice_sizes={1}
  %n = s32[] bitcast(%at)
  %zero = s32[] constant(0)
  %t = (s32[], s32[], f32[4]) tuple(%zero, %n, %x)
  %w = (s32[], s32[], f32[4]) while(%t), condition=%less, body=%inner
  %y = f32[4] get-tuple-element(%w), index=2
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  ROOT %u = (s32[], s32[6], f32[4]) tuple(%j, %table, %y)
}
%test (c: (s32[], s32[6], f32[4])) -> pred[] {
  %c = (s32[], s32[6], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %six = s32[] constant(6)
  ROOT %r = pred[] compare(%i, %six), direction=LT
}
ENTRY %main (x: f32[4]) -> (s32[], s32[6], f32[4]) {
  %x = f32[4] parameter(0)
  %zero = s32[] constant(0)
  %table = s32[6] TABLE
  %t = (s32[], s32[6], f32[4]) tuple(%zero, %table, %x)
  ROOT %w = (s32[], s32[6], f32[4]) while(%t), condition=%test, body=%outer
}
"""


@pytest.mark.parametrize(
    ("table", "runs"),
    [
        ("iota(), iota_dimension=0", 0 + 1 + 2 + 3 + 4 + 5),
        ("constant({4,0,0,9,0,2})", 15),
    ],
)
def test_inner_bound_follows_the_outer_counter(table: str, runs: int) -> None:
    ledger = read_ledger(NESTED.replace("TABLE", table))
    outer, inner = ledger.loops
    assert (outer.trip_count, inner.trip_count, inner.executions) == (6, runs / 6, runs)
    assert inner.label == f"w x6 > w x{runs / 6:g}"
    assert sum(c.count * c.flops for c in ledger.costs if c.name == "y") == 4 * runs
