"""Weights are quantized by the workers of a dask cluster, which read the input and write their own part of the output.

What is sent says where a weight lies, how it is quantized and where it goes; what comes back are digests and errors. No
byte of a weight travels: workers see the files of the input and of the output where this process sees them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rewriter.errors import UsageError, warn
from rewriter.io.identity import code
from rewriter.io.making import Threads
from rewriter.io.writes import Outcome, QuantizeTask, Task, Write
from rewriter.memory import keep_freed
from rewriter.process import limit_processors
from rewriter.tensors import MappedTensor

if TYPE_CHECKING:
    from distributed import Client

EXTRA = 'pip install "onnx-moe-rewriter[cluster]"'

TIMEOUT = 10
"""Seconds in which a scheduler answers."""

SOON = 1.0
"""Seconds after which the scheduler is asked anew what workers there are."""


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Client | None]:
    """Connects to the scheduler of a cluster as long as the block runs.

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
        raise UsageError(f"a cluster needs dask: {EXTRA}") from error
    try:
        where = {"scheduler_file": address} if Path(address).is_file() else {"address": address}
        client = Client(**where, timeout=TIMEOUT)  # type: ignore[no-untyped-call]  # dask's
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no dask scheduler answers at '{address}'; give its address, as tcp://host:8786, or its scheduler file"
        ) from error
    with client:
        yield client


class Cluster(Threads):
    """The workers of a cluster for weights in data files; threads of this process for all else."""

    def __init__(self, client: Client, threads: int) -> None:
        super().__init__(threads)
        self._client = client
        self._abroad = client.get_executor(pure=False)  # type: ignore[no-untyped-call]  # dask's
        self._stays = False
        self._wanted, self._asked = 0, -SOON

    def submit(self, write: Write, folder: Path) -> Future[Outcome]:
        """Begins a write."""
        if self._goes(write):
            future: Future[Outcome] = self._abroad.submit(perform, write.task, folder.absolute(), code())
            return future
        if write.jobs and not self._stays:
            self._stays = True
            warn(
                f"weight '{write.jobs[0].context.weight}' and others lie in the model file itself, so they are"
                " quantized here; workers read weights from data files, as rewriter apply writes them"
            )
        return super().submit(write, folder)

    def held(self, write: Write) -> int:
        """Returns the bytes that a write computes in this process."""
        return 0 if self._goes(write) else super().held(write)

    @property
    def at_once(self) -> int:
        """How many writes keep it busy now: workers may come and go."""
        if time.monotonic() >= self._asked + SOON:  # as often as for each write, it takes the time of a write
            workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
            self._wanted = 2 * sum(int(worker["nthreads"]) for worker in workers)
            self._asked = time.monotonic()
        return self._own + self._wanted

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends what was begun, in one line where the cluster is what failed."""
        self._abroad.shutdown(wait=error is None)
        super().__exit__(kind, error, trace)
        if kind is not None and kind.__name__ == "KilledWorker":
            raise UsageError(
                f"every worker that was given one of the weights died ({error}); they may have too little memory: give"
                " each fewer threads, or more memory"
            ) from error
        if isinstance(error, CancelledError):
            raise UsageError("the cluster's scheduler is gone; start it, and go on with --resume") from error

    def _goes(self, write: Write) -> bool:
        leaves = (leaf for job in write.jobs for leaf in job.weight.leaves)
        return isinstance(write.task, QuantizeTask) and all(isinstance(leaf.source, MappedTensor) for leaf in leaves)


def perform(task: Task, folder: Path, version: str) -> Outcome:
    """Makes a write, on a worker, with as many processors as it has threads.

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
        return task(folder)
    except OSError as error:
        raise UsageError(
            f"worker {worker.address} cannot read the input or write the output ({error}); both must lie on a file"
            " system that all machines see under one path"
        ) from error
