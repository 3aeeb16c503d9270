"""Compiles the foreign programs and writes the optimised HLO beside itself.

    python -m tests.foreign.make cpu:8               # every program
    python -m tests.foreign.make v5p:2x2x2 fourier   # one of them

Writes hlo/PROGRAM.CHIP.jax0.12.hlo.gz. Lines of the programs are named in the texts:
make all of them again after an edit.
"""

import gzip
import os
import pathlib
import re
import sys
import time

import jax
from jax.sharding import AxisType, Mesh

from sharding.target import Target, parse_target, prepare_environment
from tests.foreign import kernels, loops, manual, partitioned  # noqa: F401
from tests.foreign.program import PROGRAMS, Program

HERE = pathlib.Path(__file__).resolve().parent
TARGETS = ("cpu:8", "h100:8", "v5e:2x4", "v5p:2x2x2")


def make_mesh(target: Target, axes: dict[str, int]) -> Mesh:
    """Returns the mesh of a program on `target`."""
    devices = target.mesh_devices(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def compile_text(target: Target, program: Program) -> str:
    """Returns the optimised HLO of `program` on `target`."""
    chip = target.name.partition(":")[0]
    jitted = jax.jit(program.function, donate_argnums=program.donated)
    options = {**target.compiler_options, **program.options.get(chip, {})}
    lowered = jitted.lower(*program.arguments)
    return lowered.compile(compiler_options=options or None).as_text() or ""


def _shortened(text: str) -> str:
    """Cuts the compiler's notes where none is read, and where files lay."""
    text = re.sub(r'(?m)^(\d+ )"[^"]*/([^"/]+)"$', r'\1"\2"', text)
    text = re.sub(r' (scheduling|deduplicated)_name="[^"]*"', "", text)
    keep = r"known_trip|custom-call|fusion_backend_config"
    text = re.sub(
        rf"(?m)^(?!.*({keep})).*$",
        lambda line: re.sub(r", backend_config=\{.*\}$", "", line[0]),
        text,
    )
    return text.strip() + "\n"


def main(target_name: str, *names: str) -> None:
    """Compiles programs for one target and writes their texts."""
    prepare_environment([target_name])
    target = parse_target(target_name)
    folder = pathlib.Path(os.environ.get("FOREIGN_HLO", HERE / "hlo"))
    folder.mkdir(parents=True, exist_ok=True)
    version = ".".join(jax.__version__.split(".")[:2])
    chip = target_name.partition(":")[0]
    for name in names or PROGRAMS:
        axes, make = PROGRAMS[name]
        program, began = make(make_mesh(target, axes)), time.time()
        try:
            text = compile_text(target, program)
        except Exception as error:
            if chip not in program.refused_by:
                raise
            print(f"{name}: {chip} refuses: {str(error)[:100]}")
            continue
        comment = (
            f"// jax {jax.__version__}, {target_name}, mesh {axes}:"
            f" python -m tests.foreign.make {target_name} {name}\n"
        )
        path = folder / f"{name}.{chip}.jax{version}.hlo.gz"
        path.write_bytes(gzip.compress((comment + _shortened(text)).encode(), mtime=0))
        print(f"{name}: {len(text):,} bytes, {time.time() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
