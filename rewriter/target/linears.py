"""What each provider's MatMulNBits runs, by version.

Source: ``benchmarks/prober/measured`` holds what runtimes computed, and the tests hold these rows to it: the CPU's of
each release's own wheel, CUDA's of 1.31. The others are read off their kernels' checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rewriter.graph.declines import HALVES, OTHER_BITS, OTHER_BLOCK_SIZE, OTHER_TARGET, Reason
from rewriter.operators.operator import Version


@dataclass(frozen=True)
class LinearKernel:
    """What one provider's kernel of MatMulNBits runs, from one version on.

    Attributes:
        since: the first version.
        bits: dtype of x -> bit widths.
        takes_bias: whether it reads the bias slot.
        blocks: bits -> block sizes; widths that are left out have all.
        prepacked: layouts that it reads beside raw ones: of float16, in blocks of 32 without zero points.
    """

    since: Version
    bits: Mapping[str, tuple[int, ...]]
    takes_bias: bool
    blocks: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    prepacked: tuple[str, ...] = ()

    def refusal(
        self, dtype: str, bits: int, block: int = 32, *, symmetric: bool = True, layout: str = "raw"
    ) -> str | None:
        """Returns why the kernel cannot run a weight B on an x of ``dtype``, or None.

        Args:
            dtype: of x.
            bits: width of a code.
            block: input features per scale.
            symmetric: True for no zero points.
            layout: its name.
        """
        if dtype not in self.bits:
            return Reason(f"{dtype.lower()} has no kernel (it runs {', '.join(self.bits).lower()})", HALVES)
        if bits not in self.bits[dtype]:
            runs = ", ".join(map(str, self.bits[dtype]))
            return Reason(f"{bits} bits have no kernel in {dtype.lower()} (it runs {runs})", OTHER_BITS)
        if block not in (legal := self.blocks.get(bits, _BLOCKS)):
            runs = ", ".join(map(str, legal))
            return Reason(f"{bits} bits in blocks of {block} have no kernel (it runs {runs})", OTHER_BLOCK_SIZE)
        if layout not in ("raw", *self.prepacked):
            return Reason(f"it does not read {layout}", OTHER_TARGET)
        if layout != "raw" and (dtype != "FLOAT16" or bits not in (4, 8) or block != 32 or not symmetric):
            return f"it reads {layout} of float16 only, 4 or 8 bits in blocks of 32 without zero points"
        return None


_BLOCKS = (16, 32, 64, 128, 256)
_FLOATS = ("FLOAT", "FLOAT16")

# Of one token, 4 bits in blocks of 256 fail.
_CUDA = LinearKernel((1, 23), dict.fromkeys((*_FLOATS, "BFLOAT16"), (4, 8)), takes_bias=False, blocks={4: _BLOCKS[:-1]})
_CUDA_1_31 = replace(
    _CUDA,
    since=(1, 31),
    bits=dict.fromkeys(_FLOATS, (2, 4, 8)) | {"BFLOAT16": (4, 8)},
    takes_bias=True,
    prepacked=("cutlass-sm80",),
)

LINEARS: Mapping[str, tuple[LinearKernel, ...]] = {
    "cpu": (
        LinearKernel((1, 23), dict.fromkeys(_FLOATS, (4, 8)), takes_bias=True),
        LinearKernel((1, 24), {"FLOAT": (2, 4, 8), "FLOAT16": (4, 8)}, takes_bias=True),
        LinearKernel((1, 28), dict.fromkeys(_FLOATS, (2, 4, 8)), takes_bias=True),
    ),
    "cuda": (_CUDA, replace(_CUDA, since=(1, 28), prepacked=("cutlass-sm80",)), _CUDA_1_31),
    "webgpu": (LinearKernel((1, 23), dict.fromkeys(_FLOATS, (2, 4, 8)), takes_bias=True),),
    "dml": (LinearKernel((1, 23), dict.fromkeys(_FLOATS, (4,)), takes_bias=False),),
}
"""Provider -> rows in the order of versions."""
