"""Digests of bytes as they stream by, so that what a file holds can be held to what was computed for it.

They are CRC-32, as archives and file systems have them: what they are to find are accidents. Every byte is digested
twice, as it is written and as it is read back, which with SHA-256 took as long as rounding to nearest does.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from rewriter.tensors.view import Array

_CHUNK = 1 << 18
"""Bytes of a file that are read at a time: they stay in a core's own cache."""


class Digest:
    """Takes bytes in any number of pieces; equal bytes give equal digests."""

    def __init__(self) -> None:
        self._so_far = 0

    def add(self, part: Array | bytes | memoryview) -> None:
        """Takes more bytes: an array's in row-major order."""
        if isinstance(part, np.ndarray):
            part = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        self._so_far = zlib.crc32(part, self._so_far)

    def value(self) -> bytes:
        """Returns the digest of all that was taken so far."""
        return self._so_far.to_bytes(4, "little")


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
    digest, buffer = Digest(), memoryview(bytearray(min(count, _CHUNK)))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while count and (read := file.readinto(buffer[:count])):
            digest.add(buffer[:read])
            count -= read
    return digest.value()
