"""What each provider's MoE and QMoE run, by version.

Source: the CPU rows were measured on each release's own wheel; CUDA's and WebGPU's are read off their kernels' checks,
and CUDA's activations of 1.32 off the documentation in that release's schemas.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rewriter.graph.declines import GLU_ON_CUDA, HALVES, Reason
from rewriter.operators.activation import SWIGLU
from rewriter.operators.form import ExpertForm
from rewriter.operators.moe import MOE
from rewriter.operators.qmoe import QMOE
from rewriter.target.version import Version


@dataclass(frozen=True)
class Kernel:
    """What one provider's kernel of MoE or QMoE runs, from one version on.

    Attributes:
        since: the first version.
        dtypes: of x.
        activations: values of ``activation_type``.
        fusions: values of ``swiglu_fusion`` other than 0, of every gated activation.
        fc3: activations that may be gated by an fc3.
        sparse_mixer: whether ``use_sparse_mixer`` is heeded.
        unnormalized: dtypes in which ``normalize_routing_weights=0`` is heeded where no router_weights are given.
        constants: alpha, beta and limit that SwiGLU is computed with whatever the attributes say, or None.
        blocks: of QMoE, bits -> legal block sizes, 0 for a whole row.
        zero_point_blocks: of QMoE, block sizes that may have zero points.
        single_block: of QMoE, whether rows may be one block each: any, alike (with no zero points, and where fc1's
            are, all are), or never.
        mixed_zero_points: of QMoE, whether one projection may have zero points and another none.
        mixed_bits: of QMoE, whether projections may differ in bits.
        multiple: of QMoE, what H and I must be multiples of.
        int8_activations: of QMoE, (bits, smallest block) at which the kernel rounds activations to 8 bits.
        layouts: of QMoE, names of the layouts that it reads, the preferred first.
    """

    since: Version
    dtypes: tuple[str, ...] = ("FLOAT", "FLOAT16")
    activations: tuple[str, ...] = ("relu", "gelu", "silu", "identity", "swiglu")
    fusions: tuple[int, ...] = (1,)
    fc3: tuple[str, ...] = ()
    sparse_mixer: bool = False
    unnormalized: tuple[str, ...] = ("FLOAT", "FLOAT16", "BFLOAT16")
    constants: tuple[float, float, float] | None = None
    blocks: Mapping[int, tuple[int, ...]] | None = None
    zero_point_blocks: tuple[int, ...] = ()
    single_block: Literal["any", "alike", "never"] = "any"
    mixed_zero_points: bool = True
    mixed_bits: bool = False
    multiple: int = 1
    int8_activations: tuple[tuple[int, int], ...] = ()
    layouts: tuple[str, ...] = ("raw",)

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
        if not (form.normalize or form.sparse_mixer or weighted or dtype in self.unnormalized):
            return f"normalize_routing_weights=0 is not heeded in {dtype.lower()}"
        return None


def _same(form: ExpertForm, constants: tuple[float, float, float]) -> bool:
    """Whether a form's attributes, which are stored in float32, are these."""
    return all(map(functools.partial(math.isclose, rel_tol=1e-6), (form.alpha, form.beta, form.limit), constants))


_ALL_BLOCKS = (0, 16, 32, 64, 128, 256)
_GPU_BLOCKS = (0, 32, 64, 128)
_GPT_OSS = (1.702, 1.0, 7.0)

# Before 1.32 it may write over x, not yet read when it clears what normalize_routing_weights=0 adds to.
_CPU_MOE = Kernel((1, 23), unnormalized=())
_CPU_MOE_1_32 = replace(_CPU_MOE, since=(1, 32), unnormalized=_CPU_MOE.dtypes)
_CPU_1_23 = Kernel(
    (1, 23),
    activations=("swiglu",),
    unnormalized=(),
    blocks={4: (16, 32), 8: _ALL_BLOCKS},
    mixed_zero_points=False,
    single_block="never",
)
_CPU_1_24 = replace(_CPU_1_23, since=(1, 24), zero_point_blocks=_ALL_BLOCKS)
_CPU_1_25 = replace(
    _CPU_1_24,
    since=(1, 25),
    activations=_CPU_MOE.activations,
    blocks=dict.fromkeys((4, 8), _ALL_BLOCKS),
    single_block="alike",
)
_CPU_1_27 = replace(_CPU_1_25, since=(1, 27), blocks=dict.fromkeys((2, 4, 8), _ALL_BLOCKS), int8_activations=((2, 32),))
_CPU_1_31 = replace(
    _CPU_1_27,
    since=(1, 31),
    single_block="any",
    mixed_zero_points=True,
    int8_activations=((2, 32), (8, 16)),
)
_CUDA_MOE = Kernel(
    (1, 23), dtypes=("FLOAT", "FLOAT16", "BFLOAT16"), fc3=("silu",), sparse_mixer=True, constants=_GPT_OSS
)
_CUDA_1_23 = Kernel(
    (1, 23),
    dtypes=("FLOAT16", "BFLOAT16"),
    sparse_mixer=True,
    constants=_GPT_OSS,
    blocks=dict.fromkeys((4, 8), _GPU_BLOCKS),
    single_block="alike",
    mixed_zero_points=False,
    multiple=64,
    layouts=("cutlass-sm80", "cutlass-sm90"),
)
_CUDA_1_24 = replace(_CUDA_1_23, since=(1, 24), zero_point_blocks=_GPU_BLOCKS[1:])
_CUDA_1_28 = replace(_CUDA_1_24, since=(1, 28), fusions=(1, 2), constants=None, layouts=("raw", "cutlass-sm80"))
_CUDA_1_31 = replace(_CUDA_1_28, since=(1, 31), single_block="any")
_CUDA_ACTIVATIONS_1_32 = (*_CUDA_MOE.activations, "relu2", "geglu")
_CUDA_MOE_1_28 = replace(_CUDA_MOE, since=(1, 28), fusions=(1, 2), constants=None)
_WEBGPU_MOE = Kernel((1, 24), activations=("swiglu",), unnormalized=())
_WEBGPU_QMOE = replace(_WEBGPU_MOE, blocks=dict.fromkeys((4, 8), _GPU_BLOCKS[1:]), single_block="alike")

KERNELS: Mapping[tuple[str, str], tuple[Kernel, ...]] = {
    ("cpu", MOE.name): (_CPU_MOE, _CPU_MOE_1_32),
    ("cpu", QMOE.name): (_CPU_1_23, _CPU_1_24, _CPU_1_25, _CPU_1_27, _CPU_1_31),
    ("cuda", MOE.name): (
        *(_CUDA_MOE, _CUDA_MOE_1_28),
        replace(_CUDA_MOE_1_28, since=(1, 32), activations=_CUDA_ACTIVATIONS_1_32),
    ),
    ("cuda", QMOE.name): (
        *(_CUDA_1_23, _CUDA_1_24, _CUDA_1_28, _CUDA_1_31),
        replace(_CUDA_1_31, since=(1, 32), activations=_CUDA_ACTIVATIONS_1_32),
    ),
    ("webgpu", MOE.name): (_WEBGPU_MOE,),
    ("webgpu", QMOE.name): (_WEBGPU_QMOE, replace(_WEBGPU_QMOE, since=(1, 31), single_block="any")),
}
"""(Provider, operator) -> rows in the order of versions; the last that is not newer than the target holds."""
