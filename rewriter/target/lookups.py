"""What each provider's GatherBlockQuantized reads over uint8 data, by version.

Source: the CPU rows were measured on each release's own wheel (before 1.27 it reads zero points that end within a byte
from the wrong places, and says nothing); CUDA's and WebGPU's are read off their kernels. DirectML has none, and leaves
the node to the CPU's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rewriter.graph.declines import HALVES, OTHER_BITS, Reason
from rewriter.operators.operator import Version


@dataclass(frozen=True)
class LookupKernel:
    """What one provider's kernel of GatherBlockQuantized reads, from one version on.

    Attributes:
        since: the first version.
        bits: widths of codes.
        dtypes: of the scales.
        symmetric: whether codes without zero points are taken from 2^(bits-1), as they are written.
        padded_zero_points: whether a row's zero points may end within a byte.
        partial_blocks: whether a row may end within a block.
    """

    since: Version
    bits: tuple[int, ...] = (2, 4, 8)
    dtypes: tuple[str, ...] = ("FLOAT", "FLOAT16")
    symmetric: bool = True
    padded_zero_points: bool = True
    partial_blocks: bool = True

    def refusal(self, dtype: str, k: int, bits: int, block: int, *, symmetric: bool) -> str | None:
        """Returns why the kernel cannot read rows, or reads them wrongly, or None.

        Args:
            dtype: of the scales.
            k: codes of a row along the quantized axis.
            bits: width of a code.
            block: codes per scale.
            symmetric: True for no zero points.
        """
        if dtype not in self.dtypes:
            return Reason(f"{dtype.lower()} has no kernel (it runs {', '.join(self.dtypes).lower()})", HALVES)
        if bits not in self.bits:
            return Reason(f"{bits} bits have no kernel (it runs {', '.join(map(str, self.bits))})", OTHER_BITS)
        if symmetric and not self.symmetric:
            return "it misreads codes without zero points; quantize the table with symmetric: false"
        if k % block and not self.partial_blocks:
            return f"it misreads rows of K = {k} that end within a block of {block}"
        blocks = -(-k // block)
        if not symmetric and blocks * bits % 8 and not self.padded_zero_points:
            return f"it misreads the zero points of rows of {blocks} blocks, {bits} bits each, which end within a byte"
        return None


_CPU = (LookupKernel((1, 23), bits=(4, 8), padded_zero_points=False), LookupKernel((1, 27)))
_CUDA = LookupKernel(
    (1, 23),
    bits=(4, 8),
    dtypes=("FLOAT", "FLOAT16", "BFLOAT16"),
    symmetric=False,
    padded_zero_points=False,
    partial_blocks=False,
)

LOOKUPS: Mapping[str, tuple[LookupKernel, ...]] = {
    "cpu": _CPU,
    "cuda": (_CUDA, replace(_CUDA, since=(1, 27), symmetric=True)),
    "webgpu": (LookupKernel((1, 23), bits=(4, 8), padded_zero_points=False),),
    "dml": _CPU,
}
"""Provider -> rows in the order of versions."""
