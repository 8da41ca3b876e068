"""Models in a runtime, in this process: what the worker does, and what is done here where no worker can be started.

Imports little, since each worker imports it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from rewriter.errors import ModelError, RuntimeEndedError, TargetError

Array = npt.NDArray[np.generic]
Feeds = Mapping[str, Array]
Model = npt.NDArray[np.uint8] | str
"""The bytes of a message, or a path."""

Outcome = dict[str, Array] | TargetError
"""Outputs by name, or why there are none."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_BFLOAT16_ELEMENTS = 16
"""ONNX's number for the type."""

_NO_MEMORY = re.compile(r"bad.?alloc|failed to allocate|out of memory|unable to allocate", re.IGNORECASE)


_FOLDED = 64 << 20
"""Bytes of the files beside a model up to which constants are folded though it runs once: of large weights, to fold
them takes several times as long as the run."""


_SIDE_BY_SIDE = 16 << 20
"""Bytes that a model is fed from which it runs beside the other: of small ones the second is run where the first is."""


@dataclass(frozen=True)
class Settings:
    """How a runtime runs a model.

    Attributes:
        runtime: cpu, cuda or reference.
        optimize: whether the runtime may fuse and fold before it runs.
        threads: of one operator; 0 for all processors.
    """

    runtime: str
    optimize: bool = True
    threads: int = 1


_SESSIONS: dict[int, tuple[Any, str]] = {}
_NUMBERS = itertools.count()


def prepare(runtime: str) -> None:
    """Imports what a runtime needs, so that a model's time limit does not include it."""
    if runtime == "reference":
        import rewriter.operators.reference  # noqa: F401, PLC0415
    else:
        import onnxruntime  # noqa: F401, PLC0415 -- an extra


def run(settings: Settings, model: Model, feeds: Feeds) -> dict[str, Array]:
    """Loads a model, runs it, and forgets it.

    Raises:
        TargetError: the runtime cannot load or run it.
    """
    return _runner(settings, model, once=True)(feeds)


def run_each(settings: Settings, model: Model, many: Sequence[Feeds]) -> list[Outcome]:
    """Loads a model, runs it on each of several inputs, and forgets it; a result may be why there is none.

    Raises:
        TargetError: the runtime cannot load it.
    """
    run = _runner(settings, model)
    found: list[Outcome] = []
    for feeds in many:
        try:
            found.append(run(feeds))
        except TargetError as error:
            found.append(error)
    return found


def run_both(
    settings: Settings, before: tuple[Model, Sequence[Feeds]], after: tuple[Model, Sequence[Feeds]]
) -> list[tuple[Outcome, Outcome]]:
    """Runs two models on the same inputs; returns the results of both, or the first's error twice where it has none.

    Raises:
        TargetError: the runtime cannot load the first.
    """
    model, many = after
    with ThreadPoolExecutor(1) as pool:  # each runs on one thread, so neither's numbers depend on the other
        large = sum(array.nbytes for feeds in many for array in feeds.values()) > _SIDE_BY_SIDE
        beside = pool.submit(run_each, settings, model, many) if large else None
        expected = run_each(settings, *before)
    ran = [index for index, own in enumerate(expected) if not isinstance(own, TargetError)]
    actual = list(expected)
    try:
        if beside is None:
            found = run_each(settings, model, [many[i] for i in ran])
        else:
            found = [beside.result()[i] for i in ran]
        for index, own in zip(ran, found, strict=True):
            actual[index] = own
    except TargetError as error:
        for index in ran:
            actual[index] = error
    return list(zip(expected, actual, strict=True))


def _runner(settings: Settings, model: Model, *, once: bool = False) -> Callable[[Feeds], dict[str, Array]]:
    if settings.runtime == "reference":
        return functools.partial(_run_reference, _evaluator(model))
    return functools.partial(_run_session, _session(settings, model, once=once), settings.runtime)


def load(settings: Settings, model: Model) -> int:
    """Loads a model, and returns its number.

    Raises:
        TargetError: the runtime cannot load it.
    """
    number = next(_NUMBERS)
    _SESSIONS[number] = _session(settings, model), settings.runtime
    return number


def run_loaded(number: int, feeds: Feeds, names: Sequence[str] | None) -> dict[str, Array]:
    """Runs a loaded model; returns the named outputs, or all.

    Raises:
        TargetError: the runtime cannot run it.
    """
    if number not in _SESSIONS:
        raise RuntimeEndedError("the runtime ended since the model was loaded")
    return _run_session(*_SESSIONS[number], feeds, names)


def drop(number: int) -> None:
    _SESSIONS.pop(number, None)


def infer(model: bytes) -> bytes:
    """Returns a model with the types that ONNX infers of its values: some models end the process that infers them.

    Raises:
        ModelError: it is malformed.
    """
    from onnx import shape_inference  # noqa: PLC0415 -- not every worker infers

    try:
        return bytes(shape_inference.infer_shapes(model).SerializeToString())
    except shape_inference.InferenceError as error:
        raise ModelError(str(error)) from None


def providers(settings: Settings, model: Model) -> list[str]:
    """Returns the providers that a session really uses, the first of them preferred."""
    return list(_session(settings, model).get_providers())


def _session(settings: Settings, model: Model, *, once: bool = False) -> Any:
    import onnxruntime as ort  # noqa: PLC0415 -- an extra

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads, options.inter_op_num_threads = settings.threads, 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    if not settings.optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    wanted = list(dict.fromkeys((PROVIDERS[settings.runtime], PROVIDERS["cpu"])))
    source = model if isinstance(model, str) else model.tobytes()
    if once and isinstance(model, str) and _bytes_beside(model) > _FOLDED:
        with contextlib.suppress(Exception):  # what only folding makes runnable is folded
            return ort.InferenceSession(source, options, providers=wanted, disabled_optimizers=["ConstantFolding"])
    try:
        return ort.InferenceSession(source, options, providers=wanted)
    except Exception as error:
        raise _refused(f"ONNX Runtime ({settings.runtime}) cannot load the model", error) from error


def _bytes_beside(model: str) -> int:
    return sum(file.stat().st_size for file in Path(model).parent.iterdir() if file.is_file())


def _run_session(session: Any, provider: str, feeds: Feeds, names: Sequence[str] | None = None) -> dict[str, Array]:
    values = (*session.get_inputs(), *session.get_outputs())
    wanted = [output.name for output in session.get_outputs()] if names is None else list(names)
    own = _run_bfloat16 if any("bfloat16" in value.type for value in values) else _run
    try:
        return dict(zip(wanted, own(session, wanted, feeds), strict=True))
    except Exception as error:  # onnxruntime's own exceptions have no common public base
        raise _refused(f"ONNX Runtime ({provider}) cannot run the model", error) from error


def _evaluator(model: Model) -> Any:
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415 -- slow to import, and rarely needed

    from rewriter.operators.reference import REFERENCE_OPERATORS  # noqa: PLC0415

    try:
        source = model if isinstance(model, str) else model.tobytes()
        return ReferenceEvaluator(source, new_ops=list(REFERENCE_OPERATORS))
    except Exception as error:
        raise _refused("the reference evaluator cannot run the model", error) from error


def _run_reference(evaluator: Any, feeds: Feeds) -> dict[str, Array]:
    try:
        outputs = evaluator.run(None, dict(feeds))
    except Exception as error:
        raise _refused("the reference evaluator cannot run the model", error) from error
    return {name: np.asarray(value) for name, value in zip(evaluator.output_names, outputs, strict=True)}


def _run(session: Any, names: list[str], feeds: Feeds) -> list[Array]:
    """Returns copies: an output that lives keeps alive all the memory that the session ever took."""
    return [np.array(value) for value in session.run(names, dict(feeds))]


def _run_bfloat16(session: Any, names: list[str], feeds: Feeds) -> list[Array]:
    """As ``_run``, by way of values that carry ONNX's element type: NumPy's own protocol has no bfloat16."""
    from onnx import helper  # noqa: PLC0415 -- the worker does without
    from onnxruntime import OrtValue  # noqa: PLC0415 -- an extra

    make: Callable[..., Any] = OrtValue.ortvalue_from_numpy_with_onnx_type
    values = {
        name: make(np.ascontiguousarray(array).view(np.uint16), _BFLOAT16_ELEMENTS)
        if array.dtype == _BFLOAT16
        else make(np.ascontiguousarray(array), helper.np_dtype_to_tensor_dtype(array.dtype))
        for name, array in feeds.items()
    }
    return [_bfloat16_numpy(value) for value in session.run_with_ort_values(names, values)]


def _bfloat16_numpy(value: Any) -> Array:
    if value.element_type() != _BFLOAT16_ELEMENTS:
        return np.array(value.numpy())
    shape = tuple(value.shape())
    count = int(np.prod(shape))
    raw = ctypes.string_at(value.data_ptr(), count * 2) if count else b""
    return np.frombuffer(raw, _BFLOAT16).reshape(shape)


def _refused(what: str, error: Exception) -> TargetError:
    text = _one_line(error)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        return RuntimeEndedError(f"{what}: it needs more memory than there is")
    return TargetError(f"{what}: {text}")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", text)
    text = re.sub(
        r"(Exception during initialization: )?/onnxruntime_src/\S+:\d+ .*?\) ", "", text
    )  # C++ source and function
    return text if len(text) <= 400 else f"{text[:400]}..."
