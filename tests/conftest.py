"""Tests see 9 CPU devices, and may compile for GPUs and TPUs that are not there."""

from collections.abc import Iterator

import jax
import pytest

from sharding.program import CompiledProgram, Program
from sharding.target import Target, prepare_environment

prepare_environment(["cpu:9", "v5p:2x2x2"])
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def compile_once() -> Iterator[None]:
    """Makes equal programs of a module's tests share what the compiler made."""
    compile_ = Program.compile
    known: dict[str, CompiledProgram] = {}

    def compiled(program: Program, target: Target) -> CompiledProgram:
        key = f"{program} {target.devices}"
        if key not in known:
            known[key] = compile_(program, target)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "compile", compiled)
        yield
