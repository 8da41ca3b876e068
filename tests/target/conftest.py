"""Tests of targets read what the prober measured, with the prober's own reader."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "prober"), str(ROOT / "docs")]
