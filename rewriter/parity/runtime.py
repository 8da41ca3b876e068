"""What runs a model: ONNX Runtime on a provider, or ONNX's reference evaluator with this project's operators."""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from rewriter.errors import TargetError, UsageError, nearest

Array = npt.NDArray[np.generic]
Feeds = Mapping[str, Array]
Source = onnx.ModelProto | str | os.PathLike[str]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_EXTRAS = {"cpu": "cpu", "cuda": "gpu"}
_BFLOAT16 = np.dtype(ir.DataType.BFLOAT16.numpy())


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
        """


class Loaded(Protocol):
    """A model that is ready to run, and may run many times."""

    def run(self, feeds: Feeds, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Returns outputs by name: those that are named, or all.

        Raises:
            TargetError: the runtime cannot run the model.
        """


@dataclass(frozen=True)
class OrtRuntime:
    """ONNX Runtime, on one thread unless more are given, so that the same model and feeds give the same numbers.

    Attributes:
        provider: cpu or cuda.
        optimize: whether the runtime may fuse and fold before it runs.
        threads: of one operator; 0 for all processors.
    """

    provider: str = "cpu"
    optimize: bool = True
    threads: int = 1

    def __post_init__(self) -> None:
        if self.provider not in _PROVIDERS:
            raise UsageError(f"unknown runtime '{self.provider}'{nearest(self.provider, _PROVIDERS)}")

    @property
    def name(self) -> str:
        """The provider."""
        return self.provider

    def run(self, model: Source, feeds: Feeds) -> dict[str, Array]:
        """Returns the model's outputs by name; see :class:`Runtime`."""
        return self.load(model).run(feeds)

    def load(self, model: Source) -> Loaded:
        """Returns the model ready to run.

        Raises:
            UsageError: the runtime is not installed.
            TargetError: the runtime cannot load the model.
        """
        return _Session(self._session(model), self.provider)

    def _session(self, model: Source) -> Any:
        ort = _onnxruntime(self.provider)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.use_deterministic_compute = True
        if not self.optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        providers = list(dict.fromkeys((_PROVIDERS[self.provider], _PROVIDERS["cpu"])))
        try:
            source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else os.fspath(model)
            return ort.InferenceSession(source, options, providers=providers)
        except Exception as error:
            raise TargetError(f"ONNX Runtime ({self.provider}) cannot load the model: {_one_line(error)}") from error


class _Session:
    """A session of ONNX Runtime; see :class:`Loaded`."""

    def __init__(self, session: Any, provider: str) -> None:
        values = (*session.get_inputs(), *session.get_outputs())
        self._run = _run_bfloat16 if any("bfloat16" in value.type for value in values) else _run
        self._session = session
        self._provider = provider

    def run(self, feeds: Feeds, names: Sequence[str] | None = None) -> dict[str, Array]:
        wanted = [output.name for output in self._session.get_outputs()] if names is None else list(names)
        try:
            return dict(zip(wanted, self._run(self._session, wanted, feeds), strict=True))
        except Exception as error:  # onnxruntime's own exceptions have no common public base
            raise TargetError(f"ONNX Runtime ({self._provider}) cannot run the model: {_one_line(error)}") from error


@dataclass(frozen=True)
class ReferenceRuntime:
    """ONNX's ReferenceEvaluator with the definitions of :mod:`rewriter.operators.reference`: slow, and the judge."""

    @property
    def name(self) -> str:
        """``reference``."""
        return "reference"

    def run(self, model: Source, feeds: Feeds) -> dict[str, Array]:
        """Returns the model's outputs by name; see :class:`Runtime`."""
        from onnx.reference import ReferenceEvaluator  # noqa: PLC0415 -- slow to import, and rarely needed

        from rewriter.operators.reference import REFERENCE_OPERATORS  # noqa: PLC0415

        source = model if isinstance(model, onnx.ModelProto) else os.fspath(Path(model))
        try:
            evaluator = ReferenceEvaluator(source, new_ops=list(REFERENCE_OPERATORS))
            outputs = evaluator.run(None, dict(feeds))
        except Exception as error:
            raise TargetError(f"the reference evaluator cannot run the model: {_one_line(error)}") from error
        return {name: np.asarray(value) for name, value in zip(evaluator.output_names, outputs, strict=True)}


def available() -> tuple[str, ...]:
    """Returns the names of the runtimes that work on this machine; ``reference`` always does."""
    return (*(name for name in _PROVIDERS if _works(name)), "reference")


def runtime(name: str) -> Runtime:
    """Returns the runtime of that name.

    Raises:
        UsageError: there is no such runtime.
    """
    return ReferenceRuntime() if name == "reference" else OrtRuntime(name)


def _onnxruntime(provider: str) -> Any:
    hint = f'pip install "onnx-moe-rewriter[{_EXTRAS[provider]}]"'
    try:
        import onnxruntime  # noqa: PLC0415 -- an extra
    except ImportError as error:
        raise UsageError(f"this needs ONNX Runtime, which is not installed: {hint}") from error
    if _PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise UsageError(f"the installed ONNX Runtime has no {_PROVIDERS[provider]}: {hint}")
    return onnxruntime


@functools.cache
def _works(provider: str) -> bool:
    """True where a session of the provider really is one: with no GPU, ONNX Runtime falls back without an error."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    try:
        session = OrtRuntime(provider)._session(model)
    except (UsageError, TargetError):
        return False
    return bool(session.get_providers()[0] == _PROVIDERS[provider])


def _run(session: Any, names: list[str], feeds: Feeds) -> list[Array]:
    """Returns copies: an output that lives keeps alive all the memory that the session ever took."""
    return [np.array(value) for value in session.run(names, dict(feeds))]


def _run_bfloat16(session: Any, names: list[str], feeds: Feeds) -> list[Array]:
    """As ``_run``, by way of values that carry ONNX's element type: NumPy's own protocol has no bfloat16."""
    make: Callable[..., Any] = _onnxruntime("cpu").OrtValue.ortvalue_from_numpy_with_onnx_type
    values = {
        name: make(np.ascontiguousarray(array).view(np.uint16), TensorProto.BFLOAT16)
        if array.dtype == _BFLOAT16
        else make(np.ascontiguousarray(array), helper.np_dtype_to_tensor_dtype(array.dtype))
        for name, array in feeds.items()
    }
    return [_bfloat16_numpy(value) for value in session.run_with_ort_values(names, values)]


def _bfloat16_numpy(value: Any) -> Array:
    if value.element_type() != TensorProto.BFLOAT16:
        return np.array(value.numpy())
    shape = tuple(value.shape())
    count = int(np.prod(shape))
    raw = ctypes.string_at(value.data_ptr(), count * 2) if count else b""
    return np.frombuffer(raw, _BFLOAT16).reshape(shape)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", text)
    text = re.sub(
        r"(Exception during initialization: )?/onnxruntime_src/\S+:\d+ .*?\) ", "", text
    )  # C++ source and function
    return text if len(text) <= 400 else f"{text[:400]}..."
