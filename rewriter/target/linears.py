"""What each provider's MatMulNBits runs, by version.

Source: the CPU rows were measured on each release's own wheel; the others are read off their kernels' checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rewriter.graph.declines import HALVES, OTHER_BITS, Reason
from rewriter.target.version import Version


@dataclass(frozen=True)
class LinearKernel:
    """What one provider's kernel of MatMulNBits runs, from one version on.

    Attributes:
        since: the first version.
        bits: dtype of x -> bit widths.
        takes_bias: whether it reads the bias slot.
    """

    since: Version
    bits: Mapping[str, tuple[int, ...]]
    takes_bias: bool

    def refusal(self, dtype: str, bits: int) -> str | None:
        """Returns why the kernel cannot run codes of ``bits`` on an x of ``dtype``, or None."""
        if dtype not in self.bits:
            return Reason(f"{dtype.lower()} has no kernel (it runs {', '.join(self.bits).lower()})", HALVES)
        if bits not in self.bits[dtype]:
            runs = ", ".join(map(str, self.bits[dtype]))
            return Reason(f"{bits} bits have no kernel in {dtype.lower()} (it runs {runs})", OTHER_BITS)
        return None


_FLOATS = ("FLOAT", "FLOAT16")

LINEARS: Mapping[str, tuple[LinearKernel, ...]] = {
    "cpu": (
        LinearKernel((1, 23), dict.fromkeys(_FLOATS, (4, 8)), takes_bias=True),
        LinearKernel((1, 24), {"FLOAT": (2, 4, 8), "FLOAT16": (4, 8)}, takes_bias=True),
        LinearKernel((1, 28), dict.fromkeys(_FLOATS, (2, 4, 8)), takes_bias=True),
    ),
    "cuda": (LinearKernel((1, 23), dict.fromkeys((*_FLOATS, "BFLOAT16"), (4, 8)), takes_bias=False),),
    "webgpu": (LinearKernel((1, 23), dict.fromkeys(_FLOATS, (2, 4, 8)), takes_bias=True),),
    "dml": (LinearKernel((1, 23), dict.fromkeys(_FLOATS, (4,)), takes_bias=False),),
}
"""Provider -> rows in the order of versions."""
