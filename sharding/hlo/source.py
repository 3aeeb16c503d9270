"""Where an instruction comes from: op_name and "file.py:123".

New text points from `stack_frame_id` into tables at the head of the module; old
text carries `source_file=` and `source_line=` itself. The innermost frame is
named. Often that line is the consumer of a value, not what caused a collective: a
gathered argument has a name and no line, and gets that of the first that uses it. A
sum without a line gets that of its addition, or of what it sums; so does a gathered
result that nothing uses.
"""

import dataclasses
import re

from sharding.hlo.attributes import unquote
from sharding.hlo.reader import Computation, Instruction, Module

_ROW = re.compile(r"\s*(\d+)\s+(.*)")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_OP_NAME = re.compile(r'[{\s]op_name=("(?:[^"\\]|\\.)*")')
_SOURCE_FILE = re.compile(r'[{\s]source_file="((?:[^"\\]|\\.)*)"')
_SOURCE_LINE = re.compile(r"[{\s]source_line=(\d+)")
_FRAME = re.compile(r"[{\s]stack_frame_id=(\d+)")
_FIELD = re.compile(r"(\w+)=(\d+)")
_MAX_HOPS = 8  # from a value without a line to a user with one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """The tables of one module: frame id -> "file.py:123"."""

    frames: dict[int, str]

    def of(self, instruction: Instruction) -> tuple[str, str]:
        """Returns `(op_name, "file.py:123")`; "" for what the text lacks."""
        metadata = instruction.attr("metadata")
        if not metadata:
            return "", ""
        found = _OP_NAME.search(metadata)
        op_name = unquote(found[1]) if found else ""
        bare = metadata[found.end() :] if found else metadata
        file = None
        if '"' in bare:
            file = _SOURCE_FILE.search(metadata)
            bare = _STRING.sub("", metadata)
        if frame := _FRAME.search(bare):
            return op_name, self.frames.get(int(frame[1]), "")
        line = _SOURCE_LINE.search(bare)
        return op_name, f"{_base(file[1])}:{line[1]}" if file and line else ""

    def near(
        self,
        collective: Instruction,
        instruction: Instruction,
        computation: Computation,
        module: Module,
    ) -> str:
        """Returns the line to blame for a collective that has none itself, or "".

        A sum is wanted where its addition is from, or else by what made the parts;
        anything else by its first user. `instruction` of `computation` is the
        collective, or what it is inside of.
        """
        user = self.of_user(instruction, computation)
        if name := collective.called("to_apply"):
            addition = self.of(module.computation(name, collective).root)[1]
            return addition or self._of_maker(instruction, computation, module) or user
        return user or self._of_maker(instruction, computation, module)

    def _of_maker(
        self, instruction: Instruction, computation: Computation, module: Module
    ) -> str:
        """Returns the line of the nearest instruction before this one, or ""."""
        reached = [instruction]
        for _ in range(_MAX_HOPS):
            reached = {o.name: o for i in reached for o in computation.operands(i)}
            reached = list(reached.values())
            for made in reached:
                line = self.of(made)[1]
                if not line and made.opcode == "fusion":
                    body = module.computation(made.called("calls"), made)
                    line = self.of(body.root)[1]
                    line = line or self._of_maker(body.root, body, module)
                if line:
                    return line
        return ""

    def of_user(self, instruction: Instruction, computation: Computation) -> str:
        """Returns the line of the nearest instruction after this one, or ""."""
        reached = [instruction.name]
        for _ in range(_MAX_HOPS):
            users = [u for name in reached for u in computation.users.get(name, ())]
            found = (self.of(user)[1] for user in users)
            if line := next(filter(None, found), ""):
                return line
            reached = list(dict.fromkeys(user.name for user in users))
        return ""


def read_sources(module: Module) -> Sources:
    """Returns the source tables of `module`; empty if it has none."""
    files = {k: _base(unquote(v)) for k, v in _rows(module, "FileNames")}
    places = {}
    for key, row in _rows(module, "FileLocations"):
        field = {k: int(v) for k, v in _FIELD.findall(row)}
        places[key] = (
            f"{files.get(field.get('file_name_id', 0), '')}:{field.get('line', 0)}"
        )
    frames = {}
    for key, row in _rows(module, "StackFrames"):
        field = {k: int(v) for k, v in _FIELD.findall(row)}
        frames[key] = places.get(field.get("file_location_id", 0), "")
    return Sources(frames=frames)


def _rows(module: Module, table: str) -> list[tuple[int, str]]:
    found = (_ROW.fullmatch(row) for row in module.tables.get(table, ()))
    return [(int(m[1]), m[2]) for m in found if m]


def _base(path: str) -> str:
    return re.split(r"[/\\]", path)[-1]
