r"""How fast are the attached devices, by size, at what programs are made of?

Times chains of equal kernels and collectives, each chain one compiled program: copies
and reads by size, matrix products by shape and dtype, attention, all-reduce,
all-gather, reduce-scatter and permute by size and group, the gaps between kernels and
around collectives, and what a call costs. Every sample goes to `--out`/CHIP.jsonl,
which is a chip for `--chip` of the other experiments, with a page of its curves beside.

    python -m experiments.calibrate --out=runs/calibration

A point that is in the file already is not measured again, so the same command goes on
where it was stopped or ran out of `--budget_s`. Devices that another process uses are
not measured.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

from experiments import command
from experiments.calibration import bench, curves, points, run
from sharding import guard

_OUT = flags.DEFINE_string("out", "runs/calibration", "Folder of samples and page.")
_TARGET = flags.DEFINE_string("target", "attached", "What to measure: attached, cpu:2.")
_CHIP = flags.DEFINE_string(
    "chip",
    None,
    "Which chip the devices are, if their name does not say: name or file.",
)
_SIZE = flags.DEFINE_enum(
    "size", "auto", ["auto", *points.SIZES], "Of the plan; auto is what suits."
)
_BUDGET_S = flags.DEFINE_float(
    "budget_s", 280.0, "Begin no point after so many seconds.", lower_bound=0.0
)
_IF_BUSY = flags.DEFINE_enum(
    "if_busy", "refuse", ["refuse", "warn"], "If another process uses the GPUs."
)


def main(argv: Sequence[str]) -> None:
    """Reads the flags, measures, and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    console = command.console()
    ask = bench.Ask(
        target=_TARGET.value,
        chip=_CHIP.value,
        size=points.SIZES.get(_SIZE.value),
        refuse=_IF_BUSY.value == "refuse",
    )
    out = pathlib.Path(_OUT.value)
    try:
        busy = guard.before_start() if ask.target == "attached" else []
        if ask.refuse:
            guard.refuse(busy)
        for text in busy or guard.load_warning():
            console.print(f"Warning: {text}.")
        outcome = run.calibrate(ask, out, _BUDGET_S.value, console)
    except ValueError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. The same command goes on from what is in {out}.")
    curves.show(console, outcome)


if __name__ == "__main__":
    app.run(main)
