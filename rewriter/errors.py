"""The kinds of error that a user can meet. Each message is one line that names the thing and the fix."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

from rewriter.text import printable, shortened

_MOST = 4000


def one_line(message: str) -> str:
    """Returns a message as one line that a terminal can show: names in it may hold anything."""
    line = printable(shortened(" ".join(message.split())))
    return line if len(line) <= _MOST else f"{line[:_MOST]}..."


def reason(error: Exception) -> str:
    """Returns why something failed, in the system's words where it was the system: without number and path."""
    return getattr(error, "strerror", None) or str(error)


def root_cause(error: BaseException) -> BaseException:
    """Returns what an error was first raised for, behind all that was made of it."""
    while deeper := error.__cause__ or error.__context__:
        error = deeper
    return error


class RewriterError(Exception):
    """Base of every error this package raises on purpose."""

    def __init__(self, message: str) -> None:
        """Keeps the message to one line that a terminal can show, and not too long a one."""
        super().__init__(one_line(message))


class RewriterWarning(UserWarning):
    """What a user should know of and no run fails for: leftovers that were removed, a package that was skipped."""


def warn(message: str) -> None:
    """Warns of what a user should know."""
    warnings.warn(message, RewriterWarning, stacklevel=3)


class UsageError(RewriterError):
    """What was asked for cannot be done as asked: an existing output, an unknown option, a missing runtime."""


class RuleSetError(RewriterError):
    """A rule set (YAML, or its Python form) is wrong; the message carries file, line and column where known."""


class ModelError(RewriterError):
    """The model is unreadable, unsafe or invalid."""


class RuleError(RewriterError):
    """A rule broke its contract; carries the rule's name and the node it was looking at."""

    def __init__(self, rule: str, node: str, message: str) -> None:
        super().__init__(f"rule {rule} at node {node}: {message}")
        self.rule = rule
        self.node = node


class NonConvergenceError(RewriterError):
    """A phase was still firing after its last allowed sweep."""


class ParityError(RewriterError):
    """A rewrite, or a whole model, does not compute what it should."""


class ProofError(ParityError):
    """A replacement does not compute what it replaces; carries the rule's name, the node and what differs."""

    verdict = "is wrong"

    def __init__(self, rule: str, node: str, message: str) -> None:
        super().__init__(f"rule {rule} at node {node}: {message}; the rewrite {self.verdict}")
        self.rule = rule
        self.node = node
        self.message = message


class UnprovedError(ProofError):
    """A proof did not come to an end: a runtime crashed, or it would take too long or too much memory."""

    verdict = "could not be proved"


class QuantizationError(RewriterError):
    """A weight cannot be quantized (non-finite values), or a quantizer broke its promise."""


class OverflowingError(QuantizationError):
    """A weight holds numbers so large that its quantized form, in the weight's own type, would be infinite."""


class TargetError(RewriterError):
    """The target runtime is unknown or cannot run what is asked of it."""


class RuntimeEndedError(TargetError):
    """A runtime crashed, did not come to an end in time, or needs more memory than there is: nothing is known then."""


def require_no_pipe(path: str | os.PathLike[str]) -> None:
    """Raises UsageError where a pipe or a device stands: arrays are read in any order, and a pipe may never end."""
    file = Path(path)
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise UsageError(f"'{path}' is not a regular file; write the arrays to one")


def to_install(extra: str) -> str:
    """Returns the command that installs what an extra of this package lists: the package itself may be on no index."""
    from importlib import metadata  # noqa: PLC0415 -- slow to import, and only messages ask

    try:
        required = metadata.requires("onnx-moe-rewriter") or []
    except metadata.PackageNotFoundError:
        required = []
    listed = (line.partition(";") for line in required)
    marked = ((name.strip(), marker.replace("'", '"').strip()) for name, _, marker in listed)
    found = [f'"{name}"' for name, marker in marked if marker == f'extra == "{extra}"']
    return f"pip install {' '.join(found) or extra}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns `` (did you mean 'x'?)`` for the closest valid names, or lists the valid ones when none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        near = [difflib.SequenceMatcher(None, other, name).ratio() for other in close]
        closest = sorted(other for other, ratio in zip(close, near, strict=True) if ratio == near[0])
        return f" (did you mean {' or '.join(map(repr, closest))}?)"
    return f" (valid: {', '.join(names)})" if names else ""
