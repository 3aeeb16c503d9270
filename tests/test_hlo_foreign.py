"""Programs that we did not write read as their closed forms say.

The texts are what four compilers, of two releases of JAX each, made of the programs
in tests/foreign.
"""

import functools
import gzip
import os
import pathlib
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from sharding.hlo import Ledger, read_ledger
from sharding.target import parse_target
from tests.foreign import kernels, loops, manual, partitioned  # noqa: F401
from tests.foreign.make import TARGETS, compile_text
from tests.foreign.program import PROGRAMS, Program, Sends

HERE = pathlib.Path(__file__).parent / "foreign"
HLO = pathlib.Path(os.environ.get("FOREIGN_HLO", HERE / "hlo"))
FILES = sorted(HLO.glob("*.hlo.gz"))
CHIPS = [target.partition(":")[0] for target in TARGETS]


@functools.cache
def _program(name: str) -> Program:
    axes, make = PROGRAMS[name]
    devices = np.array(jax.devices()[:8]).reshape(tuple(axes.values()))
    kinds = (AxisType.Auto,) * len(axes)
    return make(Mesh(devices, tuple(axes), axis_types=kinds))


def _text(path: pathlib.Path) -> str:
    return gzip.decompress(path.read_bytes()).decode()


@functools.cache
def _read(path: pathlib.Path) -> Ledger:
    return read_ledger(_text(path), PROGRAMS[path.name.partition(".")[0]][0])


def _sends(ledger: Ledger) -> Sends:
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for c in ledger.collectives:
        count, payload = found.get((c.axis, c.kind), (0, 0))
        found[c.axis, c.kind] = count + c.count, payload + c.payload_bytes
    return found


def _check(ledger: Ledger, program: Program, chip: str, jax_version: str) -> None:
    release = f"{chip}.{jax_version}"
    elsewhere = program.matmul_flops_on.get(chip, program.matmul_flops)
    assert ledger.matmul_flops == program.matmul_flops_on.get(release, elsewhere)
    elsewhere = program.sends_on.get(chip, program.sends)
    assert _sends(ledger) == program.sends_on.get(release, elsewhere)
    if program.flops:
        assert program.flops[0] <= ledger.flops <= program.flops[1]
    if program.trip_counts is not None:
        assert tuple(loop.trip_count for loop in ledger.loops) == program.trip_counts
    assert len(ledger.data_dependent_loops) == program.data_dependent
    least = program.least_hbm_bytes
    if least is None:
        # What a collective reads and writes is not HBM traffic of the ledger.
        by_links = sum(2 * c.payload_bytes_each for c in ledger.collectives)
        least = program.arguments_bytes + program.outputs_bytes - by_links
    assert ledger.hbm_bytes >= least
    if program.most_hbm_bytes is not None and chip != "cpu":
        assert ledger.hbm_bytes <= program.most_hbm_bytes


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name.removesuffix(".hlo.gz"))
def test_closed_forms(path: pathlib.Path) -> None:
    name, chip, jax_version = path.name.removesuffix(".hlo.gz").split(".", 2)
    _check(_read(path), _program(name), chip, jax_version)


@pytest.mark.parametrize("name", PROGRAMS)
def test_closed_forms_of_this_jax(name: str) -> None:
    if "cpu" in _program(name).refused_by:
        pytest.skip("XLA:CPU does not take it")
    text = compile_text(parse_target("cpu:8"), _program(name))
    jax_version = "jax" + ".".join(jax.__version__.split(".")[:2])
    ledger = read_ledger(text, PROGRAMS[name][0])
    _check(ledger, _program(name), "cpu", jax_version)


@pytest.mark.parametrize("chip", CHIPS)
def test_every_program_is_there_for_every_chip(chip: str) -> None:
    wanted = {n for n in PROGRAMS if chip not in _program(n).refused_by}
    for jax_version in ("0.10", "0.12"):
        suffix = f".{chip}.jax{jax_version}.hlo.gz"
        found = {p.name.partition(".")[0] for p in FILES if p.name.endswith(suffix)}
        assert found == wanted


def test_every_text_says_what_made_it_and_is_small() -> None:
    for path in FILES:
        assert re.match(r"// jax .*python -m tests\.foreign\.make ", _text(path))
    assert sum(path.stat().st_size for path in FILES) < 2 * 2**20


def test_collectives_name_an_axis_and_their_line() -> None:
    """Every one has an axis; where a person wrote the collective, it is that line."""
    with_metadata = with_line = 0
    for path in FILES:
        axes, make = PROGRAMS[path.name.partition(".")[0]]
        own_lines = make.__module__ == manual.__name__
        for collective in _read(path).collectives:
            spelled_out = collective.axis.startswith("devices {")
            assert spelled_out == (path.name.startswith("uneven_groups"))
            assert spelled_out or set(collective.axis.split("+")) <= set(axes)
            if not collective.op_name:
                continue
            with_metadata += 1
            file, _, number = collective.source.partition(":")
            with_line += bool(file)
            if own_lines and file == "manual.py":
                line = (HERE / file).read_text().splitlines()[int(number) - 1]
                assert re.search(r"lax\.p?(all|permute|psum|mean|max|broad|ragg)", line)
    assert with_line >= 0.95 * with_metadata > 100
