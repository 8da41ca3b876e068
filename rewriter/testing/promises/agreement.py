"""A rewritten model computes what the original does, given the weights that it was left with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from rewriter.errors import TargetError
from rewriter.graph.contents import Slot, all_nodes, stored_tensors, swapped
from rewriter.parity.judge import cannot_judge, cannot_run
from rewriter.parity.local import default_runtime
from rewriter.parity.model_inputs import random_inputs
from rewriter.parity.runtime import ReferenceRuntime, Runtime
from rewriter.quantize.job import PartTensor, QuantizationJob
from rewriter.tensors import ContiguousCopy, View
from rewriter.testing.promises.codes import check_codes

Array = npt.NDArray[Any]

_TOLERANCES = {"float16": 1e-2, "float32": 1e-5, "float64": 1e-5}
"""Largest error over the largest magnitude: looser than the local proof, since errors of several rewrites add up."""
_EXACT = 1e-6
_INEXACT = 0.05
"""Of a kernel that rounds more than a proof allows: what it was given it still has to read as it was meant."""


def check_outputs(before: ir.Model, after: ir.Model, judge: Runtime | None = None) -> None:
    """Runs both models; where weights were quantized, the original runs with their dequantized values.

    A weight that is read both ways, or computed from several, has no one set of values; then the local proofs have to
    do. Where the runtime has a kernel that is not exact, its own outputs have to be near all the same: the reference
    reads codes as this package writes them, and a kernel as its operator says.

    Raises:
        AssertionError: the original runs and the other does not, an output differs, or a code is not the nearest.
    """
    jobs = list(jobs_of(after))
    for job in jobs:
        check_codes(job)
    comparable = not jobs or (_held_by(before, jobs) and not any(read_in_float(after, jobs)))
    reference = _with_tensors(before, _dequantized(jobs))
    rewritten = ir.to_proto(after)
    runtime = judge or default_runtime()
    nodes = [*all_nodes(before), *all_nodes(after)]
    exact = ReferenceRuntime() if cannot_judge(nodes, runtime.name) else runtime
    # What a runtime cannot run exactly it may all the same run, and must then run after the rewrite too: unless that
    # was made for another target.
    elsewhere = cannot_run(all_nodes(after), runtime.name) and not cannot_run(all_nodes(before), runtime.name)
    refused = bool(cannot_run(nodes, runtime.name))
    for seed in range(2):
        feeds = draw_feeds(before, seed)
        for own in {exact} if elsewhere else dict.fromkeys((runtime, exact)):
            outputs = _run_both(own, reference, rewritten, feeds)
            if outputs is None and jobs:  # what reads a widened weight as it was stored takes no other type
                _run_both(own, ir.to_proto(before), rewritten, feeds)
            if outputs is None or not comparable or (own is not exact and refused):
                continue
            for name, want in outputs[0].items():
                _compare(name, want, outputs[1][name], exact=not jobs, inexact=own is not exact)


def _run_both(
    runtime: Runtime, before: onnx.ModelProto, after: onnx.ModelProto, feeds: Mapping[str, Array]
) -> tuple[Mapping[str, Array], Mapping[str, Array]] | None:
    """What both models compute, or None where the runtime cannot run the first."""
    try:
        expected = runtime.run(before, feeds)
    except TargetError:
        return None
    try:
        return expected, runtime.run(after, feeds)
    except TargetError as error:
        raise AssertionError(f"the model runs and the result does not: {error}") from error


def draw_feeds(model: ir.Model, seed: int) -> dict[str, Array]:
    """Returns inputs for a model; odd seeds set conditions and replace the defaults that a caller may override."""
    feeds: dict[str, Array] = dict(random_inputs(model, seed, sequence=3))
    generator = np.random.default_rng(seed)
    for value in model.graph.inputs:
        name = value.name or ""
        if name in feeds:
            array = feeds[name]
            if array.dtype.kind in "iu":
                array = np.zeros_like(array)  # the one index that every axis has
            feeds[name] = np.full_like(array, seed % 2 == 1) if array.dtype == np.bool_ else array
        elif seed % 2 and value.const_value is not None:
            default = value.const_value.numpy()
            if default.dtype.kind not in "iub":
                feeds[name] = generator.standard_normal(default.shape).astype(default.dtype)
    return feeds


def _compare(name: str, want: Array, got: Array, *, exact: bool, inexact: bool) -> None:
    assert want.shape == got.shape, f"output '{name}' has shape {want.shape}, and {got.shape} in the result"
    assert want.dtype == got.dtype, f"output '{name}' is {want.dtype}, and {got.dtype} in the result"
    if not want.size or want.dtype.kind != "f" or np.array_equal(want, got, equal_nan=True):
        assert np.array_equal(want, got, equal_nan=want.dtype.kind == "f"), f"output '{name}' differs"
        return
    wide, other = want.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(wide)
    assert np.array_equal(finite, np.isfinite(other)), f"output '{name}' differs where it is not finite"
    error = np.abs(np.where(finite, wide, 0.0) - np.where(finite, other, 0.0))
    where = tuple(int(i) for i in np.unravel_index(int(np.argmax(error)), error.shape))
    tolerance = _TOLERANCES[str(want.dtype)]
    if exact and want.dtype != np.float16:
        tolerance = _EXACT
    if inexact:
        tolerance = _INEXACT
    scale = max(1.0, float(np.abs(wide[finite]).max(initial=0.0)))
    assert error[where] <= tolerance * scale, (
        f"output '{name}' is {wide[where]:.7g} at {list(where)}, and {other[where]:.7g} in the result;"
        f" the tolerance is {tolerance:g} of {scale:.3g}"
    )


def jobs_of(model: ir.Model) -> Iterable[QuantizationJob]:
    """Returns the weights that the model's computed constants are made of, each once."""
    tensors = [slot.tensor for slot in stored_tensors(model)]
    found = {job.key: job for t in tensors if isinstance(t, PartTensor) for job in t.jobs}
    return found.values()


def _dequantized(jobs: Iterable[QuantizationJob]) -> dict[int, Array]:
    """The constants of the original, by identity, with what quantization made of them.

    One that the model widens is as wide as it is read: its dequantized values are not among those of the narrow type.
    """
    replaced: dict[int, Array] = {}
    for job in jobs:
        source, places = positions(job.weight)
        array = replaced.get(id(source), np.array(source.numpy()))
        array = array.astype(np.promote_types(array.dtype, job.weight.dtype.numpy()))
        array.reshape(-1)[places] = job.quantize().dequantize().astype(array.dtype)
        replaced[id(source)] = array
    return replaced


def _held_by(model: ir.Model, jobs: Iterable[QuantizationJob]) -> bool:
    held = {id(slot.tensor) for slot in stored_tensors(model)}
    return all(id(positions(job.weight)[0]) in held for job in jobs)


def read_in_float(model: ir.Model, jobs: Iterable[QuantizationJob]) -> Iterator[tuple[Slot, str]]:
    """Yields what holds a weight in float that is quantized too, and the weight: no one set of values is right."""
    quantized: dict[int, dict[int, str]] = {}
    for job in jobs:
        source, places = positions(job.weight)
        quantized.setdefault(id(source), {}).update(dict.fromkeys(places.reshape(-1).tolist(), job.context.weight))
    for slot in stored_tensors(model):
        source, places = positions(View.whole(slot.tensor, ""))
        known = quantized.get(id(source), {})
        both = next((known[place] for place in places.reshape(-1).tolist() if place in known), None)
        if both is not None:
            yield slot, both


def positions(view: View) -> tuple[ir.TensorProtocol, npt.NDArray[np.int64]]:
    """Returns the tensor that holds the view's elements, and the place of each in it, flattened."""
    source = view.source
    places = np.arange(int(np.prod(source.shape.numpy())), dtype=np.int64)
    if isinstance(source, ContiguousCopy):
        source, inner = positions(source.view)
        places = inner.reshape(-1)
    window = np.lib.stride_tricks.as_strided(
        places[view.offset :], view.shape, tuple(s * places.itemsize for s in view.strides)
    )
    return source, window


def _with_tensors(model: ir.Model, replaced: Mapping[int, Array]) -> onnx.ModelProto:
    """The model with other contents in some of its constants; the model is as it was afterwards."""
    held = [slot for slot in stored_tensors(model) if id(slot.tensor) in replaced]
    with swapped() as swap:
        for slot in held:
            swap(slot, ir.tensor(replaced[id(slot.tensor)], name=slot.tensor.name))
        proto: onnx.ModelProto = ir.to_proto(model)
    if any(replaced[id(slot.tensor)].dtype != slot.tensor.dtype.numpy() for slot in held):
        del proto.graph.value_info[:]  # what is between a widened constant and the Cast behind it is wider as well
    return proto
