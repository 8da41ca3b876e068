"""A directory that appears complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from rewriter.errors import UsageError
from rewriter.text import nbytes

try:
    import fcntl
except ImportError:  # Windows: leftovers of a killed run stay, since nothing tells them from a run that goes on
    fcntl = None  # type: ignore[assignment]

_NO_LOCK = -1
_REFUSED = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the disk quota is used up",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "a part of the path is a file",
    errno.ENAMETOOLONG: "the name is too long",
}


@contextlib.contextmanager
def complete_directory(
    target: Path, *, overwrite: bool = False, keep: Iterable[Path] = (), needed: int = 0
) -> Iterator[Path]:
    """Gives a directory to fill, beside ``target``, and renames it to ``target`` when the block ends well.

    The directory is ``.<name>.partial-<pid>`` and locked while it is filled, so that the next run for the same target
    removes what a killed run left, and nothing else.

    Args:
        target: what will appear. An empty directory may stand there.
        overwrite: whether a directory with a model in it may stand there; it is swapped out and deleted after.
        keep: paths that must not be in ``target``: the inputs.
        needed: bytes that will be written, to refuse at once what cannot fit.

    Raises:
        UsageError: an existing target, a target that holds an input, no permission, no space.
    """
    refuse(target, overwrite=overwrite, keep=keep)
    target = Path(os.path.realpath(target))
    made = [p for p in (target.parent, *target.parent.parents) if not p.exists()]
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target)
        free = shutil.disk_usage(target.parent).free
        if needed > free:
            raise UsageError(
                f"cannot write '{target}': it takes {nbytes(needed)} and {nbytes(free)} are free; free some"
                " space or choose another place"
            )
        partial, lock = _create(target)
        try:
            yield partial
            _swap(partial, target)
        finally:
            _unlock(lock)
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for directory in made:
            with contextlib.suppress(OSError):
                directory.rmdir()
        if isinstance(error, OSError) and error.errno in _REFUSED:
            raise _refused(target, error) from error
        raise


def refuse(target: Path, *, overwrite: bool, keep: Iterable[Path] = ()) -> None:
    """Refuses a directory that may not be written, at once; writes nothing.

    Raises:
        UsageError: as ``complete_directory``, but for permissions and space.
    """
    try:
        _refuse(Path(os.path.realpath(target)), overwrite=overwrite, keep=keep)
    except OSError as error:
        raise _refused(target, error) from error


def _refused(target: Path, error: OSError) -> UsageError:
    why = _REFUSED.get(error.errno or 0, error.strerror)
    return UsageError(f"cannot write '{target}': {why}; choose another place")


def _refuse(target: Path, *, overwrite: bool, keep: Iterable[Path]) -> None:
    for path in keep:
        if Path(os.path.realpath(path)).is_relative_to(target):
            raise UsageError(f"the output '{target}' holds the input '{path}', which is never written; choose another")
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"the output '{target}' is a file; give a directory")
    if Path.cwd().is_relative_to(target):
        raise UsageError(f"the output '{target}' is, or holds, the working directory; choose another")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"the output '{target}' exists; choose another or allow it to be overwritten (--overwrite)")
    if not any(p.suffix == ".onnx" for p in target.iterdir()):
        raise UsageError(f"the output '{target}' exists and holds no .onnx file, so it is not overwritten; remove it")


def _create(target: Path) -> tuple[Path, int]:
    """Makes and locks the directory to fill."""
    for attempt in range(1000):
        partial = target.parent / f".{target.name}.partial-{os.getpid()}{f'-{attempt}' if attempt else ''}"
        try:
            partial.mkdir()
        except FileExistsError:
            continue
        lock = _lock(partial)
        if lock is not None and partial.exists():
            return partial, lock
    raise UsageError(f"too many runs write '{target}' at once")


def _lock(directory: Path) -> int | None:
    """Locks a directory; returns the descriptor that holds the lock, or None where another run holds it."""
    if fcntl is None:
        return _NO_LOCK
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None and lock != _NO_LOCK:
        os.close(lock)


def _clean(target: Path) -> None:
    """Removes what killed runs left; puts a target back that one had moved aside and not yet replaced."""
    if fcntl is None:
        return
    for leftover in sorted(target.parent.glob(f".{_escape(target.name)}.partial-*")):
        lock = _lock(leftover)
        if lock is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            _unlock(lock)
    for old in sorted(target.parent.glob(f".{_escape(target.name)}.old-*")):
        lock = _lock(old)
        if lock is None:
            continue
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
        _unlock(lock)


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _swap(partial: Path, target: Path) -> None:
    """Puts the filled directory in place of what is there."""
    if not target.exists():
        partial.rename(target)
    elif not any(target.iterdir()):
        target.rmdir()
        partial.rename(target)
    else:
        old = target.parent / f".{target.name}.old-{partial.name.rpartition('.partial-')[2]}"
        lock = _lock(target)
        target.rename(old)
        try:
            partial.rename(target)
        except BaseException:
            old.rename(target)
            raise
        finally:
            _unlock(lock)
        shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def _sync(directory: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
