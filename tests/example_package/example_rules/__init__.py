"""Rules of our own for onnx-moe-rewriter."""
