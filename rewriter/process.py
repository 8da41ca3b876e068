"""What the shell gives a process and tells it: streams that may be closed, and signals, after which it cleans up.

Imports nothing of this package and nothing heavy: the command line begins here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

BAD = 2


_most: int | None = None


def processors() -> int:
    """Returns how many processors this process may use, of those that the machine has."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return found if _most is None else min(found, _most)


def limit_processors(count: int) -> None:
    """Leaves the other processors of the machine to other processes, as workers that were started side by side."""
    global _most  # noqa: PLW0603 -- the process has these processors, whoever asks
    _most = count


class TerminatedError(BaseException):
    """The run was told to end, by a signal other than Ctrl-C's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.code = 128 + number


def open_streams() -> None:
    """Opens the null device for standard streams that the shell closed.

    The next file that is opened would take their place, and whatever a library prints would go into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 -- as long as the process


def quit_quietly() -> None:
    """Lets Ctrl-C end the process without a traceback, as long as there is nothing to remove."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _quit)


def quit_cleanly() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def clean_endings() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into TerminatedError, and a fault of a mapped file into one line, in the main thread.

    A signal that is ignored (nohup) stays ignored; a second one changes nothing while the first is obeyed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = False

    def end(number: int, _: FrameType | None) -> None:
        nonlocal told
        if not told:
            told = True
            raise TerminatedError(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, handler in before.items():
            if handler is signal.SIG_DFL:
                signal.signal(number, end)
        with _truncation_said():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _quit(number: int, _: FrameType | None) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, b"error: interrupted\n")
    os._exit(128 + number)


@contextlib.contextmanager
def _truncation_said() -> Iterator[None]:
    """Reading a mapped file where it no longer goes raises SIGBUS, which no handler in Python can answer."""
    number = getattr(signal, "SIGBUS", None)
    if number is None:
        yield
        return
    library = ctypes.CDLL(None)
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.signal.restype = ctypes.c_void_p
    before = library.signal(number, ctypes.cast(_ON_BUS, ctypes.c_void_p))
    try:
        yield
    finally:
        library.signal(number, before)


def _on_bus(_: int) -> None:
    """Ends the process: the thread that read cannot go on."""
    message = b"error: a data file became shorter while it was read, or its disk fails; nothing is written; run again\n"
    with contextlib.suppress(OSError):
        os.write(2, message)
    output = sys.modules.get("rewriter.io.output")
    for folder in tuple(getattr(output, "STAGED", ())):
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(BAD)


_ON_BUS = ctypes.CFUNCTYPE(None, ctypes.c_int)(_on_bus)
"""Kept, since the system knows its address."""
