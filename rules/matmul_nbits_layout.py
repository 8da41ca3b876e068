"""MatMulNBits with B in one layout -> the same MatMulNBits with it in another: raw, or CUTLASS for sm80 or sm90.

Matched:      MatMulNBits(A, B, scales[, zero_points, g_idx, bias]), B constant
Replacement:  the same node with B laid out anew and weight_prepacked 0, 1 (sm80) or 2 (sm90)
Declines when:
              B is not constant, or does not belong to N, K, bits and block_size
              the target does not read the wanted layout, or N and K do not allow it
Source:       com.microsoft::MatMulNBits; only CUDA reads prepacked weights
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.errors import QuantizationError
from rewriter.operators.layout import cutlass, matmul_nbits, qmoe
from rewriter.operators.layout.packing import pack_codes
from rewriter.rule import Declined, NotApplicable, Rule
from rewriter.rules.blocks.guards import integer_attribute, require_constant
from rewriter.rules.blocks.stored_qmoe import LayoutName
from rewriter.tensors import RowsTensor, View

_DOMAIN = "com.microsoft"
_PREPACKED = (None, *cutlass.ARCHITECTURES)
"""``weight_prepacked`` is the index."""


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
        return op.MatMulNBits(a, b, _allow_other_inputs=True, _domain=_DOMAIN, _outputs=["y"])

    def rewrite(self, op: Any, *, a: ir.Value, b: ir.Value, y: ir.Value) -> Any:
        del a
        node = y.producer()
        assert node is not None
        n, k, bits = (integer_attribute(node, name, 4 * (name == "bits")) for name in ("N", "K", "bits"))
        block = integer_attribute(node, "block_size", 0)
        code = integer_attribute(node, "weight_prepacked", 0)
        before = _PREPACKED[code] if code in range(len(_PREPACKED)) else None
        wanted = self._wanted(node)
        if wanted == before:
            raise NotApplicable
        view = require_constant(self.run.facts, b, "B")
        for layout in (before, wanted):
            if reason := matmul_nbits.illegal(n, k, bits, block, prepacked=layout):
                raise Declined(reason, node)
        try:
            if view.size != int(np.prod(matmul_nbits.shapes(n, k, bits, block, True)[0])):
                raise Declined(f"B has shape {list(view.shape)}, which is not that of N, K, bits and block_size", b)
        except QuantizationError as error:
            raise Declined(str(error), node) from error

        def relaid(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
            codes = matmul_nbits.unpack_b(stored, n, k, bits, block, prepacked=before)
            packed = pack_codes(codes, bits) if wanted is None else cutlass.pack(codes, bits, wanted)
            return packed.reshape(stored.shape)

        attributes: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}
        attributes.pop("weight_prepacked", None)
        if wanted is not None:
            attributes["weight_prepacked"] = _PREPACKED.index(wanted)
        name = f"{view.name}_{qmoe.layout_name(wanted)}"
        inputs = list(node.inputs)
        inputs[1] = op.initializer(BTensor(view, relaid, (before, wanted, n, k, bits, block), name))
        return op.MatMulNBits(*inputs, _domain=_DOMAIN, **attributes)

    def _wanted(self, node: ir.Node) -> int | None:
        layouts = self.run.target.matmul_nbits_layouts
        wanted = layouts[0] if self._layout == "auto" else qmoe.layout_of(self._layout)
        if wanted not in layouts:
            known = ", ".join(map(qmoe.layout_name, layouts))
            raise Declined(f"MatMulNBits on {self.run.target} reads {known}, not {qmoe.layout_name(wanted)}", node)
        return wanted


def rule(*, layout: LayoutName | Literal["auto"] = "auto") -> Rule:
    """Builds the rule.

    Args:
        layout: what B is to be in; auto is what the target prefers.
    """
    return MatMulNBitsLayout(layout)
