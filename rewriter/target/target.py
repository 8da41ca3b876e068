"""A target: the provider and version of ONNX Runtime on which a model must run."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from rewriter.errors import TargetError, nearest
from rewriter.graph.declines import OTHER_TARGET, Reason
from rewriter.operators.form import OPERATORS as EXPERTS
from rewriter.operators.form import ExpertForm
from rewriter.operators.gather_block_quantized import GATHER_BLOCK_QUANTIZED
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.operators.operator import Version
from rewriter.operators.qmoe import QMOE, ROUTER_WEIGHTS
from rewriter.target.experts import KERNELS, Kernel
from rewriter.target.linears import LINEARS, LinearKernel
from rewriter.target.lookups import LOOKUPS, LookupKernel

Row = TypeVar("Row", Kernel, LinearKernel, LookupKernel)

PROVIDERS = ("cpu", "cuda", "webgpu", "dml")
_OLDEST = (1, 23)
_MEANT = {"gpu": "cuda", "nvidia": "cuda", "directml": "dml", "web": "webgpu", "wgpu": "webgpu"}
"""What people write for a provider."""

ADDED: Mapping[str, Mapping[str, Version]] = {
    operator.name: operator.gained for operator in (*EXPERTS, MATMUL_NBITS, GATHER_BLOCK_QUANTIZED)
}
"""Attributes that operators gained, and the version from which a runtime does not refuse them."""


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
        if not isinstance(text, str):
            raise TargetError(f"a target is text, as cpu or cuda:sm90, not {type(text).__name__}")
        installed = _installed()
        if text == "auto":
            return cls(version=installed or cls.version, installed=installed is not None)
        found = re.fullmatch(r"([a-z]+)(?::([a-z0-9]+))?(?:@(\d+)\.(\d+)(?:\.\d+)?)?", text)
        if not found:
            raise TargetError(_fault(text))
        provider, architecture, major, minor = found.groups()
        if provider not in PROVIDERS:
            meant = _MEANT.get(provider)
            hint = f" (did you mean '{meant}'?)" if meant else nearest(provider, PROVIDERS)
            raise TargetError(f"unknown provider '{provider}' in target '{text}'{hint}")
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
    def linear(self) -> LinearKernel:
        """What the provider's MatMulNBits runs."""
        return _until(LINEARS[self.provider], self.version)[-1]

    @property
    def lookup(self) -> LookupKernel:
        """What the provider's GatherBlockQuantized reads."""
        return _until(LOOKUPS[self.provider], self.version)[-1]

    @property
    def takes_router_weights(self) -> bool:
        """Whether QMoE has a slot for router_weights; whether a kernel heeds them, the kernel says."""
        schema = _schema(QMOE.name) if self.installed else None
        inputs = schema[1] if schema else QMOE.input_count(self.version)
        return inputs > ROUTER_WEIGHTS

    def kernels(self, operator: str) -> tuple[Kernel, ...]:
        """Returns the provider's kernels of MoE or QMoE, the preferred first; empty where it has none."""
        newest = (_until(rows, self.version)[-1:] for rows in KERNELS.get((self.provider, operator), ()))
        return tuple(self._of_architecture(row) for rows in newest for row in rows)

    def runs(self, operator: str, form: ExpertForm, dtype: str, *, weighted: bool = False) -> tuple[Kernel, ...] | str:
        """Returns the provider's kernels that compute such a node as it is meant, or why none does.

        Args:
            operator: MoE or QMoE.
            form: what the node computes.
            dtype: of x.
            weighted: whether router_weights are given.
        """
        kernels = self.kernels(operator)
        if not kernels:
            return Reason(f"it has no {operator}", OTHER_TARGET)
        if weighted and not self.takes_router_weights:
            return "it takes no router_weights"
        reasons = [kernel.refusal(form, dtype, weighted=weighted) for kernel in kernels]
        found = tuple(kernel for kernel, reason in zip(kernels, reasons, strict=True) if reason is None)
        return found or next(reason for reason in reasons if reason)

    def has(self, operator: str, attribute: str) -> bool:
        """Whether the runtime's operator has the attribute; one that has not refuses the model."""
        schema = _schema(operator) if self.installed else None
        if schema:
            return attribute in schema[0]
        return ADDED.get(operator, {}).get(attribute, _OLDEST) <= self.version

    def _of_architecture(self, kernel: Kernel) -> Kernel:
        """Returns a kernel with the layouts of this architecture, where it reads no raw weights on any."""
        if self.provider != "cuda" or not all(layout.startswith("cutlass") for layout in kernel.layouts):
            return kernel
        own = tuple(layout for layout in kernel.layouts if layout == f"cutlass-{self.architecture}")
        return replace(kernel, layouts=own)


def _fault(text: str) -> str:
    """Says what is wrong with a target that cannot be read."""
    rest, at, version = text.partition("@")
    provider = rest.partition(":")[0]
    if close := difflib.get_close_matches(provider.lower(), PROVIDERS, n=1) if provider not in PROVIDERS else []:
        return f"unknown provider '{provider}' in target '{text}' (did you mean '{close[0]}'?)"
    if at and not re.fullmatch(r"\d+\.\d+(\.\d+)?", version):
        return f"target '{text}': a version is MAJOR.MINOR, as {provider or 'cpu'}@1.32"
    return f"target '{text}' is not PROVIDER[:sm80|sm90][@VERSION], as cpu, cuda:sm90 or webgpu@1.30"


def _until(rows: Sequence[Row], version: Version) -> list[Row]:
    """Returns the rows that are no newer than a version, the newest last; no target is older than a linear's first."""
    return [row for row in rows if row.since <= version]


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
    """The version of the runtime that is imported: several distributions install a module of that name."""
    try:
        import onnxruntime  # noqa: PLC0415 -- an extra
    except ImportError:
        return None
    major, minor, *_ = onnxruntime.__version__.split(".")
    return int(major), int(minor)
