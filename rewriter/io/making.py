"""Planned writes are made: those that a killed run made are found, the rest computed, each noted in the journal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rewriter.errors import warn
from rewriter.io.journal import Identity, Journal, noted
from rewriter.io.writes import Outcome, Write, carry_out


def made(
    writes: Sequence[Write], folder: Path, identity: Identity | None, *, workers: int, memory: int
) -> Iterator[tuple[Write, Outcome]]:
    """Makes writes into data files that are there in their full size; yields each with its outcome.

    Args:
        writes: all of them.
        folder: holds the data files, and the journal of a killed run of the same identity, if there was one.
        identity: what the run is of; without it no journal is kept.
        workers: threads.
        memory: bytes of computed tensors in flight.
    """
    pool = ThreadPoolExecutor(max_workers=workers)
    journal = None
    try:
        found: dict[Write, Outcome] = {}
        if identity is not None:
            found = _found(writes, folder, pool)
            journal = Journal(folder, identity)
        yield from found.items()
        left = [write for write in writes if write not in found]
        for write, outcome in carry_out(left, folder, pool, at_once=2 * workers, memory=memory):
            if journal is not None and write.is_computed:
                journal.add(write, outcome)
            yield write, outcome
    finally:
        pool.shutdown(cancel_futures=True)
        if journal is not None:
            journal.close()


def _found(writes: Sequence[Write], folder: Path, pool: ThreadPoolExecutor) -> dict[Write, Outcome]:
    """Returns the writes that a journal notes and whose bytes are there, and tells their weights of it."""
    known = noted(folder, writes)
    there = pool.map(lambda pair: pair[0].lies_in(folder, pair[1]), known.items())
    found = dict(pair for pair, lies in zip(known.items(), there, strict=True) if lies)
    for write, outcome in found.items():
        for job, measured in zip(write.jobs, outcome.measured, strict=True):
            job.tell(measured)
    computed = sum(write.is_computed for write in writes)
    if known:
        warn(f"went on where a killed run ended: {len(found):,} of {computed:,} weights were written")
    return found
