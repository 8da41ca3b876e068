"""Times the proofs of rewrites: processor seconds of this process and of the one that runs models.

    python benchmarks/proofs.py [--runs 3]

To compare with another commit, install that one elsewhere (`git worktree add`, a virtual environment of its own) and
run this file with its Python: it asks for nothing of the rewriter that was not always there.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import models

import rewriter
from rewriter.parity.local import LocalProver

try:
    from rewriter.parity import apart
except ImportError:  # models ran in the same process
    apart = None  # type: ignore[assignment]

WIDE = {"hidden": 512, "intermediate": 256}
CASES = (
    (2, 16, WIDE, "moe-int4"),
    (2, 16, WIDE, "fuse-experts"),
    (2, 16, WIDE, "experts-int4"),
    (4, 64, WIDE, "moe-int4"),
    (4, 64, WIDE, "experts-int4"),
    (30, 32, {}, "fuse-experts"),
)


def seconds() -> float:
    """Processor time so far."""
    workers = () if apart is None else apart._WORKERS
    fields = (Path(f"/proc/{w.process.pid}/stat").read_text().rpartition(")")[2].split() for w in workers)
    return time.process_time() + sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


SPENT = [0.0]
_PROVE = LocalProver.__call__


def timed(self: LocalProver, *arguments: Any) -> Any:
    """Proves, and adds up what that takes."""
    start = seconds()
    try:
        return _PROVE(self, *arguments)
    finally:
        SPENT[0] += seconds() - start


def proved(model: Any, rules: str) -> tuple[float, float]:
    """Seconds of all proofs, and of the whole run."""
    SPENT[0] = 0.0
    start = seconds()
    rewriter.apply(model, rules)
    return SPENT[0], seconds() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of which the fastest counts")
    options = parser.parse_args()
    LocalProver.__call__ = timed  # type: ignore[method-assign]
    print("| layers x experts, hidden | rules | proofs s | whole run s |\n|---|---|---|---|")
    for layers, experts, size, rules in CASES:
        model = models.unrolled_model(layers, experts, **size)
        proved(model, rules)  # the first one loads the runtime
        spent, whole = min(proved(model, rules) for _ in range(options.runs))
        print(f"| {layers} x {experts}, {size.get('hidden', 32)} | {rules} | {spent:.3f} | {whole:.2f} |", flush=True)


if __name__ == "__main__":
    main()
