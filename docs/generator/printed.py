"""What a reader of the README sees on his terminal."""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rewriter.cli import main as command_line

ROOT = Path(__file__).resolve().parents[2]


def quick_start() -> str:
    """Returns what the README's first command prints, without the comparison of outputs, which varies by machine."""
    with tempfile.TemporaryDirectory() as folder:
        text = printed(
            [
                "apply",
                "tests/models/mobius/granitemoehybrid_static_unroll_f32.onnx",
                "-o",
                f"{folder}/out",
                "--no-check",
            ]
        )
    kept = [line.replace(f"{folder}/", "") for line in text.splitlines() if not line.startswith("Not compared")]
    return f"```text\n{re.sub(chr(10) + '{3,}', chr(10) * 2, chr(10).join(kept))}\n```\n"


def picture() -> str:
    """Returns the HTML report's picture, once there is one."""
    return "![The HTML report](docs/report.png)\n" if (ROOT / "docs" / "report.png").exists() else ""


def printed(arguments: Sequence[str], width: int = 110) -> str:
    """Returns what a command of ``rewriter`` prints.

    Raises:
        SystemExit: it fails.
    """
    out = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(width)
    try:
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(out):
            status = command_line(list(arguments))
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    if status:
        raise SystemExit(f"rewriter {' '.join(arguments)} failed ({status})")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
