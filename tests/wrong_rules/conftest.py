"""Lets these tests use the models of the others."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("rules", "testing"):
    sys.path.append(str(Path(__file__).parents[1] / folder))
