"""What a runtime can run, as data: provider and ONNX Runtime version -> operators, dtypes, widths and layouts."""

from rewriter.target.experts import KERNELS, Kernel
from rewriter.target.linears import LINEARS, LinearKernel
from rewriter.target.lookups import LOOKUPS, LookupKernel
from rewriter.target.target import ADDED, PROVIDERS, Target

__all__ = [
    "ADDED",
    "KERNELS",
    "LINEARS",
    "LOOKUPS",
    "PROVIDERS",
    "Kernel",
    "LinearKernel",
    "LookupKernel",
    "Target",
]
