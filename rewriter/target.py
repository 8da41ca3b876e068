"""What a runtime can run: provider and ONNX Runtime version, as data.

Source: the CPU rows were measured on each release's own wheel; CUDA's and WebGPU's are read off their kernels' checks.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rewriter.errors import TargetError, nearest
from rewriter.experts import ROUTER_WEIGHTS, ExpertForm

Version = tuple[int, int]

PROVIDERS = ("cpu", "cuda", "webgpu", "dml")
_OLDEST = (1, 23)
_BFLOAT16 = {"cuda"}
_ROUTER_WEIGHTS = {"cpu", "cuda"}
_MATMUL_NBITS_BIAS = {"cpu", "webgpu"}
_MATMUL_NBITS_BITS = {"cpu": (2, 4, 8), "cuda": (4, 8), "webgpu": (2, 4, 8), "dml": (4,)}


@dataclass(frozen=True)
class Kernel:
    """What one provider's kernel of MoE or QMoE runs, from one version on.

    Attributes:
        since: the first version.
        dtypes: of x.
        activations: values of ``activation_type``.
        fusions: values of ``swiglu_fusion`` other than 0.
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
        layouts: of QMoE, layouts that it reads: None for raw, else the architecture of the CUTLASS layout.
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
    layouts: tuple[int | None, ...] = (None,)

    def refusal(self, form: ExpertForm, dtype: str, *, weighted: bool = False) -> str | None:
        """Returns why the kernel cannot run a node of this form and dtype, or runs it wrongly, or None.

        Args:
            form: what the node computes.
            dtype: of x.
            weighted: whether router_weights are given.
        """
        if form.activation not in self.activations:
            return f"activation '{form.activation}' has no kernel (it runs {', '.join(self.activations)})"
        if dtype not in self.dtypes:
            return f"{dtype.lower()} has no kernel (it runs {', '.join(self.dtypes).lower()})"
        if form.gated and form.activation not in self.fc3:
            return f"fc3 beside '{form.activation}' has no kernel"
        if form.activation == "swiglu" and not form.gated and form.fusion not in self.fusions:
            return f"swiglu_fusion={form.fusion} has no kernel (it runs {', '.join(map(str, self.fusions))})"
        if form.sparse_mixer and not self.sparse_mixer:
            return "use_sparse_mixer has no kernel"
        if form.activation == "swiglu" and self.constants and not _same(form, self.constants):
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

_CPU_MOE = Kernel((1, 23), unnormalized=("FLOAT",))
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
    layouts=(80, 90),
)
_CUDA_1_24 = replace(_CUDA_1_23, since=(1, 24), zero_point_blocks=_GPU_BLOCKS[1:])
_CUDA_1_28 = replace(_CUDA_1_24, since=(1, 28), fusions=(1, 2), constants=None, layouts=(None, 80))
_CUDA_1_31 = replace(_CUDA_1_28, since=(1, 31), single_block="any")
_WEBGPU_MOE = Kernel((1, 24), activations=("swiglu",), unnormalized=())
_WEBGPU_QMOE = replace(_WEBGPU_MOE, blocks=dict.fromkeys((4, 8), _GPU_BLOCKS[1:]), single_block="alike")

KERNELS: Mapping[tuple[str, str], tuple[Kernel, ...]] = {
    ("cpu", "MoE"): (_CPU_MOE,),
    ("cpu", "QMoE"): (_CPU_1_23, _CPU_1_24, _CPU_1_25, _CPU_1_27, _CPU_1_31),
    ("cuda", "MoE"): (_CUDA_MOE, replace(_CUDA_MOE, since=(1, 28), fusions=(1, 2), constants=None)),
    ("cuda", "QMoE"): (_CUDA_1_23, _CUDA_1_24, _CUDA_1_28, _CUDA_1_31),
    ("webgpu", "MoE"): (_WEBGPU_MOE,),
    ("webgpu", "QMoE"): (_WEBGPU_QMOE, replace(_WEBGPU_QMOE, since=(1, 31), single_block="any")),
}
"""(Provider, operator) -> rows in the order of versions; the last that is not newer than the target holds."""

_ADDED: Mapping[str, Mapping[str, Version]] = {
    "QMoE": {
        "quant_type": (1, 27),
        "weights_prepacked": (1, 28),
        "accuracy_level": (1, 31),
        "fc1_expert_weight_bits": (1, 31),
        "fc2_expert_weight_bits": (1, 31),
        "fc3_expert_weight_bits": (1, 31),
    },
    "MatMulNBits": {"weight_prepacked": (1, 28)},
}
"""Attributes that operators gained, and the version from which a runtime does not refuse them."""

_QMOE_INPUTS = (((1, 27), 21), ((1, 25), 15), ((1, 24), 14), ((1, 23), 11))


@dataclass(frozen=True)
class Target:
    """A provider of ONNX Runtime, a GPU architecture where it matters, and a version.

    Attributes:
        provider: cpu, cuda, webgpu or dml.
        architecture: sm80 or sm90 for cuda; empty otherwise.
        version: (major, minor) of ONNX Runtime.
        installed: whether the installed runtime's own schemas tell what its operators take.
    """

    provider: str = "cpu"
    architecture: str = ""
    version: Version = (1, 28)
    installed: bool = False

    @classmethod
    def parse(cls, text: str) -> Target:
        """Reads ``PROVIDER[:ARCHITECTURE][@VERSION]``; ``auto`` is the CPU provider of the installed runtime.

        Raises:
            TargetError: the text names no known target.
        """
        installed = _installed()
        if text == "auto":
            return cls(version=installed or cls.version, installed=installed is not None)
        found = re.fullmatch(r"([a-z]+)(?::([a-z0-9]+))?(?:@(\d+)\.(\d+)(?:\.\d+)?)?", text)
        if not found:
            form = "PROVIDER[:sm80|sm90][@VERSION], as cpu, cuda:sm90 or webgpu@1.30"
            raise TargetError(f"target '{text}' is not {form}")
        provider, architecture, major, minor = found.groups()
        if provider not in PROVIDERS:
            raise TargetError(f"unknown provider '{provider}' in target '{text}'{nearest(provider, PROVIDERS)}")
        if architecture and (provider != "cuda" or architecture not in ("sm80", "sm90")):
            raise TargetError(f"unknown architecture '{architecture}' in target '{text}' (cuda:sm80 or cuda:sm90)")
        version = (int(major), int(minor)) if major else installed or cls.version
        if version < _OLDEST:
            raise TargetError(f"target '{text}': ONNX Runtime before {_OLDEST[0]}.{_OLDEST[1]} is not supported")
        return cls(provider, architecture or "", version)

    def __str__(self) -> str:
        architecture = f":{self.architecture}" if self.architecture else ""
        return f"{self.provider}{architecture}@{self.version[0]}.{self.version[1]}"

    @property
    def runs_bfloat16(self) -> bool:
        """Whether the provider has bfloat16 kernels for the quantized operators."""
        return self.provider in _BFLOAT16

    @property
    def matmul_nbits_bits(self) -> tuple[int, ...]:
        """Bit widths that MatMulNBits runs at."""
        return _MATMUL_NBITS_BITS[self.provider]

    @property
    def matmul_nbits_takes_bias(self) -> bool:
        """Whether the provider's MatMulNBits kernel reads the bias slot."""
        return self.provider in _MATMUL_NBITS_BIAS

    @property
    def matmul_nbits_layouts(self) -> tuple[int | None, ...]:
        """Layouts of B that MatMulNBits reads: None for raw, else the architecture of the CUTLASS layout."""
        if self.provider != "cuda" or not self.has("MatMulNBits", "weight_prepacked"):
            return (None,)
        return (None, int(self.architecture[2:])) if self.architecture else (None,)

    @property
    def router_weights(self) -> bool:
        """Whether QMoE takes router_weights, and the provider's kernel heeds them."""
        schema = _schema("QMoE") if self.installed else None
        inputs = schema[1] if schema else next(count for since, count in _QMOE_INPUTS if since <= self.version)
        return inputs > ROUTER_WEIGHTS and self.provider in _ROUTER_WEIGHTS

    @property
    def qmoe_layouts(self) -> tuple[int | None, ...]:
        """Layouts of the weights that QMoE reads, the preferred first; empty where nothing tells which."""
        kernel = self.kernel("QMoE")
        layouts = kernel.layouts if kernel else ()
        if self.provider == "cuda" and None not in layouts:
            return tuple(layout for layout in layouts if f"sm{layout}" == self.architecture)
        return layouts

    def kernel(self, operator: str) -> Kernel | None:
        """Returns what the provider's MoE or QMoE runs, or None where it has no such kernel."""
        rows = KERNELS.get((self.provider, operator), ())
        return next((row for row in reversed(rows) if row.since <= self.version), None)

    def has(self, operator: str, attribute: str) -> bool:
        """Whether the runtime's operator has the attribute; one that has not refuses the model."""
        schema = _schema(operator) if self.installed else None
        if schema:
            return attribute in schema[0]
        return _ADDED.get(operator, {}).get(attribute, _OLDEST) <= self.version

    def rounds_activations(self, bits: int, block: int, accuracy_level: int = 0) -> bool:
        """Whether QMoE computes with 8-bit activations, so that its numbers cannot prove a rewrite."""
        kernel = self.kernel("QMoE")
        rounding = kernel.int8_activations if kernel else ()
        return (accuracy_level == 4 and block > 0) or any(bits == b and block >= least for b, least in rounding)


@functools.cache
def _schema(operator: str) -> tuple[frozenset[str], int] | None:
    """Attributes and number of inputs of an operator of the installed runtime, or None where it does not tell."""
    try:
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema  # noqa: PLC0415 -- an extra
    except ImportError:
        return None
    for schema in get_all_operator_schema():
        if schema.domain == "com.microsoft" and schema.name == operator:
            return frozenset(schema.attributes), len(schema.inputs)
    return None


@functools.cache
def _installed() -> Version | None:
    for distribution in ("onnxruntime", "onnxruntime-gpu"):
        try:
            major, minor, *_ = importlib.metadata.version(distribution).split(".")
        except importlib.metadata.PackageNotFoundError:
            continue
        return int(major), int(minor)
    return None
