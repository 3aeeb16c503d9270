"""AxisRules: which mesh axes split each named dimension; total and checked."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from jax.sharding import PartitionSpec

from jaxllm.axes import AXES

MESH_AXES = ("data", "stage", "tensor")

# The name of a dimension, or of several that lie in one, the outermost first.
Name: TypeAlias = "str | tuple[Name, ...] | None"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """A table from dimension names to the mesh axes that split them.

    Attributes:
      name: how the command line and reports call it.
      table: one row for each name of `jaxllm.axes.AXES`; `()` means whole.
      decode: rows that differ while decoding, when there is one query position.

    Raises:
      ValueError: a row is missing, unknown, or names an unknown mesh axis.
    """

    name: str
    table: Mapping[str, tuple[str, ...]]
    decode: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = set(self.table) ^ set(AXES) | set(self.decode) - set(AXES)
        if wrong:
            raise ValueError(
                f"rules {self.name!r} must have one row for each dimension; missing or"
                f" unknown: {', '.join(sorted(wrong))}. Dimensions are"
                f" {', '.join(AXES)}."
            )
        for table in (self.table, self.decode):
            for dimension, axes in table.items():
                for axis in axes:
                    if axis not in MESH_AXES:
                        raise ValueError(
                            f"rules {self.name!r} split {dimension!r} over {axis!r}."
                            f" Mesh axes are {', '.join(MESH_AXES)}."
                        )

    def axes_of(self, name: Name, phase: str) -> tuple[str, ...]:
        """Returns the mesh axes that split dimension `name` in `phase`."""
        if name is None:
            return ()
        if isinstance(name, tuple):
            return tuple(axis for each in name for axis in self.axes_of(each, phase))
        if name not in self.table:
            near = difflib.get_close_matches(name, AXES, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"no dimension is called {name!r}; dimensions are {', '.join(AXES)}."
                + hint
            )
        if phase == "decode" and name in self.decode:
            return self.decode[name]
        return self.table[name]

    def spec(
        self,
        names: Sequence[Name],
        *,
        phase: str,
        keep: Sequence[str] = MESH_AXES,
    ) -> PartitionSpec:
        """Returns how an array with dimensions `names` is split.

        Args:
          names: one for each dimension; None is never split.
          phase: "prefill" or "decode".
          keep: the mesh axes to mention; others are left out of the spec.

        Raises:
          ValueError: a name is unknown, or two dimensions want the same mesh axis.
        """
        rows = [
            tuple(axis for axis in self.axes_of(name, phase) if axis in keep)
            for name in names
        ]
        used = [axis for row in rows for axis in row]
        if len(set(used)) != len(used):
            raise ValueError(
                f"rules {self.name!r} split two dimensions of {tuple(names)} over the"
                f" same mesh axis: {rows}. Each mesh axis can split one dimension of an"
                " array; change a row."
            )
        return PartitionSpec(*(row if row else None for row in rows))
