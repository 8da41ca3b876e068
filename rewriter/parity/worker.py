"""The process in which models are run: what ends it (a fault, a loop without end, too much memory) ends nothing else.

It answers one call after the other over a socket, and imports little, since it is started with every run.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import mmap
import os
import pickle
import signal
import socket
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rewriter import memory
from rewriter.errors import ModelError, RewriterError, RuntimeEndedError, TargetError
from rewriter.parity import sessions

_SHARE = 0.9
"""Of the memory that is left, what a call may take."""

_LARGE = 1 << 20
"""Bytes of arrays from which they go by way of a shared file."""

_ALIGNED = 64


def send(channel: socket.socket, thing: Any, shared: int | None = None) -> int:
    """Sends an object; the bytes of its arrays are not copied first, and those of a mapped file are read there.

    Args:
        channel: the socket.
        thing: what is sent.
        shared: descriptor of a file that both sides have, by which large arrays go; it is taken until the answer.

    Returns:
        How many bytes of that file it takes.
    """
    buffers: list[pickle.PickleBuffer] = []
    written = io.BytesIO()
    _Pickler(written, 5, buffer_callback=buffers.append).dump(thing)
    head = written.getbuffer()
    arrays = [buffer.raw() for buffer in buffers]
    sizes = [len(array) for array in arrays]
    apart = shared is not None and sum(sizes) >= _LARGE
    channel.sendall(struct.pack(f"<?I{len(sizes) + 1}Q", apart, len(sizes), len(head), *sizes))
    channel.sendall(head)
    for place, array in zip(_places(sizes), arrays, strict=True):
        if shared is None or not apart:
            channel.sendall(array)
        else:
            done = 0
            while done < len(array):
                done += os.pwrite(shared, array[done:], place + done)
    if apart:
        channel.sendall(b".")  # it is all there
    return sum(sizes) if apart else 0


def receive(channel: socket.socket, shared: int | None = None) -> Any:
    """Returns the object that was sent; see :func:`send`.

    Raises:
        EOFError: the other side is gone.
        TimeoutError: it says nothing for as long as the channel waits.
    """
    apart, count = struct.unpack("<?I", _read(channel, 5))
    size, *sizes = struct.unpack(f"<{count + 1}Q", _read(channel, 8 * (count + 1)))
    head = _read(channel, size)
    if apart and shared is not None:
        _read(channel, 1)
        places = _places(sizes)
        file = memoryview(mmap.mmap(shared, places[-1] + sizes[-1], access=mmap.ACCESS_COPY))
        buffers: list[Any] = [file[place : place + size] for place, size in zip(places, sizes, strict=True)]
    else:
        buffers = [_read(channel, size) for size in sizes]
    return pickle.loads(head, buffers=buffers)


class _Pickler(pickle.Pickler):
    """Sends a large array that lies in a mapped file as its place there."""

    def reducer_override(self, thing: Any) -> Any:
        place = _place(thing) if type(thing) is np.ndarray and thing.nbytes >= _LARGE else None
        return NotImplemented if place is None else (_in_file, place)


def _place(array: npt.NDArray[Any]) -> tuple[Any, ...] | None:
    """The arguments of ``_in_file`` for an array that lies in a file as it is, aligned."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    file: Any = owner.obj if isinstance(owner, memoryview) else owner
    source = getattr(file, "source", None)
    if source is None or not array.flags.c_contiguous:
        return None
    offset = array.ctypes.data - np.frombuffer(file, np.uint8, 1).ctypes.data
    return None if offset % _ALIGNED else (*source, offset, array.dtype, array.shape)


def _in_file(
    path: Path, state: tuple[int, ...], offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != state:
            raise ModelError(f"the data file '{path}' was changed while it was read; run again when nothing writes it")
        return np.asarray(np.memmap(file, dtype, "r", offset, shape))


def _places(sizes: Sequence[int]) -> list[int]:
    """Where each array begins in the shared file."""
    padded = (-(-size // _ALIGNED) * _ALIGNED for size in sizes)
    return list(itertools.accumulate(padded, initial=0))[: len(sizes)]


def _read(channel: socket.socket, size: int) -> bytearray:
    found = bytearray(size)
    left = memoryview(found)
    while left:
        count = channel.recv_into(left)
        if not count:
            raise EOFError
        left = left[count:]
    return found


def main(descriptor: int, shared: int) -> None:
    """Answers calls until the other side is gone.

    Args:
        descriptor: of the socket.
        shared: of the file through which large arrays come.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other side hears Ctrl-C, and ends this one
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(ImportError):
        sessions.prepare("cpu")  # while the other side is still busy
    channel = socket.socket(fileno=descriptor)
    with contextlib.suppress(EOFError, OSError):
        send(channel, "cpu")
        while True:
            try:
                found = _answer(*receive(channel, shared))
            except RewriterError as error:
                found = False, error
            send(channel, found)
            del found


def _answer(call: str, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """Whether the call came to an end, and its result, or what it raised."""
    left = memory.available()
    if left is not None and not any(isinstance(a, sessions.Settings) and a.runtime == "cuda" for a in arguments):
        memory.hold(int(_SHARE * left))
    try:
        return True, getattr(sessions, call)(*arguments)
    except RewriterError as error:
        return False, error
    except MemoryError:
        return False, RuntimeEndedError("the runtime cannot run the model: it needs more memory than there is")
    except Exception as error:
        return False, TargetError(f"the runtime cannot run the model: {type(error).__name__}: {error}")


def _watch(parent: int) -> None:
    """Ends this process when the one that started it is gone: what runs may have no end."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
