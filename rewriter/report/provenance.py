"""Where a model and a report come from: in a model what decides its bytes, in a report the circumstances too.

The same model, rule set and version of this project give the same bytes, so that a written model holds no date, no
command and no version of a runtime. A report holds them.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from rewriter.report.used import UsedRuleSet

TOOL = "onnx-moe-rewriter"
KEY = "onnx_moe_rewriter"
"""Of a model's metadata: a JSON list of ``Made``, the first run first."""

RUNTIME = "onnxruntime"
PACKAGES = (TOOL, "onnxscript", "onnx-ir", "onnx", "numpy", RUNTIME, "onnxruntime-gpu")
_MOST = 1 << 24
"""Characters of metadata that are read."""


@dataclass(frozen=True)
class Made:
    """One run of this project that made a model.

    Attributes:
        version: of this project.
        rule_set: its name.
        digest: SHA-256 of ``rules``.
        rules: the rule set as JSON text: phases with all options, and the plan.
        target: the runtime it was run for.
        given: what else decided the bytes: ``imatrix``, ``calibration``, ``quantizer``.
    """

    version: str
    rule_set: str
    digest: str
    rules: str
    target: str
    given: tuple[str, ...] = ()

    @classmethod
    def by(cls, rules: UsedRuleSet, target: str, given: tuple[str, ...]) -> Made:
        plan = [(line.kind, line.selects, line.values) for line in rules.plan]
        phases = [(phase.name, [(rule.name, rule.options) for rule in phase.rules]) for phase in rules.phases]
        text = json.dumps({"phases": phases, "plan": plan}, sort_keys=True, default=str, separators=(",", ":"))
        return cls(version_of(TOOL), rules.name, hashlib.sha256(text.encode()).hexdigest(), text, target, given)

    def __str__(self) -> str:
        also = f", with {' and '.join(self.given)}" if self.given else ""
        return f"{self.rule_set} ({self.digest[:12]}) for {self.target}{also}, by {TOOL} {self.version}"


@dataclass(frozen=True)
class Provenance:
    """The circumstances of a run.

    Attributes:
        versions: package -> version, of those that are installed; and of Python.
        date: when it ended, in UTC; that of ``SOURCE_DATE_EPOCH`` where it is set.
        command: the command line; empty where it was run from a program.
        digest: of the rule set, as in the model's metadata; empty where nothing fired.
        before: runs that had made the model that was given.
    """

    versions: dict[str, str] = field(default_factory=dict)
    date: str = field(default="", compare=False)
    command: str = ""
    digest: str = ""
    before: tuple[Made, ...] = ()


def provenance(made: Made, before: tuple[Made, ...]) -> Provenance:
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = datetime.datetime.now(datetime.UTC)
    date = datetime.datetime.fromtimestamp(int(epoch), datetime.UTC) if epoch.isdecimal() else now
    return Provenance(versions(), date.isoformat(timespec="seconds"), "", made.digest, before)


def versions() -> dict[str, str]:
    """Returns package -> version of what a run depends on, and of Python."""
    found = {name: version for name in PACKAGES if (version := version_of(name))}
    return {**found, "python": platform.python_version()}


def version_of(package: str) -> str:
    """Returns the installed version; empty where there is none.

    ONNX Runtime's is the imported module's: distributions of several names install it over each other.
    """
    if package == RUNTIME:
        try:
            import onnxruntime  # noqa: PLC0415 -- an extra
        except ImportError:
            return ""
        return str(onnxruntime.__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def made_by(properties: MutableMapping[str, str]) -> tuple[Made, ...]:
    """Returns the runs that made a model, as its metadata says; what is not ours there is ignored."""
    try:
        found: Any = json.loads(properties.get(KEY, "[]")[:_MOST])
        return tuple(Made(**{**entry, "given": tuple(entry.get("given", ()))}) for entry in found)
    except (ValueError, TypeError, AttributeError):
        return ()


def note(properties: MutableMapping[str, str], made: Made) -> None:
    properties[KEY] = json.dumps([asdict(entry) for entry in (*made_by(properties), made)], sort_keys=True)
