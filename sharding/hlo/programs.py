"""A program in any form -> its HLO text, and what only that form knows.

    jax.stages.Compiled      text, XLA's memory account, donated arguments, the mesh
    HLO text, or its path    what `compiled.as_text()` and --xla_dump_to write
    HloProto, or its path    what --xla_dump_hlo_as_proto writes (.hlo.pb)

Files may be compressed by gzip. A proto carries XLA's buffer assignment, but not how
many partitions the program was made for: that is in its device assignment. jaxlib
turns it into text.
"""

import dataclasses
import gzip
import math
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from sharding.hlo.memory import XlaMemory

Program = Any  # a jax.stages.Compiled, str, path or bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A program's text and what else is known of it.

    Attributes:
      xla_memory: XLA's own account, if there is one.
      xla_flops: XLA's own count, loops once, if there is one.
      donated: for each parameter of the entry whether the caller gave it away.
      axes: of the mesh that the arguments lie on, if they lie on one.
    """

    text: str
    xla_memory: XlaMemory | None = None
    xla_flops: float | None = None
    donated: tuple[bool, ...] | None = None
    axes: Mapping[str, int] | None = None


def load(program: Program) -> Loaded:
    """Returns the text of `program`, one of the forms above.

    Raises:
      TypeError: `program` is none of them; a jax.stages.Lowered is not compiled yet.
      ValueError: a file or bytes that hold no program.
    """
    if isinstance(program, bytes | bytearray | memoryview):
        return _from_bytes(bytes(program), "what was given")
    if isinstance(program, str) and (
        not program or "\n" in program or "HloModule" in program
    ):
        refuse_other_text(program, "the text")
        return Loaded(text=program)
    if isinstance(program, str | os.PathLike):
        path = pathlib.Path(program)
        if not path.is_file():
            raise ValueError(
                f"no file {str(path)!r}. A program is a compiled JAX function, HLO text"
                " (which has line ends), or the path of a file from --xla_dump_to. Pass"
                " one of these."
            )
        return _from_bytes(path.read_bytes(), path.name)
    if hasattr(program, "memory_analysis") and hasattr(program, "as_text"):
        return _from_compiled(program)
    hint = " Call .compile() on it." if hasattr(program, "compile") else ""
    raise TypeError(
        f"cannot inspect a {type(program).__name__}. A program is a compiled JAX"
        " function (jax.jit(f).lower(...).compile()), HLO text, or the path of a file"
        f" from --xla_dump_to.{hint or ' Pass one of these.'}"
    )


def refuse_other_text(text: str, title: str) -> None:
    """Refuses text that is something else than optimised HLO, where that is plain.

    Raises:
      ValueError: it is empty, StableHLO, or has no program's lines.
    """
    start = text.lstrip()[:200]
    if not start:
        raise ValueError(
            f"{title} is empty. A program is the text of compiled.as_text(). Was it"
            " written?"
        )
    if start.startswith(("module @", "module {", "#loc", "#map")):
        raise ValueError(
            f"{title} is StableHLO, what a program is before XLA compiles it; it has"
            " no layouts, fusions or collectives yet. Pass the text of"
            " jitted.lower(...).compile().as_text()."
        )
    if "HloModule" not in text and "ENTRY" not in text:
        raise ValueError(
            f"{title} holds no program: it has no line that begins with HloModule or"
            f" ENTRY, but begins with {start[:40]!r}. Pass the text of"
            " jitted.lower(...).compile().as_text(), or what --xla_dump_to wrote."
        )


def _from_compiled(compiled: Any) -> Loaded:
    text = compiled.as_text()
    if not text:
        raise ValueError(
            "XLA gives no text of this compiled function, and the text is what is read."
            " Functions loaded from a compilation cache may have none: compile it anew."
        )
    stats = compiled.memory_analysis()
    cost = compiled.cost_analysis()
    return Loaded(
        text=text,
        xla_memory=None if stats is None else _stats(stats),
        xla_flops=cost.get("flops") if cost else None,
        donated=_donated(compiled),
        axes=_mesh_of(compiled),
    )


def _stats(stats: Any) -> XlaMemory:
    return XlaMemory(
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temporary_bytes=stats.temp_size_in_bytes,
        peak_bytes=getattr(stats, "peak_memory_in_bytes", None) or None,
    )


def _donated(compiled: Any) -> tuple[bool, ...] | None:
    """Returns which parameters were donated; None if JAX does not tell which is which.

    JAX drops arguments that nothing reads, and only its internals say which.
    """
    import jax

    flags = [info.donated for info in jax.tree.leaves(compiled.args_info)]
    inner = getattr(getattr(compiled, "_executable", None), "unsafe_call", None)
    kept = getattr(inner, "kept_var_idx", None)
    if kept is not None:
        return tuple(flags[k] for k in sorted(kept) if k < len(flags))
    return tuple(flags)


def _mesh_of(compiled: Any) -> dict[str, int] | None:
    """Returns the axes of the one mesh that the arguments lie on, if it is one."""
    import jax

    shardings = jax.tree.leaves(compiled.input_shardings)
    meshes: set[Any] = {s.mesh for s in shardings if hasattr(s, "mesh")}
    return axis_sizes(meshes.pop()) if len(meshes) == 1 else None


def _from_bytes(data: bytes, name: str) -> Loaded:
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"{name} cannot be unpacked: {error} ({len(data):,} bytes). A file that"
                " begins like gzip's is read whole. Was it copied whole?"
            ) from None
    head = data[:4096].lstrip()
    if head.startswith((b"HloModule", b"//", b"#")) or b"\nHloModule" in head:
        return Loaded(text=data.decode("utf-8", errors="replace"))
    try:
        return _from_proto(data, name)
    except _NotProto:
        raise ValueError(
            f"{name} holds no program: it begins with {data[:16]!r}. HLO text has a"
            " line `HloModule ...`, and .hlo.pb files are HloProto messages, not"
            " compressed. Pass one that --xla_dump_to wrote, or compiled.as_text()."
        ) from None


class _NotProto(Exception):
    """These bytes are no protocol buffer."""


def _from_proto(data: bytes, name: str) -> Loaded:
    """Returns the program of an HloProto, or of a bare HloModuleProto.

    Field numbers are those of xla/service/hlo.proto and xla/xla_data.proto.
    """
    top = _fields(data)
    module, assignment = data, b""
    if not _is_module(top):
        inner = _last(top, 1)
        if inner is None:
            raise _NotProto
        if not _is_module(_fields(inner)):
            nested = _last(_fields(inner), 1)
            if nested is not None and _is_module(_fields(nested)):
                raise ValueError(
                    f"{name} is an HloSnapshot: a program before optimisation with its"
                    " inputs. What a device runs is only in what XLA writes after"
                    " optimisation. Pass *after_optimizations.hlo.pb or its text."
                )
            raise _NotProto
        module, assignment = inner, _last(top, 3) or b""
    text = _proto_text(module, name)
    return Loaded(
        text=_with_devices(text, _fields(module), name),
        xla_memory=_assigned(_fields(assignment)) if assignment else None,
    )


def _proto_text(module: bytes, name: str) -> str:
    # What jaxlib 0.10 to 0.12 call their HLO bindings.
    from jaxlib import _hlo  # pyright: ignore[reportAttributeAccessIssue]

    try:
        return _hlo.HloModule.from_serialized_hlo_module_proto(module).to_string()
    except RuntimeError as error:
        raise ValueError(
            f"this jaxlib cannot read the module in {name}: {error}. A .hlo.pb is read"
            " by a jaxlib of about the version that wrote it. Pass the text that"
            " --xla_dump_hlo_as_text writes beside it."
        ) from None


def _with_devices(text: str, module: Mapping[int, list[Any]], name: str) -> str:
    """Returns `text` with the device counts in its header, which protos leave out.

    Raises:
      ValueError: the proto has no device assignment, and collectives over "all".
    """
    head, _, rest = text.partition("\n")
    if "num_partitions=" in head:
        return text
    assignment = _fields(_last(module, 15) or b"")
    if assignment.get(3):
        counts = [(assignment.get(key) or [1])[-1] for key in (1, 2)]
        head += f", replica_count={counts[0]}, num_partitions={counts[1]}"
    elif "replica_groups={}" in rest:
        raise ValueError(
            f"{name} has collectives over all devices and does not say how many there"
            " are: it has no device assignment. The text that XLA writes beside it"
            " does. Pass that."
        )
    return f"{head}\n{rest}"


def _assigned(fields: Mapping[int, list[Any]]) -> XlaMemory:
    """Returns the account that a BufferAssignmentProto gives."""
    argument = output = alias = temporary = 0
    for each in fields.get(3, ()):
        allocation = {key: values[-1] for key, values in _fields(each).items()}
        size = int(allocation.get(2, 0))
        is_parameter, is_output = bool(allocation.get(5)), bool(allocation.get(7))
        argument += size * is_parameter
        output += size * is_output
        alias += size * (is_parameter and is_output)
        is_other = is_parameter or is_output or allocation.get(3) or allocation.get(12)
        temporary += 0 if is_other else size
    return XlaMemory(
        argument_bytes=argument,
        output_bytes=output,
        alias_bytes=alias,
        temporary_bytes=temporary,
    )


def _is_module(fields: Mapping[int, list[Any]]) -> bool:
    """Whether these are the fields of an HloModuleProto: names, and computations."""
    names = [_last(fields, key) for key in (1, 2)]
    return bool(fields.get(3)) and all(
        isinstance(name, bytes) and re.fullmatch(rb"[\w.\-<>:()$ /]+", name)
        for name in names
    )


def _last(fields: Mapping[int, list[Any]], key: int) -> Any:
    found = fields.get(key)
    return found[-1] if found else None


def _fields(data: bytes) -> dict[int, list[Any]]:
    """Returns a message's fields by number: ints, or bytes.

    Raises:
      _NotProto: the bytes are no protocol buffer message.
    """
    if not isinstance(data, bytes):
        raise _NotProto
    found: dict[int, list[Any]] = {}
    for key, value in _read_fields(data):
        found.setdefault(key, []).append(value)
    return found


def _read_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 2, 5):
            size, at = (
                _varint(data, at) if wire == 2 else ((8, 0, 0, 0, 4)[wire - 1], at)
            )
            value, at = data[at : at + size], at + size
        else:
            raise _NotProto
        if not key >> 3 or at > len(data):
            raise _NotProto
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _NotProto


def axis_sizes(mesh: Any) -> dict[str, int] | None:
    """Returns the axes of a jax Mesh, or of a mapping, in mesh order; None of None.

    Raises:
      TypeError: `mesh` is neither.
      ValueError: a size is no positive number.
    """
    if mesh is None:
        return None
    shape = mesh if isinstance(mesh, Mapping) else getattr(mesh, "shape", None)
    if not isinstance(shape, Mapping):
        raise TypeError(
            f"cannot read mesh {mesh!r} of type {type(mesh).__name__}. A mesh names"
            " its axes and their sizes. Pass a jax.sharding.Mesh, or a mapping such as"
            ' {"data": 2, "tensor": 4}.'
        )
    sizes = {str(axis): size for axis, size in shape.items()}
    wrong = {a: n for a, n in sizes.items() if not isinstance(n, int) or n < 1}
    if wrong:
        raise ValueError(
            f"mesh {sizes} has sizes {wrong}. A size is a whole number from 1. Pass the"
            " mesh that the program was compiled for."
        )
    return sizes


def check_devices(
    axes: Mapping[str, int], num_replicas: int, num_partitions: int
) -> None:
    """Checks that a mesh has as many devices as the program.

    Raises:
      ValueError: it has not.
    """
    devices = math.prod(axes.values())
    if devices != num_replicas * num_partitions:
        sizes = ",".join(f"{axis}={size}" for axis, size in axes.items())
        raise ValueError(
            f"mesh {sizes} has {devices} devices, the program runs on"
            f" {num_replicas * num_partitions} ({num_replicas} replicas of"
            f" {num_partitions} partitions). Groups of devices are named after the mesh"
            " they were made for. Pass that mesh, or none to see device sets."
        )
