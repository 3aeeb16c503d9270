"""docs/findings.md: the page in Markdown, made from rows alone."""

from collections.abc import Sequence

from experiments.claims import printed, questions
from experiments.claims.claims import CLAIMS, CROSSOVERS
from experiments.claims.judge import Cell, Claim, Finding
from experiments.claims.page import NOTES, TITLE, rates, summary
from experiments.claims.rows import Rows
from experiments.report import tables

_MARK = {True: "yes", False: "no", None: "—"}
MAKE = "python -m experiments.paper --out=runs/paper"


def text(rows: Rows, folder: str, notes: Sequence[str] = ()) -> str:
    """Returns the Markdown of `rows`.

    Args:
      rows: all of them.
      folder: where they are kept, as a link from docs/ and from the repository's root.
      notes: what a reader must know besides.
    """
    name = folder.removeprefix("docs/")
    parts = [
        f"# {TITLE}",
        f"{summary(rows)} The claims are those of [arXiv:2603.05692]({printed.URL}),"
        " which simulated Llama-3.1-70B and 405B on eight AMD GPUs from formulas.",
        "\n".join(f"- {note}" for note in (*NOTES, rates(rows), *notes)),
        "Made from [rows](" + f"{name}/rows.jsonl), found by key, with\n\n"
        f"```sh\n{MAKE}\n"
        f"python -m experiments.paper --rows={folder} --findings=docs/findings.md\n"
        "```\n\nThe first makes every row anew and a page with figures; it goes on"
        " where it was stopped. The second makes this page from the rows kept here.",
        "## Verdicts",
        tables.markdown(
            (
                ("claim", "printed", "verdict", "why"),
                [_line(claim, claim.judge(rows)) for claim in CLAIMS],
            )
        ),
        "## Claim by claim",
        *(_section(claim, claim.judge(rows)) for claim in CLAIMS),
        "## Two published crossovers",
        *(_section(claim, claim.judge(rows)) for claim in CROSSOVERS),
        "## What the paper leaves out",
    ]
    for answer in questions.answers(rows):
        parts += [f"### {answer.question}", answer.text]
        if answer.table[1]:
            parts.append(tables.markdown(answer.table))
        else:
            parts.append("No point of it was computed yet.")
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _line(claim: Claim, finding: Finding) -> list[str]:
    return [claim.name, claim.printed, f"**{finding.verdict}**", finding.because]


def _section(claim: Claim, finding: Finding) -> str:
    parts = [
        f"### {claim.name}: {finding.verdict}",
        f"Printed: {claim.printed}",
        finding.because,
        _table(finding.cells, "holds"),
    ]
    if finding.measured:
        parts += ["Measured:", _table(finding.measured, "so measured")]
    return "\n\n".join(part.strip("\n") for part in parts)


def _table(cells: Sequence[Cell], question: str) -> str:
    return tables.markdown(
        (
            ("chip", "of", question, "found", "rows"),
            [
                [
                    f"{cell.chip}{' †' if cell.assumes_memory else ''}",
                    cell.subject,
                    _MARK[cell.holds],
                    cell.text,
                    " ".join(cell.keys),
                ]
                for cell in cells
            ],
        )
    )
