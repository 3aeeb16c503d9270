r"""What did a sweep find?

Makes the reports of `--out` again from its `results.jsonl` alone and prints the
answer. Nothing is compiled, so it works wherever the file was copied to, and an
objective can be tried after the fact.

    python -m experiments.show --out=runs/demo --tpot_ms=20
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

from experiments import command
from experiments.report import folder, terminal
from experiments.report.frontier import Objective

_OUT = flags.DEFINE_string("out", None, "Folder with results.jsonl.", required=True)
_TTFT_MS = flags.DEFINE_float("ttft_ms", None, "Objective: longest TTFT.", 0.0)
_TPOT_MS = flags.DEFINE_float("tpot_ms", None, "Objective: longest TPOT.", 0.0)


def main(argv: Sequence[str]) -> None:
    """Reads the flags, makes the reports, and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    out = pathlib.Path(_OUT.value)
    objective = Objective.of_ms(ttft_ms=_TTFT_MS.value, tpot_ms=_TPOT_MS.value)
    console = command.console()
    try:
        questions = folder.write(out, objective)
    except ValueError as error:
        sys.exit(str(error))
    for question in questions:
        terminal.show(console, question, objective)
    terminal.show_files(console, out)


if __name__ == "__main__":
    app.run(main)
