"""What became of programs that were compiled before, so that a killed plan goes on."""

import dataclasses
import json
from pathlib import Path
from typing import Self

from experiments.evaluate import PhaseAnswer
from experiments.report.lines import Lines
from experiments.report.record import decode

FILE_NAME = "phases.jsonl"


class Cache:
    """Answers by the key of their program, one JSON line each in `folder`.

    A line that cannot be read, as one of older code, is passed over: its program is
    compiled again.

    Attributes:
      answers: by key.

    Raises:
      ValueError: another process has the folder open.
    """

    def __init__(self, folder: Path):
        self._lines = Lines(folder / FILE_NAME)
        self.answers: dict[str, PhaseAnswer] = {}
        for text in self._lines.texts:
            try:
                line = json.loads(text)
                self.answers[line["key"]] = decode(
                    PhaseAnswer, line["answer"], "answer"
                )
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, key: str, answer: PhaseAnswer) -> None:
        """Keeps an answer; it is on disk when this returns."""
        line = {"key": key, "answer": dataclasses.asdict(answer)}
        self._lines.append(json.dumps(line, allow_nan=False, separators=(",", ":")))
        self.answers[key] = answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
