"""What runs that were killed left beside their output: told from runs that go on by a lock, finished or removed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from rewriter.errors import RewriterWarning, UsageError
from rewriter.io.replacing import PARTIAL, READY, finish
from rewriter.text import nbytes

try:
    import fcntl
except ImportError:  # Windows: leftovers of a killed run stay, since nothing tells them from a run that goes on
    fcntl = None  # type: ignore[assignment]

_NO_LOCK = -1
_HELD = (errno.EWOULDBLOCK, errno.EACCES)


class HeldError(Exception):
    """Another run holds the lock."""


def staging(directory: Path, name: str) -> tuple[Path, int]:
    """Makes and locks a hidden folder ``.<name>.partial-<pid>`` in a directory.

    Returns:
        The folder and what :func:`unlock` takes.
    """
    for attempt in range(1000):
        folder = directory / f".{name}.{PARTIAL}-{os.getpid()}{f'-{attempt}' if attempt else ''}"
        try:
            folder.mkdir()
            lock = _lock(folder)
        except (FileExistsError, HeldError):
            continue
        if folder.exists():  # not taken for a leftover between the two
            return folder, lock
        unlock(lock)
    raise UsageError(f"too many runs write '{directory / name}' at once")


def unlock(lock: int) -> None:
    """Gives a lock back."""
    if lock != _NO_LOCK:
        os.close(lock)


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Waits until no other run replaces files in a directory."""
    lock = _lock(directory, wait=True)
    try:
        yield
    finally:
        unlock(lock)


def settle(directory: Path, name: str | None) -> None:
    """Clears a place of what killed runs left there: a replacement that was complete is finished, the rest removed.

    Args:
        directory: where a model is to be written; it need not be there.
        name: the model's file name; None for every model in the directory.

    Raises:
        UsageError: a run writes there now, or a replacement can no longer be finished.
    """
    if fcntl is None:
        return
    for folder in [*_left(directory.parent, directory.name), *_left(directory, name)]:
        try:
            lock = _lock(folder)
        except HeldError:
            pid = folder.name.rpartition("-")[2]
            raise UsageError(
                f"another run (process {pid}) is writing '{directory}' now; wait for it, or choose another place"
            ) from None
        try:
            _clear(folder, directory)
        finally:
            unlock(lock)


def _clear(folder: Path, directory: Path) -> None:
    if not folder.is_dir():  # another run was faster
        return
    if f".{READY}-" in folder.name:
        with alone(directory):
            model = finish(folder, directory)
        _warn(f"finished what a killed run had ready: '{model}' is the new model")
        return
    size = sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())
    shutil.rmtree(folder, ignore_errors=True)
    _warn(f"removed what a killed run left: '{folder}' ({nbytes(size)})")


def _warn(message: str) -> None:
    warnings.warn(message, RewriterWarning, stacklevel=2)


def _left(directory: Path, name: str | None) -> list[Path]:
    """The folders of runs, killed or not, that write ``name`` into a directory."""
    wanted = ".+" if name is None else re.escape(name)
    hidden = re.compile(rf"\.{wanted}\.({PARTIAL}|{READY})-\d+(-\d+)?")
    try:
        return sorted(path for path in directory.iterdir() if hidden.fullmatch(path.name) and path.is_dir())
    except OSError:  # not there, or not to be read: nothing that could be cleared
        return []


def _lock(directory: Path, *, wait: bool = False) -> int:
    """Locks a directory.

    Returns:
        What :func:`unlock` takes; where the file system has no locks, nothing is locked.

    Raises:
        HeldError: another run holds it.
    """
    if fcntl is None:
        return _NO_LOCK
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return _NO_LOCK
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(descriptor)
        if error.errno in _HELD:
            raise HeldError from None
        return _NO_LOCK
    return descriptor
