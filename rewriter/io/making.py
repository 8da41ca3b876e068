"""Performs planned writes: what a killed run wrote is reused, the rest computed, and each is noted in the journal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Self

from rewriter.errors import warn
from rewriter.io.journal import Identity, Journal, noted
from rewriter.io.replacing import sync
from rewriter.io.writes import Outcome, Piece, Write, make
from rewriter.memory import keep_freed

_FLUSHED = 1 << 26
"""Bytes that are written before they are sent to the disk: all at once in the end, everybody would wait for it."""


class Threads:
    """Performs writes in threads of this process."""

    def __init__(self, count: int) -> None:
        keep_freed()
        self._executor = ThreadPoolExecutor(max_workers=count)
        self._own = 2 * count

    def grouped(self, writes: Sequence[Write]) -> Iterator[Sequence[Write]]:
        """Yields all writes, those together that are begun together."""
        return ([write] for write in writes)

    def submit(self, writes: Sequence[Write], folder: Path) -> Future[list[Outcome]]:
        """Begins writes, one after the other."""
        return self._executor.submit(make, [write.task for write in writes], folder)

    def held(self, write: Write) -> int:
        """Returns the bytes that a write computes in this process."""
        return write.nbytes if write.is_computed else 0

    @property
    def at_once(self) -> int:
        """How many writes keep it busy now."""
        return self._own

    def digests(self, pieces: Sequence[Piece]) -> Iterator[bytes]:
        """Yields the digests of what is read now, in the order of the pieces."""
        return self._executor.map(Piece.digest, pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for what was begun, and begins nothing more."""
        self._executor.shutdown(cancel_futures=True)


def made(
    writes: Sequence[Write], folder: Path, identity: Identity | None, pool: Threads, *, memory: int
) -> Iterator[tuple[Write, Outcome]]:
    """Performs writes into data files that have their full size already; yields each with its outcome.

    Args:
        writes: all of them.
        folder: holds the data files, and the journal of a killed run of the same identity, if there was one.
        identity: what the run is of; without it no journal is kept.
        pool: what makes them.
        memory: bytes of computed tensors in flight in this process; one larger write is let through alone.
    """
    found = {} if identity is None else _found(writes, folder)
    journal = None if identity is None else Journal(folder, identity)
    try:
        for write, outcome in found.items():
            _tell(write, outcome)
            yield write, outcome
        left = [write for write in writes if write not in found]
        unflushed = 0
        for write, outcome in _carried_out(left, folder, pool, memory):
            _tell(write, outcome)
            unflushed += write.nbytes
            if unflushed >= _FLUSHED:
                for file in {place.file for place in write.ranges}:
                    sync(folder / file)
                unflushed = 0
            if journal is not None and write.is_computed:
                journal.add(write, outcome)
            yield write, outcome
    finally:
        if journal is not None:
            journal.close()


def _tell(write: Write, outcome: Outcome) -> None:
    """Hands the errors of weights that were quantized elsewhere, or earlier, to their jobs."""
    for job, measured in zip(write.jobs, outcome.measured, strict=True):
        if job.measured != measured:
            job.tell(measured)


def _found(writes: Sequence[Write], folder: Path) -> dict[Write, Outcome]:
    """Returns the writes that a journal notes and whose bytes are there."""
    known = noted(folder, writes)
    with ThreadPoolExecutor() as pool:
        lying = pool.map(lambda pair: pair[0].lies_in(folder, pair[1]), known.items())
        found = dict(pair for pair, lies in zip(known.items(), lying, strict=True) if lies)
    if known:
        there, asked = (sum(len(write.jobs) for write in some) for some in (found, writes))
        warn(f"went on where a killed run ended: {there:,} of {asked:,} weights were written")
    return found


def _carried_out(writes: Sequence[Write], folder: Path, pool: Threads, memory: int) -> Iterator[tuple[Write, Outcome]]:
    """Begins writes in their order; yields each as soon as it is made."""
    running: dict[Future[list[Outcome]], tuple[Sequence[Write], int]] = {}

    def done() -> Iterator[tuple[Write, Outcome]]:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            some, _ = running.pop(future)
            yield from zip(some, future.result(), strict=True)

    try:
        for some in pool.grouped(writes):
            size = min(sum(map(pool.held, some)), memory)
            while running and (len(running) >= pool.at_once or size + sum(h for _, h in running.values()) > memory):
                yield from done()
            running[pool.submit(some, folder)] = some, size
        while running:
            yield from done()
    finally:
        for future in running:
            future.cancel()
