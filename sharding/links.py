"""How long a collective takes by published figures: wiring, bandwidth and latency."""

from sharding import torus
from sharding.chips import Chip

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "permute",
    "broadcast",
)
_TORUS_DIMS = {"torus2d": 2, "torus3d": 3}


def links_s(chip: Chip, kind: str, group_size: int, wire_bytes: float) -> float:
    """Returns the time of one collective from published figures.

        T = latency + wire_bytes / (links * link_bytes_per_s)
        latency = collective_latency_s + hop_latency_s * (steps - steps of 2 devices)

    How many `links` a group of n devices drives at once, and how many `steps` it
    takes, follows from how the chips are wired:

        topology   links                     steps of one pass
        switch     all                       n - 1, a ring
        mesh       n - 1, one to each peer   n - 1
        torus      1 for each side of the    sum of (side - 1);
                   group's box; 2 where the  side / 2 where
                   side closes to a ring     it closes

    An all-reduce makes two passes. A permute is one step; it drives all links of a
    switch and one link elsewhere. The box of a torus group is the most cubic one, as
    `Target.mesh_devices` places it. A side closes only on a full dimension: 16 chips
    of a 2D torus, and in 3D where every side is a multiple of 4 (optical switches
    join cubes of 4 x 4 x 4), https://jax-ml.github.io/scaling-book/tpus.

    It leaves out what other groups put on the same links, cheaper algorithms for
    small messages, and reduction inside switches. The two devices of a tpu7x chip
    are treated as neighbours on the torus with half of a link's rate each.

    Args:
      chip: of one device, from `Chip.per_device`.
      kind: one of `KINDS`.
      group_size: devices that take part together.
      wire_bytes: what one device sends.

    Raises:
      ValueError: the kind of collective is unknown.
    """
    if group_size < 2:
        return 0.0
    further = _steps(kind, group_size, chip) - _steps(kind, 2, chip)
    latency_s = chip.collective_latency_s + chip.hop_latency_s * further
    bytes_per_s = links_used(kind, group_size, chip) * chip.link_bytes_per_s
    return latency_s + wire_bytes / bytes_per_s


def links_used(kind: str, group_size: int, chip: Chip) -> int:
    """Returns how many links one device of a group drives; see `links_s`.

    Example:
      >>> from sharding.chips import CHIPS
      >>> [links_used("all-reduce", n, CHIPS["h100"]) for n in (2, 8)]
      [18, 18]
      >>> [links_used("all-reduce", n, CHIPS["mi325x"]) for n in (2, 8)]
      [1, 7]
      >>> [links_used("all-reduce", n, CHIPS["v5p"]) for n in (2, 4, 8)]
      [1, 2, 3]
    """
    if chip.topology == "switch":
        return chip.links
    if kind == "permute":
        return 1
    if chip.topology == "mesh":
        return min(group_size - 1, chip.links)
    sides = _sides(group_size, chip)
    return min(sum(2 if closes else 1 for _, closes in sides), chip.links)


def _steps(kind: str, group_size: int, chip: Chip) -> int:
    """Returns how many times data is handed on; see `links_s`."""
    if kind not in KINDS:
        raise ValueError(
            f"cannot price a collective of kind {kind!r} over {group_size} devices; the"
            f" known kinds are {', '.join(KINDS)}. Unknown is an error, never free."
            " Teach sharding/links.py its steps."
        )
    if kind == "permute":
        return 1
    if chip.topology in _TORUS_DIMS:
        sides = _sides(group_size, chip)
        one_pass = sum(side // 2 if closes else side - 1 for side, closes in sides)
    else:
        one_pass = group_size - 1
    return 2 * one_pass if kind == "all-reduce" else one_pass


def _sides(group_size: int, chip: Chip) -> list[tuple[int, bool]]:
    """Returns the sides of a group's box on the torus, and whether each closes."""
    dims = _TORUS_DIMS[chip.topology]
    box = torus.compact_box(group_size, dims)
    cubes = all(side % 4 == 0 for side in box)
    return [(s, s % 16 == 0 if dims == 2 else cubes) for s in box if s > 1]
