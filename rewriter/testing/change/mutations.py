"""Every kind of change to one fact of a model, and a check that the changed model is valid and runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from rewriter.errors import RewriterError
from rewriter.graph.contents import all_nodes
from rewriter.io.validate import validate
from rewriter.operators.reference import REFERENCE_OPERATORS
from rewriter.parity import apart
from rewriter.parity.local import default_runtime
from rewriter.parity.runtime import ReferenceRuntime
from rewriter.testing.change import constant_facts, node_facts, use_facts
from rewriter.testing.change.bodies import Bodies, Place
from rewriter.testing.promises.agreement import draw_feeds
from rewriter.testing.promises.valid import fault

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]
Mutation = Callable[[Bodies], Iterator[Place]]

_NUDGES = {np.dtype(np.float16): 2.0**-10, np.dtype(np.float32): 2.0**-20, np.dtype(np.float64): 2.0**-20}
_AMPLIFIED = 8
_PATIENCE = 60.0
"""Seconds that the types of a small model may take."""

_UNSAFE = frozenset(operator.__name__ for operator in REFERENCE_OPERATORS)
"""Operators of com.microsoft whose kernels trust what they are given: the reference raises where they may crash."""


class RefusedError(Exception):
    """A changed model is none; the message says why."""


MUTATIONS: tuple[Mutation, ...] = (
    node_facts.attribute_changed,
    node_facts.attribute_removed,
    node_facts.attribute_added,
    node_facts.inputs_swapped,
    node_facts.inputs_exchanged,
    node_facts.input_dropped,
    node_facts.operator_replaced,
    constant_facts.number_changed,
    constant_facts.numbers_swapped,
    constant_facts.number_dropped,
    constant_facts.rows_swapped,
    constant_facts.shape_changed,
    constant_facts.type_changed,
    constant_facts.unshared,
    constant_facts.shared,
    use_facts.constant_overridable,
    use_facts.constant_given,
    use_facts.value_is_output,
    use_facts.second_reader,
    use_facts.value_rounded,
)
"""Each lists the places of a model where it applies. A new one is a function, and a line here."""


def places(model: ir.Model) -> dict[str, list[Place]]:
    """Returns the facts of a model that can be changed, by the name of the mutation; a change edits this model."""
    bodies = Bodies(model)
    found = {mutation.__name__: list(mutation(bodies)) for mutation in MUTATIONS}
    return {name: there for name, there in found.items() if there}


def copy_model(model: ir.Model) -> ir.Model:
    """Returns a model that shares nothing with the given one."""
    copy: ir.Model = ir.from_proto(ir.to_proto(model))
    return copy


def require_runnable(changed: ir.Model, original: ir.Model) -> ir.Model:
    """Returns a changed model with the types that its values have now.

    What ends the process that infers its types or runs it, which is another one, is a model that does not run.

    Raises:
        RefusedError: it is malformed, the checker or the runtime refuses it and accepts the original, or rounding alone
            may change what it computes by more than parity allows.
    """
    before, proto = ir.to_proto(original), ir.to_proto(changed)
    typed = bool(before.graph.value_info)
    _forget_types(proto)
    try:
        proto = onnx.load_from_string(apart.call("infer", proto.SerializeToString(), timeout=_PATIENCE))
    except RewriterError as error:
        raise RefusedError(str(error)) from None
    if not typed:
        _forget_inner_types(proto.graph)
    _require_safe(proto, changed)
    try:
        outputs = _run(proto, changed)
    except RefusedError:
        if _runs(before, original):
            raise
        outputs = {}
    _declare(proto.graph.output, outputs)
    refused = fault(proto)
    if refused and not fault(before):
        raise RefusedError(refused)
    model: ir.Model = ir.from_proto(proto)
    return model


def _require_safe(proto: onnx.ModelProto, model: ir.Model) -> None:
    """Refuses what may not be given to ONNX Runtime: a malformed MoE or QMoE ends the process, and here it raises."""
    try:
        validate(model)
        if any(node.domain == "com.microsoft" and node.op_type in _UNSAFE for node in all_nodes(model)):
            ReferenceRuntime().run(proto, draw_feeds(model, 0))
    except RewriterError as error:
        raise RefusedError(str(error)) from None


def _run(proto: onnx.ModelProto, model: ir.Model) -> Outputs:
    """Returns what the model computes; refuses one that does not run, or says little: see ``require_runnable``."""
    for seed in range(2):
        try:
            feeds = draw_feeds(model, seed)
            outputs = default_runtime().run(proto, feeds)
            moved = default_runtime().run(proto, {name: _nudged(array) for name, array in feeds.items()})
        except RewriterError as error:
            raise RefusedError(str(error)) from None
        for name in outputs:
            if _moves(outputs[name], moved[name]):
                raise RefusedError(f"rounding of its inputs alone changes output '{name}'")
    return outputs


def _runs(proto: onnx.ModelProto, model: ir.Model) -> bool:
    try:
        _run(proto, model)
    except RefusedError:
        return False
    return True


def _nudged(array: Array) -> Array:
    if array.dtype not in _NUDGES:
        return array
    signs = np.random.default_rng(0).choice((-1.0, 1.0), array.shape)
    return np.asarray(array * (1 + _NUDGES[array.dtype] * signs), array.dtype)


def _moves(before: Array, after: Array) -> bool:
    """Whether a nudge of the inputs moves an output by much more than itself."""
    if before.shape != after.shape or before.dtype not in _NUDGES:
        return not np.array_equal(before, after)
    finite = np.isfinite(before)
    if not np.array_equal(finite, np.isfinite(after)):
        return True
    wide, other = before[finite].astype(np.float64), after[finite].astype(np.float64)
    most = np.abs(wide - other).max(initial=0.0)
    return bool(most > _AMPLIFIED * _NUDGES[before.dtype] * max(1.0, np.abs(wide).max(initial=0.0)))


def _declare(outputs: Iterable[onnx.ValueInfoProto], arrays: Outputs) -> None:
    """Gives outputs whose shape inference does not know the rank that they turned out to have."""
    for value in outputs:
        if value.name in arrays and not value.type.tensor_type.HasField("shape"):
            array = arrays[value.name]
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, [None] * array.ndim))


def _forget_types(proto: onnx.ModelProto) -> None:
    _forget_inner_types(proto.graph)
    for function in proto.functions:
        _forget_inner_types(function)
    held = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.output:
        if value.name not in held:
            value.type.tensor_type.ClearField("shape")


def _forget_inner_types(body: onnx.GraphProto | onnx.FunctionProto) -> None:
    del body.value_info[:]
    for node in body.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget_inner_types(attribute.g)
                for value in attribute.g.output:
                    value.type.tensor_type.ClearField("shape")
