"""A target: the provider and version of ONNX Runtime on which a model must run."""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rewriter.errors import TargetError, nearest
from rewriter.operators.form import OPERATORS as EXPERTS
from rewriter.operators.gather_block_quantized import GATHER_BLOCK_QUANTIZED
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.operators.qmoe import QMOE, ROUTER_WEIGHTS
from rewriter.target.experts import KERNELS, Kernel
from rewriter.target.linears import LINEARS, LinearKernel
from rewriter.target.lookups import LOOKUPS, LookupKernel
from rewriter.target.version import R, Version, row_at

PROVIDERS = ("cpu", "cuda", "webgpu", "dml")
_OLDEST = (1, 23)
_ROUTER_WEIGHTS = {"cpu", "cuda"}

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
    def linear(self) -> LinearKernel:
        """What the provider's MatMulNBits runs."""
        return _at(LINEARS[self.provider], self.version)

    @property
    def lookup(self) -> LookupKernel:
        """What the provider's GatherBlockQuantized reads."""
        return _at(LOOKUPS[self.provider], self.version)

    @property
    def matmul_nbits_layouts(self) -> tuple[str, ...]:
        """Names of the layouts of B that MatMulNBits reads, the preferred first."""
        prepacked = self.provider == "cuda" and self.has(MATMUL_NBITS.name, "weight_prepacked")
        return ("raw", f"cutlass-{self.architecture}") if prepacked and self.architecture else ("raw",)

    @property
    def router_weights(self) -> bool:
        """Whether QMoE takes router_weights, and the provider's kernel heeds them."""
        schema = _schema(QMOE.name) if self.installed else None
        inputs = schema[1] if schema else QMOE.input_count(self.version)
        return inputs > ROUTER_WEIGHTS and self.provider in _ROUTER_WEIGHTS

    @property
    def qmoe_layouts(self) -> tuple[str, ...]:
        """Names of the layouts of weights that QMoE reads, the preferred first; empty where nothing tells which."""
        kernel = self.kernel(QMOE.name)
        layouts = kernel.layouts if kernel else ()
        if self.provider == "cuda" and "raw" not in layouts:
            return tuple(layout for layout in layouts if layout == f"cutlass-{self.architecture}")
        return layouts

    def kernel(self, operator: str) -> Kernel | None:
        """Returns what the provider's MoE or QMoE runs, or None where it has no such kernel."""
        return row_at(KERNELS.get((self.provider, operator), ()), self.version)

    def has(self, operator: str, attribute: str) -> bool:
        """Whether the runtime's operator has the attribute; one that has not refuses the model."""
        schema = _schema(operator) if self.installed else None
        if schema:
            return attribute in schema[0]
        return ADDED.get(operator, {}).get(attribute, _OLDEST) <= self.version

    def rounds_activations(self, bits: int, block: int, accuracy_level: int = 0) -> bool:
        """Whether QMoE computes with 8-bit activations, so that its numbers cannot prove a rewrite."""
        kernel = self.kernel(QMOE.name)
        rounding = kernel.int8_activations if kernel else ()
        return (accuracy_level == 4 and block > 0) or any(bits == b and block >= least for b, least in rounding)


def _fault(text: str) -> str:
    """Says what is wrong with a target that cannot be read."""
    rest, at, version = text.partition("@")
    provider = rest.partition(":")[0]
    if close := difflib.get_close_matches(provider.lower(), PROVIDERS, n=1) if provider not in PROVIDERS else []:
        return f"unknown provider '{provider}' in target '{text}' (did you mean '{close[0]}'?)"
    if at and not re.fullmatch(r"\d+\.\d+(\.\d+)?", version):
        return f"target '{text}': a version is MAJOR.MINOR, as {provider or 'cpu'}@1.32"
    return f"target '{text}' is not PROVIDER[:sm80|sm90][@VERSION], as cpu, cuda:sm90 or webgpu@1.30"


def _at(rows: Sequence[R], version: Version) -> R:
    row = row_at(rows, version)
    assert row is not None, "no target is older than the first row"
    return row


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
