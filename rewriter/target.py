"""What a runtime can run: provider and ONNX Runtime version, as data."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass

from rewriter.errors import TargetError, nearest

PROVIDERS = ("cpu", "cuda", "webgpu", "dml")
_OLDEST = (1, 23)
_BFLOAT16 = {"cuda"}
_MATMUL_NBITS_BIAS = {"cpu", "webgpu"}
_MATMUL_NBITS_BITS = {"cpu": (2, 4, 8), "cuda": (4, 8), "webgpu": (2, 4, 8), "dml": (4,)}


@dataclass(frozen=True)
class Target:
    """A provider of ONNX Runtime, a GPU architecture where it matters, and a version.

    Attributes:
        provider: cpu, cuda, webgpu or dml.
        architecture: sm80 or sm90 for cuda; empty otherwise.
        version: (major, minor) of ONNX Runtime.
    """

    provider: str = "cpu"
    architecture: str = ""
    version: tuple[int, int] = (1, 28)

    @classmethod
    def parse(cls, text: str) -> Target:
        """Reads ``PROVIDER[:ARCHITECTURE][@VERSION]``; ``auto`` is the CPU provider of the installed runtime.

        Raises:
            TargetError: the text names no known target.
        """
        if text == "auto":
            return cls(version=_installed() or cls.version)
        found = re.fullmatch(r"([a-z]+)(?::([a-z0-9]+))?(?:@(\d+)\.(\d+)(?:\.\d+)?)?", text)
        if not found:
            form = "PROVIDER[:sm80|sm90][@VERSION], as cpu, cuda:sm90 or webgpu@1.30"
            raise TargetError(f"target '{text}' is not {form}")
        provider, architecture, major, minor = found.groups()
        if provider not in PROVIDERS:
            raise TargetError(f"unknown provider '{provider}' in target '{text}'{nearest(provider, PROVIDERS)}")
        if architecture and (provider != "cuda" or architecture not in ("sm80", "sm90")):
            raise TargetError(f"unknown architecture '{architecture}' in target '{text}' (cuda:sm80 or cuda:sm90)")
        version = (int(major), int(minor)) if major else _installed() or cls.version
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


def _installed() -> tuple[int, int] | None:
    for distribution in ("onnxruntime", "onnxruntime-gpu"):
        try:
            major, minor, *_ = importlib.metadata.version(distribution).split(".")
        except importlib.metadata.PackageNotFoundError:
            continue
        return int(major), int(minor)
    return None
