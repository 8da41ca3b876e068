"""What stays float in a rewritten model, and which rule declined there."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from rewriter.graph.contents import name_of, stored_tensors
from rewriter.inspection.kinds import is_bias, quantization
from rewriter.inspection.weights import RoleOf, operators, readers, role_of_tensor
from rewriter.quantize.job import PartTensor
from rewriter.report import Decline, Left


def left_in_float(model: ir.Model, declines: Iterable[Decline], role_of: RoleOf) -> tuple[Left, ...]:
    """Returns the matrices and stacks of matrices that stay float, the largest first.

    Biases, scales and zero points are none of them.

    Args:
        model: as rewritten.
        declines: of the run; the last at a node tells why, since what quantizes comes late.
        role_of: the role of a node; an unnamed role where it has none.
    """
    by_node = {decline.node: decline for decline in declines}
    found = []
    for slot in stored_tensors(model):
        tensor = slot.tensor
        if not tensor.dtype.is_floating_point() or len(tensor.shape) < 2 or isinstance(tensor, PartTensor):
            continue
        if is_bias(slot) or quantization(slot)[1]:
            continue
        nodes = list(readers(slot))
        why = next((by_node[name_of(node)] for node in nodes if name_of(node) in by_node), None)
        found.append(
            Left(
                name=slot.key if isinstance(slot.owner, ir.Value) else name_of(slot.owner),
                role=role_of_tensor(slot, role_of).name,
                nbytes=tensor.nbytes,
                readers=operators(slot),
                rule=why.rule if why else "",
                reason=why.reason if why else "",
            )
        )
    return tuple(sorted(found, key=lambda left: (-left.nbytes, left.name)))
