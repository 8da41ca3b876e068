"""The file of what a runtime answered: made by the prober, kept beside the tables of targets, read by tests and pages.

It holds for each form the largest difference over the largest expected value, or what went wrong, one form a line.
"""

from __future__ import annotations

import json
import re
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
    """Writes a file of answers; where it is there already, what it says of other forms stays.

    Of a version that follows another on that provider and hardware, only what differs is written.
    """
    there = read_all(folder, f"{found.provider}-*.json")
    family = {own.name: own for own in there if own.hardware == found.hardware}
    asked = {own.form for own in found.answers}
    kept = (own for own in family[found.name].answers if own.form not in asked) if found.name in family else ()
    family[found.name] = replace(found, answers=(*kept, *found.answers))
    before: Answers | None = None
    for own in sorted(family.values(), key=lambda own: tuple(map(int, own.version.split(".")))):
        (folder / own.name).write_text(_shown(own, before))
        before = own
    return folder / found.name


def _shown(own: Answers, before: Answers | None) -> str:
    """Writes answers, as what differs from those of the version before."""
    rows, others = _rows(own), {} if before is None else _rows(before)
    rows |= dict.fromkeys(others.keys() - rows.keys())
    changed = {text: row for text, row in rows.items() if text not in others or row != others[text]}
    said = list(dict.fromkeys(row for row in changed.values() if row is not None and not row[0].isdigit()))
    head = {"provider": own.provider, "version": own.version, "hardware": own.hardware, "taken": own.taken}
    head |= {"said": said} if before is None else {"as": before.name, "said": said}
    lines = [
        f'"{text}": ' + ("null" if row is None else f'"{said.index(row)}"' if row in said else row)
        for text, row in sorted(changed.items())
    ]
    return "\n".join([json.dumps(head, indent=0)[:-2] + ',\n"answers": {', ",\n".join(lines), "}}", ""])


def _rows(own: Answers) -> dict[str, str | None]:
    return {text_of(a.form): a.why if a.error is None else _digits(a.error) for a in own.answers}


def read_all(folder: Path, names: str = "*.json") -> list[Answers]:
    """Reads every file of a folder."""
    found: dict[str, Answers] = {}
    return [_read(path, found) for path in sorted(folder.glob(names))]


def _read(path: Path, known: dict[str, Answers]) -> Answers:
    """Reads a file of answers, and of those before it what it does not say otherwise."""
    if path.name in known:
        return known[path.name]
    data = json.loads(path.read_text())
    before = _read(path.with_name(data["as"]), known).answers if "as" in data else ()
    found = {own.form: own for own in before}
    for text, value in data["answers"].items():
        form = form_of(text)
        found.pop(form, None)
        if value is not None:
            said = isinstance(value, str)
            found[form] = Answer(form, None if said else float(value), data["said"][int(value)] if said else "")
    answers = tuple(sorted(found.values(), key=lambda own: text_of(own.form)))
    known[path.name] = Answers(data["provider"], data["version"], data["hardware"], data["taken"], answers)
    return known[path.name]


def _digits(error: float) -> str:
    return "1e9" if error == float("inf") or error > 1e9 else f"{error:.1e}".replace("e-0", "e-").replace("e+0", "e")
