"""What writes the generated parts of the pages; those of targets read answers as the prober does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "prober"))
