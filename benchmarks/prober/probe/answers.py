"""The file of what a runtime answered: made by the prober, kept beside the tables of targets, read by tests and pages.

It holds for each form the largest difference over the largest expected value, or what went wrong, one form a line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from probe.forms import Form, form_of, text_of

Verdict = Literal["right", "rounds", "wrong", "refused", "fails", "crashes"]

_LIMITS = {"FLOAT": 1e-3, "FLOAT16": 2e-3, "BFLOAT16": 3e-2}
"""Of an error that is the element type's own, TF32's for float32."""
_ROUNDED = 4e-2
"""Of an error that activations of 8 bits have; a wrong zero point or scale has ten times as much."""
_EXACT = 2e-5
"""Of float32 on the CPU, where nothing but the order of a sum differs."""


@dataclass(frozen=True)
class Answer:
    """What a runtime did with a form.

    Attributes:
        form: the form.
        error: the largest difference over the largest expected value, or None where it did not run.
        why: load, run or crash, and what was said; empty where it ran.
    """

    form: Form
    error: float | None
    why: str = ""

    def verdict(self, provider: str) -> Verdict:
        """Says whether a form may be written."""
        if self.error is None:
            return {"load": "refused", "run": "fails", "crash": "crashes"}[self.why.partition(":")[0]]
        limit = _EXACT if provider == "cpu" and self.form.x == "FLOAT" else _LIMITS[self.form.x]
        if self.error <= limit:
            return "right"
        return "rounds" if self.error <= _ROUNDED else "wrong"


@dataclass(frozen=True)
class Answers:
    """All answers of one runtime.

    Attributes:
        provider: cpu, cuda, webgpu or dml.
        version: of ONNX Runtime, as it says itself.
        hardware: what it ran on.
        taken: the date.
        answers: of each form.
    """

    provider: str
    version: str
    hardware: str
    taken: str
    answers: tuple[Answer, ...]

    @property
    def name(self) -> str:
        """Of its file."""
        hardware = re.sub(r"[^a-z0-9]+", "-", self.hardware.lower()).strip("-")
        return f"{self.provider}-{self.version}-{hardware}.json"


def write(folder: Path, found: Answers) -> Path:
    """Writes a file of answers; where it is there already, what it says of other forms stays."""
    path = folder / found.name
    if path.exists():
        asked = {own.form for own in found.answers}
        kept = (own for own in read(path).answers if own.form not in asked)
        found = replace(found, answers=tuple(sorted((*kept, *found.answers), key=lambda own: text_of(own.form))))
    said = list(dict.fromkeys(own.why for own in found.answers if own.why))
    head = {
        "provider": found.provider,
        "version": found.version,
        "hardware": found.hardware,
        "taken": found.taken,
        "said": said,
    }
    lines = [json.dumps(head, indent=0)[:-2] + ',\n"answers": {']
    rows = [
        f'"{text_of(own.form)}": ' + (f'"{said.index(own.why)}"' if own.error is None else f"{_digits(own.error)}")
        for own in found.answers
    ]
    path.write_text("\n".join([*lines, ",\n".join(rows), "}}", ""]))
    return path


def read(path: Path) -> Answers:
    """Reads a file of answers."""
    data = json.loads(path.read_text())
    answers = tuple(_answer(text, value, data["said"]) for text, value in data["answers"].items())
    return Answers(data["provider"], data["version"], data["hardware"], data["taken"], answers)


def read_all(folder: Path) -> list[Answers]:
    """Reads every file of a folder."""
    return [read(path) for path in sorted(folder.glob("*.json"))]


def _answer(text: str, value: float | str, said: Iterable[str]) -> Answer:
    if isinstance(value, str):
        return Answer(form_of(text), None, list(said)[int(value)])
    return Answer(form_of(text), float(value))


def _digits(error: float) -> str:
    return "1e9" if error == float("inf") or error > 1e9 else f"{error:.1e}".replace("e-0", "e-").replace("e+0", "e")
