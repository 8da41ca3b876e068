"""How much memory the machine has left for this process, and how what is freed and what stays is dealt with.

Imports nothing of this package and nothing heavy.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import resource
except ImportError:  # no such limits on Windows
    resource = None  # type: ignore[assignment]

_PROCESS = Path("/proc/self")
_GROUPS = Path("/sys/fs/cgroup")
_LEAST_ADDRESSES = 1 << 30
"""Bytes of addresses that compiling and threads take beside the libraries: with 700 MB some runs ended in aborts."""

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _KEPT = -3, -1, 1 << 25
"""Numbers of glibc's ``mallopt``, and the largest that it takes for the first: 32 MiB."""

_NO_LIMIT = 1 << 60
"""cgroup v1 says that there is no limit by a number about as large as this."""


def available() -> int | None:
    """Returns the bytes that this process may still take, or None where the system does not tell."""
    return min((left for left in (_free(), _within_limits(), *_within_groups()) if left is not None), default=None)


def ran_out(error: BaseException | None) -> bool:
    """Whether memory ran out, behind whatever an error was made of it.

    Python says so, or the system, or a thread cannot be started for want of a stack.
    """
    if error is None:
        return False
    no_thread = isinstance(error, RuntimeError) and error.args == ("can't start new thread",)
    if no_thread or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return ran_out(error.__cause__)


def keep_freed() -> None:
    """Keeps blocks of memory that are freed for the next ones of their size.

    glibc gives back what is free at the end, if it is twice the largest block that was freed: of a weight, its codes
    and its scales all, and the next weight has pages zeroed anew, which takes a tenth of the time of quantizing it. The
    workers of dask are started with MALLOC_TRIM_THRESHOLD_, after which every block of 128 kB or more is given back.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # not glibc
        for parameter in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            ctypes.CDLL(None).mallopt(parameter, _KEPT)


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Keeps Python's cycle collector from scanning what there is, again and again, while much else comes and goes."""
    if gc.get_freeze_count():  # by whoever calls, who decides for how long
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def require_addresses() -> None:
    """Raises MemoryError where ``ulimit -v`` leaves too little to compile kernels and to start threads.

    LLVM ends the process where it gets no memory, and Python waits forever for a thread that cannot be started.
    """
    if has_few_addresses():
        raise MemoryError


def has_few_addresses() -> bool:
    """Whether ``ulimit -v`` leaves too little to compile kernels and to start threads: what fails then may be it."""
    left = _within_limits()
    return left is not None and left < _LEAST_ADDRESSES


def remedy() -> str:
    """Returns what helps where memory ran out, in words."""
    if _within_limits() is not None:
        return "ulimit -v holds this process and the files it reads: raise it, or give --memory a smaller size"
    if any(left < (_free() or 0) for left in _within_groups()):
        return "the container or service has a limit: raise it, or give --memory a smaller size"
    return "give --memory a smaller size, or run on a larger machine"


def _free() -> int | None:
    """What the machine could give without swapping."""
    found = _fields(Path("/proc/meminfo")).get("MemAvailable")
    if found is None and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return found


def _within_limits() -> int | None:
    """What ``ulimit -v`` leaves."""
    if resource is None:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    return max(0, limit - _fields(_PROCESS / "status").get("VmSize", 0))


def _within_groups() -> Iterator[int]:
    """What the control groups of a container or a service leave, each that this process is in."""
    with contextlib.suppress(OSError):
        for line in (_PROCESS / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _left(_GROUPS, path, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                yield from _left(_GROUPS / "memory", path, *names)


def _left(root: Path, path: str, limit: str, used: str, cache: str) -> Iterator[int]:
    """What a group and those above it leave; in a container its own group is at the root."""
    folder = root / path.lstrip("/")
    for group in (folder, *folder.parents):
        most, now = _number(group / limit), _number(group / used)
        if most is not None and now is not None and most < _NO_LIMIT:
            yield max(0, most - now + _fields(group / "memory.stat").get(cache, 0))
        if group == root:
            return


def _number(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text())
    return None


def _fields(file: Path) -> dict[str, int]:
    """The numbers of a file of ``name: number kB`` or ``name number``."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            words = line.replace(":", " ").split()
            if len(words) > 1 and words[1].isdigit():
                found[words[0]] = int(words[1]) * (1024 if words[-1] == "kB" else 1)
    return found


def hold(most: int) -> None:
    """Lets this process take at most so many bytes more, where the system can hold it to that."""
    used = _fields(_PROCESS / "status").get("VmData")
    if resource is None or used is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = used + most
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(
            resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
