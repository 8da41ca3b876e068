"""Declarative, proved pattern rewrites for ONNX Mixture-of-Experts models."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewriter.api import Result, apply
    from rewriter.calibration import Calibration
    from rewriter.calibration.capture import calibrate
    from rewriter.errors import RewriterError
    from rewriter.quantize.types import QuantizedWeight, Quantizer, WeightContext, WeightSpec
    from rewriter.report import Report
    from rewriter.ruleset import RuleSet
    from rewriter.ruleset.load import load

__all__ = [
    "Calibration",
    "QuantizedWeight",
    "Quantizer",
    "Report",
    "Result",
    "RewriterError",
    "RuleSet",
    "WeightContext",
    "WeightSpec",
    "apply",
    "calibrate",
    "load",
]

_HOMES = {
    "rewriter.api": ("Result", "apply"),
    "rewriter.calibration": ("Calibration",),
    "rewriter.calibration.capture": ("calibrate",),
    "rewriter.errors": ("RewriterError",),
    "rewriter.quantize.types": ("QuantizedWeight", "Quantizer", "WeightContext", "WeightSpec"),
    "rewriter.report": ("Report",),
    "rewriter.ruleset": ("RuleSet", "load"),
}


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used: the command line answers --help without loading ONNX."""
    for home, names in _HOMES.items():
        if name in names:
            value: object = getattr(import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'rewriter' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
