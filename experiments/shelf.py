"""What programs do, kept in a folder: the next sweep prices them without compiling.

A file holds the ledger of one program with its memory, under a digest of all that it
follows from: the question, the target, the code that writes and reads programs, and
versions and flags of the compilers. Rates are no part of it, so another chip, or the
same one calibrated, costs no compilation; only the memory of a described GPU is, for
XLA:GPU computes things twice in a program that does not fit.
"""

import dataclasses
import json
import pathlib
import zlib

import jax

from experiments.evaluate import Compiler, Counted, too_large
from experiments.report import files, provenance
from experiments.report.record import decode, digest
from sharding.hlo import stored
from sharding.program import Memory, Program
from sharding.target import Target

# Code that prices what was compiled, and has no part in compiling it.
_PRICING = frozenset([
    "clock.py", "curves.py", "estimate.py", "limits.py", "links.py", "pricing.py",
    "rates.py", "timeline.py", "timing.py", "trace.py",
])  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shelf(Compiler):
    """Compiles what `folder` lacks, and keeps there what it does."""

    folder: pathlib.Path

    def count(self, program: Program, target: Target) -> Counted:
        """Returns what `program` does, from the folder if it is there.

        Raises:
          ValueError: the program holds something that cannot be counted.
          jax.errors.JaxRuntimeError: the compiler refuses it.
        """
        path = self.folder / f"{_key(program, target)}.json.z"
        try:
            return _decoded(path.read_bytes())
        except (OSError, ValueError, LookupError, TypeError, zlib.error):
            pass  # not there, or damaged
        try:
            counted = super().count(program, target)
        except jax.errors.JaxRuntimeError as error:
            if too_large(str(error)):
                files.replace(path, _encoded({"refused": str(error)}))
            raise
        plain = {
            **{name: getattr(counted, name) for name in _FIGURES},
            "memory": dataclasses.asdict(counted.memory),
            "ledger": stored.to_plain(counted.ledger),
        }
        files.replace(path, _encoded(plain))
        return counted


_FIGURES = ("xla_flops", "compile_s", "ticks", "busy_ticks")


def _decoded(data: bytes) -> Counted:
    values = json.loads(zlib.decompress(data))
    if "refused" in values:
        raise jax.errors.JaxRuntimeError(values["refused"])
    return Counted(
        ledger=stored.from_plain(values["ledger"]),
        memory=decode(Memory, values["memory"], "memory"),
        **{name: values[name] for name in _FIGURES},
    )


def _encoded(values: dict[str, object]) -> bytes:
    return zlib.compress(json.dumps(values).encode(), 1)


def _key(program: Program, target: Target) -> str:
    root = provenance.ROOT
    code = sorted(
        path.relative_to(root).as_posix()
        for path in (root / "sharding").glob("*.py")
        if path.name not in _PRICING
    )
    descriptions = sorted(
        path.relative_to(root).as_posix()
        for path in (root / "sharding/chips").glob("*.pbtxt")
    )
    of_memory = target.platform == "cuda" and target.compile_only
    made_of = (
        repr(program),
        target.name,
        target.num_devices,
        target.chip.hbm_bytes if of_memory else None,
        sorted(target.compiler_options.items()),
        sorted(provenance.versions_for(target.platform).items()),
        sorted(provenance.compiler_flags().items()),
        provenance.code_digest("jaxllm", "sharding/hlo", *code, *descriptions),
    )
    return digest(repr(made_of))
