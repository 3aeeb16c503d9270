"""Replica groups mean the same devices in every spelling."""

import pytest

from sharding.hlo import AxisNamer, parse_groups
from sharding.hlo.groups import largest_chain

ROWS = ((0, 1, 2, 3), (4, 5, 6, 7))
COLUMNS = ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ROWS),
        ("{{0, 1, 2, 3}, {4, 5, 6, 7}}", ROWS),
        ("[2,4]<=[8]", ROWS),
        ("[4,2]<=[2,4]T(1,0)", COLUMNS),
        ("[1,8]<=[8]", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("mesh['a'=2,'b'=4] {'b'}", ROWS),
        ('mesh["a"=2,"b"=4] {"a"}', COLUMNS),
        (
            "mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}",
            ((0, 1, 2, 3, 4, 5, 6, 7),),
        ),
        ("mesh['t'=8] {'t'}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        # Axis 1 has 4 devices; the mesh was transposed before it was named.
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", ROWS),
        ("mesh['x'=2,'y'=4], device_ids=(0,1,2,3,4,5,6,7) {'x'}", COLUMNS),
        # 8 devices as 2 x 4: the major 2, then the minor 4.
        ("mesh['t'=8] {'t':(1)2}", COLUMNS),
        ("mesh['t'=8] {'t':(2)4}", ROWS),
        # A name may be anything that has no single quote.
        ("mesh['a+b'=2,'x:(1)2, y}]'=4] {'x:(1)2, y}]'}", ROWS),
        ("mesh['a/b c'=2,'a'=4] {'a/b c'}", COLUMNS),
        ("mesh['t'=8] {}", tuple((i,) for i in range(8))),
    ],
)
def test_spelling(text: str, expected: tuple[tuple[int, ...], ...]) -> None:
    assert sorted(parse_groups(text, 8)) == sorted(expected)


@pytest.mark.parametrize(
    "text",
    ["", "{{0,1}", "[2,4]<=[9]", "mesh['a'=2] {'b'}", "[2,4]<=[4,2]T(1,1)",
     "[1,9]<=[999999999999]", "mesh['t'=8] {'t':(3)2}", "0,1",
     "mesh['x'=2], device_ids=(0,0) {'x'}"],
)  # fmt: skip
def test_unknown_spelling(text: str) -> None:
    with pytest.raises(ValueError, match="no known spelling"):
        parse_groups(text, 8)


AXES = {"data": 2, "stage": 1, "tensor": 4}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (ROWS, "tensor"),
        (tuple(tuple(reversed(g)) for g in reversed(ROWS)), "tensor"),
        (COLUMNS, "data"),
        (((0, 1, 2, 3, 4, 5, 6, 7),), "data+tensor"),
        (ROWS[:1], "tensor"),  # only some devices take part
        (((0, 3), (1, 2)), "devices {0,3},{1,2}"),
        (((0, 1), (2, 3), (4, 5), (6, 7)), "devices {0,1},{2,3},{4,5},{6,7}"),
    ],
)
def test_axis_of_groups(groups: tuple[tuple[int, ...], ...], expected: str) -> None:
    assert AxisNamer(AXES).of_groups(groups) == expected
    assert AxisNamer(None).of_groups(groups).startswith("devices {")


@pytest.mark.parametrize(
    ("pairs", "expected", "length"),
    [
        (((0, 1), (1, 2), (2, 3), (3, 0)), "tensor", 4),
        (((0, 1), (2, 3)), "tensor", 2),
        (((0, 4), (1, 5)), "data", 2),  # a chain: nothing comes back
        (((0, 5),), "data+tensor", 2),
        (((0, 8),), "devices {0,8}", 2),
    ],
)
def test_axis_of_pairs(
    pairs: tuple[tuple[int, int], ...], expected: str, length: int
) -> None:
    assert AxisNamer(AXES).of_pairs(pairs) == expected
    assert largest_chain(pairs) == length
