"""What each provider's MoE and QMoE run, by version.

Source: ``benchmarks/prober/measured`` holds what runtimes computed, and the tests hold these rows to it: the CPU's of
each release's own wheel, CUDA's of 1.31. CUDA's other versions and WebGPU's rows are read off their kernels' checks
and schemas, less what 1.31 was measured to compute wrongly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rewriter.graph.declines import GLU_ON_CUDA, HALVES, ONE_SPEC, OTHER_BITS, OTHER_BLOCK_SIZE, Reason
from rewriter.operators.activation import SWIGLU
from rewriter.operators.form import ExpertForm
from rewriter.operators.moe import MOE
from rewriter.operators.operator import Version
from rewriter.operators.qmoe import QMOE
from rewriter.quantize.formats import FormatName
from rewriter.quantize.types import QuantizedShape

Blocks = Mapping[int, tuple[int, ...]]
"""Bits -> block sizes."""


@dataclass(frozen=True)
class Kernel:
    """One of the ways in which a provider runs MoE or QMoE, from one version on.

    Attributes:
        since: the first version.
        dtypes: of x.
        activations: values of ``activation_type``.
        fusions: values of ``swiglu_fusion`` other than 0, of every gated activation.
        fc3: activations that may be gated by an fc3.
        sparse_mixer: whether ``use_sparse_mixer`` is heeded.
        unnormalized: dtypes in which ``normalize_routing_weights=0`` is heeded where no router_weights are given.
        router_weights: of QMoE, values of ``normalize_routing_weights`` at which router_weights are heeded.
        constants: alpha, beta and limit that SwiGLU is computed with whatever the attributes say, or None.
        format: of QMoE, what codes and scales are.
        blocks: of QMoE, bits -> legal block sizes, 0 for a whole row.
        mixed_bits: of QMoE, pairs of widths of fc1 and fc2; empty where all projections have one width.
        zero_point_blocks: of QMoE, block sizes that may have zero points.
        padded_zero_points: of QMoE, widths of which a row's zero points may end within a byte.
        mixed_zero_points: of QMoE, bits -> block sizes at which one projection may have zero points and another none.
        single_block: of QMoE, whether rows may be one block each: any; alike (with no zero points, and where fc1's
            are, all are; zero points of 8 bits may stand beside an fc2 that is); or wide, alike and of 8 bits alone.
        multiple: of QMoE, what H and I must be multiples of.
        int8_activations: of QMoE, (bits, smallest block) at which the kernel rounds activations to 8 bits.
        layouts: of QMoE, names of the layouts that it reads, the preferred first.
        judges: whether its numbers hold the tolerance of a proof.
    """

    since: Version
    dtypes: tuple[str, ...] = ("FLOAT", "FLOAT16")
    activations: tuple[str, ...] = ("relu", "gelu", "silu", "identity", "swiglu")
    fusions: tuple[int, ...] = (1,)
    fc3: tuple[str, ...] = ()
    sparse_mixer: bool = False
    unnormalized: tuple[str, ...] = ("FLOAT", "FLOAT16", "BFLOAT16")
    router_weights: tuple[bool, ...] = ()
    constants: tuple[float, float, float] | None = None
    format: FormatName = "int"
    blocks: Blocks | None = None
    mixed_bits: tuple[tuple[int, int], ...] = ()
    zero_point_blocks: tuple[int, ...] = ()
    padded_zero_points: tuple[int, ...] = (2, 4, 8)
    mixed_zero_points: Blocks = field(default_factory=dict)
    single_block: Literal["any", "alike", "wide"] = "any"
    multiple: int = 1
    int8_activations: tuple[tuple[int, int], ...] = ()
    layouts: tuple[str, ...] = ("raw",)
    judges: bool = True

    def refusal(self, form: ExpertForm, dtype: str, *, weighted: bool = False) -> str | None:
        """Returns why the kernel cannot run a node of this form and dtype, or runs it wrongly, or None.

        Args:
            form: what the node computes.
            dtype: of x.
            weighted: whether router_weights are given.
        """
        if form.activation not in self.activations:
            runs = f"activation '{form.activation}' has no kernel (it runs {', '.join(self.activations)})"
            return Reason(runs, GLU_ON_CUDA if form.activation in ("geglu", "relu2") else "")
        if dtype not in self.dtypes:
            return Reason(f"{dtype.lower()} has no kernel (it runs {', '.join(self.dtypes).lower()})", HALVES)
        if form.gated and form.activation not in self.fc3:
            return f"fc3 beside '{form.activation}' has no kernel"
        if form.glu and not form.gated and form.fusion not in self.fusions:
            return f"swiglu_fusion={form.fusion} has no kernel (it runs {', '.join(map(str, self.fusions))})"
        if form.sparse_mixer and not self.sparse_mixer:
            return "use_sparse_mixer has no kernel"
        if form.activation == SWIGLU.name and self.constants and not _same(form, self.constants):
            return f"its SwiGLU is fixed to alpha, beta and limit {self.constants}"
        if weighted and form.normalize not in self.router_weights:
            value = f" at normalize_routing_weights={int(form.normalize)}" if self.router_weights else ""
            return f"router_weights are not heeded{value}"
        if not (form.normalize or form.sparse_mixer or weighted or dtype in self.unnormalized):
            return f"normalize_routing_weights=0 is not heeded in {dtype.lower()}"
        return None

    def cannot_hold(self, projections: Sequence[QuantizedShape], layout: str) -> str | None:
        """Returns why the kernel of QMoE cannot run weights that are held so, or runs them wrongly, or None.

        Args:
            projections: fc1, fc2 and perhaps fc3, of one block size.
            layout: its name.
        """
        return (
            self.unknown_format([own.format for own in projections])
            or self.unknown_widths([own.bits for own in projections])
            or self._unknown_blocks(projections, layout)
            or self._misread_zero_points(projections)
            or self._misread_rows(projections)
        )

    def unknown_format(self, formats: Sequence[str]) -> str | None:
        """Returns why the kernel of QMoE has no codes of these formats, or None."""
        other = next((own for own in formats if own != self.format), None)
        return None if other is None else Reason(f"it runs {self.format}, not {other}", OTHER_BITS)

    def unknown_widths(self, bits: Sequence[int]) -> str | None:
        """Returns why the kernel of QMoE has no codes of these widths of fc1, fc2 and perhaps fc3, or None."""
        blocks = self.blocks or {}
        for own in bits:
            if own not in blocks:
                return Reason(f"it runs {', '.join(map(str, blocks))} bits, not {own}", OTHER_BITS)
        widths = (bits[0], bits[1])
        differ = len(set(bits)) > 1
        if differ and (widths not in self.mixed_bits or bits[2:] not in ([], [bits[0]])):
            shown = " and ".join(f"fc{index} {own}" for index, own in enumerate(bits, 1))
            return Reason(f"no kernel runs projections of different bits ({shown})", ONE_SPEC)
        if self.mixed_bits and not differ:
            return Reason(f"it runs projections of different bits, not {bits[0]} for all", OTHER_BITS)
        return None

    def _unknown_blocks(self, projections: Sequence[QuantizedShape], layout: str) -> str | None:
        for own in projections:
            if own.block not in (self.blocks or {})[own.bits]:
                reason = f"the target has no kernel for {own.bits} bits in blocks of {own.block}"
                return Reason(reason, OTHER_BLOCK_SIZE)
            if own.k % self.multiple:
                return f"K = {own.k} is not a multiple of {self.multiple}, as the target's kernel needs"
        return None if layout in self.layouts else f"the {layout} layout has no kernel"

    def _misread_zero_points(self, projections: Sequence[QuantizedShape]) -> str | None:
        block, asymmetric = projections[0].block, [own for own in projections if not own.symmetric]
        for own in asymmetric:
            if self.mixed_bits and not self.zero_point_blocks:
                return "the target takes no zero points where projections have different bits"
            if block not in self.zero_point_blocks:
                return Reason(f"the target takes no zero points in blocks of {block}", OTHER_BLOCK_SIZE)
            rows = own.blocks if block else own.n
            if rows * own.bits % 8 and own.bits not in self.padded_zero_points:
                return f"the target misreads {rows} zero points of {own.bits} bits, which end within a byte"
        mixed = 0 < len(asymmetric) < len(projections)
        if mixed and any(block not in self.mixed_zero_points.get(own.bits, ()) for own in projections):
            return Reason("the target takes zero points for all projections or for none", ONE_SPEC)
        return None

    def _misread_rows(self, projections: Sequence[QuantizedShape]) -> str | None:
        block, single = projections[0].block, [own.k == projections[0].block for own in projections]
        narrow = any(own.bits < 8 for own in projections)
        if self.single_block == "wide" and any(single) and narrow:
            return f"the target runs no rows of one block of {block}"
        alike = self.single_block != "any"
        asymmetric = not all(own.symmetric for own in projections)
        if alike and any(single) and asymmetric and (single[0] or narrow):
            return f"the target takes no zero points where a row is one block of {block}"
        if alike and single[0] and not all(single):
            return f"the target runs no rows of one block of {block} in fc1 beside rows of several"
        return None

    def rounds_activations(self, bits: int, block: int, accuracy_level: int = 0) -> bool:
        """Whether QMoE computes with 8-bit activations, so that its numbers cannot prove a rewrite."""
        rounding = any(bits == own and block >= least for own, least in self.int8_activations)
        return rounding or (accuracy_level == 4 and block > 0)


def _same(form: ExpertForm, constants: tuple[float, float, float]) -> bool:
    """Whether a form's attributes, which are stored in float32, are these."""
    return all(map(functools.partial(math.isclose, rel_tol=1e-6), (form.alpha, form.beta, form.limit), constants))


_ALL_BLOCKS = (0, 16, 32, 64, 128, 256)
_GPU_BLOCKS = (0, 32, 64, 128)
_GPT_OSS = (1.702, 1.0, 7.0)
_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")

# Before 1.32 it may write over x, not yet read when it clears what normalize_routing_weights=0 adds to.
_CPU_MOE = Kernel((1, 23), unnormalized=())
_CPU_MOE_1_32 = replace(_CPU_MOE, since=(1, 32), unnormalized=_CPU_MOE.dtypes)
_CPU_1_23 = Kernel(
    (1, 23),
    activations=("swiglu",),
    unnormalized=(),
    blocks={4: (16, 32), 8: _ALL_BLOCKS},
    single_block="wide",
)
# Its first patches compute other blocks and activations wrongly, or not at all; the later ones are as 1.25.
_CPU_1_24 = replace(_CPU_1_23, since=(1, 24), zero_point_blocks=_ALL_BLOCKS, mixed_zero_points={8: _ALL_BLOCKS})
_CPU_1_25 = replace(
    _CPU_1_24,
    since=(1, 25),
    activations=_CPU_MOE.activations,
    router_weights=(True, False),
    blocks=dict.fromkeys((4, 8), _ALL_BLOCKS),
    mixed_zero_points={8: _ALL_BLOCKS},
    single_block="alike",
)
_CPU_1_27 = replace(
    _CPU_1_25,
    since=(1, 27),
    blocks=dict.fromkeys((2, 4, 8), _ALL_BLOCKS),
    # Codes of 4 bits are 2 to 8 % off where only one projection has zero points.
    mixed_zero_points={2: _ALL_BLOCKS, 8: _ALL_BLOCKS},
    int8_activations=((2, 32),),
)
_CPU_1_31 = replace(
    _CPU_1_27,
    since=(1, 31),
    single_block="any",
    # Of whole rows in 4 bits it is 1 to 6 % off where only one projection has zero points.
    mixed_zero_points={2: _ALL_BLOCKS, 4: _ALL_BLOCKS[1:], 8: _ALL_BLOCKS},
    int8_activations=((2, 32), (8, 16)),
)
# The path of the layouts that the CPU provider shares with CUDA; it does not divide router_weights by their sum.
_CPU_SHARED = Kernel(
    (1, 32),
    dtypes=_FLOATS,
    activations=("swiglu",),
    router_weights=(False,),
    blocks={4: (32, 64, 128)},
    multiple=64,
    layouts=("cutlass-sm80",),
)
_CUDA_MOE = Kernel((1, 23), dtypes=_FLOATS, sparse_mixer=True, constants=_GPT_OSS)
_CUDA_MOE_1_28 = replace(_CUDA_MOE, since=(1, 28), fusions=(1, 2), constants=None)
_CUDA_1_23 = Kernel(
    (1, 23),
    dtypes=("FLOAT16", "BFLOAT16"),
    constants=_GPT_OSS,
    blocks=dict.fromkeys((4, 8), _GPU_BLOCKS),
    padded_zero_points=(8,),
    single_block="alike",
    multiple=64,
    layouts=("cutlass-sm80", "cutlass-sm90"),
)
_CUDA_1_24 = replace(_CUDA_1_23, since=(1, 24), zero_point_blocks=_GPU_BLOCKS[1:])
_CUDA_1_28 = replace(_CUDA_1_24, since=(1, 28), fusions=(1, 2), constants=None, layouts=("cutlass-sm80", "raw"))
_CUDA_1_31 = replace(_CUDA_1_28, since=(1, 31), single_block="any")
# What the CUTLASS kernels do not read is dequantized first.
_CUDA_2_BITS = replace(
    _CUDA_1_31,
    blocks={2: (16, *_GPU_BLOCKS[1:])},
    padded_zero_points=(2, 8),
    multiple=1,
    layouts=("raw",),
)
_CUDA_MIXED = replace(
    _CUDA_1_31,
    blocks=dict.fromkeys((2, 4, 8), (16, *_GPU_BLOCKS[1:])),
    mixed_bits=((4, 8), (8, 4), (2, 4)),
    zero_point_blocks=(),
    layouts=("raw",),
)
_CPU_3_BITS = replace(
    _CPU_SHARED, dtypes=("FLOAT16", "BFLOAT16"), blocks={3: (32, 64, 128)}, multiple=1, layouts=("raw",)
)
# In halves it is up to 1.8e-3 of the largest output off.
_CPU_MXFP4 = replace(
    _CPU_SHARED,
    dtypes=("FLOAT16", "BFLOAT16"),
    format="mxfp4",
    blocks={4: (32,)},
    multiple=1,
    layouts=("raw",),
    judges=False,
)
_CPU_NVFP4 = replace(_CPU_MXFP4, format="nvfp4", blocks={4: (16,)})
# In float32 it rounds activations, to more than 8 bits: 5e-3 of the largest output.
_CPU_MXFP4_FLOAT = replace(_CPU_MXFP4, dtypes=("FLOAT",), int8_activations=((4, 32),))
_CPU_NVFP4_FLOAT = replace(_CPU_NVFP4, dtypes=("FLOAT",), int8_activations=((4, 16),))
_CUDA_MXFP4 = Kernel(
    (1, 31),
    dtypes=("FLOAT16",),
    activations=("swiglu",),
    format="mxfp4",
    blocks={4: (32,)},
    multiple=64,
    layouts=("columns",),
)
_CUDA_NVFP4 = replace(_CUDA_MXFP4, format="nvfp4", blocks={4: (16,)})
_CUDA_ACTIVATIONS_1_32 = (*_CUDA_MOE.activations, "relu2", "geglu")
# Its MoE is registered and fails when it runs: a kernel was proposed (onnxruntime#32447), with more of QMoE, and
# was still open in September 2026.
_WEBGPU_QMOE = Kernel(
    (1, 24),
    activations=("swiglu",),
    unnormalized=(),
    blocks=dict.fromkeys((4, 8), _GPU_BLOCKS[1:]),
    single_block="alike",
)


def _also_1_32(kernel: Kernel) -> tuple[Kernel, Kernel]:
    return kernel, replace(kernel, since=(1, 32), activations=_CUDA_ACTIVATIONS_1_32)


KERNELS: Mapping[tuple[str, str], tuple[tuple[Kernel, ...], ...]] = {
    ("cpu", MOE.name): ((_CPU_MOE, _CPU_MOE_1_32),),
    ("cpu", QMOE.name): (
        (_CPU_1_23, _CPU_1_24, _CPU_1_25, _CPU_1_27, _CPU_1_31),
        (_CPU_SHARED,),
        (_CPU_3_BITS,),
        *((kernel,) for kernel in (_CPU_MXFP4, _CPU_NVFP4, _CPU_MXFP4_FLOAT, _CPU_NVFP4_FLOAT)),
    ),
    ("cuda", MOE.name): ((_CUDA_MOE, *_also_1_32(_CUDA_MOE_1_28)),),
    ("cuda", QMOE.name): (
        (_CUDA_1_23, _CUDA_1_24, _CUDA_1_28, *_also_1_32(_CUDA_1_31)),
        _also_1_32(_CUDA_2_BITS),
        _also_1_32(_CUDA_MIXED),
        *((_CUDA_MXFP4,), (_CUDA_NVFP4,)),
    ),
    ("webgpu", QMOE.name): ((_WEBGPU_QMOE, replace(_WEBGPU_QMOE, since=(1, 31), single_block="any")),),
}
"""(Provider, operator) -> its kernels, the preferred first, each as rows in the order of versions.

Of each, the last row that is not newer than the target holds.
"""
