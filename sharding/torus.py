"""Groups of chips on a torus: which chips make a group, and what box they fill.

The chips of a TPU slice sit on a grid and are wired to their neighbours, so a group
that fills a compact box (2x2) has more links inside it than one that lies in a line
(1x4). `compact_order` places the axes of a mesh that way, and `compact_box` says what
box a group of some size then fills.
"""

import math
from collections.abc import Sequence

import numpy as np


def compact_box(size: int, dims: int) -> tuple[int, ...]:
    """Returns the most cubic box of `size` chips, its longest side first.

    Example:
      >>> compact_box(8, dims=2), compact_box(8, dims=3)
      ((4, 2), (2, 2, 2))
    """
    box = [1] * dims
    for prime in _primes(size):
        box[box.index(min(box))] *= prime
    return tuple(sorted(box, reverse=True))


def compact_order(
    positions: Sequence[tuple[int, ...]], shape: Sequence[int]
) -> np.ndarray:
    """Returns which position each place of a mesh gets, an array of their indices.

    From the last axis to the first, each prime factor of an axis goes to the grid
    dimension along which its box is shortest so far, and among equals to the one with
    least room. Within an axis positions are visited back and forth, so consecutive
    ones are neighbours. Positions that are no full box, or an axis that fits none,
    leave the order as it is.

    Args:
      positions: of every device, as (x, y, z, device on the chip): the last
        dimension is used up first.
      shape: of the mesh; as many places as positions.

    Example:
      >>> grid = [(x, y, 0, 0) for x in range(2) for y in range(4)]
      >>> [grid[i][:2] for i in compact_order(grid, (2, 4))[0]]
      [(0, 0), (0, 1), (1, 1), (1, 0)]
    """
    unchanged = np.arange(len(positions)).reshape(tuple(shape))
    grid = np.array(positions) - np.min(positions, axis=0)
    room = [int(extent) + 1 for extent in grid.max(axis=0)]
    if math.prod(room) != len(positions) or len(set(positions)) != len(positions):
        return unchanged
    last = len(room) - 1
    stride = np.ones(len(room), int)
    walks: list[np.ndarray] = []  # of each axis, last first: (size, dimensions)
    for size in reversed(shape):
        box = np.ones(len(room), int)
        for prime in _primes(size):
            free = [i for i, extent in enumerate(room) if extent % prime == 0]
            if not free:
                return unchanged
            i = min(free, key=lambda i: (i != last, box[i], room[i]))
            box[i] *= prime
            room[i] //= prime
        walks.append(np.array(_snake(box.tolist())) * stride)
        stride *= box
    index_at = {tuple(place): index for index, place in enumerate(grid.tolist())}
    order = np.empty(tuple(shape), int)
    for place in np.ndindex(*shape):
        where = sum(w[i] for w, i in zip(reversed(walks), place, strict=True))
        order[place] = index_at[tuple(np.asarray(where).tolist())]
    return order


def _snake(box: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns every position of a box, each beside the one before.

    Example:
      >>> _snake((2, 3))
      [(0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 0)]
    """
    if not box:
        return [()]
    rest = _snake(box[1:])
    return [
        (i, *p) for i in range(box[0]) for p in (rest if i % 2 == 0 else rest[::-1])
    ]


def _primes(n: int) -> list[int]:
    """Returns the prime factors of n, largest first.

    Example:
      >>> _primes(12)
      [3, 2, 2]
    """
    factors, p = [], 2
    while n > 1:
        while n % p == 0:
            factors.append(p)
            n //= p
        p += 1
    return factors[::-1]
