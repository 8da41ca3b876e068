"""Where a model is to be written, looked at before any work is done: what could not end well is refused at once."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rewriter.errors import UsageError
from rewriter.io.leftovers import is_of, settle
from rewriter.io.replacing import Identity, listing
from rewriter.text import nbytes

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

_REFUSED = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than is allowed there, so give a maximal shard size (--max-shard-size 2GB)",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "a part of the path is a file",
    errno.ENOENT: "its directory was removed meanwhile",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its links go round in a circle",
    errno.EIO: "the device reports an error",
}


@dataclass(frozen=True)
class Place:
    """A directory for a model, as it was when it was first looked at.

    Attributes:
        given: the directory, as it was given.
        directory: the same, absolute and with its links resolved.
        name: the model's file name; None for that of the source.
        before: what lay there; None where there was no such directory.
        resume: whether a run that was killed is gone on with, and what this one writes is kept where it is interrupted.
        leftovers: the folders that killed runs left there, with their journals; none unless ``resume``.
    """

    given: Path
    directory: Path
    name: str | None
    before: Mapping[str, Identity] | None
    resume: bool = False
    leftovers: tuple[Path, ...] = ()

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        keep: Iterable[str | os.PathLike[str]] = (),
        resume: bool = False,
    ) -> Place:
        """Examines a place; what killed runs left there is finished, kept to be resumed, or removed.

        Args:
            path: the directory, or ``directory/name.onnx``.
            overwrite: whether files of the same names there may be replaced.
            keep: the inputs, which must not lie there.
            resume: whether a run that was killed is gone on with.

        Raises:
            UsageError: it is a file, holds an input, or something that may not be overwritten, or cannot be written.
        """
        given = Path(path)
        if "\0" in str(given):
            raise UsageError(f"the output {str(given)!r} has a NUL in its name; choose another")
        try:
            named = given.suffix == ".onnx" and not given.is_dir()
            folder, name = (given.parent, given.name) if named else (given, None)
            directory = Path(os.path.realpath(folder))
            found = cls(folder, directory, name, None)
            found.require_without(keep)
            leftovers = settle(directory, name, resume=resume)
            return replace(found, before=_looked_at(directory, overwrite), resume=resume, leftovers=leftovers)
        except OSError as error:
            raise refused(given, error) from error

    def hidden(self, name: str) -> tuple[Path, str]:
        """Returns where the folder lies that a run fills, and what its name is made of; ``name`` is the model's."""
        if self.before is None:
            return self.directory.parent, self.directory.name
        return self.directory, name

    def leftover(self, name: str) -> Path | None:
        """Returns the folder that a killed run left that wrote the model ``name`` here; None where there is none."""
        above, label = self.hidden(name)
        ours = (path for path in self.leftovers if path.parent == above and is_of(path, label))
        return next((path for path in ours if path.is_dir()), None)

    def require_without(self, inputs: Iterable[str | os.PathLike[str]], written: Iterable[str] = ()) -> None:
        """Refuses a directory that holds an input, but where the output has a file name of its own beside it.

        Args:
            inputs: files that are read, or directories.
            written: names of the files of the output, as far as they are known; the model's own is.

        Raises:
            UsageError: names the input.
        """
        names = {name.casefold() for name in (*written, self.name) if name}
        for path in inputs:
            real = Path(os.path.realpath(path))
            beside = self.name is not None and not real.is_dir() and real.name.casefold() not in names
            if real.is_relative_to(self.directory) and not beside:
                raise UsageError(
                    f"the output '{self.directory}' holds the input '{os.fspath(path)}', which is never written;"
                    " choose another, or a file name of its own (-o DIRECTORY/NAME.onnx, and --data-name)"
                )

    def require_room(self, needed: int, largest: int) -> None:
        """Refuses what cannot be written there.

        Args:
            needed: bytes of all files.
            largest: bytes of the largest file.

        Raises:
            UsageError: says what is missing.
        """
        there = _existing(self.directory)
        if needed > (free := shutil.disk_usage(there).free):
            raise UsageError(
                f"cannot write '{self.directory}': it takes {nbytes(needed)} and {nbytes(free)} are free; free some"
                " space or choose another place"
            )
        if (most := _largest_file(there)) is not None and largest > most:
            raise UsageError(
                f"cannot write '{self.directory}': a data file takes {nbytes(largest)}, and no file there may take"
                f" more than {nbytes(most)}; give --max-shard-size a smaller size, or choose another place"
            )


def refused(place: Path, error: OSError) -> UsageError:
    """Returns the error for a place that the system does not allow to be written."""
    why = _REFUSED.get(error.errno or 0, error.strerror)
    return UsageError(f"cannot write '{place}': {why}; choose another place")


def is_refusal(error: BaseException) -> bool:
    """Whether an error is about the place."""
    return isinstance(error, OSError) and error.errno in _REFUSED


def _looked_at(directory: Path, overwrite: bool) -> dict[str, Identity] | None:
    there = _existing(directory)
    if not there.is_dir():
        if there == directory:
            raise UsageError(f"the output '{directory}' is a file; give a directory")
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if there != directory:
        return None
    found = listing(directory)
    if found and not overwrite:
        raise UsageError(
            f"the output '{directory}' exists and holds files; choose another, or --overwrite (in Python"
            " overwrite=True), which replaces the files that this run writes and leaves all others"
        )
    return found


def _existing(directory: Path) -> Path:
    """The directory, or the nearest existing one above it."""
    return next(path for path in (directory, *directory.parents) if os.path.lexists(path))


def _largest_file(directory: Path) -> int | None:
    """Bytes of the largest file that may be written, where that is known: FAT takes 4 GB, a shell may have a limit."""
    limits = []
    if resource is not None and (soft := resource.getrlimit(resource.RLIMIT_FSIZE)[0]) != resource.RLIM_INFINITY:
        limits.append(soft)
    try:
        bits = os.pathconf(directory, "PC_FILESIZEBITS")
    except (AttributeError, OSError, ValueError):
        bits = 64
    if bits < 64:
        limits.append((1 << bits) - 1)
    return min(limits, default=None)
