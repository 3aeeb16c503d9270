"""A record survives the trip to a file, and a file survives being killed."""

import dataclasses
import json
import math
import pathlib

import pytest

from experiments.report import store
from experiments.report.record import Point, Record, TimeParts
from experiments.report.store import Store
from tests import fakes

RECORDS = [fakes.evaluate(point) for point in fakes.points()]


@pytest.mark.parametrize("status", ["ok", "does not fit", "refused", "failed"])
def test_is_the_same_after_a_trip_through_json(status: str) -> None:
    record = next(
        r
        for r in [*RECORDS, fakes.failed(fakes.point(), "it broke")]
        if r.status == status
    )
    line = record.to_json()
    assert "\n" not in line
    assert Record.from_json(line) == record


def test_top_level_is_flat_and_has_every_field_that_is_promised() -> None:
    found = json.loads(RECORDS[0].to_json())
    assert found.keys() >= {
        "schema", "origin", "model", "target", "chip", "partition", "rules", "dtype",
        "batch_size", "input_len", "output_len", "fits", "reason", "ttft_s", "tpot_s",
        "e2e_s", "output_tokens_per_s", "tokens_per_s_per_user",
        "tokens_per_s_per_chip", "ttft_limit_s", "tpot_limit_s", "bottleneck",
        "provenance", "micro_batches", "ttft_parts_s", "tpot_parts_s",
        "available_bytes", "needed_bytes",
    }  # fmt: skip
    assert found["ttft_parts_s"].keys() == {
        "compute", "hbm", "links", "overhead", "bubble",
    }  # fmt: skip
    for phase in ("prefill", "decode"):
        assert found[phase].keys() >= {
            "flops", "hbm_bytes", "collectives", "memory", "compile_s", "xla_flops",
            "ticks", "busy_ticks", "closed_form_flops", "pct_of_limit", "mfu", "mbu",
        }  # fmt: skip


def test_metrics_are_those_of_the_definitions() -> None:
    r = next(r for r in RECORDS if r.status == "ok" and r.batch_size == 16)
    assert math.isclose(
        r.require("e2e_s"), r.require("ttft_s") + 127 * r.require("tpot_s")
    )
    rate = 16 * 128 / r.require("e2e_s")
    assert math.isclose(r.require("output_tokens_per_s"), rate)
    assert math.isclose(r.require("tokens_per_s_per_chip"), rate / 8)
    assert math.isclose(r.require("tokens_per_s_per_user"), 1 / r.require("tpot_s"))


def test_stacked_parts_are_the_total() -> None:
    for r in RECORDS:
        for total, parts in ((r.ttft_s, r.ttft_parts_s), (r.tpot_s, r.tpot_parts_s)):
            assert (total is None) == (parts is None)
            if total is not None and parts is not None:
                assert math.isclose(total, sum(s for _, s in parts.items()))


def test_parts_that_are_not_the_total_are_refused() -> None:
    record = RECORDS[0]
    with pytest.raises(ValueError, match=r"add up to .* not 5\.0 s"):
        dataclasses.replace(record, ttft_s=5.0)


def test_a_point_without_an_answer_has_a_reason_and_no_metric() -> None:
    refused = next(r for r in RECORDS if r.status == "refused")
    assert refused.ttft_s is None
    assert refused.fits is False
    with pytest.raises(ValueError, match="needs a reason and no metric"):
        dataclasses.replace(refused, reason=None)
    with pytest.raises(ValueError, match=r"states \['tpot_s'\]"):
        dataclasses.replace(refused, tpot_s=0.01)
    with pytest.raises(ValueError, match="ttft_s was asked of dp2_tp4 at batch 1"):
        refused.require("ttft_s")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_figure_is_finite_and_not_negative(value: float) -> None:
    with pytest.raises(ValueError, match=r"e2e_s is (nan|inf|-1\.0)"):
        dataclasses.replace(RECORDS[0], e2e_s=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema 99 was found; this code reads 1"),
        ({"extra": 1}, "missing or unknown: extra"),
        ({"batch_size": "16"}, "record.batch_size is '16'"),
        ({"fits": 1}, "record.fits is 1"),
        ({"prefill": {}}, "record.prefill must have each of its fields once"),
    ],
)
def test_what_is_no_record_is_not_read(change: dict, message: str) -> None:
    line = json.dumps(json.loads(RECORDS[0].to_json()) | change)
    with pytest.raises(ValueError, match=message):
        Record.from_json(line)


def test_parts_add_and_name_the_largest() -> None:
    a = TimeParts(compute=1, hbm=2, links={"tensor": 1}, overhead=0, bubble=0)
    b = TimeParts(
        compute=0, hbm=0, links={"stage": 1, "tensor": 2}, overhead=1, bubble=0
    )
    total = a.plus(b, times=2)
    assert total.links == {"tensor": 5, "stage": 2}
    assert total.total_s == a.total_s + 2 * b.total_s
    assert total.bottleneck == "tensor links"


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Point)])
def test_points_that_differ_anywhere_have_different_keys(field: str) -> None:
    point = fakes.point()
    value = getattr(point, field)
    other = {
        str: lambda: value + "x",
        int: lambda: value + 1,
        dict: lambda: value | {"jax": "0.12.0"},
        type(None): lambda: 4,
    }[type(value)]()
    changed = dataclasses.replace(point, **{field: other})
    assert changed.key != point.key
    assert dataclasses.replace(changed, **{field: value}).key == point.key


def test_store_gives_back_what_was_appended(tmp_path: pathlib.Path) -> None:
    with Store(tmp_path / "new" / "folder") as opened:
        for record in RECORDS[:3]:
            opened.append(record)
    with Store(tmp_path / "new" / "folder") as opened:
        assert list(opened.records.values()) == RECORDS[:3]
        assert opened.dropped is None


def test_cut_off_last_line_is_dropped_and_reported(tmp_path: pathlib.Path) -> None:
    with Store(tmp_path) as opened:
        for record in RECORDS[:3]:
            opened.append(record)
    file = tmp_path / store.FILE_NAME
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    records, dropped = store.read_records(tmp_path)
    assert records == RECORDS[:2]
    assert dropped
    assert file.read_bytes() == whole[:-40], "reading changes nothing"
    with Store(tmp_path) as opened:
        assert opened.dropped == dropped
        assert list(opened.records.values()) == RECORDS[:2]
        opened.append(RECORDS[2])
    assert file.read_bytes() == whole


def test_a_broken_line_inside_stops_reading(tmp_path: pathlib.Path) -> None:
    lines = [RECORDS[0].to_json(), '{"schema":1', RECORDS[1].to_json(), ""]
    (tmp_path / store.FILE_NAME).write_text("\n".join(lines))
    with pytest.raises(ValueError, match="cannot read line 2 of"):
        Store(tmp_path)


def test_a_folder_has_one_writer(tmp_path: pathlib.Path) -> None:
    with Store(tmp_path), pytest.raises(ValueError, match="by another process"):
        Store(tmp_path)
    Store(tmp_path).__exit__()


def test_records_of_other_code_are_not_mixed_in() -> None:
    old = [fakes.evaluate(fakes.point(partition=p)) for p in ("tp8", "pp8")]
    new = fakes.evaluate(fakes.point(context={"code": "changed"}))
    other = fakes.evaluate(fakes.point(model="llama-3.1-8b"))
    assert store.current([*old, new, other]) == ([new, other], 2)
    assert store.current([new, *old]) == (old, 1)


def test_a_later_record_of_a_point_replaces_the_earlier() -> None:
    failed = fakes.failed(fakes.point(), "it broke")
    good = fakes.evaluate(fakes.point())
    assert store.current([failed, good]) == ([good], 0)
