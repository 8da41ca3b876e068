"""Calibration: what the weights of a model saw on real tokens, kept on disk and read one weight at a time."""

from rewriter.calibration.store import Activations, Calibration

__all__ = ["Activations", "Calibration"]
