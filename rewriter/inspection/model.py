"""What a model is: who wrote it, its layers, its weights by role, its MoE blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from rewriter import io
from rewriter.graph.contents import all_nodes, stored_tensors
from rewriter.inspection.blocks import Block, find_blocks
from rewriter.inspection.kinds import Kind, is_bias, quantization
from rewriter.inspection.weights import with_roles
from rewriter.quantize.born import look as look_at
from rewriter.quantize.lossless import bits_per_weight, show
from rewriter.report.provenance import Made, made_by
from rewriter.roles import Role, find_roles
from rewriter.tensors import View

_TOP = 12
"""Operators that are counted by name."""

_LEAST = 1 << 10
"""Elements of a weight that is looked at."""


@dataclass(frozen=True)
class Holding:
    """The tensors of one role that are stored in one way.

    Attributes:
        role: what they are for; empty where the structure does not tell.
        stored: element type, or bits and operator where they are quantized.
        kind: ``float``, ``quantized``, or ``bias`` for what an operator adds to such a product.
        count: how many weights; their scales and zero points are not counted.
        elements: how many numbers those hold.
        nbytes: bytes of all, scales and zero points included.
    """

    role: str
    stored: str
    kind: Kind
    count: int
    elements: int
    nbytes: int


@dataclass(frozen=True)
class ModelInfo:
    """What a model is.

    Attributes:
        producer: name and version of what wrote it, as the file says.
        made: runs of this project that made it, the first first.
        ir_version: of ONNX.
        opsets: domain -> version; the standard domain is ``ai.onnx``.
        nodes: how many, in the graph, its subgraphs and functions.
        operators: the most frequent operators, with how many.
        functions: how many.
        inputs: name -> type and shape.
        outputs: likewise.
        layers: how many pairs of attention and feed-forward.
        nbytes: of all stored tensors.
        weights: by role and how they are stored, the most bytes first.
        blocks: the MoE blocks, in the order of the model.
    """

    producer: str
    made: tuple[Made, ...]
    ir_version: int
    opsets: Mapping[str, int]
    nodes: int
    operators: Mapping[str, int]
    functions: int
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    layers: int
    nbytes: int
    weights: tuple[Holding, ...]
    blocks: tuple[Block, ...]


def inspect(model: io.Model) -> ModelInfo:
    """Says what a model is: layers, MoE blocks and their form, weights by role. Nothing is quantized, run or written.

    Args:
        model: as for ``rewriter.apply``.

    Raises:
        ModelError: the model is unreadable or invalid.
        UsageError: it is no model.
    """
    return look(io.as_model(model))


def look(model: ir.Model) -> ModelInfo:
    """Looks at a model; reads a few integers, and a few blocks of one float weight of each role."""
    roles = find_roles(model)
    nodes = list(all_nodes(model))
    layers = {role.layer for role in roles.values() if role.layer is not None}
    return ModelInfo(
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        made=made_by(model.metadata_props),
        ir_version=model.ir_version,
        opsets={domain or "ai.onnx": version for domain, version in model.opset_imports.items()},
        nodes=len(nodes),
        operators=dict(Counter(node.op_type for node in nodes).most_common(_TOP)),
        functions=len(model.functions),
        inputs=_types(v for v in model.graph.inputs if v.name not in model.graph.initializers),
        outputs=_types(iter(model.graph.outputs)),
        layers=1 + max(layers, default=-1),
        nbytes=sum(slot.tensor.nbytes for slot in stored_tensors(model)),
        weights=_holdings(model, roles),
        blocks=find_blocks(model, roles),
    )


def _types(values: Iterator[ir.Value]) -> dict[str, str]:
    found = {}
    for value in values:
        shape = "" if value.shape is None else str(value.shape)
        found[value.name or ""] = f"{value.dtype.name if value.dtype is not None else 'unknown'}{shape}"
    return found


def _holdings(model: ir.Model, roles: Mapping[ir.Node, Role]) -> tuple[Holding, ...]:
    none = Role()
    counts: Counter[tuple[str, str, Kind]] = Counter()
    elements: Counter[tuple[str, str, Kind]] = Counter()
    sizes: Counter[tuple[str, str, Kind]] = Counter()
    born: dict[tuple[str, str, int], str] = {}
    for slot, role in with_roles(model, lambda node: roles.get(node, none)):
        bits, operator, codes = quantization(slot)
        tensor = slot.tensor
        kind: Kind = "quantized" if operator else "bias" if is_bias(slot) else "float"
        stored = {"quantized": f"{bits} bits, {operator}", "bias": f"{tensor.dtype.name}, biases"}
        name = tensor.dtype.name
        if kind == "float" and role.name:
            seen = (role.name, name, len(tensor.shape))
            if seen not in born:
                born[seen] = _born_as(tensor)
            name = ", ".join(filter(None, (name, born[seen])))
        key = (role.name, stored.get(kind, name), kind)
        sizes[key] += tensor.nbytes
        if codes or not operator:
            counts[key] += 1
            elements[key] += tensor.nbytes * 8 // bits if operator else tensor.size
    found = [Holding(*key, counts[key], elements[key], nbytes) for key, nbytes in sizes.items()]
    return tuple(sorted(found, key=lambda h: (-h.nbytes, h.role, h.stored)))


def _born_as(tensor: ir.TensorProtocol) -> str:
    """Returns the grid on which a sample of a float weight lies, and its bits per weight; empty where it lies on none.

    Args:
        tensor: [N, K] or [K, N], or a stack of such.
    """
    if tensor.size < _LEAST or not tensor.dtype.is_floating_point() or len(tensor.shape) not in (2, 3):
        return ""
    found = [
        (bits_per_weight(spec, view.shape[-1], view.dtype.numpy()), show(spec))
        for view in _turned(View.whole(tensor, tensor.name or ""))
        for spec in look_at(view).specs[:1]
    ]
    if not found:
        return ""
    bits, grid = min(found)  # the other way round, a weight may lie on a longer one by chance
    return f"on a grid of {grid}: {bits:.4g} bits without loss"


def _turned(view: View) -> Iterator[View]:
    """The weight with its last axis as input features, and with the one before it."""
    yield view
    yield view.transpose((*range(view.rank - 2), view.rank - 1, view.rank - 2))
