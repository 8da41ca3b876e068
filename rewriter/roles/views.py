"""Constants and their parts: which expert's slice of which stack a value is, and small integers known statically."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from rewriter.roles.facts import View

_SMALL = 8  # integers worth reading: indices, axes, slice bounds


def attribute_int(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute, or the default where it is absent or of another type."""
    attribute = node.attributes.get(name)
    return attribute.value if attribute is not None and isinstance(attribute.value, int) else default


def _attribute_ints(node: ir.Node, name: str) -> tuple[int, ...] | None:
    attribute = node.attributes.get(name)
    if attribute is None or attribute.type != ir.AttributeType.INTS or attribute.value is None:
        return None
    return tuple(attribute.value)


def _static_shape(value: ir.Value) -> tuple[int, ...] | None:
    shape = value.shape
    if shape is None:
        return None
    dims = tuple(dim for dim in shape.dims if isinstance(dim, int))
    return dims if len(dims) == len(shape) else None


def _small_ints(tensor: ir.TensorProtocol | None) -> tuple[int, ...] | None:
    if tensor is None or not tensor.dtype.is_integer() or tensor.size > _SMALL:
        return None
    try:
        return tuple(int(number) for number in tensor.numpy().reshape(-1))
    except Exception:  # a tensor may be any code or any file; one that cannot be read tells nothing
        return None


def initializer_view(value: ir.Value) -> View:
    """The view of an initializer: all of it."""
    tensor = value.const_value
    shape = _static_shape(value)
    if shape is None and tensor is not None:
        shape = tuple(int(dim) for dim in tensor.shape.numpy())
    return View(value, shape, len(shape or ()), ints=_small_ints(tensor))


def constant_view(node: ir.Node) -> View:
    """The view of a Constant node, whichever attribute holds it."""
    root = node.outputs[0]
    for attribute in node.attributes.values():
        held = attribute.value
        if held is None:
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            shape = tuple(int(dim) for dim in held.shape.numpy())
            return View(root, shape, len(shape), ints=_small_ints(held))
        if attribute.type == ir.AttributeType.INT:
            return View(root, (), 0, ints=(held,))
        if attribute.type == ir.AttributeType.INTS:
            return View(root, (len(held),), 1, ints=tuple(held) if len(held) <= _SMALL else None)
        if attribute.type == ir.AttributeType.FLOATS:
            return View(root, (len(held),), 1)
    return View(root, (), 0)


def merge_views(views: Sequence[View], node: ir.Node) -> View:
    """A constant computed from several: the one of highest rank tells what it is; concatenated integers stay known."""
    widest = max(views, key=lambda view: view.rank)
    ints: tuple[int, ...] | None = None
    if node.op_type == "Concat" and all(view.ints is not None for view in views):
        ints = tuple(number for view in views for number in view.ints or ())[:_SMALL]
    return widest._replace(shape=_static_shape(node.outputs[0]), ints=ints)


def picked(indices: View, length: int | None) -> int | None:
    """The one index that a constant names, counted from the front."""
    if indices.ints is None or len(indices.ints) != 1:
        return None
    index = indices.ints[0]
    if index < 0:
        return index + length if length is not None else None
    return index


def single_row(node: ir.Node, parameters: Sequence[View | None]) -> tuple[int, int] | None:
    """Axis and index of the one row that a Slice keeps; None for any other Slice."""
    given = [view.ints if view is not None else None for view in parameters]
    given += [None] * (3 - len(given))
    starts, ends, axes = (
        ints if ints is not None else _attribute_ints(node, name)
        for ints, name in zip(given, ("starts", "ends", "axes"), strict=False)
    )
    if starts is None or ends is None or len(starts) != 1 or len(ends) != 1:
        return None
    single = starts[0] >= 0 and ends[0] == starts[0] + 1
    return (axes[0] if axes else 0, starts[0]) if single else None


def single_columns(node: ir.Node, parameters: Sequence[View | None]) -> list[int]:
    """The index that each output of a Slice or Split holds, where each holds a single one."""
    if node.op_type == "Slice":
        row = single_row(node, parameters)
        return [row[1]] if row is not None else []
    sizes = parameters[0].ints if parameters and parameters[0] is not None else None
    shape = _static_shape(node.outputs[0]) if node.outputs else None
    axis = attribute_int(node, "axis", 0)
    single = set(sizes) == {1} if sizes else shape is not None and -len(shape) <= axis < len(shape) and shape[axis] == 1
    return list(range(len(node.outputs))) if node.op_type == "Split" and single else []


def gathered(node: ir.Node, view: View, indices: View) -> View:
    """A constant's rows picked by constants."""
    scalar = node.op_type == "Gather" and indices.rank == 0
    rank = view.rank - 1 if scalar else view.rank
    result = view._replace(shape=_static_shape(node.outputs[0]), rank=rank, ints=None)
    if view.ints is not None:
        index = picked(indices, len(view.ints))
        ints = view.ints[index : index + 1] if index is not None and index < len(view.ints) else None
        return result._replace(ints=ints)
    if view.expert is None and view.rank >= 3 and attribute_int(node, "axis", 0) in (0, -view.rank):
        return result._replace(expert=picked(indices, view.shape[0] if view.shape else None))
    return result


def moved(node: ir.Node, view: View, parameters: Sequence[View | None]) -> list[View]:
    """One view per output of a movement operator whose parameters are constants (None where absent)."""
    op_type = node.op_type
    stack = view.rank >= 3 and view.expert is None
    shape = _static_shape(node.outputs[0]) if node.outputs else None
    rank = view.rank
    if shape is not None:
        rank = len(shape)
    elif op_type == "Reshape" and parameters and parameters[0] is not None and parameters[0].ints is not None:
        rank = len(parameters[0].ints)
    elif op_type in ("Squeeze", "Unsqueeze"):
        given = parameters[0].ints if parameters and parameters[0] is not None else None
        count = len(given) if given is not None else 1
        rank += count if op_type == "Unsqueeze" else -count
    ints = view.ints if op_type not in ("Slice", "Split", "Neg", "ReduceSum") else None
    result = view._replace(shape=shape, rank=rank, ints=ints)
    if stack and op_type == "Slice":
        row = single_row(node, parameters)
        return [result._replace(expert=row[1])] if row is not None and row[0] in (0, -view.rank) else [result]
    if stack and op_type == "Split" and attribute_int(node, "axis", 0) in (0, -view.rank):
        length = view.shape[0] if view.shape else len(node.outputs)
        if length == len(node.outputs):
            return [result._replace(expert=index) for index in range(length)]
    return [result] * len(node.outputs)
