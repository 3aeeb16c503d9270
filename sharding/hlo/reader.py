"""HLO text -> Module, Computation, Instruction. Nothing is costed here.

    module = read_module(compiled.as_text())
    module.entry.instructions[0].opcode

Reads what `as_text()` and `--xla_dump_to` print, with or without `%` before
names and with or without operand shapes; `%while.3#1` becomes the get-tuple-element
that it stands for. One pass over the lines; attributes
stay text until `Instruction.attr` is asked for one.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable

from sharding.hlo.attributes import attribute, unquote
from sharding.hlo.shapes import Shape, parse_shape

# Most lines: [ROOT] %name = shape opcode(operands without brackets), attributes.
_LINE = re.compile(
    r"\s*+(?P<root>ROOT )?%?(?P<name>[^\s%=(]++) = "
    r"(?P<shape>\((?:[^()\"]++|\([^()\"]*+\))*+\)|[^\s(\"][^\s\"]*+) "
    r"(?P<opcode>[a-z][a-z0-9\-]*+)\((?P<inside>[^()\"]*+)\)(?P<rest>.*)"
)
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_NAMES = re.compile(r"%([\w.\-]+(?:#\d+)*)")
_PARENS = re.compile(r'"(?:[^"\\]|\\.)*"|[()]')
_MAX_DEVICES = 1 << 20
_NUM_PARTITIONS = re.compile(r"[ ,]num_partitions=(\d+)")
_REPLICA_COUNT = re.compile(r"[ ,]replica_count=(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`.

    Attributes:
      name: without `%`.
      shape: of the result.
      opcode: as printed, e.g. "all-reduce-start".
      operands: names, in order, repeated if listed twice.
      literal: what stands between the parentheses, for constants, parameters.
      rest: the attributes, unparsed.
      is_root: the computation's result.
    """

    name: str
    shape: Shape
    opcode: str
    operands: tuple[str, ...]
    literal: str
    rest: str
    is_root: bool

    def __str__(self) -> str:
        text = f"%{self.name} = {_spell(self.shape)} {self.opcode}({self.literal})"
        return text + (self.rest if len(self.rest) < 600 else self.rest[:600] + "...")

    def attr(self, key: str) -> str | None:
        """Returns the text after `key=`, braces and quotes included, or None."""
        return attribute(self.rest, key)

    def require(self, key: str) -> str:
        """Returns `attr(key)`.

        Raises:
          ValueError: the instruction has no such attribute.
        """
        value = self.attr(key)
        if value is None:
            raise ValueError(f"no {key}= in instruction: {self}")
        return value

    def ints(self, key: str) -> tuple[int, ...]:
        """Returns the numbers of `key={0,2}`; () where it is absent."""
        return tuple(int(n) for n in re.findall(r"-?\d+", self.attr(key) or ""))

    def called(self, key: str) -> str | None:
        """Returns the computation named by `key=%name`, without `%`, or None."""
        value = self.attr(key)
        return value.strip().lstrip("%") if value else None

    def string(self, key: str) -> str:
        """Returns the contents of `key="..."`; "" where it is absent."""
        return unquote(self.attr(key) or "")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Computation:
    """A named list of instructions, definitions before uses."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each one, in order."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for name in dict.fromkeys(instruction.operands):
                users.setdefault(name, []).append(instruction)
        return users

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """Parameters in the order of their numbers."""
        found = [i for i in self.instructions if i.opcode == "parameter"]
        return tuple(sorted(found, key=lambda i: int(i.literal)))

    def operands(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """Returns the instructions that `instruction` reads."""
        return tuple(self.by_name[name] for name in instruction.operands)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Module:
    """A program: computations by name, one of them the entry.

    Attributes:
      header: the `HloModule` line.
      tables: the lines between header and computations, by section name.
      num_devices: replicas x partitions.
    """

    header: str
    computations: dict[str, Computation]
    entry: Computation
    tables: dict[str, tuple[str, ...]]
    num_replicas: int
    num_partitions: int

    @property
    def num_devices(self) -> int:
        return self.num_replicas * self.num_partitions

    @property
    def says_num_devices(self) -> bool:
        """Whether the header gives a number; without one it is 1."""
        return bool(
            _NUM_PARTITIONS.search(self.header) or _REPLICA_COUNT.search(self.header)
        )

    @functools.cached_property
    def is_tpu(self) -> bool:
        """Whether the shapes are tiled, which only XLA:TPU does."""
        return any(
            leaf.is_tiled for i in self.entry.instructions for leaf in i.shape.leaves
        )

    def computation(self, name: str | None, caller: Instruction) -> Computation:
        """Returns the computation `name`, which `caller` calls.

        Raises:
          ValueError: there is none.
        """
        if name is None or name not in self.computations:
            raise ValueError(f"computation {name!r} is not in the text: {caller}")
        return self.computations[name]

    def called(
        self, name: str | None, caller: Instruction, where: Computation
    ) -> Computation:
        """Returns the computation `name`, which `caller` in `where` gives its operands.

        Raises:
          ValueError: there is none, or it takes other operands.
        """
        found = self.computation(name, caller)
        given = [operand.shape.sizes for operand in where.operands(caller)]
        # Another core may find its operands by itself: `call-start()`.
        if given and given != [each.shape.sizes for each in found.parameters]:
            raise ValueError(f"%{name} does not take the operands of: {caller}")
        return found


def _spell(shape: Shape) -> str:
    if shape.dtype == "tuple":
        return "(" + ", ".join(_spell(e) for e in shape.elements) + ")"
    space = f"{{S({shape.space})}}" if shape.space else ""
    return f"{shape.dtype}[{','.join(map(str, shape.dims))}]{space}"


def read_instruction(line: str) -> Instruction:
    """Returns the instruction that one line of a computation spells.

    Raises:
      ValueError: the line is no instruction.
    """
    if plain := _LINE.fullmatch(line):
        root, name, shape, opcode, inside, rest = plain.groups()
        return _instruction(name, shape, opcode, inside, rest, root is not None, line)
    head, equals, tail = line.partition(" = ")
    found = _OPCODE.search(" " + tail)
    if not equals or not found:
        raise ValueError(f"cannot read instruction: {line.strip()}")
    words = head.split()
    if not words or len(words) > 2 or (len(words) == 2 and words[0] != "ROOT"):
        raise ValueError(f"cannot read instruction: {line.strip()}")
    start = found.end() - 1  # found in " " + tail, so one less in tail
    end = tail.find(")", start)
    inside = tail[start:end]
    if end < 0 or "(" in inside or '"' in inside:
        end = _closing(tail, start, line)
        inside = tail[start:end]
    return _instruction(
        words[-1].lstrip("%"),
        tail[: found.start()],
        found[1],
        inside,
        tail[end + 1 :],
        len(words) == 2,
        line,
    )


def _instruction(
    name: str,
    shape: str,
    opcode: str,
    inside: str,
    rest: str,
    is_root: bool,
    line: str,
) -> Instruction:
    if opcode == "constant" or opcode == "parameter":
        operands: tuple[str, ...] = ()
    elif "%" in inside:
        operands = tuple(_NAMES.findall(inside))
    else:
        operands = tuple(
            part.split()[-1]
            for part in re.sub(
                r"/\*.*?\*/|\([^()]*\)|\{[^{}]*\}|\[[^\[\]]*\]", "", inside
            ).split(",")
            if part.strip()
        )
    try:
        parsed = parse_shape(shape)
    except ValueError as error:
        raise ValueError(f"{error} In instruction: {line.strip()}") from None
    return Instruction(
        name=name,
        shape=parsed,
        opcode=opcode,
        operands=operands,
        literal=inside if len(inside) < 2000 else inside[:2000],
        rest=rest.rstrip(),
        is_root=is_root,
    )


def _closing(text: str, start: int, line: str) -> int:
    depth = 1
    for token in _PARENS.finditer(text, start):
        if token[0] == "(":
            depth += 1
        elif token[0] == ")":
            depth -= 1
            if depth == 0:
                return token.start()
    raise ValueError(f"unbalanced parentheses in instruction: {line.strip()}")


def _refuse_disorder(computation: str, body: Iterable[Instruction]) -> None:
    """Raises ValueError unless each name is defined once, and before it is used."""
    seen: set[str] = set()
    for instruction in body:
        for name in instruction.operands:
            if name not in seen:
                raise ValueError(
                    f"operand {name!r} is not defined in %{computation} before its use:"
                    f" {instruction}"
                )
        if instruction.name in seen:
            raise ValueError(f"twice in computation %{computation}: {instruction}")
        seen.add(instruction.name)


def _with_elements(body: list[Instruction]) -> list[Instruction]:
    """Returns `body` with a get-tuple-element before the first use of each `%a#1`."""
    if not any("#" in name for i in body for name in i.operands):
        return body
    known: dict[str, Instruction] = {}
    found: list[Instruction] = []
    for instruction in body:
        for operand in instruction.operands:
            parts = operand.split("#")
            for k in range(1, len(parts)):
                whole, element = "#".join(parts[:k]), "#".join(parts[: k + 1])
                index = int(parts[k])
                if whole not in known or index >= len(known[whole].shape.elements):
                    raise ValueError(f"no %{element} in instruction: {instruction}")
                if element not in known:
                    known[element] = Instruction(
                        name=element,
                        shape=known[whole].shape.elements[index],
                        opcode="get-tuple-element",
                        operands=(whole,),
                        literal=f"%{whole}",
                        rest=f", index={index}",
                        is_root=False,
                    )
                    found.append(known[element])
        known[instruction.name] = instruction
        found.append(instruction)
    return found


def read_module(text: str) -> Module:
    """Returns the program that `text` spells.

    Raises:
      ValueError: a line that is neither header, table, computation, nor
        instruction; a name used before it is defined, or defined twice; or no entry
        computation. The message ends with the line.
    """
    header = ""
    tables: dict[str, list[str]] = {}
    section: list[str] | None = None
    computations: dict[str, Computation] = {}
    entry: Computation | None = None
    name: str | None = None
    is_entry = False
    body: list[Instruction] = []
    has_elements = "#" in text
    # Not splitlines: names may hold characters that it takes for the end of a line.
    for line in text.replace("\r\n", "\n").split("\n"):
        if name is not None:
            if line.startswith("}"):
                if not body:
                    raise ValueError(f"computation %{name} is empty.")
                if name in computations:
                    raise ValueError(f"computation %{name} is there twice.")
                body = _with_elements(body) if has_elements else body
                _refuse_disorder(name, body)
                done = Computation(name=name, instructions=tuple(body))
                computations[name] = done
                entry = done if is_entry else entry
                name, body = None, []
            elif line and not line.isspace() and not line.lstrip().startswith("//"):
                body.append(read_instruction(line))
        elif not line or line.isspace() or line.startswith(("//", "#")):
            section = None if not line else section
        elif line.startswith("HloModule"):
            header = line
        elif line.rstrip().endswith("{") and ("->" in line or line.startswith("ENTRY")):
            words = line.split(None, 2)
            is_entry = words[0] == "ENTRY"
            if len(words) < 2:
                raise ValueError(f"cannot read line: {line}")
            name = words[1 if is_entry else 0].lstrip("%").partition("(")[0]
        elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            section = tables.setdefault(line, [])
        elif section is not None and line.lstrip()[:1].isdigit():
            section.append(line)
        else:
            raise ValueError(f"cannot read line: {line}")
    if name is not None:
        raise ValueError(f"the text ends inside computation %{name}.")
    if entry is None:
        if len(computations) != 1:
            raise ValueError(
                f"{len(computations)} computations and none marked ENTRY; pass the"
                " whole text of one module."
            )
        entry = next(iter(computations.values()))
    partitions, replicas = (
        int(found[1]) if (found := pattern.search(header)) else 1
        for pattern in (_NUM_PARTITIONS, _REPLICA_COUNT)
    )
    if not 0 < partitions * replicas <= _MAX_DEVICES:
        raise ValueError(
            f"{replicas} replicas of {partitions} partitions; a program has at least"
            f" one device and at most {_MAX_DEVICES}: {header}"
        )
    return Module(
        header=header,
        computations=computations,
        entry=entry,
        tables={key: tuple(rows) for key, rows in tables.items()},
        num_partitions=partitions,
        num_replicas=replicas,
    )
