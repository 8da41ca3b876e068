"""The workers of a dask cluster read the input, write their own part of the output, and read back what all wrote.

What is sent says where a weight lies, how it is quantized and where it goes; what comes back are digests and errors. No
byte of a weight travels: workers see the files of the input and of the output where this process sees them.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from rewriter.errors import UsageError, to_install, warn
from rewriter.io.identity import code
from rewriter.io.making import Threads
from rewriter.io.writes import Outcome, Piece, Range, Write, make, work
from rewriter.memory import keep_freed
from rewriter.process import limit_processors
from rewriter.quantize import ALGORITHMS, WeightContext, WeightSpec, relative_rms
from rewriter.tensors import MappedTensor, ViewTensor

if TYPE_CHECKING:
    from distributed import Client

TIMEOUT = 10
"""Seconds in which a scheduler answers."""

SOON = 1.0
"""Seconds after which the scheduler is asked anew what workers there are."""

TOGETHER = 1 << 27
"""Numbers that a worker's thread quantizes in about a second."""

ROUNDS = 8
"""Jobs for each thread of a worker, if there is less to do than jobs of a second: so that all end at about one time."""

BYTES = 8
"""Bytes that are copied, or read back, in the time in which one number is quantized."""

_T = TypeVar("_T")


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Client | None]:
    """Connects to the scheduler of a cluster as long as the block runs; its workers import and compile meanwhile.

    Args:
        address: ``tcp://host:8786``, or the file that ``dask scheduler --scheduler-file`` wrote; None for no cluster.

    Raises:
        UsageError: dask is not installed, or no scheduler answers.
    """
    if address is None:
        yield None
        return
    try:
        from distributed import Client  # noqa: PLC0415 -- an extra
    except ImportError as error:
        raise UsageError(f"a cluster needs dask: {to_install('cluster')}") from error
    try:
        where = {"scheduler_file": address} if Path(address).is_file() else {"address": address}
        client = Client(**where, timeout=TIMEOUT)  # type: ignore[no-untyped-call]  # dask's
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no dask scheduler answers at '{address}'; give its address, as tcp://host:8786, or its scheduler file"
        ) from error
    with client:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        begun = [client.submit(warm, workers=[worker], pure=False) for worker in workers]
        yield client
        del begun  # dask forgets what nobody asks for any more


class Cluster(Threads):
    """The workers of a cluster for what lies in data files; threads of this process for all else."""

    def __init__(self, client: Client, threads: int) -> None:
        super().__init__(threads)
        self._client = client
        self._abroad = client.get_executor(pure=False)  # type: ignore[no-untyped-call]  # dask's
        self._going: set[Write] = set()
        self._wanted, self._asked = 0, -SOON

    def grouped(self, writes: Sequence[Write]) -> Iterator[Sequence[Write]]:
        """Yields the writes in batches that are submitted together: about a second's work for a worker.

        The largest are begun first: one that were begun last would keep one worker when all others have done.
        """
        self._going = set(filter(_goes, writes))
        stay = [write for write in writes if write not in self._going]
        if kept := next((job for write in stay for job in write.jobs), None):
            warn(
                f"weight '{kept.context.weight}' and others lie in the model file itself, so they are quantized here;"
                " workers read weights from data files, as rewriter apply writes them"
            )
        going = sorted((write for write in writes if write in self._going), key=_work, reverse=True)
        yield from self._shared_out(going, _work)
        yield from super().grouped(stay)

    def submit(self, writes: Sequence[Write], folder: Path) -> Future[list[Outcome]]:
        """Begins writes, one after the other."""
        if writes[0] in self._going:
            return self._sent(functools.partial(make, [write.task for write in writes], folder.absolute()))
        return super().submit(writes, folder)

    def held(self, write: Write) -> int:
        """Returns the bytes that a write computes in this process."""
        return 0 if write in self._going else super().held(write)

    def digests(self, pieces: Sequence[Piece]) -> Iterator[bytes]:
        """Yields the digests of what is stored, in the order of the pieces; workers read what lies in files."""
        places = [piece.lies for piece in pieces]
        here = super().digests([piece for piece, place in zip(pieces, places, strict=True) if place is None])
        groups = self._shared_out([place for place in places if place is not None], lambda place: place.length // BYTES)
        begun = [self._sent(functools.partial(_read, group)) for group in groups]
        there = (digest for future in begun for digest in future.result())
        return (next(here if place is None else there) for place in places)

    @property
    def at_once(self) -> int:
        """How many jobs keep it busy now."""
        return self._own + 2 * self._threads

    @property
    def _threads(self) -> int:
        """How many threads the workers have now: these may come and go."""
        if time.monotonic() >= self._asked + SOON:  # as often as for each job, it takes the time of a job
            workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
            self._wanted = sum(int(worker["nthreads"]) for worker in workers)
            self._asked = time.monotonic()
        return self._wanted

    def _shared_out(self, items: Sequence[_T], takes: Callable[[_T], int]) -> Iterator[list[_T]]:
        """Yields batches of items that take a worker about a second, or less where some would have nothing to do."""
        most = min(TOGETHER, sum(map(takes, items)) // (ROUNDS * max(1, self._threads)))
        some, taken = [], 0
        for item in items:
            some.append(item)
            taken += takes(item)
            if taken >= most:
                yield some
                some, taken = [], 0
        if some:
            yield some

    def _sent(self, job: Callable[[], list[_T]]) -> Future[list[_T]]:
        future: Future[list[_T]] = self._abroad.submit(perform, job, code())
        return future

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancels what is running; a failure of the cluster is raised as one line."""
        self._abroad.shutdown(wait=error is None)
        super().__exit__(kind, error, trace)
        if kind is not None and kind.__name__ == "KilledWorker":
            raise UsageError(
                f"every worker that was given one of the weights died ({error}); they may have too little memory: give"
                " each fewer threads, or more memory"
            ) from error
        if isinstance(error, CancelledError):
            raise UsageError("the cluster's scheduler is gone; start it, and go on with --resume") from error


def _goes(write: Write) -> bool:
    """Whether a worker can do a write from files alone."""
    tensor = write.pieces[0].tensor
    if write.jobs:
        sources = [leaf.source for job in write.jobs for leaf in job.weight.leaves]
    else:
        sources = [leaf.source for leaf in tensor.view.leaves] if isinstance(tensor, ViewTensor) else [tensor]
    return all(isinstance(source, MappedTensor) for source in sources)


def _work(write: Write) -> int:
    """The cost of a write, as the number of elements that are quantized in the same time."""
    return sum(map(work, write.jobs)) or write.nbytes // BYTES


def _read(places: Iterable[Range]) -> list[bytes]:
    return [place.digest(Path()) for place in places]


def warm() -> None:
    """Imports and compiles what quantizes weights, so that no job waits for that."""
    weight = np.resize(np.arange(-8, 8, dtype=np.float16), (64, 256))
    for name, quantize in ALGORITHMS.items():
        context = WeightContext(WeightSpec(name), weight.dtype)
        relative_rms(weight, quantize(weight, context))


def perform(job: Callable[[], _T], version: str) -> _T:
    """Does a job, on a worker, with as many processors as it has threads.

    Raises:
        UsageError: the worker runs another version, or does not see the files.
    """
    from distributed import get_worker  # noqa: PLC0415 -- an extra

    worker = get_worker()
    if code() != version:
        raise UsageError(f"worker {worker.address} runs {code()}, and this process {version}; install the same")
    limit_processors(worker.state.nthreads)
    keep_freed()
    try:
        return job()
    except OSError as error:
        raise UsageError(
            f"worker {worker.address} cannot read the input or write the output ({error}); both must lie on a file"
            " system that all machines see under one path"
        ) from error
