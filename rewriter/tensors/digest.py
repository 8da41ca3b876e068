"""Digests of bytes as they stream by, so that what a file holds can be held to what was computed for it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from rewriter.tensors.view import Array

_CHUNK = 4 << 20
"""Bytes of a file that are read at a time."""


class Digest:
    """Takes bytes in any number of pieces; equal bytes give equal digests."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()  # which processors have instructions for

    def add(self, part: Array | bytes | memoryview) -> None:
        """Takes more bytes: an array's in row-major order."""
        if isinstance(part, np.ndarray):
            part = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        self._hash.update(part)

    def value(self) -> bytes:
        """Returns the digest of all that was taken so far."""
        return self._hash.digest()


class DigestingFile:
    """Writes to a file, and takes the digest of what passes."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._digest = Digest()

    def write(self, data: Any) -> int:
        """Writes bytes, or anything that shows its bytes."""
        view = memoryview(data).cast("B")
        self._digest.add(view)
        count: int = self._file.write(view)
        return count

    def value(self) -> bytes:
        """Returns the digest of all that was written."""
        return self._digest.value()


def digest_of(part: Array | bytes) -> bytes:
    """Returns the digest of an array's bytes, in row-major order."""
    digest = Digest()
    digest.add(part)
    return digest.value()


def digest_of_range(path: Path, start: int, count: int) -> bytes:
    """Returns the digest of a range of a file, of which little is in memory at a time."""
    digest = Digest()
    with path.open("rb") as file:
        file.seek(start)
        while count and (piece := file.read(min(count, _CHUNK))):
            digest.add(piece)
            count -= len(piece)
    return digest.value()
