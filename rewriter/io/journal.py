"""The journal of a run: which planned writes are made, so that a run that was killed can be gone on with.

It lies in the hidden folder beside what is written, one JSON object a line: first what the run was of, then each write
with the digests of its bytes. A line follows its bytes, and is believed only where the bytes have these digests: a
line that is cut, or whose bytes never reached the disk, is as good as none. So nothing waits for the disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewriter.errors import UsageError
from rewriter.io.replacing import JOURNAL
from rewriter.io.writes import Outcome, Write
from rewriter.quantize.measured import Measured

Identity = Mapping[str, str]
"""What a run is of -> its value: of two runs of one identity each weight has the same bytes."""


class Journal:
    """Takes down what is written into a folder."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        """Begins the journal of a folder, or goes on with the one that is there."""
        file = folder / JOURNAL
        begun = file.exists()
        self._file = file.open("ab")
        # After a line that was cut, the next one must not become a part of it.
        self._append("" if begun else json.dumps({"of": dict(identity)}))

    def add(self, write: Write, outcome: Outcome) -> None:
        """Notes a write whose bytes are in their files."""
        digests = [digest.hex() for digest in outcome.digests]
        entry = {"write": _key(write), "digests": digests, "measured": [vars(found) for found in outcome.measured]}
        self._append(json.dumps(entry))

    def _append(self, line: str) -> None:
        self._file.write(f"{line}\n".encode())
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def require_same(folder: Path, identity: Identity) -> None:
    """Refuses to resume a killed run whose identity is not this run's.

    Raises:
        UsageError: names the first difference.
    """
    before = identity_of(folder)
    for what in {**identity, **before}:
        then, now = (known.get(what, "none") for known in (before, identity))
        if then != now:
            raise UsageError(
                f"'{folder}' was left by a run with another {what} ({then}, now {now}); give what that run was given,"
                " or leave out --resume to begin anew, which removes it"
            )


def identity_of(folder: Path) -> Identity:
    """Returns the identity of the run that left a folder; empty where it cannot be read."""
    known = next(iter(_lines(folder)), {}).get("of")
    return {str(key): str(value) for key, value in known.items()} if isinstance(known, dict) else {}


def noted(folder: Path, writes: Sequence[Write]) -> dict[Write, Outcome]:
    """Returns the writes that a journal notes, at the same places, whether or not their bytes are there."""
    found = {}
    for line in _lines(folder)[1:]:
        try:
            measured = tuple(Measured(**entry) for entry in line["measured"])
            found[json.dumps(line["write"])] = Outcome(tuple(map(bytes.fromhex, line["digests"])), measured)
        except (KeyError, TypeError, ValueError):
            continue
    keys = {write: json.dumps(_key(write)) for write in writes}
    return {write: found[key] for write, key in keys.items() if key in found}


def _key(write: Write) -> list[Any]:
    places = zip(write.pieces, write.ranges, strict=True)
    return [[piece.tensor.name, place.file, place.offset, place.length] for piece, place in places]


def _lines(folder: Path) -> list[dict[str, Any]]:
    found = []
    try:
        with (folder / JOURNAL).open("rb") as file:
            for line in file:
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    continue
                if isinstance(entry, dict):
                    found.append(entry)
    except OSError:
        return []
    return found
