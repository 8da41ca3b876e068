"""The old place of ``rewriter.operators.layout``, for rule packages; it goes with the next release."""

import sys
import warnings

from rewriter.operators.layout import cutlass, gather_block_quantized, matmul_nbits, packing, qmoe

warnings.warn("rewriter.layout is rewriter.operators.layout now", DeprecationWarning, stacklevel=2)
for _module in (cutlass, gather_block_quantized, matmul_nbits, packing, qmoe):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module
