"""Declarative, proved pattern rewrites for ONNX Mixture-of-Experts models."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
    from rewriter.api import apply
    from rewriter.calibration import Calibration
    from rewriter.calibration.capture import calibrate
    from rewriter.errors import (
        ModelError,
        NonConvergenceError,
        ParityError,
        QuantizationError,
        RewriterError,
        RuleError,
        RuleSetError,
        TargetError,
        UsageError,
    )
    from rewriter.explanation.candidates import compare
    from rewriter.explanation.dry_run import explain
    from rewriter.explanation.focus import Concern
    from rewriter.inspection.model import ModelInfo, inspect
    from rewriter.parity.model import ModelParity, check
    from rewriter.quantize.types import QuantizedWeight, Quantizer, WeightContext, WeightSpec
    from rewriter.report import Report
    from rewriter.result import Result
    from rewriter.ruleset import RuleSet
    from rewriter.ruleset.load import load

__all__ = [
    "Calibration",
    "Concern",
    "ModelError",
    "ModelInfo",
    "ModelParity",
    "NonConvergenceError",
    "ParityError",
    "QuantizationError",
    "QuantizedWeight",
    "Quantizer",
    "Report",
    "Result",
    "RewriterError",
    "RuleError",
    "RuleSet",
    "RuleSetError",
    "TargetError",
    "UsageError",
    "WeightContext",
    "WeightSpec",
    "__version__",
    "apply",
    "calibrate",
    "check",
    "compare",
    "explain",
    "inspect",
    "load",
]

_HOMES = {
    "rewriter.result": ("Result",),
    "rewriter.api": ("apply",),
    "rewriter.calibration": ("Calibration",),
    "rewriter.calibration.capture": ("calibrate",),
    "rewriter.errors": tuple(name for name in __all__ if name.endswith("Error")),
    "rewriter.explanation.candidates": ("compare",),
    "rewriter.explanation.dry_run": ("explain",),
    "rewriter.explanation.focus": ("Concern",),
    "rewriter.inspection.model": ("ModelInfo", "inspect"),
    "rewriter.parity.model": ("ModelParity", "check"),
    "rewriter.quantize.types": ("QuantizedWeight", "Quantizer", "WeightContext", "WeightSpec"),
    "rewriter.report": ("Report",),
    "rewriter.ruleset": ("RuleSet", "load"),
}


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used: the command line answers --help without loading ONNX."""
    if name == "__version__":
        return metadata.version("onnx-moe-rewriter")
    for home, names in _HOMES.items():
        if name in names:
            value: object = getattr(import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'rewriter' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
