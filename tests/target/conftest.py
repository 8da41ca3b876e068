"""Tests of targets read what the prober measured, with the prober's own reader."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "prober"))
