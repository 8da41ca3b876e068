"""``settled`` in a process of its own: some changed models end the process that infers their shapes or loads them.

ONNX and ONNX Runtime do not check all that they compute with: until 1.31 a split of length 0 divided by zero. What ends
the other process is a model that does not run, and the tests go on.
"""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
import traceback
from typing import IO

import onnx
import onnx_ir as ir

from rewriter.testing.change.mutations import RefusedError, settled

_CODE = "from rewriter.testing.change.apart import serve; serve()"


class Apart:
    """The other process; it starts with the first model, and again after one that ended it.

    Attributes:
        process: it, while it runs.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def settled(self, changed: ir.Model, original: ir.Model) -> ir.Model:
        """Does as :func:`rewriter.testing.change.mutations.settled`.

        Raises:
            RefusedError: it raised that, or its process ended.
            RuntimeError: it raised anything else; the message holds the traceback.
        """
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            _send(process.stdin, (_bytes(changed), _bytes(original)))
            answer, refused, fault = pickle.load(process.stdout)
        except (EOFError, OSError):
            self.stop()
            raise RefusedError("it ends the process that runs it") from None
        if fault:
            raise RuntimeError(fault)
        if refused:
            raise RefusedError(refused)
        return _model(answer)

    def stop(self) -> None:
        """Ends the other process."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CODE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
            atexit.register(self.stop)
        return self.process


APART = Apart()
"""The one that every test shares: to start it takes a second."""


def serve() -> None:
    """Answers on standard output what comes on standard input, until that ends."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a runtime prints is no answer
    while True:
        try:
            models = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply = (_bytes(settled(*map(_model, models))), "", "")
        except RefusedError as refused:
            reply = (b"", str(refused), "")
        except Exception:
            reply = (b"", "", traceback.format_exc())
        _send(replies, reply)


def _send(stream: IO[bytes], message: tuple[object, ...]) -> None:
    pickle.dump(message, stream)
    stream.flush()


def _bytes(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString())


def _model(data: bytes) -> ir.Model:
    model: ir.Model = ir.from_proto(onnx.load_from_string(data))
    return model
