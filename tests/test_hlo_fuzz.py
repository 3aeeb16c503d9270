"""Damaged texts are read or refused, and never read as if nothing were there."""

import re
from typing import Any

import pytest

from sharding.hlo import Ledger, read_ledger
from tests import hlo_fuzz

CASES = 3000


def test_damaged_texts_are_read_or_refused() -> None:
    assert hlo_fuzz.run(hlo_fuzz.bases(7_000), CASES, seed=20261122) == {}


def test_the_judge_sees_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that loses products or collectives, crashes or hangs is found out."""
    case = next(c for c in hlo_fuzz.bases(9_000) if "fsdp_forward.cpu" in c.name)
    assert {min(kinds) for _, kinds in case.lines} == {"all-gather", "product"}
    assert hlo_fuzz.judge(case, case.text) == ""

    def without_costs(text: str) -> Ledger:
        return Ledger(costs=(), collectives=read_ledger(text).collectives)

    def without_collectives(text: str) -> Ledger:
        return Ledger(costs=read_ledger(text).costs, collectives=())

    def crashing(text: str) -> Any:
        return text[len(text)]

    for reader, verdict in (
        (without_costs, "no product, but"),
        (without_collectives, "no all-gather, but"),
        (crashing, "raised IndexError"),
    ):
        monkeypatch.setattr(hlo_fuzz, "read_ledger", reader)
        assert hlo_fuzz.judge(case, case.text).startswith(verdict)

    def hanging(text: str) -> Any:
        while text:
            pass

    monkeypatch.setattr(hlo_fuzz, "read_ledger", hanging)
    monkeypatch.setattr(hlo_fuzz, "SECONDS", 0.05)
    (verdict,) = hlo_fuzz.run([case], 1, seed=0)
    assert "longer than" in verdict


HEAD = "HloModule m, num_partitions=4"
ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}
"""


def test_an_instruction_among_the_tables_is_no_row_of_them() -> None:
    text = """HloModule m, num_partitions=4

StackFrames
1 {file_location_id=1}
  ROOT %g = f32[32] all-gather(%a), replica_groups={{0,1,2,3}}, dimensions={0}

ENTRY %e (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
}
"""
    with pytest.raises(ValueError, match=r"cannot read line:.*all-gather"):
        read_ledger(text)
    with pytest.raises(ValueError, match="cannot read line: ENTRY"):
        read_ledger("HloModule m\nENTRY %e (a: f\n  %a = f32[8] parameter(0)\n}\n")


A = "%a = f32[8] parameter(0)"


@pytest.mark.parametrize(
    ("lines", "head", "message"),
    [
        ([A, "ROOT %r = f32[8] all-reduce(%a), replica_groups={}, to_apply=%add"],
         "HloModule m", "does not say how many"),
        ([A, "ROOT %r = f32[8] all-reduce(%a), replica_groups={{0,9}}, to_apply=%add"],
         HEAD, "name device 9; the header of the text says that there are 4"),
        ([A, "ROOT %r = f32[8] all-reduce(%a), replica_groups=[2,2]<=[4]T(1),"
          " to_apply=%add"], HEAD, "no known spelling"),
        ([A, "ROOT %r = f32[8] all-reduce-done(%a)"], HEAD,
         "ends a all-reduce that %a = parameter does not start"),
        ([A, "%n = f32[8] negate(%a)", "ROOT %r = f32[8] all-reduce-done(%n)"], HEAD,
         "ends a all-reduce that %n = negate does not start"),
        ([A, "ROOT %r = f32[8] dot(%a, %a), lhs_contracting_dims={0},"
          " rhs_contracting_dims={0}"], HEAD, "sizes do not fit"),
        ([A, "%a = f32[8] negate(%a)", "ROOT %r = f32[8] negate(%a)"], HEAD,
         "twice in computation %e"),
        ([A, "ROOT %r = f32[8] negate(%a)"], "HloModule m, num_partitions=99999999",
         "at most 1048576"),
        ([A, "ROOT %r = f32[8] negate(%a), kind=kLoop, calls=%add"], HEAD,
         "only fusions and calls have calls=: %r ="),
        ([A, "ROOT %r = f32[8] fusion(%a), kind=kLoop, calls=%add"], HEAD,
         "%add does not take the operands of: %r ="),
        (["%a = f32[] parameter(0)",
          "ROOT %r = f32[8] fusion(%a, %a), kind=kLoop, calls=%add"], HEAD,
         "%add is no body of: %r ="),
        ([A, f"ROOT %r = {'(' * 5000}f32[8]{')' * 5000} tuple(%a)"], HEAD, "hundreds"),
    ],
)  # fmt: skip
def test_what_would_read_as_nothing_is_refused(
    lines: list[str], head: str, message: str
) -> None:
    body = "\n".join(f"  {line}" for line in lines)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_ledger(f"{head}\n{ADD}\nENTRY %e () -> f32[8] {{\n{body}\n}}\n")
