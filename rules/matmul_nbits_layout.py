"""MatMulNBits with B in one layout -> the same MatMulNBits with it in another: raw, or CUTLASS for sm80 or sm90.

Matched:      MatMulNBits(A, B, scales[, zero_points, g_idx, bias]), B constant
Replacement:  the same node with B laid out anew and weight_prepacked 0, 1 (sm80) or 2 (sm90)
Declines when:
              B is not constant, or does not belong to N, K, bits and block_size
              the target does not read the wanted layout, or N and K do not allow it
Source:       com.microsoft::MatMulNBits; only CUDA reads prepacked weights
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.emit import write_operator
from rewriter.graph.attributes import integer_attribute
from rewriter.graph.declines import no_kernel
from rewriter.operators.layout.stored import Layout, Refusal, by_name
from rewriter.operators.matmul_nbits import LAYOUTS, MATMUL_NBITS, PARTS, RAW, attributes_of
from rewriter.operators.operator import DOMAIN, input_at
from rewriter.operators.qmoe import LayoutName
from rewriter.quantize.types import QuantizedShape
from rewriter.rule import Declined, NotApplicable, Rule
from rewriter.rules.blocks.guards import require_constant
from rewriter.tensors import RowsTensor, View


class BTensor(RowsTensor):
    """B in another layout, as one row: the CUTLASS layout has no rows of its own.

    Attributes:
        key: equal for equal tensors, so that the commit can share them.
    """

    def __init__(self, view: View, relaid: Any, layout: tuple[object, ...], name: str) -> None:
        super().__init__(lambda *_: relaid(np.asarray(view.numpy())), view.dtype, view.shape, name, (view,))
        self.key = (layout, view)

    def tofile(self, file: Any) -> None:
        """Writes it whole; it is one weight."""
        ir.LazyTensor.tofile(self, file)


class MatMulNBitsLayout(Rule):
    """The rule at a MatMulNBits."""

    def __init__(self, layout: LayoutName | Literal["auto"]) -> None:
        super().__init__(name="matmul-nbits-layout")
        self._layout = layout

    def pattern(self, op: Any, a: Any, b: Any) -> Any:
        return op.MatMulNBits(a, b, _allow_other_inputs=True, _domain=DOMAIN, _outputs=["y"])

    def rewrite(self, op: Any, *, a: ir.Value, b: ir.Value, y: ir.Value) -> Any:
        del a
        node = y.producer()
        assert node is not None
        n, k, bits = (integer_attribute(node, name, 4 * (name == "bits")) for name in ("N", "K", "bits"))
        block = integer_attribute(node, "block_size", 0)
        code = integer_attribute(node, "weight_prepacked", 0)
        before = LAYOUTS[code] if code in range(len(LAYOUTS)) else RAW
        wanted = self._wanted(node)
        if wanted is before:
            raise NotApplicable
        view = require_constant(self.run.facts, b, "B")
        shape = QuantizedShape(n, k, bits, block)
        old, new = before.of(shape), wanted.of(shape)
        if isinstance(old, Refusal):
            raise Declined(old.reason, node)
        if isinstance(new, Refusal):
            raise Declined(new.reason, node)
        if view.size != math.prod(old.codes):
            raise Declined(f"B has shape {list(view.shape)}, which is not that of N, K, bits and block_size", b)

        def relaid(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return new.pack_codes(old.unpack_codes(stored)).reshape(stored.shape)

        attributes: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}
        attributes.pop("weight_prepacked", None)
        if wanted is not RAW:
            attributes["weight_prepacked"] = LAYOUTS.index(wanted)
        name = f"{view.name}_{wanted.name}"
        inputs = list(node.inputs)
        inputs[1] = op.initializer(BTensor(view, relaid, (before.name, wanted.name, n, k, bits, block), name))
        return write_operator(op, MATMUL_NBITS, inputs, attributes)

    def _wanted(self, node: ir.Node) -> Layout:
        """The layout that is asked for, raw by default; declines where the target does not read it."""
        wanted = by_name(LAYOUTS, RAW.name if self._layout == "auto" else self._layout)
        assert wanted is not None, "options are checked as they are read"
        x, own = node.inputs[0], attributes_of(node)
        dtype = "FLOAT" if x is None or x.dtype is None else x.dtype.name
        symmetric = input_at(node, PARTS[2]) is None
        kernel, name = self.run.target.linear, wanted.name
        reason = kernel.refusal(dtype, own.bits, own.block, symmetric=symmetric, layout=name)
        if reason and wanted is not RAW:
            raise no_kernel(MATMUL_NBITS.name, self.run.target, reason, node)
        return wanted


def rule(*, layout: LayoutName | Literal["auto"] = "auto") -> Rule:
    """Builds the rule.

    Args:
        layout: what B is to be in; auto is raw, which every target reads.
    """
    return MatMulNBitsLayout(layout)
