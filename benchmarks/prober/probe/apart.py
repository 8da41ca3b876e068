"""Runs each form in a process of its own, so that a kernel that crashes or hangs takes nothing down with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import numpy as np

from probe.cases import TOKENS, case_of
from probe.forms import Form

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "dml": "DmlExecutionProvider",
}
_SECONDS = 120

Answer = dict[str, object]
"""Of a form: ``error``, the largest difference over the largest expected value; or ``load`` or ``run``, what the
runtime said, for which ``tokens``; or ``crash``, how the process ended."""


def answers(forms: list[Form], provider: str, jobs: int, told: Callable[[int, Form, Answer], None]) -> list[Answer]:
    """Runs forms; ``told`` hears of each as it is known."""
    context = multiprocessing.get_context("fork")  # the runtime is imported once, and no session lives in this process

    def one(numbered: tuple[int, Form]) -> Answer:
        number, form = numbered
        answer = _apart(context, form, provider)
        told(number, form, answer)
        return answer

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, enumerate(forms)))


def _apart(context: multiprocessing.context.BaseContext, form: Form, provider: str) -> Answer:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, form, provider), daemon=True)
    process.start()
    sender.close()
    answer: Answer | None = None
    if receiver.poll(_SECONDS):
        try:
            answer = receiver.recv()
        except EOFError:
            answer = None
    else:
        process.kill()
        answer = {"crash": f"no answer in {_SECONDS} s"}
    process.join()
    if answer is None:
        code = process.exitcode or 0
        answer = {"crash": signal.Signals(-code).name if code < 0 else f"exit {code}"}
    return answer


def _child(sender: Connection, form: Form, provider: str) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a kernel that aborts says so on its way
    try:
        sender.send(_measured(form, provider))
    except Exception:
        sender.send({"prober": traceback.format_exc()})
    sender.close()


def _measured(form: Form, provider: str) -> Answer:
    import onnxruntime as ort

    case = case_of(form, attributes_of(form.operator))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if provider != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = ort.InferenceSession(case.model, options, providers=[PROVIDERS[provider]])
    except Exception as error:
        return {"load": _line(error)}
    errors: dict[int, float] = {}
    failures: dict[int, str] = {}
    for tokens in TOKENS:
        feeds, expected = case.run(tokens)
        try:
            (out,) = session.run(None, feeds)
        except Exception as error:
            failures[tokens] = _line(error)
            continue
        same = out.shape == expected.shape and bool(np.isfinite(out).all())
        errors[tokens] = float(np.abs(out - expected).max() / np.abs(expected).max()) if same else float("inf")
    if failures:
        return {"run": next(iter(failures.values())), "tokens": sorted(failures)}
    return {"error": max(errors.values())}


def attributes_of(operator: str) -> frozenset[str]:
    """Returns the attributes that the runtime's operator has."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    for schema in get_all_operator_schema():
        if schema.domain == "com.microsoft" and schema.name == operator:
            return frozenset(schema.attributes)
    return frozenset()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
