"""Collectives as they stand in the text, whatever they are wrapped in.

They hide inside fusions (TPU: all-reduce + dynamic-slice is a reduce-scatter;
GPU: XLA's own all-reduce kernels), in async wrappers, in chains of TPU fusions that
repeat one all-gather from start to done, and in kernels that say so of themselves.
"""

import dataclasses
import re
from collections.abc import Iterator

from sharding.hlo import custom_calls
from sharding.hlo.groups import AxisNamer, Groups, largest_chain, parse_groups
from sharding.hlo.opcodes import COLLECTIVES, base_opcode
from sharding.hlo.reader import Computation, Instruction, Module

_RECUTS = frozenset([
    "bitcast", "convert", "copy", "get-tuple-element", "reshape", "transpose",
])  # fmt: skip
_CHAIN = re.compile(r'chain_id="?(\w+)')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """One collective of the text, for one execution on one device.

    Bytes are those of sharding.hlo.ledger.Collective. `group_size` 1: nothing is sent.
    """

    axis: str
    kind: str
    payload_bytes: int
    wire_bytes: int
    group_size: int
    instruction: Instruction


class CollectiveFinder:
    """Finds and measures the collectives of one module."""

    def __init__(self, module: Module, namer: AxisNamer):
        self._module = module
        self._namer = namer
        self._inside: dict[str, tuple[tuple[Instruction, Computation], ...]] = {}
        self._started = {
            chain
            for computation in module.computations.values()
            if _has_call(computation, "AsyncCollectiveStart")
            for i in computation.instructions
            if i.opcode in COLLECTIVES and (chain := _chain(i))
        }

    def inside(self, name: str) -> tuple[tuple[Instruction, Computation], ...]:
        """Returns the collectives of a fused computation and those it calls."""
        if name not in self._inside:
            self._inside[name] = ()
            found: list[tuple[Instruction, Computation]] = []
            computation = self._module.computations.get(name)
            for i in computation.instructions if computation else ():
                if i.opcode in ("fusion", "call"):
                    called = i.called("calls") or i.called("to_apply") or ""
                    found += self.inside(called)
                elif (
                    computation
                    and base_opcode(i) in COLLECTIVES
                    and not self._continues(i, computation)
                ):
                    found.append((i, computation))
            self._inside[name] = tuple(found)
        return self._inside[name]

    def _continues(self, instruction: Instruction, computation: Computation) -> bool:
        """Whether another fusion of the same asynchronous chain starts this one."""
        if _has_call(computation, "AsyncCollectiveStart"):
            return False
        if _has_call(computation, "AsyncCollectiveDone"):
            return True
        return _chain(instruction) in self._started

    def of(self, instruction: Instruction, computation: Computation) -> Iterator[Found]:
        """Yields the collectives that running `instruction` performs.

        Raises:
          ValueError: replica groups in no known spelling.
        """
        opcode = base_opcode(instruction)
        if opcode in COLLECTIVES:
            yield self._measure(instruction, computation)
        elif opcode == "fusion":
            for inner, where in self.inside(instruction.called("calls") or ""):
                yield self._measure(inner, where)
        elif opcode == "custom-call":
            stated = custom_calls.stated_collective(instruction)
            if stated:
                yield self._stated(instruction, *stated)

    def _stated(
        self, instruction: Instruction, opcode: str, groups: str, payload: int
    ) -> Found:
        """Returns the collective that a kernel says it is."""
        parsed = parse_groups(groups, self._module.num_devices)
        parsed = tuple(g for g in parsed if len(g) > 1)
        n = max((len(g) for g in parsed), default=1)
        wire = payload * (n - 1) // n
        return Found(
            axis=self._namer.of_groups(parsed) if parsed else "",
            kind=COLLECTIVES[opcode],
            payload_bytes=payload,
            wire_bytes=2 * wire if opcode == "all-reduce" else wire,
            group_size=n,
            instruction=instruction,
        )

    def _measure(self, instruction: Instruction, computation: Computation) -> Found:
        opcode = base_opcode(instruction)
        kind = COLLECTIVES[opcode]
        distinct = dict.fromkeys(instruction.operands)
        operands = [computation.by_name[n].shape for n in distinct]
        if opcode == "ragged-all-to-all":
            operands = operands[:1]
        payload = sum(shape.num_bytes for shape in operands)
        if opcode == "collective-permute":
            pairs = self._groups(instruction, "source_target_pairs")
            pairs = tuple(p for p in pairs if p[0] != p[1])
            return Found(
                axis=self._namer.of_pairs(pairs) if pairs else "",
                kind=kind,
                payload_bytes=payload,
                wire_bytes=payload if pairs else 0,
                group_size=largest_chain(pairs),
                instruction=instruction,
            )
        groups = self._groups(instruction, "replica_groups")
        groups = tuple(g for g in groups if len(g) > 1)
        n = max((len(g) for g in groups), default=1)
        if opcode == "all-gather":
            payload *= n
        elif opcode == "all-reduce" and self._is_scatter(instruction, computation, n):
            kind = "reduce-scatter"
        wire = payload if kind == "broadcast" else payload * (n - 1) // n
        return Found(
            axis=self._namer.of_groups(groups) if groups else "",
            kind=kind,
            payload_bytes=payload,
            wire_bytes=(2 * payload * (n - 1) // n) if kind == "all-reduce" else wire,
            group_size=n,
            instruction=instruction,
        )

    def _groups(self, instruction: Instruction, key: str) -> Groups:
        text = instruction.require(key)
        if text == "{}" and not self._module.says_num_devices:
            raise ValueError(
                "a collective of all devices, and the header does not say how many;"
                f" pass the whole text: {instruction}"
            )
        device_ids = instruction.attr("device_ids")
        if device_ids and text.startswith("mesh["):
            # A comma parts "mesh[...]" from "device_ids=(...) {...}".
            text = f"{text}, device_ids={device_ids}"
        try:
            groups = parse_groups(text, self._module.num_devices)
        except ValueError as error:
            raise ValueError(f"{error} In instruction: {instruction}") from None
        if key == "source_target_pairs" or self._module.num_partitions == 1:
            return groups
        if instruction.attr("use_global_device_ids") == "true":
            return groups
        if base_opcode(instruction) in ("all-to-all", "collective-broadcast"):
            return groups
        if base_opcode(instruction) == "ragged-all-to-all":
            return groups
        partitions = range(self._module.num_partitions)
        if instruction.attr("channel_id") is None:
            # Replica ids, each partition on its own.
            return tuple(
                tuple(r * len(partitions) + p for r in g)
                for g in groups
                for p in partitions
            )
        return tuple(
            tuple(r * len(partitions) + p for r in g for p in partitions)
            for g in groups
        )

    def _is_scatter(
        self, instruction: Instruction, computation: Computation, group_size: int
    ) -> bool:
        """Whether only this device's slice of each result of an all-reduce is kept."""
        if computation is self._module.entry or group_size < 2:
            return False
        sliced: set[int] = set()
        # Leaf of the result that an instruction carries whole; None: all of them.
        carries: dict[str, int | None] = {instruction.name: None}
        if instruction.shape.dtype != "tuple":
            carries[instruction.name] = 0
        reached = [instruction.name]
        while reached:
            name = reached.pop()
            for i in computation.users.get(name, ()):
                leaf = carries[name]
                if i.operands[0] != name or i.name in carries:
                    return False
                if i.opcode == "get-tuple-element" and leaf is None:
                    carries[i.name] = int(i.require("index"))
                    reached.append(i.name)
                elif i.opcode in _RECUTS and leaf is not None:
                    carries[i.name] = leaf
                    reached.append(i.name)
                elif i.opcode == "dynamic-slice" and leaf is not None:
                    whole = instruction.shape.leaves[leaf].size
                    if i.shape.size * group_size != whole:
                        return False
                    sliced.add(leaf)
                else:
                    return False
        every = len(sliced) == len(instruction.shape.leaves)
        return every and computation.root.name not in carries


def _has_call(computation: Computation, target: str) -> bool:
    return any(
        i.opcode == "custom-call" and f'"{target}"' in i.rest
        for i in computation.instructions
    )


def _chain(instruction: Instruction) -> str | None:
    found = _CHAIN.search(instruction.attr("frontend_attributes") or "")
    return found[1] if found else None
