"""What rewriting gives today, for every model the tests hold: the record that a change of the code is held to.

Usage: ``python tests/golden/oracle.py`` writes the records anew. A line that differs needs a sentence in the change
that makes it. ``MOE_MODELS`` names a directory of more models; their records go to ``--into``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

import onnx_ir as ir

import rewriter
from rewriter.errors import RewriterError

GOLDEN = Path(__file__).parent
MODELS = Path(os.environ.get("MOE_MODELS", GOLDEN.parent / "models"))
TARGET = "cpu@1.32"
"""Of the records, whatever runtime is installed."""
ROUNDED = {"quantization.default.algorithm": "rtn"}
"""Rounds to nearest, which every processor does alike to the last bit: no sums, whose order vector widths decide."""
SMALL = 4096
"""Bytes of a weight that may stay float without a word."""
SETS = {
    "rtn": ("rtn", {}),
    "k-quant-mixed": ("k-quant-mixed", ROUNDED),
    "experts-int4": ("experts-int4", ROUNDED),
    "fuse-experts": ("fuse-experts", {}),
    "unstack": ("unstack", {}),
}
"""Record -> rule set and overrides."""


def files() -> list[Path]:
    return sorted(MODELS.rglob("*.onnx"))


def name_of(file: Path) -> str:
    return file.relative_to(MODELS).with_suffix("").as_posix()


def record(file: Path, name: str) -> dict[str, object]:
    """Returns what one rule set makes of one model: a digest of its bytes, what fired, and what declined and why."""
    rules, overrides = SETS[name]
    try:
        result = rewriter.apply(file, rules, target=TARGET, overrides=overrides)
        proto = ir.to_proto(result.ir_model)
        del proto.metadata_props[:]  # they hold this project's version
    except RewriterError as error:
        return {"error": str(error).replace(str(file), file.name)}
    report = result.report
    declines = [f"{d.rule}: {d.reason} [{d.node}; {d.culprit}]" for d in report.declines]
    silent = [left.name for left in report.left if left.nbytes > SMALL and not left.reason]
    return {
        **({"float without a reason": silent} if silent else {}),
        "sha256": hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest(),
        "applied": dict(sorted(report.applied.items())),
        "declines": sorted(declines),
    }


def stored(name: str, where: Path = GOLDEN) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((where / f"{name}.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=GOLDEN, help="directory of the records")
    into = parser.parse_args().into
    into.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        records = {name_of(file): record(file, name) for file in files()}
        (into / f"{name}.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
