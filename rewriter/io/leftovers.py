"""What runs that were killed left beside their output: told from runs that go on by a lock, finished or removed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from rewriter.errors import UsageError, warn
from rewriter.io.journal import identity_of
from rewriter.io.replacing import JOURNAL, PARTIAL, READY, finish
from rewriter.text import nbytes

try:
    import fcntl
except ImportError:  # Windows: leftovers of a killed run stay, since nothing tells them from a run that goes on
    fcntl = None  # type: ignore[assignment]

_NO_LOCK = -1
_HELD = (errno.EWOULDBLOCK, errno.EACCES)


class HeldError(Exception):
    """Another run holds the lock."""


def staging(directory: Path, name: str, leftover: Path | None) -> tuple[Path, int]:
    """Makes and locks a hidden folder ``.<name>.partial-<pid>`` in a directory.

    Args:
        directory: where the output goes, or will lie.
        name: of the output.
        leftover: the folder of a killed run, which becomes this one's.

    Returns:
        The folder and what :func:`unlock` takes.
    """
    for attempt in range(1000):
        folder = directory / f".{name}.{PARTIAL}-{os.getpid()}{f'-{attempt}' if attempt else ''}"
        try:
            if leftover is None:
                folder.mkdir()
            elif folder != leftover:
                if folder.exists():
                    continue
                leftover.rename(folder)
                leftover = folder
            lock = _lock(folder)
        except (FileExistsError, HeldError):
            continue
        if folder.exists():  # not taken for a leftover between the two
            return folder, lock
        unlock(lock)
    raise UsageError(f"too many runs write '{directory / name}' at once")


def unlock(lock: int) -> None:
    """Releases a lock."""
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


def settle(directory: Path, name: str | None, *, resume: bool) -> tuple[Path, ...]:
    """Cleans up what killed runs left in a place: a replacement that was complete is finished, the rest removed.

    Args:
        directory: where a model is to be written; it need not be there.
        name: the model's file name; None for every model in the directory.
        resume: whether folders with a journal stay.

    Returns:
        The folders that stay, the one with the newest journal first.

    Raises:
        UsageError: a run writes there now, or a replacement can no longer be finished.
    """
    kept: list[Path] = []
    if fcntl is None:
        if resume:
            raise UsageError("a killed run cannot be told from one that goes on here, so none is resumed; begin anew")
        return ()
    for folder in [*_left(directory.parent, directory.name), *_left(directory, name)]:
        try:
            lock = _lock(folder)
        except HeldError:
            pid = folder.name.rpartition("-")[2]
            raise UsageError(
                f"another run (process {pid}) is writing '{directory}' now; wait for it, or choose another place"
            ) from None
        try:
            if resume and identity_of(folder):
                kept.append(folder)
            else:
                _clear(folder, directory)
        finally:
            unlock(lock)
    return tuple(sorted(kept, key=lambda folder: -(folder / JOURNAL).stat().st_mtime_ns))


def _clear(folder: Path, directory: Path) -> None:
    if not folder.is_dir():  # another run was faster
        return
    if f".{READY}-" in folder.name:
        with alone(directory):
            model = finish(folder, directory)
        warn(f"finished what a killed run had ready: '{model}' is the new model")
        return
    size = taken(folder)
    hint = "; --resume, in Python resume=True, would have gone on with it" if identity_of(folder) else ""
    shutil.rmtree(folder, ignore_errors=True)
    warn(f"removed what a killed run left: '{folder}' ({nbytes(size)}){hint}")


def taken(folder: Path) -> int:
    """Returns the bytes that the files of a folder take: data files have their full size before they are filled."""
    found = (file.lstat() for file in folder.rglob("*") if not file.is_dir())
    return sum(min(file.st_size, getattr(file, "st_blocks", file.st_size) * 512) for file in found)


def is_of(folder: Path, name: str | None) -> bool:
    """Whether a folder has the name of one that a run fills which writes ``name``, or any model where that is None."""
    wanted = ".+" if name is None else re.escape(name)
    return re.fullmatch(rf"\.{wanted}\.({PARTIAL}|{READY})-\d+(-\d+)?", folder.name) is not None


def _left(directory: Path, name: str | None) -> list[Path]:
    """The folders of runs, killed or not, that write ``name`` into a directory."""
    try:
        return sorted(path for path in directory.iterdir() if is_of(path, name) and path.is_dir())
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
