"""What was compiled is not compiled again, whatever prices it."""

import dataclasses
import json
import pathlib

import jax
import pytest

from experiments import evaluate, traces
from experiments.report.record import Point
from experiments.shelf import Shelf
from sharding.chips import CHIPS
from sharding.estimate import estimate
from sharding.hlo import read_ledger, stored
from sharding.program import CompiledProgram, Program
from sharding.target import Target
from tests import fakes

DATA = pathlib.Path(__file__).parent / "data/hlo"
POINT = dataclasses.replace(
    fakes.point(model="tiny"),
    target="cpu:2",
    partition="tp2",
    num_devices=2,
    num_chips=2,
    batch_size=2,
    input_len=8,
    output_len=4,
)


# Programs that were compiled, for several tests of what becomes of them.
_made: dict[str, CompiledProgram] = {}


class Remade(evaluate.Compiler):
    """Compiles each program once."""

    def compile(self, program: Program, target: Target) -> CompiledProgram:
        key = repr(program)
        if key not in _made:
            _made[key] = program.compile(target)
        return _made[key]


@dataclasses.dataclass(frozen=True)
class Counting(Shelf):
    """Counts what it compiles; `refusal` is what the compiler answers."""

    compiled: list[str] = dataclasses.field(default_factory=list)
    refusal: str = ""

    def compile(self, program: Program, target: Target) -> CompiledProgram:
        self.compiled.append(program.phase)
        if self.refusal:
            raise jax.errors.JaxRuntimeError(self.refusal)
        return Remade().compile(program, target)


def _as(chip: str) -> Point:
    return dataclasses.replace(POINT, chip=chip, context={"priced_as": chip})


def test_other_rates_compile_nothing(tmp_path: pathlib.Path) -> None:
    shelf = Counting(tmp_path)
    slow = evaluate.evaluate(_as("cpu"), shelf)
    assert shelf.compiled == ["prefill", "decode"]
    fast = evaluate.evaluate(_as("h100"), shelf)
    assert shelf.compiled == ["prefill", "decode"]
    assert fast == dataclasses.replace(
        evaluate.evaluate(_as("h100"), Remade()),
        provenance=fast.provenance,
    )
    assert fast.require("tpot_s") < slow.require("tpot_s")
    # Another question is another program.
    other = Counting(tmp_path, refusal="INTERNAL: not this one")
    with pytest.raises(jax.errors.JaxRuntimeError, match="not this one"):
        evaluate.evaluate(dataclasses.replace(_as("h100"), batch_size=4), other)

    names = traces.write(_as("h100"), tmp_path / "traces", shelf)
    assert shelf.compiled == ["prefill", "decode"]
    assert [name.rpartition("_")[2] for name in names] == [
        "prefill.json",
        "decode.json",
    ]
    for name in names:
        assert json.loads((tmp_path / "traces" / name).read_text())["traceEvents"]

    # A file that is cut off is made again.
    for file in tmp_path.glob("*.json.z"):
        file.write_bytes(file.read_bytes()[:-9])
    again = evaluate.evaluate(_as("cpu"), shelf)
    assert shelf.compiled == ["prefill", "decode"] * 2
    assert again.tpot_s == slow.tpot_s


def test_a_refusal_for_memory_is_kept(tmp_path: pathlib.Path) -> None:
    shelf = Counting(
        tmp_path,
        refusal="RESOURCE_EXHAUSTED: needs (19.08G) exceeds available HBM (8G)",
    )
    for _ in range(2):
        record = evaluate.evaluate(_as("h100"), shelf)
        assert record.status == "does not fit"
        assert record.needed_bytes == int(19.08 * 2**30)
    assert shelf.compiled == ["prefill"]

    broken = Counting(tmp_path / "other", refusal="INTERNAL: RET_CHECK failure")
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError, match="RET_CHECK"):
            evaluate.evaluate(_as("h100"), broken)
    assert broken.compiled == ["prefill", "prefill"]


@pytest.mark.parametrize("path", sorted(DATA.glob("*.hlo")), ids=lambda path: path.stem)
def test_a_stored_ledger_is_the_ledger(path: pathlib.Path) -> None:
    ledger = read_ledger(path.read_text(encoding="utf-8"))
    found = stored.from_plain(json.loads(json.dumps(stored.to_plain(ledger))))
    assert found == ledger
    chip = CHIPS["h100"]
    assert estimate(found, chip) == estimate(ledger, chip)


@pytest.mark.parametrize("lost", ["steps", "costs", "devices"])
def test_a_part_of_a_ledger_is_refused(lost: str) -> None:
    ledger = read_ledger((DATA / "decode.h100.jax0.12.hlo").read_text(encoding="utf-8"))
    values = stored.to_plain(ledger)
    del values[lost]
    with pytest.raises(ValueError, match=f"cannot read a stored ledger: .*{lost}"):
        stored.from_plain(values)
