"""Measures what ONNX Runtime computes with each form of the operators that rules write: ``python benchmarks/prober``.

Needs numpy, onnx and an onnxruntime with the provider, nothing of the rewriter. ``python -m zipapp benchmarks/prober
-o prober.pyz`` makes one file of it, to be run where the hardware is: ``python prober.pyz --provider cuda``. What it
writes is one file too, which belongs into benchmarks/prober/measured.
"""

import os

# NumPy reads them as it is imported.
os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

from probe.command import main

raise SystemExit(main())
