"""What runs a model: ONNX Runtime on a provider, or ONNX's reference evaluator with this project's operators.

Both run in a process of their own: what crashes there, or has no end, ends one call.
"""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from rewriter.errors import RuntimeEndedError, TargetError, UsageError, nearest, to_install
from rewriter.parity import apart
from rewriter.parity.sessions import PROVIDERS, Model, Outcome, Settings

Array = npt.NDArray[np.generic]
Feeds = Mapping[str, Array]
Source = onnx.ModelProto | str | os.PathLike[str]

TIMEOUT = 3600.0
"""Seconds that a model may run, where nobody says another number."""

_EXTRAS = {"cpu": "cpu", "cuda": "gpu"}


@runtime_checkable
class Runtime(Protocol):
    """Runs models."""

    @property
    def name(self) -> str:
        """``cpu``, ``cuda`` or ``reference``."""

    def run(self, model: Source, feeds: Feeds) -> dict[str, Array]:
        """Returns the model's outputs by name.

        Args:
            model: a path (its external data is found beside it) or a whole model in memory.
            feeds: inputs by name.

        Raises:
            UsageError: the runtime is not installed.
            TargetError: the runtime cannot load or run the model.
            RuntimeEndedError: it crashed, did not end in time, or needs more memory than there is.
        """


@dataclass(frozen=True)
class OrtRuntime:
    """ONNX Runtime, on one thread unless more are given, so that the same model and feeds give the same numbers.

    Attributes:
        provider: cpu or cuda.
        optimize: whether the runtime may fuse and fold before it runs.
        threads: of one operator; 0 for all processors.
        timeout: seconds that one run may take.
    """

    provider: str = "cpu"
    optimize: bool = True
    threads: int = 1
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            raise UsageError(f"unknown runtime '{self.provider}'{nearest(self.provider, PROVIDERS)}")

    @property
    def name(self) -> str:
        """The provider."""
        return self.provider

    def run(self, model: Source, feeds: Feeds) -> dict[str, Array]:
        """Returns the model's outputs by name; see :class:`Runtime`."""
        return _called("run", self.settings, _plain(model), dict(feeds), timeout=self.timeout)

    def load(self, model: Source) -> Session:
        """Returns the model ready to run.

        Raises:
            UsageError: the runtime is not installed.
            TargetError: the runtime cannot load the model.
        """
        return Session(apart.call("load", self.settings, _plain(model), timeout=self.timeout), self.timeout)

    @property
    def settings(self) -> Settings:
        """What the worker is told; raises UsageError where the runtime is not installed."""
        _require(self.provider)
        return Settings(self.provider, self.optimize, self.threads)


class Session:
    """A model that is ready to run in ONNX Runtime, and may run many times."""

    def __init__(self, number: int, timeout: float) -> None:
        self._number = number
        self._timeout = timeout
        weakref.finalize(self, apart.later, "drop", number)

    def run(self, feeds: Feeds, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Returns outputs by name: those that are named, or all; raises TargetError where the runtime cannot."""
        wanted = None if names is None else list(names)
        return _called("run_loaded", self._number, dict(feeds), wanted, timeout=self._timeout)


@dataclass(frozen=True)
class ReferenceRuntime:
    """ONNX's ReferenceEvaluator with the definitions of :mod:`rewriter.operators.reference`: slow, and the judge.

    Attributes:
        timeout: seconds that one run may take.
    """

    timeout: float = TIMEOUT

    @property
    def name(self) -> str:
        """``reference``."""
        return "reference"

    @property
    def settings(self) -> Settings:
        """What the worker is told."""
        return Settings(self.name)

    def run(self, model: Source, feeds: Feeds) -> dict[str, Array]:
        """Returns the model's outputs by name; see :class:`Runtime`."""
        return _called("run", self.settings, _plain(model), dict(feeds), timeout=self.timeout)


def run_both(
    runtime: Runtime, before: tuple[Source, Sequence[Feeds]], after: tuple[Source, Sequence[Feeds]]
) -> list[tuple[Outcome, Outcome]]:
    """Returns the outputs of two models on the same inputs; the first's error twice where it has none.

    Each is loaded once, and what both are fed is sent to the other process once.

    Raises:
        UsageError: the runtime is not installed.
        TargetError: it cannot load the first, or comes to no end on the first inputs.
    """
    if isinstance(runtime, OrtRuntime | ReferenceRuntime):
        both = [(_plain(model), [dict(feeds) for feeds in many]) for model, many in (before, after)]
        with contextlib.suppress(RuntimeEndedError):  # one of them did that: each by itself then
            found: list[tuple[Outcome, Outcome]]
            found = apart.call("run_both", runtime.settings, *both, timeout=runtime.timeout)
            return found
    results: list[tuple[Outcome, Outcome]] = []
    for own, other in zip(before[1], after[1], strict=True):
        expected = _run_or_refusal(runtime, before[0], own)
        if isinstance(expected, RuntimeEndedError) and not results:
            raise expected
        ran = not isinstance(expected, TargetError)
        results.append((expected, _run_or_refusal(runtime, after[0], other) if ran else expected))
    return results


def _run_or_refusal(runtime: Runtime, model: Source, feeds: Feeds) -> Outcome:
    try:
        return runtime.run(model, feeds)
    except TargetError as error:
        return error


def available() -> tuple[str, ...]:
    """Returns the names of the runtimes that work on this machine; ``reference`` always does."""
    return (*(name for name in PROVIDERS if _works(name)), "reference")


def runtime(name: str, timeout: float = TIMEOUT) -> Runtime:
    """Returns the runtime of that name.

    Raises:
        UsageError: there is no such runtime.
    """
    return ReferenceRuntime(timeout) if name == "reference" else OrtRuntime(name, timeout=timeout)


def _called(name: str, *arguments: object, timeout: float) -> dict[str, Array]:
    outputs: dict[str, Array] = apart.call(name, *arguments, timeout=timeout)
    return outputs


def _plain(model: Source) -> Model:
    """The model in a form that is sent to another process."""
    if not isinstance(model, onnx.ModelProto):
        return os.path.abspath(model)  # noqa: PTH100 -- the other process may have begun elsewhere; links stay links
    try:
        return np.frombuffer(model.SerializeToString(), np.uint8)
    except ValueError as error:
        raise TargetError("the model exceeds the 2 GB of a message; a runtime takes it from a file") from error


def _require(provider: str) -> None:
    hint = to_install(_EXTRAS[provider])
    try:
        import onnxruntime  # noqa: PLC0415 -- an extra
    except ImportError as error:
        raise UsageError(f"this needs ONNX Runtime, which is not installed: {hint}") from error
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise UsageError(f"the installed ONNX Runtime has no {PROVIDERS[provider]}: {hint}")


def missing(name: str) -> str:
    """Returns why no runtime of that name works on this machine, and what to install; empty where one does.

    Raises:
        UsageError: there is no such name.
    """
    if name in available():
        return ""
    if name not in PROVIDERS:
        raise UsageError(f"unknown runtime '{name}'{nearest(name, (*PROVIDERS, 'reference'))}")
    try:
        _require(name)
    except UsageError as error:
        return str(error)
    return f"ONNX Runtime's {PROVIDERS[name]} finds no device or libraries that it can use on this machine"


@functools.cache
def _works(provider: str) -> bool:
    """True where a session of the provider really is one: with no GPU, ONNX Runtime falls back without an error."""
    try:
        _require(provider)
        if provider == "cpu":
            return True
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", [x], [y])
        model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
        found = apart.call("providers", Settings(provider), _plain(model), timeout=TIMEOUT)
    except (UsageError, TargetError):
        return False
    return bool(found[0] == PROVIDERS[provider])
