"""Versions of ONNX Runtime, and the rows of a table of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

Version = tuple[int, int]
"""Major and minor."""


class Row(Protocol):
    """What holds from a version on."""

    @property
    def since(self) -> Version: ...


R = TypeVar("R", bound=Row)


def row_at(rows: Sequence[R], version: Version) -> R | None:
    """Returns the newest row that is no newer than ``version``; rows are in the order of versions."""
    return next((row for row in reversed(rows) if row.since <= version), None)
