"""The table of the tests' models: which blocks become one operator, and why the others do not."""

from __future__ import annotations

import json
from pathlib import Path

from generator.markdown import table

_RECORD = Path(__file__).resolve().parents[2] / "tests/golden/fuse-experts.json"


def fused() -> str:
    """Returns a row for each model with a block in plain operators, as the record of what fuse-experts does has it."""
    rows = []
    for name, found in json.loads(_RECORD.read_text(encoding="utf-8")).items():
        applied = found.get("applied", {}).get("fuse-experts", 0)
        reasons = [line.partition(": ")[2].rpartition(" [")[0] for line in found.get("declines", ())]
        if applied or reasons:
            rows.append([name, str(applied or "-"), "; ".join(dict.fromkeys(reasons))])
    return table(("model", "blocks fused", "what keeps others apart"), rows)
