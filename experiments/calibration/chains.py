"""The programs of a calibration: chains of equal links that no compiler can shorten.

Each link waits for the one before, as kernels of a decode step do, and the whole chain
is one program, unrolled. The state is donated, so calls are a chain too. What one link
is stands in `experiments.calibration.links`.

What was compiled is counted (`links_found`) and compared with what was asked for: a
chain that a compiler did shorten is not timed.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from sharding.hlo.ledger import Ledger

Step = Callable[[Any, Any], Any]
Array = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """One program to compile and call.

    Attributes:
      state: shapes and dtypes of what a call takes, donated, and returns.
      operands: of one link, in a list of `distinct`.
      distinct: operands that differ.
      link: (state, operand of this link) -> state.
      bind: makes the link for the devices of a mesh; None: it is the same for all.
      links: of a call.
      looped: a loop instead of unrolled links. XLA:CPU makes one kernel of links that
        have no operands, whatever stands between them, unless they are in a loop.
      per_link: what a ledger must find at least for each: any of `flops`,
        `hbm_bytes`, `collectives`.
      devices: it runs on; above one, a mesh of them.
      group: devices in one collective.
      slots: kernels of a link, where the compiled text does not tell.
      options: of the compiler; the first that it knows and that help are taken.
      avoids: what compiled text must not have; "" for nothing.
    """

    state: Any
    operands: Any = ()
    distinct: int = 0
    link: Step
    bind: Callable[[Mesh], Step] | None = None
    links: int = 0
    looped: bool = False
    per_link: Mapping[str, float]
    devices: int = 1
    group: int = 1
    slots: int = 1
    options: Sequence[Mapping[str, Any]] = ({},)
    avoids: str = ""

    def mesh(self, devices: Sequence[Any]) -> Mesh:
        """Returns devices as groups."""
        shape = (self.devices // self.group, self.group)
        used = np.array(devices[: self.devices], dtype=object).reshape(shape)
        return Mesh(used, ("other", "group"), axis_types=(AxisType.Auto,) * 2)

    def abstract(self, mesh: Mesh) -> tuple[Any, list[Any]]:
        """Returns the arguments of `program`, placed; each device holds one such."""
        spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        if self.devices == 1:
            spread = SingleDeviceSharding(mesh.devices.flat[0])

        def place(leaf: Array) -> Array:
            first, *rest = leaf.shape
            return Array((first * self.devices, *rest), leaf.dtype, sharding=spread)

        state, operand = jax.tree.map(place, (self.state, self.operands))
        return state, [operand] * self.distinct

    def program(self, mesh: Mesh) -> Callable[[Any, list[Any]], Any]:
        """Returns the chain as a function of state and operands."""
        # Traced once; XLA puts it in place again.
        link = jax.jit(self.bind(mesh) if self.bind else self.link)

        def run(state: Any, operands: list[Any]) -> Any:
            if self.looped:
                again = lambda _, x: link(x, ())
                return lax.fori_loop(0, self.links, again, state)
            for i in range(self.links):
                operand = operands[i % len(operands)] if operands else ()
                state = link(state, operand)
            return state

        if self.devices == 1:
            return run
        spread = PartitionSpec(mesh.axis_names)
        return jax.shard_map(
            run, mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False
        )


def compile_chain(wanted: Chain, mesh: Mesh, options: Mapping[str, Any]) -> Any:
    """Returns a chain compiled for the devices of `mesh`.

    Args:
      wanted: the chain.
      mesh: from `Chain.mesh`.
      options: of the compiler, besides the chain's own.

    Raises:
      ValueError: no option of the chain's makes the program that it wants.
    """
    jitted = jax.jit(wanted.program(mesh), donate_argnums=0, keep_unused=True)
    lowered = jitted.lower(*wanted.abstract(mesh))
    for own in wanted.options:
        try:
            compiled = lowered.compile(compiler_options={**options, **own})
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            continue
        if not wanted.avoids or wanted.avoids not in (compiled.as_text() or ""):
            return compiled
    raise ValueError(
        f"{wanted.avoids} is in the program with each of {list(wanted.options)}, or"
        " the compiler has no such option"
    )


def links_found(ledger: Ledger, wanted: Chain) -> dict[str, float]:
    """Returns how many links a compiled program has at most, by each of `per_link`."""
    found = {
        "flops": ledger.flops,
        "hbm_bytes": ledger.hbm_bytes,
        "collectives": sum(row.count for row in ledger.collectives),
    }
    return {name: found[name] / each for name, each in wanted.per_link.items()}


def slots_found(ledger: Ledger, wanted: Chain) -> int:
    """Returns the kernels of a link of a compiled program, collectives left out."""
    if wanted.looped:
        return wanted.slots
    kernels = sum(cost.count for cost in ledger.costs if cost.hbm_bytes or cost.flops)
    return round(kernels / wanted.links)
