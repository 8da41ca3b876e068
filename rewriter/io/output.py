"""A directory that appears complete or not at all, or whose files of the same names are replaced, all or none."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rewriter.errors import ModelError, QuantizationError, UsageError, warn
from rewriter.io.journal import identity_of
from rewriter.io.leftovers import alone, staging, unlock
from rewriter.io.place import Place, is_refusal, refused
from rewriter.io.replacing import JOURNAL, replace, sync

_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)

_ABOUT_THE_MODEL = (ModelError, QuantizationError)
"""What ends every run of the same kind: there is nothing to go on with."""

STAGED: set[Path] = set()
"""The folders that this process fills now: what is to be removed where it ends without unwinding."""


@contextlib.contextmanager
def complete_directory(place: Place, name: str, remove: Callable[[], Iterable[str]] = tuple) -> Iterator[Path]:
    """Gives a folder to fill; when the block ends well, its files are in their place, and else nothing is changed.

    A directory that is not there yet appears by one rename. In one that is, each file is put in place of that of its
    name, the model last; nothing else there is touched. The folder is hidden, and locked while it is filled. Where the
    place is one to be resumed it is that of a killed run, if there is one, and stays where the run is interrupted.

    Args:
        place: where the files will appear.
        name: the model's file name.
        remove: names of files in the directory that go with the model that is replaced.

    Raises:
        UsageError: it cannot be written, or what lies there is not what lay there when it was first looked at.
    """
    target = place.directory
    above, label = place.hidden(name)
    made = [path for path in (above, *above.parents) if not path.exists()]
    staged: Path | None = None
    try:
        above.mkdir(parents=True, exist_ok=True)
        staged, lock = staging(above, label, place.leftover(name))
        STAGED.add(staged)
        try:
            yield staged
            if place.before is None:
                (staged / JOURNAL).unlink(missing_ok=True)
                _appear(staged, target)
            else:
                with alone(target):
                    replace(staged, target, name, place.before, remove())
        finally:
            unlock(lock)
            STAGED.discard(staged)
    except BaseException as error:
        if staged is not None and place.resume and not isinstance(error, _ABOUT_THE_MODEL) and identity_of(staged):
            warn(f"what is written is kept in '{staged}'; --resume, in Python resume=True, goes on with it")
        elif staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
        for directory in made:
            with contextlib.suppress(OSError):
                directory.rmdir()
        if isinstance(error, OSError) and is_refusal(error):
            raise refused(target, error) from error
        raise


def _appear(staged: Path, target: Path) -> None:
    for path in (*staged.iterdir(), staged):
        sync(path)  # else a power cut after the rename could leave files that hold nothing
    try:
        staged.rename(target)  # over a directory that is not empty, or a file, no system does
    except OSError as error:
        if error.errno in _TAKEN or os.path.lexists(target):
            raise UsageError(
                f"'{target}' appeared while the model was written, so it is left as it is; choose another place"
            ) from error
        raise
    sync(target.parent)
