"""The optimised programs in a folder that XLA wrote under --xla_dump_to."""

import dataclasses
import difflib
import pathlib
import re

from experiments.report import units

# Such as module_0001.jit_f.sm_9.0_gpu_after_optimizations.txt; TPU writes .cl_123.
_OPTIMISED = re.compile(
    r"(?P<name>.+?)(\.(sm|cl)_\d+)?\.([^.]*_)?after_optimizations"
    r"(\.txt|\.hlo\.pb(\.gz)?)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dump:
    """One optimised program in a folder of `--xla_dump_to`."""

    name: str
    path: pathlib.Path
    size_bytes: int
    is_chosen: bool = False


def list_dumps(folder: pathlib.Path) -> list[Dump]:
    """Returns the optimised programs of a dump folder, the largest first.

    Text is taken before a proto of the same program.
    """
    found: dict[str, Dump] = {}
    for path in sorted(folder.iterdir(), reverse=True):  # .txt before .hlo.pb
        match = _OPTIMISED.fullmatch(path.name)
        if match and match["name"] not in found:
            size = path.stat().st_size
            found[match["name"]] = Dump(name=match["name"], path=path, size_bytes=size)
    return sorted(found.values(), key=lambda dump: (-dump.size_bytes, dump.name))


def choose(folder: pathlib.Path, module: str | None) -> Dump:
    """Returns the dump called `module`, or the largest.

    Args:
      folder: of `--xla_dump_to`.
      module: such as "jit_f" or, if several are called so, "module_0002.jit_f".

    Raises:
      ValueError: the folder holds no optimised program, or none or several of the name.
    """
    every = list_dumps(folder)
    if not every:
        count = sum(1 for _ in folder.iterdir())
        raise ValueError(
            f"no optimised program in folder {folder}; none of its {count} files ends"
            " in after_optimizations.txt or after_optimizations.hlo.pb, as XLA names"
            " them. Set XLA_FLAGS=--xla_dump_to=FOLDER before JAX starts."
        )
    if module is None:
        return every[0]
    named = [d for d in every if module in (d.name, d.name.partition(".")[2])]
    if len(named) == 1:
        return named[0]
    if named:
        names = ", ".join(f"{d.name} ({units.bytes_(d.size_bytes)})" for d in named)
        raise ValueError(
            f"--module={module} names {len(named)} programs of {folder}: {names}. One"
            " is inspected at a time. Give its whole name."
        )
    names = [d.name.partition(".")[2] or d.name for d in every]
    near = difflib.get_close_matches(module, [*names, *(d.name for d in every)], 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(
        f"no program {module!r} in {folder}: {hint}There are"
        f" {', '.join(d.name for d in every[:12])}{' ...' if len(every) > 12 else ''}."
        " A program is named as in its file. Choose one."
    )
