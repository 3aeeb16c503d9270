"""A sweep loses nothing: not to a kill, not to a crash, not to a bad question."""

import dataclasses
import pathlib
import subprocess
import sys
import time

import pytest
from rich.console import Console

from experiments import evaluate
from experiments.report import store
from experiments.report.record import Record
from experiments.report.store import Store
from experiments.report.sweep import sweep
from experiments.report.workers import Workers
from sharding import hlo
from sharding.target import parse_target
from tests import fakes

ROOT = pathlib.Path(__file__).resolve().parent.parent
POINTS = fakes.points()[:7]

# Sweeps slowly into argv[1]; run in a process of its own, to be killed.
SLOW_SWEEP = """
import pathlib, sys
from rich.console import Console
from experiments.report.store import Store
from experiments.report.sweep import sweep
from experiments.report.workers import Workers
from tests import fakes
if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    with Workers(2, fakes.no_setup) as workers, Store(folder) as store:
        sweep(fakes.points()[:7], fakes.slowly, store, workers, Console())
"""


def _sweep(folder: pathlib.Path, evaluate, jobs: int = 2) -> list[Record]:
    with Workers(jobs, fakes.no_setup) as workers, Store(folder) as opened:
        return sweep(POINTS, evaluate, opened, workers, Console(quiet=True))


@pytest.fixture(scope="module")
def expected() -> list[Record]:
    return [fakes.evaluate(point) for point in POINTS]


def test_finds_the_same_with_one_worker_and_two(
    tmp_path: pathlib.Path, expected: list[Record]
) -> None:
    assert _sweep(tmp_path / "1", fakes.evaluate, jobs=1) == expected
    assert _sweep(tmp_path / "2", fakes.evaluate, jobs=2) == expected


def test_a_crash_costs_one_point(
    tmp_path: pathlib.Path, expected: list[Record]
) -> None:
    found = _sweep(tmp_path, fakes.badly)
    reasons = {r.partition: r.reason for r in found if r.status == "failed"}
    assert reasons.keys() == {"tp4_pp2", "pp8", "tp2_pp4"}
    assert "SIGABRT. Its last words: F0000 everything is lost" in str(
        reasons["tp4_pp2"]
    )
    assert "SIGKILL, which most often means" in str(reasons["pp8"])
    assert "cannot read this instruction: %fusion.7" in str(reasons["tp2_pp4"])
    for record, right in zip(found, expected, strict=True):
        assert record == right or record.status == "failed"
    # What failed is tried again, what did not is not.
    assert _sweep(tmp_path, fakes.evaluate) == expected
    records, _ = store.read_records(tmp_path)
    assert len(records) == len(POINTS) + 3


def test_a_finished_sweep_evaluates_nothing(tmp_path: pathlib.Path) -> None:
    first = _sweep(tmp_path, fakes.evaluate)
    before = (tmp_path / store.FILE_NAME).read_bytes()
    assert _sweep(tmp_path, fakes.badly) == first
    assert (tmp_path / store.FILE_NAME).read_bytes() == before


def test_killed_half_way_it_goes_on(
    tmp_path: pathlib.Path, expected: list[Record]
) -> None:
    file = tmp_path / store.FILE_NAME
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SWEEP, str(tmp_path)],
        cwd=ROOT,
        start_new_session=True,
    )
    give_up = time.monotonic() + 60
    while not file.exists() or file.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.02)
    process.kill()
    process.wait()
    # Its workers end by themselves, so that a resumed sweep has the machine.
    while _members(process.pid):
        assert time.monotonic() < give_up
        time.sleep(0.02)
    kept = file.read_bytes()
    assert 3 <= kept.count(b"\n") < len(POINTS)

    # And as if the kill had come in the middle of a line:
    file.write_bytes(kept[:-30])
    assert _sweep(tmp_path, fakes.evaluate) == expected
    whole = kept[: kept[:-1].rindex(b"\n") + 1]
    assert file.read_bytes().startswith(whole), "nothing finished is done again"
    assert len(store.read_records(tmp_path)[0]) == len(POINTS)


def _members(session: int) -> list[int]:
    """Returns the live processes of a session."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = entry.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(owner) == session and state != "Z":
            found.append(int(entry.parent.name))
    return found


def _tradeoff(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.tradeoff", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_mistake_is_told_before_anything_is_started(
    tmp_path: pathlib.Path,
) -> None:
    done = _tradeoff(
        "--model=llama-9", "--target=h100:8x2,cpu:2", "--partitions=tp3_xx2",
        "--rules=megatronn", "--batch_sizes=0", f"--out={tmp_path / 'out'}",
    )  # fmt: skip
    assert done.returncode == 1
    for part in ("'llama-9'", "'8x2'", "'megatronn'", "[0]"):
        assert part in done.stderr
    assert "Did you mean megatron?" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_partition_for_no_target_is_refused(tmp_path: pathlib.Path) -> None:
    done = _tradeoff(
        "--model=tiny", "--target=cpu:2", "--partitions=tp4", "--input_len=4",
        f"--out={tmp_path / 'out'}",
    )  # fmt: skip
    assert done.returncode == 1
    assert "partition tp4 needs 4 devices; cpu:2 has 2" in done.stderr


def test_the_whole_road_on_virtual_devices(tmp_path: pathlib.Path) -> None:
    """Real programs, real compiler, one command; then again, and nothing is left."""
    ask = (
        "--model=tiny", "--target=cpu:2", "--partitions=all", "--batch_sizes=1,4",
        "--input_len=8", "--output_len=4", "--dtype=float32", f"--out={tmp_path}",
    )  # fmt: skip
    done = _tradeoff(*ask)
    assert done.returncode == 0, done.stderr + done.stdout
    records, _ = store.read_records(tmp_path)
    status = {(r.partition, r.batch_size): r.status for r in records}
    assert status == {
        ("tp2", 1): "ok", ("pp2", 1): "ok", ("dp2", 1): "refused",
        ("tp2", 4): "ok", ("pp2", 4): "ok", ("dp2", 4): "ok",
    }  # fmt: skip
    tp2 = next(r for r in records if r.partition == "tp2" and r.decode)
    assert tp2.decode is not None
    assert {c.axis for c in tp2.decode.collectives} == {"tensor"}
    for name in ("report.html", "report.md", "pareto.csv"):
        assert (tmp_path / name).stat().st_size > 500
    again = _tradeoff(*ask, f"--traces={tmp_path / 'traces'}")
    assert "6 of 6 points are in" in again.stdout
    assert store.read_records(tmp_path)[0] == records
    fitting = sum(record.status == "ok" for record in records)
    assert len(list((tmp_path / "traces").glob("*.json"))) == 2 * fitting


def test_a_refusal_for_memory_is_read_in_bytes() -> None:
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the"
        " total memory required for HLO temporaries (19.08G) exceeds available HBM"
        " (15.75G). HLO module: jit__decode_whole."
    )
    found = evaluate.too_large(message)
    assert found == (int(19.08 * 2**30), int(15.75 * 2**30))
    assert evaluate.too_large("INTERNAL: RET_CHECK failure") is None


def test_what_cannot_fit_is_not_compiled() -> None:
    """405B in bfloat16 is 812 GB; a node of 8 x 80 GB has 85 GB a device."""
    target = parse_target("cpu:8", "h100")
    point = dataclasses.replace(
        fakes.point(model="llama-3.1-405b"),
        target="cpu:8",
        context={"priced_as": "h100"},
    )
    record = evaluate.evaluate(point)
    assert (record.status, record.origin, record.fits) == (
        "does not fit",
        "modelled",
        False,
    )
    assert (
        record.require("needed_bytes") > 812e9 / 8 > record.require("available_bytes")
    )
    assert record.available_bytes == target.chip.hbm_bytes
    assert "Weights 101 GB and KV cache" in str(record.reason)


def test_a_collective_of_every_layer_is_one_row() -> None:
    layer = hlo.Collective(
        axis="tensor", kind="all-reduce", count=1, payload_bytes=64, wire_bytes=96,
        group_size=4, op_name="layer 0", source="layers.py:7", loop="",
    )  # fmt: skip
    other = dataclasses.replace(
        layer, count=3, op_name="layer 1", payload_bytes=192, wire_bytes=288
    )
    elsewhere = dataclasses.replace(layer, source="vocab.py:9")
    both, one = evaluate.merged([layer, elsewhere, other])
    assert (both.count, both.payload_bytes, both.wire_bytes) == (4, 256, 384)
    assert (both.payload_bytes_each, one.count, one.source) == (64, 1, "vocab.py:9")
