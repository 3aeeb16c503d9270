"""Replica groups in every spelling -> sets of device ids -> mesh axes.

    {{0,1},{2,3}}                          the ids themselves
    [2,4]<=[8]    [2,4]<=[4,2]T(1,0)       2 groups of 4 from an iota, transposed
    mesh['a'=2,'b'=4] {'b'}                the groups along axis b of a mesh
    mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b':(1)2}   half of b, permuted
    source_target_pairs={{0,1},{1,0}}      for permutes

Axis names inside the HLO may be invented by XLA ('axis_0'), so only the sets of
ids are compared with the caller's mesh. Ids are positions in
`mesh.devices.flat`, row-major: the last axis varies fastest.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

Groups = tuple[tuple[int, ...], ...]

_MAX_DEVICES = 1 << 20
_IOTA = re.compile(r"\[([\d,]+)\]\s*<=\s*\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"mesh\[(?P<axes>(?:'[^']*'|[^\]'])*)\]"
    r"(?:,?\s*device_ids=\((?P<ids>[^()]*(?:\([\d,]*\))?[^()]*)\))?"
    r"\s*\{(?P<by>(?:'[^']*'|[^}'])*)\}"
)
_NAME = r"""\s*('[^']*'|"[^"]*"|[\w.\-]+)"""  # in quotes, anything
_MESH_AXIS = re.compile(rf"{_NAME}\s*=\s*(\d+)\s*(?:,|$)")
_AXIS_REF = re.compile(rf"{_NAME}(?::\((\d+)\)(\d+))?\s*(?:,|$)")
_RESHAPED = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_ID_LISTS = re.compile(r"\{((?:\{[\d,\s]*\}[,\s]*)*)\}")


@functools.lru_cache(maxsize=4096)
def parse_groups(text: str, num_devices: int) -> Groups:
    """Returns the groups of device ids that `text` spells.

    Args:
      text: the value of `replica_groups` or `source_target_pairs`.
      num_devices: devices of the program; `{}` means one group of them all.

    Raises:
      ValueError: a spelling not listed at the top of this file, or ids that this many
        devices cannot have.
    """
    groups = _spelled(text.strip(), num_devices)
    if groups is None:
        raise ValueError(
            f"replica groups {text!r} of {num_devices} devices are in no known"
            " spelling; known are {{0,1},{2,3}}, [2,4]<=[4,2]T(1,0) and"
            " mesh['a'=2,'b'=4] {'b'}."
        )
    highest = max(itertools.chain.from_iterable(groups), default=0)
    if highest >= num_devices:
        raise ValueError(
            f"replica groups {text!r} name device {highest}; the header of the text"
            f" says that there are {num_devices}. Ids are below that number. Pass the"
            " whole text, header included."
        )
    return groups


def _spelled(stripped: str, num_devices: int) -> Groups | None:
    """Returns the groups of any known spelling, or None."""
    if match := _ID_LISTS.fullmatch(stripped):
        groups = tuple(_ints(g) for g in re.findall(r"\{([\d,\s]*)\}", match[1]))
        groups = tuple(g for g in groups if g)
        return groups or (tuple(range(num_devices)),)
    if match := _IOTA.fullmatch(stripped):
        sizes, dims, order = (_ints(g) for g in match.groups(default=""))
        fits = _is_sane(dims, order) and math.prod(sizes) == math.prod(dims)
        if fits and (ids := _iota(dims, order)):
            # The leading sizes number the groups, the last is a group's size.
            return _chunks(ids, sizes[-1])
    if match := _MESH.fullmatch(stripped):
        return _mesh_groups(match)
    return None


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))


def _chunks(ids: Sequence[int], size: int) -> Groups:
    return tuple(tuple(ids[i : i + size]) for i in range(0, len(ids), size))


def _is_sane(dims: Sequence[int], order: Sequence[int]) -> bool:
    """Whether these can be the sizes, and a permutation, of so many devices."""
    permuted = not order or sorted(order) == list(range(len(dims)))
    return permuted and 0 < math.prod(dims) <= _MAX_DEVICES


def _iota(dims: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Returns arange(prod(dims)).reshape(dims).transpose(order).flatten()."""
    strides = [math.prod(dims[d + 1 :]) for d in range(len(dims))]
    order = order or range(len(dims))
    ranges = [range(0, dims[d] * strides[d], strides[d]) for d in order]
    return tuple(sum(index) for index in itertools.product(*ranges))


def _listed(pattern: re.Pattern[str], text: str) -> list[tuple[str, ...]] | None:
    """Returns what each of a list is, its name first, or None if one is not that."""
    found, at = [], 0
    while at < len(text):
        match = pattern.match(text, at)
        if not match:
            return None
        name, *rest = match.groups(default="")
        found.append((name[1:-1] if name[0] in "'\"" else name, *rest))
        at = match.end()
    return found


def _mesh_groups(match: re.Match[str]) -> Groups | None:
    """Returns the groups of `mesh[...] {...}`, or None if it makes no sense."""
    axes, refs = _listed(_MESH_AXIS, match["axes"]), _listed(_AXIS_REF, match["by"])
    if not axes or refs is None:
        return None
    names, sizes = [name for name, _ in axes], [int(size) for _, size in axes]
    count = math.prod(sizes)
    if not _is_sane(sizes, ()):
        return None
    ids = tuple(range(count))
    if match["ids"] is not None:
        if reshaped := _RESHAPED.fullmatch(match["ids"].strip()):
            dims, order = _ints(reshaped[1]), _ints(reshaped[2] or "")
            ids = _iota(dims, order) if _is_sane(dims, order) else ()
        else:
            ids = _ints(match["ids"])
    if len(ids) != count or sorted(ids) != list(range(count)):
        return None

    chosen: list[tuple[str, int, int]] = []  # (axis, size before, size)
    for name, before, size in refs:
        if name not in names:
            return None
        whole = sizes[names.index(name)]
        chosen.append((name, int(before or 1), int(size or whole)))
    groups: dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]] = {}
    for position, index in enumerate(itertools.product(*map(range, sizes))):
        inside, outside = [], list(index)
        for name, before, size in chosen:
            axis = names.index(name)
            after = sizes[axis] // (before * size)
            if not after or before * size * after != sizes[axis]:
                return None
            digit = index[axis] // after % size
            inside.append(digit)
            outside[axis] -= digit * after
        groups.setdefault(tuple(outside), []).append((tuple(inside), ids[position]))
    return tuple(tuple(i for _, i in sorted(g)) for g in groups.values())


class AxisNamer:
    """Names the mesh axes along which groups of device ids lie.

    Args:
      axes: sizes by name in mesh order, or None to always spell the ids.
    """

    def __init__(self, axes: Mapping[str, int] | None):
        self._sizes = {k: v for k, v in (axes or {}).items() if v > 1}
        self.num_devices = math.prod(self._sizes.values())
        self._partitions: list[tuple[str, frozenset[frozenset[int]]]] = []
        for count in range(1, len(self._sizes) + 1):
            for subset in itertools.combinations(self._sizes, count):
                self._partitions.append(("+".join(subset), self._partition(subset)))
        self._cache: dict[tuple[str, Groups], str] = {}

    def _partition(self, subset: Sequence[str]) -> frozenset[frozenset[int]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in range(self.num_devices):
            at = self._coordinates(i)
            key = tuple(at[a] for a in self._sizes if a not in subset)
            groups.setdefault(key, []).append(i)
        return frozenset(frozenset(g) for g in groups.values())

    def _coordinates(self, device: int) -> dict[str, int]:
        at = {}
        for name, size in reversed(self._sizes.items()):
            device, at[name] = divmod(device, size)
        return at

    def of_groups(self, groups: Groups) -> str:
        """Returns "tensor", "stage+tensor", or "devices {0,3},{1,2}"."""
        key = ("groups", groups)
        if key not in self._cache:
            self._cache[key] = self._name_groups(groups)
        return self._cache[key]

    def _name_groups(self, groups: Groups) -> str:
        wanted = frozenset(frozenset(g) for g in groups)
        exact = (name for name, p in self._partitions if p == wanted)
        partial = (name for name, p in self._partitions if wanted <= p)
        return next(itertools.chain(exact, partial), "") or spell_groups(groups)

    def of_pairs(self, pairs: Groups) -> str:
        """Returns the axes along which source and target differ, likewise."""
        key = ("pairs", pairs)
        if key not in self._cache:
            ids = set(itertools.chain.from_iterable(pairs))
            differ: set[str] = set()
            for source, target in pairs:
                a, b = self._coordinates(source), self._coordinates(target)
                differ |= {axis for axis in self._sizes if a[axis] != b[axis]}
            known = differ and max(ids) < self.num_devices
            self._cache[key] = (
                "+".join(a for a in self._sizes if a in differ)
                if known
                else spell_groups(pairs)
            )
        return self._cache[key]


def largest_chain(pairs: Groups) -> int:
    """Returns the most devices that pairs link into one ring or chain; 1 if none."""
    chains: dict[int, set[int]] = {}
    for source, target in pairs:
        joined = chains.get(source, {source}) | chains.get(target, {target})
        chains.update(dict.fromkeys(joined, joined))
    return max((len(chain) for chain in chains.values()), default=1)


def spell_groups(groups: Iterable[Iterable[int]]) -> str:
    """Returns "devices {0,3},{1,2}"."""
    return "devices " + ",".join("{" + ",".join(map(str, g)) + "}" for g in groups)
