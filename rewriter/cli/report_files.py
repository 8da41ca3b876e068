"""Report files, JSON and HTML: written whole or not at all, never over something that is not a report."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from rewriter.errors import UsageError

PAGES = (".html", ".htm")
"""Endings of the names of pages."""


def is_stdout(file: Path) -> bool:
    """Whether a report is to be printed: ``-``, or what the system calls the standard output."""
    return str(file) in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def refuse(file: Path, output: Path | None) -> None:
    """Refuses a place for a report before any work is done; one inside the output directory, if any, is fine.

    Raises:
        UsageError: it is a directory, its directory is missing, or something that is no report lies there.
    """
    if _is_stream(file):
        return
    inside = output is not None and Path(os.path.realpath(file)).parent == Path(os.path.realpath(output))
    _require_place(file, "the report", "report.json or report.html", inside=inside)
    if file.exists() and not (_is_page(file) if file.suffix in PAGES else _is_report(file)):
        raise UsageError(f"the report '{file}' exists and is no report; choose another name, or remove it")


def refuse_page(file: Path, output: Path | None, example: str) -> None:
    """As ``refuse``, for a page; ``example`` is a name for one.

    Raises:
        UsageError: likewise, or its name is not that of a page.
    """
    if file.suffix not in PAGES:
        raise UsageError(f"--html {file}: a page is a file as {example}")
    refuse(file, output)


def refuse_plan(file: Path) -> None:
    """Refuses a place for a rule set before any work is done.

    Raises:
        UsageError: it is a directory, its directory is missing, or its name is not that of a rule set.
    """
    if file.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--write-plan {file}: a rule set is a file as plan.yaml")
    _require_place(file, "the plan", "plan.yaml")


def _require_place(file: Path, what: str, example: str, *, inside: bool = False) -> None:
    """Refuses a directory, and a file in one that is not there; ``inside`` where it will be made."""
    if file.is_dir():
        raise UsageError(f"{what} '{file}' is a directory; give a file, as {example}")
    if not inside and not file.absolute().parent.is_dir():
        raise UsageError(f"cannot write {what} '{file}': there is no directory '{file.parent}'; make it first")


def write(file: Path, text: str) -> None:
    """Writes a report.

    Raises:
        UsageError: it cannot be written; the file is as it was.
    """
    if _is_stream(file):
        file.write_text(text, encoding="utf-8", errors="replace")
        return
    try:
        with tempfile.TemporaryDirectory(dir=file.absolute().parent, prefix=".report.") as folder:
            partial = Path(folder) / file.name
            partial.write_text(text, encoding="utf-8", errors="replace")
            partial.replace(file)
    except OSError as error:
        raise UsageError(f"cannot write the report '{file}' ({error.strerror}); choose another place") from error


def _is_stream(file: Path) -> bool:
    """Whether it is a pipe or a device: nothing to be read or replaced."""
    return file.exists() and not file.is_file() and not file.is_dir()


def _is_report(file: Path) -> bool:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "schema_version" in found and "applications" in found


def _is_page(file: Path) -> bool:
    from rewriter.html import GENERATOR

    with file.open("rb") as stream:
        return f'name="generator" content="{GENERATOR}"'.encode() in stream.read(1 << 10)
