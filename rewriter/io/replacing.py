"""Files that are ready take the place of others in a directory, and nothing else there is touched.

A kill at any moment leaves the old model, the new one, or none under its name, never parts of both; what is ready then
lies in a hidden folder ``.<name>.ready-<pid>``, and the next run into the place goes on where this one ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rewriter.errors import UsageError

PARTIAL = "partial"
"""Between the name of what is written and the process that writes it: not complete yet, or needed no more."""

READY = "ready"
"""Between the name of a model and the process that wrote it: complete, and on its way to its place."""

JOURNAL = ".journal"
"""In a folder that is not complete: what of it is written. It is no part of what is put in place."""

Identity = tuple[int, int, int]
"""What tells a file from another of its name: inode, bytes, and when it was changed, in nanoseconds."""

_OWN = ".replacing"
_PLAN = "plan.json"
_OLD = "old"


@dataclass(frozen=True)
class _Plan:
    """What a replacement moves and removes, and what lay there when it was planned.

    Attributes:
        model: file name of the model, which comes last.
        put: the files to put in place, each with what lay there before.
        remove: the files that go with the model that is replaced.
    """

    model: str
    put: Mapping[str, Identity | None]
    remove: Mapping[str, Identity | None]

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> _Plan:
        said = json.loads(file.read_text(encoding="utf-8"))
        put, remove = ({name: known and tuple(known) for name, known in said[key].items()} for key in ("put", "remove"))
        return cls(said["model"], put, remove)


def identity(path: Path) -> Identity | None:
    """Returns what identifies a file (of a link, the link itself); None where there is none."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def listing(directory: Path) -> dict[str, Identity]:
    """Returns what lies in a directory."""
    found = {path.name: identity(path) for path in directory.iterdir()}
    return {name: known for name, known in found.items() if known is not None}


def replace(staged: Path, directory: Path, model: str, before: Mapping[str, Identity], remove: Iterable[str]) -> None:
    """Moves the files of a complete folder into a directory, the model last, and removes files of the old model.

    Args:
        staged: the folder ``.<name>.partial-<pid>`` in ``directory``; gone afterwards.
        directory: where the files go.
        model: the model's file name.
        before: what lay in ``directory`` when the run began.
        remove: names of files that go with the model that is replaced.

    Raises:
        UsageError: what is to be replaced is not what lay there; the directory is as it was.
    """
    names = [path.name for path in staged.iterdir() if path.name != JOURNAL]
    gone = [name for name in remove if name not in names]
    plan = _Plan(model, {name: before.get(name) for name in names}, {name: before.get(name) for name in gone})
    own = staged / _OWN
    own.mkdir()
    (own / _OLD).mkdir()
    plan.write(own / _PLAN)
    for path in (*staged.iterdir(), own / _PLAN, own, staged):
        sync(path)
    _check(staged, directory, plan)
    (staged / JOURNAL).unlink(missing_ok=True)
    ready = staged.with_name(staged.name.replace(f".{PARTIAL}-", f".{READY}-"))
    staged.rename(ready)
    try:
        _move(ready, directory, plan)
    finally:
        with contextlib.suppress(OSError):
            ready.rename(staged)  # what is in it now, nobody needs
    shutil.rmtree(staged, ignore_errors=True)


def finish(ready: Path, directory: Path) -> Path:
    """Finishes a replacement that a kill interrupted; returns the path of the model.

    Raises:
        UsageError: it cannot, since something else lies there by now; all is left as it is.
    """
    try:
        plan = _Plan.read(ready / _OWN / _PLAN)
        _check(ready, directory, plan)
        _move(ready, directory, plan)
    except (OSError, ValueError, KeyError, UsageError) as error:
        raise UsageError(
            f"a killed run left a complete model in '{ready}' that cannot take its place ({error});"
            " move its files where you want them, or remove it"
        ) from error
    done = ready.rename(ready.with_name(ready.name.replace(f".{READY}-", f".{PARTIAL}-")))
    shutil.rmtree(done, ignore_errors=True)
    return directory / plan.model


def sync(path: Path) -> None:
    """Waits until a file or a directory is on the disk, where the system can say so."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check(folder: Path, directory: Path, plan: _Plan) -> None:
    """Refuses a directory that is not as the plan found it."""
    for name, known in (*plan.put.items(), *plan.remove.items()):
        path, found = directory / name, identity(directory / name)
        if found is None or (name in plan.put and not (folder / name).exists()):
            continue  # not there, or moved before a kill
        if path.is_dir() and not path.is_symlink():
            raise UsageError(f"'{path}' is a directory, and a file of that name is to be written; choose another name")
        if known != found:
            how = "appeared" if known is None else "was changed"
            raise UsageError(f"'{path}' {how} while the new model was written, so it is not replaced")


def _move(ready: Path, directory: Path, plan: _Plan) -> None:
    model, old = plan.model, ready / _OWN / _OLD
    others = sorted(path.name for path in ready.iterdir() if path.name not in (model, _OWN))
    taken = [name for name in others if identity(directory / name) is not None]
    with contextlib.ExitStack() as undo:

        def move(source: Path, target: Path) -> None:
            source.rename(target)
            undo.callback(target.rename, source)

        if taken and identity(directory / model) is not None:
            move(directory / model, old / model)  # else a reader would meet the old model with the new data
        for name in taken:
            move(directory / name, old / name)
        for name in others:
            move(ready / name, directory / name)
        if (ready / model).exists():
            (ready / model).replace(directory / model)
        undo.pop_all()
    sync(directory)
    for name in plan.remove:
        with contextlib.suppress(OSError):  # the new model is in place, whatever becomes of the old one's data
            (directory / name).unlink()
