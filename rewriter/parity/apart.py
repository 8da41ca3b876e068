"""Calls into the process that runs models; it is started when first needed, and anew where something ended it."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from typing import Any

from rewriter.errors import RuntimeEndedError
from rewriter.parity import sessions
from rewriter.parity.worker import receive, send

START = 120.0
"""Seconds that a worker may take to start: machines may be very busy."""

_KEPT = 1 << 28
"""Bytes of shared memory that are kept from call to call."""

_DYING = 5.0
"""Seconds that one whose socket is closed may take to be gone."""

_REUSE = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 29)) | {"MALLOC_ARENA_MAX": "1"}
"""Has glibc keep up to so many bytes for the next model: to get them anew takes as long as to run some experts."""

_BOOT = (
    "import sys; sys.path[:] = sys.argv[3:]; from rewriter.parity.worker import main; main(*map(int, sys.argv[1:3]))"
)


class _Worker:
    """A process that answers calls."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair()
        self._shared = _anonymous_file()
        self._prepared: set[str] = set()
        with theirs:
            given = [theirs.fileno(), self._shared.fileno()]
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *map(str, given), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=given,
                env={**os.environ, **_REUSE},
            )

    def answer(self, call: str, arguments: tuple[Any, ...], timeout: float) -> tuple[bool, Any]:
        """Returns what the worker answers.

        Raises:
            EOFError, OSError: it ended.
            TimeoutError: it did not answer in time.
        """
        if not self._prepared:
            self._channel.settimeout(START)
            self._prepared.add(receive(self._channel))
        for runtime in {a.runtime for a in arguments if isinstance(a, sessions.Settings)} - self._prepared:
            self._ask("prepare", (runtime,), START)
            self._prepared.add(runtime)
        return self._ask(call, arguments, timeout)

    def _ask(self, call: str, arguments: tuple[Any, ...], timeout: float) -> tuple[bool, Any]:
        self._channel.settimeout(timeout)
        taken = send(self._channel, (call, arguments), self._shared.fileno())
        found: tuple[bool, Any] = receive(self._channel)
        if taken > _KEPT:
            self._shared.truncate(0)
        return found

    def end(self, patience: float = 0) -> int:
        """Ends the process, if it does not end by itself; returns its exit code, or the negative number of a signal."""
        self._channel.close()
        self._shared.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        self.process.kill()
        return self.process.wait()

    def abandon(self) -> None:
        """Lets go of a process that another one started."""
        self._channel.close()
        self._shared.close()
        self.process.returncode = 0


def _anonymous_file() -> io.FileIO:
    """A file without a name, in memory where the system has such: nothing of it outlives the two processes."""
    if hasattr(os, "memfd_create"):
        return io.FileIO(os.memfd_create("arrays"), "r+")
    with tempfile.TemporaryFile() as file:
        return io.FileIO(os.dup(file.fileno()), "r+")


_LOCK = threading.RLock()
_WORKERS: list[_Worker] = []
"""The one that runs, if any."""

_LATER: list[tuple[Any, ...]] = []


def start() -> None:
    """Starts the worker if there is none: it imports the runtime while the caller is busy with other things."""
    with _LOCK:
        if _WORKERS and _WORKERS[0].process.poll() is not None:  # ended by others while it had nothing to do
            _WORKERS.pop().end()
        if not _WORKERS and os.name == "posix" and sys.executable:
            with contextlib.suppress(OSError):  # no more processes: what there is to run is run in this one
                _WORKERS.append(_Worker())


def call(name: str, *arguments: Any, timeout: float) -> Any:
    """Calls a function of ``rewriter.parity.sessions`` in the worker, or here where none can be started.

    Args:
        name: of the function.
        arguments: plain data, arrays and settings.
        timeout: seconds that it may take.

    Raises:
        RuntimeEndedError: it crashed, took longer, or needs more memory than there is.
        RewriterError: as the function says.
    """
    with _LOCK:
        start()
        for forgotten in _LATER[:]:
            _LATER.remove(forgotten)
            call(*forgotten, timeout=timeout)
        if not _WORKERS:
            return getattr(sessions, name)(*arguments)
        worker = _WORKERS[0]
        try:
            done, found = worker.answer(name, arguments, timeout)
        except TimeoutError:
            _WORKERS.clear()
            worker.end()
            raise RuntimeEndedError(f"the runtime did not come to an end in {timeout:g} s") from None
        except (EOFError, OSError):
            _WORKERS.clear()
            raise RuntimeEndedError(f"the runtime {_cause(worker.end(_DYING))}") from None
        except BaseException:  # Ctrl-C among them: an answer that comes later would be taken for the next call's
            _WORKERS.clear()
            worker.end()
            raise
    if not done:
        raise found
    return found


def later(name: str, *arguments: Any) -> None:
    """Calls a function just before the next call: a finalizer may run within one, and must not begin another."""
    _LATER.append((name, *arguments))


def _cause(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    if code == -signal.SIGKILL:
        return "was killed, perhaps for want of memory"
    return f"crashed ({signal.Signals(-code).name})"


@atexit.register
def _end() -> None:
    with _LOCK:
        while _WORKERS:
            _WORKERS.pop().end()


def _forget() -> None:
    """A process that was forked from this one has a worker of its own, or none."""
    while _WORKERS:
        _WORKERS.pop().abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
