"""Reading takes time and memory in proportion to the text, and little of both."""

import gc
import pathlib
import re
import subprocess
import sys
import time

import pytest

from sharding.hlo import read_ledger

HERE = pathlib.Path(__file__).resolve().parent
NAMES = re.compile(r"%([\w.\-]+)")
PARAMETER = re.compile(r" parameter\((\d+)\)")

# Real programs, unrolled: a decoding layer with all its fusions, and one in a loop.
TEXTS = ["decode.h100.jax0.12", "decode.v5p.jax0.12", "scan.v5p.jax0.12"]


def multiplied(text: str, times: int) -> str:
    """Returns a program that does all of `text`'s work `times` over, under new names.

    Every copy has computations and parameters of its own, as the layers of an unrolled
    model have.
    """
    first = re.search(r"(?m)^(?:%|ENTRY )", text)
    assert first
    entry_at = text.index("\nENTRY ") + 1
    head, called = text[: first.start()], text[first.start() : entry_at]
    title, *lines = text[entry_at:].rstrip().removesuffix("}").rstrip().split("\n")
    entry = "\n".join(lines)
    count = len(PARAMETER.findall(entry))
    parts, body = [head], []
    for k in range(times):
        parts.append(NAMES.sub(rf"%\1.c{k}", called))
        mine = NAMES.sub(rf"%\1.c{k}", entry).replace("ROOT ", "")
        moved = lambda m, k=k: f" parameter({int(m[1]) + k * count})"
        body.append(PARAMETER.sub(moved, mine))
    return "".join([*parts, title, "\n", "\n".join(body), "\n}\n"])


def _seconds(text: str) -> float:
    """Returns the least processor time of three readings."""
    taken = []
    for _ in range(3):
        gc.collect()
        start = time.process_time()
        read_ledger(text)
        taken.append(time.process_time() - start)
    return min(taken)


@pytest.mark.parametrize("name", TEXTS)
def test_a_multiplied_program_does_so_many_times_the_work(name: str) -> None:
    text = (HERE / "data" / "hlo" / f"{name}.hlo").read_text()
    one, three = read_ledger(text), read_ledger(multiplied(text, 3))
    for figure in ("flops", "matmul_flops", "hbm_bytes", "wire_bytes"):
        assert getattr(three, figure) == 3 * getattr(one, figure) > 0
    count = lambda ledger: sum(c.count for c in ledger.collectives)
    assert count(three) == 3 * count(one)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_time_is_linear_in_the_text(name: str) -> None:
    text = (HERE / "data" / "hlo" / f"{name}.hlo").read_text()
    times = 5_000 // text.count("\n")
    one, two, four = (_seconds(multiplied(text, k * times)) for k in (1, 2, 4))
    # Twice the text, twice the time; quadratic would be 4 and 16 times.
    assert two < 3 * one + 0.1
    assert four < 6.5 * one + 0.2


MEASURE = """
import resource, sys, time
from sharding.hlo import read_ledger
start = time.process_time()
ledger = read_ledger(sys.stdin.read())
peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(time.process_time() - start, peak_bytes, len(ledger.costs))
"""


@pytest.mark.slow
def test_400_000_lines_take_seconds_and_little_memory() -> None:
    text = (HERE / "data" / "hlo" / "decode.v5p.jax0.12.hlo").read_text()
    each = multiplied(text, 2).count("\n") - multiplied(text, 1).count("\n")
    times = 400_000 // each + 1
    many = multiplied(text, times)
    assert many.count("\n") >= 400_000
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        input=many, cwd=HERE.parent, check=True, capture_output=True, text=True,
    )  # fmt: skip
    cpu_s, peak_bytes, costs = map(float, done.stdout.split())
    assert costs == times * len(read_ledger(text).costs)
    assert cpu_s < 30
    assert peak_bytes < 2 * 2**30
